// Reads and writes through an image's handle, asynchronous: any thread, each with an instance of its own.
//
// An operation is a completion of librbd's, made without a callback: a callback would come in one of librbd's threads, in
// which no JavaScript may run. So this thread asks its completions whether they are done, by a timer, at first every
// millisecond and then less often: a whole object takes tens of milliseconds on a cluster of disks, asking some
// microseconds. (librbd can also tell by an eventfd, but of all completions of the image together, whichever thread
// they belong to.)
//
// Cancelling. An operation cannot be taken back, so its promise is rejected and it is left to itself. That is safe, as
// librbd has its own copy of what is written, and what is read goes into memory of librbd's side first, which outlives
// this thread (door.ts: orphans). How soon: at the next question, a few milliseconds, whatever Ceph does.

import { CowcatcherError } from "../errors.js";
import { addressOf } from "../native/addresses.js";
import { MiB } from "../units.js";
import { Door } from "./door.js";
import { rbdError } from "./errors.js";
import { type Librbd, librbd } from "./librbd.js";

const POLL_FIRST_MS = 1;
const POLL_LONGEST_MS = 5;
/** An operation is asked for after about an eighth of the time that it has taken so far. */
const POLL_FRACTION = 8;
/** Of one read; longer ones are cut. The size of an object, as a rule. */
const READ_BYTES = 4 * MiB;
/**
 * Of one write; longer ones are cut, and their parts in flight together. Neither librbd nor an OSD keeps memory for larger
 * messages from one to the next, so each costs both of them its pages anew: of 4 MiB, OSD and client took 2.4 times the
 * processor time that they take for pieces of 2 MiB (docs/measurements/rbd.md).
 */
const WRITE_BYTES = 2 * MiB;
/** librbd takes less than 2 GiB. */
const ZERO_BYTES = 1024 * MiB;

/** What crosses to the threads that read and write an image. */
export interface RbdHandle {
  image: bigint;
  /** See door.ts. */
  door: SharedArrayBuffer;
  /** What errors call it. */
  name: string;
}

interface Operation {
  action: "read" | "write" | "zero";
  offsetBytes: number;
  completion: bigint;
  startMs: number;
  resolve: (result: number) => void;
  reject: (error: CowcatcherError) => void;
}

export class RbdIo {
  readonly #handle: RbdHandle;
  readonly #door: Door;
  readonly #isCancelled: () => boolean;
  readonly #inFlight = new Set<Operation>();
  readonly #word = new BigUint64Array(new ArrayBuffer(8));
  /** Native memory for reads, of READ_BYTES each, that no read uses now. */
  readonly #staging: bigint[] = [];
  #native: Librbd | undefined;
  #timer: NodeJS.Timeout | undefined;
  #isClosed = false;

  /** @param isCancelled asked while an answer is awaited; true ends the wait with CANCELLED */
  constructor(handle: RbdHandle, isCancelled: () => boolean) {
    this.#handle = handle;
    this.#door = new Door(handle.door);
    this.#isCancelled = isCancelled;
  }

  /** The buffer may be used again at once, also while the write goes on. @throws CowcatcherError IO, NO_SPACE, CANCELLED */
  async write(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const { image } = this.#handle;
    const address = addressOf(buffer.buffer) + buffer.byteOffset + bufferOffset;
    const pieces: Promise<number>[] = [];
    for (let done = 0; done < lengthBytes; done += WRITE_BYTES) {
      const [at, from] = [offsetBytes + done, address + done];
      const length = Math.min(WRITE_BYTES, lengthBytes - done);
      pieces.push(
        this.#run("write", at, (native, completion) => native.aioWrite(image, at, length, from, completion)),
      );
    }
    // All of them: whoever writes the range again after an error is not to be overtaken by what is left of it.
    for (const outcome of await Promise.allSettled(pieces)) {
      if (outcome.status === "rejected") throw outcome.reason;
    }
  }

