#!/usr/bin/env node
// The entry: streams, last resorts and the end of the process.
import { ioError, toCowcatcherError } from "../errors.js";
import type { CommandContext } from "./output/context.js";
import { EXIT } from "./output/exit-codes.js";
import { OFFLINE_WORKER_COUNT } from "../backup/options.js";
import { endProcess, mayEndProcess } from "../backup/copy/thread-boots.js";
import { errorLine, reportError } from "./output/report.js";
import { keepInterrupts } from "./signals.js";

// Node starts its debugger at SIGUSR1 unless someone listens; here the signal asks for a line of progress.
process.on("SIGUSR1", () => undefined);

// Meant for nobody here: a guest's disk does not go away by it.
process.on("SIGUSR2", () => undefined);

// A reader that has seen enough (`| head`) is no error of ours, and no reason to stop a backup.
process.stderr.on("error", () => undefined);
let lostOutput: Error | undefined;
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") lostOutput ??= error;
});

let context: CommandContext | undefined;

process.on("uncaughtException", (thrown: unknown) => {
  const error = toCowcatcherError(thrown);
  if (context === undefined) process.stderr.write(`${errorLine(error)}\n`);
  else reportError(error, context.output, context.logger);
  endProcess(EXIT.failed);
});

const argv = process.argv.slice(2);
if (argv[0] === "serve") {
  // The command's own handler takes over when it is loaded.
  process.on("SIGHUP", () => undefined);
  keepInterrupts();
}
if (isOfflineCopy(argv)) {
  const { startCopyPoolEarly } = await import("../backup/copy/pool.js");
  startCopyPoolEarly(OFFLINE_WORKER_COUNT);
}
const { runProgram } = await import("./program.js");
const exitCode = await runProgram(argv, {
  stdout: process.stdout,
  stderr: process.stderr,
  environment: process.env,
  onContext: (made) => {
    context = made;
  },
});
await new Promise<void>((resolve) => {
  process.stdout.write("", () => {
    resolve();
  });
});
await mayEndProcess();
if (lostOutput === undefined || exitCode !== EXIT.done) endProcess(exitCode);
process.stderr.write(`${errorLine(ioError("write", "standard output", lostOutput))}\n`);
endProcess(EXIT.failed);

/** By the look of it: what is guessed wrong costs some milliseconds, no more. */
function isOfflineCopy([command, ...rest]: readonly string[]): boolean {
  const OTHERWISE = /^(--control|--dry-run|--workers|--help|-w|-h)/;
  return (command === "backup" || command === "restore") && !rest.some((word) => OTHERWISE.test(word));
}
