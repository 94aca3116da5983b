// The snapshot table, and an internal snapshot as a disk of its own (specification: qcow2, "Snapshots").
//
// A snapshot is an L1 table, with the refcounts that keep its clusters, and the size that the disk had. Read through
// its own L1 table and with its own size, an image is what it was; so a view of a snapshot is the driver on a header
// in which these fields are replaced (`headerOfSnapshot`). Whoever writes the image meanwhile copies clusters that a
// snapshot shares, so the view does not change; it is read-only itself.
//
// The machine's state, if there is one, is in the same L1 table behind the disk's end. It is not looked at.
//
// Pure but for the reading function that it is given. Any thread.

import { CowcatcherError } from "../../../errors.js";
import { roundUp } from "../../../units.js";
import {
  MAX_L1_BYTES,
  MAX_SIZE_BYTES,
  MAX_SNAPSHOT_EXTRA_BYTES,
  MAX_SNAPSHOT_TABLE_BYTES,
  formatError,
  isExtendedL2,
  l1EntriesFor,
  readNumber,
  type Qcow2Header,
} from "./header.js";

/** Bytes of the file at offsetBytes, zeroes past its end. @throws CowcatcherError IO */
export type ReadRange = (offsetBytes: number, lengthBytes: number) => DataView;

const FIXED_BYTES = 40;
/** 64-bit size of the machine's state, size of the disk: what version 3 asks for. */
export const REQUIRED_EXTRA_BYTES = 16;
/** Names that an error lists. */
const MAX_NAMES_SHOWN = 20;

export interface SnapshotEntry {
  id: string;
  name: string;
  l1TableOffset: number;
  /** Entries. */
  l1Size: number;
  /** Null where the entry does not say: the disk's present size then. */
  diskSizeBytes: number | null;
  vmStateBytes: number;
  /** As the entry says; `extra` holds MAX_SNAPSHOT_EXTRA_BYTES of it at most. */
  extraBytes: number;
  fixed: Uint8Array;
  extra: Uint8Array;
  /** Id and name, as they stand in the table. */
  text: Uint8Array;
}

export interface SnapshotTable {
  entries: SnapshotEntry[];
  /** Without the padding of the last entry. */
  lengthBytes: number;
}

/**
 * Reads the whole table. With `tolerateExtra` an entry may have more extra data than the limit; what is beyond is
 * skipped.
 * @throws CowcatcherError FORMAT where an entry or the table breaks a limit, LIMIT for offsets from 2^53 on, IO.
 */
export function readSnapshotTable(
  { snapshotCount, snapshotsOffset }: Pick<Qcow2Header, "snapshotCount" | "snapshotsOffset">,
  read: ReadRange,
  name: string,
  tolerateExtra = false,
): SnapshotTable {
  const entries: SnapshotEntry[] = [];
  let position = snapshotsOffset;
  for (let index = 0; index < snapshotCount; index++) {
    position = roundUp(position, 8);
    const fixed = read(position, FIXED_BYTES);
    const extraBytes = fixed.getUint32(36);
    if (extraBytes > MAX_SNAPSHOT_EXTRA_BYTES && !tolerateExtra) {
      throw tooMuchExtra(name, index, extraBytes, position);
    }
    const textBytes = fixed.getUint16(12) + fixed.getUint16(14);
    const extra = read(position + FIXED_BYTES, Math.min(extraBytes, MAX_SNAPSHOT_EXTRA_BYTES));
    const text = read(position + FIXED_BYTES + extraBytes, textBytes);
    entries.push(parseEntry(fixed, extra, text, extraBytes, name));
    position += FIXED_BYTES + extraBytes + textBytes;
    if (position - snapshotsOffset > MAX_SNAPSHOT_TABLE_BYTES) {
      throw formatError(name, "the snapshot table is larger than 64 MiB", snapshotsOffset);
    }
  }
  return { entries, lengthBytes: snapshotCount === 0 ? 0 : position - snapshotsOffset };
}

function tooMuchExtra(name: string, index: number, extraBytes: number, offsetBytes: number): CowcatcherError {
  return new CowcatcherError({
    code: "FORMAT",
    object: name,
    problem: `snapshot ${index} has ${extraBytes} bytes of extra data, more than ${MAX_SNAPSHOT_EXTRA_BYTES}`,
    hint: "cowcatcher check --repair removes what is too much",
    offsetBytes,
  });
}

