// Refcounts and the allocator of host clusters.
//
// Two levels: the refcount table (wholly in memory) points to refcount blocks (cached). Changes stay in memory; the
// flush writes them, blocks before the tables that point to them. Only references from 0 to 1 are added here, and
// only settled frees (frees.ts) are taken away, so the file's refcounts are never lower than what its L2 tables use.
//
// Where new clusters come from. First from holes: `holeCursor` moves up through the existing blocks, at most one
// block a call, so that no guest write pays for a long search; blocks found full are remembered. Else at the end:
// `endCluster` moves past the file's end. Clusters that were never used before (`isFresh`) read as zeroes in a
// regular file, so the rest of such a cluster need not be written.
//
// A block that is missing is put where it is needed, and counts itself if it covers its own place. A table that is
// too small is replaced by a larger one, at the end of the file; the flush switches the header to it.
//
// Blocks are read synchronously: one covers 2 GiB of an image with default parameters, so this is rare.
// Main thread only. Specification: qcow2, "Host cluster management".

import { CowcatcherError, toCowcatcherError } from "../../../errors.js";
import { MiB } from "../../../units.js";
import { CachedTable, TableCache } from "../format/cached-table.js";
import { EntryTable } from "../format/entry-table.js";
import type { QcowFile } from "../format/file.js";
import { MAX_REFCOUNT_TABLE_BYTES, formatError, type Qcow2Header } from "../format/header.js";
import { assertStored } from "../format/stored.js";

const BLOCK_CACHE_BYTES = 16 * MiB;
const BLOCK_CACHE_MIN = 8;
/** A refcount table entry is an offset but for its nine lowest bits. */
const TABLE_HIGH_MASK = 0x7fffffff;
/** L1 and L2 entries reach no further than 2^56; numbers here no further than 2^53. */
const MAX_HOST_CLUSTER_END = 2 ** 53;

/** Ranges of the file that no allocation may ever hand out again. */
export interface ReservedRange {
  what: string;
  offsetBytes: number;
  lengthBytes: number;
}

export class Refcounts {
  table: EntryTable;
  /** A table that was outgrown: the flush must write the new one whole and switch the header to it. */
  outgrown: { offsetBytes: number; lengthBytes: number }[] = [];
  /** The table could not grow, and half of it must not reach the file: no flush may write it any more. */
  failure: Error | undefined;
  /** Out-fields of `allocate`. */
  allocatedCount = 0;
  isFresh = false;

  readonly blocks: TableCache;
  private readonly clusterSizeBytes: number;
  private readonly entriesPerBlock: number;
  private readonly order: number;
  private readonly blockOffsets = new Set<number>();
  private fullBlocks: Uint8Array;
  private holeCursor = 0;
  private endCluster: number;
  private freshFrom: number;

  constructor(
    header: Qcow2Header,
    private readonly file: QcowFile,
    private readonly reserved: () => readonly ReservedRange[],
    /** What table stands at a cluster, as far as it stood there when the image was opened. */
    private readonly tableAt: (offsetBytes: number) => string | undefined = () => undefined,
  ) {
    this.clusterSizeBytes = 2 ** header.clusterBits;
    this.order = header.refcountOrder;
    this.entriesPerBlock = (this.clusterSizeBytes * 8) / 2 ** this.order;
    const bytes = new Uint8Array(header.refcountTableClusters * this.clusterSizeBytes);
    file.readSync(bytes, 0, bytes.length, header.refcountTableOffset);
    this.table = EntryTable.fromBytes(bytes, header.refcountTableOffset);
    this.table.checkOffsets(this.clusterSizeBytes, TABLE_HIGH_MASK, "refcount table", file.name);
    for (let index = 0; index < this.table.length; index++) {
      const offset = this.table.offsetAt(index, TABLE_HIGH_MASK);
      if (offset !== 0) this.blockOffsets.add(offset);
    }
    this.fullBlocks = new Uint8Array(this.table.length);
    this.blocks = new TableCache(Math.max(BLOCK_CACHE_MIN, BLOCK_CACHE_BYTES / this.clusterSizeBytes));
    const fileClusters = Math.ceil(file.endOffset / this.clusterSizeBytes);
    this.endCluster = file.isBlockDevice ? 0 : fileClusters;
    this.freshFrom = file.isBlockDevice ? Infinity : fileClusters;
  }

