// Addresses of JavaScript's memory, for libraries that take pointers.
//
// The bytes of an ArrayBuffer or SharedArrayBuffer never move, so the address is looked up once a buffer. (A typed
// array of a few bytes without a buffer of its own would move: make the buffer first.) Whoever hands an address to a
// library that keeps it keeps the buffer as well.

import { loadKoffi } from "./koffi.js";

const addresses = new WeakMap<ArrayBufferLike, number>();

/** @throws where koffi is missing. */
export function addressOf(buffer: ArrayBufferLike): number {
  let address = addresses.get(buffer);
  if (address === undefined) {
    address = Number(loadKoffi().address(new Uint8Array(buffer, 0, Math.min(buffer.byteLength, 1))));
    addresses.set(buffer, address);
  }
  return address;
}
