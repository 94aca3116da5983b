// Real parts for the integration tests: a `serve` process, a `backup` process that can be watched and signalled,
// and a guest (guest.py). Everything started is ended by `stopAll`.
import { type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readdirSync, readlinkSync, rmSync } from "node:fs";
import { constants, tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { COWCATCHER_BIN, cowcatcher, run, type RunResult } from "./cli.js";

/** For what takes a second: a machine may take its processors away. What must not happen hangs for ten minutes. */
const WAIT_MS = 60_000;
const children = new Set<ChildProcessWithoutNullStreams>();
const folders = new Set<string>();

const MEMORY = existsSync("/dev/shm") ? "/dev/shm" : tmpdir();

/** A folder of its own, in memory where there is such a place, unless told where. */
export function scratchFolder(parent = MEMORY): string {
  const folder = mkdtempSync(join(parent, "cowcatcher-test-"));
  folders.add(folder);
  return folder;
}

/** Ends what is still running and removes the folders: for afterEach or afterAll. */
export async function stopAll(): Promise<void> {
  for (const child of children) {
    child.kill("SIGKILL");
    await once(child, "close");
  }
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
  folders.clear();
}

/** A process whose lines are kept and can be waited for. */
export class Process {
  readonly lines: string[] = [];
  stderr = "";
  readonly ended: Promise<RunResult>;
  readonly #child: ChildProcessWithoutNullStreams;
  #onChange: () => void = () => {};
  #over = false;

  constructor(program: string, args: readonly string[], env: Record<string, string> = {}) {
    const child = spawn(program, args, { env: { ...process.env, ...env } });
    this.#child = child;
    children.add(child);
    child.stdin.on("error", () => undefined);
    child.stderr.setEncoding("utf8").on("data", (text: string) => (this.stderr += text));
    createInterface({ input: child.stdout }).on("line", (line) => {
      this.lines.push(line);
      this.#onChange();
    });
    this.ended = new Promise((settle, reject) => {
      child.on("error", reject);
      child.on("close", (code, signal) => {
        children.delete(child);
        this.#over = true;
        const number = signal === null ? 0 : constants.signals[signal];
        settle({ code: code ?? 128 + number, stdout: this.lines.join("\n"), stderr: this.stderr });
        this.#onChange();
      });
    });
    this.ended.catch(() => undefined);
  }

  get pid(): number {
    return this.#child.pid ?? 0;
  }

  get over(): boolean {
    return this.#over;
  }

  kill(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  send(line: string): void {
    this.#child.stdin.write(`${line}\n`);
  }

  /** The first line from `fromLine` on that `matches`. */
  async line(matches: (line: string) => boolean, fromLine = 0, withinMs = WAIT_MS): Promise<string> {
    const deadline = performance.now() + withinMs;
    for (;;) {
      const found = this.lines.slice(fromLine).find(matches);
      if (found !== undefined) return found;
      if (this.#over) throw new Error(`ended without that line: ${this.lines.join("\n")}\n${this.stderr}`);
      if (performance.now() > deadline)
        throw new Error(`no such line: ${this.lines.join("\n")}\n${this.stderr}`);
      await new Promise<void>((wake) => {
        const timer = setTimeout(wake, 100);
        this.#onChange = () => {
          clearTimeout(timer);
          wake();
        };
      });
    }
  }

  /** The result, within a bounded time. */
  async end(withinMs = WAIT_MS): Promise<RunResult> {
    const result = await Promise.race([
      this.ended,
      new Promise<undefined>((settle) => setTimeout(() => settle(undefined), withinMs).unref()),
    ]);
    if (result === undefined) throw new Error(`still running after ${withinMs} ms\n${this.stderr}`);
    return result;
  }
}

/** Polls until `condition` holds. */
export async function until(
  what: string,
  condition: () => boolean | Promise<boolean>,
  withinMs = WAIT_MS,
): Promise<void> {
  const deadline = performance.now() + withinMs;
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`did not come about: ${what}`);
    await new Promise((settle) => setTimeout(settle, 10));
  }
}

export interface ServerOptions {
  env?: Record<string, string>;
  args?: readonly string[];
  /** Where it serves, in place of a Unix socket in its folder. */
  listen?: readonly string[];
}

/** A running `serve`. */
export class Server {
  readonly socket: string;
  readonly control: string;

  private constructor(
    readonly folder: string,
    readonly process: Process,
  ) {
    this.socket = join(folder, "nbd.sock");
    this.control = join(folder, "control.sock");
  }

  static async start(
    folder: string,
    images: readonly string[],
    { env = {}, args = [], listen = ["--socket", join(folder, "nbd.sock")] }: ServerOptions = {},
  ): Promise<Server> {
    const sockets = [...listen, "--control", join(folder, "control.sock")];
    const process = new Process(nodePath, [COWCATCHER_BIN, "serve", ...images, ...sockets, ...args], env);
    await process.line((line) => line.includes("listening"));
    return new Server(folder, process);
  }

  uri(name = "disk"): string {
    return `nbd+unix:///${name}?socket=${this.socket}`;
  }

