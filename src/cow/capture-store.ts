// Where captures go: into slots of the buffer, or into the spill when no slot is free. Main thread only.
//
// A capture has two halves, because its reads may go on asynchronously. `readIntoSlots` or `readIntoSpill` takes the
// room and starts the reads, noting both in a CaptureWork; `attach` puts what was read on the chunk's list, or
// `giveBack` returns the room. Between the two the caller holds the chunk, so nobody else sees half a capture.

import { CowcatcherError } from "../errors.js";
import type { BlockDevice, Completion } from "../block/device.js";
import { pages } from "../native/pages.js";
import { BLOCK_BYTES, BLOCKS_PER_SLOT, SLOT_BYTES } from "./geometry.js";
import { PAGES_READY } from "./buffer-pages.js";
import { HeldBlocks } from "./held-blocks.js";
import {
  captureInfoOf,
  captureLength,
  captureStart,
  CTL_SPILL_BLOCKS,
  CTL_USED_BLOCKS,
  DONE,
  type SharedState,
  SPILLED,
} from "./shared.js";
import { mappedBytesOf } from "./slot-memory.js";
import { BufferAllocator } from "./slots.js";
import type { SpillPlace } from "./spill.js";

export interface CaptureStoreOptions {
  shared: SharedState;
  /** The image itself, below every interceptor: what it holds now is T0's content of every uncaptured block. */
  image: Pick<BlockDevice, "name" | "sizeBytes" | "read">;
  /** Made when the buffer is full for the first time; undefined where the policy is not to spill. */
  openSpill: (() => SpillPlace) | undefined;
  spillLimitBytes: number;
  /** Length of the table in held-blocks.ts; smaller in simulations. */
  heldChunksMax?: number | undefined;
}

/** Blocks in the spill are counted in 32 bits: 8 TiB of them. */
const SPILL_BYTES_MAX = (2 ** 31 - 1) * BLOCK_BYTES;
/** Captures taken back at a time, some 5 µs: more than one write of 4 KiB uses, so the chain gets shorter. */
const RECLAIM_BATCH = 64;

/** What one capture has in hand: pairs of first block in the buffer and capture info; reads that go on. */
export class CaptureWork {
  readonly captures: number[] = [];
  readonly pending: Promise<void>[] = [];
  spilledBlocks = 0;
  spillBitmap: Uint8Array | null = null;

  /** Nothing had to be captured. */
  get isEmpty(): boolean {
    return this.captures.length === 0 && this.spilledBlocks === 0;
  }

  reset(): void {
    this.captures.length = 0;
    this.pending.length = 0;
    this.spilledBlocks = 0;
    this.spillBitmap = null;
  }
}

export class CaptureStore {
  readonly #options: CaptureStoreOptions;
  readonly #shared: SharedState;
  readonly #slots: BufferAllocator;
  readonly #heldBlocks: HeldBlocks;
  /** Blocks of the chunk in hand that need no capture; valid within the range that `findMissing` was asked for. */
  readonly #held: Uint8Array;
  readonly #spillBitmap: Uint8Array;
  /** For what is read to be written elsewhere: page-aligned, as O_DIRECT reads into such memory straight. */
  readonly #scratches: Uint8Array[] = [];
  #spill: SpillPlace | null = null;
  #closed = false;
  /** What workers have freed and the allocator does not have back yet: the first capture of a chain, or -1. */
  #reclaimable = -1;

  constructor(options: CaptureStoreOptions) {
    this.#options = options;
    this.#shared = options.shared;
    const { chunkCount, blocksPerChunk } = options.shared.geometry;
    const { buffer, bufferBytes } = options.shared.buffers;
    const mappedSlotCount = mappedBytesOf(buffer, bufferBytes) / SLOT_BYTES;
    const marks = new Int32Array(buffer.pages);
    // Without a file there is nowhere to go but to pages that are not ready.
    const readySlotCount = () => (buffer.fileFd < 0 ? mappedSlotCount : Atomics.load(marks, PAGES_READY));
    this.#slots = new BufferAllocator(bufferBytes / SLOT_BYTES, mappedSlotCount, readySlotCount);
    this.#heldBlocks = new HeldBlocks(chunkCount, blocksPerChunk, options.heldChunksMax);
    this.#held = new Uint8Array(blocksPerChunk);
    this.#spillBitmap = new Uint8Array(blocksPerChunk / 8);
  }

