// A backup of a job, and whatever else a run asks of cowcatcher, is a process of its own: the command that anybody could type.
//
// Why not in this process: a run goes on for hours over many machines, and what ends one backup (a thread that hangs in the
// kernel on dead storage, memory that runs out, a bug) must not end the others, nor keep what it holds. The exit code and
// the JSON lines are a documented interface (docs/json.md), so nothing is carried out in a second way that is tested less.
// It costs 0.2 s of start a backup.
//
// The child is a session of its own, so that a terminal's Ctrl-C reaches it once, through `stop`. It inherits the
// descriptors of the run's locks: they hold as long as the backup runs, whatever becomes of this process.
import { spawn, type ChildProcess } from "node:child_process";
import type { Readable } from "node:stream";
import { CowcatcherError, ioError } from "../errors.js";

/** The program and its first arguments, to which a command's are added. */
export type ProgramWords = readonly [string, ...string[]];

export interface ChildRequest {
  /** `backup`, and its arguments. */
  args: readonly string[];
  /** Descriptors that it keeps open. */
  descriptors?: readonly number[] | undefined;
  environment?: Record<string, string> | undefined;
  /** What it prints, as it comes: each line that is JSON by itself. */
  onMessage?: ((message: unknown) => void) | undefined;
  /** Each line of its standard error. */
  onLine?: ((line: string) => void) | undefined;
  /** Ends it after that long. */
  timeLimitMs?: number | undefined;
  /** From being asked to end to being ended, and from there to being left behind (60 s). */
  graceMs?: number | undefined;
  /** Aborted: it is asked to end. */
  signal?: AbortSignal | undefined;
}

export interface ChildResult {
  /** 128 and the signal's number where a signal ended it. */
  exitCode: number;
  /** What it printed, as JSON values: a line each, or one document. */
  messages: readonly unknown[];
  /** The error that it reported last, or what ended it. */
  error: CowcatcherError | undefined;
  /** It was ended by its time limit. */
  isOverdue: boolean;
}

/** Of its output; a command that prints more is none of ours. */
const MAX_OUTPUT_BYTES = 16 * 1024 * 1024;
/** From being asked to end to being ended: what is in flight to slow storage is written first. */
const GRACE_MS = 60_000;
/** The longest wait of a timer. */
const TIMER_MS_MAX = 2 ** 31 - 1;
const SIGNAL_BASE = 128;
const KILLED = SIGNAL_BASE + 9;

/** Runs `cowcatcher ARGS --json`. Never rejects: what goes wrong is in the result. */
export async function runChild(program: ProgramWords, request: ChildRequest): Promise<ChildResult> {
  const [command, ...words] = program;
  const { args, descriptors = [], environment = {}, onMessage, onLine, timeLimitMs, signal } = request;
  const { graceMs = GRACE_MS } = request;
  const child = spawn(command, [...words, ...args], {
    stdio: ["ignore", "pipe", "pipe", ...descriptors],
    env: { ...process.env, ...environment },
    detached: true,
  });
  let isOverdue = false;
  const stopper = new Stopper(child, graceMs);
  const onAbort = (): void => stopper.stop();
  signal?.addEventListener("abort", onAbort, { once: true });
  if (signal?.aborted === true) onAbort();
  const timer =
    timeLimitMs === undefined
      ? undefined
      : setTimeout(
          () => {
            isOverdue = true;
            stopper.stop();
          },
          Math.min(timeLimitMs, TIMER_MS_MAX),
        );
  try {
    const output = collect(child.stdout as Readable);
    if (onMessage !== undefined) {
      forEachLine(child.stdout as Readable, (line) => readLines(line).forEach(onMessage));
    }
    forEachLine(child.stderr as Readable, onLine ?? (() => undefined));
    const ended = await new Promise<number | CowcatcherError>((settle) => {
      child.on("error", (error) => settle(ioError("start", command, error)));
      child.on("close", (code, name) => settle(code ?? signalCode(name)));
      stopper.onLeft = () => settle(leftBehind(args));
    });
    if (typeof ended !== "number") return { exitCode: 1, messages: [], error: ended, isOverdue };
    const messages = readMessages(output());
    return { exitCode: ended, messages, error: errorOf(messages, ended, args), isOverdue };
  } finally {
    clearTimeout(timer);
    stopper.over();
    signal?.removeEventListener("abort", onAbort);
  }
}

