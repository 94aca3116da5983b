// The JSON document of `info`, member for member that of qemu-img 7.2, and the text that qemu-img makes of it.
import type { BitmapInfo, SnapshotInfo } from "../../image/qcow2/info.js";
import { qemuDump, qemuSize, type JsonValue } from "./qemu-text.js";

/** QEMU's ImageInfo. */
export interface ImageInfoDocument {
  filename: string;
  format: string;
  "virtual-size": number;
  /** Unknown of an NBD export. */
  "actual-size"?: number;
  "dirty-flag"?: boolean;
  "cluster-size"?: number;
  encrypted?: boolean;
  "backing-filename"?: string;
  "full-backing-filename"?: string;
  "backing-filename-format"?: string;
  snapshots?: SnapshotInfo[];
  "format-specific"?: { type: string; data: FormatSpecificDocument };
  /** Not QEMU's: of the folder beside the image that `serve` keeps track in. */
  tracking?: TrackingDocument;
}

/** See src/tracking/inspect.ts. */
export interface TrackingDocument {
  folder: string;
  state: string;
  mode?: string;
  generation?: string;
  granularity?: number;
  epochs?: number;
  checkpoints: { name: string; uuid: string; "created-ms": number }[];
  "loss-reason"?: string;
  "lost-checkpoints"?: string[];
}

/** QEMU's ImageInfoSpecificQCow2; of `encrypt` the format alone. */
export interface FormatSpecificDocument {
  compat: string;
  "compression-type": string;
  "lazy-refcounts"?: boolean;
  bitmaps?: BitmapInfo[];
  "refcount-bits": number;
  "data-file"?: string;
  "data-file-raw"?: boolean;
  encrypt?: { format: string };
  corrupt?: boolean;
  "extended-l2"?: boolean;
}

export function infoLines(info: ImageInfoDocument): string[] {
  const lines = [
    `image: ${info.filename}`,
    `file format: ${info.format}`,
    `virtual size: ${qemuSize(info["virtual-size"])} (${info["virtual-size"]} bytes)`,
    `disk size: ${info["actual-size"] === undefined ? "unavailable" : qemuSize(info["actual-size"])}`,
  ];
  if (info.encrypted === true) lines.push("encrypted: yes");
  if (info["cluster-size"] !== undefined) lines.push(`cluster_size: ${info["cluster-size"]}`);
  if (info["dirty-flag"] === true) lines.push("cleanly shut down: no");
  lines.push(...backingLines(info));
  if (info.snapshots !== undefined) lines.push("Snapshot list:", ...snapshotLines(info.snapshots));
  if (info["format-specific"] !== undefined) {
    lines.push("Format specific information:", ...qemuDump(dumpOrder(info["format-specific"].data)));
  }
  if (info.tracking !== undefined) lines.push("Changed-block tracking:", ...trackingLines(info.tracking));
  return lines;
}

function trackingLines(tracking: TrackingDocument): string[] {
  const { folder, state, mode, generation, granularity, epochs, checkpoints } = tracking;
  const loss = tracking["loss-reason"];
  const lines = [`folder: ${folder}`, `state: ${state}`];
  if (mode !== undefined) lines.push(`mode: ${mode}`);
  if (generation !== undefined) lines.push(`generation: ${generation}`);
  if (granularity !== undefined) lines.push(`granularity: ${granularity}`);
  if (epochs !== undefined) lines.push(`epochs: ${epochs}`);
  for (const { name, uuid, "created-ms": createdMs } of checkpoints) {
    lines.push(`checkpoint: ${name} (${localDate(createdMs / 1000)}, ${uuid})`);
  }
  if (loss !== undefined) {
    const names = tracking["lost-checkpoints"] ?? [];
    lines.push(`lost before: ${loss}${names.length === 0 ? "" : ` (checkpoints ${names.join(", ")})`}`);
  }
  return lines.map((line) => `    ${line}`);
}

function dumpOrder(data: FormatSpecificDocument): Record<string, JsonValue> {
  const bitmaps = data.bitmaps?.map(({ flags, name, granularity }) => ({ flags, name, granularity }));
  return {
    compat: data.compat,
    "compression-type": data["compression-type"],
    "lazy-refcounts": data["lazy-refcounts"],
    bitmaps,
    "refcount-bits": data["refcount-bits"],
    "data-file": data["data-file"],
    "data-file-raw": data["data-file-raw"],
    encrypt: data.encrypt,
    corrupt: data.corrupt,
    "extended-l2": data["extended-l2"],
  };
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

function snapshotLines(snapshots: readonly SnapshotInfo[]): string[] {
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
