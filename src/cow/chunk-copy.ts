// A worker's copy of one chunk: read what is still on the source, take what is in slots and spill, write it to the
// target.
//
//   claim: PENDING, CAPTURED → READING; release
//   read the source, without a claim
//   claim: READING → DONE, take the captures off the chunk's list; release
//   lay the captures over what was read, give the slots back
//   write to the target
//
// Why reading needs no claim. While a cluster is READING the guest may write to it, and the main thread captures
// each block before it changes, as ever. So at the second claim a block of ours either has a capture, and that is
// laid over whatever was read of it; or it has none, and then it had not changed by then, so what was read is T0's.
// A claim lasts for a few microseconds, whatever the source's disk does, and the guest never waits for a worker's
// read. (An earlier form held the claim while it read: with two busy cores a worker that lost its core in the
// middle held up guest writes for up to 80 ms.)
//
// In a job without a buffer the second claim comes after the write to the target: there the guest waits for DONE.
//
// With QEMU's sync mode `top` the backup has only what the source's top layer allocated at T0. A cluster that shows
// what lies below it goes through the same states, as its captures must be given back; it is neither read nor
// written, so that the target shows what it builds on itself.

import type { SourceReader } from "../block/device.js";
import type { TargetWriter } from "./target-writer.js";
import { type DrainIo, STEP, type Steps } from "./drain-io.js";
import { BLOCK_BYTES } from "./geometry.js";
import {
  CAPTURED,
  captureLength,
  captureStart,
  CNT_DONE_BYTES,
  CNT_WRITTEN_BYTES,
  CTL_IGNORED_ERRORS,
  CTL_RUN,
  CTL_SPILL_BLOCKS,
  DONE,
  OWNER_MASK,
  OWNER_WORKER,
  PENDING,
  QUEUED,
  READING,
  RUN_ABORTING,
  type SharedState,
  SPILLED,
} from "./shared.js";
import type { SpillFile } from "./spill.js";
import { endOfData, isZero } from "./zero.js";

export interface ChunkCopyOptions {
  shared: SharedState;
  reader: SourceReader;
  writer: TargetWriter;
  /** Unit in which zeroes are left out of the target, in bytes. */
  zeroUnitBytes: number;
  spill: SpillFile | null;
  /** Leaves out what the source's backing chain provides (sync mode `top`). */
  topOnly: boolean;
  /** Page-aligned, at least a chunk long, this worker's own. */
  chunkBuffer: Uint8Array;
}

/** Of one chunk that was read: which of its clusters are taken, which of these copied, which blocks are known zero (null: none). */
export interface Filling {
  taken: Uint8Array;
  copied: Uint8Array;
  zero: Uint8Array | null;
  /** Of how many bytes the target has use; undefined: of all. Else zeroes in the buffer may be what nobody has read. */
  neededBytes: number | undefined;
}

/** Captured blocks between two stretches to be read are read over (and overlaid) up to this many: a page-cache
 *  read of 32 KiB costs about as much as a second system call. */
const READ_OVER_BLOCKS = 8;

export class ChunkCopy {
  readonly #options: ChunkCopyOptions;
  readonly #shared: SharedState;
  readonly #io: DrainIo;
  readonly #unbuffered: boolean;
  /** Of the chunk in hand: which clusters are ours, which of these are copied (the same array where all are), */
  readonly #taken: Uint8Array;
  readonly #copied: Uint8Array;
  /** which blocks captures cover or nobody needs, which blocks are known zero. */
  readonly #covered: Uint8Array;
  readonly #zero: Uint8Array;
  /** Of how many bytes the target has use; undefined: of all. Else covered blocks may have no content at all. */
  #neededBytes: number | undefined;
  /** Whether #zero may have any. */
  #hasNotedZeroes = false;
  readonly #spillBitmap: Uint8Array;
  /** Captures of the chunk in hand, taken off its list; -1 for none. */
  #captures = -1;
  #hasSpilled = false;

