// Page-aligned shared memory. A WebAssembly memory's buffer is a SharedArrayBuffer that begins at a page, which
// O_DIRECT needs; a plain SharedArrayBuffer does not. The engine reserves it and the kernel gives pages as they
// are touched.

import { CowcatcherError } from "../errors.js";
import { GiB, KiB } from "../units.js";

const WASM_PAGE_BYTES = 64 * KiB;
/** A WebAssembly memory has at most 65,536 pages. */
export const MAX_PAGE_MEMORY_BYTES = 4 * GiB;

const kept: SharedArrayBuffer[] = [];

/**
 * Memory of this thread for its tasks one after another: at least `lengthBytes` of whatever the last one left, the same
 * each time for the same `index`. To the collector a page memory weighs nothing, so one a task would stay for long.
 * @throws CowcatcherError LIMIT
 */
export function keptPages(index: number, lengthBytes: number, object: string): Uint8Array {
  let memory = kept[index];
  if (memory === undefined || memory.byteLength < lengthBytes) {
    memory = allocatePages(lengthBytes, object);
    kept[index] = memory;
  }
  return new Uint8Array(memory);
}

/**
 * @param lengthBytes rounded up to 64 KiB.
 * @throws CowcatcherError LIMIT over 4 GiB or when the system has no room for it.
 */
export function allocatePages(lengthBytes: number, object: string): SharedArrayBuffer {
  const pages = Math.max(1, Math.ceil(lengthBytes / WASM_PAGE_BYTES));
  try {
    if (lengthBytes > MAX_PAGE_MEMORY_BYTES) throw new RangeError("over 4 GiB");
    return new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true }).buffer;
  } catch (cause) {
    throw new CowcatcherError({
      code: "LIMIT",
      object,
      problem: `${lengthBytes} bytes of buffer cannot be allocated`,
      hint: "4G is the most; give less",
      cause,
    });
  }
}