  /**
   * For an image that may be written: what is missing of the table would count clusters in use as free.
   * @throws CowcatcherError FORMAT
   */
  assertStored(): void {
    assertStored(this.file, "the refcount table", this.table.offsetBytes, this.table.lengthBytes);
  }

  /** Whether a cluster from `firstCluster` on has a refcount. @throws CowcatcherError FORMAT, IO */
  hasUsedFrom(firstCluster: number): boolean {
    const { entriesPerBlock, table } = this;
    for (let index = Math.floor(firstCluster / entriesPerBlock); index < table.length; index++) {
      if (table.offsetAt(index, TABLE_HIGH_MASK) === 0) continue;
      const start = index * entriesPerBlock;
      for (let cluster = Math.max(firstCluster, start); cluster < start + entriesPerBlock; cluster++) {
        if (this.get(cluster) !== 0) return true;
      }
    }
    return false;
  }

  get isDirty(): boolean {
    return this.blocks.dirtyCount > 0 || this.table.isDirty || this.outgrown.length > 0;
  }

  /** So many dirty blocks that no more frees should be applied before the next flush. */
  get isCrowded(): boolean {
    return this.blocks.dirtyCount >= this.blocks.capacity / 2;
  }

  /**
   * Takes up to maxClusters contiguous clusters; returns the host offset of the first and sets `allocatedCount`
   * and `isFresh`. @throws CowcatcherError FORMAT where refcounts call metadata free, LIMIT at the table's bound.
   */
  allocate(maxClusters: number): number {
    if (this.failure !== undefined) throw this.failure;
    let first = this.findHole();
    if (first < 0) first = this.findEnd();
    const block = this.existingBlock(first);
    const start = first % this.entriesPerBlock;
    let count = 1;
    while (
      count < maxClusters &&
      start + count < this.entriesPerBlock &&
      this.getIn(block, start + count) === 0
    ) {
      count++;
    }
    this.isFresh = first >= this.freshFrom;
    // A run is either fresh as a whole or not at all.
    if (!this.isFresh) count = Math.min(count, this.freshFrom - first);
    this.claim(first, count);
    this.allocatedCount = count;
    return first * this.clusterSizeBytes;
  }

  /** Gives back what `allocate` returned and nothing refers to. */
  unallocate(offsetBytes: number, clusterCount: number): void {
    for (let index = 0; index < clusterCount; index++) {
      this.decrement(offsetBytes / this.clusterSizeBytes + index);
    }
  }

  /**
   * One reference less for each cluster that a region touches. A count that is 0 already is left alone: the image
   * was inconsistent before, and the worst that follows is what it was.
   */
  dropRegion(offsetBytes: number, lengthBytes: number): void {
    const first = Math.floor(offsetBytes / this.clusterSizeBytes);
    const end = Math.ceil((offsetBytes + lengthBytes) / this.clusterSizeBytes);
    for (let cluster = first; cluster < end; cluster++) this.decrement(cluster);
  }

  get(cluster: number): number {
    const block = this.blockOf(cluster);
    return block === undefined ? 0 : this.getIn(block, cluster % this.entriesPerBlock);
  }

  private decrement(cluster: number): void {
    const block = this.blockOf(cluster);
    if (block === undefined) return;
    const index = cluster % this.entriesPerBlock;
    const count = this.getIn(block, index);
    // Beyond 2^53 a count is inexact: left alone, it is a leak at worst.
    if (count === 0 || count > Number.MAX_SAFE_INTEGER) return;
    this.setIn(block, index, count - 1);
    if (count > 1) return;
    this.fullBlocks[block.index] = 0;
    if (cluster < this.holeCursor) this.holeCursor = cluster;
  }

  /** A free cluster below `endCluster`, or -1; looks into one block at most. */
  private findHole(): number {
    let blockIndex = Math.floor(this.holeCursor / this.entriesPerBlock);
    while (this.holeCursor < this.endCluster) {
      const isFull = this.fullBlocks[blockIndex] === 1;
      if (!isFull && this.table.offsetAt(blockIndex, TABLE_HIGH_MASK) !== 0) break;
      blockIndex++;
      this.holeCursor = blockIndex * this.entriesPerBlock;
    }
    if (this.holeCursor >= this.endCluster) return -1;
    const block = this.existingBlock(this.holeCursor);
    const firstCluster = blockIndex * this.entriesPerBlock;
    const end = Math.min(this.endCluster, firstCluster + this.entriesPerBlock);
    const startedAt = this.holeCursor;
    for (let cluster = startedAt; cluster < end; cluster++) {
      if (this.getIn(block, cluster - firstCluster) !== 0) continue;
      this.holeCursor = cluster;
      return cluster;
    }
    if (startedAt === firstCluster && end === firstCluster + this.entriesPerBlock) {
      this.fullBlocks[blockIndex] = 1;
    }
    this.holeCursor = end;
    return -1;
  }

