// A disk that a guest has: the image, with the interceptors of the jobs that run on it. Main thread only.
//
// A write passes every interceptor, then the image. When all of that is synchronous, nothing is allocated and the
// write cannot meet T0: T0 is a turn of the event loop of its own. Writes that go on asynchronously are counted,
// and `quiesce` closes the gate, waits until none is in flight, and runs what makes T0 in one synchronous step
// (invariant 5). A write that waited, for the gate or for an interceptor, starts again from the top, so that it
// meets the interceptors of a job that started meanwhile.

import type { BlockDevice, BlockStatus, Completion, Image, WriteZeroesOptions } from "../image/device.js";
import { toCowcatcherError } from "../errors.js";
import { GiB } from "../units.js";
import type { Interceptor } from "./interceptor.js";

/**
 * A longer trim or write of zeroes (NBD's extended headers allow any length) is carried out in pieces, with a turn of
 * the event loop between two, so that it cannot hold up other guests. It is one write all the same: T0 waits for all
 * of it.
 */
const PIECE_BYTES = 1 * GiB;

export class DiskNode implements BlockDevice {
  readonly name: string;
  readonly sizeBytes: number;
  readonly readOnly: boolean;
  readonly clusterSizeBytes: number;
  #interceptors: readonly Interceptor[] = [];
  #inFlight = 0;
  #gate: Promise<void> | null = null;
  #onIdle: (() => void) | null = null;

  constructor(
    readonly nodeName: string,
    readonly image: Image,
  ) {
    this.name = image.name;
    this.sizeBytes = image.sizeBytes;
    this.readOnly = image.readOnly;
    this.clusterSizeBytes = image.clusterSizeBytes;
  }

  /** Only inside the step that `quiesceAll` runs. */
  addInterceptor(interceptor: Interceptor): void {
    this.#interceptors = [...this.#interceptors, interceptor];
  }

  /** At any time; the interceptor must be detached. */
  removeInterceptor(interceptor: Interceptor): void {
    this.#interceptors = this.#interceptors.filter((other) => other !== interceptor);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.image.read(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const wait = this.#beforeWrite(offsetBytes, lengthBytes);
    if (wait) return wait.then(() => this.write(buffer, bufferOffset, lengthBytes, offsetBytes));
    return this.#track(this.image.write(buffer, bufferOffset, lengthBytes, offsetBytes));
  }

  writeZeroes(offsetBytes: number, lengthBytes: number, options: WriteZeroesOptions): Completion {
    if (lengthBytes > PIECE_BYTES) {
      return this.#inPieces(offsetBytes, lengthBytes, (at, count) =>
        this.image.writeZeroes(at, count, options),
      );
    }
    const wait = this.#beforeWrite(offsetBytes, lengthBytes);
    if (wait) return wait.then(() => this.writeZeroes(offsetBytes, lengthBytes, options));
    return this.#track(this.image.writeZeroes(offsetBytes, lengthBytes, options));
  }

  canZeroFast(offsetBytes: number, lengthBytes: number, options: WriteZeroesOptions): boolean {
    return this.image.canZeroFast?.(offsetBytes, lengthBytes, options) ?? false;
  }

  discard(offsetBytes: number, lengthBytes: number): Completion {
    if (lengthBytes > PIECE_BYTES) {
      return this.#inPieces(offsetBytes, lengthBytes, (at, count) => this.image.discard(at, count));
    }
    const wait = this.#beforeWrite(offsetBytes, lengthBytes);
    if (wait) return wait.then(() => this.discard(offsetBytes, lengthBytes));
    return this.#track(this.image.discard(offsetBytes, lengthBytes));
  }

  flush(): Completion {
    return this.image.flush();
  }

  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus> {
    return this.image.blockStatus(offsetBytes, lengthBytes);
  }

  close(): Promise<void> {
    return this.image.close();
  }

  #beforeWrite(offsetBytes: number, lengthBytes: number): Completion {
    return this.#gate ?? this.#intercept(offsetBytes, lengthBytes);
  }

  #intercept(offsetBytes: number, lengthBytes: number): Completion {
    try {
      for (const interceptor of this.#interceptors) {
        const wait = interceptor.beforeWrite(offsetBytes, lengthBytes);
        if (wait) return wait;
      }
      return undefined;
    } catch (error) {
      // Under break-guest-write a capture that fails at once fails the write, as a later failure does.
      return Promise.reject(toCowcatcherError(error, this.name));
    }
  }

  /** Past the gate once: T0 cannot come between two pieces, nor can the interceptors of a job that it starts. */
  async #inPieces(
    offsetBytes: number,
    lengthBytes: number,
    step: (offsetBytes: number, lengthBytes: number) => Completion,
  ): Promise<void> {
    while (this.#gate !== null) await this.#gate;
    this.#inFlight++;
    try {
      const end = offsetBytes + lengthBytes;
      for (let at = offsetBytes; at < end; at += PIECE_BYTES) {
        const count = Math.min(PIECE_BYTES, end - at);
        // A piece that waited starts again: another interceptor may have come to need it.
        for (let wait = this.#intercept(at, count); wait; wait = this.#intercept(at, count)) await wait;
        await step(at, count);
        await new Promise((resolve) => setImmediate(resolve));
      }
    } finally {
      this.#leave();
    }
  }

  #track(completion: Completion): Completion {
    if (!completion) return undefined;
    this.#inFlight++;
    return completion.finally(() => this.#leave());
  }

  #leave(): void {
    this.#inFlight--;
    if (this.#inFlight === 0) this.#onIdle?.();
  }

  /** Closes the gate and waits until no write is in flight; the result opens the gate again. */
  async #close(): Promise<() => void> {
    let open: () => void = () => {};
    const gate = new Promise<void>((resolve) => {
      open = resolve;
    });
    while (this.#gate !== null) await this.#gate;
    this.#gate = gate;
    if (this.#inFlight > 0) {
      await new Promise<void>((resolve) => {
        this.#onIdle = resolve;
      });
      this.#onIdle = null;
    }
    return () => {
      this.#gate = null;
      open();
    };
  }

  /**
   * Runs `step` synchronously at a moment at which no write is in flight on any of the disks: one T0 for all.
   * Guest writes that come meanwhile wait, for as long as the local writes in flight take. What `step` throws is
   * thrown on, with the gates open again.
   */
  static async quiesceAll<T>(nodes: readonly DiskNode[], step: () => T): Promise<T> {
    const openers: (() => void)[] = [];
    try {
      // In one order for everybody, so that two groups that share disks cannot wait for each other.
      for (const node of [...nodes].sort((a, b) => (a.nodeName < b.nodeName ? -1 : 1))) {
        openers.push(await node.#close());
      }
      return step();
    } finally {
      for (const open of openers) open();
    }
  }
}
