// The main thread's side of copy-before-write: before a guest write changes a byte, the T0 content of its 4 KiB
// block is in a slot, in the spill, or in a worker's hands.
//
// The quick way through costs a few loads: the main thread has noted that the blocks are captured, the clusters are
// DONE, or their region is a hole. Else the write's blocks are captured, chunk by chunk: claim the chunk, find the
// blocks that no earlier capture holds, copy them from the image into slots, put the captures on the chunk's list, mark
// the clusters CAPTURED, queue the chunk, let it go. All of that is synchronous when the data is cached, and a claim is
// then held for microseconds.
//
// What cannot be done at once goes the slow way, as a promise: a chunk that a worker has claimed (for microseconds),
// cold data (the claim is held until the asynchronous read ends), a full buffer (the policy decides).
// Room in the buffer is taken before the claim is kept, never waited for while holding one: the worker that makes
// room may need that very chunk.
//
// Writes that wait for room stand in line, and as long as somebody does, no new capture takes room out of turn: else
// small writes would take each block as it comes free, and a large one would wait for ever.
//
// Nothing is decided once for all by the slow way: after each wait the write starts again from its first byte,
// and what has been captured meanwhile is found captured.
//
// `detach` ends the interception at once, whatever is waiting: the guest goes on, the job has failed or is done.

import type { InterceptPolicy } from "./policies.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import type { Completion } from "../block/device.js";
import { CaptureStore, type CaptureStoreOptions, CaptureWork } from "./capture-store.js";
import { BLOCK_BYTES } from "./geometry.js";
import { GuestLimit } from "./guest-limit.js";
import { GuestStreams } from "./guest-streams.js";
import { Pacer } from "./pacer.js";
import {
  CAPTURED,
  CTL_FREED_EVENT,
  DONE,
  OWNER_MAIN,
  OWNER_MASK,
  PENDING,
  QUEUED,
  REGION_CHUNKED,
  REGION_HOLE,
  REGION_QUERYING,
  REGION_UNKNOWN,
  type SharedState,
  SPILLED,
} from "./shared.js";
import { countWait, noWaits } from "./wait-histogram.js";
import { WaitingLine } from "./waiting-line.js";

export interface InterceptorOptions extends CaptureStoreOptions {
  policy: InterceptPolicy;
  /** The job cannot keep its promise any more; called once, after the interceptor has detached itself. */
  onBroken(error: CowcatcherError): void;
  /** A waiter looks again after this time even if nobody woke it, so that a dead thread cannot hold a guest. */
  recheckMs?: number | undefined;
  /** Replaced in simulations. */
  clock?: Clock | undefined;
}

export interface Clock {
  /** Monotonic, in milliseconds. */
  nowMs(): number;
  sleep(ms: number): Promise<void>;
}

export interface GuestWaitCounters {
  captureCount: number;
  capturedBytes: number;
  spilledBytes: number;
  guestWaitCount: number;
  guestWaitMsMax: number;
  guestWaitMsTotal: number;
  /** By ranges (wait-histogram.ts). */
  guestWaitCounts: number[];
}

/** How far a capture came without waiting. */
type Outcome = "done" | "chunk-busy" | "region-busy" | "buffer-full" | "in-target" | Promise<void>;

/** Default of `recheckMs`. */
const RECHECK_MS = 100;
/** Captured at a stretch, about 10 ms with a cold buffer; a longer request goes on in the next turn of the event loop. */
const CHUNKS_PER_TURN = 4;

/**
 * Saves the T0 content of blocks before a guest write changes them. Main thread only; ranges in bytes of
 * the disk.
 */
export class Interceptor {
  readonly counters: GuestWaitCounters = {
    captureCount: 0,
    capturedBytes: 0,
    spilledBytes: 0,
    guestWaitCount: 0,
    guestWaitMsMax: 0,
    guestWaitMsTotal: 0,
    guestWaitCounts: noWaits(),
  };
  readonly #options: InterceptorOptions;
  readonly #shared: SharedState;
  readonly #store: CaptureStore;
  readonly #pacer: Pacer | null;
  readonly #unbuffered: boolean;
  readonly #clock: Clock;
  readonly #objectName: string;
  /** Of the synchronous way; a capture that goes on asynchronously keeps it and a new one is made. */
  #work = new CaptureWork();
  #detached = false;
  #isEnding = false;
  /** Captures whose reads go on. */
  readonly #reads = new Set<Promise<unknown>>();
  /** What ends the wait of each waiting write, for `detach`. */
  readonly #waiters = new Set<() => void>();
  /** Blocks that the write which found the buffer full last would need. */
  #roomNeeded = 0;
  readonly #line = new WaitingLine();
  readonly #streams = new GuestStreams();
  readonly #limit: GuestLimit;
  /** Captures that go on and write to the spill. */
  readonly #spilling = new WeakSet<Promise<void>>();

