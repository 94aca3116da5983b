// The JSON documents of `info` and `check`, member for member those of qemu-img 7.2, and the text that qemu-img
// makes of them.
import { qemuDump, qemuSize, type JsonValue } from "./qemu-text.js";

/** QEMU's SnapshotInfo (qapi/block-core.json). */
export interface SnapshotDocument {
  id: string;
  name: string;
  "vm-state-size": number;
  "date-sec": number;
  "date-nsec": number;
  "vm-clock-sec": number;
  "vm-clock-nsec": number;
  /** Left out where the image does not say. */
  icount?: number;
}

/** QEMU's ImageInfo. */
export interface ImageInfoDocument {
  filename: string;
  format: string;
  "virtual-size": number;
  "actual-size": number;
  "dirty-flag": boolean;
  "cluster-size"?: number;
  encrypted?: boolean;
  "backing-filename"?: string;
  "full-backing-filename"?: string;
  "backing-filename-format"?: string;
  snapshots?: SnapshotDocument[];
  "format-specific"?: { type: string; data: { [key: string]: JsonValue } };
}

/** QEMU's ImageCheck. Counts that are zero are left out, as there. */
export interface ImageCheckDocument {
  filename: string;
  format: string;
  "check-errors": number;
  "image-end-offset"?: number;
  corruptions?: number;
  leaks?: number;
  "total-clusters"?: number;
  "allocated-clusters"?: number;
  "fragmented-clusters"?: number;
  "compressed-clusters"?: number;
}

export function infoLines(info: ImageInfoDocument): string[] {
  const lines = [
    `image: ${info.filename}`,
    `file format: ${info.format}`,
    `virtual size: ${qemuSize(info["virtual-size"])} (${info["virtual-size"]} bytes)`,
    `disk size: ${qemuSize(info["actual-size"])}`,
  ];
  if (info.encrypted === true) lines.push("encrypted: yes");
  if (info["cluster-size"] !== undefined) lines.push(`cluster_size: ${info["cluster-size"]}`);
  if (info["dirty-flag"]) lines.push("cleanly shut down: no");
  lines.push(...backingLines(info));
  if (info.snapshots !== undefined) lines.push("Snapshot list:", ...snapshotLines(info.snapshots));
  if (info["format-specific"] !== undefined) {
    lines.push("Format specific information:", ...qemuDump(info["format-specific"].data));
  }
  return lines;
}

function backingLines(info: ImageInfoDocument): string[] {
  const name = info["backing-filename"];
  if (name === undefined) return [];
  const path = info["full-backing-filename"];
  const lines = [
    `backing file: ${name}${path === undefined || path === name ? "" : ` (actual path: ${path})`}`,
  ];
  const format = info["backing-filename-format"];
  if (format !== undefined) lines.push(`backing file format: ${format}`);
  return lines;
}

function snapshotLines(snapshots: readonly SnapshotDocument[]): string[] {
  return [
    snapshotRow("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"),
    ...snapshots.map((snapshot) =>
      snapshotRow(
        snapshot.id,
        snapshot.name,
        qemuSize(snapshot["vm-state-size"]),
        localDate(snapshot["date-sec"]),
        clock(snapshot["vm-clock-sec"], snapshot["vm-clock-nsec"]),
        snapshot.icount === undefined ? "" : String(snapshot.icount),
      ),
    ),
  ];
}

function snapshotRow(
  id: string,
  tag: string,
  vmSize: string,
  date: string,
  vmClock: string,
  icount: string,
): string {
  const left = `${id.padEnd(9)} ${tag.padEnd(16)} `;
  return left + vmSize.padStart(8) + date.padStart(20) + vmClock.padStart(13) + icount.padStart(11);
}

/** In the local time zone, as there. */
function localDate(seconds: number): string {
  const date = new Date(seconds * 1000);
  const day = [date.getFullYear(), twoDigits(date.getMonth() + 1), twoDigits(date.getDate())].join("-");
  const time = [date.getHours(), date.getMinutes(), date.getSeconds()].map(twoDigits).join(":");
  return `${day} ${time}`;
}

function clock(seconds: number, nanoseconds: number): string {
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  const milliseconds = String(Math.floor(nanoseconds / 1e6)).padStart(3, "0");
  return `${parts.map(twoDigits).join(":")}.${milliseconds}`;
}

function twoDigits(value: number): string {
  return String(value).padStart(2, "0");
}

export function checkLines(check: ImageCheckDocument): string[] {
  return [...verdictLines(check), ...clusterLines(check), ...endLines(check)];
}

function verdictLines({
  corruptions = 0,
  leaks = 0,
  "check-errors": checkErrors,
}: ImageCheckDocument): string[] {
  if (corruptions + leaks + checkErrors === 0) return ["No errors were found on the image."];
  const lines: string[] = [];
  if (corruptions > 0) {
    lines.push(
      "",
      `${corruptions} errors were found on the image.`,
      "Data may be corrupted, or further writes to the image may corrupt it.",
    );
  }
  if (leaks > 0) {
    lines.push(
      "",
      `${leaks} leaked clusters were found on the image.`,
      "This means waste of disk space, but no harm to data.",
    );
  }
  if (checkErrors > 0) lines.push("", `${checkErrors} internal errors have occurred during the check.`);
  return lines;
}

function clusterLines(check: ImageCheckDocument): string[] {
  const { "total-clusters": total = 0, "allocated-clusters": allocated = 0 } = check;
  if (total === 0 || allocated === 0) return [];
  const percent = (part: number, whole: number): string => `${((part * 100) / whole).toFixed(2)}%`;
  return [
    `${allocated}/${total} = ${percent(allocated, total)} allocated, ` +
      `${percent(check["fragmented-clusters"] ?? 0, allocated)} fragmented, ` +
      `${percent(check["compressed-clusters"] ?? 0, allocated)} compressed clusters`,
  ];
}

function endLines({ "image-end-offset": end = 0 }: ImageCheckDocument): string[] {
  return end > 0 ? [`Image end offset: ${end}`] : [];
}
