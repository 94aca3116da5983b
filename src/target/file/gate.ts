// Who may use the target's descriptors, and when they may be closed.
//
// Workers write through descriptors that the main thread owns. Were one closed while a worker writes, its number
// could name another file by then: the guest's disk, at worst. So a target is closed in two steps.
//
//   word 0  STATE      0 open, 1 closed; only the main thread changes it, once
//   word 1  IN_FLIGHT  writes that are between enterGate and leaveGate, on all workers
//
// A writer counts itself in, then looks at the state; the main thread sets the state, then looks at the count.
// Both are sequentially consistent, so either the writer sees "closed" and goes away, or the main thread sees the
// writer and leaves the descriptors open until it is gone. A worker that was terminated in the middle of a write
// never leaves: the descriptors stay open then, which costs two numbers and harms nobody.

import { CowcatcherError } from "../../errors.js";

const STATE = 0;
const IN_FLIGHT = 1;
/** Words that a gate takes at the start of a target's shared memory. */
export const GATE_WORDS = 2;

const CLOSED = 1;

/** Workers, before each use of a descriptor. @throws CowcatcherError CANCELLED once the target is closed. */
export function enterGate(words: Int32Array, name: string): void {
  Atomics.add(words, IN_FLIGHT, 1);
  if (Atomics.load(words, STATE) !== CLOSED) return;
  leaveGate(words);
  throw new CowcatcherError({ code: "CANCELLED", object: name, problem: "the target is closed" });
}

/** Workers, after each enterGate that returned. */
export function leaveGate(words: Int32Array): void {
  Atomics.sub(words, IN_FLIGHT, 1);
}

/** Main thread. No write starts from now on. @returns writes that are still in flight. */
export function closeGate(words: Int32Array): number {
  Atomics.store(words, STATE, CLOSED);
  return Atomics.load(words, IN_FLIGHT);
}

export function writesInFlight(words: Int32Array): number {
  return Atomics.load(words, IN_FLIGHT);
}
