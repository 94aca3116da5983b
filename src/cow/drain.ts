// A worker's side of copy-before-write: which chunk to take next, until none is left. What is then done with the chunk:
// chunk-copy.ts.
//
// Order of choice. Urgent chunks first (they hold captures, so draining them frees buffer); else the next chunk of
// the sweep. A chunk taken from the urgent ring is copied whole, pending neighbours included, so that random guest
// writes become large target writes; only when more than half of the buffer is in use are its captured clusters
// copied alone, so that slots come free as fast as the target allows. In a job without a buffer the guest waits
// for exactly its clusters, so there too nothing else is taken. Where another program keeps the captures (src/qemu)
// they are drained by reading them, and no state tells which clusters have some: the chunk is copied whole.
//
// QEMU's sync mode `none` with a target has no sweep: there only what the guest is about to overwrite is copied, until
// somebody ends the job; its workers sleep until there is something urgent.
//
// Where the source is to be read sooner than the target takes it (read-ahead.ts), chunks are read in the same order, and
// kept until the target has time. A worker reads while it waits for its turn at the target, and after each write for as
// long as that took: of a target that is quicker than the source nothing is kept, and of one that is slower
// every other moment goes to reading until the room is used up.
//
// End. The sweep takes every chunk once and whatever state its clusters are in, so when the sweep is past the last
// chunk nothing is left but chunks that a worker holds: a worker that finds no chunk is finished. Entries still in
// the urgent ring then are chunks that the sweep has drained.
//
// The work is a generator (its steps: drain-io.ts) that yields wherever it would block and between any two steps that
// another thread may come between. A worker thread drives it with Atomics.wait (workers/copy.ts); the model test drives many of
// them in one thread, in every order that a seeded scheduler finds.

import { CowcatcherError } from "../errors.js";
import { ChunkCopy, type ChunkCopyOptions, layersOf } from "./chunk-copy.js";
import { DrainIo, type DrainIoOptions, STEP, type Steps } from "./drain-io.js";
import { ReadAhead, type ReadAheadDescription } from "./read-ahead.js";
import {
  CNT_DONE_BYTES,
  CTL_READING,
  CTL_RUN,
  CTL_SWEEP,
  CTL_URGENT_HEAD,
  CTL_URGENT_TAIL,
  CTL_USED_BLOCKS,
  REGION_CHUNKED,
  REGION_HOLE,
  REGION_QUERYING,
  REGION_UNKNOWN,
  RUN_ABORTING,
  RUN_PAUSED,
  RUN_RUNNING,
  type SharedState,
} from "./shared.js";

export interface DrainOptions extends DrainIoOptions, ChunkCopyOptions {
  /** Captures are kept by another program, behind the reader; what stands in the urgent ring is a hint of them. */
  hasForeignCaptures?: boolean | undefined;
  /** Not of a job without a buffer, nor of one without a sweep. */
  readAhead?: ReadAheadPart | undefined;
  /** Asked before each chunk; true ends this drainer, while others go on. Not of one that reads ahead. */
  isRelieved?: (() => boolean) | undefined;
}

/** What a drainer needs to read ahead. */
export interface ReadAheadPart extends ReadAheadDescription {
  /** No two drainers of a job have the same. */
  part: number;
  /** As `chunkBuffer`, another one: chunks are written from it that were kept. */
  writeBuffer: Uint8Array;
}

const NO_BYTES = new Uint8Array(0);

/**
 * One worker's walk over the chunks: urgent ones first, then the sweep. Worker threads, one instance each.
 */
export class Drainer {
  readonly #options: DrainOptions;
  readonly #shared: SharedState;
  readonly #io: DrainIo;
  readonly #chunkCopy: ChunkCopy;
  readonly #unbuffered: boolean;
  readonly #halfBufferBlocks: number;
  readonly #capturedOnly: boolean;
  readonly #ahead: ReadAhead | null;
  /** Writes chunks that were kept. */
  readonly #keptCopy: ChunkCopy;
  /** Nothing is left to be read. */
  #isSwept = false;
  /** Of the chunk that `#next` gave: nothing but its captured clusters is to be taken. */
  #isPressing = false;
  /** Reading goes on until then, as long as there is room. */
  #readUntilNs = 0n;

