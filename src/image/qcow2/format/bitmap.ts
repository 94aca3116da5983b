// Persistent bitmaps: the directory that lists them, and the bits of one that tracks dirty blocks.
//
// A bitmap is read once and kept in memory, a bit for each `granularityBytes` of the disk: 2 MiB for 1 TiB at QEMU's
// usual 64 KiB. It says what was written since it was cleared only as long as everybody who writes the image keeps
// it, so it is refused where that is in doubt: another program wrote without care for bitmaps (the autoclear bit is
// gone), or the one that kept it did not come to save it (in-use).
//
// Specification: docs/interop/qcow2.rst of qemu/qemu, "Bitmaps". Read synchronously, at the start. Any thread.

import { endianness } from "node:os";
import { CowcatcherError } from "../../../errors.js";
import { MiB } from "../../../units.js";
import type { QcowFile } from "./file.js";
import {
  AUTOCLEAR_BITMAPS,
  formatError,
  MAX_BITMAP_DIRECTORY_BYTES,
  MAX_BITMAPS,
  readNumber,
  type Qcow2Header,
} from "./header.js";
import { assertStored } from "./stored.js";

/** QEMU's limit of one bitmap's data. */
const MAX_BITMAP_BYTES = 512 * MiB;
/** QEMU's limits of the granularity: 512 bytes to 2 GiB. */
const MIN_GRANULARITY_BITS = 9;
export const MAX_GRANULARITY_BITS = 31;
const ENTRY_FIXED_BYTES = 24;
const TYPE_DIRTY_TRACKING = 1;
const FLAG_IN_USE = 1 << 0;
const FLAG_AUTO = 1 << 1;
const FLAG_EXTRA_DATA_COMPATIBLE = 1 << 2;
/** Of a bitmap table's entry: a host cluster's offset, or without one whether the bits are all ones. */
const TABLE_OFFSET_MASK = 0x00ff_ffff_ffff_fe00n;
const TABLE_ALL_ONES = 1n;

export interface BitmapDirectoryEntry {
  name: string;
  granularityBits: number;
  type: number;
  isInUse: boolean;
  /** Enabled: every write is to be recorded. */
  isAuto: boolean;
  /** It has extra data that who does not know it may not ignore. */
  isForeign: boolean;
  tableOffset: number;
  tableEntries: number;
}

/** Specification: "Bitmap directory". @throws CowcatcherError FORMAT where it breaks its bounds, IO. */
export function readBitmapDirectory(header: Qcow2Header, file: QcowFile): BitmapDirectoryEntry[] {
  const entries: BitmapDirectoryEntry[] = [];
  if (header.bitmaps === null) return entries;
  const { bitmapCount, directoryBytes, directoryOffset } = header.bitmaps;
  if (bitmapCount > MAX_BITMAPS || directoryBytes > MAX_BITMAP_DIRECTORY_BYTES) {
    throw formatError(file.name, "the bitmap directory is larger than its limit", directoryOffset);
  }
  const view = readView(file, "the bitmap directory", directoryOffset, directoryBytes);
  let offset = 0;
  for (let index = 0; index < bitmapCount; index++) {
    const isFixedInside = offset + ENTRY_FIXED_BYTES <= directoryBytes;
    const extraBytes = isFixedInside ? view.getUint32(offset + 20) : 0;
    const nameBytes = isFixedInside ? view.getUint16(offset + 18) : directoryBytes;
    const nameStart = offset + ENTRY_FIXED_BYTES + extraBytes;
    if (nameStart + nameBytes > directoryBytes) {
      throw formatError(file.name, `bitmap ${index} leaves the bitmap directory`, directoryOffset + offset);
    }
    const flags = view.getUint32(offset + 12);
    entries.push({
      name: Buffer.from(view.buffer, nameStart, nameBytes).toString("utf8"),
      granularityBits: view.getUint8(offset + 17),
      type: view.getUint8(offset + 16),
      isInUse: (flags & FLAG_IN_USE) !== 0,
      isAuto: (flags & FLAG_AUTO) !== 0,
      isForeign: extraBytes > 0 && (flags & FLAG_EXTRA_DATA_COMPATIBLE) === 0,
      tableOffset: readNumber(view, offset, "bitmap table offset", file.name),
      tableEntries: view.getUint32(offset + 8),
    });
    offset = Math.ceil((nameStart + nameBytes) / 8) * 8;
  }
  return entries;
}

