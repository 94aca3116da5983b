// The second half of a check: what the image's refcounts say, against the references that were counted.
//
// Refcount blocks are references too, so they are counted first. Then each block is read once, in order, and the
// clusters whose refcount is exactly one are kept as a bitmap: the COPIED flags are checked against it, as reading
// a block for each L2 entry would be far too slow.
//
// In a repair refcounts are corrected in place where the structure is sound (a missing or damaged block asks for a
// new structure: repair-rebuild.ts), and COPIED flags after them. Every value that is written is right by itself, so
// it does not matter after which of them a repair is killed: the next one finds the rest.

import { RefcountBlocks } from "./blocks.js";
import { isAllocated } from "./tables.js";
import { type CheckState, type RepairMode, entryHex, offsetOf } from "./state.js";
import { INCOMPATIBLE_EXTERNAL_DATA, isExtendedL2 } from "../format/header.js";
import type { MetadataRanges } from "./repair-ranges.js";

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

/** Counts the references to refcount blocks, and judges the refcount table. */
export function countBlocks(state: CheckState, blocks: RefcountBlocks): void {
  const { refcountTableOffset, refcountTableClusters } = state.header;
  for (let index = 0; index < blocks.entryCount; index++) {
    const place = blocks.placeOf(index);
    if (place === "none") continue;
    if (place !== "inside") state.mustRebuild = true;
    if (place === "reserved bits") state.corruption(`refcount table entry ${index} has reserved bits set`);
    else if (place === "misaligned") {
      state.corruption(`refcount block ${index} is not cluster aligned; refcount table entry corrupted`);
    } else if (place === "outside") state.corruption(`refcount block ${index} is outside image`);
    else countBlock(state, index, blocks.offsetAt(index));
  }
  if (refcountTableClusters === 0) state.mustRebuild = true;
  const firstOfTable = Math.floor(refcountTableOffset / state.clusterSizeBytes);
  for (let offset = 0; offset < refcountTableClusters; offset++) {
    if (!state.isReferredToOnce(firstOfTable + offset)) state.isStructureShared = true;
  }
}

function countBlock(state: CheckState, index: number, offset: number): void {
  const cluster = offset / state.clusterSizeBytes;
  state.refer(offset, state.clusterSizeBytes);
  const count = state.references[cluster];
  if (count !== 1) {
    state.mustRebuild = true;
    state.corruption(`refcount block ${index} refcount=${count}`);
  } else if (!state.isReferredToOnce(cluster)) {
    state.isStructureShared = true;
  }
}

export interface Comparison {
  /** End of the last cluster that is used or referred to, in bytes. */
  imageEndOffset: number;
  /** Refcounts that are zero and should not be, which qemu-img -r leaks does not go past. */
  wrongZeroCount: number;
  singles: SingleSet;
}

/** Refcounts against references; with `repair` the wrong ones are corrected in place. */
export async function compareRefcounts(
  state: CheckState,
  blocks: RefcountBlocks,
  repair: RepairMode | undefined,
): Promise<Comparison> {
  const { references, hostClusterCount } = state;
  const singles = new SingleSet(hostClusterCount);
  let highestCluster = 0;
  let wrongZeroCount = 0;
  for (let first = 0; first < hostClusterCount; first += blocks.clustersPerBlock) {
    const end = Math.min(first + blocks.clustersPerBlock, hostClusterCount);
    if (blocks.isAbsent(first) && !state.mayRefer(first, end)) continue;
    await blocks.load(first);
    for (let cluster = first; cluster < end; cluster++) {
      const refcount = blocks.get(cluster);
      const reference = references[cluster] ?? 0;
      if (Number.isNaN(refcount)) {
        state.checkError(`Can't get refcount for cluster ${cluster}: Input/output error`);
        continue;
      }
      if (refcount > 0 || reference > 0) highestCluster = cluster;
      const isCorrected = refcount !== reference && correct(state, blocks, cluster, refcount, repair);
      if ((isCorrected ? reference : refcount) === 1) singles.add(cluster);
      if (refcount === 0 && reference > 0) {
        wrongZeroCount++;
        if (!blocks.isWritable) state.mustRebuild = true;
      }
    }
  }
  await blocks.flush();
  return { imageEndOffset: (highestCluster + 1) * state.clusterSizeBytes, wrongZeroCount, singles };
}

/** @returns whether the refcount is right now. */
function correct(
  state: CheckState,
  blocks: RefcountBlocks,
  cluster: number,
  refcount: number,
  repair: RepairMode | undefined,
): boolean {
  const { counts } = state;
  const reference = state.references[cluster] ?? 0;
  const message = `cluster ${cluster} refcount=${blocks.textOf(cluster)} reference=${reference}`;
  const isLeak = refcount > reference;
  if (repair !== undefined && (isLeak || repair === "all") && blocks.isWritable) {
    blocks.set(cluster, reference);
    if (isLeak) counts.leaksFixed++;
    else counts.corruptionsFixed++;
    state.note(`Repairing ${message}`);
    return true;
  }
  if (isLeak) state.leak(message);
  else state.corruption(message);
  return false;
}

