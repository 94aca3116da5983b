// Why a command that copies has ended. Of one that a signal ended: what has become of its targets, and of them alone.
import { statSync } from "node:fs";
import { systemName } from "../../file-names.js";
import { CowcatcherError } from "../../errors.js";
import { isNbdUri, isRbdAddress, NULL_TARGET, STDIO } from "../options/options.js";
import type { CommandContext } from "../output/context.js";

/** @param hint what has become of the targets, where their names do not tell */
export function interrupted(
  signal: string,
  { command }: Pick<CommandContext, "command">,
  targets: readonly string[],
  hint?: string,
): CowcatcherError {
  const hints =
    hint !== undefined ? [hint] : [...new Set(targets.map(remainsOf))].filter((hint) => hint !== undefined);
  return new CowcatcherError({
    code: "CANCELLED",
    object: command,
    problem: `interrupted by ${signal}`,
    hint: hints.length === 0 ? undefined : hints.join("; "),
  });
}

function remainsOf(target: string): string | undefined {
  if (target === NULL_TARGET) return undefined;
  if (target === STDIO) return "the reader of standard output has a part of the disk";
  if (isNbdUri(target)) return "the export holds a part of the copy";
  if (isRbdAddress(target)) return "the image holds a part of the copy";
  if (statSync(systemName(target), { throwIfNoEntry: false })?.isBlockDevice() === true) {
    return "the device holds a part of the copy";
  }
  return "the unfinished file was removed";
}

/** Of a group, the failure that cancelled the others, not their cancellation. */
export function firstCause(errors: readonly (CowcatcherError | undefined)[]): CowcatcherError | undefined {
  const present = errors.filter((error) => error !== undefined);
  return present.find(({ code }) => code !== "CANCELLED") ?? present[0];
}
