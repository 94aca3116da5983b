// The program around the commands: parses the arguments, gives the command its context, reports what it throws
// and says which exit code that is. Nothing here ends the process.
import { Command } from "commander";
import { hasProtocol } from "../image/backing-name.js";
import { isTextName } from "../file-names.js";
import { DEFAULT_LOG_LEVEL } from "../log-levels.js";
import { addCommands } from "./commands/all.js";
import type { CommonFlags } from "./commands/definition.js";
import type { CommandContext, OutputSettings, TextOutput } from "./output/context.js";
import {
  COMMAND_NAMES,
  EXIT,
  exitCodeOfError,
  interruptExitCode,
  type CommandName,
} from "./output/exit-codes.js";
import { reportError, warn } from "./output/report.js";
import { withLockHolder } from "./output/lock-holder.js";
import type { Environment } from "./output/context.js";
import { asReportedError, isFinishedRequest } from "./options/usage-errors.js";
import { STDIO, usageError } from "./options/options.js";
import { packageVersion } from "./version.js";

export interface ProgramIo {
  stdout: TextOutput;
  stderr: TextOutput;
  environment: Environment;
  /** Told of the command's context, for errors that escape the command. */
  onContext?: ((context: CommandContext) => void) | undefined;
}

/** What is known so far of the command that runs. */
interface Session {
  context: CommandContext | undefined;
  exitCode: number;
}

/** Runs `cowcatcher ARGV…` and resolves to its exit code. Never rejects. */
export async function runProgram(argv: readonly string[], io: ProgramIo): Promise<number> {
  const session: Session = { context: undefined, exitCode: EXIT.done };
  const asked = COMMAND_NAMES.find((name) => name === argv[0]);
  try {
    const program = await buildProgram(io, session, asked);
    await program.parseAsync(argv, { from: "user" });
    return session.exitCode;
  } catch (thrown) {
    if (isFinishedRequest(thrown)) return EXIT.done;
    return fail(thrown, argv, io, session);
  }
}

/** Commands whose arguments are files that this process opens itself, as names of any bytes (file-names.ts). */
const TAKES_BYTES: ReadonlySet<string> = new Set([
  ...["backup", "restore", "info", "map", "check", "compare", "create"],
]);
/** With these, files are named to another process, in JSON, or in a repository, as text. */
const TAKES_TEXT = ["control", "qmp", "libvirt", "repo"] as const;

/**
 * Bytes that are not UTF-8 are a file's name, and only where it goes to the system as it is. Elsewhere (sockets,
 * URIs, what is written down as text) Node would make U+FFFD of them: such a name would lead to another file, or make
 * one.
 */
function refuseBytes(command: Command): void {
  const { backingFile, ...options } = command.opts<Record<string, unknown>>();
  const isFile = TAKES_BYTES.has(command.name()) && TAKES_TEXT.every((name) => options[name] === undefined);
  const names = [...command.args, ...[backingFile].flat()];
  const others = Object.values(options).flat();
  const wrong = [...names.filter((name) => !isFile || !isPlainPath(name)), ...others].find(
    (value) => typeof value === "string" && (!isTextName(value) || value.includes("\uFFFD")),
  );
  if (typeof wrong === "string") {
    throw usageError(wrong, "is not UTF-8", "rename the file, or make a link to it");
  }
}

function isPlainPath(name: unknown): boolean {
  return typeof name !== "string" || !(hasProtocol(name) || name.includes("::") || name.includes("\uFFFD"));
}

async function buildProgram(
  io: ProgramIo,
  session: Session,
  asked: CommandName | undefined,
): Promise<Command> {
  const program = new Command("cowcatcher")
    .description("Point-in-time backups of virtual-machine disks that the running guest hardly notices")
    .version(packageVersion(), "-V, --version", "print the version")
    .helpOption("-h, --help", "print this help")
    // Descriptions name the defaults; commander would add its own form of them.
    .configureHelp({ optionDescription: ({ description }) => description })
    .exitOverride()
    .configureOutput({
      writeOut: (text) => io.stdout.write(text),
      // commander's complaints are reported in this program's own form.
      writeErr: () => undefined,
      outputError: () => undefined,
    });
  const run = async (
    command: CommandName,
    flags: CommonFlags,
    body: (context: CommandContext) => Promise<number>,
  ): Promise<void> => {
    session.context = await makeContext(command, flags, io);
    io.onContext?.(session.context);
    const isClient = command === "backup" && "control" in flags;
    if (OPENS_IMAGES.has(command) && !isClient) await warnWithoutNative(session.context);
    session.exitCode = await body(session.context);
  };
  await addCommands(program, run, io.environment, asked);
  program.hook("preAction", (_, command) => {
    refuseBytes(command);
  });
  return program;
}

/** Commands for which it matters that there are no locks; the others only read, or open nothing. */
const OPENS_IMAGES: ReadonlySet<CommandName> = new Set(["backup", "restore", "serve", "check", "create"]);

async function warnWithoutNative({ output, logger }: CommandContext): Promise<void> {
  const { missingKoffi } = await import("../native/koffi.js");
  const reason = missingKoffi();
  if (reason === undefined) return;
  logger.debug({ err: reason }, "koffi cannot be loaded");
  warn(
    output,
    "native calls are missing (the package koffi cannot be loaded): images are not locked against other programs, " +
      "and all is slower; install the package anew",
  );
}

async function makeContext(command: CommandName, flags: CommonFlags, io: ProgramIo): Promise<CommandContext> {
  const { createLog } = await import("../log.js");
  const log = createLog({ level: flags.logLevel ?? DEFAULT_LOG_LEVEL, file: flags.logFile });
  const output: OutputSettings = {
    json: flags.json ?? false,
    quiet: flags.quiet ?? false,
    progress: flags.progress,
    stdout: io.stdout,
    stderr: io.stderr,
  };
  return { command, logger: log.logger, reopenLog: log.reopen, output, interruptedBy: undefined };
}

function fail(thrown: unknown, argv: readonly string[], io: ProgramIo, { context }: Session): number {
  const command = context?.command ?? COMMAND_NAMES.find((name) => name === argv[0]);
  const error = withLockHolder(asReportedError(thrown, command), command);
  reportError(error, context?.output ?? earlyOutput(argv, io), context?.logger);
  if (context?.interruptedBy !== undefined) return interruptExitCode(context.interruptedBy);
  return exitCodeOfError(command, error);
}

/** For an error that came before the options were parsed. */
function earlyOutput(argv: readonly string[], { stdout, stderr }: ProgramIo): OutputSettings {
  const end = argv.indexOf("--");
  const json = (end < 0 ? argv : argv.slice(0, end)).includes("--json");
  // Whoever reads a disk from there must not take this for a part of it.
  const isForData = argv.includes(STDIO);
  return { json, quiet: false, progress: undefined, stdout: isForData ? stderr : stdout, stderr };
}