/**
 * Asks a child to end, ends it when it does not, and leaves it behind where the kernel does not let it go: a process that
 * waits for storage is not killed before the storage answers.
 */
class Stopper {
  #timer: NodeJS.Timeout | undefined;
  onLeft: (() => void) | undefined;

  constructor(
    private readonly child: ChildProcess,
    private readonly graceMs: number,
  ) {}

  stop(): void {
    if (this.#timer !== undefined) return;
    this.child.kill("SIGTERM");
    this.#timer = setTimeout(() => {
      this.child.kill("SIGKILL");
      this.#timer = setTimeout(() => this.#leave(), this.graceMs);
    }, this.graceMs);
  }

  #leave(): void {
    // Its ends of the pipes may stay open as long as it does.
    this.child.stdout?.destroy();
    this.child.stderr?.destroy();
    this.child.unref();
    this.onLeft?.();
  }

  over(): void {
    clearTimeout(this.#timer);
  }
}

function leftBehind(args: readonly string[]): CowcatcherError {
  return new CowcatcherError({
    code: "IO",
    object: `cowcatcher ${args[0] ?? ""}`,
    problem: "does not end, though it was killed",
    hint: "storage that it waits for does not answer; it goes, and its locks with it, when that does",
  });
}

function signalCode(name: NodeJS.Signals | null): number {
  if (name === "SIGTERM") return SIGNAL_BASE + 15;
  return name === "SIGINT" ? SIGNAL_BASE + 2 : KILLED;
}

/** The function gives what has come so far. */
function collect(stream: Readable): () => string {
  const pieces: string[] = [];
  let length = 0;
  stream.setEncoding("utf8").on("data", (text: string) => {
    length += text.length;
    if (length <= MAX_OUTPUT_BYTES) pieces.push(text);
  });
  return () => pieces.join("");
}

/** Of a child that was started as the leader of a group, and of all that it has started in it. */
export function endGroup(pid: number | undefined, signal: NodeJS.Signals): void {
  if (pid === undefined) return;
  try {
    process.kill(-pid, signal);
  } catch {
    // It has ended.
  }
}

const MAX_LINE_CHARACTERS = 8192;

/** A line that is too long is cut into several. */
export function forEachLine(stream: Readable, onLine: (line: string) => void): void {
  let rest = "";
  stream.setEncoding("utf8").on("data", (text: string) => {
    const lines = (rest + text).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) onLine(line);
    while (rest.length > MAX_LINE_CHARACTERS) {
      onLine(rest.slice(0, MAX_LINE_CHARACTERS));
      rest = rest.slice(MAX_LINE_CHARACTERS);
    }
  });
  stream.on("end", () => {
    if (rest !== "") onLine(rest);
  });
}

function readMessages(text: string): unknown[] {
  const trimmed = text.trim();
  if (trimmed === "") return [];
  try {
    return [JSON.parse(trimmed) as unknown];
  } catch {
    // Several: a line each.
  }
  return readLines(trimmed);
}

function readLines(text: string): unknown[] {
  return text.split("\n").flatMap((line) => {
    try {
      return [JSON.parse(line) as unknown];
    } catch {
      return [];
    }
  });
}

function errorOf(
  messages: readonly unknown[],
  exitCode: number,
  args: readonly string[],
): CowcatcherError | undefined {
  for (const message of [...messages].reverse()) {
    const found = errorMember(message);
    if (found !== undefined) return found;
  }
  if (exitCode === 0 || exitCode === 3) return undefined;
  const how = exitCode === KILLED ? "was killed" : `ended with exit code ${exitCode}`;
  return new CowcatcherError({
    code: "INTERNAL",
    object: `cowcatcher ${args[0] ?? ""}`,
    problem: `${how}, and said nothing of it`,
    hint: exitCode === KILLED ? "see the kernel's log: memory may have run out" : undefined,
  });
}

function errorMember(message: unknown): CowcatcherError | undefined {
  if (typeof message !== "object" || message === null || !("error" in message)) return undefined;
  const { error } = message;
  if (typeof error !== "object" || error === null) return undefined;
  const member = (name: string): string | undefined => {
    const value = (error as Record<string, unknown>)[name];
    return typeof value === "string" ? value : undefined;
  };
  const problem = member("problem");
  if (problem === undefined) return undefined;
  return new CowcatcherError({
    code: (member("code") ?? "IO") as CowcatcherError["code"],
    object: member("object") ?? "cowcatcher",
    problem,
    hint: member("hint"),
    errno: member("errno"),
  });
}
