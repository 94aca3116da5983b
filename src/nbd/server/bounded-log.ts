// A log that clients cannot fill. What they do wrong is worth a line; ten thousand of them a second would fill the disk
// and hold up the main thread, which writes the log. Beyond so many lines in a stretch of time warnings go to the debug
// level, and the next line that is written says how many did.

import type { NbdLogger } from "./export.js";

/** Warnings in one stretch. */
export const MAX_WARNINGS = 20;
export const STRETCH_MS = 10_000;

/** @param nowMs a clock that never goes back; replaced in tests */
export function boundedLog(logger: NbdLogger, nowMs: () => number = () => performance.now()): NbdLogger {
  let stretchStartMs = -Infinity;
  let warningCount = 0;
  let leftOutCount = 0;
  return {
    debug: (fields, message) => logger.debug(fields, message),
    info: (fields, message) => logger.info(fields, message),
    error: (fields, message) => logger.error(fields, message),
    warn(fields, message) {
      if (nowMs() - stretchStartMs >= STRETCH_MS) {
        if (leftOutCount > 0) logger.warn({ count: leftOutCount }, "warnings about clients were left out");
        stretchStartMs = nowMs();
        warningCount = 0;
        leftOutCount = 0;
      }
      if (++warningCount <= MAX_WARNINGS) return logger.warn(fields, message);
      leftOutCount++;
      logger.debug(fields, message);
    },
  };
}
