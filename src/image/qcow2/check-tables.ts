// The first half of a check: everything that refers to host clusters is walked, and each reference counted.
//
// The order is QEMU's (header, active L1 and its L2 tables, snapshots, refcount structures, encryption, bitmaps),
// so that messages come in the same order. Only the active L1 table counts for the fragmentation figures.
// Entries are read as two 32-bit words: the flags are in the high one, bigints would be ten times as slow.

import { RecordReader, type SnapshotRecord } from "./check-records.js";
import { type CheckState, entryHex, hex, offsetOf } from "./check-state.js";
import {
  EXTENSION_ENCRYPTION,
  INCOMPATIBLE_EXTERNAL_DATA,
  MAX_L1_BYTES,
  isExtendedL2,
  readNumber,
} from "./header.js";

const COPIED_HIGH = 0x80000000;
const COMPRESSED_HIGH = 0x40000000;
const L1_RESERVED_HIGH = 0x7f000000;
const L1_RESERVED_LOW = 0x000001ff;
const L2_RESERVED_HIGH = 0x3f000000;
const L2_RESERVED_LOW = 0x000001fe;
const SECTOR_BYTES = 512;

/** Called after each L1 entry of the active table. */
export type CheckProgress = (l1Done: number, l1Total: number) => void;

export async function countReferences(state: CheckState, onProgress?: CheckProgress): Promise<void> {
  const { header, clusterSizeBytes } = state;
  const snapshots = await readSnapshots(state);
  state.refer(0, clusterSizeBytes);
  await walkL1(state, header.l1TableOffset, header.l1Size, true, onProgress);
  await walkSnapshots(state, snapshots);
  state.refer(header.refcountTableOffset, header.refcountTableClusters * clusterSizeBytes);
  referEncryptionHeader(state);
  await walkBitmaps(state);
}

async function walkL1(
  state: CheckState,
  tableOffset: number,
  entryCount: number,
  isActive: boolean,
  onProgress?: CheckProgress,
): Promise<void> {
  if (entryCount === 0) return;
  state.refer(tableOffset, entryCount * 8);
  const l1 = await state.read(tableOffset, entryCount * 8);
  for (let index = 0; index < entryCount; index++) {
    const high = l1.getUint32(index * 8);
    const low = l1.getUint32(index * 8 + 4);
    if (high === 0 && low === 0) continue;
    if (high & L1_RESERVED_HIGH || low & L1_RESERVED_LOW) {
      state.corruption(`found L1 entry with reserved bits set: ${entryHex(high, low)}`);
    }
    const l2Offset = offsetOf(high, low);
    state.refer(l2Offset, state.clusterSizeBytes);
    if (state.isMisaligned(l2Offset)) {
      state.corruption(
        `l2_offset=${l2Offset.toString(16)}: Table is not cluster aligned; L1 entry corrupted`,
      );
    }
    walkL2(state, await state.read(l2Offset, state.clusterSizeBytes), isActive);
    onProgress?.(index + 1, entryCount);
  }
}

function walkL2(state: CheckState, l2: DataView, isActive: boolean): void {
  const { clusterSizeBytes, counts, header } = state;
  const isExtended = isExtendedL2(header);
  const hasDataFile = (header.incompatibleFeatures & INCOMPATIBLE_EXTERNAL_DATA) !== 0n;
  let nextContiguousOffset = 0;
  for (let at = 0; at < l2.byteLength; at += isExtended ? 16 : 8) {
    const high = l2.getUint32(at);
    const low = l2.getUint32(at + 4);
    if (high === 0 && low === 0 && !isExtended) continue;
    if (high & COMPRESSED_HIGH) {
      referCompressed(state, l2.getBigUint64(at), hasDataFile);
      if (isActive) {
        counts.allocatedClusters++;
        counts.compressedClusters++;
        // Compressed clusters are fragmented by nature: they start anywhere.
        counts.fragmentedClusters++;
      }
      continue;
    }
    if (high & L2_RESERVED_HIGH || low & L2_RESERVED_LOW) {
      state.corruption(`found l2 entry with reserved bits set: ${entryHex(high, low)}`);
    }
    if (isExtended) checkSubclusters(state, l2, at, offsetOf(high, low));
    if (!isAllocated(high, low, hasDataFile)) continue;
    const offset = offsetOf(high, low);
    if (state.isMisaligned(offset)) reportMisaligned(state, offset, containsData(l2, at, isExtended));
    if (isActive) {
      counts.allocatedClusters++;
      if (nextContiguousOffset !== 0 && offset !== nextContiguousOffset) counts.fragmentedClusters++;
      nextContiguousOffset = offset + clusterSizeBytes;
    }
    if (!hasDataFile) state.refer(offset, clusterSizeBytes);
  }
}

/** A normal cluster, or a zero cluster with a place of its own. */
export function isAllocated(high: number, low: number, hasDataFile: boolean): boolean {
  if (offsetOf(high, low) !== 0) return true;
  return hasDataFile && (low & 1) === 0 && (high & COPIED_HIGH) !== 0;
}

