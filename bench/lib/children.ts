// Child processes and scratch folders of the demo and the benchmarks, and their removal whatever happens.
//
// Everything that must not outlive the program is registered here: `cleanUp` ends the children (SIGTERM, after a
// grace period SIGKILL) and removes the folders; an exit that did not come through it kills and removes at once.

import { spawn, type ChildProcess, type SpawnOptions } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { constants, tmpdir } from "node:os";
import { join } from "node:path";
import { CowcatcherError, ioError } from "../../src/errors.js";

/** How long a child gets to end after SIGTERM. */
const GRACE_MS = 5_000;
/** Of a child's output, that much is kept for an error's text. */
const KEPT_OUTPUT_CHARACTERS = 1_000_000;
/** USER_HZ, the unit of the times in /proc/PID/stat: 100 on every Linux that Node runs on. */
const CLOCK_TICKS_PER_SECOND = 100;

const children = new Set<Child>();
const folders = new Set<string>();

process.on("exit", () => {
  for (const child of children) child.process.kill("SIGKILL");
  for (const folder of folders) removeFolder(folder);
});

export interface ChildResult {
  /** 128 + the signal's number if a signal ended it, as in a shell. */
  code: number;
  stdout: string;
  stderr: string;
}

/** With it any Node program reads certificates before it begins, 40 ms of a start that is none of ours. */
function withoutExtraCertificates(env: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  const { NODE_EXTRA_CA_CERTS: _unused, ...rest } = env;
  return rest;
}

export class Child {
  readonly process: ChildProcess;
  /** Settles when it has ended and its output is complete; never rejects once started. */
  readonly ended: Promise<ChildResult>;
  stdout = "";
  stderr = "";

  constructor(
    readonly name: string,
    program: string,
    args: readonly string[],
    options: SpawnOptions = {},
  ) {
    const env = withoutExtraCertificates(options.env ?? process.env);
    this.process = spawn(program, args, { stdio: ["ignore", "pipe", "pipe"], ...options, env });
    children.add(this);
    this.process.stdout?.setEncoding("utf8").on("data", (text: string) => {
      this.stdout = (this.stdout + text).slice(-KEPT_OUTPUT_CHARACTERS);
    });
    this.process.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.stderr = (this.stderr + text).slice(-KEPT_OUTPUT_CHARACTERS);
    });
    this.ended = new Promise((resolve) => {
      const end = (code: number): void => {
        children.delete(this);
        resolve({ code, stdout: this.stdout, stderr: this.stderr });
      };
      this.process.once("error", (cause) => {
        this.stderr += ioError("start", program, cause).message;
        end(127);
      });
      this.process.once("close", (code, signal) => end(code ?? 128 + signalNumber(signal)));
    });
  }

  /** SIGTERM, then SIGKILL; resolves when it has ended. */
  async stop(): Promise<ChildResult> {
    this.process.kill("SIGTERM");
    const timer = setTimeout(() => this.process.kill("SIGKILL"), GRACE_MS);
    const result = await this.ended;
    clearTimeout(timer);
    return result;
  }

  /** User and system time that it has used so far, in seconds; 0 where /proc does not say. */
  cpuSeconds(): number {
    try {
      // The second field, the program's name in brackets, may hold spaces.
      const stat = readFileSync(`/proc/${this.process.pid}/stat`, "utf8");
      const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
      return (Number(fields[11]) + Number(fields[12])) / CLOCK_TICKS_PER_SECOND;
    } catch {
      return 0;
    }
  }
}

/**
 * Waits until `probe` gives a value.
 * @throws CowcatcherError IO if the child ends first or `timeoutMs` pass.
 */
export async function waitForChild<T>(
  child: Child,
  what: string,
  probe: () => T | undefined | Promise<T | undefined>,
  timeoutMs = 15_000,
): Promise<T> {
  const deadline = Date.now() + timeoutMs;
  let hasEnded = false;
  void child.ended.then(() => {
    hasEnded = true;
  });
  for (;;) {
    const value = await probe();
    if (value !== undefined) return value;
    if (hasEnded) throw childError(child, `ended before ${what}`);
    if (Date.now() > deadline) throw childError(child, `no ${what} within ${timeoutMs / 1000} s`);
    await sleep(5);
  }
}

/** Runs a program to its end. @throws CowcatcherError IO with its last line of stderr unless it exits with 0. */
export async function runProgram(
  program: string,
  args: readonly string[],
  options: SpawnOptions = {},
): Promise<ChildResult> {
  const child = new Child(program, program, args, options);
  const result = await child.ended;
  if (result.code !== 0) throw childError(child, `exit code ${result.code}`);
  return result;
}

export function childError(child: Child, problem: string): CowcatcherError {
  const lastLine = child.stderr.trim().split("\n").at(-1) ?? "";
  return new CowcatcherError({
    code: "IO",
    object: child.name,
    problem: lastLine === "" ? problem : `${problem}: ${lastLine}`,
  });
}

/** A new folder in `parent`, removed at the end. */
export function scratchFolder(parent = tmpdir()): string {
  const folder = mkdtempSync(join(parent, "cowcatcher-"));
  folders.add(folder);
  return folder;
}

export function removeFolder(folder: string): void {
  rmSync(folder, { recursive: true, force: true });
  folders.delete(folder);
}

export async function cleanUp(): Promise<void> {
  await Promise.all([...children].map((child) => child.stop()));
  for (const folder of folders) removeFolder(folder);
}

/**
 * Runs a program's main function: SIGINT and SIGTERM clean up and exit with 130 and 143; an error is one line on
 * stderr and exit code 1.
 * @param main gives the exit code.
 */
export async function runMain(name: string, main: () => Promise<number>): Promise<void> {
  let isInterrupted = false;
  const interrupt = (signal: NodeJS.Signals): void => {
    // A second one does not wait for the children.
    if (isInterrupted) process.exit(128 + signalNumber(signal));
    isInterrupted = true;
    process.stderr.write(`\n${name}: interrupted; cleaning up\n`);
    void cleanUp().then(() => process.exit(128 + signalNumber(signal)));
  };
  process.on("SIGINT", interrupt);
  process.on("SIGTERM", interrupt);
  let code: number;
  try {
    code = await main();
  } catch (error) {
    // What fails while the children are being ended is no news.
    if (isInterrupted) return;
    process.stderr.write(`${name}: ${error instanceof Error ? error.message : String(error)}\n`);
    code = 1;
  }
  if (isInterrupted) return;
  await cleanUp();
  process.exit(code);
}

export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

function signalNumber(signal: NodeJS.Signals | null): number {
  return signal === null ? 0 : (constants.signals[signal] ?? 0);
}

/** A line of the benchmark's own, on standard output. */
export function say(text = ""): void {
  process.stdout.write(`${text}\n`);
}