  get freeBlockCount(): number {
    return this.#slots.freeBlockCount;
  }

  /** The job has ended: nothing is written to the spill any more, whose descriptor may be another file's by now. */
  close(): void {
    this.#closed = true;
    this.#spill?.abandon?.();
  }

  /**
   * Owner only: the number of blocks of [from, to), bytes of the disk in the chunk, that need a capture: neither
   * captured before nor in a cluster that is DONE. `readIntoSlots` and `readIntoSpill` go by it.
   */
  findMissing(chunk: number, from: number, to: number): number {
    const firstBlock = this.#blockOf(chunk, from);
    const endBlock = this.#endBlockOf(chunk, to);
    if (!this.#heldBlocks.knows(chunk)) this.#lookUpHeld(chunk);
    let missing = 0;
    for (let block = firstBlock; block < endBlock; block++) {
      const isHeld = this.#heldBlocks.has(chunk, block);
      this.#held[block] = isHeld ? 1 : 0;
      if (!isHeld) missing++;
    }
    if (missing === 0) return 0;
    this.#flagDone(chunk, from, to);
    missing = 0;
    for (let block = firstBlock; block < endBlock; block++) if (!this.#held[block]) missing++;
    return missing;
  }

  /**
   * Whether [from, to), bytes of the disk in the chunk, is known to be captured. No claim is needed: only this thread
   * notes captures, once they are complete, and what is captured stays so. `false` says nothing.
   */
  isHeld(chunk: number, from: number, to: number): boolean {
    return this.#heldBlocks.hasAll(chunk, this.#blockOf(chunk, from), this.#endBlockOf(chunk, to));
  }

  /** All blocks of [from, to) are captured now, or their cluster is DONE. */
  #noteHeld(chunk: number, from: number, to: number): void {
    this.#heldBlocks.add(chunk, this.#blockOf(chunk, from), this.#endBlockOf(chunk, to));
  }

  /** Owner only: notes what the chunk's captures and its spill bitmap say. */
  #lookUpHeld(chunk: number): void {
    const shared = this.#shared;
    this.#heldBlocks.begin(chunk);
    for (let capture = shared.chunkHead(chunk); capture >= 0; capture = shared.captureNext[capture]) {
      const info = shared.captureInfo[capture];
      const start = captureStart(info);
      this.#heldBlocks.add(chunk, start, start + captureLength(info));
    }
    if ((shared.chunkWords[chunk] & SPILLED) === 0) return;
    this.#spillFile().readBitmap(chunk, this.#spillBitmap);
    for (let block = 0; block < this.#held.length; block++) {
      if (this.#spillBitmap[block >> 3] & (1 << (block & 7))) this.#heldBlocks.add(chunk, block, block + 1);
    }
  }

  #flagDone(chunk: number, from: number, to: number): void {
    const { clusterStates, geometry } = this.#shared;
    const { clusterBytes } = geometry;
    const base = chunk * geometry.chunkBytes;
    const last = Math.floor((to - 1) / clusterBytes);
    for (let cluster = Math.floor(from / clusterBytes); cluster <= last; cluster++) {
      if (clusterStates[cluster] !== DONE) continue;
      const start = (cluster * clusterBytes - base) / BLOCK_BYTES;
      this.#held.fill(1, start, start + clusterBytes / BLOCK_BYTES);
    }
  }