/** A directory of one bitmap that tracks dirty blocks: enabled, and not in use. */
export function encodeBitmapDirectory({
  name,
  granularityBits,
  tableOffset,
  tableEntries,
}: Pick<BitmapDirectoryEntry, "name" | "granularityBits" | "tableOffset" | "tableEntries">): Uint8Array {
  const nameBytes = Buffer.from(name, "utf8");
  const bytes = new Uint8Array(Math.ceil((ENTRY_FIXED_BYTES + nameBytes.length) / 8) * 8);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(tableOffset));
  view.setUint32(8, tableEntries);
  view.setUint32(12, FLAG_AUTO);
  view.setUint8(16, TYPE_DIRTY_TRACKING);
  view.setUint8(17, granularityBits);
  view.setUint16(18, nameBytes.length);
  bytes.set(nameBytes, ENTRY_FIXED_BYTES);
  return bytes;
}

/**
 * Where the data of each of the bitmap's clusters stands in the file; 0: nowhere, as all its bits are the same.
 * @throws CowcatcherError FORMAT, IO
 */
export function readBitmapTable(header: Qcow2Header, file: QcowFile, entry: BitmapDirectoryEntry): number[] {
  return readTable(header, file, entry).map((value) => Number(value & TABLE_OFFSET_MASK));
}

/** Which blocks of a disk are dirty. */
export class DirtyBitmap {
  /** @param words bit n is bit n % 32 of word n / 32 */
  constructor(
    readonly name: string,
    readonly granularityBytes: number,
    readonly sizeBytes: number,
    private readonly words: Uint32Array,
  ) {}

  /** The run of like blocks from offsetBytes on, at most lengthBytes; the range lies within the disk. */
  run(offsetBytes: number, lengthBytes: number): { lengthBytes: number; dirty: boolean } {
    const { granularityBytes } = this;
    const end = offsetBytes + lengthBytes;
    const first = Math.floor(offsetBytes / granularityBytes);
    const past = Math.ceil(end / granularityBytes);
    const dirty = (((this.words[Math.floor(first / 32)] ?? 0) >>> (first % 32)) & 1) === 1;
    const next = this.nextUnlike(first, past, dirty);
    return { lengthBytes: Math.min(next * granularityBytes, end) - offsetBytes, dirty };
  }

  /** Every block that the range touches becomes dirty; here only, not in the image. */
  markDirty(offsetBytes: number, lengthBytes: number): void {
    const first = Math.floor(offsetBytes / this.granularityBytes);
    const past = Math.ceil((offsetBytes + lengthBytes) / this.granularityBytes);
    for (let block = first; block < past;) {
      const word = Math.floor(block / 32);
      const from = block % 32;
      const to = Math.min(32, past - word * 32);
      this.words[word] |= (-1 << from) & (-1 >>> (32 - to));
      block = word * 32 + to;
    }
  }

  /** The first bit from `first` on that is not `value`, or `past`. */
  private nextUnlike(first: number, past: number, value: boolean): number {
    const flip = value ? -1 : 0;
    let index = Math.floor(first / 32);
    const skip = first % 32;
    let unlike = (((this.words[index] ?? 0) ^ flip) >>> skip) << skip;
    while (unlike === 0) {
      index++;
      if (index * 32 >= past) return past;
      unlike = (this.words[index] ?? 0) ^ flip;
    }
    const lowest = 31 - Math.clz32(unlike & -unlike);
    return Math.min(past, index * 32 + lowest);
  }
}

/**
 * Reads a bitmap that tracks dirty blocks.
 * @throws CowcatcherError NOT_FOUND, FORMAT (not saved correctly, out of date, damaged), UNSUPPORTED, LIMIT, IO.
 */
export function readDirtyBitmap(header: Qcow2Header, file: QcowFile, name: string): DirtyBitmap {
  const entries = readBitmapDirectory(header, file);
  const entry = entries.find((candidate) => candidate.name === name);
  if (entry === undefined) {
    const names = entries.map((candidate) => `'${candidate.name}'`).join(", ");
    throw bitmapError(
      file,
      "NOT_FOUND",
      `has no bitmap '${name}'`,
      names === "" ? undefined : `it has ${names}`,
    );
  }
  checkUsable(header, file, entry);
  const granularityBytes = 2 ** entry.granularityBits;
  const bitmapBytes = Math.ceil(Math.ceil(header.sizeBytes / granularityBytes) / 8);
  if (bitmapBytes > MAX_BITMAP_BYTES) {
    throw bitmapError(file, "LIMIT", `bitmap '${name}' is larger than ${MAX_BITMAP_BYTES} bytes`);
  }
  const bits = readBits(header, file, entry, bitmapBytes);
  return new DirtyBitmap(name, granularityBytes, header.sizeBytes, bits);
}