  constructor(options: DrainOptions) {
    this.#options = options;
    this.#shared = options.shared;
    this.#io = new DrainIo(options.shared, options);
    this.#chunkCopy = new ChunkCopy(options, this.#io);
    this.#unbuffered = options.shared.bufferBlockCount === 0;
    this.#halfBufferBlocks = options.shared.bufferBlockCount / 2;
    this.#capturedOnly = options.shared.buffers.capturedOnly === true;
    const { readAhead } = options;
    this.#ahead = readAhead === undefined ? null : new ReadAhead(options.shared, readAhead, readAhead.part);
    this.#keptCopy =
      readAhead === undefined
        ? this.#chunkCopy
        : new ChunkCopy({ ...options, chunkBuffer: readAhead.writeBuffer }, this.#io);
  }

  /** Works until no chunk is left or the job is aborted. @throws CowcatcherError: the job fails with it. */
  *run(): Steps<void> {
    if (this.#ahead !== null) return yield* this.#runAhead(this.#ahead);
    while (yield* this.#mayGoOn()) {
      if (this.#options.isRelieved?.() === true) return yield* this.#chunkCopy.settle();
      const chunk = yield* this.#next();
      if (chunk >= 0) yield* this.#chunkCopy.run(chunk, this.#isPressing);
      else if (!this.#capturedOnly || !(yield* this.#awaitUrgent())) return yield* this.#chunkCopy.settle();
    }
  }

  /** Waits as long as the job is paused; false: it is aborted. */
  *#mayGoOn(): Steps<boolean> {
    const { control } = this.#shared;
    for (;;) {
      const state = Atomics.load(control, CTL_RUN);
      if (state === RUN_ABORTING) return false;
      if (state !== RUN_PAUSED) return true;
      yield { kind: "wait", words: control, index: CTL_RUN, value: RUN_PAUSED };
    }
  }

  /** The next chunk to be read; -1: none, now. */
  *#next(): Steps<number> {
    const urgent = this.#shared.popUrgent();
    if (urgent >= 0) {
      yield STEP;
      const used = Atomics.load(this.#shared.control, CTL_USED_BLOCKS);
      const isPressing = this.#unbuffered || this.#capturedOnly || used > this.#halfBufferBlocks;
      this.#isPressing = isPressing && this.#options.hasForeignCaptures !== true;
      return urgent;
    }
    this.#isPressing = false;
    if (this.#capturedOnly) return -1;
    const next = yield* this.#nextOfSweep();
    if (next >= 0) yield STEP;
    return next;
  }

  *#runAhead(ahead: ReadAhead): Steps<void> {
    while (yield* this.#mayGoOn()) {
      if (!this.#isSwept && (ahead.isEmpty || (ahead.hasRoom && this.#isTimeToRead))) {
        yield* this.#readOne(ahead);
      } else if (!ahead.isEmpty) {
        yield* this.#writeOldest(ahead);
      } else {
        return yield* this.#chunkCopy.settle();
      }
    }
  }

  get #isTimeToRead(): boolean {
    return this.#options.now() < this.#readUntilNs;
  }

  /** Reads a chunk, and keeps it, or writes it at once where nothing is kept and the target may be written to. */
  *#readOne(ahead: ReadAhead): Steps<void> {
    const { control } = this.#shared;
    // Before the chunk is taken: whoever sees the sweep at its end then sees that this one is still being read.
    Atomics.add(control, CTL_READING, 1);
    let chunk: number;
    let takenBytes = 0;
    try {
      chunk = yield* this.#next();
      if (chunk >= 0) takenBytes = yield* this.#chunkCopy.read(chunk, this.#isPressing);
      else this.#isSwept = true;
    } finally {
      Atomics.sub(control, CTL_READING, 1);
    }
    if (takenBytes === 0) return;
    const isForNow = ahead.isEmpty && !this.#isTimeToRead && !this.#io.isHeldBack;
    const { filling } = this.#chunkCopy;
    if (!isForNow && ahead.put({ chunk, takenBytes, filling }, this.#options.chunkBuffer)) return;
    const startNs = this.#options.now();
    yield* this.#chunkCopy.write(chunk, takenBytes);
    this.#hasWritten(this.#options.now() - startNs);
  }

  #hasWritten(tookNs: bigint): void {
    this.#readUntilNs = this.#options.now() + tookNs;
  }

  /** Reads on while the target is not to be written to. */
  *#writeOldest(ahead: ReadAhead): Steps<void> {
    const { chunk, takenBytes, filling } = ahead.take(this.#options.readAhead?.writeBuffer ?? NO_BYTES);
    this.#keptCopy.filling = filling;
    const now = (): bigint => this.#options.now();
    let startNs = now();
    const steps = this.#keptCopy.write(chunk, takenBytes);
    let result = steps.next();
    while (!result.done) {
      const step = result.value;
      const waitsFromNs = now();
      if (step.kind === "sleep") yield* this.#readUntil(step.untilNs, ahead);
      try {
        yield step;
      } catch (error) {
        result = steps.throw(error);
        continue;
      }
      // Of the target's time that is no part.
      if (step.kind === "sleep") startNs += now() - waitsFromNs;
      result = steps.next();
    }
    this.#hasWritten(now() - startNs);
  }

  *#readUntil(untilNs: bigint, ahead: ReadAhead): Steps<void> {
    const { control } = this.#shared;
    while (!this.#isSwept && ahead.hasRoom && this.#options.now() < untilNs) {
      if (Atomics.load(control, CTL_RUN) !== RUN_RUNNING) return;
      yield* this.#readOne(ahead);
    }
  }

  /** Without a sweep: until there is an urgent chunk, or something else to look at. False: nothing more is to come. */
  *#awaitUrgent(): Steps<boolean> {
    const { control, geometry } = this.#shared;
    // What the target's writer has put off does not wait for the next capture.
    yield* this.#chunkCopy.settle();
    const tail = Atomics.load(control, CTL_URGENT_TAIL);
    const isLast = Atomics.load(control, CTL_SWEEP) >= geometry.chunkCount;
    if (Atomics.load(control, CTL_URGENT_HEAD) !== tail) return true;
    if (isLast) return false;
    yield { kind: "wait", words: control, index: CTL_URGENT_TAIL, value: tail };
    return true;
  }

