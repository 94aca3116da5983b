// libguestfs, by its shell guestfish: the files in a disk, read in a small virtual machine, so that no file system that
// a guest has written meets this machine's kernel. One process for all of a command's questions, as its start takes
// seconds (a minute and more without KVM).
//
//   this process                                   guestfish ─► its virtual machine
//     NBD at a socket in a folder of its own  ◄──────────────── reads the disk, never writes
//     a command a line ──stdin──►
//     ◄── what it prints; then a line of ours (`echo`), which ends the answer
//     ◄── what it complains of, by standard error
//
// Names are quoted byte by byte (guestfish(1), QUOTING). guestfish ends with this process (helper-programs.ts).
import { randomBytes } from "node:crypto";
import { setImmediate as nextTurn } from "node:timers/promises";
import type { Readable, Writable } from "node:stream";
import { nameBytes } from "../../file-names.js";
import { CowcatcherError } from "../../errors.js";
import { findProgram, Helper } from "./helper-programs.js";

const ERROR_LINE = /^(?:\*stdin\*:\d+: )?(?:libguestfs: error: |guestfish: )(.*)$/;
/** Of a file to write to: standard output. */
const OUTPUT = "-";

export class Guestfish {
  readonly #program: Helper;
  readonly #input: Writable;
  readonly #output: AsyncIterator<Buffer>;
  #complaints = "";
  readonly #marker = `end ${randomBytes(12).toString("hex")}`;

  /**
   * @param uri of the disk: nbd:///NAME?socket=PATH
   * @throws CowcatcherError UNSUPPORTED where it is not installed
   */
  constructor(uri: string) {
    const guestfish = findProgram("guestfish");
    if (guestfish === undefined) throw notInstalled();
    const args = ["--ro", "--format=raw", "-a", uri];
    this.#program = new Helper(guestfish, args, {
      stdio: ["pipe", "pipe", "pipe"],
      // libvirt would be one more party that must be able to read the socket.
      env: { LIBGUESTFS_BACKEND: "direct", ...process.env },
    });
    const { stdin, stdout, stderr } = this.#program.child;
    this.#input = stdin as Writable;
    // It has ended: the answer that does not come says so.
    this.#input.on("error", () => undefined);
    this.#output = (stdout as Readable)[Symbol.asyncIterator]() as AsyncIterator<Buffer>;
    stderr?.on("data", (text: string) => (this.#complaints += text));
  }

  /** The lines that a command prints. @throws CowcatcherError NOT_FOUND, IO: what guestfish says */
  async ask(command: string, ...words: string[]): Promise<string[]> {
    return linesOf((await this.#answer(lineOf(command, words))).toString("utf8"));
  }

  /** Of a command whose last argument is a file to write to: what it writes, a name with a zero byte behind it each. */
  async names(command: string, ...words: string[]): Promise<Buffer[]> {
    const bytes = await this.#answer(lineOf(command, [...words, OUTPUT]));
    const names: Buffer[] = [];
    for (let at = 0; at < bytes.length;) {
      const end = bytes.indexOf(0, at);
      if (end < 0) throw failed("a list of names ends in the middle");
      names.push(bytes.subarray(at, end));
      at = end + 1;
    }
    return names;
  }

  /** What it prints until it prints our line. */
  async #answer(line: string): Promise<Buffer> {
    // With "-" it goes on after an error.
    this.#input.write(`-${line}\necho "${this.#marker}"\n`);
    const end = Buffer.from(`${this.#marker}\n`);
    const parts: Buffer[] = [];
    let tail = Buffer.alloc(0);
    while (!tail.equals(end)) {
      const next = await this.#output.next();
      if (next.done === true) throw await this.#ended();
      parts.push(next.value);
      tail = Buffer.concat([tail, next.value]).subarray(-end.length);
    }
    // What it complained of before that line lies in the other pipe: the loop comes by there once in two turns.
    await nextTurn();
    await nextTurn();
    const complaint = this.#complaint();
    if (complaint !== undefined) throw failed(complaint);
    return Buffer.concat(parts).subarray(0, -end.length);
  }

  /** Files' contents, one after another; the last thing that is asked. @throws CowcatcherError at the first error */
  async *download(paths: readonly string[]): AsyncGenerator<Buffer> {
    for (const path of paths) this.#input.write(`${lineOf("download", [path, OUTPUT])}\n`);
    this.#input.end();
    for (let next = await this.#output.next(); next.done !== true; next = await this.#output.next()) {
      yield next.value;
    }
    if ((await this.#program.ended) !== 0) throw await this.#ended();
  }

  async #ended(): Promise<CowcatcherError> {
    await this.#program.ended;
    return failed(this.#complaint() ?? "it has ended");
  }

  /** The last line since it was asked before: libguestfs says what went wrong, then what it could not do for it. */
  #complaint(): string | undefined {
    const lines = linesOf(this.#complaints);
    this.#complaints = "";
    return lines.flatMap((line) => ERROR_LINE.exec(line)?.[1] ?? []).at(-1);
  }

  /** Never rejects. */
  async end(): Promise<void> {
    this.#input.end();
    await this.#program.end();
  }
}

function lineOf(command: string, words: readonly string[]): string {
  return [command, ...words.map(quoted)].join(" ");
}

/** A word after a command. Nothing in it means anything to guestfish. */
export function quoted(word: string): string {
  const bytes = [...nameBytes(word)].map((byte) => {
    const isPlain = byte >= 0x20 && byte < 0x7f && byte !== 0x22 && byte !== 0x5c;
    return isPlain ? String.fromCharCode(byte) : `\\x${byte.toString(16).padStart(2, "0")}`;
  });
  return `"${bytes.join("")}"`;
}

function linesOf(text: string): string[] {
  return text.split("\n").filter(Boolean);
}

function failed(problem: string): CowcatcherError {
  return new CowcatcherError({
    code: /No such file or directory/.test(problem) ? "NOT_FOUND" : "IO",
    object: "guestfish",
    problem,
  });
}

function notInstalled(): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object: "guestfish",
    problem: "is not installed",
    hint: "install it (Debian's libguestfs-tools or guestfish), or mount the backup as a disk: cowcatcher mount",
  });
}
