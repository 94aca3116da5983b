// The log: pino's JSON lines, to stderr or to a file. It is for whoever looks into a failure; what a user must
// know goes through src/cli/report.ts and the progress views instead.
//
// The destination is synchronous, so that the last lines before a crash or an exit are not lost. At the default
// level next to nothing is written, and nothing on a guest's path logs at all.
import { pino, type Logger } from "pino";
import { ioError } from "./errors.js";
import type { LogLevel } from "./log-levels.js";

export type { Logger } from "pino";

export interface LogSettings {
  level: LogLevel;
  /** Appended to; undefined: stderr. */
  file?: string | undefined;
}

const STDERR_FD = 2;

/** @throws CowcatcherError IO or NOT_FOUND, naming the file, if it cannot be opened. */
export function createLogger({ level, file }: LogSettings): Logger {
  return pino({ name: "cowcatcher", level }, openDestination(file));
}

function openDestination(file: string | undefined): ReturnType<typeof pino.destination> {
  try {
    return pino.destination({ dest: file ?? STDERR_FD, sync: true });
  } catch (cause) {
    throw ioError("open the log", file ?? "stderr", cause);
  }
}
