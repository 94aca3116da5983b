import fc from "fast-check";
import { expect, it } from "vitest";
import { allocatePages } from "../../../src/cow/page-memory.js";
import { endOfData, isZero } from "../../../src/cow/zero.js";
import { GiB } from "../../../src/units.js";

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

// Pages that nobody touches cost nothing.
it.each([2, 3, 4])("looks at all of a buffer of %i GiB", (gibibytes) => {
  const memory = allocatePages(gibibytes * GiB, "test");
  for (const from of [0, GiB + 4096, memory.length / 2, memory.length - 4096]) {
    expect(isZero(memory, from, from + 4096)).toBe(true);
    memory[from + 4095] = 1;
    expect(isZero(memory, from, from + 4096)).toBe(false);
  }
});

it("finds the first unit without data, whatever its first word says", () => {
  const units = fc.array(fc.constantFrom("zero", "first", "last"), { minLength: 1, maxLength: 12 });
  fc.assert(
    fc.property(
      units,
      fc.nat(70),
      fc.constantFrom(32, 64, 60),
      fc.nat(31),
      (kinds, viewOffset, unitBytes, cut) => {
        const view = new Uint8Array(new SharedArrayBuffer(1024), viewOffset);
        const from = viewOffset % 2 === 0 ? 32 : 0;
        const to = from + kinds.length * unitBytes - cut;
        // What lies behind the range must not count.
        view[to] = 1;
        kinds.forEach((kind, i) => {
          const start = from + i * unitBytes;
          const end = Math.min(start + unitBytes, to);
          if (kind !== "zero") view[kind === "first" ? start : end - 1] = 1;
        });
        const firstZero = kinds.indexOf("zero");
        const expected = firstZero < 0 ? to : from + firstZero * unitBytes;
        expect(endOfData(view, from, to, unitBytes)).toBe(expected);
      },
    ),
    { numRuns: 3000 },
  );
});