  /** Room must be there. A capture lies in one cluster, as a worker takes captures by cluster. */
  readIntoSlots(work: CaptureWork, chunk: number, from: number, to: number): void {
    const base = chunk * this.#shared.geometry.chunkBytes;
    const endBlock = this.#endBlockOf(chunk, to);
    const blocksPerCluster = this.#shared.geometry.clusterBytes / BLOCK_BYTES;
    for (let block = this.#blockOf(chunk, from); block < endBlock;) {
      if (this.#held[block]) {
        block++;
        continue;
      }
      const clusterEnd = (Math.floor(block / blocksPerCluster) + 1) * blocksPerCluster;
      const limit = Math.min(endBlock, clusterEnd, block + BLOCKS_PER_SLOT);
      let wanted = 1;
      while (block + wanted < limit && !this.#held[block + wanted]) wanted++;
      const capture = this.#slots.allocate(wanted);
      const count = this.#slots.allocatedCount;
      work.captures.push(capture, captureInfoOf(block, count));
      this.#readRun(work, capture * BLOCK_BYTES, count, base + block * BLOCK_BYTES);
      block += count;
    }
  }

  /** Reads T0 blocks into their slot. */
  #readRun(work: CaptureWork, slotOffset: number, count: number, offsetBytes: number): void {
    const { slots } = this.#shared;
    if (slots.isMapped(slotOffset)) {
      const pending = this.#readBlocks(slots.mapped, slotOffset, count, offsetBytes);
      if (pending) work.pending.push(pending);
      return;
    }
    this.#readThrough(work, count, offsetBytes, (scratch) => {
      slots.write(scratch, 0, count * BLOCK_BYTES, slotOffset);
      return undefined;
    });
  }

  /** Reads T0 blocks; those past the disk's end are zeroes. */
  #readBlocks(buffer: Uint8Array, bufferOffset: number, count: number, offsetBytes: number): Completion {
    const { image } = this.#options;
    const wanted = count * BLOCK_BYTES;
    const length = Math.min(wanted, image.sizeBytes - offsetBytes);
    if (length < wanted) buffer.fill(0, bufferOffset + length, bufferOffset + wanted);
    return image.read(buffer, bufferOffset, length, offsetBytes);
  }

  /** Reads T0 blocks into memory that is in the cache, for `write` to take from its beginning, in this turn if it can. */
  #readThrough(
    work: CaptureWork,
    count: number,
    offsetBytes: number,
    write: (scratch: Uint8Array) => Completion,
  ): void {
    const scratch = this.#scratches.pop() ?? pages(SLOT_BYTES);
    const reading = this.#readBlocks(scratch, 0, count, offsetBytes);
    if (!reading) {
      this.#scratches.push(scratch);
      const writing = write(scratch);
      if (writing) work.pending.push(writing);
      return;
    }
    const done = reading.then(() => {
      // The buffer may be the next job's, and the spill file's descriptor another file's.
      const writing = this.#closed ? undefined : write(scratch);
      // `write` has taken what it needs. A read that fails may go on in the scratch for a while, so that is not kept.
      this.#scratches.push(scratch);
      return writing;
    });
    work.pending.push(done);
  }

  /** @throws CowcatcherError BUFFER_FULL at the spill's limit, NO_SPACE or IO; `giveBack` is the caller's then. */
  readIntoSpill(work: CaptureWork, chunk: number, from: number, to: number, missing: number): void {
    this.#reserveSpill(missing);
    work.spilledBlocks = missing;
    const spill = this.#spillFile();
    const endBlock = this.#endBlockOf(chunk, to);
    spill.readBitmap(chunk, this.#spillBitmap);
    const base = chunk * this.#shared.geometry.chunkBytes;
    for (let block = this.#blockOf(chunk, from); block < endBlock;) {
      if (this.#held[block]) {
        block++;
        continue;
      }
      let count = 1;
      while (count < BLOCKS_PER_SLOT && block + count < endBlock && !this.#held[block + count]) count++;
      const first = block;
      this.#readThrough(work, count, base + first * BLOCK_BYTES, (scratch) =>
        spill.writeBlocks(scratch, 0, chunk, first, count),
      );
      for (let i = block; i < block + count; i++) {
        this.#spillBitmap[i >> 3] = this.#spillBitmap[i >> 3] | (1 << (i & 7));
      }
      block += count;
    }
    work.spillBitmap = work.pending.length > 0 ? this.#spillBitmap.slice() : this.#spillBitmap;
  }

  /** Before anything is read, so that captures which go on at the same time are counted, too. */
  #reserveSpill(blockCount: number): void {
    const used = Atomics.load(this.#shared.control, CTL_SPILL_BLOCKS) + blockCount;
    const limitBytes = Math.min(this.#options.spillLimitBytes, SPILL_BYTES_MAX);
    if (used * BLOCK_BYTES <= limitBytes) {
      Atomics.add(this.#shared.control, CTL_SPILL_BLOCKS, blockCount);
      return;
    }
    throw new CowcatcherError({
      code: "BUFFER_FULL",
      object: this.#spillFile().path,
      problem: `the spill file has reached its limit of ${limitBytes} bytes`,
      hint: "raise --spill-limit, use a larger --cow-buffer-size, or --on-buffer-full wait",
    });
  }

  /**
   * Owner only: puts the capture on the chunk's list or into its spill bitmap; the number of blocks. SPILLED is the
   * caller's to set when it lets the chunk go.
   */
  attach(chunk: number, from: number, to: number, work: CaptureWork): number {
    const shared = this.#shared;
    const { captures, spilledBlocks } = work;
    if (work.spillBitmap !== null) this.#spillFile().writeBitmap(chunk, work.spillBitmap);
    let slotBlocks = 0;
    for (let i = 0; i < captures.length; i += 2) {
      const capture = captures[i];
      const info = captures[i + 1];
      shared.captureInfo[capture] = info;
      shared.captureNext[capture] = shared.chunkHead(chunk);
      shared.setChunkHead(chunk, capture);
      slotBlocks += captureLength(info);
    }
    Atomics.add(shared.control, CTL_USED_BLOCKS, slotBlocks);
    this.#noteHeld(chunk, from, to);
    return slotBlocks + spilledBlocks;
  }

  /** Returns the slots of a capture that came to nothing, and its share of the spill. */
  giveBack({ captures, spilledBlocks }: CaptureWork): void {
    for (let i = 0; i < captures.length; i += 2) {
      this.#slots.free(captures[i], captureLength(captures[i + 1]));
    }
    Atomics.sub(this.#shared.control, CTL_SPILL_BLOCKS, spilledBlocks);
  }

  /** Takes back what workers have freed, if the capture needs it or half of the mapped slots are in use. */
  reclaimIfLow(neededCount: number): void {
    // Blocks come back a chain at a time; taking them early keeps the slots that are in the cache in use.
    if (this.#slots.freeBlockCount < neededCount || this.#slots.isMappedLow) this.reclaim(neededCount);
  }

  /**
   * Takes captures back until `neededCount` blocks are free, and a few more. The chain that a worker has freed may be
   * the whole buffer's, half a million captures: not a matter for one guest write.
   */
  reclaim(neededCount: number): void {
    const { captureInfo, captureNext } = this.#shared;
    const slots = this.#slots;
    let capture = this.#reclaimable;
    for (let count = 0; count < RECLAIM_BATCH || slots.freeBlockCount < neededCount; count++) {
      if (capture < 0) capture = this.#shared.takeFreed();
      if (capture < 0) break;
      const next = captureNext[capture];
      slots.free(capture, captureLength(captureInfo[capture]));
      capture = next;
    }
    this.#reclaimable = capture;
  }

  #blockOf(chunk: number, offsetBytes: number): number {
    return Math.floor((offsetBytes - chunk * this.#shared.geometry.chunkBytes) / BLOCK_BYTES);
  }

  #endBlockOf(chunk: number, endBytes: number): number {
    return Math.ceil((endBytes - chunk * this.#shared.geometry.chunkBytes) / BLOCK_BYTES);
  }

  #spillFile(): SpillPlace {
    if (this.#spill === null) {
      if (this.#options.openSpill === undefined) throw new Error("the policy does not spill");
      this.#spill = this.#options.openSpill();
    }
    return this.#spill;
  }
}
