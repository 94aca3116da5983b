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
import {
  CNT_DONE_BYTES,
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
  type SharedState,
} from "./shared.js";

export interface DrainOptions extends DrainIoOptions, ChunkCopyOptions {
  /** Captures are kept by another program, behind the reader; what stands in the urgent ring is a hint of them. */
  hasForeignCaptures?: boolean | undefined;
}

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

  constructor(options: DrainOptions) {
    this.#options = options;
    this.#shared = options.shared;
    this.#io = new DrainIo(options.shared, options);
    this.#chunkCopy = new ChunkCopy(options, this.#io);
    this.#unbuffered = options.shared.bufferBlockCount === 0;
    this.#halfBufferBlocks = options.shared.bufferBlockCount / 2;
    this.#capturedOnly = options.shared.buffers.capturedOnly === true;
  }

  /** Works until no chunk is left or the job is aborted. @throws CowcatcherError: the job fails with it. */
  *run(): Steps<void> {
    const { control } = this.#shared;
    for (;;) {
      const state = Atomics.load(control, CTL_RUN);
      if (state === RUN_ABORTING) return;
      if (state === RUN_PAUSED) {
        yield { kind: "wait", words: control, index: CTL_RUN, value: RUN_PAUSED };
        continue;
      }
      const urgent = this.#shared.popUrgent();
      if (urgent >= 0) {
        yield STEP;
        const used = Atomics.load(control, CTL_USED_BLOCKS);
        const isPressing = this.#unbuffered || this.#capturedOnly || used > this.#halfBufferBlocks;
        yield* this.#chunkCopy.run(urgent, isPressing && this.#options.hasForeignCaptures !== true);
        continue;
      }
      if (this.#capturedOnly) {
        if (yield* this.#awaitUrgent()) continue;
        return yield* this.#chunkCopy.settle();
      }
      const next = yield* this.#nextOfSweep();
      if (next < 0) return yield* this.#chunkCopy.settle();
      yield STEP;
      yield* this.#chunkCopy.run(next, false);
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