function parseEntry(
  fixed: DataView,
  extra: DataView,
  text: DataView,
  extraBytes: number,
  name: string,
): SnapshotEntry {
  const textBytes = bytesOf(text);
  const decoded = Buffer.from(textBytes.buffer, textBytes.byteOffset, textBytes.length);
  const idBytes = fixed.getUint16(12);
  return {
    id: decoded.toString("utf8", 0, idBytes),
    name: decoded.toString("utf8", idBytes),
    l1TableOffset: readNumber(fixed, 0, "snapshot L1 table offset", name),
    l1Size: fixed.getUint32(8),
    diskSizeBytes: extraBytes >= 16 ? readNumber(extra, 8, "snapshot disk size", name) : null,
    vmStateBytes: extraBytes >= 8 ? readNumber(extra, 0, "VM state size", name) : fixed.getUint32(32),
    extraBytes,
    fixed: bytesOf(fixed),
    extra: bytesOf(extra),
    text: textBytes,
  };
}

function bytesOf(view: DataView): Uint8Array {
  return new Uint8Array(view.buffer as ArrayBuffer, view.byteOffset, view.byteLength);
}

/** QEMU's order: an id goes before a name. @throws CowcatcherError NOT_FOUND, listing the names there are. */
export function findSnapshot(entries: readonly SnapshotEntry[], wanted: string, name: string): SnapshotEntry {
  const found = entries.find(({ id }) => id === wanted) ?? entries.find((entry) => entry.name === wanted);
  if (found !== undefined) return found;
  throw new CowcatcherError({
    code: "NOT_FOUND",
    object: name,
    problem: `there is no internal snapshot '${wanted}'`,
    hint: describeNames(entries),
  });
}

function describeNames(entries: readonly SnapshotEntry[]): string {
  if (entries.length === 0) return "the image has no internal snapshots";
  const names = entries.slice(0, MAX_NAMES_SHOWN).map((entry) => `${entry.name} (id ${entry.id})`);
  const more = entries.length - names.length;
  return `there are: ${names.join(", ")}${more > 0 ? ` and ${more} more` : ""}`;
}

/**
 * The header with which the driver reads the disk as of a snapshot, given by id or name.
 * @throws CowcatcherError NOT_FOUND, or FORMAT and LIMIT where the snapshot's entry is damaged.
 */
export function headerOfSnapshot(
  header: Qcow2Header,
  read: ReadRange,
  wanted: string,
  name: string,
): Qcow2Header {
  const snapshot = findSnapshot(readSnapshotTable(header, read, name).entries, wanted, name);
  const sizeBytes = snapshot.diskSizeBytes ?? header.sizeBytes;
  const { l1TableOffset, l1Size } = snapshot;
  const damaged = (problem: string): CowcatcherError =>
    formatError(name, `the internal snapshot '${wanted}' is damaged: ${problem}`);
  if (l1Size * 8 > MAX_L1_BYTES) throw damaged(`its L1 table has ${l1Size} entries`);
  if (sizeBytes > MAX_SIZE_BYTES) throw damaged(`its disk has ${sizeBytes} bytes`);
  if (l1TableOffset % 2 ** header.clusterBits !== 0) throw damaged("its L1 table is at no cluster boundary");
  if (l1Size < l1EntriesFor(sizeBytes, header.clusterBits, isExtendedL2(header))) {
    throw damaged("its L1 table is too small for its disk");
  }
  return { ...header, l1TableOffset, l1Size, sizeBytes };
}

/**
 * The table with every entry made whole: extra data as long as version 3 asks for, and no longer than the limit.
 * `diskSizeBytes` is for entries that do not say how large their disk is.
 */
export function serialiseSnapshotTable(entries: readonly SnapshotEntry[], diskSizeBytes: number): Uint8Array {
  const chunks: Uint8Array[] = [];
  let position = 0;
  for (const entry of entries) {
    const padding = roundUp(position, 8) - position;
    const extra = wholeExtra(entry, diskSizeBytes);
    const fixed = entry.fixed.slice();
    new DataView(fixed.buffer).setUint32(36, extra.length);
    chunks.push(new Uint8Array(padding), fixed, extra, entry.text);
    position += padding + fixed.length + extra.length + entry.text.length;
  }
  return Buffer.concat(chunks);
}

function wholeExtra({ extra, vmStateBytes }: SnapshotEntry, diskSizeBytes: number): Uint8Array {
  if (extra.length >= REQUIRED_EXTRA_BYTES) return extra;
  const whole = new Uint8Array(REQUIRED_EXTRA_BYTES);
  const view = new DataView(whole.buffer);
  view.setBigUint64(0, BigInt(vmStateBytes));
  view.setBigUint64(8, BigInt(diskSizeBytes));
  return whole;
}
