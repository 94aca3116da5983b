// The program, from its start to its end: streams, last resorts and the end of the process. main.ts loads it.
import { ioError, toCowcatcherError } from "../errors.js";
import type { CommandContext } from "./output/context.js";
import { EXIT } from "./output/exit-codes.js";
import { OFFLINE_WORKER_COUNT } from "../backup/options.js";
import { endProcess, mayEndProcess } from "../backup/copy/thread-boots.js";
import { errorLine, reportError } from "./output/report.js";
import { keepInterrupts } from "./signals.js";
import { exactArguments, leaveWorkingFolder } from "../file-names.js";

let lostOutput: Error | undefined;
let context: CommandContext | undefined;

/** The one line about what went wrong is written, or the command is over. */
let isEnding = false;

/** Runs the command and ends the process; once. */
export async function start(): Promise<void> {
  listenForTheRest();
  try {
    process.cwd();
  } catch {
    leaveWorkingFolder();
  }
  const argv = exactArguments(process.argv.slice(2));
  if (argv[0] === "serve") {
    // The command's own handler takes over when it is loaded.
    process.on("SIGHUP", () => undefined);
    keepInterrupts();
  }
  if (needsCopyThreads(argv)) await startThreads(argv);
  const { runProgram } = await import("./program.js");
  const exitCode = await runProgram(argv, {
    stdout: process.stdout,
    stderr: process.stderr,
    environment: process.env,
    onContext: (made) => {
      context = made;
    },
  });
  const hasFailedBefore = isEnding;
  isEnding = true;
  await new Promise<void>((resolve) => {
    process.stdout.write("", () => {
      resolve();
    });
  });
  await mayEndProcess();
  if (hasFailedBefore) endProcess(EXIT.failed);
  if (lostOutput === undefined || exitCode !== EXIT.done) endProcess(exitCode);
  process.stderr.write(`${errorLine(ioError("write", "standard output", lostOutput))}\n`);
  endProcess(EXIT.failed);
}

/** Signals, streams and errors that nobody else listens to. */
function listenForTheRest(): void {
  // Node starts its debugger at SIGUSR1 unless someone listens; here the signal asks for a line of progress.
  process.on("SIGUSR1", () => undefined);

  // Meant for nobody here: a guest's disk does not go away by it.
  process.on("SIGUSR2", () => undefined);

  // A reader that has seen enough (`| head`) is no error of ours, and no reason to stop a backup.
  process.stderr.on("error", () => undefined);
  process.stdout.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE") lostOutput ??= error;
  });

  process.on("uncaughtException", (thrown: unknown) => {
    if (isEnding) return;
    isEnding = true;
    const error = toCowcatcherError(thrown);
    if (context === undefined) process.stderr.write(`${errorLine(error)}\n`);
    else reportError(error, context.output, context.logger);
    // In the next turn: threads that are being started are known then.
    setImmediate(() => void mayEndProcess().then(() => endProcess(EXIT.failed)));
  });
}

/** The one that opens an RBD image comes first: nothing can be copied until it has spoken to the cluster. */
async function startThreads(argv: readonly string[]): Promise<void> {
  if (argv.some((word) => word.startsWith("rbd:"))) {
    const { startKeeperEarly } = await import("../rbd/keeper.js");
    startKeeperEarly();
  }
  const { startCopyPoolEarly } = await import("../backup/copy/pool.js");
  startCopyPoolEarly(OFFLINE_WORKER_COUNT);
}

/**
 * Whether this is an offline copy that needs threads from its start on, by the look of it: what is guessed wrong costs some
 * milliseconds, no more. Others begin in this thread (backup/copy/here.ts).
 */
function needsCopyThreads([command, ...words]: readonly string[]): boolean {
  const OTHERWISE = /^(--control|--dry-run|--workers|--help|--qmp|--libvirt|--cleanup|-w|-h)/;
  const NEEDS_THREADS = /^(-c$|-c=|--compress|--direct|--repo)|:/;
  const isCopy = command === "backup" || command === "restore";
  const has = (pattern: RegExp): boolean => words.some((word) => pattern.test(word));
  return isCopy && has(NEEDS_THREADS) && !has(OTHERWISE);
}