function containsData(l2: DataView, at: number, isExtended: boolean): boolean {
  return isExtended ? l2.getUint32(at + 12) !== 0 : (l2.getUint32(at + 4) & 1) === 0;
}

function reportMisaligned(state: CheckState, offset: number, hasData: boolean): void {
  const kind = hasData ? "Data cluster" : "Preallocated cluster";
  state.corruption(`offset=${offset.toString(16)}: ${kind} is not properly aligned; L2 entry corrupted.`);
}

/** No subcluster may be both allocated (low word) and zero (high word). */
function checkSubclusters(state: CheckState, l2: DataView, at: number, offset: number): void {
  const zero = l2.getUint32(at + 8);
  const allocated = l2.getUint32(at + 12);
  if (zero & allocated) {
    state.corruption(
      `offset=${offset.toString(16)}: Allocated cluster has corrupted subcluster allocation bitmap`,
    );
  } else if (offset === 0 && allocated !== 0) {
    state.corruption(`Unallocated cluster has non-zero subcluster allocation map`);
  }
}

function referCompressed(state: CheckState, entry: bigint, hasDataFile: boolean): void {
  const { clusterBits } = state.header;
  // Specification, "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8).
  const sectorsShift = BigInt(62 - (clusterBits - 8));
  const offset = entry & ((1n << sectorsShift) - 1n);
  if (entry >> 63n)
    state.corruption(`coffset=${hex(offset)}: copied flag must never be set for compressed clusters`);
  if (hasDataFile) {
    state.corruption(`compressed cluster with data file, entry=${hex(entry)}`);
    return;
  }
  const sectors = ((entry >> sectorsShift) & ((1n << BigInt(clusterBits - 8)) - 1n)) + 1n;
  const offsetBytes = Number(offset);
  state.refer(offsetBytes, Number(sectors) * SECTOR_BYTES - Number(offset % BigInt(SECTOR_BYTES)));
}

interface SnapshotTable {
  records: SnapshotRecord[];
  lengthBytes: number;
}

/** Read before all else, as QEMU opens an image only with its snapshots known. */
async function readSnapshots(state: CheckState): Promise<SnapshotTable> {
  const { snapshotCount, snapshotsOffset } = state.header;
  const reader = new RecordReader(state, snapshotsOffset);
  const records: SnapshotRecord[] = [];
  for (let index = 0; index < snapshotCount; index++) {
    const record = await reader.nextSnapshot();
    if (!record.isComplete) state.corruption(`snapshot table entry ${index} is incomplete`);
    records.push(record);
  }
  return { records, lengthBytes: reader.position - snapshotsOffset };
}

async function walkSnapshots(state: CheckState, { records, lengthBytes }: SnapshotTable): Promise<void> {
  for (const snapshot of records) {
    const label = `snapshot ${snapshot.id} (${snapshot.name})`;
    if (state.isMisaligned(snapshot.l1TableOffset)) {
      const where = `l1_offset=${hex(snapshot.l1TableOffset)}`;
      state.corruption(`${label} ${where}: L1 table is not cluster aligned; snapshot table entry corrupted`);
    } else if (snapshot.l1Size * 8 > MAX_L1_BYTES) {
      const size = `l1_size=${hex(snapshot.l1Size)}`;
      state.corruption(`${label} ${size}: L1 table is too large; snapshot table entry corrupted`);
    } else {
      await walkL1(state, snapshot.l1TableOffset, snapshot.l1Size, false);
    }
  }
  state.refer(state.header.snapshotsOffset, lengthBytes);
}

function referEncryptionHeader(state: CheckState): void {
  const data = state.header.extensions.find(({ type }) => type === EXTENSION_ENCRYPTION)?.data;
  if (data === undefined || data.length < 16) return;
  const view = new DataView(data.buffer, data.byteOffset, data.length);
  state.refer(
    readNumber(view, 0, "encryption header offset", state.name),
    readNumber(view, 8, "encryption header length", state.name),
  );
}

async function walkBitmaps(state: CheckState): Promise<void> {
  const { bitmaps, autoclearFeatures } = state.header;
  // Without the autoclear bit another program has written without care for the bitmaps, and QEMU ignores them.
  if (bitmaps === null || (autoclearFeatures & 1n) === 0n) return;
  state.refer(bitmaps.directoryOffset, bitmaps.directoryBytes);
  const reader = new RecordReader(state, bitmaps.directoryOffset);
  for (let index = 0; index < bitmaps.bitmapCount; index++) {
    const { tableOffset, tableSize } = await reader.nextBitmap();
    state.refer(tableOffset, tableSize * 8);
    if (tableOffset + tableSize * 8 > state.fileBytes) continue;
    const table = await state.read(tableOffset, tableSize * 8);
    for (let at = 0; at < table.byteLength; at += 8) {
      const offset = offsetOf(table.getUint32(at), table.getUint32(at + 4));
      if (offset === 0) continue;
      if (state.isMisaligned(offset)) state.corruption(`bitmap table entry ${at / 8} is not cluster aligned`);
      else state.refer(offset, state.clusterSizeBytes);
    }
  }
}
