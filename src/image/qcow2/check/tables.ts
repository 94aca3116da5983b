// The first half of a check: everything that refers to host clusters is walked, and each reference counted.
//
// The order is QEMU's (header, active L1 and its L2 tables, snapshots, refcount table, encryption, bitmaps; the
// refcount blocks come in check/refcounts.ts), so that messages come in the same order. Only the active L1 table
// counts for the fragmentation figures. Entries are read as two 32-bit words: the flags are in the high one, bigints
// would be ten times as slow.
//
// One thing is repaired on the way, as it changes what is referred to: an L2 entry that reads as zeroes but keeps a
// cluster at no cluster boundary lets go of it.

import { walkBitmaps } from "./bitmaps.js";
import { type CheckState, entryHex, hex, offsetOf } from "./state.js";
import {
  EXTENSION_ENCRYPTION,
  INCOMPATIBLE_EXTERNAL_DATA,
  MAX_L1_BYTES,
  isExtendedL2,
  readNumber,
} from "../format/header.js";
import { MetadataRanges } from "./repair-ranges.js";
import type { SnapshotTable } from "../format/snapshots.js";

const COPIED_HIGH = 0x80000000;
const COMPRESSED_HIGH = 0x40000000;
const ZERO_LOW = 1;
const L1_RESERVED_HIGH = 0x7f000000;
const L1_RESERVED_LOW = 0x000001ff;
const L2_RESERVED_HIGH = 0x3f000000;
const L2_RESERVED_LOW = 0x000001fe;
const SECTOR_BYTES = 512;
/** What damaged sizes of a few L1 tables may add up to beyond the file; all are walked then, as QEMU does. */
const SPARE_L1_BYTES = 4 * MAX_L1_BYTES;

/** Called after each L1 entry of the active table. */
export type CheckProgress = (l1Done: number, l1Total: number) => void;

export interface CountOptions {
  /** False: the refcount table is left out, as for a new one. */
  countRefcountTable: boolean;
  onProgress?: CheckProgress | undefined;
}

export async function countReferences(
  state: CheckState,
  snapshots: SnapshotTable,
  { countRefcountTable, onProgress }: CountOptions,
): Promise<void> {
  const { header, clusterSizeBytes } = state;
  const walk = new TableWalk(state, snapshots);
  state.refer(0, clusterSizeBytes);
  await walk.walkL1(header.l1TableOffset, header.l1Size, true, onProgress);
  await walk.walkSnapshots();
  state.refer(header.snapshotsOffset, snapshots.lengthBytes);
  if (countRefcountTable) {
    state.refer(header.refcountTableOffset, header.refcountTableClusters * clusterSizeBytes);
  }
  referEncryptionHeader(state);
  await walkBitmaps(state);
}

class TableWalk {
  private readonly isExtended: boolean;
  private readonly hasDataFile: boolean;
  private readonly ranges: MetadataRanges;

  constructor(
    private readonly state: CheckState,
    private readonly snapshots: SnapshotTable,
  ) {
    this.isExtended = isExtendedL2(state.header);
    this.hasDataFile = (state.header.incompatibleFeatures & INCOMPATIBLE_EXTERNAL_DATA) !== 0n;
    this.ranges = new MetadataRanges(state, snapshots);
  }

