// The preparer keeps the pages ahead of the captures ready, no more than was captured lately, and changes no byte.
import { expect, it } from "vitest";
import {
  newPageWords,
  PAGES_FRESH,
  PAGES_READY,
  PAGES_STOP,
  preparePages,
  type PageTask,
} from "../../../src/cow/buffer-pages.js";
import { SLOT_BYTES } from "../../../src/cow/geometry.js";
import { allocatePages } from "../../../src/cow/page-memory.js";

const SLOT_COUNT = 4096;

function task(options: Partial<PageTask> = {}): PageTask & { marks: Int32Array } {
  const slotCount = options.slotCount ?? SLOT_COUNT;
  const words = newPageWords();
  return {
    slots: allocatePages(slotCount * SLOT_BYTES, "test"),
    words,
    slotCount,
    everything: false,
    niceness: 0,
    marks: new Int32Array(words),
    ...options,
  };
}

/** A clock that moves by `stepMs` at each look, and calls `onLook` with the number of the look. */
function clock(stepMs: number, onLook: (look: number) => void): () => number {
  let look = 0;
  return () => {
    onLook(++look);
    return look * stepMs;
  };
}

it("stops a stretch ahead of the captures while none come", () => {
  const { marks, ...given } = task();
  preparePages(
    given,
    clock(20, (look) => {
      if (look > 200) Atomics.store(marks, PAGES_STOP, 1);
    }),
    0,
  );
  expect(marks[PAGES_READY]).toBeGreaterThanOrEqual(1024);
  expect(marks[PAGES_READY]).toBeLessThan(1024 + 32);
});

it("goes further ahead the faster captures come", () => {
  const { marks, ...given } = task({ slotCount: 16_384 });
  preparePages(
    given,
    clock(2, (look) => {
      // 4 slots each 2 ms are 2000 a second.
      Atomics.store(marks, PAGES_FRESH, look * 4);
      if (look === 1000) Atomics.store(marks, PAGES_STOP, 1);
    }),
    0,
  );
  expect(marks[PAGES_READY]).toBeGreaterThan(4000 + 1500);
  expect(marks[PAGES_READY]).toBeLessThan(4000 + 2100);
});

it("goes on from where captures have overtaken it", () => {
  const { marks, ...given } = task();
  Atomics.store(marks, PAGES_FRESH, 3000);
  preparePages(
    given,
    clock(20, (look) => {
      if (look > 200) Atomics.store(marks, PAGES_STOP, 1);
    }),
    0,
  );
  expect(marks[PAGES_READY]).toBeGreaterThanOrEqual(4024);
});

it("ends by itself when all is ready, at once where that is asked for", () => {
  const { marks, ...given } = task({ slotCount: 100, everything: true });
  preparePages(given, () => 0);
  expect(marks[PAGES_READY]).toBe(100);
});

it("changes no byte of what is captured meanwhile", () => {
  const { marks, ...given } = task({ slotCount: 64, everything: true });
  const bytes = new Uint8Array(given.slots);
  for (let at = 0; at < bytes.length; at += 1021) bytes[at] = at % 255;
  const before = bytes.slice();
  preparePages(given, () => 0);
  expect(marks[PAGES_READY]).toBe(64);
  expect(Buffer.compare(bytes.slice(), before)).toBe(0);
});
