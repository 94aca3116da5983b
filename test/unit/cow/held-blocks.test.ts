import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { HeldBlocks } from "../../../src/cow/held-blocks.js";

const BLOCKS_PER_CHUNK = 256;
const CHUNK_COUNT = 16;
/** Fewer entries than chunks, so that chunks push each other out. */
const ENTRIES = 4;

const range = fc
  .tuple(fc.nat(BLOCKS_PER_CHUNK - 1), fc.integer({ min: 1, max: BLOCKS_PER_CHUNK }))
  .map(([from, length]) => ({ from, to: Math.min(from + length, BLOCKS_PER_CHUNK) }));

const step = fc.record({
  kind: fc.constantFrom("begin", "add", "ask"),
  chunk: fc.nat(CHUNK_COUNT - 1),
  range,
});

describe("HeldBlocks", () => {
  test("answers as a set of blocks would that is emptied whenever its chunk is pushed out", () => {
    fc.assert(
      fc.property(fc.array(step, { minLength: 1, maxLength: 60 }), (steps) => {
        const held = new HeldBlocks(CHUNK_COUNT, BLOCKS_PER_CHUNK, ENTRIES);
        const model = new Map<number, { chunk: number; blocks: Set<number> }>();
        for (const { kind, chunk, range: asked } of steps) {
          const entry = model.get(chunk % ENTRIES);
          const blocks = entry?.chunk === chunk ? entry.blocks : undefined;
          if (kind === "begin") {
            held.begin(chunk);
            model.set(chunk % ENTRIES, { chunk, blocks: new Set() });
          } else if (kind === "add") {
            held.add(chunk, asked.from, asked.to);
            for (let block = asked.from; block < asked.to; block++) blocks?.add(block);
          } else {
            expect(held.knows(chunk)).toBe(blocks !== undefined);
            let all = blocks !== undefined;
            for (let block = asked.from; block < asked.to; block++) all &&= blocks?.has(block) ?? false;
            expect(held.hasAll(chunk, asked.from, asked.to)).toBe(all);
          }
        }
      }),
      { numRuns: 300 },
    );
  });

  test.each([
    [0, 1],
    [31, 32],
    [0, 32],
    [32, 64],
    [31, 33],
    [5, 250],
    [0, 256],
  ])("finds blocks %i to %i held, and not when one at either end is missing", (from, to) => {
    const held = new HeldBlocks(1, BLOCKS_PER_CHUNK);
    held.begin(0);
    held.add(0, from, to);
    expect(held.hasAll(0, from, to)).toBe(true);
    if (from > 0) expect(held.hasAll(0, from - 1, to)).toBe(false);
    if (to < BLOCKS_PER_CHUNK) expect(held.hasAll(0, from, to + 1)).toBe(false);
  });
});
