// Memory that begins at a page, which O_DIRECT needs: a part of a plain buffer. Where that part begins takes the
// buffer's address, so it takes koffi. Without it a WebAssembly memory does, which begins at a page as well, but
// reserves 10 GiB of addresses each: more than a limit as of `ulimit -v` allows. Where that fails, too, the memory begins
// anywhere, and O_DIRECT is refused.
//
// The kernel gives pages as they are touched: until then even a large buffer costs addresses alone.

import { addressOf } from "./addresses.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

/** The largest page of the kernels that Node runs on; O_DIRECT's blocks are no larger than any page. */
export const PAGE_ALIGNMENT_BYTES = 4096;
const WASM_PAGE_BYTES = 65536;

const knowsAddresses = optionalLibrary(loadKoffi);

/** Zeroes. Sent to another thread they stay shared. @throws RangeError when the system has no room. Any thread. */
export function sharedPages(lengthBytes: number): Uint8Array<SharedArrayBuffer> {
  if (knowsAddresses() === null) {
    const buffer = wasmMemory(lengthBytes, true);
    if (buffer instanceof SharedArrayBuffer) return new Uint8Array(buffer, 0, lengthBytes);
  }
  return alignedPart(new SharedArrayBuffer(lengthBytes + PAGE_ALIGNMENT_BYTES), lengthBytes);
}

/** The same for one thread alone: copying to and from shared memory is slow. @throws RangeError */
export function pages(lengthBytes: number): Uint8Array<ArrayBuffer> {
  if (knowsAddresses() === null) {
    const buffer = wasmMemory(lengthBytes, false);
    if (buffer instanceof ArrayBuffer) return new Uint8Array(buffer, 0, lengthBytes);
  }
  return alignedPart(new ArrayBuffer(lengthBytes + PAGE_ALIGNMENT_BYTES), lengthBytes);
}

/**
 * Whether that byte of the buffer begins a page. Without koffi only what sharedPages gave is known to: a guess that is
 * wrong costs one refused call.
 */
export function beginsPage(buffer: ArrayBufferLike, offset: number): boolean {
  const address = knowsAddresses() === null ? 0 : addressOf(buffer);
  const isKnown = address !== 0 || buffer instanceof SharedArrayBuffer;
  return isKnown && (address + offset) % PAGE_ALIGNMENT_BYTES === 0;
}

function alignedPart<T extends ArrayBufferLike>(buffer: T, lengthBytes: number): Uint8Array<T> {
  const beyond = knowsAddresses() === null ? 0 : addressOf(buffer) % PAGE_ALIGNMENT_BYTES;
  return new Uint8Array(buffer, beyond === 0 ? 0 : PAGE_ALIGNMENT_BYTES - beyond, lengthBytes);
}

function wasmMemory(lengthBytes: number, shared: boolean): ArrayBufferLike | undefined {
  const count = Math.max(1, Math.ceil(lengthBytes / WASM_PAGE_BYTES));
  try {
    return new WebAssembly.Memory({ initial: count, maximum: count, shared }).buffer;
  } catch {
    return undefined;
  }
}
