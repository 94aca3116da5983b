// A disk that a guest has: the image, with the interceptors of the jobs that run on it. Main thread only.
//
// A write passes every interceptor, then the image. When all of that is synchronous, nothing is allocated and the
// write cannot meet T0: T0 is a turn of the event loop of its own. Writes that go on asynchronously are counted,
// and `quiesceAll` closes the gates, waits until none is in flight, and runs what makes T0 in one synchronous step
// (invariant 5). A write that waited, for the gate or for an interceptor, starts again from the top, so that it
// meets the interceptors of a job that started meanwhile.
//
// Before all of them comes who keeps track of changes: the write's bits are set in the epoch in which the image is
// written, since nothing comes between the last question and the write.
//
// There are two gates, as a trim of terabytes may go on for minutes, and no other write may wait for it:
//
//   1. close the gate of the long requests (of each disk, one after another: who holds it alone makes a T0)
//   2. wait until no long request is in flight, and do what is left to prepare: no other start can come in between; all
//      else goes on
//   3. close the gate of the others (of all disks at once), wait until no write is in flight
//   4. the step; open all gates
//
// Storage that does not answer would hold up the guests of all the disks. So all of it has one limit, a guest
// write's own; then the gates open and the start has failed. So they do at once when the start is cancelled.

import type {
  BlockDevice,
  BlockStatus,
  Completion,
  FileRange,
  Image,
  WriteZeroesOptions,
} from "../block/device.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { GiB } from "../units.js";
import type { Interceptor } from "./interceptor.js";
import type { WriteTracker } from "./write-tracker.js";

/**
 * A longer trim or write of zeroes (NBD's extended headers allow any length) is carried out in pieces, with a turn of
 * the event loop between two, so that it cannot hold up other guests. It is one write all the same: T0 waits for all
 * of it.
 */
const PIECE_BYTES = 1 * GiB;
/** The longest time of a timer. */
const TIMER_MS_MAX = 2 ** 31 - 1;

/**
 * A served disk: passes a guest's requests to its image, through the interceptors of the jobs that run, and
 * closes its gate for T0. Main thread only; ranges in bytes, checked by the caller.
 */
export class DiskNode implements BlockDevice {
  readonly name: string;
  readonly sizeBytes: number;
  readonly readOnly: boolean;
  readonly clusterSizeBytes: number;
  #interceptors: readonly Interceptor[] = [];
  readonly #writes = new Traffic();
  /** Trims and writes of zeroes in pieces; while its gate is closed one start has the disk to itself. */
  readonly #longRequests = new Traffic();

  constructor(
    readonly nodeName: string,
    readonly image: Image,
    private readonly tracker: WriteTracker | null = null,
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

  cachedRange(offsetBytes: number, lengthBytes: number): FileRange | undefined {
    return this.image.cachedRange?.(offsetBytes, lengthBytes);
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
    // Metadata of the image is written then.
    this.tracker?.touched();
    const completion = this.image.flush();
    return this.tracker === null ? completion : completion?.finally(() => this.tracker?.touched());
  }

  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus> {
    return this.image.blockStatus(offsetBytes, lengthBytes);
  }

  close(): Promise<void> {
    return this.image.close();
  }

  #beforeWrite(offsetBytes: number, lengthBytes: number): Completion {
    return this.#writes.gate ?? this.#intercept(offsetBytes, lengthBytes);
  }

