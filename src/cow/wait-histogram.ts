// How long guest writes waited, counted by ranges: what a longest wait and a sum cannot tell apart (one stall of a second,
// or a thousand waits of a millisecond). Only writes that waited are counted, so that the path of the others has no cost.

/** Upper ends of the ranges in seconds, each included; a last range has all that waited longer. */
export const WAIT_BOUNDS_SECONDS = [
  0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
] as const;

const MS = 1000;

/** Of no wait. */
export function noWaits(): number[] {
  return new Array<number>(WAIT_BOUNDS_SECONDS.length + 1).fill(0);
}

/** @param counts as of noWaits: one for each bound, and one for what is beyond the last. Changed. */
export function countWait(counts: number[], ms: number): void {
  const found = WAIT_BOUNDS_SECONDS.findIndex((bound) => ms <= bound * MS);
  const range = found < 0 ? WAIT_BOUNDS_SECONDS.length : found;
  counts[range] = (counts[range] ?? 0) + 1;
}
