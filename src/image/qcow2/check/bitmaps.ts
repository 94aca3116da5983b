// Persistent bitmaps in the check: what QEMU asks of them before it opens an image at all, and the clusters they take.
//
// QEMU loads the whole directory with the image, and refuses the image if any record of it breaks a rule
// (bitmap_list_load, check_dir_entry and bitmap_table_load in block/qcow2-bitmap.c; qcow2_read_extensions in
// block/qcow2.c of qemu/qemu). So each broken rule is a corruption here. Everything is read and judged before anything
// is counted: where the directory is damaged, nobody can say which clusters are its own.
//
// Repair: the bitmaps are let go as a whole, by the autoclear bit that says that they can be relied on. Their clusters
// are leaks from then on, and are freed with the others. A bitmap of which nobody knows what it says is of no use, and
// a backup that needed it must be a full one.
// Without the autoclear bit another program has written without care for bitmaps; QEMU ignores them then.

import type { CheckState } from "./state.js";
import { hex, offsetOf } from "./state.js";
import {
  AUTOCLEAR_BITMAPS,
  EXTENSION_BITMAPS,
  FIELD_OFFSET,
  MAX_BITMAP_DIRECTORY_BYTES,
  MAX_BITMAPS,
  type Qcow2Header,
  viewOf,
} from "../format/header.js";
import { MiB } from "../../../units.js";

const FIXED_BYTES = 24;
const TYPE_DIRTY_TRACKING = 1;
const FLAG_IN_USE = 1;
const RESERVED_FLAGS = 0xfffffffc;
const MIN_GRANULARITY_BITS = 9;
const MAX_GRANULARITY_BITS = 31;
const MAX_NAME_BYTES = 1023;
/** QEMU's limit of one bitmap's data, and with it of its table. */
const MAX_BITMAP_BYTES = 512 * MiB;
/** Bits of a table entry that must be zero, but for bit 0 (all ones) of one without a place. */
const RESERVED_HIGH = 0xff000000;
const RESERVED_LOW = 0x000001fe;

interface BitmapTable {
  tableOffset: number;
  /** Entries. */
  tableSize: number;
}

/** A rule that the directory breaks, in words that follow "bitmap directory: ". */
class Damage extends Error {}

/** Counts what the bitmaps refer to, or reports (and, for a repair of errors, ends) the damage. @throws CowcatcherError IO */
export async function walkBitmaps(state: CheckState): Promise<void> {
  const { header } = state;
  if (header.bitmaps === null || (header.autoclearFeatures & AUTOCLEAR_BITMAPS) === 0n) return;
  const { directoryBytes, directoryOffset } = header.bitmaps;
  let bitmaps: BitmapTable[];
  try {
    bitmaps = await readAll(state, header.bitmaps);
  } catch (error) {
    if (!(error instanceof Damage)) throw error;
    return reportDamage(state, error.message);
  }
  state.refer(directoryOffset, directoryBytes);
  for (const { tableOffset, tableSize } of bitmaps) {
    state.refer(tableOffset, tableSize * 8);
    const table = await state.read(tableOffset, tableSize * 8);
    for (let at = 0; at < table.byteLength; at += 8) {
      const offset = offsetOf(table.getUint32(at), table.getUint32(at + 4));
      if (offset !== 0) state.refer(offset, state.clusterSizeBytes);
    }
  }
}

async function reportDamage(state: CheckState, problem: string): Promise<void> {
  const message = `bitmap directory: ${problem}`;
  state.corruption(message);
  if (!state.repairsErrors) {
    // What they refer to is not known, and is not to be freed for a leak. QEMU refuses the image altogether.
    state.isIncomplete = true;
    state.areLeaksUnknown = true;
    state.checkError("the bitmaps could not be checked; --repair all drops them");
    return;
  }
  state.header.autoclearFeatures &= ~AUTOCLEAR_BITMAPS;
  const field = new Uint8Array(8);
  new DataView(field.buffer).setBigUint64(0, state.header.autoclearFeatures);
  await state.write(field, FIELD_OFFSET.autoclearFeatures);
  // Before any of their clusters is freed.
  await state.file.sync();
  state.corruptionFixed();
  state.note(`Repairing ${message}: the image's bitmaps are dropped`);
}

