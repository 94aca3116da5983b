// The memory that the main thread and the workers of one job share, and the only place where they meet.
//
// Ownership is by chunk. A chunk's word names its owner: nobody, the main thread (while it captures) or a worker
// (while it changes states and lists, without I/O but for a spill bitmap). Only the owner changes the states of the
// chunk's clusters, its list of captures and its spill mark.
//
//   chunk word   bit 0..1  owner: 0 nobody, 1 main, 2 a worker
//                bit 2     WAITING: somebody waits on this word for the owner to let go
//                bit 3     QUEUED: the chunk stands in the urgent ring, and nobody has taken its captures since
//                bit 4     SPILLED: some of its captured blocks are in the spill file
//
//   cluster state   PENDING ──worker──► READING ──worker──► DONE
//                      └──main──► CAPTURED ──worker──┘
//   READING keeps other workers off; the main thread goes on capturing (chunk-copy.ts says why that is sound). DONE is
//   final and may be read without a claim: that is the guest path's quickest way through.
//
// Captures. A capture is a run of at most 16 blocks of one cluster in one slot, so it is named by its first block in the buffer.
// A chunk's captures form a list (chunkHead → captureNext → … → -1). The owner pushes or takes the whole list.
// chunkHeads holds the first block plus one: 0 is an empty list, so fresh memory needs no filling.
// What a worker has taken goes back to the main thread, which alone allocates, as one chain on the freed stack:
// workers push with compare-exchange, the main thread takes all with one exchange, so there is no ABA.
//
// Urgent ring. One producer (main), many consumers. Main pushes a chunk when it sets QUEUED; the worker that takes the
// chunk's captures clears it. That worker may have the chunk from the sweep: then the entry stays in the ring, a stale
// one, and the next capture pushes a second. A worker goes to the sweep only when it has found the ring empty, so
// between two such moments each leaves one stale entry at most: chunkCount + DRAINERS_MAX entries never overflow. A
// stale entry costs its taker a look at the chunk.
//
// Head and tail count up, modulo the greatest multiple of the ring's length that 31 bits hold: after as long a time a
// consumer that slept between its load and its compare-exchange cannot mistake a new entry for the one that it saw.
//
//        head (consumers, CAS)          tail (main)
//          ▼                              ▼
//   [ … | c7 | c2 | c9 | c4 |             |  … ]
//
// Regions. A worker that comes to a new region of the sweep asks once whether all of it is a hole. While it asks
// (QUERYING) guest writes to the region wait; a region that main touched first is CHUNKED and swept by chunks.
// Nothing below a HOLE region is ever looked at: a 16 TiB empty disk costs 65,536 questions.
//
// Memory for 1 TiB of disk: states 16 MiB, chunk words, heads and ring 4 MiB each: 28 MiB; with --verify another
// 128 MiB for digests (digests.ts).

import { allocateDigests, ClusterDigests } from "./digests.js";
import { type BufferMemory, memoryAlone, SlotMemory } from "./slot-memory.js";
import { BLOCKS_PER_SLOT, BLOCK_BYTES, type Geometry } from "./geometry.js";

export const PENDING = 0;
export const READING = 1;
export const CAPTURED = 2;
export const DONE = 3;

export const OWNER_MASK = 3;
export const OWNER_MAIN = 1;
export const OWNER_WORKER = 2;
export const WAITING = 4;
export const QUEUED = 8;
export const SPILLED = 16;

export const REGION_UNKNOWN = 0;
export const REGION_QUERYING = 1;
export const REGION_HOLE = 2;
export const REGION_CHUNKED = 3;

