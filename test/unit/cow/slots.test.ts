import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { SlotAllocator } from "../../../src/cow/slots.js";
import { BLOCKS_PER_SLOT } from "../../../src/cow/geometry.js";

interface Run {
  first: number;
  count: number;
}

/** What the allocator must agree with: an owner for each block. */
class Model {
  readonly taken: boolean[];
  readonly runs: Run[] = [];

  constructor(blockCount: number) {
    this.taken = Array<boolean>(blockCount).fill(false);
  }

  take(run: Run): void {
    for (let block = run.first; block < run.first + run.count; block++) {
      expect(this.taken[block], `block ${block} given out twice`).toBe(false);
      this.taken[block] = true;
    }
    this.runs.push(run);
  }

  giveBack(index: number): Run {
    const [run] = this.runs.splice(index, 1) as [Run];
    this.taken.fill(false, run.first, run.first + run.count);
    return run;
  }

  get freeCount(): number {
    return this.taken.filter((taken) => !taken).length;
  }

  longestFreeRunOfASlot(): number {
    let longest = 0;
    for (let slot = 0; slot < this.taken.length; slot += BLOCKS_PER_SLOT) {
      let run = 0;
      for (let block = slot; block < slot + BLOCKS_PER_SLOT; block++) {
        run = this.taken[block] ? 0 : run + 1;
        longest = Math.max(longest, run);
      }
    }
    return longest;
  }
}

const step = fc.oneof(
  { weight: 3, arbitrary: fc.record({ take: fc.integer({ min: 1, max: BLOCKS_PER_SLOT }) }) },
  { weight: 2, arbitrary: fc.record({ give: fc.nat() }) },
);

describe("SlotAllocator", () => {
  it("never gives a block out twice, never loses one, and always gives the longest run that it has", () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 6 }), fc.array(step, { maxLength: 200 }), (slotCount, steps) => {
        const allocator = new SlotAllocator(slotCount);
        const model = new Model(slotCount * BLOCKS_PER_SLOT);
        for (const one of steps) {
          if ("take" in one) {
            const best = Math.min(one.take, model.longestFreeRunOfASlot());
            const first = allocator.allocate(one.take);
            expect(first === -1).toBe(best === 0);
            if (first >= 0) {
              expect(allocator.allocatedCount).toBe(best);
              const { allocatedCount: count } = allocator;
              expect(Math.floor(first / BLOCKS_PER_SLOT)).toBe(
                Math.floor((first + count - 1) / BLOCKS_PER_SLOT),
              );
              model.take({ first, count });
            }
          } else if (model.runs.length > 0) {
            const { first, count } = model.giveBack(one.give % model.runs.length);
            allocator.free(first, count);
          }
          expect(allocator.freeBlockCount).toBe(model.freeCount);
        }
        while (model.runs.length > 0) {
          const { first, count } = model.giveBack(0);
          allocator.free(first, count);
        }
        // All came back: every slot is whole again.
        const whole = Array.from({ length: slotCount }, () => allocator.allocate(BLOCKS_PER_SLOT));
        expect(new Set(whole).size).toBe(slotCount);
        expect(whole).not.toContain(-1);
        expect(allocator.allocate(1)).toBe(-1);
      }),
      { numRuns: 300 },
    );
  });

  it("splits what no slot can hold in one run, down to single blocks", () => {
    const allocator = new SlotAllocator(1);
    const blocks = Array.from({ length: BLOCKS_PER_SLOT }, () => allocator.allocate(1));
    for (const block of blocks.filter((each) => each % 2 === 0)) allocator.free(block, 1);
    expect(allocator.allocate(16)).toBeGreaterThanOrEqual(0);
    expect(allocator.allocatedCount).toBe(1);
    expect(allocator.freeBlockCount).toBe(7);
  });

  it("puts small captures together before it opens another slot", () => {
    const allocator = new SlotAllocator(64);
    const slots = Array.from({ length: 16 }, () => Math.floor(allocator.allocate(1) / BLOCKS_PER_SLOT));
    expect(new Set(slots).size).toBe(1);
  });

  it("says so when a block is given back twice", () => {
    const allocator = new SlotAllocator(1);
    const first = allocator.allocate(4);
    allocator.free(first, 4);
    expect(() => allocator.free(first, 4)).toThrow(RangeError);
    expect(() => allocator.free(first + 3, 1)).toThrow(RangeError);
    expect(allocator.freeBlockCount).toBe(BLOCKS_PER_SLOT);
  });

  it("of nothing has nothing to give", () => {
    expect(new SlotAllocator(0).allocate(1)).toBe(-1);
  });
});