  constructor(options: ChunkCopyOptions, io: DrainIo) {
    this.#options = options;
    this.#shared = options.shared;
    this.#io = io;
    const { clustersPerChunk, blocksPerChunk } = options.shared.geometry;
    this.#unbuffered = options.shared.bufferBlockCount === 0;
    this.#taken = new Uint8Array(clustersPerChunk);
    this.#copied = options.topOnly ? new Uint8Array(clustersPerChunk) : this.#taken;
    this.#covered = new Uint8Array(blocksPerChunk);
    this.#zero = new Uint8Array(blocksPerChunk);
    this.#spillBitmap = new Uint8Array(blocksPerChunk / 8);
  }

  /** Takes the chunk as it is now; with `capturedOnly` of its clusters those alone that have captures. */
  *run(chunk: number, capturedOnly: boolean): Steps<void> {
    const takenBytes = yield* this.read(chunk, capturedOnly);
    if (takenBytes > 0) yield* this.write(chunk, takenBytes);
  }

  /**
   * The first half: the chunk's T0 content is in the buffer, and but for a job without a buffer its clusters are DONE. The
   * bytes that it comes to; 0: nothing of it is left, or the job was aborted.
   */
  *read(chunk: number, capturedOnly: boolean): Steps<number> {
    const shared = this.#shared;
    if (!(yield* this.#claim(chunk))) return 0;
    const takenBytes = this.#takeClusters(chunk, capturedOnly);
    if (takenBytes > 0) {
      this.#findCovered(chunk);
      const { writer } = this.#options;
      const base = chunk * shared.geometry.chunkBytes;
      this.#neededBytes = writer.noteUnneeded?.(base, this.#covered, BLOCK_BYTES);
    }
    // Captures made from here on find QUEUED clear when they come, and queue the chunk again.
    shared.release(chunk, QUEUED, 0);
    if (takenBytes === 0) return 0;
    yield STEP;
    if (this.#options.topOnly) yield* this.#leaveOutBelow(chunk);
    yield* this.#readMissing(chunk);
    yield* this.#release(chunk);
    yield STEP;
    if (!this.#unbuffered && !(yield* this.#finishReading(chunk))) return 0;
    this.#takeSlots();
    this.#takeSpilled(chunk);
    this.#recordDigests(chunk);
    yield STEP;
    return takenBytes;
  }

  /** The second half: what was read goes to the target. */
  *write(chunk: number, takenBytes: number): Steps<void> {
    const shared = this.#shared;
    yield* this.#writeTaken(chunk);
    if (shared.written !== null) yield* this.#noteWritten(chunk);
    if (this.#unbuffered && !(yield* this.#finishReading(chunk))) return;
    Atomics.add(shared.counters, CNT_DONE_BYTES, BigInt(takenBytes));
  }

  /** What `write` goes by, besides the buffer: to be handed to another one of the same job (read-ahead.ts). */
  get filling(): Filling {
    const zero = this.#hasNotedZeroes ? this.#zero.slice() : null;
    const neededBytes = this.#neededBytes;
    return { copied: this.#copied.slice(), taken: this.#taken.slice(), zero, neededBytes };
  }

  set filling({ copied, taken, zero, neededBytes }: Filling) {
    this.#neededBytes = neededBytes;
    this.#taken.set(taken);
    this.#copied.set(copied);
    this.#hasNotedZeroes = zero !== null;
    if (zero === null) this.#zero.fill(0);
    else this.#zero.set(zero);
  }

  /** Waits until the chunk is ours; false if the job was aborted meanwhile. */
  *#claim(chunk: number): Steps<boolean> {
    const shared = this.#shared;
    while (!shared.tryClaim(chunk, OWNER_WORKER)) {
      const value = shared.announceWait(chunk);
      if ((value & OWNER_MASK) !== 0) yield { kind: "wait", words: shared.chunkWords, index: chunk, value };
      if (Atomics.load(shared.control, CTL_RUN) === RUN_ABORTING) return false;
    }
    yield STEP;
    return true;
  }

  /** Marks what this pass copies as READING; the bytes that it comes to. */
  #takeClusters(chunk: number, capturedOnly: boolean): number {
    const shared = this.#shared;
    const { clustersPerChunk, clusterBytes, clusterCount, sizeBytes } = shared.geometry;
    const first = chunk * clustersPerChunk;
    let bytes = 0;
    for (let i = 0; i < clustersPerChunk; i++) {
      const cluster = first + i;
      this.#taken[i] = 0;
      if (cluster >= clusterCount) continue;
      const state = Atomics.load(shared.clusterStates, cluster);
      if (state !== CAPTURED && (state !== PENDING || capturedOnly)) continue;
      shared.changeState(cluster, state, READING);
      this.#taken[i] = 1;
      bytes += Math.min(clusterBytes, sizeBytes - cluster * clusterBytes);
    }
    return bytes;
  }

  /** Notes which blocks of our clusters have captures already: those need not be read. */
  #findCovered(chunk: number): void {
    const shared = this.#shared;
    this.#covered.fill(0);
    this.#zero.fill(0);
    this.#hasNotedZeroes = false;
    for (let capture = shared.chunkHead(chunk); capture >= 0; capture = shared.captureNext[capture]) {
      const info = shared.captureInfo[capture];
      const start = captureStart(info);
      this.#covered.fill(1, start, start + captureLength(info));
    }
    if ((shared.chunkWords[chunk] & SPILLED) === 0) return;
    this.#spillFile().readBitmap(chunk, this.#spillBitmap);
    for (let block = 0; block < this.#covered.length; block++) {
      if (bitOf(this.#spillBitmap, block)) this.#covered[block] = 1;
    }
  }

  /**
   * The clusters are DONE: from now on the guest writes to them freely. Takes the captures of our clusters off the
   * chunk's list, those that came while we read included; other clusters' captures stay. False: aborted.
   */
  *#finishReading(chunk: number): Steps<boolean> {
    if (!(yield* this.#claim(chunk))) return false;
    const shared = this.#shared;
    const { clustersPerChunk } = shared.geometry;
    this.#detachCaptures(chunk);
    const clearBits = this.#detachSpilled(chunk) ? SPILLED : 0;
    for (let i = 0; i < clustersPerChunk; i++) {
      if (this.#taken[i]) shared.changeState(chunk * clustersPerChunk + i, READING, DONE);
    }
    shared.release(chunk, clearBits, 0);
    yield STEP;
    return true;
  }

  #detachCaptures(chunk: number): void {
    const shared = this.#shared;
    let kept = -1;
    this.#captures = -1;
    for (let capture = shared.chunkHead(chunk); capture >= 0;) {
      const next = shared.captureNext[capture];
      if (this.#isTaken(captureStart(shared.captureInfo[capture]))) {
        shared.captureNext[capture] = this.#captures;
        this.#captures = capture;
      } else {
        shared.captureNext[capture] = kept;
        kept = capture;
      }
      capture = next;
    }
    shared.setChunkHead(chunk, kept);
  }

  /** Keeps in #spillBitmap the spilled blocks of our clusters, and in the file those of others; true: none. */
  #detachSpilled(chunk: number): boolean {
    const bitmap = this.#spillBitmap;
    this.#hasSpilled = (this.#shared.chunkWords[chunk] & SPILLED) !== 0;
    if (!this.#hasSpilled) return false;
    const spill = this.#spillFile();
    spill.readBitmap(chunk, bitmap);
    const others = new Uint8Array(bitmap.length);
    for (let block = 0; block < this.#covered.length; block++) {
      if (!bitOf(bitmap, block) || this.#isTaken(block)) continue;
      others[block >> 3] |= 1 << (block & 7);
      bitmap[block >> 3] &= ~(1 << (block & 7));
    }
    spill.writeBitmap(chunk, others);
    return others.every((byte) => byte === 0);
  }

  #isTaken(blockInChunk: number): boolean {
    return this.#taken[Math.floor((blockInChunk * BLOCK_BYTES) / this.#shared.geometry.clusterBytes)] === 1;
  }

  /** Of our clusters, copies those of which the source's top layer allocates a part. */
  *#leaveOutBelow(chunk: number): Steps<void> {
    const { clusterBytes, clustersPerChunk } = this.#shared.geometry;
    const base = chunk * this.#shared.geometry.chunkBytes;
    const length = this.#shared.chunkLengthBytes(chunk);
    for (let i = 0; i < clustersPerChunk; i++) {
      let isBelow = false;
      if (this.#taken[i]) {
        const from = i * clusterBytes;
        const lengthBytes = Math.min(clusterBytes, length - from);
        yield* this.#io.fromSource(() => {
          isBelow = layersOf(this.#options.reader, base + from, lengthBytes) === "below";
          return undefined;
        });
      }
      this.#copied[i] = this.#taken[i] && !isBelow ? 1 : 0;
    }
  }

  *#readMissing(chunk: number): Steps<void> {
    const { clusterBytes } = this.#shared.geometry;
    const length = this.#shared.chunkLengthBytes(chunk);
    for (const [from, to] of runsOf(this.#copied)) {
      yield* this.#readRun(chunk, from * clusterBytes, Math.min(to * clusterBytes, length));
    }
  }

  /** What was read is let go at once: with a target that is slow it is the longest time until it has the data. */
  *#release(chunk: number): Steps<void> {
    const { reader } = this.#options;
    if (reader.release === undefined) return;
    const { clusterBytes, chunkBytes } = this.#shared.geometry;
    const length = this.#shared.chunkLengthBytes(chunk);
    for (const [from, to] of runsOf(this.#taken)) {
      const start = from * clusterBytes;
      const pending = reader.release(chunk * chunkBytes + start, Math.min(to * clusterBytes, length) - start);
      if (pending) yield { kind: "promise", promise: pending };
    }
  }

  /**
   * Reads the blocks of [from, to) (bytes in the chunk) that no capture covers. An extent may end inside a block
   * (at the odd end of a backing file), so `position` need not be aligned. A stretch that cannot be read, and may be
   * passed over, is read again a block at a time, so that one bad sector costs its own block alone.
   */
  *#readRun(chunk: number, from: number, to: number): Steps<void> {
    const { reader, chunkBuffer } = this.#options;
    const base = chunk * this.#shared.geometry.chunkBytes;
    let position = from;
    let singlyUntil = from;
    while (position < to) {
      const blockEnd = (Math.floor(position / BLOCK_BYTES) + 1) * BLOCK_BYTES;
      const end = this.#missingEnd(position, position < singlyUntil ? Math.min(blockEnd, to) : to);
      if (end === position) {
        position = blockEnd;
        continue;
      }
      const start = position;
      let readEnd = end;
      const error = yield* this.#io.fromSource(() => {
        readEnd = end;
        const extent = reader.extent(base + start, end - start);
        readEnd = start + extent.lengthBytes;
        if (extent.zero) return this.#noteZero(start, readEnd);
        return reader.read(chunkBuffer, start, extent.lengthBytes, base + start);
      });
      if (error !== undefined && Atomics.load(this.#shared.control, CTL_RUN) === RUN_ABORTING) return;
      // An error without a place, such as that of a server that is gone, would meet each block alike.
      if (error?.offsetBytes !== undefined && readEnd > blockEnd) {
        singlyUntil = readEnd;
        continue;
      }
      if (error !== undefined) this.#passOver(start, readEnd);
      position = readEnd;
      yield STEP;
    }
  }

  /** What cannot be read is zeroes in the backup, and an error in its count. */
  #passOver(from: number, to: number): void {
    Atomics.add(this.#shared.control, CTL_IGNORED_ERRORS, 1);
    this.#options.chunkBuffer.fill(0, from, to);
  }

  /** End of the stretch from `position` on that is worth one read; `position` itself when a capture covers it. */
  #missingEnd(position: number, to: number): number {
    let end = position;
    let gap = 0;
    for (let block = Math.floor(position / BLOCK_BYTES); block * BLOCK_BYTES < to; block++) {
      if (this.#covered[block]) {
        if (end === position || ++gap > READ_OVER_BLOCKS) break;
      } else {
        gap = 0;
        end = Math.min((block + 1) * BLOCK_BYTES, to);
      }
    }
    return end;
  }

  /** The range reads as zeroes: whole blocks are only noted, parts of blocks are cleared in the buffer. */
  #noteZero(from: number, to: number): undefined {
    const { chunkBuffer } = this.#options;
    const firstWhole = Math.ceil(from / BLOCK_BYTES);
    const lastWhole = Math.floor(to / BLOCK_BYTES);
    if (firstWhole >= lastWhole) {
      chunkBuffer.fill(0, from, to);
      return undefined;
    }
    chunkBuffer.fill(0, from, firstWhole * BLOCK_BYTES);
    chunkBuffer.fill(0, lastWhole * BLOCK_BYTES, to);
    for (let block = firstWhole; block < lastWhole; block++) {
      if (!this.#covered[block]) this.#zero[block] = 1;
    }
    this.#hasNotedZeroes = true;
    return undefined;
  }

  /** Copies the slots' data over what was read and gives the slots back. */
  #takeSlots(): void {
    const shared = this.#shared;
    const { chunkBuffer } = this.#options;
    const first = this.#captures;
    if (first < 0) return;
    let last = first;
    let blockCount = 0;
    for (let capture = first; capture >= 0; capture = shared.captureNext[capture]) {
      const info = shared.captureInfo[capture];
      const start = captureStart(info);
      const count = captureLength(info);
      shared.slots.read(capture * BLOCK_BYTES, chunkBuffer, start * BLOCK_BYTES, count * BLOCK_BYTES);
      this.#zero.fill(0, start, start + count);
      blockCount += count;
      last = capture;
    }
    this.#captures = -1;
    shared.pushFreed(first, last, blockCount);
  }

  #takeSpilled(chunk: number): void {
    if (!this.#hasSpilled) return;
    this.#hasSpilled = false;
    const spill = this.#spillFile();
    const bitmap = this.#spillBitmap;
    const blocksPerChunk = this.#covered.length;
    let blocks = 0;
    for (let block = 0; block < blocksPerChunk; block++) {
      if (!bitOf(bitmap, block)) continue;
      const start = block;
      while (block + 1 < blocksPerChunk && bitOf(bitmap, block + 1)) block++;
      const count = block + 1 - start;
      spill.readBlocks(this.#options.chunkBuffer, start * BLOCK_BYTES, chunk, start, count);
      spill.punch(chunk, start, count);
      this.#zero.fill(0, start, start + count);
      blocks += count;
    }
    Atomics.sub(this.#shared.control, CTL_SPILL_BLOCKS, blocks);
  }

  /** With --verify: our clusters are complete in the buffer now, but for blocks that are only noted as zero. */
  #recordDigests(chunk: number): void {
    const { digests, geometry } = this.#shared;
    if (digests === null) return;
    const { clusterBytes, clustersPerChunk } = geometry;
    const length = this.#shared.chunkLengthBytes(chunk);
    for (let i = 0; i < clustersPerChunk; i++) {
      if (!this.#copied[i]) continue;
      const from = i * clusterBytes;
      const to = Math.min(from + clusterBytes, length);
      if (this.#unitIsZero(from, to)) continue;
      digests.record(chunk * clustersPerChunk + i, this.#options.chunkBuffer, from, to);
    }
  }

  *#writeTaken(chunk: number): Steps<void> {
    const { clusterBytes } = this.#shared.geometry;
    const length = this.#shared.chunkLengthBytes(chunk);
    for (const [from, to] of runsOf(this.#copied)) {
      yield* this.#writeRun(chunk, from * clusterBytes, Math.min(to * clusterBytes, length));
    }
  }

  /** Only what nothing was put off of, and what was written before the job was aborted, if it was. */
  *#noteWritten(chunk: number): Steps<void> {
    yield* this.settle();
    const { control, written, geometry } = this.#shared;
    if (Atomics.load(control, CTL_RUN) === RUN_ABORTING) return;
    for (let i = 0; i < this.#taken.length; i++) {
      if (this.#taken[i])
        written?.fill(1, chunk * geometry.clustersPerChunk + i, chunk * geometry.clustersPerChunk + i + 1);
    }
  }

  /** Writes [from, to) (bytes in the chunk), its zero units as zeroes. */
  *#writeRun(chunk: number, from: number, to: number): Steps<void> {
    const { writer, chunkBuffer, zeroUnitBytes } = this.#options;
    const base = chunk * this.#shared.geometry.chunkBytes;
    let position = from;
    while (position < to) {
      const start = position;
      if (this.#neededBytes !== undefined) {
        this.#clearNotedZeroes(start, to);
        position = to;
        yield* this.#write(chunk, start, to, this.#neededBytes);
        continue;
      }
      const dataEnd = this.#hasNotedZeroes ? start : endOfData(chunkBuffer, start, to, zeroUnitBytes);
      const zero = dataEnd === start && this.#unitIsZero(start, Math.min(start + zeroUnitBytes, to));
      position = Math.max(dataEnd, Math.min(start + zeroUnitBytes, to));
      while (position < to && this.#unitIsZero(position, Math.min(position + zeroUnitBytes, to)) === zero) {
        position = Math.min(position + zeroUnitBytes, to);
      }
      const length = position - start;
      if (zero) {
        yield* this.#io.toTarget(() => writer.writeZeroes(base + start, length));
      } else {
        yield* this.#write(chunk, start, position, length);
      }
      yield STEP;
    }
  }

  *#write(chunk: number, from: number, to: number, dataBytes: number): Steps<void> {
    const { writer, chunkBuffer } = this.#options;
    const base = chunk * this.#shared.geometry.chunkBytes;
    yield* this.#io.waitForRate(dataBytes);
    yield* this.settle();
    yield* this.#io.toTarget(() => writer.write(chunkBuffer, from, to - from, base + from));
    Atomics.add(this.#shared.counters, CNT_WRITTEN_BYTES, BigInt(dataBytes));
  }

  /** What the writer has put off goes to the target: before the worker waits, and at its end. */
  *settle(): Steps<void> {
    const { writer } = this.#options;
    if (writer.settle === undefined) return;
    const error = yield* this.#io.toTarget(() => writer.settle?.());
    if (error !== undefined) writer.giveUp?.();
  }

  /** Whether [from, to) is zero; if it is not, its blocks that were only noted as zero are cleared for writing. */
  #unitIsZero(from: number, to: number): boolean {
    const { chunkBuffer } = this.#options;
    let allZero = true;
    for (let position = from; position < to && allZero; position += BLOCK_BYTES) {
      if (!this.#zero[position / BLOCK_BYTES]) {
        allZero = isZero(chunkBuffer, position, Math.min(position + BLOCK_BYTES, to));
      }
    }
    if (allZero) return true;
    this.#clearNotedZeroes(from, to);
    return false;
  }

  #clearNotedZeroes(from: number, to: number): void {
    const { chunkBuffer } = this.#options;
    for (let position = from; position < to; position += BLOCK_BYTES) {
      if (this.#zero[position / BLOCK_BYTES]) {
        chunkBuffer.fill(0, position, Math.min(position + BLOCK_BYTES, to));
        this.#zero[position / BLOCK_BYTES] = 0;
      }
    }
  }

  #spillFile(): SpillFile {
    if (this.#options.spill === null)
      throw new Error("a chunk is marked as spilled in a job without a spill file");
    return this.#options.spill;
  }
}

/** Which layers provide [start, +lengthBytes): the source's own, those below it, or both. */
export function layersOf(reader: SourceReader, start: number, lengthBytes: number): "own" | "below" | "both" {
  const part = reader.allocation?.(start, lengthBytes);
  if (part === undefined) return "own";
  if (part.lengthBytes < lengthBytes) return "both";
  return part.allocated ? "own" : "below";
}

function bitOf(bitmap: Uint8Array, index: number): number {
  return (bitmap[index >> 3] >> (index & 7)) & 1;
}

/** Runs of set flags as [from, to) pairs. */
export function* runsOf(flags: Uint8Array): Generator<[number, number], void, void> {
  for (let i = 0; i < flags.length; i++) {
    if (!flags[i]) continue;
    const from = i;
    while (i + 1 < flags.length && flags[i + 1]) i++;
    yield [from, i + 1];
  }
}
