// What a command gets from the program around it.
import { printableName } from "../../file-names.js";
import type { Logger } from "../../log.js";
import type { CommandName, InterruptSignal } from "./exit-codes.js";

export type Environment = Record<string, string | undefined>;

/** A place to write text: process.stdout and process.stderr, or a string in tests. */
export interface TextOutput {
  write(text: string): unknown;
  readonly isTTY?: boolean | undefined;
  readonly columns?: number | undefined;
}

export interface OutputSettings {
  json: boolean;
  /** Nothing but errors, and what was asked for itself (a JSON document, the lines of `info`, `map`, …). */
  quiet: boolean;
  /** --progress: true, --no-progress: false, neither: undefined (bars on a terminal only). */
  progress: boolean | undefined;
  stdout: TextOutput;
  stderr: TextOutput;
}

export interface CommandContext {
  readonly command: CommandName;
  readonly logger: Logger;
  /** See `Log`. */
  readonly reopenLog: () => void;
  output: OutputSettings;
  /** Set by `onInterrupt` at the first signal; an error thrown afterwards exits with 129, 130 or 143. */
  interruptedBy: InterruptSignal | undefined;
}

/** Standard output carries a disk: what else would go there goes to standard error. */
export function keepStdoutForData(context: Pick<CommandContext, "output">): void {
  context.output = { ...context.output, stdout: context.output.stderr };
}

export function printLine({ stdout }: OutputSettings, text: string): void {
  stdout.write(`${printableName(text)}\n`);
}

/** One JSON document, indented as qemu-img's. */
export function printJsonDocument({ stdout }: OutputSettings, document: unknown): void {
  stdout.write(`${JSON.stringify(document, null, 4)}\n`);
}

/** One JSON object on a line of its own. */
export function printJsonLine({ stdout }: OutputSettings, message: object): void {
  stdout.write(`${JSON.stringify(message)}\n`);
}
