// Exit codes of a run: what its own errors mean, and after which codes a backup is tried again.
import type { CowcatcherError } from "../errors.js";

export const EXIT_IGNORED = 3;
const EXIT_LOCKED = 10;
export const EXIT_NO_BASIS = 12;
const EXIT_SNAPSHOT = 13;
export const EXIT_INTERRUPTED = 143;

/** Whether the same may go well the next time. */
export function mayGoBetter(exitCode: number): boolean {
  return exitCode === 1 || exitCode === EXIT_SNAPSHOT;
}

/** Of what a run finds out itself, without a command that says it. */
export function exitCodeOf({ code }: CowcatcherError): number {
  if (code === "LOCKED" || code === "BUSY") return EXIT_LOCKED;
  if (code === "NO_BASIS") return EXIT_NO_BASIS;
  if (code === "VERIFY") return 4;
  if (code === "KEY") return 11;
  return code === "USAGE" ? 2 : 1;
}