  /** The range reads as zeroes afterwards; whole objects of it go. @throws as write */
  async writeZeroes(offsetBytes: number, lengthBytes: number): Promise<void> {
    const { image } = this.#handle;
    for (let done = 0; done < lengthBytes; done += ZERO_BYTES) {
      const at = offsetBytes + done;
      const length = Math.min(ZERO_BYTES, lengthBytes - done);
      await this.#run("zero", at, (native, completion) =>
        native.aioWriteZeroes(image, at, length, completion),
      );
    }
  }

  /** @throws CowcatcherError IO, CANCELLED */
  async read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    for (let done = 0; done < lengthBytes; done += READ_BYTES) {
      const length = Math.min(READ_BYTES, lengthBytes - done);
      await this.#readPiece(buffer, bufferOffset + done, length, offsetBytes + done);
    }
  }

  async #readPiece(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const native = this.#enter();
    const staging = this.#takeStaging(native);
    let isDone = false;
    try {
      const { image } = this.#handle;
      const count = await this.#run("read", offsetBytes, (_, completion) =>
        native.aioRead(image, offsetBytes, lengthBytes, staging, completion),
      );
      isDone = true;
      const got = Math.min(count, lengthBytes);
      native.copy(addressOf(buffer.buffer) + buffer.byteOffset + bufferOffset, staging, got);
      // The image ends there.
      buffer.fill(0, bufferOffset + got, bufferOffset + lengthBytes);
    } catch (error) {
      isDone = !(error instanceof CowcatcherError && error.code === "CANCELLED");
      throw error;
    } finally {
      if (!isDone) this.#door.leaveBehind(staging);
      else if (this.#isClosed) native.free(staging);
      else this.#staging.push(staging);
    }
  }

  #takeStaging(native: Librbd): bigint {
    const memory = this.#staging.pop() ?? native.allocate(READ_BYTES);
    if (memory !== 0n) return memory;
    throw new CowcatcherError({
      code: "LIMIT",
      object: this.#handle.name,
      problem: `no memory for a read of ${READ_BYTES} bytes`,
    });
  }

  /** @returns the operation's result, 0 or a count */
  #run(
    action: Operation["action"],
    offsetBytes: number,
    submit: (native: Librbd, completion: bigint) => number,
  ): Promise<number> {
    const native = this.#enter();
    return new Promise((resolve, reject) => {
      this.#submit(
        native,
        { action, offsetBytes, completion: 0n, startMs: performance.now(), resolve, reject },
        submit,
      );
    });
  }

  #submit(
    native: Librbd,
    operation: Operation,
    submit: (native: Librbd, completion: bigint) => number,
  ): void {
    let result = native.aioCreateCompletion(this.#word.buffer);
    if (result >= 0) {
      operation.completion = this.#word[0] ?? 0n;
      result = submit(native, operation.completion);
      if (result < 0) native.aioRelease(operation.completion);
    }
    if (result < 0) {
      operation.reject(rbdError(operation.action, this.#handle.name, result, operation.offsetBytes));
      return;
    }
    this.#inFlight.add(operation);
    // The youngest is the next to be asked for.
    clearTimeout(this.#timer);
    this.#timer = setTimeout(this.#poll, POLL_FIRST_MS);
  }

  readonly #poll = (): void => {
    const isCancelled = this.#isCancelled();
    const nowMs = performance.now();
    let nextMs = POLL_LONGEST_MS;
    for (const operation of this.#inFlight) {
      if (this.#settle(operation, isCancelled)) continue;
      nextMs = Math.min(nextMs, Math.max(POLL_FIRST_MS, (nowMs - operation.startMs) / POLL_FRACTION));
    }
    if (this.#inFlight.size > 0) this.#timer = setTimeout(this.#poll, nextMs);
  };

  /** False: it goes on, and is awaited. */
  #settle(operation: Operation, isCancelled: boolean): boolean {
    const native = this.#native;
    if (native === undefined) return false;
    const { completion, action, offsetBytes, resolve, reject } = operation;
    const isComplete = native.aioIsComplete(completion) !== 0;
    if (!isComplete && !isCancelled) return false;
    this.#inFlight.delete(operation);
    if (!isComplete) {
      native.aioRelease(completion);
      reject(this.#cancelled());
      return true;
    }
    const result = native.aioReturnValue(completion);
    native.aioRelease(completion);
    if (result < 0) reject(rbdError(action, this.#handle.name, result, offsetBytes));
    else resolve(result);
    return true;
  }

  /** Before the first call. @throws CowcatcherError CANCELLED when the image is being closed. */
  #enter(): Librbd {
    if (this.#native === undefined) {
      const native = librbd();
      if (this.#isClosed || !this.#door.enter()) throw this.#cancelled();
      this.#native = native;
    }
    return this.#native;
  }

  #cancelled(): CowcatcherError {
    const object = this.#handle.name;
    return new CowcatcherError({ code: "CANCELLED", object, problem: "the image is being closed" });
  }

  /** Leaves: what is in flight still is left to itself. Idempotent. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    clearTimeout(this.#timer);
    const native = this.#native;
    if (native === undefined) return;
    for (const operation of [...this.#inFlight]) this.#settle(operation, true);
    for (const staging of this.#staging.splice(0)) native.free(staging);
    this.#native = undefined;
    this.#door.leave();
  }
}