  /** The first free cluster from `endCluster` on, with a block that counts it. */
  private findEnd(): number {
    for (;;) {
      const cluster = this.endCluster;
      const block = this.blockOf(cluster);
      if (block === undefined) this.addBlock(Math.floor(cluster / this.entriesPerBlock));
      else if (this.getIn(block, cluster % this.entriesPerBlock) === 0) return cluster;
      else this.endCluster++;
    }
  }

  /** Makes block `blockIndex` at `endCluster`; its place is counted by itself or by a block that exists. */
  private addBlock(blockIndex: number): void {
    if (blockIndex >= this.table.length) {
      this.growTable(blockIndex + 1);
      return; // the end has moved: the caller looks again
    }
    const cluster = this.endCluster;
    const owner = Math.floor(cluster / this.entriesPerBlock);
    if (owner !== blockIndex && this.table.offsetAt(owner, TABLE_HIGH_MASK) === 0) {
      this.addBlock(owner);
      return;
    }
    if (owner !== blockIndex && this.get(cluster) !== 0) {
      this.endCluster++;
      return;
    }
    this.guard(cluster, 1);
    const offset = cluster * this.clusterSizeBytes;
    const block = new CachedTable(blockIndex, offset, new Uint8Array(this.clusterSizeBytes));
    this.blocks.put(block);
    this.blocks.willChange(block, 0, this.clusterSizeBytes);
    this.table.set(blockIndex, offset, 0);
    this.blockOffsets.add(offset);
    this.claim(cluster, 1, true);
  }

  /** Replaces the table by one of at least `entryCount` entries. */
  private growTable(entryCount: number): void {
    const bytesWanted = Math.max(entryCount, Math.ceil(this.table.length * 1.5)) * 8;
    const clusters = Math.ceil(Math.min(bytesWanted, MAX_REFCOUNT_TABLE_BYTES) / this.clusterSizeBytes);
    const entries = (clusters * this.clusterSizeBytes) / 8;
    if (entries < entryCount) {
      throw new CowcatcherError({
        code: "LIMIT",
        object: this.file.name,
        problem: `the refcount table would outgrow its limit of ${MAX_REFCOUNT_TABLE_BYTES / MiB} MiB`,
        hint: "copy the image to one with larger clusters",
      });
    }
    const words = new Uint32Array(entries * 2);
    words.set(this.table.words);
    const old = { offsetBytes: this.table.offsetBytes, lengthBytes: this.table.lengthBytes };
    const fullBlocks = new Uint8Array(entries);
    fullBlocks.set(this.fullBlocks);
    this.fullBlocks = fullBlocks;
    this.table = new EntryTable(words, old.offsetBytes);
    // The old place stays reserved until the header no longer names it.
    this.outgrown.push(old);
    try {
      const first = this.findEndRun(clusters);
      this.claim(first, clusters);
      this.table.offsetBytes = first * this.clusterSizeBytes;
      this.table.markAllDirty();
    } catch (error) {
      this.failure = toCowcatcherError(error, this.file.name);
      throw this.failure;
    }
  }

  /** `count` contiguous free clusters at the end, all counted by blocks that exist. */
  private findEndRun(count: number): number {
    for (;;) {
      const first = this.endCluster;
      let free = 0;
      while (free < count) {
        const block = this.blockOf(first + free);
        if (block === undefined) {
          this.addBlock(Math.floor((first + free) / this.entriesPerBlock));
          break;
        }
        if (this.getIn(block, (first + free) % this.entriesPerBlock) !== 0) {
          this.endCluster = first + free + 1;
          break;
        }
        free++;
      }
      if (free === count) return first;
    }
  }

