// What an image says about itself beyond its header: internal snapshots, persistent bitmaps, and all of it in the
// shape of `qemu-img info --output=json`. Read synchronously, as it is asked for rarely and small. Any thread.

import { readBitmapDirectory, type BitmapDirectoryEntry } from "./format/bitmap.js";
import type { QcowFile } from "./format/file.js";
import {
  COMPATIBLE_LAZY_REFCOUNTS,
  INCOMPATIBLE_CORRUPT,
  INCOMPATIBLE_DIRTY,
  MAX_SNAPSHOT_EXTRA_BYTES,
  MAX_SNAPSHOT_TABLE_BYTES,
  formatError,
  isExtendedL2,
  readNumber,
  type Qcow2Header,
} from "./format/header.js";

export interface SnapshotInfo {
  id: string;
  name: string;
  "vm-state-size": number;
  "date-sec": number;
  "date-nsec": number;
  "vm-clock-sec": number;
  "vm-clock-nsec": number;
  icount?: number;
}

export interface BitmapInfo {
  name: string;
  granularity: number;
  flags: ("in-use" | "auto")[];
}

export interface Qcow2SpecificInfo {
  compat: "0.10" | "1.1";
  "compression-type": string;
  "refcount-bits": number;
  "lazy-refcounts"?: boolean;
  corrupt?: boolean;
  "extended-l2"?: boolean;
  bitmaps?: BitmapInfo[];
}

export interface Qcow2ImageInfo {
  "cluster-size": number;
  "dirty-flag": boolean;
  "backing-filename"?: string;
  "backing-filename-format"?: string;
  snapshots?: SnapshotInfo[];
  "format-specific": { type: "qcow2"; data: Qcow2SpecificInfo };
}

/** @throws CowcatcherError FORMAT, LIMIT or IO where the snapshot table or the bitmap directory is damaged. */
export function describeImage(header: Qcow2Header, file: QcowFile): Qcow2ImageInfo {
  const data: Qcow2SpecificInfo = {
    compat: header.version === 2 ? "0.10" : "1.1",
    "compression-type": header.compressionType,
    "refcount-bits": 2 ** header.refcountOrder,
  };
  if (header.version === 3) {
    data["lazy-refcounts"] = (header.compatibleFeatures & COMPATIBLE_LAZY_REFCOUNTS) !== 0n;
    data.corrupt = (header.incompatibleFeatures & INCOMPATIBLE_CORRUPT) !== 0n;
    data["extended-l2"] = isExtendedL2(header);
    const bitmaps = readBitmapDirectory(header, file).map(bitmapInfo);
    if (bitmaps.length > 0) data.bitmaps = bitmaps;
  }
  const info: Qcow2ImageInfo = {
    "cluster-size": 2 ** header.clusterBits,
    "dirty-flag": (header.incompatibleFeatures & INCOMPATIBLE_DIRTY) !== 0n,
    "format-specific": { type: "qcow2", data },
  };
  if (header.backingFile !== null) info["backing-filename"] = header.backingFile;
  if (header.backingFormat !== null) info["backing-filename-format"] = header.backingFormat;
  if (header.snapshotCount > 0) info.snapshots = readSnapshots(header, file);
  return info;
}

/** Specification: qcow2, "Snapshots". */
export function readSnapshots(header: Qcow2Header, file: QcowFile): SnapshotInfo[] {
  const snapshots: SnapshotInfo[] = [];
  let offset = header.snapshotsOffset;
  for (let index = 0; index < header.snapshotCount; index++) {
    const fixed = readView(file, offset, 40);
    const idBytes = fixed.getUint16(12);
    const nameBytes = fixed.getUint16(14);
    const extraBytes = fixed.getUint32(36);
    if (extraBytes > MAX_SNAPSHOT_EXTRA_BYTES) {
      throw formatError(file.name, `snapshot ${index} has ${extraBytes} bytes of extra data`, offset);
    }
    const rest = readView(file, offset + 40, extraBytes + idBytes + nameBytes);
    const text = (start: number, length: number): string =>
      Buffer.from(rest.buffer, start, length).toString("utf8");
    const clockNs = fixed.getBigUint64(24);
    const snapshot: SnapshotInfo = {
      id: text(extraBytes, idBytes),
      name: text(extraBytes + idBytes, nameBytes),
      "vm-state-size":
        extraBytes >= 8 ? readNumber(rest, 0, "VM state size", file.name) : fixed.getUint32(32),
      "date-sec": fixed.getUint32(16),
      "date-nsec": fixed.getUint32(20),
      "vm-clock-sec": Number(clockNs / 1_000_000_000n),
      "vm-clock-nsec": Number(clockNs % 1_000_000_000n),
    };
    // All ones: the machine ran without instruction counting.
    const icount = extraBytes >= 24 ? rest.getBigInt64(16) : -1n;
    if (icount !== -1n) snapshot.icount = Number(icount);
    snapshots.push(snapshot);
    offset += Math.ceil((40 + extraBytes + idBytes + nameBytes) / 8) * 8;
    if (offset - header.snapshotsOffset > MAX_SNAPSHOT_TABLE_BYTES) {
      throw formatError(file.name, "the snapshot table is larger than 64 MiB", header.snapshotsOffset);
    }
  }
  return snapshots;
}

function bitmapInfo({ name, granularityBits, isInUse, isAuto }: BitmapDirectoryEntry): BitmapInfo {
  const flags: BitmapInfo["flags"] = [];
  if (isInUse) flags.push("in-use");
  if (isAuto) flags.push("auto");
  return { name, granularity: 2 ** granularityBits, flags };
}

function readView(file: QcowFile, offset: number, lengthBytes: number): DataView<ArrayBuffer> {
  const bytes = new Uint8Array(lengthBytes);
  file.readSync(bytes, 0, lengthBytes, offset);
  return new DataView(bytes.buffer);
}