  /** Ends it as a user does. */
  async stop(): Promise<RunResult> {
    this.process.kill("SIGTERM");
    return this.process.end();
  }

  backup(...args: string[]): Backup {
    return new Backup(["--control", this.control, ...args]);
  }

  jobs(...args: string[]): Promise<RunResult> {
    return cowcatcher(["jobs", "--control", this.control, ...args]);
  }

  guest(seed: number, connections = 3, name = "disk"): Promise<Guest> {
    return Guest.start("model", seed, Array<string>(connections).fill(this.uri(name)));
  }

  /** What /proc says its descriptors are. */
  openFiles(): string[] {
    return openFilesOf(this.process.pid);
  }
}

/** What /proc says a process's descriptors are. */
export function openFilesOf(pid: number): string[] {
  const folder = `/proc/${pid}/fd`;
  return readdirSync(folder).flatMap((fd) => {
    try {
      return [readlinkSync(join(folder, fd))];
    } catch {
      return [];
    }
  });
}

const nodePath = process.execPath;

export interface Summary {
  message_type: string;
  bytes: number;
  bytes_written: number;
  captures: number;
  captured_bytes: number;
  spilled_bytes: number;
  guest_waits: number;
  guest_wait_ms_max: number;
  ignored_errors: number;
  seconds: number;
}

/** A `backup --json`, live or offline. */
export class Backup {
  readonly process: Process;

  constructor(args: readonly string[], env: Record<string, string> = {}) {
    this.process = new Process(nodePath, [COWCATCHER_BIN, "backup", "--json", ...args], env);
  }

  /** After T0. */
  async started(): Promise<void> {
    await this.process.line((line) => line.includes('"started"'));
  }

  async jobId(): Promise<string> {
    const line = await this.process.line((text) => text.includes('"started"'));
    return (JSON.parse(line) as { job: string }).job;
  }

  async end(withinMs?: number): Promise<RunResult> {
    return this.process.end(withinMs);
  }

  /**
   * Takes the limit off that held the backup until what a test wants has happened during it; then as `succeed`.
   * A limit alone is no such hold: a guest may not get a processor for longer than any backup takes.
   */
  async release(server: Server): Promise<Summary> {
    const { code, stderr } = await server.jobs("set-speed", await this.jobId(), "0");
    // It may have come to its end before, or be about to.
    if (code !== 0 && !/not found|in state '(?:waiting|pending|concluded)'/.test(stderr))
      throw new Error(`set-speed ended with ${code}: ${stderr}`);
    return this.succeed();
  }

  /** Ends with 0; its summaries, one a disk. */
  async succeed(expectedCode = 0): Promise<Summary> {
    const { code, stderr } = await this.end();
    if (code !== expectedCode) throw new Error(`backup ended with ${code}: ${stderr}`);
    const found = this.process.lines.find((line) => line.includes('"summary"'));
    if (found === undefined) throw new Error(`no summary: ${this.process.lines.join("\n")}`);
    return JSON.parse(found) as Summary;
  }
}

/** A guest (guest.py). */
export class Guest {
  private constructor(
    readonly process: Process,
    readonly sizeBytes: number,
  ) {}

  static async start(
    mode: "model" | "sequence" | "paced",
    seed: number,
    uris: readonly string[],
  ): Promise<Guest> {
    const script = resolve(import.meta.dirname, "guest.py");
    // libnbd's module belongs to the system's Python, which need not be the first in the path.
    const process = new Process("/usr/bin/python3", [script, mode, String(seed), ...uris]);
    const [, size] = (await process.line((line) => line.startsWith("ready"))).split(" ");
    return new Guest(process, Number(size));
  }

  run(): void {
    this.process.send("run");
  }

  async pause(): Promise<{ operations: number; longestMs: number }> {
    const [, operations, longestMs] = (await this.#ask("pause")).split(" ");
    return { operations: Number(operations), longestMs: Number(longestMs) };
  }

  /** Waits until so many further operations are acknowledged. */
  async progress(operationCount: number): Promise<void> {
    const wanted = (await this.count()) + operationCount;
    await until("the guest goes on", async () => (await this.count()) >= wanted);
  }

  async count(): Promise<number> {
    return Number((await this.#ask("count")).split(" ")[1]);
  }

  async dump(path: string): Promise<void> {
    await this.#ask(`dump ${path}`);
  }

  verify(): Promise<string> {
    return this.#ask("verify");
  }

  async quit(): Promise<void> {
    this.process.send("quit");
    await this.process.end();
  }

  #ask(command: string): Promise<string> {
    const from = this.process.lines.length;
    this.process.send(command);
    return this.process.line(() => true, from);
  }
}

/** Runs a program that must succeed; its output. */
export async function mustRun(program: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await run(program, args);
  if (code !== 0) throw new Error(`${program} ${args.join(" ")}: exit code ${code}\n${stdout}${stderr}`);
  return stdout;
}

/** Names in the folder that a backup would have to clean up. */
export function leftovers(folder: string): string[] {
  return readdirSync(folder).filter((name) => name.includes(".cowcatcher-"));
}
