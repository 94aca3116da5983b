// Programs of others that show what is in a backup, and the server of ours that they read from.
//
// Whatever becomes of this process, nothing stays behind: each program is told by the kernel when this process has died
// (prctl(2), PR_SET_PDEATHSIG, through util-linux's setpriv where that is installed), and ends and unmounts then.
import { type ChildProcess, spawn, type SpawnOptions } from "node:child_process";
import { accessSync, constants } from "node:fs";
import { delimiter, join } from "node:path";
import { CowcatcherError } from "../../errors.js";
import { systemName } from "../../file-names.js";
import type { KeyFlags } from "../options/repository-options.js";

/** Its path, if it is installed. */
export function findProgram(name: string): string | undefined {
  return (process.env["PATH"] ?? "")
    .split(delimiter)
    .map((folder) => join(folder, name))
    .find(isProgram);
}

function isProgram(path: string): boolean {
  try {
    accessSync(systemName(path), constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/** A program that ends with this process. Its standard error is kept for the error that it ends with. */
export class Helper {
  readonly child: ChildProcess;
  readonly ended: Promise<number>;
  #complaint = "";

  constructor(
    readonly program: string,
    args: readonly string[],
    options: SpawnOptions = {},
  ) {
    const setpriv = findProgram("setpriv");
    const command = [...(setpriv === undefined ? [] : [setpriv, "--pdeathsig", "SIGTERM"]), program, ...args];
    this.child = spawn(command[0] ?? program, command.slice(1), {
      stdio: ["ignore", "ignore", "pipe"],
      ...options,
    });
    this.child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.#complaint = (this.#complaint + text).slice(-4096);
    });
    this.ended = new Promise((resolve, reject) => {
      this.child.on("error", (cause) => reject(this.#failed(cause.message, cause)));
      this.child.on("close", (code) => resolve(code ?? 1));
    });
    this.ended.catch(() => undefined);
  }

  get isOver(): boolean {
    return this.child.exitCode !== null || this.child.signalCode !== null;
  }

  /** Of a program that has ended: the last line that it wrote to standard error. */
  failure(): CowcatcherError {
    const lines = this.#complaint.trim().split("\n");
    return this.#failed(lines.at(-1) ?? "", undefined);
  }

  #failed(problem: string, cause: unknown): CowcatcherError {
    const name = this.program.slice(this.program.lastIndexOf("/") + 1);
    return new CowcatcherError({
      code: "IO",
      object: name,
      problem: problem.replace(new RegExp(`^${name}: `), "") || "has failed",
      cause,
    });
  }

  async end(): Promise<void> {
    if (!this.isOver) this.child.kill("SIGTERM");
    await this.ended.catch(() => undefined);
  }
}

/** Arguments with which this program serves the backup, read-only, at the socket that it is started with. */
export function serveArguments(backup: string, { keyFile, passphraseFile }: KeyFlags): string[] {
  return [
    process.argv[1] ?? "",
    ...["serve", "--read-only", "--name", "disk"],
    ...(keyFile === undefined ? [] : ["--key-file", keyFile]),
    ...(passphraseFile === undefined ? [] : ["--passphrase-file", passphraseFile]),
    backup,
  ];
}
