// Standard output as a target: the disk's bytes in order, as one raw stream, for a pipe into another program.
//
// There is no seeking, so one worker writes, one chunk after another, in the sweep's order (which ascends where no guest
// puts chunks forward). What is not written is zero: the gap before the next data, and what is left at the end, are
// written as zeroes, so the engine's zeroes cost nothing until then. Nothing can be taken back or read back: a copy that
// fails leaves a part of the stream with the reader, and --verify is refused.
//
// A write may take a part of what it was given. One that is tried again (--on-target-error stop) goes on where the
// stream stands, so no byte comes twice.

import * as fs from "node:fs";
import { isatty } from "node:tty";
import type { Completion } from "../block/device.js";
import { syncFileData } from "../block/file/fileio.js";
import type { TargetWriter } from "../cow/target-writer.js";
import { CowcatcherError, errnoOf, ioError } from "../errors.js";
import { MiB } from "../units.js";
import type { StdoutTargetDescription, Target, TargetOptions } from "./target.js";

export const STDOUT_TARGET_PATH = "-";
export const STDOUT_NAME = "standard output";
export const STDOUT_FD = 1;

/** A reader that is slow with a descriptor that does not block: how long until it is asked again. */
const FULL_WAIT_MS = 1;
const ZERO_BYTES = 1 * MiB;
const waitWord = new Int32Array(new SharedArrayBuffer(4));

/**
 * @param fd replaced in tests
 * @throws CowcatcherError USAGE for a terminal, or for a format but raw.
 */
export function createStdoutTarget(options: TargetOptions, fd: number = STDOUT_FD): Target {
  const { format, backingFile, compression, sizeBytes } = options;
  if (format !== "raw" || backingFile !== undefined || compression !== undefined) {
    throw refused("takes a raw stream alone", "give -O raw, or name a file: one that is called - is ./-");
  }
  const stats = fs.fstatSync(fd);
  if (isatty(fd)) {
    throw refused("is a terminal", "send it to a program or a file: | or >");
  }
  return new StdoutTarget(
    { format: "stdout", name: STDOUT_NAME, fd: blockingTwin(fd, stats), sizeBytes },
    fd,
    stats,
  );
}

function refused(problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object: STDOUT_NAME, problem, hint });
}

/** Node makes a pipe that does not block of its standard output. Opened again, a pipe has a state of its own. */
function blockingTwin(fd: number, stats: fs.Stats): number {
  if (!stats.isFIFO()) return fd;
  try {
    return fs.openSync(`/proc/self/fd/${fd}`, fs.constants.O_WRONLY);
  } catch {
    // Another user's pipe: EAGAIN is waited for.
    return fd;
  }
}

class StdoutTarget implements Target {
  readonly name = STDOUT_NAME;
  readonly granularityBytes = 1;
  readonly workerLimit = 1;
  readonly unfinishedPath = null;

  constructor(
    readonly description: StdoutTargetDescription,
    private readonly ownFd: number,
    private readonly stats: fs.Stats,
  ) {}

  /** The worker has written all, up to the end of the disk. */
  async complete(): Promise<void> {
    if (!this.stats.isFile()) return;
    try {
      await syncFileData(this.ownFd);
    } catch (error) {
      throw ioError("sync", this.name, error);
    }
  }

  commit(): Promise<void> {
    return Promise.resolve();
  }

  finish(): Promise<void> {
    return this.complete();
  }

  abort(): Promise<void> {
    // What the reader has it has. The descriptor ends with the process, which a worker in a write may outlive.
    return Promise.resolve();
  }

  abortSync(): void {
    // As abort.
  }
}

export class StdoutWriter implements TargetWriter {
  readonly #description: StdoutTargetDescription;
  /** Bytes of the stream that are written. */
  #position = 0;
  /** Where the write that is under way began: what it asks for again is behind the position. */
  #startOfWrite = 0;
  readonly #isCancelled: () => boolean;

  constructor(description: StdoutTargetDescription, isCancelled: () => boolean) {
    this.#description = description;
    this.#isCancelled = isCancelled;
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    if (offsetBytes < this.#startOfWrite) throw this.#outOfOrder(offsetBytes);
    this.#startOfWrite = offsetBytes;
    this.#fillUpTo(offsetBytes);
    const done = this.#position - offsetBytes;
    this.#writeAll(buffer, bufferOffset + done, lengthBytes - done);
    this.#startOfWrite = this.#position;
    return undefined;
  }

  /** Written when something follows, or at the end. */
  writeZeroes(): Completion {
    return undefined;
  }

  finish(): Promise<void> {
    this.#fillUpTo(this.#description.sizeBytes);
    return Promise.resolve();
  }

  close(): void {
    // The descriptor is the process's.
  }

  #fillUpTo(endBytes: number): void {
    if (this.#position >= endBytes) return;
    const zeroes = new Uint8Array(Math.min(ZERO_BYTES, endBytes - this.#position));
    while (this.#position < endBytes) {
      this.#writeAll(zeroes, 0, Math.min(zeroes.length, endBytes - this.#position));
    }
  }

  #writeAll(buffer: Uint8Array, bufferOffset: number, lengthBytes: number): void {
    const { fd, name } = this.#description;
    let done = 0;
    while (done < lengthBytes) {
      if (this.#isCancelled()) {
        throw new CowcatcherError({ code: "CANCELLED", object: name, problem: "the copy was ended" });
      }
      try {
        const count = fs.writeSync(fd, buffer, bufferOffset + done, lengthBytes - done);
        done += count;
        this.#position += count;
      } catch (error) {
        if (errnoOf(error) === "EINTR") continue;
        if (errnoOf(error) !== "EAGAIN") throw this.#failed(error);
        Atomics.wait(waitWord, 0, 0, FULL_WAIT_MS);
      }
    }
  }

  #failed(error: unknown): CowcatcherError {
    const { name } = this.#description;
    if (errnoOf(error) !== "EPIPE") return ioError("write", name, error, this.#position);
    return new CowcatcherError({
      code: "IO",
      object: name,
      problem: "its reader has ended",
      hint: "what it said tells why",
      offsetBytes: this.#position,
      errno: "EPIPE",
      cause: error,
    });
  }

  #outOfOrder(offsetBytes: number): CowcatcherError {
    const problem = "a stream cannot go back";
    return new CowcatcherError({ code: "INTERNAL", object: this.#description.name, problem, offsetBytes });
  }
}