  constructor(options: InterceptorOptions) {
    this.#options = options;
    this.#shared = options.shared;
    this.#objectName = options.image.name;
    this.#clock = options.clock ?? REAL_CLOCK;
    this.#limit = new GuestLimit(options.policy.guestTimeoutMs, options.recheckMs ?? RECHECK_MS, this.#clock);
    this.#unbuffered = options.shared.bufferBlockCount === 0;
    this.#store = new CaptureStore(options);
    this.#pacer =
      options.policy.onBufferFull === "wait" && !this.#unbuffered ? new Pacer(options.shared) : null;
  }

  get detached(): boolean {
    return this.#detached;
  }

  /**
   * To be called before the guest's write (or trim, or write of zeroes) of [offsetBytes, +lengthBytes) reaches the
   * image. Complete: the write may go on. Rejects only under `break-guest-write`; the write must fail then.
   */
  beforeWrite(offsetBytes: number, lengthBytes: number): Completion {
    if (this.#detached || lengthBytes === 0) return undefined;
    const { chunkBytes } = this.#shared.geometry;
    const last = Math.floor((offsetBytes + lengthBytes - 1) / chunkBytes);
    const first = Math.floor(offsetBytes / chunkBytes);
    if (first === last && this.#store.isHeld(first, offsetBytes, offsetBytes + lengthBytes)) return undefined;
    const takenEnd = this.#unbuffered ? this.#streams.note(offsetBytes, lengthBytes) : 0;
    const enough = this.counters.captureCount + CHUNKS_PER_TURN;
    for (let chunk = first; chunk <= last; chunk++) {
      if (this.counters.captureCount >= enough) return this.#captureSlowly(offsetBytes, lengthBytes);
      const outcome = this.#captureInChunk(chunk, offsetBytes, lengthBytes, false, takenEnd);
      if (outcome === "done") continue;
      return this.#captureSlowly(offsetBytes, lengthBytes, outcome instanceof Promise ? outcome : undefined);
    }
    return undefined;
  }

  /**
   * Of a job without a sweep, which ends: what is captured now is still kept whole for the workers, and what is not is let
   * go.
   */
  endCaptures(): void {
    this.#isEnding = true;
  }

  /** Ends the interception at once: writes that wait go on. Idempotent. */
  detach(): void {
    this.#detached = true;
    this.#store.close();
    for (const wake of this.#waiters) wake();
  }

  /** `begun`: a capture of the same write that goes on already. */
  async #captureSlowly(offsetBytes: number, lengthBytes: number, begun?: Promise<void>): Promise<void> {
    const startMs = this.#clock.nowMs();
    const { chunkBytes } = this.#shared.geometry;
    const last = Math.floor((offsetBytes + lengthBytes - 1) / chunkBytes);
    const first = Math.floor(offsetBytes / chunkBytes);
    let waited = begun !== undefined;
    try {
      if (begun !== undefined) await this.#whenCaptured(begun, startMs, offsetBytes);
      for (let chunk = first; chunk <= last && !this.#detached; chunk++) {
        waited = (await this.#captureChunkSlowly(chunk, offsetBytes, lengthBytes, startMs)) || waited;
        if ((chunk - first) % CHUNKS_PER_TURN === CHUNKS_PER_TURN - 1) await nextTurn();
      }
    } catch (error) {
      // A write that fails after its wait has waited, too.
      waited = true;
      // Detached meanwhile: the snapshot is gone, and the write needs no capture any more.
      if (!this.#detached) throw error;
    } finally {
      if (waited) this.#countWait(this.#clock.nowMs() - startMs);
    }
  }

  /** The image's reads are the guest's own; but nobody can tell how long the spill's storage takes. */
  async #whenCaptured(capture: Promise<void>, startMs: number, offset: number): Promise<void> {
    if (!this.#spilling.has(capture)) return capture;
    if (await this.#limit.isExceededBy(capture, startMs)) this.#fail(this.#timeoutError(offset));
  }

  /** Captures one chunk's part; true if the write had to wait for it. */
  async #captureChunkSlowly(
    chunk: number,
    offset: number,
    length: number,
    startMs: number,
  ): Promise<boolean> {
    let waited = false;
    let leaveLine: (() => void) | null = null;
    try {
      while (!this.#detached) {
        const outcome = this.#captureInChunk(chunk, offset, length, leaveLine !== null);
        if (outcome === "done") return waited;
        waited = true;
        if (outcome !== "buffer-full") {
          leaveLine?.();
          leaveLine = null;
        }
        if (outcome instanceof Promise) {
          await this.#whenCaptured(outcome, startMs, offset);
          continue;
        }
        if (this.#isTimedOut(startMs)) {
          this.#fail(this.#timeoutError(offset));
          return waited;
        }
        if (outcome === "buffer-full") {
          const neededCount = this.#roomNeeded;
          leaveLine ??= await this.#line.stand();
          await this.#waitForRoom(neededCount, startMs);
        } else {
          await this.#waitForChunk(outcome, chunk, offset, length);
        }
      }
    } finally {
      leaveLine?.();
    }
    return waited;
  }

  async #waitForChunk(
    outcome: "chunk-busy" | "in-target" | "region-busy",
    chunk: number,
    offset: number,
    length: number,
  ): Promise<void> {
    const { chunkWords, regionStates, geometry } = this.#shared;
    if (outcome === "region-busy") {
      const region = Math.floor(chunk / geometry.chunksPerRegion);
      await this.#waitOn(regionStates, region, REGION_QUERYING);
      return;
    }
    // Announced first, looked at afterwards: whoever lets the chunk go in between finds the announcement.
    const value = this.#shared.announceWait(chunk);
    const isOver =
      outcome === "chunk-busy"
        ? (value & OWNER_MASK) === 0
        : this.#allDone(
            Math.max(offset, chunk * geometry.chunkBytes),
            Math.min(offset + length, (chunk + 1) * geometry.chunkBytes),
          );
    if (!isOver) await this.#waitOn(chunkWords, chunk, value);
  }

  async #waitOn(words: Int32Array, index: number, value: number): Promise<void> {
    const result = Atomics.waitAsync(words, index, value, this.#options.recheckMs ?? RECHECK_MS);
    if (result.async) await this.#untilDetached(result.value);
  }

  /** Fulfilled when `promise` is or when the interceptor detaches. (A race with one long-lived promise would
   *  keep a reaction for each wait until the job ends.) */
  #untilDetached(promise: Promise<unknown>): Promise<void> {
    if (this.#detached) return Promise.resolve();
    return new Promise((resolve) => {
      const wake = () => {
        this.#waiters.delete(wake);
        resolve();
      };
      this.#waiters.add(wake);
      void promise.then(wake);
    });
  }

  /** First in line: waits until workers have given `neededCount` blocks back and the pacer lets the write through. */
  async #waitForRoom(neededCount: number, startMs: number): Promise<void> {
    while (!this.#detached && !this.#isTimedOut(startMs)) {
      const event = Atomics.load(this.#shared.control, CTL_FREED_EVENT);
      this.#store.reclaim(neededCount);
      const delayMs = this.#pacer?.delayMs(this.#clock.nowMs()) ?? 0;
      const roomy = this.#store.freeBlockCount >= neededCount;
      if (roomy && delayMs <= 0) return;
      if (roomy) await this.#untilDetached(this.#clock.sleep(delayMs));
      else await this.#waitOn(this.#shared.control, CTL_FREED_EVENT, event);
    }
  }

  #isTimedOut(startMs: number): boolean {
    return this.#clock.nowMs() - startMs > this.#options.policy.guestTimeoutMs;
  }

  #timeoutError(offsetBytes: number): CowcatcherError {
    return new CowcatcherError({
      code: "GUEST_TIMEOUT",
      object: this.#objectName,
      problem: `a guest write waited longer than ${this.#options.policy.guestTimeoutMs} ms for the backup`,
      hint: "use a larger --cow-buffer-size or --on-buffer-full spill, or raise --guest-timeout",
      offsetBytes,
    });
  }

