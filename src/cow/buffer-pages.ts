// The mapped pages of a copy-before-write buffer (slot-memory.ts) are made ready ahead of the captures, by a thread of their own.
//
// Memory that nobody has touched yet has no pages, and the first touch of each traps. The mark below says how many slots, from
// the first on, have theirs; the allocator gives out no other as long as there is a slot elsewhere. It belongs to the memory and
// stays with it from job to job.
//
// A page is made ready in two steps: MADV_POPULATE_WRITE fills the page tables for a piece at a time, which the kernel
// does ten times as fast as fault by fault; then each page is touched for the host's sake. Nobody has slots behind the mark
// unless the buffer is full; an atomic OR with 0 changes no byte even then.

import { BLOCK_BYTES, SLOT_BYTES } from "./geometry.js";
import { libc } from "../native/libc.js";
import type { PageMemory } from "./page-memory.js";

/** [preparer] slots, from the first on, whose pages are there. */
export const PAGES_READY = 0;
/** [main] 1: the preparer is to end. */
export const PAGES_STOP = 1;
const PAGE_WORDS = 2;

/** Populated and touched at a time, before the marks are looked at again: some milliseconds at the worst. */
const PIECE_SLOTS = 32;

/** The marks of new memory, of which nothing is ready. */
export function newPageWords(): SharedArrayBuffer {
  return new SharedArrayBuffer(4 * PAGE_WORDS);
}

/** What the preparer is told: plain data for its thread. */
export interface PageTask {
  memory: PageMemory;
  words: SharedArrayBuffer;
  slotCount: number;
  /** Of the thread; 0 leaves it as it is. */
  niceness: number;
}

/** Makes the pages of the first `slotCount` slots ready, unless PAGES_STOP is set meanwhile. Never on the main thread. */
export function preparePages({ memory, words, slotCount }: PageTask): void {
  const marks = new Int32Array(words);
  for (let ready = Atomics.load(marks, PAGES_READY); ready < slotCount;) {
    if (Atomics.load(marks, PAGES_STOP) !== 0) return;
    const end = Math.min(ready + PIECE_SLOTS, slotCount);
    touchSlots(memory, ready, end);
    Atomics.store(marks, PAGES_READY, end);
    ready = end;
  }
}

function touchSlots(bytes: Uint8Array, from: number, end: number): void {
  const start = from * SLOT_BYTES;
  const lengthBytes = (end - from) * SLOT_BYTES;
  // An older kernel than 5.14 refuses; the touch below does its work as well, fault by fault.
  libc?.populatePages(bytes.buffer, bytes.byteOffset + start, lengthBytes);
  for (let at = start; at < start + lengthBytes; at += BLOCK_BYTES) Atomics.or(bytes, at, 0);
}
