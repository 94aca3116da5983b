// The second half of a check: what the image's refcounts say, against the references that were counted.
//
// Refcount blocks are references too, so they are counted first. Then each block is read once, in order, and the
// clusters whose refcount is exactly one are kept as a bitmap: the COPIED flags are checked against it, as reading
// a block for each L2 entry would be far too slow.

import { isAllocated } from "./check-tables.js";
import { type CheckState, entryHex, offsetOf } from "./check-state.js";
import { INCOMPATIBLE_EXTERNAL_DATA, isExtendedL2 } from "./header.js";

const COPIED_HIGH = 0x80000000;
const COMPRESSED_HIGH = 0x40000000;

/** Host clusters whose refcount is exactly one. */
class SingleSet {
  private readonly bits: Uint8Array;

  constructor(clusterCount: number) {
    this.bits = new Uint8Array(Math.ceil(clusterCount / 8));
  }

  add(cluster: number): void {
    this.bits[cluster >>> 3] = (this.bits[cluster >>> 3] ?? 0) | (1 << (cluster & 7));
  }

  has(cluster: number): boolean {
    return ((this.bits[Math.floor(cluster / 8)] ?? 0) & (1 << (cluster & 7))) !== 0;
  }
}

/** @returns the end of the last cluster that is used or referred to, in bytes. */
export async function compareRefcounts(state: CheckState): Promise<number> {
  const { header, clusterSizeBytes } = state;
  const table = await state.read(header.refcountTableOffset, header.refcountTableClusters * clusterSizeBytes);
  countBlocks(state, table);
  const source = new RefcountSource(state, table);
  const singles = new SingleSet(state.hostClusterCount);
  const highestCluster = await compareAll(state, source, singles);
  await checkCopiedFlags(state, source, singles);
  return (highestCluster + 1) * clusterSizeBytes;
}

function countBlocks(state: CheckState, table: DataView): void {
  for (let index = 0; index * 8 < table.byteLength; index++) {
    const high = table.getUint32(index * 8);
    const low = table.getUint32(index * 8 + 4);
    if (high === 0 && low === 0) continue;
    // Bits 9..63 are the offset here; past 2^53 it is inexact, but outside the image all the same.
    const offset = high * 2 ** 32 + ((low & 0xfffffe00) >>> 0);
    const cluster = Math.floor(offset / state.clusterSizeBytes);
    if (low & 0x1ff) {
      state.corruption(`refcount table entry ${index} has reserved bits set`);
    } else if (isBlockMisaligned(state, low)) {
      state.corruption(`refcount block ${index} is not cluster aligned; refcount table entry corrupted`);
    } else if (cluster >= state.hostClusterCount) {
      state.corruption(`refcount block ${index} is outside image`);
    } else {
      state.refer(offset, state.clusterSizeBytes);
      const count = state.references[cluster];
      if (count !== 1) state.corruption(`refcount block ${index} refcount=${count}`);
    }
  }
}

/** By the low word alone: it holds a cluster's bits, and the whole offset may be inexact. */
function isBlockMisaligned(state: CheckState, low: number): boolean {
  return state.isMisaligned((low & 0xfffffe00) >>> 0);
}

/** Refcounts by host cluster; keeps the block it used last. */
class RefcountSource {
  private block: DataView | null = null;
  private blockIndex = -1;
  private readonly refcountBits: number;
  readonly clustersPerBlock: number;

  constructor(
    private readonly state: CheckState,
    private readonly table: DataView,
  ) {
    this.refcountBits = 2 ** state.header.refcountOrder;
    this.clustersPerBlock = (state.clusterSizeBytes * 8) / this.refcountBits;
  }

  /** Makes the cluster's block the current one. What lies past the end of the file reads as zeroes. */
  async load(cluster: number): Promise<void> {
    const index = Math.floor(cluster / this.clustersPerBlock);
    if (index === this.blockIndex) return;
    this.blockIndex = index;
    this.block = null;
    if (index * 8 >= this.table.byteLength) return;
    const low = this.table.getUint32(index * 8 + 4);
    const offset = this.table.getUint32(index * 8) * 2 ** 32 + ((low & 0xfffffe00) >>> 0);
    if (offset === 0) return;
    if (isBlockMisaligned(this.state, low)) this.block = UNREADABLE;
    else if (offset < this.state.fileBytes) {
      this.block = await this.state.read(offset, this.state.clusterSizeBytes);
    }
  }