/** @throws Damage; CowcatcherError IO */
async function readAll(
  state: CheckState,
  extension: NonNullable<Qcow2Header["bitmaps"]>,
): Promise<BitmapTable[]> {
  const { bitmapCount, directoryBytes, directoryOffset } = extension;
  judgeExtension(state, extension);
  const directory = await state.read(directoryOffset, directoryBytes);
  const bitmaps: BitmapTable[] = [];
  const names = new Set<string>();
  let tableBytes = 0;
  let at = 0;
  while (at < directoryBytes) {
    if (bitmaps.length === bitmapCount)
      throw new Damage(`it has more than the ${bitmapCount} bitmaps it should`);
    const label = `bitmap ${bitmaps.length}`;
    if (at + FIXED_BYTES > directoryBytes) throw new Damage(`${label} is cut short`);
    const nameBytes = directory.getUint16(at + 18);
    const extraBytes = directory.getUint32(at + 20);
    const next = at + Math.ceil((FIXED_BYTES + nameBytes + extraBytes) / 8) * 8;
    if (next > directoryBytes) throw new Damage(`${label} leaves the directory`);
    if (extraBytes !== 0) throw new Damage(`${label} has extra data, which QEMU does not know`);
    const nameStart = directory.byteOffset + at + FIXED_BYTES;
    const name = Buffer.from(directory.buffer as ArrayBuffer, nameStart, nameBytes).toString("utf8");
    const tableOffset = judgeRecord(state, directory, at, `${label} ('${name}')`);
    if (names.has(name)) throw new Damage(`two bitmaps have the name '${name}'`);
    names.add(name);
    const tableSize = directory.getUint32(at + 8);
    tableBytes += tableSize * 8;
    if (tableBytes > state.fileBytes || tableOffset + tableSize * 8 > state.fileBytes) {
      throw new Damage(`the table of ${label} ('${name}') lies behind the end of the file`);
    }
    await judgeTable(state, name, tableOffset, tableSize);
    bitmaps.push({ tableOffset, tableSize });
    at = next;
  }
  if (bitmaps.length < bitmapCount) throw new Damage(`it has ${bitmaps.length} of ${bitmapCount} bitmaps`);
  return bitmaps;
}

/** The header extension. @throws Damage */
function judgeExtension(state: CheckState, extension: NonNullable<Qcow2Header["bitmaps"]>): void {
  const { bitmapCount, directoryBytes, directoryOffset } = extension;
  const data = state.header.extensions.find(({ type }) => type === EXTENSION_BITMAPS)?.data;
  if (data !== undefined && viewOf(data).getUint32(4) !== 0) throw new Damage("a reserved field is not zero");
  if (bitmapCount === 0 || bitmapCount > MAX_BITMAPS)
    throw new Damage(`${bitmapCount} bitmaps are said to be there`);
  if (state.isMisaligned(directoryOffset))
    throw new Damage(`it is at ${hex(directoryOffset)}, no cluster boundary`);
  if (directoryBytes === 0 || directoryBytes > MAX_BITMAP_DIRECTORY_BYTES) {
    throw new Damage(`it is said to have ${directoryBytes} bytes`);
  }
  if (directoryOffset + directoryBytes > state.fileBytes)
    throw new Damage("it lies behind the end of the file");
}

/** @returns the offset of the bitmap's table. @throws Damage */
function judgeRecord(state: CheckState, directory: DataView, at: number, label: string): number {
  const tableHigh = directory.getUint32(at);
  const tableOffset = tableHigh * 2 ** 32 + directory.getUint32(at + 4);
  const tableSize = directory.getUint32(at + 8);
  const flags = directory.getUint32(at + 12);
  const type = directory.getUint8(at + 16);
  const granularityBits = directory.getUint8(at + 17);
  if (tableOffset === 0 || !Number.isSafeInteger(tableOffset) || state.isMisaligned(tableOffset)) {
    throw new Damage(`${label} has its table at ${hex(tableOffset)}`);
  }
  const dataBytes = tableSize * state.clusterSizeBytes;
  if (tableSize === 0 || dataBytes > MAX_BITMAP_BYTES)
    throw new Damage(`${label} has a table of ${tableSize} entries`);
  if (granularityBits < MIN_GRANULARITY_BITS || granularityBits > MAX_GRANULARITY_BITS) {
    throw new Damage(`${label} has a granularity of ${granularityBits} bits`);
  }
  if ((flags & RESERVED_FLAGS) !== 0) throw new Damage(`${label} has flags that are not known`);
  if (directory.getUint16(at + 18) > MAX_NAME_BYTES) throw new Damage(`${label} has too long a name`);
  if (type !== TYPE_DIRTY_TRACKING) throw new Damage(`${label} is of type ${type}`);
  const bitmapBytes = Math.ceil(Math.ceil(state.header.sizeBytes / 2 ** granularityBits) / 8);
  const isOfSize = tableSize === Math.ceil(bitmapBytes / state.clusterSizeBytes);
  // One that was not saved may be of the size that the disk had before.
  if (!isOfSize && (flags & FLAG_IN_USE) === 0) throw new Damage(`${label} is of a disk of another size`);
  return tableOffset;
}

/** @throws Damage; CowcatcherError IO */
async function judgeTable(
  state: CheckState,
  name: string,
  tableOffset: number,
  tableSize: number,
): Promise<void> {
  const table = await state.read(tableOffset, tableSize * 8);
  for (let at = 0; at < table.byteLength; at += 8) {
    const high = table.getUint32(at);
    const low = table.getUint32(at + 4);
    const offset = offsetOf(high, low);
    const isBroken = (high & RESERVED_HIGH) !== 0 || (low & RESERVED_LOW) !== 0;
    if (isBroken || (offset !== 0 && ((low & 1) !== 0 || state.isMisaligned(offset)))) {
      throw new Damage(`entry ${at / 8} of the table of '${name}' is invalid`);
    }
  }
}
