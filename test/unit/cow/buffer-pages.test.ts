// The preparer makes the mapped slots' pages ready, in order and until it is told to stop, and changes no byte.
import { expect, it } from "vitest";
import {
  newPageWords,
  PAGES_READY,
  PAGES_STOP,
  preparePages,
  type PageTask,
} from "../../../src/cow/buffer-pages.js";
import { SLOT_BYTES } from "../../../src/cow/geometry.js";
import { allocatePages } from "../../../src/cow/page-memory.js";

function task(slotCount: number): PageTask & { marks: Int32Array } {
  const words = newPageWords();
  const memory = allocatePages(slotCount * SLOT_BYTES, "test");
  return { memory, words, slotCount, niceness: 0, marks: new Int32Array(words) };
}

it("ends when all is ready, and goes on where the last one was stopped", () => {
  const { marks, ...given } = task(100);
  Atomics.store(marks, PAGES_STOP, 1);
  preparePages(given);
  expect(marks[PAGES_READY]).toBe(0);
  Atomics.store(marks, PAGES_STOP, 0);
  Atomics.store(marks, PAGES_READY, 50);
  preparePages(given);
  expect(marks[PAGES_READY]).toBe(100);
});

it("changes no byte of what is captured meanwhile", () => {
  const { marks, ...given } = task(64);
  const bytes = given.memory;
  for (let at = 0; at < bytes.length; at += 1021) bytes[at] = at % 255;
  const before = bytes.slice();
  preparePages(given);
  expect(marks[PAGES_READY]).toBe(64);
  expect(Buffer.compare(bytes.slice(), before)).toBe(0);
});