  private claim(first: number, count: number, isBlock = false): void {
    if (!isBlock) this.guard(first, count);
    for (let cluster = first; cluster < first + count; cluster++) {
      this.setIn(this.existingBlock(cluster), cluster % this.entriesPerBlock, 1);
    }
    const end = first + count;
    if (first === this.holeCursor) this.holeCursor = end;
    if (end > this.endCluster) this.endCluster = end;
    if (end > this.freshFrom) this.freshFrom = end;
  }

  /** The allocator's last look: what it hands out is none of the image's own metadata. */
  private guard(first: number, count: number): void {
    const start = first * this.clusterSizeBytes;
    const end = start + count * this.clusterSizeBytes;
    if (end > MAX_HOST_CLUSTER_END) {
      throw new CowcatcherError({
        code: "LIMIT",
        object: this.file.name,
        problem: "the image file would outgrow its limit of 2^53 bytes",
      });
    }
    for (const { what, offsetBytes, lengthBytes } of this.reserved()) {
      if (start < offsetBytes + lengthBytes && offsetBytes < end) this.refuse(what, start);
    }
    const { offsetBytes, lengthBytes } = this.table;
    if (this.outgrown.length === 0 && start < offsetBytes + lengthBytes && offsetBytes < end) {
      this.refuse("the refcount table", start);
    }
    for (const old of this.outgrown) {
      if (start < old.offsetBytes + old.lengthBytes && old.offsetBytes < end) {
        this.refuse("the refcount table", start);
      }
    }
    for (let offset = start; offset < end; offset += this.clusterSizeBytes) {
      if (this.blockOffsets.has(offset)) this.refuse("a refcount block", offset);
      const table = this.tableAt(offset);
      if (table !== undefined) this.refuse(table, offset);
    }
  }

  private refuse(what: string, offsetBytes: number): never {
    throw new CowcatcherError({
      code: "FORMAT",
      object: this.file.name,
      problem: `the refcounts call a cluster free that holds ${what}; nothing was written to it`,
      hint: "repair the image with qemu-img check -r all",
      offsetBytes,
    });
  }

  private blockOf(cluster: number): CachedTable | undefined {
    const index = Math.floor(cluster / this.entriesPerBlock);
    const cached = this.blocks.get(index);
    if (cached !== undefined) return cached;
    const offset = index < this.table.length ? this.table.offsetAt(index, TABLE_HIGH_MASK) : 0;
    if (offset === 0) return undefined;
    const bytes = new Uint8Array(this.clusterSizeBytes);
    assertStored(this.file, "a refcount block", offset, bytes.length);
    this.file.readSync(bytes, 0, bytes.length, offset);
    const block = new CachedTable(index, offset, bytes);
    this.blocks.put(block);
    return block;
  }

  private existingBlock(cluster: number): CachedTable {
    const block = this.blockOf(cluster);
    if (block === undefined) throw formatError(this.file.name, `no refcount block counts cluster ${cluster}`);
    return block;
  }

  private getIn(block: CachedTable, index: number): number {
    switch (this.order) {
      case 6:
        return block.view.getUint32(index * 8) * 2 ** 32 + block.view.getUint32(index * 8 + 4);
      case 5:
        return block.view.getUint32(index * 4);
      case 4:
        return block.view.getUint16(index * 2);
      case 3:
        return block.view.getUint8(index);
      default: {
        const perByte = 8 >>> this.order;
        const shift = (index % perByte) << this.order;
        return (block.view.getUint8(Math.floor(index / perByte)) >>> shift) & ((1 << (1 << this.order)) - 1);
      }
    }
  }

  private setIn(block: CachedTable, index: number, count: number): void {
    const firstByte = Math.floor((index << this.order) / 8);
    this.blocks.willChange(block, firstByte, firstByte + Math.max(1, (1 << this.order) / 8));
    switch (this.order) {
      case 6:
        block.view.setUint32(index * 8, Math.floor(count / 2 ** 32));
        block.view.setUint32(index * 8 + 4, count % 2 ** 32);
        return;
      case 5:
        block.view.setUint32(index * 4, count);
        return;
      case 4:
        block.view.setUint16(index * 2, count);
        return;
      case 3:
        block.view.setUint8(index, count);
        return;
      default: {
        const shift = (index << this.order) % 8;
        const mask = ((1 << (1 << this.order)) - 1) << shift;
        block.view.setUint8(firstByte, (block.view.getUint8(firstByte) & ~mask) | (count << shift));
      }
    }
  }
}
