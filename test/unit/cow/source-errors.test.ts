// What --on-source-error ignore leaves out of a backup: the blocks that cannot be read, and nothing else.
import { describe, expect, it } from "vitest";
import { Drainer } from "../../../src/cow/drain.js";
import type { DrainStep } from "../../../src/cow/drain-io.js";
import { geometryOf } from "../../../src/cow/geometry.js";
import {
  createSharedState,
  CTL_IGNORED_ERRORS,
  CTL_RUN,
  RUN_ABORTING,
  RUN_RUNNING,
} from "../../../src/cow/shared.js";
import { CowcatcherError } from "../../../src/errors.js";
import type { Completion } from "../../../src/block/device.js";
import { BLOCK_BYTES, MiB } from "../../support/cow-engine.js";

const SIZE_BYTES = 2 * MiB + 5000;

interface Source {
  /** Blocks of the disk that no read may touch. */
  badBlocks: readonly number[];
  /** Which of the reader's two questions meets them. */
  fails?: "read" | "extent" | "later";
  /** Extents end at multiples of this. */
  extentBytes?: number;
  /** A lost connection says nothing about a place. */
  hasOffset?: boolean;
}

/** Copies a disk of 0x11 through one worker, whose promises are awaited. */
function copy({ badBlocks, fails = "read", extentBytes = SIZE_BYTES, hasOffset = true }: Source) {
  const shared = createSharedState(geometryOf(SIZE_BYTES), new SharedArrayBuffer(0), 0);
  Atomics.store(shared.control, CTL_RUN, RUN_RUNNING);
  const target = new Uint8Array(SIZE_BYTES).fill(0xee);
  const reads: number[] = [];
  const failure = (offset: number, length: number): CowcatcherError | undefined => {
    const bad = badBlocks.find(
      (block) => block * BLOCK_BYTES < offset + length && (block + 1) * BLOCK_BYTES > offset,
    );
    if (bad === undefined) return undefined;
    const offsetBytes = hasOffset ? offset : undefined;
    return new CowcatcherError({
      code: "IO",
      object: "disk",
      problem: "cannot read",
      errno: "EIO",
      offsetBytes,
    });
  };
  const steps = new Drainer({
    shared,
    reader: {
      sizeBytes: SIZE_BYTES,
      read(buffer, at, length, offset): Completion {
        reads.push(length);
        const error = failure(offset, length);
        if (error && fails === "later") return Promise.reject(error);
        if (error && fails === "read") throw error;
        buffer.fill(0x11, at, at + length);
        return undefined;
      },
      extent(offset, length) {
        const error = fails === "extent" ? failure(offset, length) : undefined;
        if (error) throw error;
        const end = (Math.floor(offset / extentBytes) + 1) * extentBytes;
        return { lengthBytes: Math.min(length, end - offset), zero: false };
      },
      close: () => undefined,
    },
    writer: {
      write: (buffer, at, length, offset) => void target.set(buffer.subarray(at, at + length), offset),
      writeZeroes: (offset, length) => void target.fill(0, offset, offset + length),
      close: () => undefined,
    },
    topOnly: false,
    zeroUnitBytes: BLOCK_BYTES,
    spill: null,
    chunkBuffer: new Uint8Array(MiB),
    onSourceError: "ignore",
    onTargetError: "report",
    targetRetries: 0,
    onStop: () => undefined,
    now: () => 0n,
  }).run();
  const run = async (onStep: (step: DrainStep) => void = () => undefined): Promise<void> => {
    for (let result = steps.next(); !result.done;) {
      onStep(result.value);
      if (result.value.kind !== "promise") {
        result = steps.next();
        continue;
      }
      const error: unknown = await result.value.promise.then(
        () => undefined,
        (reason: unknown) => reason,
      );
      result = error === undefined ? steps.next() : steps.throw(error);
    }
  };
  return { run, shared, target, reads, ignored: () => shared.control[CTL_IGNORED_ERRORS] };
}

function expectZeroOnly(target: Uint8Array, badBlocks: readonly number[]): void {
  const wrong: string[] = [];
  for (let block = 0; block * BLOCK_BYTES < target.length; block++) {
    const wanted = badBlocks.includes(block) ? 0 : 0x11;
    const data = target.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
    if (!data.every((byte) => byte === wanted)) wrong.push(`block ${block}: ${data[0]}, not ${wanted}`);
  }
  expect(wrong).toEqual([]);
}

describe("a source with bad blocks, passed over", () => {
  it.each([
    ["a read that fails at once", { badBlocks: [5] }],
    ["a read that fails later", { badBlocks: [5, 300], fails: "later" }],
    ["a place of which not even the extent is known", { badBlocks: [255, 256], fails: "extent" }],
    ["an extent that ends before the run does", { badBlocks: [2], extentBytes: 64 * 1024 }],
    ["extents that end within blocks", { badBlocks: [2, 3], extentBytes: 3000 }],
    ["the disk's odd last block", { badBlocks: [513] }],
    ["nothing but bad blocks in a chunk", { badBlocks: Array.from({ length: 256 }, (_, i) => 256 + i) }],
  ] satisfies [string, Source][])("loses those alone: %s", async (_what, source) => {
    const { run, target, ignored } = copy(source);
    await run();
    expectZeroOnly(target, source.badBlocks);
    expect(ignored()).toBeGreaterThanOrEqual(source.badBlocks.length);
    if (!("extentBytes" in source)) expect(ignored()).toBe(source.badBlocks.length);
  });

  it("is not read block by block where no place is to blame: a server that is gone", async () => {
    const { run, target, reads, ignored } = copy({ badBlocks: [5], hasOffset: false });
    await run();
    expect(reads.length).toBe(3);
    expect(ignored()).toBe(1);
    expect(target.subarray(0, MiB).every((byte) => byte === 0)).toBe(true);
    expect(target.subarray(MiB).every((byte) => byte === 0x11)).toBe(true);
  });

  it("does not go on block by block once the job is aborted", async () => {
    const { run, shared, reads } = copy({ badBlocks: Array.from({ length: 256 }, (_, i) => i) });
    await run(() => {
      if (reads.length === 10) Atomics.store(shared.control, CTL_RUN, RUN_ABORTING);
    });
    expect(reads.length).toBeLessThanOrEqual(11);
  });
});
