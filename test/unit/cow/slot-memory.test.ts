// A buffer of two kinds of slots: which is given out when, and what is read and written where.
import { openSync, closeSync } from "node:fs";
import fc from "fast-check";
import { afterEach, describe, expect, it } from "vitest";
import { BLOCK_BYTES, BLOCKS_PER_SLOT, SLOT_BYTES } from "../../../src/cow/geometry.js";
import { createSlotFile, memoryAlone, SlotMemory } from "../../../src/cow/slot-memory.js";
import { BufferAllocator } from "../../../src/cow/slots.js";

const open: number[] = [];
afterEach(() => {
  for (const fd of open.splice(0)) closeSync(fd);
});

/** Two mapped slots and two of the file. */
function makeSlots(fileFd = createSlotFile()): SlotMemory {
  expect(fileFd).toBeGreaterThan(0);
  open.push(fileFd);
  const memory = new Uint8Array(new SharedArrayBuffer(2 * SLOT_BYTES));
  return new SlotMemory({ ...memoryAlone(memory), fileFd }, 4 * SLOT_BYTES);
}

describe("BufferAllocator", () => {
  const slotOf = (block: number): number => Math.floor(block / BLOCKS_PER_SLOT);

  it("gives out mapped slots that are ready, then the file's, then mapped ones that are not", () => {
    let ready = 1;
    const allocator = new BufferAllocator(5, 3, () => ready);
    const next = (): number => slotOf(allocator.allocate(BLOCKS_PER_SLOT));
    expect([next(), next()]).toEqual([0, 3]);
    ready = 2;
    expect([next(), next(), next(), next()]).toEqual([1, 4, 2, -1]);
  });

  it("gives a mapped slot out again before it takes the file", () => {
    const allocator = new BufferAllocator(4, 1, () => 1);
    const first = allocator.allocate(BLOCKS_PER_SLOT);
    allocator.free(first, BLOCKS_PER_SLOT);
    expect(allocator.allocate(BLOCKS_PER_SLOT)).toBe(first);
    expect(allocator.isMappedLow).toBe(true);
  });

  it("never gives a block out twice, and has as many as it says, whenever pages become ready", () => {
    const step = fc.oneof(
      fc.record({ take: fc.integer({ min: 1, max: BLOCKS_PER_SLOT }) }),
      fc.record({ give: fc.nat() }),
      fc.constant({ prepare: true }),
    );
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 3 }),
        fc.integer({ min: 0, max: 3 }),
        fc.array(step, { maxLength: 200 }),
        (mapped, file, steps) => {
          let ready = 0;
          const allocator = new BufferAllocator(mapped + file, mapped, () => ready);
          const taken = new Set<number>();
          const runs: [number, number][] = [];
          for (const one of steps) {
            if ("take" in one) {
              const first = allocator.allocate(one.take);
              expect(first === -1).toBe(taken.size === allocator.blockCount);
              if (first < 0) continue;
              const count = allocator.allocatedCount;
              for (let block = first; block < first + count; block++) {
                expect(taken.has(block)).toBe(false);
                taken.add(block);
              }
              runs.push([first, count]);
            } else if ("give" in one) {
              const [run] = runs.splice(one.give % Math.max(1, runs.length), 1);
              if (run === undefined) continue;
              for (let block = run[0]; block < run[0] + run[1]; block++) taken.delete(block);
              allocator.free(...run);
            } else ready++;
            expect(allocator.freeBlockCount).toBe(allocator.blockCount - taken.size);
          }
        },
      ),
      { numRuns: 300 },
    );
  });
});

describe("SlotMemory", () => {
  it("reads what was written, in both kinds of slots", () => {
    const slots = makeSlots();
    const data = new Uint8Array(SLOT_BYTES).map((_, i) => i % 251);
    expect([0, 1, 2, 3].map((slot) => slots.isMapped(slot * SLOT_BYTES))).toEqual([true, true, false, false]);
    slots.mapped.set(data, SLOT_BYTES);
    slots.write(data, BLOCK_BYTES, BLOCK_BYTES, 3 * SLOT_BYTES + BLOCK_BYTES);
    const read = new Uint8Array(2 * BLOCK_BYTES);
    slots.read(SLOT_BYTES + BLOCK_BYTES, read, 0, BLOCK_BYTES);
    slots.read(3 * SLOT_BYTES + BLOCK_BYTES, read, BLOCK_BYTES, BLOCK_BYTES);
    const expected = data.subarray(BLOCK_BYTES, 2 * BLOCK_BYTES);
    expect(Buffer.compare(read.subarray(0, BLOCK_BYTES), expected)).toBe(0);
    expect(Buffer.compare(read.subarray(BLOCK_BYTES), expected)).toBe(0);
    expect(slots.isZeroBlock(3 * SLOT_BYTES)).toBe(true);
    expect(slots.isZeroBlock(3 * SLOT_BYTES + BLOCK_BYTES)).toBe(false);
    expect(slots.isZeroBlock(0)).toBe(true);
  });

  it("says that there is no more memory, and that what was written is gone", () => {
    const fd = openSync("/dev/full", "r+");
    try {
      const memory = new Uint8Array(new SharedArrayBuffer(0));
      const full = new SlotMemory({ ...memoryAlone(memory), fileFd: fd }, SLOT_BYTES);
      expect(() => full.write(new Uint8Array(BLOCK_BYTES), 0, BLOCK_BYTES, 0)).toThrow(
        /^--cow-buffer-size: cannot write the buffer's memory \(ENOSPC\)/,
      );
    } finally {
      closeSync(fd);
    }
    const slots = makeSlots();
    expect(() => slots.read(2 * SLOT_BYTES, new Uint8Array(BLOCK_BYTES), 0, BLOCK_BYTES)).toThrow(
      expect.objectContaining({ code: "IO", object: "--cow-buffer-size" }),
    );
  });
});
