// Requests to io_uring (native/io-uring.ts), in the rhythm of the event loop.
//
//   start() ──► an entry of the ring ──► four, or the end of the turn: one system call ──► in flight
//       └─ no place ─► waiting ─► an entry …                                                 │
//   settle(result) ◄── reaped: at the end of a turn, or when the eventfd wakes the loop ◄┘
//
// The end of a turn is setImmediate: whatever the sockets asked for in one turn of the loop goes to the kernel by then,
// and replies go back together. While the loop runs, completions are found by a look at memory; when it sleeps the
// eventfd wakes it (native/loop-event.ts). A request that is alone is waited for in the system call, where nobody else
// wants the thread (lone-requests.ts).
//
// Bounds: of those that wait no more are handed over in a turn than the submission ring has places for, and no more are in
// flight than the completion ring has. Who comes later waits in line, and the line is bounded by who asks: an NBD connection has
// a bound of its own, a copy's workers have, and each file's bounce buffers are counted.
//
// A request holds its buffer from `start` until `settle`: the kernel may write into it until then. The queue holds the
// loop as long as anything is in flight, so a process does not end by itself before that. One that is made to end leaves
// its memory to the kernel, which keeps the pages of each O_DIRECT request until the device is done with them.
//
// Main thread only.

import { addressOf } from "../../native/addresses.js";
import { IoUring, isPassing, RING_FSYNC, type RingOperation } from "../../native/io-uring.js";
import { LoopEvent } from "../../native/loop-event.js";
import { LoneRequests } from "./lone-requests.js";

/** Requests that one system call hands over at most, and one turn: about a millisecond, in which nobody else is served. */
const SQ_ENTRIES = 128;
/** Requests in flight at most. Before Linux 5.12 rings count as locked memory, of which a user may have 64 KiB only. */
const CQ_ENTRIES = 1024;
/**
 * So many are handed over before the turn's end: while the thread takes in the others, the device works. Where a guest's
 * requests went to the device all together it stood still as long as the thread worked, and the thread as long as it did.
 */
const AT_ONCE = 4;
/** After the kernel was short of memory for a request. */
const RETRY_MS = 1;
/** The loop is held up for so long at most, by a disk that has begun to be slow. */
const LONE_WAIT_MICROSECONDS = 500;

export interface RingRequest {
  readonly operation: RingOperation;
  readonly fd: number;
  /** Null: a sync. */
  readonly buffer: Uint8Array | null;
  readonly bufferOffset: number;
  readonly lengthBytes: number;
  readonly offsetBytes: number;
  /** Bytes, or minus errno. Null: the ring has failed before the request was begun, and nothing of it is done. */
  settle(result: number | null): void;
}

/** What a queue needs of a ring, and of what wakes the loop: others in tests. */
export type Ring = Pick<
  IoUring,
  | "maxInFlight"
  | "hasRoom"
  | "preparedCount"
  | "prepare"
  | "submit"
  | "submitAndWait"
  | "withdraw"
  | "reap"
  | "close"
>;
export type Waker = Pick<LoopEvent, "setAwaited" | "close">;

export class RingQueue {
  /** The ring has failed: a request that is started now comes back at once, with null. */
  isBroken = false;
  /** What the kernel refused it with. */
  failure = 0;
  /** By tag: prepared or in flight. */
  private readonly held: (RingRequest | undefined)[] = [];
  private readonly freeTags: number[] = [];
  private readonly waiting: RingRequest[] = [];
  /** Of the entries that are not handed over yet, in their order. */
  private readonly preparedTags: number[] = [];
  private isTurnEndScheduled = false;
  private onIdle: (() => void) | null = null;

  constructor(
    private readonly ring: Ring,
    private readonly waker: Waker,
    private readonly lone: Pick<LoneRequests, "next" | "waitedInVain"> = new LoneRequests(),
  ) {
    for (let tag = ring.maxInFlight - 1; tag >= 0; tag--) this.freeTags.push(tag);
  }

  /** @returns minus errno where this system has no ring for us */
  static open(): RingQueue | number {
    const ring = IoUring.open(SQ_ENTRIES, CQ_ENTRIES);
    if (typeof ring === "number") return ring;
    const opened: { queue?: RingQueue } = {};
    const event = LoopEvent.open(() => opened.queue?.look());
    const result = typeof event === "number" ? event : ring.signal(event.fd);
    if (typeof event === "number" || result < 0) {
      ring.close();
      if (typeof event !== "number") event.close();
      return result;
    }
    return (opened.queue = new RingQueue(ring, event));
  }

