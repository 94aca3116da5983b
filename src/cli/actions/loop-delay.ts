// How long the event loop was held up, for the log at debug level: what a guest's request waits for in this process
// before anyone looks at it. Off otherwise, as the measuring takes a timer a millisecond.

import { monitorEventLoopDelay } from "node:perf_hooks";
import type { Logger } from "../../log.js";

/** A shorter hold-up than this cannot be seen. */
const RESOLUTION_MS = 1;
const REPORT_MS = 1000;

/** Message of the log lines; their `max_ms` and `p99_ms` are of the time since the line before. */
export const LOOP_DELAY_MESSAGE = "event loop delay";

/** Logs the delays of each second, and those of the last part of one at the end. Returns the function that ends it. */
export function logLoopDelay(logger: Pick<Logger, "debug" | "isLevelEnabled">): () => void {
  if (!logger.isLevelEnabled("debug")) return () => undefined;
  const delays = monitorEventLoopDelay({ resolution: RESOLUTION_MS });
  const report = (): void => {
    // The histogram holds the times between two ticks of its timer, the timer's own period included.
    const toMs = (nanoseconds: number): number => Math.max(0, nanoseconds / 1e6 - RESOLUTION_MS);
    if (delays.count > 0) {
      logger.debug({ max_ms: toMs(delays.max), p99_ms: toMs(delays.percentile(99)) }, LOOP_DELAY_MESSAGE);
    }
    delays.reset();
  };
  delays.enable();
  const timer = setInterval(report, REPORT_MS);
  timer.unref();
  return () => {
    clearInterval(timer);
    report();
    delays.disable();
  };
}