/** Control words. Writers in brackets. */
export const CTL_RUN = 0; // [main; a worker may set RUN_PAUSED on `stop`] RUN_*; workers sleep on it
export const CTL_SWEEP = 1; // [workers] next chunk of the sweep
export const CTL_URGENT_HEAD = 2; // [workers]
export const CTL_URGENT_TAIL = 3; // [main]
export const CTL_FREED_HEAD = 4; // [workers push, main takes] first capture of the freed chain, or -1
export const CTL_FREED_EVENT = 5; // [workers] counts pushes to the freed stack; main waits on it
export const CTL_USED_BLOCKS = 6; // [main adds, workers subtract]
export const CTL_SPILL_BLOCKS = 7; // [main adds, workers subtract] blocks that stand in the spill file now
export const CTL_IGNORED_ERRORS = 8; // [workers]
export const CTL_READING = 9; // [workers] chunks that are about to be taken or being read; of jobs that read ahead
export const CTL_AHEAD_CHUNKS = 10; // [workers] chunks that are read and kept for the target (read-ahead.ts)
export const CTL_TAKERS = 11; // [worker threads] that have begun to take chunks, those that are done included
const CTL_WORDS = 16;

export const RUN_PREPARING = 0;
export const RUN_RUNNING = 1;
export const RUN_PAUSED = 2;
export const RUN_ABORTING = 3;

/** 64-bit counters, in bytes unless the name says otherwise. */
export const CNT_DONE_BYTES = 0; // [workers]
export const CNT_WRITTEN_BYTES = 1; // [workers]
export const CNT_RATE_LIMIT = 2; // [main] bytes a second, 0: none
export const CNT_RATE_NEXT_NS = 3; // [workers] monotonic time at which the target may be written again; throttle.ts
export const CNT_RATE_CHANGES = 4; // [main] how often the limit was changed
const CNT_WORDS = 8;

/** Chunks that workers have in hand at a time, at most: 64 workers of one each, or fewer of more (workers/copy.ts). */
export const DRAINERS_MAX = 64;
const INT32_MAX = 2 ** 31 - 1;

export interface SharedBuffers {
  geometry: Geometry;
  control: SharedArrayBuffer;
  counters: SharedArrayBuffer;
  clusterStates: SharedArrayBuffer;
  chunkWords: SharedArrayBuffer;
  chunkHeads: SharedArrayBuffer;
  urgentRing: SharedArrayBuffer;
  regionStates: SharedArrayBuffer;
  captureNext: SharedArrayBuffer;
  captureInfo: SharedArrayBuffer;
  /** The copy-before-write buffer itself. */
  buffer: BufferMemory;
  bufferBytes: number;
  /** Only where the target is read back afterwards; see digests.ts. */
  digests?: SharedArrayBuffer | undefined;
  /** Only where a part of the backup is of use, too: a byte for each cluster. */
  written?: SharedArrayBuffer | undefined;
  /** There is no sweep: only what is captured goes to the target, until the job is told to end. */
  capturedOnly?: boolean | undefined;
}

/** Typed views of a job's shared memory, with the operations that both sides use. Any thread. */
export class SharedState {
  readonly geometry: Geometry;
  readonly control: Int32Array;
  readonly counters: BigInt64Array;
  readonly clusterStates: Uint8Array;
  readonly chunkWords: Int32Array;
  readonly chunkHeads: Int32Array;
  readonly urgentRing: Int32Array;
  readonly regionStates: Int32Array;
  /** Next capture of the same chunk (or of the freed chain), by first block; -1 ends. */
  readonly captureNext: Int32Array;
  /** First block within the chunk, times 32, plus the number of blocks (1 to 16). */
  readonly captureInfo: Int32Array;
  readonly slots: SlotMemory;
  readonly bufferBlockCount: number;
  /** [the worker that took the cluster] null without --verify. */
  readonly digests: ClusterDigests | null;
  /** [the worker that took the cluster] 1: the target has it, or does not need it. Null where nobody asks. */
  readonly written: Uint8Array | null;
  readonly #urgentPeriod: number;