function checkUsable(header: Qcow2Header, file: QcowFile, entry: BitmapDirectoryEntry): void {
  const { name } = entry;
  if ((header.autoclearFeatures & AUTOCLEAR_BITMAPS) === 0n) {
    const problem = `bitmap '${name}' is out of date: the image was written by a program that keeps no bitmaps`;
    throw bitmapError(
      file,
      "FORMAT",
      problem,
      "make a full backup, then a new bitmap with qemu-img bitmap --add",
    );
  }
  if (entry.isInUse) {
    const problem = `bitmap '${name}' was not saved when the image was last in use`;
    throw bitmapError(
      file,
      "FORMAT",
      problem,
      "make a full backup, then a new bitmap with qemu-img bitmap --add",
    );
  }
  const isKnown = entry.type === TYPE_DIRTY_TRACKING && !entry.isForeign;
  const { granularityBits } = entry;
  if (!isKnown || granularityBits < MIN_GRANULARITY_BITS || granularityBits > MAX_GRANULARITY_BITS) {
    throw bitmapError(file, "UNSUPPORTED", `bitmap '${name}' is of a kind that this version does not know`);
  }
}

/** Specification: "Bitmap table". */
function readBits(
  header: Qcow2Header,
  file: QcowFile,
  entry: BitmapDirectoryEntry,
  bitmapBytes: number,
): Uint32Array {
  const clusterSizeBytes = 2 ** header.clusterBits;
  const { tableOffset, tableEntries } = entry;
  if (tableEntries !== Math.ceil(bitmapBytes / clusterSizeBytes)) {
    throw formatError(
      file.name,
      `the table of bitmap '${entry.name}' has ${tableEntries} entries`,
      tableOffset,
    );
  }
  const table = readTable(header, file, entry);
  const bits = new Uint8Array(Math.ceil(bitmapBytes / 4) * 4);
  for (const [index, value] of table.entries()) {
    const hostOffset = Number(value & TABLE_OFFSET_MASK);
    const start = index * clusterSizeBytes;
    const count = Math.min(clusterSizeBytes, bitmapBytes - start);
    if (hostOffset !== 0) assertStored(file, `a part of bitmap '${entry.name}'`, hostOffset, count);
    if (hostOffset !== 0) file.readSync(bits, start, count, hostOffset);
    else if (value === TABLE_ALL_ONES) bits.fill(0xff, start, start + count);
  }
  if (endianness() === "BE") Buffer.from(bits.buffer).swap32();
  return new Uint32Array(bits.buffer);
}

/** @throws CowcatcherError FORMAT for an entry that is invalid, IO */
function readTable(
  { clusterBits }: Qcow2Header,
  file: QcowFile,
  { name, tableOffset, tableEntries }: BitmapDirectoryEntry,
): bigint[] {
  const table = readView(file, `the table of bitmap '${name}'`, tableOffset, tableEntries * 8);
  return Array.from({ length: tableEntries }, (_, index) => {
    const value = table.getBigUint64(index * 8);
    const hostOffset = Number(value & TABLE_OFFSET_MASK);
    const isDamaged =
      hostOffset % 2 ** clusterBits !== 0 ||
      (value & ~TABLE_OFFSET_MASK & ~TABLE_ALL_ONES) !== 0n ||
      (hostOffset !== 0 && (value & TABLE_ALL_ONES) !== 0n);
    if (!isDamaged) return value;
    throw formatError(
      file.name,
      `entry ${index} of the table of bitmap '${name}' is invalid`,
      tableOffset + index * 8,
    );
  });
}

function readView(file: QcowFile, what: string, offset: number, lengthBytes: number): DataView<ArrayBuffer> {
  assertStored(file, what, offset, lengthBytes);
  const bytes = new Uint8Array(lengthBytes);
  file.readSync(bytes, 0, lengthBytes, offset);
  return new DataView(bytes.buffer);
}

function bitmapError(
  file: QcowFile,
  code: "NOT_FOUND" | "FORMAT" | "UNSUPPORTED" | "LIMIT",
  problem: string,
  hint?: string,
): CowcatcherError {
  return new CowcatcherError({ code, object: file.name, problem, hint });
}
