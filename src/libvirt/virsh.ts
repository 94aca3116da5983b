// libvirt by its own command line. virsh is there wherever libvirt is used, keeps its options for decades, and needs neither a
// binding nor a compiler. A call costs some tens of milliseconds, and a backup makes a dozen.
//
// virsh is a session of its own, so that a terminal's Ctrl-C does not cut a call in two: whether libvirt has begun a job
// is to be known. It speaks English (LC_ALL=C), as its words tell what went wrong.

import { spawn } from "node:child_process";
import { CowcatcherError, ioError } from "../errors.js";

/** libvirt itself waits up to 30 s for another command on the same domain to end, and twice of that must fit. */
const CALL_MS = 90_000;
/** A domain's description is some tens of kilobytes. */
const OUTPUT_BYTES_MAX = 16 * 1024 * 1024;

/** What virsh complained of; `complaint` in its own words. */
export class VirshError extends CowcatcherError {
  constructor(
    details: ConstructorParameters<typeof CowcatcherError>[0],
    readonly complaint: string,
  ) {
    super(details);
  }
}

/** Waits for the processes that its first word names (a minute at most), then runs the rest until it works. */
const AFTERWARDS = `
for pid in $1; do
  tries=0
  while kill -0 "$pid" 2>/dev/null && [ $tries -lt 300 ]; do tries=$((tries + 1)); sleep 0.2; done
done
shift
for try in 1 2 3; do "$@" && exit; sleep 1; done
`;

export class Virsh {
  /** Of calls that are under way. */
  readonly #running = new Set<number>();

  /** @param connect libvirt's URI of a hypervisor; undefined: what virsh takes by itself */
  constructor(
    readonly connect: string | undefined,
    readonly domain: string,
  ) {}

  /**
   * Runs a command about the domain; what it prints.
   * @param options each with its value, such as `--xpath=…`
   * @throws CowcatcherError NOT_FOUND where virsh is not installed or the domain is not there; VirshError
   */
  run(command: string, ...options: string[]): Promise<string> {
    return this.runWithin(CALL_MS, command, ...options);
  }

  /** As `run`, with no answer awaited longer than that. Whether libvirt then still does it nobody knows. */
  runWithin(limitMs: number, command: string, ...options: string[]): Promise<string> {
    return this.#call(command, [`--domain=${this.domain}`, ...options], limitMs);
  }

  /**
   * For a process that is about to end: a shell of its own runs the command about the domain, when calls of ours that are under
   * way are over. Synchronous.
   */
  leaveBehind(command: string): void {
    const words = ["virsh", ...this.#words(command, [`--domain=${this.domain}`])];
    const args = ["-c", AFTERWARDS, "sh", [...this.#running].join(" "), ...words];
    spawn("/bin/sh", args, { stdio: "ignore", detached: true, env: inEnglish() }).unref();
  }

  /** As `run`, about the hypervisor. */
  async hypervisor(command: string): Promise<string> {
    return this.#call(command, [], CALL_MS);
  }

  #words(command: string, options: readonly string[]): string[] {
    const connect = this.connect === undefined ? [] : [`--connect=${this.connect}`];
    return ["--quiet", ...connect, command, ...options];
  }

  async #call(command: string, options: readonly string[], limitMs: number): Promise<string> {
    const words = this.#words(command, options);
    const { exitCode, output, complaint } = await runVirsh(words, limitMs, this.#running);
    if (exitCode !== 0) throw this.#failed(command, complaint);
    return output;
  }

  #failed(command: string, text: string): VirshError {
    const complaint = oneLine(text);
    const refused = /^failed to connect to the hypervisor(?:: )?(.*)$/.exec(complaint);
    if (refused !== null) {
      return new VirshError(
        {
          code: "IO",
          object: this.connect ?? "libvirt",
          problem: `cannot connect to libvirt: ${refused[1] || "no reason was given"}`,
          hint: "does libvirtd or virtqemud run? --connect names another one, such as qemu:///system",
        },
        complaint,
      );
    }
    if (/^failed to get domain |Domain not found/.test(complaint)) {
      return new VirshError(
        {
          code: "NOT_FOUND",
          object: this.domain,
          problem: `libvirt${this.connect === undefined ? "" : ` at ${this.connect}`} has no such domain`,
          hint: "`virsh list --all` shows those that there are",
        },
        complaint,
      );
    }
    const problem = `virsh ${command}: ${complaint || "failed without a word"}`;
    return new VirshError({ code: "IO", object: this.domain, problem }, complaint);
  }
}

/** virsh's complaint without its prefixes: the lines are one sentence, from the general to the particular. */
function oneLine(stderr: string): string {
  return stderr
    .split("\n")
    .map((line) => line.replace(/^error: /, "").trim())
    .filter((line) => line !== "")
    .join(": ");
}

interface VirshResult {
  exitCode: number;
  output: string;
  complaint: string;
}

function inEnglish(): NodeJS.ProcessEnv {
  return { ...process.env, LC_ALL: "C" };
}

/** @param running has its process's id meanwhile */
function runVirsh(args: readonly string[], limitMs: number, running: Set<number>): Promise<VirshResult> {
  return new Promise((settle, reject) => {
    const child = spawn("virsh", args, {
      stdio: ["ignore", "pipe", "pipe"],
      env: inEnglish(),
      detached: true,
      timeout: limitMs,
    });
    const { pid = 0 } = child;
    if (pid > 0) running.add(pid);
    const texts = { output: "", complaint: "" };
    const gather = (name: keyof typeof texts) => (text: string) => {
      texts[name] += text;
      if (texts[name].length > OUTPUT_BYTES_MAX) child.kill();
    };
    child.stdout.setEncoding("utf8").on("data", gather("output"));
    child.stderr.setEncoding("utf8").on("data", gather("complaint"));
    child.on("error", (cause: NodeJS.ErrnoException) => reject(cannotStart(cause)));
    child.on("close", (code, signal) => {
      running.delete(pid);
      const cut =
        signal === null ? "" : `ended by ${signal}: libvirt gave no answer within ${limitMs / 1000} s\n`;
      settle({ exitCode: code ?? 1, output: texts.output, complaint: cut + texts.complaint });
    });
  });
}

function cannotStart(cause: NodeJS.ErrnoException): CowcatcherError {
  if (cause.code !== "ENOENT") return ioError("start virsh", "virsh", cause);
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: "virsh",
    problem: "is not installed, and --libvirt works through it",
    hint: "install libvirt's client (libvirt-clients, libvirt-client)",
    cause,
  });
}