  /** The capture cannot be made. Under break-snapshot the job ends and the guest goes on; else the write fails. */
  #fail(error: CowcatcherError): void {
    if (this.#options.policy.onCbwError === "break-guest-write") throw error;
    this.#breakSnapshot(error);
  }

  #breakSnapshot(error: CowcatcherError): void {
    if (this.#detached) return;
    this.detach();
    this.#options.onBroken(error);
  }

  #countWait(ms: number): void {
    this.counters.guestWaitCount++;
    this.counters.guestWaitMsTotal += ms;
    this.counters.guestWaitMsMax = Math.max(this.counters.guestWaitMsMax, ms);
    countWait(this.counters.guestWaitCounts, ms);
  }

  /**
   * Captures what of the write lies in one chunk. Never waits, and holds no claim afterwards unless a promise.
   * @param takenEnd without a buffer: what lies between the write's end and this is asked for as well
   */
  #captureInChunk(
    chunk: number,
    offsetBytes: number,
    lengthBytes: number,
    isFirstInLine: boolean,
    takenEnd = 0,
  ): Outcome {
    const shared = this.#shared;
    const { chunkBytes, sizeBytes } = shared.geometry;
    const base = chunk * chunkBytes;
    const from = Math.max(offsetBytes, base);
    const to = Math.min(offsetBytes + lengthBytes, base + chunkBytes, sizeBytes);
    if (this.#allDone(from, to)) return "done";
    const region = Math.floor(chunk / this.#shared.geometry.chunksPerRegion);
    const state = this.#touchRegion(region);
    if (state === REGION_HOLE) return "done";
    if (state === REGION_QUERYING) return "region-busy";
    // Asked for already: only to wait. Claiming would wake the others that wait for the chunk, and they us.
    if (this.#unbuffered && !this.#anyPending(from, to)) return "in-target";
    if (!shared.tryClaim(chunk, OWNER_MAIN)) return "chunk-busy";
    if (this.#isEnding) this.#letPendingGo(from, to);
    // Again, under the claim: a worker may just have finished these clusters.
    if (this.#allDone(from, to)) {
      shared.release(chunk, 0, 0);
      return "done";
    }
    if (!this.#unbuffered) return this.#captureBlocks(chunk, from, to, isFirstInLine);
    // Without a buffer the clusters are only asked for; the guest waits until they are in the target.
    this.#markCaptured(from, Math.max(to, Math.min(takenEnd, base + chunkBytes, sizeBytes)));
    this.#releaseUrgent(chunk, 0);
    return "in-target";
  }

  /** The claim is ours. Nobody needs them any more, so nobody takes them for captured when a later write meets them. */
  #letPendingGo(from: number, to: number): void {
    const { clusterStates, geometry } = this.#shared;
    const last = Math.floor((to - 1) / geometry.clusterBytes);
    for (let cluster = Math.floor(from / geometry.clusterBytes); cluster <= last; cluster++) {
      if (Atomics.load(clusterStates, cluster) === PENDING) this.#shared.changeState(cluster, PENDING, DONE);
    }
  }

  #allDone(from: number, to: number): boolean {
    const { clusterStates, geometry } = this.#shared;
    const last = Math.floor((to - 1) / geometry.clusterBytes);
    for (let cluster = Math.floor(from / geometry.clusterBytes); cluster <= last; cluster++) {
      if (Atomics.load(clusterStates, cluster) !== DONE) return false;
    }
    return true;
  }

  #anyPending(from: number, to: number): boolean {
    const { clusterStates, geometry } = this.#shared;
    const last = Math.floor((to - 1) / geometry.clusterBytes);
    for (let cluster = Math.floor(from / geometry.clusterBytes); cluster <= last; cluster++) {
      if (Atomics.load(clusterStates, cluster) === PENDING) return true;
    }
    return false;
  }

  /** Makes sure that the region is swept by chunks, unless a worker has found or is finding it a hole. */
  #touchRegion(region: number): number {
    const { regionStates } = this.#shared;
    const state = Atomics.load(regionStates, region);
    if (state !== REGION_UNKNOWN) return state;
    const found = Atomics.compareExchange(regionStates, region, REGION_UNKNOWN, REGION_CHUNKED);
    return found === REGION_UNKNOWN ? REGION_CHUNKED : found;
  }

  #markCaptured(from: number, to: number): void {
    const shared = this.#shared;
    const { clusterBytes } = shared.geometry;
    const last = Math.floor((to - 1) / clusterBytes);
    for (let cluster = Math.floor(from / clusterBytes); cluster <= last; cluster++) {
      const state = Atomics.load(shared.clusterStates, cluster);
      // READING stays: the worker that reads the cluster takes this capture, too, before it is DONE.
      if (state === PENDING) shared.changeState(cluster, PENDING, CAPTURED);
    }
  }

  /** Lets the chunk go, in the urgent ring if it is not there yet (pushed after the release: see shared.ts). */
  #releaseUrgent(chunk: number, setBits: number): void {
    const queued = (this.#shared.chunkWords[chunk] & QUEUED) !== 0;
    this.#shared.release(chunk, 0, QUEUED | setBits);
    if (!queued) this.#shared.pushUrgent(chunk);
  }

  /** Holding the claim: captures the missing blocks of [from, to), then lets the chunk go. */
  #captureBlocks(chunk: number, from: number, to: number, isFirstInLine: boolean): Outcome {
    const work = this.#work;
    work.reset();
    let hasRoom: boolean;
    try {
      hasRoom = this.#readMissing(work, chunk, from, to, isFirstInLine);
    } catch (error) {
      // The slots stay taken until the reads into them that have begun are over.
      if (work.pending.length > 0)
        return this.#whenRead(chunk, work, () => this.#abandonCapture(chunk, work, error));
      this.#abandonCapture(chunk, work, error);
      return "done";
    }
    if (!hasRoom) return this.#refuseForRoom(chunk);
    if (work.isEmpty) {
      this.#shared.release(chunk, 0, 0);
      return "done";
    }
    if (work.pending.length === 0) {
      this.#finishCapture(chunk, from, to, work);
      return "done";
    }
    return this.#whenRead(chunk, work, (failure) => {
      if (failure) this.#abandonCapture(chunk, work, failure.reason);
      else this.#finishCapture(chunk, from, to, work);
    });
  }

  /** Goes on when the reads of `work` are over; not at all, but for the claim, if the job has ended by then. */
  #whenRead(
    chunk: number,
    work: CaptureWork,
    next: (failure: PromiseRejectedResult | undefined) => void,
  ): Promise<void> {
    this.#work = new CaptureWork();
    const settled = Promise.allSettled(work.pending);
    this.#reads.add(settled);
    const capture = settled.then((results) => {
      this.#reads.delete(settled);
      if (!this.#detached) {
        next(results.find((result) => result.status === "rejected"));
        return;
      }
      this.#store.giveBack(work);
      this.#shared.release(chunk, 0, 0);
    });
    if (work.spilledBlocks > 0) this.#spilling.add(capture);
    return capture;
  }

  /**
   * Fulfilled when no read into the buffer is in flight. After `detach` none begins, so the buffer may have another
   * use then. What is on its way into the spill is not waited for once the interceptor is detached.
   */
  async idle(): Promise<void> {
    await Promise.all(this.#reads);
  }

  /** Starts the reads of all blocks that need a capture; false when the buffer has no room and may not spill. */
  #readMissing(work: CaptureWork, chunk: number, from: number, to: number, isFirstInLine: boolean): boolean {
    const missing = this.#store.findMissing(chunk, from, to);
    if (missing === 0) return true;
    this.#store.reclaimIfLow(missing);
    this.#roomNeeded = missing;
    if (this.#mustWaitItsTurn(isFirstInLine)) return false;
    if (this.#store.freeBlockCount >= missing) {
      this.#store.readIntoSlots(work, chunk, from, to);
      return true;
    }
    if (this.#options.policy.onBufferFull !== "spill") return false;
    this.#store.readIntoSpill(work, chunk, from, to, missing);
    return true;
  }

  /** Only under the policy to wait is there a line, or a pacer. */
  #mustWaitItsTurn(isFirstInLine: boolean): boolean {
    if (this.#pacer === null) return false;
    return (!isFirstInLine && this.#line.length > 0) || this.#pacer.delayMs(this.#clock.nowMs()) > 0;
  }

  #finishCapture(chunk: number, from: number, to: number, work: CaptureWork): void {
    const blocks = this.#store.attach(chunk, from, to, work);
    this.counters.captureCount++;
    this.counters.capturedBytes += blocks * BLOCK_BYTES;
    this.counters.spilledBytes += work.spilledBlocks * BLOCK_BYTES;
    this.#pacer?.admitted(blocks);
    this.#markCaptured(from, to);
    this.#releaseUrgent(chunk, work.spilledBlocks > 0 ? SPILLED : 0);
  }

  #abandonCapture(chunk: number, work: CaptureWork, error: unknown): void {
    this.#store.giveBack(work);
    this.#shared.release(chunk, 0, 0);
    this.#fail(toCowcatcherError(error, this.#objectName));
  }

  #refuseForRoom(chunk: number): Outcome {
    this.#shared.release(chunk, 0, 0);
    if (this.#options.policy.onBufferFull === "wait") return "buffer-full";
    this.#breakSnapshot(
      new CowcatcherError({
        code: "BUFFER_FULL",
        object: this.#objectName,
        problem: "the copy-before-write buffer is full",
        hint: "use a larger --cow-buffer-size, or --on-buffer-full spill or wait",
      }),
    );
    return "done";
  }
}

function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

const REAL_CLOCK: Clock = {
  nowMs: () => performance.now(),
  sleep: (ms) => new Promise((resolve) => setTimeout(resolve, ms)),
};
