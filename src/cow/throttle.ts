// --rate-limit: a schedule in shared memory. Each writer books the time that its bytes take, from the moment the
// last booking ends (or now, if that has passed), and sleeps until its own begins. So the long-run rate is the
// limit whatever the number of workers, and a pause is not made up for by a burst.

import { CNT_RATE_LIMIT, CNT_RATE_NEXT_NS } from "./shared.js";

const NS_PER_SECOND = 1_000_000_000n;

/**
 * Books `lengthBytes` and returns the monotonic time (ns) at which they may be written; 0n for at once.
 * Any worker.
 */
export function bookTransfer(counters: BigInt64Array, lengthBytes: number, nowNs: bigint): bigint {
  const limit = Atomics.load(counters, CNT_RATE_LIMIT);
  if (limit <= 0n) return 0n;
  const cost = (BigInt(lengthBytes) * NS_PER_SECOND) / limit;
  for (;;) {
    const next = Atomics.load(counters, CNT_RATE_NEXT_NS);
    const start = next > nowNs ? next : nowNs;
    if (Atomics.compareExchange(counters, CNT_RATE_NEXT_NS, next, start + cost) === next) return start;
  }
}
