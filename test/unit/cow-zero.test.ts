import fc from "fast-check";
import { expect, it } from "vitest";
import { isZero } from "../../src/cow/zero.js";

it("agrees with a byte by byte look, at every alignment, in views that begin anywhere", () => {
  const range = fc.tuple(fc.nat(600), fc.nat(600), fc.nat(64), fc.option(fc.nat(700)));
  fc.assert(
    fc.property(range, ([a, b, viewOffset, dirty]) => {
      const memory = new Uint8Array(new SharedArrayBuffer(701));
      if (dirty !== null) memory[dirty] = 1;
      const view = memory.subarray(viewOffset);
      const from = Math.min(a, b);
      const to = Math.max(a, b);
      const expected = view.subarray(from, to).every((byte) => byte === 0);
      expect(isZero(view, from, to)).toBe(expected);
    }),
    { numRuns: 2000 },
  );
});

it("sees a single byte at each place of an aligned range, and none outside it", () => {
  const memory = new Uint8Array(new SharedArrayBuffer(8192));
  for (let place = 0; place < 8192; place++) {
    memory[place] = 0x80;
    expect(isZero(memory, 4096, 8192)).toBe(place < 4096);
    memory[place] = 0;
  }
});

it("takes memory whose length is no multiple of a word", () => {
  const memory = new Uint8Array(new SharedArrayBuffer(35));
  memory[34] = 1;
  expect(isZero(memory, 0, 32)).toBe(true);
  expect(isZero(memory, 0, 35)).toBe(false);
});
