// Page-aligned shared memory: of copy-before-write buffers, and of the buffers that workers read and write with.

import { CowcatcherError } from "../errors.js";
import { sharedPages } from "../native/pages.js";
import { MAX_PAGE_MEMORY_BYTES } from "./buffer-limit.js";
import { KiB, formatBytes, roundUp } from "../units.js";

const UNIT_BYTES = 64 * KiB;

/** A part of a buffer that begins at a page; nothing of it is touched yet. Sent to another thread it stays shared. */
export type PageMemory = Uint8Array<SharedArrayBuffer>;

const kept: PageMemory[] = [];

/**
 * Memory of this thread for its tasks one after another: at least `lengthBytes` of whatever the last one left, the same
 * each time for the same `index`. To the collector a shared buffer weighs nothing, so one a task would stay for long.
 * @throws CowcatcherError LIMIT
 */
export function keptPages(index: number, lengthBytes: number, object: string): PageMemory {
  let memory = kept[index];
  if (memory === undefined || memory.length < lengthBytes) {
    memory = allocatePages(lengthBytes, object);
    kept[index] = memory;
  }
  return memory;
}

/**
 * Zeroes.
 * @param lengthBytes rounded up to 64 KiB.
 * @throws CowcatcherError LIMIT over 4 GiB, or when the process can have no more.
 */
export function allocatePages(lengthBytes: number, object: string): PageMemory {
  if (lengthBytes > MAX_PAGE_MEMORY_BYTES) {
    throw new CowcatcherError({
      code: "LIMIT",
      object,
      problem: `${formatBytes(lengthBytes)} of buffer is more than ${formatBytes(MAX_PAGE_MEMORY_BYTES)}`,
      hint: "give less",
    });
  }
  const wholeBytes = Math.max(UNIT_BYTES, roundUp(lengthBytes, UNIT_BYTES));
  try {
    return sharedPages(wholeBytes);
  } catch (cause) {
    throw new CowcatcherError({
      code: "LIMIT",
      object,
      problem: `the system gives this process no ${formatBytes(wholeBytes)} of memory for a buffer`,
      hint: "see ulimit -v and the container's limits, or give less",
      cause,
    });
  }
}
