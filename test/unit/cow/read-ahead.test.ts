// What is kept for the target reaches it as if it had been written at once.
import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { openReadAhead } from "../../../src/backup/memory/read-ahead-file.js";
import { Drainer } from "../../../src/cow/drain.js";
import { BLOCK_BYTES, geometryOf } from "../../../src/cow/geometry.js";
import {
  CNT_RATE_LIMIT,
  CNT_RATE_NEXT_NS,
  createSharedState,
  CTL_AHEAD_CHUNKS,
  CTL_RUN,
  RUN_RUNNING,
} from "../../../src/cow/shared.js";
import type { TargetWriter } from "../../../src/cow/target-writer.js";
import { MiB } from "../../../src/units.js";

const SIZE_BYTES = 3 * MiB;
let folder = "";
let path = "";
let fd = -1;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-ahead-"));
  path = join(folder, "ahead");
  writeFileSync(path, "");
});
afterEach(() => {
  if (fd >= 0) closeSync(fd);
  fd = -1;
  rmSync(folder, { recursive: true });
});

/** Copies a disk of `value` to a target that may not be written to at first, so that chunks are kept. */
function copy(value: number, noteUnneeded?: TargetWriter["noteUnneeded"]) {
  const shared = createSharedState(geometryOf(SIZE_BYTES), new SharedArrayBuffer(0), 0);
  Atomics.store(shared.control, CTL_RUN, RUN_RUNNING);
  Atomics.store(shared.counters, CNT_RATE_LIMIT, BigInt(MiB));
  Atomics.store(shared.counters, CNT_RATE_NEXT_NS, 1_000_000_000n);
  const target = new Uint8Array(SIZE_BYTES).fill(0xee);
  const calls: string[] = [];
  let nowNs = 0n;
  let keptMax = 0;
  const memory = (): Uint8Array => new Uint8Array(new SharedArrayBuffer(MiB));
  const steps = new Drainer({
    shared,
    reader: {
      sizeBytes: SIZE_BYTES,
      read(buffer, at, length) {
        buffer.fill(value, at, at + length);
        return undefined;
      },
      extent: (_, lengthBytes) => ({ lengthBytes, zero: false }),
      close: () => undefined,
    },
    writer: {
      ...(noteUnneeded && { noteUnneeded }),
      write(buffer, at, length, offset) {
        calls.push("write");
        target.set(buffer.subarray(at, at + length), offset);
        return undefined;
      },
      writeZeroes() {
        calls.push("zeroes");
        return undefined;
      },
      close: () => undefined,
    },
    zeroUnitBytes: MiB,
    topOnly: false,
    hasForeignCaptures: true,
    spill: null,
    chunkBuffer: memory(),
    readAhead: { fd, chunkLimit: 2, part: 1, writeBuffer: memory() },
    onSourceError: "report",
    onTargetError: "report",
    targetRetries: 0,
    onStop: () => undefined,
    now: () => nowNs,
  }).run();
  for (const step of steps) {
    keptMax = Math.max(keptMax, Atomics.load(shared.control, CTL_AHEAD_CHUNKS));
    if (step.kind === "sleep") nowNs = step.untilNs;
  }
  return { target, calls, keptMax, kept: Atomics.load(shared.control, CTL_AHEAD_CHUNKS) };
}

it("is written where the target needs a part alone, even if that is zeroes: the rest is not", () => {
  fd = openSync(path, "r+");
  const { calls, keptMax } = copy(0, (_, unneeded) => {
    unneeded.fill(1, 1);
    return BLOCK_BYTES;
  });
  expect(keptMax).toBeGreaterThan(0);
  expect(calls).toEqual(["write", "write", "write"]);
});

it("is written at once where the system refuses memory for it", () => {
  fd = openSync(path, "r");
  const { target, kept } = copy(0x11);
  expect(target.every((byte) => byte === 0x11)).toBe(true);
  expect(kept).toBe(0);
});

it("has no more memory than half of what is free, for all jobs together", () => {
  const free = { availableBytes: 64 * MiB };
  const first = openReadAhead(24 * MiB, MiB, 0, free);
  const second = openReadAhead(24 * MiB, MiB, 0, free);
  expect([first, second].map((file) => file?.description.chunkLimit)).toEqual([24, 8]);
  expect(openReadAhead(24 * MiB, MiB, 0, free)).toBeNull();
  first?.close();
  const third = openReadAhead(24 * MiB, MiB, 20 * MiB, free);
  expect(third?.description.chunkLimit).toBe(14);
  second?.close();
  third?.close();
});
