// The log: pino's JSON lines, to stderr or to a file. It is for whoever looks into a failure; what a user must
// know goes through src/cli/output/report.ts and the progress views instead.
//
// The destination is synchronous, so that the last lines before a crash or an exit are not lost. At the default
// level next to nothing is written, and nothing on a guest's path logs at all.
//
// pino is loaded for the first line that is to be written, unless a file was named: most runs write none, and its
// twenty-five modules would take longer to load than a small image to copy.
import { createRequire } from "node:module";
import type { Logger as PinoLogger, LogFn } from "pino";
import { ioError } from "./errors.js";
import { absoluteName } from "./file-names.js";
import { LOG_LEVELS, type LogLevel } from "./log-levels.js";

/** The levels that the program logs at. */
type LogMethod = "error" | "warn" | "info" | "debug";

export interface Logger extends Pick<PinoLogger, LogMethod> {
  isLevelEnabled(level: LogLevel): boolean;
}

export interface Log {
  readonly logger: Logger;
  /**
   * Opens the log's file anew, as whoever rotates logs has given its name to another one. Where that fails the old file
   * is written on, and says so. A log to stderr has no name. Main thread.
   */
  readonly reopen: () => void;
}

export interface LogSettings {
  level: LogLevel;
  /** Appended to; undefined: stderr. */
  file?: string | undefined;
}

const STDERR_FD = 2;
/** What a log that cannot be written may hold back; more is dropped. */
const MAX_UNWRITTEN_BYTES = 1024 * 1024;

/** @throws CowcatcherError IO or NOT_FOUND, naming the file, if it cannot be opened. */
export function createLog({ level, file }: LogSettings): Log {
  let opened = file === undefined ? undefined : openLogger(level, file);
  const isLevelEnabled = (asked: LogLevel): boolean => LOG_LEVELS.indexOf(asked) >= LOG_LEVELS.indexOf(level);
  const methodOf = (method: LogMethod): LogFn => {
    if (!isLevelEnabled(method)) return () => undefined;
    return (...line: Parameters<LogFn>) => {
      try {
        opened ??= openLogger(level, undefined);
      } catch {
        // No descriptor is left to load pino with. What the line is about goes on, or is reported by others.
        return;
      }
      opened.logger[method](...line);
    };
  };
  const logger: Logger = {
    error: methodOf("error"),
    warn: methodOf("warn"),
    info: methodOf("info"),
    debug: methodOf("debug"),
    isLevelEnabled,
  };
  const reopen = (): void => {
    if (file === undefined) return;
    try {
      const old = opened;
      opened = openLogger(level, absoluteName(file));
      old?.end();
    } catch (error) {
      logger.error({ err: error }, "the log cannot be opened anew");
    }
  };
  return { logger, reopen };
}

interface OpenLogger {
  readonly logger: PinoLogger;
  /** Closes its file. */
  end(): void;
}

function openLogger(level: LogLevel, file: string | undefined): OpenLogger {
  const { pino } = createRequire(import.meta.url)("pino") as typeof import("pino");
  try {
    const destination = pino.destination({
      dest: file ?? STDERR_FD,
      sync: true,
      maxLength: MAX_UNWRITTEN_BYTES,
    });
    // A log that cannot be written, its disk being full or its reader gone, must not end what it is about.
    destination.on("error", () => undefined);
    return { logger: pino({ name: "cowcatcher", level }, destination), end: () => destination.end() };
  } catch (cause) {
    throw ioError("open the log", file ?? "stderr", cause);
  }
}
