// The clock that backups have their names from.

/** Two clocks that differ by more have been set apart. */
const CLOCKS_APART_MS = 2;

/**
 * Nanoseconds since 1970 UTC, in whole microseconds. The finer clock counts from the process's start, and does not follow
 * when the system's clock is set.
 */
export function nowNs(): bigint {
  const wallMs = Date.now();
  const fineMs = performance.timeOrigin + performance.now();
  const nowMs = Math.abs(fineMs - wallMs) < CLOCKS_APART_MS ? fineMs : wallMs;
  return BigInt(Math.floor(nowMs * 1000)) * 1000n;
}
