// Runs commands of the built program: their output and their exit code.
import { spawn } from "node:child_process";
import { constants } from "node:os";
import { resolve } from "node:path";
import { runKept } from "./kept-commands.js";

/** The compiled entry; COWCATCHER_BIN names another. */
export const COWCATCHER_BIN = resolve(process.env["COWCATCHER_BIN"] ?? "dist/src/cli/main.js");
const KEPT_COMMAND = resolve("dist/test/support/kept-command.js");

export interface RunOptions {
  cwd?: string;
  /** Added to the environment. */
  env?: Record<string, string>;
  /** What is written to its standard input, which is then closed. */
  input?: string;
}

export interface RunResult {
  /** 128 + the signal's number if a signal ended it, as in a shell. */
  code: number;
  stdout: string;
  stderr: string;
}

/** What the command prints and its exit code; in a process that stays for the next one, where nothing is against it. */
export function cowcatcher(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  const wantsItsOwn =
    process.env["COWCATCHER_BIN"] !== undefined ||
    options.env !== undefined ||
    options.input !== undefined ||
    !args.every(isText);
  if (wantsItsOwn) return cowcatcherProcess(args, options);
  return runKept(KEPT_COMMAND, { args, cwd: options.cwd ?? process.cwd() });
}

/** As a user runs it: a process of its own, from its start to its end. */
export function cowcatcherProcess(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  return run(process.execPath, [COWCATCHER_BIN, ...args], options);
}

/** Node makes U+FFFD of other bytes; start.ts asks the system for them. */
function isText(argument: string): boolean {
  return !argument.includes("\uFFFD");
}

/** Another program, such as qemu-img. */
export function run(program: string, args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  return new Promise((settle, reject) => {
    const child = spawn(program, args, { cwd: options.cwd, env: { ...process.env, ...options.env } });
    let stdout = "";
    let stderr = "";
    child.stdout.setEncoding("utf8").on("data", (text: string) => (stdout += text));
    child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
    child.on("error", reject);
    child.on("close", (code, signal) => {
      settle({ code: code ?? 128 + signalNumber(signal), stdout, stderr });
    });
    child.stdin.on("error", () => undefined);
    child.stdin.end(options.input ?? "");
  });
}

function signalNumber(signal: NodeJS.Signals | null): number {
  return signal === null ? 0 : (constants.signals[signal] ?? 0);
}
