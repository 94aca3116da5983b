// How an error reaches the user: one line on stderr, its stack in the log at debug level, and, with --json, an
// object on stdout as well.
import { printableName } from "../../file-names.js";
import type { CowcatcherError } from "../../errors.js";
import type { Logger } from "../../log.js";
import { printJsonLine, type OutputSettings } from "./context.js";

export interface ErrorMessage {
  message_type: "error";
  /** RFC 3339, UTC. */
  time: string;
  error: {
    code: string;
    object: string;
    problem: string;
    hint: string | null;
    /** Byte offset in the object. */
    offset: number | null;
    errno: string | null;
    message: string;
  };
}

/** "cowcatcher: OBJECT: what is wrong (what to do)", always one line, whatever a file's name holds. */
export function errorLine(error: CowcatcherError): string {
  // What is about no object is about the program.
  const text = error.message.replace(/^cowcatcher: /, "");
  return `cowcatcher: ${onOneLine(text)}`;
}

export function errorMessage(error: CowcatcherError): ErrorMessage {
  return {
    message_type: "error",
    time: new Date().toISOString(),
    error: {
      code: error.code,
      object: error.object,
      problem: error.problem,
      hint: error.hint ?? null,
      offset: error.offsetBytes ?? null,
      errno: error.errno ?? null,
      message: error.message,
    },
  };
}

export function reportError(
  error: CowcatcherError,
  output: OutputSettings,
  logger: Pick<Logger, "debug"> | undefined,
): void {
  output.stderr.write(`${errorLine(error)}\n`);
  if (output.json) printJsonLine(output, errorMessage(error));
  logger?.debug({ err: error }, "stack of the error that was reported");
}

/** For what is no failure, yet not as the user will want it. One line on stderr; --quiet leaves it out. */
export function warn({ quiet, stderr }: OutputSettings, text: string): void {
  if (!quiet) stderr.write(`cowcatcher: warning: ${onOneLine(text)}\n`);
}

/** Control characters, of which a file's name may have any, would break the line or drive the terminal. */
function onOneLine(text: string): string {
  return printableName(text)
    .replace(/\s*[\r\n]+\s*/g, " ")
    .replace(/[\u0000-\u001f\u007f-\u009f]/g, "?");
}