  async walkL1(
    tableOffset: number,
    entryCount: number,
    isActive: boolean,
    onProgress?: CheckProgress,
  ): Promise<void> {
    if (entryCount === 0) return;
    const { state } = this;
    state.refer(tableOffset, entryCount * 8);
    const l1 = await state.read(tableOffset, entryCount * 8);
    let tablesWalked = 0;
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
      onProgress?.(index + 1, entryCount);
      // Past the end of the file there are zeroes, which refer to nothing.
      if (l2Offset >= state.fileBytes) continue;
      if (++tablesWalked > state.hostClusterCount) {
        state.isIncomplete = true;
        return state.corruption(tooManyTables(tableOffset));
      }
      await this.walkL2(l2Offset, isActive);
    }
  }

  private async walkL2(l2Offset: number, isActive: boolean): Promise<void> {
    const { state, isExtended, hasDataFile } = this;
    const { clusterSizeBytes, counts } = state;
    const l2 = await state.read(l2Offset, clusterSizeBytes);
    let nextContiguousOffset = 0;
    for (let at = 0; at < l2.byteLength; at += isExtended ? 16 : 8) {
      const high = l2.getUint32(at);
      const low = l2.getUint32(at + 4);
      if (high === 0 && low === 0 && !isExtended) continue;
      if (high & COMPRESSED_HIGH) {
        if (!this.referCompressed(l2, at) || !isActive) continue;
        counts.allocatedClusters++;
        counts.compressedClusters++;
        // Compressed clusters are fragmented by nature: they start anywhere.
        counts.fragmentedClusters++;
        continue;
      }
      if (high & L2_RESERVED_HIGH || low & L2_RESERVED_LOW) {
        state.corruption(`found l2 entry with reserved bits set: ${entryHex(high, low)}`);
      }
      if (!isAllocated(high, low, hasDataFile, isExtended)) {
        if (isExtended && l2.getUint32(at + 12) !== 0) {
          state.corruption("Unallocated cluster has non-zero subcluster allocation map");
        }
        continue;
      }
      const offset = offsetOf(high, low);
      if (isExtended) this.checkSubclusters(l2, at, offset);
      if (state.isMisaligned(offset)) {
        const outcome = await this.judgeMisaligned(l2, at, l2Offset, offset);
        if (outcome === "abort") {
          state.isIncomplete = true;
          return;
        }
        if (outcome === "dropped") continue;
      }
      if (isActive) {
        counts.allocatedClusters++;
        if (nextContiguousOffset !== 0 && offset !== nextContiguousOffset) counts.fragmentedClusters++;
        nextContiguousOffset = offset + clusterSizeBytes;
      }
      if (!hasDataFile) state.refer(offset, clusterSizeBytes);
    }
  }

  /** No subcluster may be both allocated (low word) and zero (high word). */
  private checkSubclusters(l2: DataView, at: number, offset: number): void {
    if ((l2.getUint32(at + 8) & l2.getUint32(at + 12)) === 0) return;
    const where = `offset=${offset.toString(16)}`;
    this.state.corruption(`${where}: Allocated cluster has corrupted subcluster allocation bitmap`);
  }

  /** @returns "kept": the reference counts all the same; "abort": the table is in another's place. */
  private async judgeMisaligned(
    l2: DataView,
    at: number,
    l2Offset: number,
    offset: number,
  ): Promise<"kept" | "dropped" | "abort"> {
    const { state, isExtended } = this;
    const where = `offset=${offset.toString(16)}`;
    const hasData = isExtended ? l2.getUint32(at + 12) !== 0 : (l2.getUint32(at + 4) & ZERO_LOW) === 0;
    const kind = hasData ? "Data cluster" : "Preallocated cluster";
    const message = `${where}: ${kind} is not properly aligned; L2 entry corrupted.`;
    state.corruption(message);
    if (hasData || !state.repairsErrors) return "kept";
    const overlapped = this.ranges.overlapOf(l2Offset + at, isExtended ? 16 : 8);
    if (overlapped !== null) {
      state.checkError(`cannot correct an L2 entry at offset ${l2Offset + at}: it lies in the ${overlapped}`);
      return "abort";
    }
    await this.zeroEntry(l2, at, l2Offset);
    state.corruptionFixed();
    state.note(`Repairing ${message}`);
    return "dropped";
  }

  private async zeroEntry(l2: DataView, at: number, l2Offset: number): Promise<void> {
    l2.setUint32(at, 0);
    l2.setUint32(at + 4, this.isExtended ? 0 : ZERO_LOW);
    const lengthBytes = this.isExtended ? 16 : 8;
    await this.state.write(new Uint8Array(l2.buffer as ArrayBuffer, at, lengthBytes), l2Offset + at);
  }

  /** @returns false where the entry is too damaged to refer to anything. */
  private referCompressed(l2: DataView, at: number): boolean {
    const { state } = this;
    const { clusterBits } = state.header;
    const entry = l2.getBigUint64(at);
    // Specification, "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8).
    const sectorsShift = BigInt(62 - (clusterBits - 8));
    const offset = entry & ((1n << sectorsShift) - 1n);
    if (entry >> 63n) {
      state.corruption(`coffset=${hex(offset)}: copied flag must never be set for compressed clusters`);
    }
    if (this.hasDataFile) {
      state.corruption(`compressed cluster with data file, entry=${hex(entry)}`);
      return false;
    }
    if (this.isExtended && (l2.getUint32(at + 8) !== 0 || l2.getUint32(at + 12) !== 0)) {
      state.corruption(`compressed cluster with non-zero subcluster allocation bitmap, entry=${hex(entry)}`);
      return false;
    }
    const sectors = ((entry >> sectorsShift) & ((1n << BigInt(clusterBits - 8)) - 1n)) + 1n;
    state.refer(Number(offset), Number(sectors) * SECTOR_BYTES - Number(offset % BigInt(SECTOR_BYTES)));
    return true;
  }

  async walkSnapshots(): Promise<void> {
    const { state, snapshots } = this;
    if (this.hasDataFile && snapshots.entries.length > 0) {
      state.corruption(`${snapshots.entries.length} snapshots in image with data file`);
    }
    let l1Bytes = 0;
    for (const { id, name, l1TableOffset, l1Size } of snapshots.entries) {
      const label = `snapshot ${id} (${name})`;
      l1Bytes += Math.min(l1Size * 8, MAX_L1_BYTES);
      if (l1Bytes > state.fileBytes + SPARE_L1_BYTES) {
        state.isIncomplete = true;
        return state.corruption(`${label}: the snapshots' L1 tables are larger than the file; they overlap`);
      }
      const what = "snapshot table entry corrupted";
      if (state.isMisaligned(l1TableOffset)) {
        const where = `l1_offset=${hex(l1TableOffset)}`;
        state.corruption(`${label} ${where}: L1 table is not cluster aligned; ${what}`);
      } else if (l1Size * 8 > MAX_L1_BYTES) {
        state.corruption(`${label} l1_size=${hex(l1Size)}: L1 table is too large; ${what}`);
      } else {
        await this.walkL1(l1TableOffset, l1Size, false);
      }
    }
  }
}

/** So some are named again and again: to walk each every time could take for ever. */
export function tooManyTables(l1Offset: number): string {
  return `L1 table at offset ${hex(l1Offset)} names more L2 tables than the file has clusters; the rest is not walked`;
}

/** A normal cluster, or a zero cluster with a place of its own. In a data file a normal one may be at 0. */
export function isAllocated(high: number, low: number, hasDataFile: boolean, isExtended: boolean): boolean {
  if (offsetOf(high, low) !== 0) return true;
  const isZero = !isExtended && (low & ZERO_LOW) !== 0;
  return hasDataFile && !isZero && (high & COPIED_HIGH) !== 0;
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