/** In the active tables COPIED says that the refcount is exactly one. */
export class CopiedFlags {
  private readonly hasDataFile: boolean;
  private readonly isExtended: boolean;

  /** @param ranges null: nothing is corrected. */
  constructor(
    private readonly state: CheckState,
    private readonly blocks: RefcountBlocks,
    private readonly singles: SingleSet,
    private readonly ranges: MetadataRanges | null,
  ) {
    this.hasDataFile = (state.header.incompatibleFeatures & INCOMPATIBLE_EXTERNAL_DATA) !== 0n;
    this.isExtended = isExtendedL2(state.header);
  }

  async check(): Promise<void> {
    const { state } = this;
    const { l1TableOffset, l1Size } = state.header;
    const l1 = await state.read(l1TableOffset, l1Size * 8);
    let tablesWalked = 0;
    for (let index = 0; index < l1Size; index++) {
      const high = l1.getUint32(index * 8);
      const low = l1.getUint32(index * 8 + 4);
      const l2Offset = offsetOf(high, low);
      if (l2Offset === 0) continue;
      const what = `L2 cluster: l1_index=${index} l1_entry=${entryHex(high, low)}`;
      if (await this.isWrong(what, high, l2Offset)) {
        if (this.mayChange("L1 entry", l1TableOffset + index * 8, 8, "active L1 table")) {
          l1.setUint32(index * 8, (high ^ COPIED_HIGH) >>> 0);
          await state.write(
            new Uint8Array(l1.buffer as ArrayBuffer, index * 8, 8),
            l1TableOffset + index * 8,
          );
          this.noteFixed(what, 1);
        }
      }
      if (l2Offset >= state.fileBytes) continue;
      // Where there are more, tables are named again and again; check/tables.ts has reported it.
      if (++tablesWalked > state.hostClusterCount) return;
      await this.checkTable(l2Offset);
    }
  }

  private async checkTable(l2Offset: number): Promise<void> {
    const { state, hasDataFile, isExtended } = this;
    const l2 = await state.read(l2Offset, state.clusterSizeBytes);
    let changedFrom = Infinity;
    let changedEnd = 0;
    let changedCount = 0;
    for (let at = 0; at < l2.byteLength; at += isExtended ? 16 : 8) {
      const high = l2.getUint32(at);
      const low = l2.getUint32(at + 4);
      if (high & COMPRESSED_HIGH || !isAllocated(high, low, hasDataFile, isExtended)) continue;
      if (!this.isSuspect(high, offsetOf(high, low))) continue;
      const what = `data cluster: l2_entry=${entryHex(high, low)}`;
      if (!(await this.isWrong(what, high, offsetOf(high, low), hasDataFile))) continue;
      if (this.ranges === null) continue;
      l2.setUint32(at, (high ^ COPIED_HIGH) >>> 0);
      changedFrom = Math.min(changedFrom, at);
      changedEnd = at + 8;
      changedCount++;
    }
    if (changedCount === 0 || !this.mayChange("L2 table", l2Offset, state.clusterSizeBytes)) return;
    const bytes = new Uint8Array(l2.buffer as ArrayBuffer, changedFrom, changedEnd - changedFrom);
    await state.write(bytes, l2Offset + changedFrom);
    this.noteFixed(`${changedCount} L2 entries of the table at ${l2Offset}`, changedCount);
  }

  private noteFixed(what: string, count: number): void {
    for (let done = 0; done < count; done++) this.state.corruptionFixed();
    this.state.note(`Repairing OFLAG_COPIED ${what}`);
  }

  private mayChange(what: string, offsetBytes: number, lengthBytes: number, own = ""): boolean {
    if (this.ranges === null) return false;
    const overlapped = this.ranges.overlapOf(offsetBytes, lengthBytes, own);
    if (overlapped === null) return true;
    this.state.checkError(
      `cannot correct the ${what} at offset ${offsetBytes}: it lies in the ${overlapped}`,
    );
    return false;
  }

  /** Quick: the flag contradicts the bitmap, or the cluster lies past the file, where the bitmap ends. */
  private isSuspect(high: number, offset: number): boolean {
    const isFlagged = (high & COPIED_HIGH) !== 0;
    // Clusters of an external data file count as referred to once.
    if (this.hasDataFile) return !isFlagged;
    const cluster = Math.floor(offset / this.state.clusterSizeBytes);
    return cluster >= this.state.hostClusterCount || this.singles.has(cluster) !== isFlagged;
  }

  /** Reports a wrong flag. */
  private async isWrong(what: string, high: number, offset: number, isInDataFile = false): Promise<boolean> {
    const { state, blocks } = this;
    let refcount = 1;
    if (!isInDataFile) {
      const cluster = Math.floor(offset / state.clusterSizeBytes);
      if (cluster < state.hostClusterCount && this.singles.has(cluster) === ((high & COPIED_HIGH) !== 0)) {
        return false;
      }
      await blocks.load(cluster);
      refcount = blocks.get(cluster);
    }
    // One that cannot be read was reported when the refcounts were compared.
    if (Number.isNaN(refcount) || (refcount === 1) === ((high & COPIED_HIGH) !== 0)) return false;
    state.corruption(`OFLAG_COPIED ${what} refcount=${refcount}`);
    return true;
  }
}
