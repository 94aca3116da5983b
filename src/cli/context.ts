// What a command gets from the program around it, and the signatures of the commands that are loaded lazily.
import type { Logger } from "../log.js";
import type { BackupSettings, RestoreSettings } from "./backup-options.js";
import type { CommandName, InterruptSignal } from "./exit-codes.js";
import type { ServeSettings } from "./serve-options.js";

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
  readonly output: OutputSettings;
  /** Set by `onInterrupt` at the first signal; an error thrown afterwards exits with 129, 130 or 143. */
  interruptedBy: InterruptSignal | undefined;
}

/** Resolves to the exit code; throws CowcatcherError, which the program reports. */
export type RunBackup = (settings: BackupSettings, context: CommandContext) => Promise<number>;
export type RunRestore = (settings: RestoreSettings, context: CommandContext) => Promise<number>;
export type RunServe = (settings: ServeSettings, context: CommandContext) => Promise<number>;

export function printLine({ stdout }: OutputSettings, text: string): void {
  stdout.write(`${text}\n`);
}

/** One JSON document, indented as qemu-img's. */
export function printJsonDocument({ stdout }: OutputSettings, document: unknown): void {
  stdout.write(`${JSON.stringify(document, null, 4)}\n`);
}

/** One JSON object on a line of its own. */
export function printJsonLine({ stdout }: OutputSettings, message: object): void {
  stdout.write(`${JSON.stringify(message)}\n`);
}
