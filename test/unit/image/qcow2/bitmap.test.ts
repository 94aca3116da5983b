import { describe, expect, test } from "vitest";
import { DirtyBitmap } from "../../../../src/image/qcow2/format/bitmap.js";
import { Random } from "../../../support/random.js";

const GRANULARITY = 512;

/** The run by looking at each bit. */
function slowRun(
  bits: readonly boolean[],
  offset: number,
  length: number,
): { lengthBytes: number; dirty: boolean } {
  const first = Math.floor(offset / GRANULARITY);
  const dirty = bits[first] ?? false;
  let past = first;
  while (past * GRANULARITY < offset + length && bits[past] === dirty) past++;
  return { lengthBytes: Math.min(past * GRANULARITY, offset + length) - offset, dirty };
}

function bitmapOf(bits: readonly boolean[], sizeBytes: number): DirtyBitmap {
  const words = new Uint32Array(Math.ceil(bits.length / 32));
  bits.forEach((dirty, i) => {
    if (dirty) words[i >>> 5] = (words[i >>> 5] ?? 0) | (1 << (i & 31));
  });
  return new DirtyBitmap("b", GRANULARITY, sizeBytes, words);
}

describe("runs of a dirty bitmap", () => {
  test.each([1, 2, 3, 4, 5, 6])("are those that looking at each bit finds (seed %i)", (seed) => {
    const random = new Random(seed);
    const bits: boolean[] = [];
    const bitCount = 33 + random.below(600);
    while (bits.length < bitCount) {
      const value = random.chance(0.5);
      for (let count = random.pick([1, 2, 31, 32, 33, 64, 100]); count > 0; count--) bits.push(value);
    }
    const sizeBytes = bits.length * GRANULARITY - random.below(GRANULARITY);
    const bitmap = bitmapOf(bits, sizeBytes);
    for (let i = 0; i < 500; i++) {
      const offset = random.below(sizeBytes);
      const length = 1 + random.below(sizeBytes - offset);
      expect(bitmap.run(offset, length)).toEqual(slowRun(bits, offset, length));
    }
  });

  test("of a disk that is all dirty or all clean is one run", () => {
    for (const dirty of [true, false]) {
      const bits = Array<boolean>(1000).fill(dirty);
      expect(bitmapOf(bits, 512_000).run(0, 512_000)).toEqual({ lengthBytes: 512_000, dirty });
    }
  });
});