  *#nextOfSweep(): Steps<number> {
    const { control, regionStates, geometry } = this.#shared;
    for (;;) {
      const chunk = Atomics.load(control, CTL_SWEEP);
      if (chunk >= geometry.chunkCount) return -1;
      const region = Math.floor(chunk / geometry.chunksPerRegion);
      const state = Atomics.load(regionStates, region);
      if (state === REGION_CHUNKED) {
        if (Atomics.compareExchange(control, CTL_SWEEP, chunk, chunk + 1) === chunk) return chunk;
      } else if (state === REGION_HOLE) {
        const next = Math.min((region + 1) * geometry.chunksPerRegion, geometry.chunkCount);
        Atomics.compareExchange(control, CTL_SWEEP, chunk, next);
      } else if (state === REGION_QUERYING) {
        yield { kind: "wait", words: regionStates, index: region, value: REGION_QUERYING };
        if (Atomics.load(control, CTL_RUN) === RUN_ABORTING) return -1;
      } else if (
        Atomics.compareExchange(regionStates, region, REGION_UNKNOWN, REGION_QUERYING) === REGION_UNKNOWN
      ) {
        yield* this.#queryRegion(region);
      }
    }
  }

  *#queryRegion(region: number): Steps<void> {
    const { regionStates, geometry, counters } = this.#shared;
    const regionBytes = geometry.chunkBytes * geometry.chunksPerRegion;
    const start = region * regionBytes;
    const length = Math.min(regionBytes, geometry.sizeBytes - start);
    let hole = false;
    let layers: "own" | "below" | "both" = "own";
    yield STEP;
    try {
      if (this.#options.topOnly) layers = layersOf(this.#options.reader, start, length);
      if (layers === "own") {
        const extent = this.#options.reader.extent(start, length);
        hole = extent.zero && extent.lengthBytes >= length;
      }
    } catch (error) {
      // The sweep meets it again, chunk by chunk and under the source's error policy.
      if (!(error instanceof CowcatcherError)) throw error;
    } finally {
      const isDone = hole || layers === "below";
      // Whatever failed, no guest write may wait for this region for ever.
      Atomics.store(regionStates, region, isDone ? REGION_HOLE : REGION_CHUNKED);
      Atomics.notify(regionStates, region);
    }
    if (layers === "below") {
      this.#noteWritten(region);
      Atomics.add(counters, CNT_DONE_BYTES, BigInt(length));
    }
    if (!hole) return;
    const released = this.#options.reader.release?.(start, length);
    if (released) yield { kind: "promise", promise: released };
    yield STEP;
    yield* this.#io.toTarget(() => this.#options.writer.writeZeroes(start, length));
    this.#noteWritten(region);
    Atomics.add(counters, CNT_DONE_BYTES, BigInt(length));
  }

  /** Unless the job was aborted: then what was to be done for the region may not have been. */
  #noteWritten(region: number): void {
    const { control, written, geometry } = this.#shared;
    if (Atomics.load(control, CTL_RUN) === RUN_ABORTING) return;
    const clusterCount = geometry.chunksPerRegion * geometry.clustersPerChunk;
    written?.fill(1, region * clusterCount, (region + 1) * clusterCount);
  }
}