  constructor(readonly buffers: SharedBuffers) {
    this.geometry = buffers.geometry;
    this.control = new Int32Array(buffers.control);
    this.counters = new BigInt64Array(buffers.counters);
    this.clusterStates = new Uint8Array(buffers.clusterStates);
    this.chunkWords = new Int32Array(buffers.chunkWords);
    this.chunkHeads = new Int32Array(buffers.chunkHeads);
    this.urgentRing = new Int32Array(buffers.urgentRing);
    this.#urgentPeriod = Math.floor(INT32_MAX / this.urgentRing.length) * this.urgentRing.length;
    this.regionStates = new Int32Array(buffers.regionStates);
    this.captureNext = new Int32Array(buffers.captureNext);
    this.captureInfo = new Int32Array(buffers.captureInfo);
    this.slots = new SlotMemory(buffers.buffer, buffers.bufferBytes);
    this.bufferBlockCount = buffers.bufferBytes / BLOCK_BYTES;
    this.digests = buffers.digests === undefined ? null : new ClusterDigests(buffers.digests);
    this.written = buffers.written === undefined ? null : new Uint8Array(buffers.written);
  }

  /** Takes the chunk if nobody has it. */
  tryClaim(chunk: number, owner: number): boolean {
    for (;;) {
      const word = Atomics.load(this.chunkWords, chunk);
      if ((word & OWNER_MASK) !== 0) return false;
      if (Atomics.compareExchange(this.chunkWords, chunk, word, word | owner) === word) return true;
    }
  }

  /** Lets the chunk go, clearing `clearBits` and setting `setBits` with the same step. */
  release(chunk: number, clearBits: number, setBits: number): void {
    const clear = OWNER_MASK | WAITING | clearBits;
    for (;;) {
      const word = Atomics.load(this.chunkWords, chunk);
      if (Atomics.compareExchange(this.chunkWords, chunk, word, (word & ~clear) | setBits) !== word) continue;
      if ((word & WAITING) !== 0) Atomics.notify(this.chunkWords, chunk);
      return;
    }
  }

  /** Marks that somebody will wait for the chunk; the value to wait on. */
  announceWait(chunk: number): number {
    return Atomics.or(this.chunkWords, chunk, WAITING) | WAITING;
  }

  /** Owner only. The states of a chunk change by compare-exchange, so that a broken claim shows as an error. */
  changeState(cluster: number, from: number, to: number): void {
    const found = Atomics.compareExchange(this.clusterStates, cluster, from, to);
    if (found !== from) throw new StateError(cluster, from, found, to);
  }

  /** Main thread only: the caller holds the chunk and has found QUEUED clear. */
  pushUrgent(chunk: number): void {
    const tail = this.control[CTL_URGENT_TAIL];
    Atomics.store(this.urgentRing, tail % this.urgentRing.length, chunk);
    Atomics.store(this.control, CTL_URGENT_TAIL, this.#afterUrgent(tail));
    // Without a sweep workers sleep on it.
    if (this.buffers.capturedOnly === true) Atomics.notify(this.control, CTL_URGENT_TAIL);
  }

  /** Main thread, of a job without a sweep: what is captured is the last, and the workers end when they have it. */
  endCaptures(): void {
    Atomics.store(this.control, CTL_SWEEP, this.geometry.chunkCount);
    Atomics.notify(this.control, CTL_URGENT_TAIL);
  }

  /** Workers: the chunk that has waited longest, or -1. */
  popUrgent(): number {
    for (;;) {
      const head = Atomics.load(this.control, CTL_URGENT_HEAD);
      if (head === Atomics.load(this.control, CTL_URGENT_TAIL)) return -1;
      const chunk = Atomics.load(this.urgentRing, head % this.urgentRing.length);
      const next = this.#afterUrgent(head);
      if (Atomics.compareExchange(this.control, CTL_URGENT_HEAD, head, next) === head) return chunk;
    }
  }

  #afterUrgent(place: number): number {
    return place + 1 === this.#urgentPeriod ? 0 : place + 1;
  }

  /** Owner only: first capture of the chunk, or -1. */
  chunkHead(chunk: number): number {
    return this.chunkHeads[chunk] - 1;
  }

  /** Owner only. */
  setChunkHead(chunk: number, capture: number): void {
    this.chunkHeads[chunk] = capture + 1;
  }

