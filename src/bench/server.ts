// `serve` for the benchmark: a process of its own, as a user's is, with its control connection.
// It has a channel to this process, whose end it takes for its own: it does not stay behind, whatever ends this one.

import { spawn, type ChildProcess } from "node:child_process";
import { fileURLToPath } from "node:url";
import { ControlClient } from "../qmp/client.js";
import { errorFromWire } from "../qmp/protocol.js";
import { CowcatcherError, ioError } from "../errors.js";

const MAIN = fileURLToPath(new URL("../cli/main.js", import.meta.url));
const START_MS = 30_000;
/** Ending cancels a job and flushes the disk, which may take its storage some time. */
const STOP_MS = 60_000;
/** A message longer than that is none of ours. */
const OUTPUT_CHARACTERS_MAX = 64 * 1024;

export interface ServerOptions {
  /** Arguments of `serve`, beside --control. */
  args: readonly string[];
  control: string;
}

export class BenchServer {
  readonly control: ControlClient;
  readonly #child: ChildProcess;
  readonly #ended: Promise<void>;

  private constructor(child: ChildProcess, ended: Promise<void>, control: ControlClient) {
    this.#child = child;
    this.#ended = ended;
    this.control = control;
  }

  /**
   * Starts it and waits until it listens.
   * @param onChild told of the process at once, for whoever must end it at any moment.
   * @throws CowcatcherError what the server itself reported, or IO.
   */
  static async start(
    { args, control }: ServerOptions,
    onChild: (child: ChildProcess) => void,
  ): Promise<BenchServer> {
    const command = [MAIN, "serve", "--json", "--control", control, ...args];
    const child = spawn(process.execPath, command, { stdio: ["ignore", "pipe", "pipe", "ipc"] });
    onChild(child);
    const ended = new Promise<void>((resolve) => {
      child.once("close", () => resolve());
      child.once("error", () => resolve());
    });
    try {
      await listening(child);
      return new BenchServer(child, ended, await ControlClient.connect(control));
    } catch (error) {
      await stop(child, ended);
      throw error;
    }
  }

  /** Resolves when it has ended, by SIGKILL if SIGTERM does not do. */
  async stop(): Promise<void> {
    this.control.close();
    await stop(this.#child, this.#ended);
  }
}

async function stop(child: ChildProcess, ended: Promise<void>): Promise<void> {
  child.kill("SIGTERM");
  const timer = setTimeout(() => child.kill("SIGKILL"), STOP_MS);
  await ended;
  clearTimeout(timer);
}

function listening(child: ChildProcess): Promise<void> {
  let output = "";
  let complaints = "";
  // Drained to the end, so that the server never waits for a reader.
  child.stderr?.setEncoding("utf8").on("data", (text: string) => {
    complaints = (complaints + text).slice(-OUTPUT_CHARACTERS_MAX);
  });
  return new Promise((resolve, reject) => {
    const fail = (what: string): void => {
      const lastLine = complaints.trim().split("\n").at(-1) ?? "";
      const problem = lastLine === "" ? what : `${what}: ${lastLine}`;
      const unknown = new CowcatcherError({ code: "IO", object: "cowcatcher serve", problem });
      reject(reportedError(output) ?? unknown);
    };
    const timer = setTimeout(() => fail(`does not listen after ${START_MS / 1000} s`), START_MS);
    child.once("error", (cause) => reject(ioError("start", process.execPath, cause)));
    child.once("close", () => {
      clearTimeout(timer);
      fail("ended before it listened");
    });
    child.stdout?.setEncoding("utf8").on("data", (text: string) => {
      output = (output + text).slice(-OUTPUT_CHARACTERS_MAX);
      if (!/"message_type":\s*"listening"/.test(output)) return;
      clearTimeout(timer);
      resolve();
    });
  });
}

/** The error that a command with --json prints, if the output holds one. */
function reportedError(output: string): CowcatcherError | undefined {
  for (const line of output.split("\n")) {
    if (!line.includes('"message_type":"error"')) continue;
    try {
      return errorFromWire((JSON.parse(line) as { error: unknown }).error);
    } catch {
      return undefined;
    }
  }
  return undefined;
}
