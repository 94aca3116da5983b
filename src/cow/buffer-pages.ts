// The pages of the copy-before-write buffer are made ready ahead of the captures, by a thread of their own.
//
// Memory that nobody has touched yet has no pages. The first touch of each traps: into the kernel, and in a virtual
// machine once more into its host, 7 to 15 µs a page where the host has to find one. A capture of 32 KiB into such
// memory costs its guest write 0.1 ms instead of 5 µs. To touch all of a buffer of 1 GiB before T0 takes seconds, in
// which the backup does not begin; so it is done while the backup runs, and only as far ahead as captures have come
// lately.
//
//   slot 0 ............ fresh ............ ready ............ end of the buffer
//   given out already │  ready, unused   │  untouched
//                     [main]             [preparer]
//
// The allocator gives out slots that were used before any that was not, and those in ascending order (slots.ts), so two
// marks are enough. They stand in the two words below, which belong to the memory and stay with it from job to job:
// what is ready remains so. When captures overtake the preparer it goes on from where they are: those pages are touched.
//
// A page is made ready in two steps: MADV_POPULATE_WRITE fills the page tables for a piece at a time, which the kernel
// does ten times as fast as fault by fault; then each page is touched for the host's sake. The main thread may be
// capturing into a page at that moment: an atomic OR with 0 changes no byte, whoever else writes to it.

import { BLOCK_BYTES, SLOT_BYTES } from "./geometry.js";
import { libc } from "../native/libc.js";
import type { PageMemory } from "./page-memory.js";

/** [main] slots, from the first on, that the running job has given out at least once. */
export const PAGES_FRESH = 0;
/** [preparer] slots, from the first on, whose pages are there. */
export const PAGES_READY = 1;
/** [main] 1: the preparer is to end. */
export const PAGES_STOP = 2;
const PAGE_WORDS = 3;

/** Populated and touched at a time, before the marks are looked at again: some milliseconds at the worst. */
const PIECE_SLOTS = 32;
/** How far ahead at least: what a guest overwrites in 40 ms at 1.6 GB a second, twice as long as the preparer sleeps. */
const AHEAD_SLOTS_MIN = 1024;
const SLEEP_MS = 20;
/** "Lately": captures of this time are expected to come again. */
const LATELY_MS = 1000;

/** The marks of a new buffer, of which nothing is ready. */
export function newPageWords(): SharedArrayBuffer {
  return new SharedArrayBuffer(4 * PAGE_WORDS);
}

/** What the preparer is told: plain data for its thread. */
export interface PageTask {
  slots: PageMemory;
  words: SharedArrayBuffer;
  slotCount: number;
  /** All of it, whatever captures come (`serve --preallocate`). */
  everything: boolean;
  /** Of the thread; 0 leaves it as it is. */
  niceness: number;
}

/**
 * Keeps the pages ahead of the captures ready until all are, or PAGES_STOP is set. Blocks its thread, which is no
 * other's: never the main thread.
 * @param now milliseconds, of any origin
 * @param sleepMs how long it rests when it is far enough ahead; 0 in tests
 */
export function preparePages(
  { slots, words, slotCount, everything }: PageTask,
  now: () => number,
  sleepMs = SLEEP_MS,
): void {
  const marks = new Int32Array(words);
  const lately = new RecentGrowth(now);
  while (Atomics.load(marks, PAGES_STOP) === 0) {
    const fresh = Atomics.load(marks, PAGES_FRESH);
    const ready = Math.max(Atomics.load(marks, PAGES_READY), fresh);
    const ahead = everything ? slotCount : Math.max(AHEAD_SLOTS_MIN, lately.of(fresh));
    const goal = Math.min(slotCount, fresh + ahead);
    if (ready < goal) {
      const end = Math.min(ready + PIECE_SLOTS, slotCount);
      touchSlots(slots, ready, end);
      Atomics.store(marks, PAGES_READY, end);
    } else if (ready >= slotCount) {
      Atomics.store(marks, PAGES_READY, slotCount);
      return;
    } else {
      Atomics.wait(marks, PAGES_STOP, 0, sleepMs);
    }
  }
}

function touchSlots(bytes: Uint8Array, from: number, end: number): void {
  const start = from * SLOT_BYTES;
  const lengthBytes = (end - from) * SLOT_BYTES;
  // An older kernel than 5.14 refuses; the touch below does its work as well, fault by fault.
  libc?.populatePages(bytes.buffer, bytes.byteOffset + start, lengthBytes);
  for (let at = start; at < start + lengthBytes; at += BLOCK_BYTES) Atomics.or(bytes, at, 0);
}

/** How much a mark has grown in the last LATELY_MS, in steps of a tenth of that. */
class RecentGrowth {
  readonly #values: number[] = [];
  #lastMs: number;

  constructor(private readonly now: () => number) {
    this.#lastMs = now();
  }

  of(mark: number): number {
    const nowMs = this.now();
    if (this.#values.length === 0 || nowMs - this.#lastMs >= LATELY_MS / 10) {
      this.#lastMs = nowMs;
      this.#values.push(mark);
      if (this.#values.length > 10) this.#values.shift();
    }
    return mark - (this.#values[0] ?? mark);
  }
}
