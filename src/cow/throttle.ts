// --rate-limit: a schedule in shared memory. Each writer books the time that its bytes take, from the moment the
// last booking ends (or now, if that has passed), and sleeps until its own begins. So the long-run rate is the
// limit whatever the number of workers, and a pause is not made up for by a burst.
//
// Another limit begins a schedule of its own, and nothing may be booked in it at the old limit: a transfer at a byte
// a second would close the new schedule for days. So the main thread stores the limit first and the begin of the
// schedule second, each time another one; a writer loads them the other way round, and its compare-exchange fails
// where the schedule is no longer the one that its limit belongs to.

import { CNT_RATE_CHANGES, CNT_RATE_LIMIT, CNT_RATE_NEXT_NS } from "./shared.js";

const NS_PER_SECOND = 1_000_000_000n;

/** Main thread: bytes a second from now on; 0: no limit. Who sleeps for a booking must be woken by the caller. */
export function changeLimit(counters: BigInt64Array, bytesPerSecond: number): void {
  Atomics.store(counters, CNT_RATE_LIMIT, BigInt(Math.floor(bytesPerSecond)));
  // Before any time that a clock shows, and never the same twice.
  Atomics.store(counters, CNT_RATE_NEXT_NS, -1n - Atomics.add(counters, CNT_RATE_CHANGES, 1n));
}

/**
 * Books `lengthBytes` and returns the monotonic time (ns) at which they may be written; 0n for at once.
 * Any worker.
 */
export function bookTransfer(counters: BigInt64Array, lengthBytes: number, nowNs: bigint): bigint {
  for (;;) {
    const next = Atomics.load(counters, CNT_RATE_NEXT_NS);
    const limit = Atomics.load(counters, CNT_RATE_LIMIT);
    if (limit <= 0n) return 0n;
    const cost = (BigInt(lengthBytes) * NS_PER_SECOND) / limit;
    const start = next > nowNs ? next : nowNs;
    if (Atomics.compareExchange(counters, CNT_RATE_NEXT_NS, next, start + cost) === next) return start;
  }
}
