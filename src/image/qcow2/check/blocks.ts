// The refcounts on disk, for a check and a repair in place: the table whole, one block at a time.
//
// Changes go to the block that is loaded and reach the file when another one is loaded, or with `flush`. A block is
// written from the first byte that changed to the last; it never moves.

import type { CheckState } from "./state.js";

const UNREADABLE = new DataView(new ArrayBuffer(0));

/** What an entry of the refcount table is. Its bits 9 to 63 are an offset. */
export type BlockPlace = "none" | "reserved bits" | "misaligned" | "outside" | "inside";

export class RefcountBlocks {
  readonly clustersPerBlock: number;
  readonly entryCount: number;
  private readonly refcountBits: number;
  private block: DataView | null = null;
  private blockIndex = -1;
  private changedFrom = Infinity;
  private changedEnd = 0;

  private constructor(
    private readonly state: CheckState,
    private readonly table: DataView,
  ) {
    this.refcountBits = 2 ** state.header.refcountOrder;
    this.clustersPerBlock = (state.clusterSizeBytes * 8) / this.refcountBits;
    this.entryCount = table.byteLength / 8;
  }

  /** @throws CowcatcherError IO */
  static async open(state: CheckState): Promise<RefcountBlocks> {
    const { refcountTableOffset, refcountTableClusters } = state.header;
    const table = await state.read(refcountTableOffset, refcountTableClusters * state.clusterSizeBytes);
    return new RefcountBlocks(state, table);
  }

  placeOf(index: number): BlockPlace {
    const high = this.table.getUint32(index * 8);
    const low = this.table.getUint32(index * 8 + 4);
    if (high === 0 && low === 0) return "none";
    if (low & 0x1ff) return "reserved bits";
    // By the low word alone: it holds a cluster's bits, and the whole offset may be inexact.
    if (this.state.isMisaligned(low)) return "misaligned";
    return this.offsetAt(index) / this.state.clusterSizeBytes >= this.state.hostClusterCount
      ? "outside"
      : "inside";
  }

  /** Past 2^53 it is inexact, but outside the image all the same. */
  offsetAt(index: number): number {
    const low = this.table.getUint32(index * 8 + 4);
    return this.table.getUint32(index * 8) * 2 ** 32 + ((low & 0xfffffe00) >>> 0);
  }

  /** The refcounts of the cluster's block are zeroes, as there is none. Nothing is read. */
  isAbsent(cluster: number): boolean {
    const index = Math.floor(cluster / this.clustersPerBlock);
    return index >= this.entryCount || this.placeOf(index) === "none";
  }

  /** Makes the cluster's block the current one. What lies past the end of the file reads as zeroes. */
  async load(cluster: number): Promise<void> {
    const index = Math.floor(cluster / this.clustersPerBlock);
    if (index === this.blockIndex) return;
    await this.flush();
    this.blockIndex = index;
    this.block = null;
    if (index >= this.entryCount) return;
    const low = this.table.getUint32(index * 8 + 4);
    const offset = this.offsetAt(index);
    if (offset === 0) return;
    if (this.state.isMisaligned((low & 0xfffffe00) >>> 0)) this.block = UNREADABLE;
    else if (offset < this.state.fileBytes) {
      this.block = await this.state.read(offset, this.state.clusterSizeBytes);
    }
  }

  /** The block that is loaded exists and can be changed. */
  get isWritable(): boolean {
    return this.block !== null && this.block !== UNREADABLE;
  }

  /** Of a cluster of the block that is loaded. NaN: the refcount cannot be read. */
  get(cluster: number): number {
    const { block, refcountBits } = this;
    if (block === null) return 0;
    if (block === UNREADABLE) return NaN;
    return refcountIn(block, cluster % this.clustersPerBlock, refcountBits);
  }

  /** As `get`, for messages: exact at 64 bits, too. */
  textOf(cluster: number): string {
    const { block, refcountBits } = this;
    if (block === null || refcountBits < 64) return String(this.get(cluster));
    return String(block.getBigUint64((cluster % this.clustersPerBlock) * 8));
  }

  /** Of a cluster of the block that is loaded, which is writable. */
  set(cluster: number, refcount: number): void {
    const { block, refcountBits } = this;
    if (block === null) return;
    const index = cluster % this.clustersPerBlock;
    setRefcountIn(block, index, refcountBits, refcount);
    const firstByte = Math.floor((index * refcountBits) / 8);
    this.changedFrom = Math.min(this.changedFrom, firstByte);
    this.changedEnd = Math.max(this.changedEnd, firstByte + Math.max(1, refcountBits / 8));
  }

  /** @throws CowcatcherError IO, NO_SPACE */
  async flush(): Promise<void> {
    const { block, changedFrom, changedEnd } = this;
    if (block === null || changedFrom >= changedEnd) return;
    this.changedFrom = Infinity;
    this.changedEnd = 0;
    const bytes = new Uint8Array(block.buffer as ArrayBuffer, changedFrom, changedEnd - changedFrom);
    await this.state.write(bytes, this.offsetAt(this.blockIndex) + changedFrom);
  }
}

/** Specification, "Host cluster management": widths below a byte are filled from the least significant bit on. */
export function refcountIn(block: DataView, index: number, refcountBits: number): number {
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

export function setRefcountIn(block: DataView, index: number, refcountBits: number, refcount: number): void {
  switch (refcountBits) {
    case 8:
      return block.setUint8(index, refcount);
    case 16:
      return block.setUint16(index * 2, refcount);
    case 32:
      return block.setUint32(index * 4, refcount);
    case 64:
      block.setUint32(index * 8, Math.floor(refcount / 2 ** 32));
      return block.setUint32(index * 8 + 4, refcount % 2 ** 32);
    default: {
      const firstBit = index * refcountBits;
      const mask = ((1 << refcountBits) - 1) << (firstBit & 7);
      const others = block.getUint8(firstBit >>> 3) & ~mask;
      return block.setUint8(firstBit >>> 3, others | (refcount << (firstBit & 7)));
    }
  }
}
