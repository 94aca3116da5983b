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

export class Virsh {
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
    return this.#call(command, [`--domain=${this.domain}`, ...options]);
  }

  /** As `run`, about the hypervisor. */
  async hypervisor(command: string): Promise<string> {
    return this.#call(command, []);
  }

  async #call(command: string, options: readonly string[]): Promise<string> {
    const connect = this.connect === undefined ? [] : [`--connect=${this.connect}`];
    const { exitCode, output, complaint } = await runVirsh(["--quiet", ...connect, command, ...options]);
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

function runVirsh(args: readonly string[]): Promise<VirshResult> {
  return new Promise((settle, reject) => {
    const child = spawn("virsh", args, {
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, LC_ALL: "C" },
      detached: true,
      timeout: CALL_MS,
    });
    const texts = { output: "", complaint: "" };
    const gather = (name: keyof typeof texts) => (text: string) => {
      texts[name] += text;
      if (texts[name].length > OUTPUT_BYTES_MAX) child.kill();
    };
    child.stdout.setEncoding("utf8").on("data", gather("output"));
    child.stderr.setEncoding("utf8").on("data", gather("complaint"));
    child.on("error", (cause: NodeJS.ErrnoException) => reject(cannotStart(cause)));
    child.on("close", (code, signal) => {
      const cut =
        signal === null ? "" : `ended by ${signal}: libvirt gave no answer within ${CALL_MS / 1000} s\n`;
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
