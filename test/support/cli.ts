// Runs the built command as a user does: a process of its own, its output and its exit code.
import { spawn } from "node:child_process";
import { constants } from "node:os";
import { resolve } from "node:path";

/** The compiled entry; COWCATCHER_BIN names another. */
export const COWCATCHER_BIN = resolve(process.env["COWCATCHER_BIN"] ?? "dist/src/cli/main.js");

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

export function cowcatcher(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  return run(process.execPath, [COWCATCHER_BIN, ...args], options);
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