  /** Prepared, in flight or waiting. */
  get isBusy(): boolean {
    return this.freeTags.length < this.ring.maxInFlight || this.waiting.length > 0;
  }

  /** The request's buffer is the queue's until `settle`. */
  start(request: RingRequest): void {
    if (this.isBroken) return request.settle(null);
    if (!this.isBusy) this.waker.setAwaited(true);
    if (this.waiting.length > 0 || !this.prepare(request)) this.waiting.push(request);
    else if (this.ring.preparedCount >= AT_ONCE) this.submit(this.ring.submit());
    this.scheduleTurnEnd();
  }

  /** Takes what is complete. */
  look(): void {
    if (this.ring.reap(this.onCompletion) === 0) return;
    if (this.waiting.length > 0) this.prepareWaiting();
    if (!this.isBusy) this.becameIdle();
  }

  /** Waits for what is in flight. Nobody starts anything any more. */
  async close(): Promise<void> {
    if (this.isBusy) {
      await new Promise<void>((resolve) => {
        this.onIdle = resolve;
      });
    }
    this.ring.close();
    this.waker.close();
  }

  /** @returns false where there is no place for it now */
  private prepare(request: RingRequest): boolean {
    if (this.freeTags.length === 0 || !this.ring.hasRoom) return false;
    const tag = this.freeTags.pop() as number;
    const { operation, fd, buffer, bufferOffset, lengthBytes, offsetBytes } = request;
    const address = buffer === null ? 0 : addressOf(buffer.buffer) + buffer.byteOffset + bufferOffset;
    this.ring.prepare(operation, fd, address, lengthBytes, offsetBytes, tag);
    this.held[tag] = request;
    this.preparedTags.push(tag);
    return true;
  }

  private prepareWaiting(): void {
    let count = 0;
    for (const request of this.waiting) {
      if (!this.prepare(request)) break;
      count++;
    }
    this.waiting.splice(0, count);
    if (count > 0) this.scheduleTurnEnd();
  }

  private scheduleTurnEnd(): void {
    if (this.isTurnEndScheduled) return;
    this.isTurnEndScheduled = true;
    setImmediate(this.endTurn);
  }

  private readonly endTurn = (): void => {
    this.isTurnEndScheduled = false;
    if (this.lone.next(this.isAlone)) this.submitAndWait();
    else this.submit(this.ring.submit());
    // What the file system could do at once is complete already.
    this.look();
    if (this.waiting.length > 0 && !this.isBroken) this.prepareWaiting();
  };

  /** One read or write is prepared, and nothing else is asked for. A sync takes long. */
  private get isAlone(): boolean {
    const [tag, second] = this.preparedTags;
    if (tag === undefined || second !== undefined || this.waiting.length > 0) return false;
    const isOnly = this.freeTags.length === this.ring.maxInFlight - 1;
    return isOnly && this.held[tag]?.operation !== RING_FSYNC;
  }

  private submitAndWait(): void {
    this.submit(this.ring.submitAndWait(LONE_WAIT_MICROSECONDS));
    this.look();
    if (this.isBusy) this.lone.waitedInVain();
  }

  /** @param result of the system call that handed over what was prepared */
  private submit(result: number): void {
    const { preparedCount } = this.ring;
    this.preparedTags.splice(0, this.preparedTags.length - preparedCount);
    if (result < 0 && !isPassing(result)) return this.breakDown(result);
    if (preparedCount > 0 && !this.isTurnEndScheduled) {
      this.isTurnEndScheduled = true;
      setTimeout(this.endTurn, RETRY_MS);
    }
  }

  /** What is in flight goes on; what is not is given back. */
  private breakDown(minusErrno: number): void {
    this.isBroken = true;
    this.failure = minusErrno;
    this.ring.withdraw();
    const given = this.preparedTags.splice(0).map((tag) => this.release(tag));
    given.push(...this.waiting.splice(0));
    for (const request of given) request.settle(null);
    if (!this.isBusy) this.becameIdle();
  }

  private readonly onCompletion = (tag: number, result: number): void => {
    this.release(tag).settle(result);
  };

  private release(tag: number): RingRequest {
    const request = this.held[tag];
    if (request === undefined) throw new TypeError(`the ring has completed ${tag}, which is not in flight`);
    this.held[tag] = undefined;
    this.freeTags.push(tag);
    return request;
  }

  private becameIdle(): void {
    this.waker.setAwaited(false);
    this.onIdle?.();
  }
}
