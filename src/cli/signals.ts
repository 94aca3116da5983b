// SIGINT and SIGTERM: the first asks for an end in good order, the second ends the process at once. SIGHUP asks, too,
// and never presses: when a terminal goes, the kernel and the shell may both send it. None of them asks for an end where
// the process was started with it ignored.
import { endProcess } from "../backup/copy/thread-boots.js";
import type { CommandContext } from "./output/context.js";
import { interruptExitCode, type InterruptSignal } from "./output/exit-codes.js";
import { isIgnored } from "./ignored-signals.js";

const SIGNALS: readonly InterruptSignal[] = ["SIGINT", "SIGTERM", "SIGHUP"];

/** A signal that came while the program was still loading, and whether such are kept. */
let early: InterruptSignal | undefined;
let isKeeping = false;
const keep = (signal: NodeJS.Signals): void => {
  if (!isIgnored(signal)) early ??= SIGNALS.find((known) => known === signal);
};

/**
 * From now on SIGINT and SIGTERM wait for `onInterrupt`, so that they end the program in good order however early they
 * come. For a command that is sure to call it.
 */
export function keepInterrupts(): void {
  isKeeping = true;
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, keep);
}

export interface InterruptHandlers {
  /** What SIGHUP does instead of asking for an end, even where it is ignored; undefined: it asks. */
  onHangUp?: (() => void) | undefined;
  /** Called once, at the first signal. What it throws ends the process, as it could not end in good order. */
  onFirst: (signal: InterruptSignal) => Promise<void> | void;
  /** Called at the second signal, just before the exit: must not wait (removing an unfinished target). */
  onSecond?: ((signal: InterruptSignal) => void) | undefined;
}

/** How the process ends; replaced in tests. */
export interface ExitPort {
  exit(code: number): void;
}

/**
 * Installs the handlers and notes the first signal in `context.interruptedBy`, so that the error which it causes
 * exits with 129, 130 or 143. Returns the function that removes them. Main thread only.
 */
export function onInterrupt(
  context: Pick<CommandContext, "interruptedBy" | "logger">,
  { onFirst, onSecond, onHangUp }: InterruptHandlers,
  port: ExitPort = { exit: endProcess },
): () => void {
  const endAtOnce = (signal: InterruptSignal): void => {
    onSecond?.(signal);
    port.exit(interruptExitCode(signal));
  };
  const listener = (signal: NodeJS.Signals): void => {
    if (signal !== "SIGINT" && signal !== "SIGTERM" && signal !== "SIGHUP") return;
    if (signal === "SIGHUP" && onHangUp !== undefined) {
      onHangUp();
      return;
    }
    if (isIgnored(signal)) return;
    if (context.interruptedBy !== undefined) {
      if (signal !== "SIGHUP") endAtOnce(signal);
      return;
    }
    context.interruptedBy = signal;
    // In a promise chain, so that a synchronous throw of the handler is dealt with as a rejection.
    void Promise.resolve(signal)
      .then(onFirst)
      .catch((cause: unknown) => {
        context.logger.error({ err: cause }, "cannot end in good order");
        endAtOnce(signal);
      });
  };
  for (const signal of SIGNALS) process.on(signal, listener);
  if (isKeeping) {
    isKeeping = false;
    for (const signal of SIGNALS) process.removeListener(signal, keep);
    if (early !== undefined) listener(early);
  }
  return () => {
    for (const signal of SIGNALS) process.removeListener(signal, listener);
  };
}