  /** Workers: gives a chain of captures of `blockCount` blocks, from `first` to `last`, back to the main thread. */
  pushFreed(first: number, last: number, blockCount: number): void {
    for (;;) {
      const head = Atomics.load(this.control, CTL_FREED_HEAD);
      Atomics.store(this.captureNext, last, head);
      if (Atomics.compareExchange(this.control, CTL_FREED_HEAD, head, first) === head) break;
    }
    Atomics.sub(this.control, CTL_USED_BLOCKS, blockCount);
    Atomics.add(this.control, CTL_FREED_EVENT, 1);
    Atomics.notify(this.control, CTL_FREED_EVENT);
  }

  /** Main thread: the whole freed chain, or -1. */
  takeFreed(): number {
    if (Atomics.load(this.control, CTL_FREED_HEAD) === -1) return -1;
    return Atomics.exchange(this.control, CTL_FREED_HEAD, -1);
  }

  chunkLengthBytes(chunk: number): number {
    const { chunkBytes, sizeBytes } = this.geometry;
    return Math.min(chunkBytes, sizeBytes - chunk * chunkBytes);
  }
}

export function captureInfoOf(blockInChunk: number, blockCount: number): number {
  return blockInChunk * 32 + blockCount;
}

export function captureStart(info: number): number {
  return info >> 5;
}

export function captureLength(info: number): number {
  return info & 31;
}

/** A cluster was not in the state that its owner left it in: a bug, never a user's error. */
export class StateError extends Error {
  constructor(cluster: number, expected: number, found: number, wanted: number) {
    super(`cluster ${cluster} was in state ${found}, not ${expected}, on its way to ${wanted}`);
    this.name = "StateError";
  }
}

export type AllocateTable = (bytes: number) => SharedArrayBuffer;

export interface SharedStateOptions {
  notesWritten?: boolean | undefined;
  capturedOnly?: boolean | undefined;
}

const allocateAfresh: AllocateTable = (bytes) => new SharedArrayBuffer(bytes);

/**
 * Main thread. Memory alone has all slots: it is at least bufferBytes long then; bufferBytes is a multiple of the slot
 * size, or 0. `allocate` gives
 * the tables, all zero. The control words and counters are the job's own for good: its progress is asked for when its
 * tables have become another's.
 * @throws CowcatcherError LIMIT when there is no memory for the digests that `withDigests` asks for.
 */
export function createSharedState(
  geometry: Geometry,
  buffer: BufferMemory | SharedArrayBuffer,
  bufferBytes: number,
  withDigests = false,
  allocate = allocateAfresh,
  { notesWritten = false, capturedOnly = false }: SharedStateOptions = {},
): SharedState {
  const words = (count: number) => allocate(4 * Math.max(1, count));
  const blockCount = bufferBytes / BLOCK_BYTES;
  const shared = new SharedState({
    geometry,
    control: new SharedArrayBuffer(4 * CTL_WORDS),
    counters: new SharedArrayBuffer(8 * CNT_WORDS),
    clusterStates: allocate(Math.max(1, geometry.clusterCount)),
    chunkWords: words(geometry.chunkCount),
    chunkHeads: words(geometry.chunkCount),
    urgentRing: words(geometry.chunkCount + Math.min(geometry.chunkCount, DRAINERS_MAX)),
    regionStates: words(geometry.regionCount),
    captureNext: words(blockCount),
    captureInfo: words(blockCount),
    buffer: plainBuffer(buffer),
    bufferBytes,
    digests: withDigests ? allocateDigests(geometry, allocate) : undefined,
    written: notesWritten ? allocate(Math.max(1, geometry.clusterCount)) : undefined,
    capturedOnly,
  });
  shared.control[CTL_FREED_HEAD] = -1;
  return shared;
}

/** What another thread can be sent. */
function plainBuffer(buffer: BufferMemory | SharedArrayBuffer): BufferMemory {
  if (buffer instanceof SharedArrayBuffer) return memoryAlone(new Uint8Array(buffer));
  const { memory, pages, fileFd } = buffer;
  return { memory, pages, fileFd };
}

/** Bytes to slots: a buffer holds whole slots. */
export function slotCountOf(bufferBytes: number): number {
  return Math.floor(bufferBytes / (BLOCK_BYTES * BLOCKS_PER_SLOT));
}