  /** The tracker first: a write that waits for it starts again, and must not have captured for nothing. */
  #intercept(offsetBytes: number, lengthBytes: number): Completion {
    try {
      const tracked = this.tracker?.beforeWrite(offsetBytes, lengthBytes);
      if (tracked) return tracked;
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
    const traffic = this.#longRequests;
    while (traffic.gate !== null) await traffic.gate;
    traffic.enter();
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
      traffic.leave();
      this.tracker?.touched();
    }
  }

  #track(completion: Completion): Completion {
    if (!completion) return undefined;
    const writes = this.#writes;
    writes.enter();
    return completion.finally(() => {
      writes.leave();
      this.tracker?.touched();
    });
  }

  /** Waits until no other start has the disk; the result gives it up again. */
  async #closeToLongRequests(deadline: Deadline): Promise<() => void> {
    const traffic = this.#longRequests;
    while (traffic.gate !== null) {
      const problem = "another backup of the disk has been about to start for";
      await deadline.within(traffic.gate, this.name, problem, "start the backup again");
    }
    return traffic.close();
  }

  #longRequestsOver(deadline: Deadline): Promise<void> {
    const problem = "a trim or a write of zeroes of more than 1 GiB has held up the start of the backup for";
    return deadline.within(this.#longRequests.idle(), this.name, problem, "start the backup when it is over");
  }

  #writesOver(deadline: Deadline): Promise<void> {
    const problem = "a write to the disk has held up the start of the backup, and all other writes, for";
    const hint = "see that the disk's storage answers, then start the backup again";
    return deadline.within(this.#writes.idle(), this.name, problem, hint);
  }

  /**
   * Runs `step` synchronously at a moment at which no write is in flight on any of the disks: one T0 for all.
   * Guest writes that come meanwhile wait, for as long as the local writes in flight take and at most limitMs. What
   * `step` throws is thrown on, with the gates open again.
   * @param signal ends the wait when it is aborted: up to the very turn of `step`, which does not run then
   * @param prepare what no other start may come between and `step`; guest writes go on meanwhile
   * @throws CowcatcherError GUEST_TIMEOUT naming the disk that had no such moment within limitMs; the signal's reason.
   *   `step` has not run.
   */
  static async quiesceAll<T>(
    nodes: readonly DiskNode[],
    step: () => T,
    limitMs: number,
    signal?: AbortSignal,
    prepare?: () => Promise<void>,
  ): Promise<T> {
    // In one order for everybody, so that two groups that share disks cannot wait for each other.
    const inOrder = [...new Set(nodes)].sort((a, b) => (a.nodeName < b.nodeName ? -1 : 1));
    const openers: (() => void)[] = [];
    const deadline = new Deadline(limitMs, signal);
    try {
      for (const node of inOrder) openers.push(await node.#closeToLongRequests(deadline));
      for (const node of inOrder) await node.#longRequestsOver(deadline);
      if (prepare !== undefined) {
        const names = inOrder.map(({ nodeName }) => nodeName).join(", ");
        const problem = "keeping track of changes has held up the start of the backup for";
        await deadline.within(prepare(), names, problem, "see that the tracking folder's storage answers");
      }
      for (const node of inOrder) openers.push(node.#writes.close());
      for (const node of inOrder) await node.#writesOver(deadline);
      signal?.throwIfAborted();
      return step();
    } finally {
      deadline.clear();
      for (const open of openers) open();
    }
  }
}

/** Requests of one kind: how many are in flight, and the gate at which the next ones wait. */
class Traffic {
  /** While it is closed: fulfilled when it opens. */
  gate: Promise<void> | null = null;
  #inFlight = 0;
  #onIdle: (() => void) | null = null;

  enter(): void {
    this.#inFlight++;
  }

  leave(): void {
    this.#inFlight--;
    if (this.#inFlight === 0) this.#onIdle?.();
  }

  /** The gate must be open; the result opens it again. */
  close(): () => void {
    let open: () => void = () => {};
    this.gate = new Promise((resolve) => {
      open = resolve;
    });
    return () => {
      this.gate = null;
      this.#onIdle = null;
      open();
    };
  }

  /** With the gate closed: fulfilled when nothing is in flight. */
  async idle(): Promise<void> {
    if (this.#inFlight > 0) {
      await new Promise<void>((resolve) => {
        this.#onIdle = resolve;
      });
    }
  }
}

/** One limit for several waits one after another, and the signal that ends them. */
class Deadline {
  readonly #limitMs: number;
  readonly #signal: AbortSignal | undefined;
  readonly #timer: NodeJS.Timeout;
  readonly #over: Promise<boolean>;
  #end: () => void = () => {};

  constructor(limitMs: number, signal: AbortSignal | undefined) {
    signal?.throwIfAborted();
    this.#limitMs = Math.min(limitMs, TIMER_MS_MAX);
    this.#signal = signal;
    this.#over = new Promise((resolve) => {
      this.#end = () => resolve(true);
    });
    this.#timer = setTimeout(this.#end, this.#limitMs);
    signal?.addEventListener("abort", this.#end);
  }

  /**
   * @throws CowcatcherError GUEST_TIMEOUT if the limit comes first; `problem` is what has lasted so long. The signal's
   *   reason if that does.
   */
  async within(wait: Promise<void>, object: string, problem: string, hint: string): Promise<void> {
    const isOver = await Promise.race([wait, this.#over]);
    this.#signal?.throwIfAborted();
    if (isOver !== true) return;
    throw new CowcatcherError({
      code: "GUEST_TIMEOUT",
      object,
      problem: `${problem} ${this.#limitMs} ms`,
      hint,
    });
  }

  clear(): void {
    clearTimeout(this.#timer);
    this.#signal?.removeEventListener("abort", this.#end);
  }
}
