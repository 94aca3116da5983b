// The interceptor over a disk in memory, with a worker that is driven by hand: for tests of one rule at a time.

import { mkdtempSync, openSync, closeSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { BLOCK_BYTES, chunkedGeometryOf, type Cut, USUAL_CUT } from "../../src/cow/geometry.js";
import { Interceptor, type InterceptorOptions } from "../../src/cow/interceptor.js";
import {
  captureLength,
  createSharedState,
  DONE,
  OWNER_WORKER,
  QUEUED,
  type SharedState,
} from "../../src/cow/shared.js";
import { spillBitmapBytes, type SpillDescription, SpillFile } from "../../src/cow/spill.js";
import type { CowcatcherError } from "../../src/errors.js";
import type { BlockDevice, Completion } from "../../src/block/device.js";

export const MiB = 1024 * 1024;

/** A disk whose reads end when the test says so, while `cold`. */
export class ColdDisk implements Pick<BlockDevice, "read" | "name" | "sizeBytes"> {
  readonly name = "disk";
  readonly content: Uint8Array;
  cold = false;
  readonly reads: { finish: () => void; fail: (error: unknown) => void }[] = [];

  constructor(readonly sizeBytes: number) {
    this.content = new Uint8Array(sizeBytes).fill(0x11);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const copy = () =>
      buffer.set(this.content.subarray(offsetBytes, offsetBytes + lengthBytes), bufferOffset);
    if (!this.cold) {
      copy();
      return undefined;
    }
    return new Promise<void>((resolve, reject) => {
      this.reads.push({
        finish: () => {
          copy();
          resolve();
        },
        fail: reject,
      });
    });
  }
}

export interface Engine {
  disk: ColdDisk;
  shared: SharedState;
  interceptor: Interceptor;
  broken: CowcatcherError[];
  /** Takes the chunk's captures off, gives their slots back and marks its clusters DONE, as a worker does. */
  drain: (chunk: number) => void;
  /** The same without DONE: room comes free, the chunk goes on being captured. */
  freeCaptures: (chunk: number) => number;
  spillFd: number;
  spill: SpillDescription;
  close: () => void;
}

export interface EngineOptions {
  sizeBytes?: number;
  bufferBytes?: number;
  cut?: Cut;
  policy?: Partial<InterceptorOptions["policy"]>;
  spillLimitBytes?: number;
  recheckMs?: number;
  clock?: InterceptorOptions["clock"];
}

export function makeEngine(options: EngineOptions = {}): Engine {
  const sizeBytes = options.sizeBytes ?? 4 * MiB;
  const bufferBytes = options.bufferBytes ?? 2 * MiB;
  const disk = new ColdDisk(sizeBytes);
  const geometry = chunkedGeometryOf(sizeBytes, options.cut ?? USUAL_CUT, 0);
  const shared = createSharedState(geometry, new SharedArrayBuffer(bufferBytes), bufferBytes);
  const folder = mkdtempSync(join(tmpdir(), "cowcatcher-engine-"));
  const spillFd = openSync(join(folder, "spill"), "w+");
  const spill = { path: "spill", fd: spillFd, bitmaps: new SharedArrayBuffer(spillBitmapBytes(geometry)) };
  const broken: CowcatcherError[] = [];
  const interceptor = new Interceptor({
    shared,
    image: disk,
    openSpill: () => new SpillFile(spill, geometry),
    spillLimitBytes: options.spillLimitBytes ?? Number.MAX_SAFE_INTEGER,
    policy: {
      onBufferFull: "spill",
      onCbwError: "break-snapshot",
      guestTimeoutMs: 1e9,
      ...options.policy,
    },
    onBroken: (error) => broken.push(error),
    recheckMs: options.recheckMs ?? Infinity,
    clock: options.clock,
  });
  const freeCaptures = (chunk: number): number => {
    let blocks = 0;
    let last = -1;
    const first = shared.chunkHead(chunk);
    for (let capture = first; capture >= 0; capture = shared.captureNext[capture]) {
      blocks += captureLength(shared.captureInfo[capture]);
      last = capture;
    }
    shared.setChunkHead(chunk, -1);
    if (last >= 0) shared.pushFreed(first, last, blocks);
    return blocks;
  };
  return {
    disk,
    shared,
    interceptor,
    broken,
    spillFd,
    spill,
    freeCaptures,
    drain(chunk) {
      if (!shared.tryClaim(chunk, OWNER_WORKER)) throw new Error(`chunk ${chunk} is claimed`);
      const { clustersPerChunk } = geometry;
      freeCaptures(chunk);
      shared.clusterStates.fill(DONE, chunk * clustersPerChunk, (chunk + 1) * clustersPerChunk);
      shared.release(chunk, QUEUED, 0);
    },
    close() {
      closeSync(spillFd);
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

export { BLOCK_BYTES };

/** Lets everything run that can run now. */
export async function turns(count = 3): Promise<void> {
  for (let i = 0; i < count; i++) await new Promise((resolve) => setImmediate(resolve));
}
