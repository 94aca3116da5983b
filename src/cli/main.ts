#!/usr/bin/env node
// The entry: streams, last resorts and the end of the process.
import { toCowcatcherError } from "../errors.js";
import type { CommandContext } from "./context.js";
import { EXIT } from "./exit-codes.js";
import { runProgram } from "./program.js";
import { errorLine, reportError } from "./report.js";

// Node starts its debugger at SIGUSR1 unless someone listens; here the signal asks for a line of progress.
process.on("SIGUSR1", () => undefined);

// A reader that has seen enough (`| head`) is no error of ours, and no reason to stop a backup.
for (const stream of [process.stdout, process.stderr]) {
  stream.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE") process.exitCode = EXIT.failed;
  });
}

let context: CommandContext | undefined;

process.on("uncaughtException", (thrown: unknown) => {
  const error = toCowcatcherError(thrown);
  if (context === undefined) process.stderr.write(`${errorLine(error)}\n`);
  else reportError(error, context.output, context.logger);
  process.exit(EXIT.failed);
});

const exitCode = await runProgram(process.argv.slice(2), {
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
process.exit(exitCode);