  /** Of a cluster of the block that is loaded. NaN: the refcount cannot be read. */
  get(cluster: number): number {
    const { block, refcountBits } = this;
    if (block === null) return 0;
    if (block === UNREADABLE) return NaN;
    const index = cluster % this.clustersPerBlock;
    switch (refcountBits) {
      case 8:
        return block.getUint8(index);
      case 16:
        return block.getUint16(index * 2);
      case 32:
        return block.getUint32(index * 4);
      case 64:
        return block.getUint32(index * 8) * 2 ** 32 + block.getUint32(index * 8 + 4);
      default: {
        const firstBit = index * refcountBits;
        return (block.getUint8(firstBit >>> 3) >> (firstBit & 7)) & ((1 << refcountBits) - 1);
      }
    }
  }
}

const UNREADABLE = new DataView(new ArrayBuffer(0));

async function compareAll(state: CheckState, source: RefcountSource, singles: SingleSet): Promise<number> {
  const { references, hostClusterCount } = state;
  let highestCluster = 0;
  for (let first = 0; first < hostClusterCount; first += source.clustersPerBlock) {
    await source.load(first);
    const end = Math.min(first + source.clustersPerBlock, hostClusterCount);
    for (let cluster = first; cluster < end; cluster++) {
      const refcount = source.get(cluster);
      const reference = references[cluster] ?? 0;
      if (Number.isNaN(refcount)) {
        state.checkError(`Can't get refcount for cluster ${cluster}: Input/output error`);
        continue;
      }
      if (refcount === 1) singles.add(cluster);
      if (refcount > 0 || reference > 0) highestCluster = cluster;
      if (refcount === reference) continue;
      const message = `cluster ${cluster} refcount=${refcount} reference=${reference}`;
      if (refcount < reference) state.corruption(message);
      else state.leak(message);
    }
  }
  return highestCluster;
}

/** In the active tables COPIED says that the refcount is exactly one. */
async function checkCopiedFlags(
  state: CheckState,
  source: RefcountSource,
  singles: SingleSet,
): Promise<void> {
  const { header, clusterSizeBytes } = state;
  const hasDataFile = (header.incompatibleFeatures & INCOMPATIBLE_EXTERNAL_DATA) !== 0n;
  const entryBytes = isExtendedL2(header) ? 16 : 8;
  const l1 = await state.read(header.l1TableOffset, header.l1Size * 8);
  for (let index = 0; index < header.l1Size; index++) {
    const high = l1.getUint32(index * 8);
    const low = l1.getUint32(index * 8 + 4);
    const l2Offset = offsetOf(high, low);
    if (l2Offset === 0) continue;
    if (isSuspect(state, singles, high, l2Offset)) {
      const what = `L2 cluster: l1_index=${index} l1_entry=${entryHex(high, low)}`;
      await judgeFlag(state, source, what, high, l2Offset);
    }
    const l2 = await state.read(l2Offset, clusterSizeBytes);
    for (let at = 0; at < l2.byteLength; at += entryBytes) {
      const entryHigh = l2.getUint32(at);
      const entryLow = l2.getUint32(at + 4);
      if (entryHigh & COMPRESSED_HIGH || !isAllocated(entryHigh, entryLow, hasDataFile)) continue;
      const offset = offsetOf(entryHigh, entryLow);
      // Clusters of an external data file count as referred to once.
      if (hasDataFile) {
        if (entryHigh & COPIED_HIGH) continue;
        state.corruption(`OFLAG_COPIED ${describeData(entryHigh, entryLow)} refcount=1`);
      } else if (isSuspect(state, singles, entryHigh, offset)) {
        await judgeFlag(state, source, describeData(entryHigh, entryLow), entryHigh, offset);
      }
    }
  }
}

function describeData(high: number, low: number): string {
  return `data cluster: l2_entry=${entryHex(high, low)}`;
}

/** Quick: the flag contradicts the bitmap, or the cluster lies past the file, where the bitmap ends. */
function isSuspect(state: CheckState, singles: SingleSet, high: number, offset: number): boolean {
  const cluster = Math.floor(offset / state.clusterSizeBytes);
  return cluster >= state.hostClusterCount || singles.has(cluster) !== ((high & COPIED_HIGH) !== 0);
}

async function judgeFlag(
  state: CheckState,
  source: RefcountSource,
  what: string,
  high: number,
  offset: number,
): Promise<void> {
  const cluster = Math.floor(offset / state.clusterSizeBytes);
  await source.load(cluster);
  const refcount = source.get(cluster);
  // One that cannot be read was reported when the refcounts were compared.
  if (Number.isNaN(refcount)) return;
  if ((refcount === 1) !== ((high & COPIED_HIGH) !== 0)) {
    state.corruption(`OFLAG_COPIED ${what} refcount=${refcount}`);
  }
}
