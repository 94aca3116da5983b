// The queue in front of io_uring, over a kernel of the test's own: what is handed over when, what waits, what fails.
import { constants } from "node:os";
import { setImmediate as turn } from "node:timers/promises";
import { beforeEach, describe, expect, it } from "vitest";
import { RingQueue, type Ring } from "../../../src/block/file/ring-queue.js";
import { RING_FSYNC, RING_WRITE, type OnCompletion } from "../../../src/native/io-uring.js";

const { EAGAIN, ENXIO } = constants.errno;
const SQ_ENTRIES = 4;
const MAX_IN_FLIGHT = 6;

/** A ring whose kernel does what the test says; requests are known by their offsets. */
class FakeRing implements Ring {
  readonly maxInFlight = MAX_IN_FLIGHT;
  preparedCount = 0;
  isClosed = false;
  /** How many requests each call that waited handed over. */
  readonly waits: number[] = [];
  /** Such a call's time is over before anything is complete. */
  isSlow = false;
  /** Offsets that each system call handed over. */
  readonly calls: number[][] = [];
  /** What the next system calls yield: how many are taken at most, or minus errno. Taken whole when it is empty. */
  readonly answers: number[] = [];
  private readonly prepared: { tag: number; offset: number }[] = [];
  private readonly inFlight = new Map<number, number>();
  private readonly completed: { tag: number; result: number }[] = [];

  get hasRoom(): boolean {
    return this.preparedCount < SQ_ENTRIES;
  }

  get offsetsInFlight(): number[] {
    return [...this.inFlight.keys()].sort((a, b) => a - b);
  }

  prepare(
    _operation: number,
    _fd: number,
    _address: number,
    _length: number,
    offset: number,
    tag: number,
  ): void {
    expect(this.hasRoom).toBe(true);
    expect([...this.inFlight.values(), ...this.prepared.map((entry) => entry.tag)]).not.toContain(tag);
    this.prepared.push({ tag, offset });
    this.preparedCount++;
  }

  submit(): number {
    if (this.preparedCount === 0) return 0;
    const answer = this.answers.shift() ?? this.preparedCount;
    if (answer < 0) return answer;
    const taken = this.prepared.splice(0, answer);
    for (const { tag, offset } of taken) this.inFlight.set(offset, tag);
    expect(this.inFlight.size + this.completed.length).toBeLessThanOrEqual(MAX_IN_FLIGHT);
    this.preparedCount = this.prepared.length;
    this.calls.push(taken.map(({ offset }) => offset));
    return 0;
  }

  submitAndWait(): number {
    this.waits.push(this.prepared.length);
    const result = this.submit();
    if (!this.isSlow) for (const offset of this.offsetsInFlight) this.complete(offset, 8);
    return result;
  }

  withdraw(): void {
    this.prepared.length = this.preparedCount = 0;
  }

  complete(offset: number, result: number): void {
    const tag = this.inFlight.get(offset);
    if (tag === undefined) throw new Error(`${offset} is not in flight`);
    this.inFlight.delete(offset);
    this.completed.push({ tag, result });
  }

  completeUnknown(tag: number): void {
    this.completed.push({ tag, result: 0 });
  }

  reap(onCompletion: OnCompletion): number {
    const completed = this.completed.splice(0);
    for (const { tag, result } of completed) onCompletion(tag, result);
    return completed.length;
  }

  close(): void {
    this.isClosed = true;
  }
}

let ring: FakeRing;
let queue: RingQueue;
let isAwaited: boolean;
let isWakerClosed: boolean;
/** What the queue asks of who decides, and how often it tells it of a wait in vain; whether it is to wait for one that is alone. */
let asked: boolean[];
let vainWaits: number;
let mayWait: boolean;
/** Results by offset, as they came. */
let results: [offset: number, result: number | null][];

beforeEach(() => {
  ring = new FakeRing();
  isAwaited = isWakerClosed = false;
  results = [];
  [asked, vainWaits, mayWait] = [[], 0, false];
  const waker = {
    setAwaited: (value: boolean) => {
      isAwaited = value;
    },
    close: () => {
      isWakerClosed = true;
    },
  };
  queue = new RingQueue(ring, waker, {
    next: (isAlone) => {
      asked.push(isAlone);
      return isAlone && mayWait;
    },
    waitedInVain: () => vainWaits++,
  });
});

function start(...offsets: number[]): void {
  for (const offsetBytes of offsets) {
    queue.start({
      operation: RING_WRITE,
      fd: 1,
      buffer: new Uint8Array(8),
      bufferOffset: 0,
      lengthBytes: 8,
      offsetBytes,
      settle: (result) => results.push([offsetBytes, result]),
    });
  }
}

describe("the queue in front of io_uring", () => {
  it("hands over four before the turn's end, and the rest of them at it", async () => {
    start(0, 1, 2);
    expect(ring.calls).toEqual([]);
    start(3, 4);
    expect(ring.calls).toEqual([[0, 1, 2, 3]]);
    await turn();
    expect(ring.calls).toEqual([[0, 1, 2, 3], [4]]);
  });

  it("hands over a few requests of a turn in one system call, and none before its end", async () => {
    start(0, 1);
    await Promise.resolve();
    start(2);
    expect(ring.calls).toEqual([]);
    await turn();
    expect(ring.calls).toEqual([[0, 1, 2]]);
    await turn();
    expect(ring.calls).toHaveLength(1);
  });

  it("settles each request with its own result, in the order of completion", async () => {
    start(0, 1, 2);
    await turn();
    ring.complete(2, 8);
    ring.complete(0, -EAGAIN);
    expect(results).toEqual([]);
    queue.look();
    expect(results).toEqual([
      [2, 8],
      [0, -EAGAIN],
    ]);
    ring.complete(1, 3);
    queue.look();
    expect(results.at(-1)).toEqual([1, 3]);
  });

  it("finds at the end of the turn what the kernel could do at once", async () => {
    start(0);
    const submit = ring.submit.bind(ring);
    ring.submit = () => {
      const result = submit();
      ring.complete(0, 8);
      return result;
    };
    await turn();
    expect(results).toEqual([[0, 8]]);
  });

  it("lets wait in line what has no place, with no more in flight than the ring has completions for", async () => {
    start(0, 1, 2, 3, 4, 5, 6, 7, 8);
    await turn();
    expect(ring.calls).toEqual([
      [0, 1, 2, 3],
      [4, 5],
    ]);
    await turn();
    expect(ring.offsetsInFlight).toEqual([0, 1, 2, 3, 4, 5]);
    ring.complete(3, 8);
    queue.look();
    // A newcomer does not pass those who wait.
    start(9);
    await turn();
    expect(ring.offsetsInFlight).toEqual([0, 1, 2, 4, 5, 6]);
    for (const offset of [0, 1, 2, 4, 5, 6]) ring.complete(offset, 8);
    queue.look();
    await turn();
    for (const offset of [7, 8, 9]) ring.complete(offset, 8);
    queue.look();
    expect(results.map(([offset]) => offset).sort()).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(queue.isBusy).toBe(false);
  });

  it("tries again what the kernel had no memory for", async () => {
    ring.answers.push(1, -EAGAIN);
    start(0, 1, 2);
    await turn();
    expect(ring.calls).toEqual([[0]]);
    while (ring.calls.length < 2) await turn();
    expect(ring.calls).toEqual([[0], [1, 2]]);
    expect(ring.answers).toEqual([]);
  });

  it("keeps the loop, and the buffers, as long as something is in flight", async () => {
    expect(isAwaited).toBe(false);
    start(0, 1);
    expect(isAwaited).toBe(true);
    await turn();
    ring.complete(0, 8);
    queue.look();
    expect(isAwaited).toBe(true);
    ring.complete(1, 8);
    queue.look();
    expect(isAwaited).toBe(false);
  });

  it("closes when the last request is complete, and not before", async () => {
    start(0, 1);
    const closed = queue.close();
    await turn();
    ring.complete(1, 8);
    queue.look();
    await turn();
    expect(ring.isClosed).toBe(false);
    ring.complete(0, 8);
    queue.look();
    await closed;
    expect([ring.isClosed, isWakerClosed]).toEqual([true, true]);
  });

  it("gives back what was not begun when the ring fails, and lets the rest complete", async () => {
    start(0);
    await turn();
    ring.answers.push(-ENXIO);
    start(1, 2);
    await turn();
    expect(results).toEqual([
      [1, null],
      [2, null],
    ]);
    expect([queue.isBroken, queue.failure, queue.isBusy]).toEqual([true, -ENXIO, true]);
    start(3);
    expect(results.at(-1)).toEqual([3, null]);
    ring.complete(0, 8);
    queue.look();
    expect(results.at(-1)).toEqual([0, 8]);
    expect([queue.isBusy, isAwaited]).toEqual([false, false]);
  });

  it("gives back those in line, too, when the ring fails", async () => {
    ring.answers.push(4, -ENXIO);
    start(0, 1, 2, 3, 4, 5, 6, 7, 8);
    expect(results).toEqual([]);
    await turn();
    expect(results).toEqual([4, 5, 6, 7, 8].map((offset) => [offset, null]));
    expect([ring.calls, queue.isBusy]).toEqual([[[0, 1, 2, 3]], true]);
    for (const offset of [0, 1, 2, 3]) ring.complete(offset, 8);
    queue.look();
    expect([queue.isBusy, isAwaited]).toEqual([false, false]);
  });

  it("gives back at once what a ring that fails was to take before the turn's end", () => {
    ring.answers.push(-ENXIO);
    start(0, 1, 2, 3, 4, 5);
    expect(results).toEqual([0, 1, 2, 3, 4, 5].map((offset) => [offset, null]));
    expect([ring.calls, queue.isBusy, isAwaited]).toEqual([[], false, false]);
  });

  it("waits for a request that is alone, and has its result in the same turn", async () => {
    mayWait = true;
    start(0);
    await turn();
    expect([results, ring.waits, vainWaits]).toEqual([[[0, 8]], [1], 0]);
    expect([queue.isBusy, isAwaited]).toEqual([false, false]);
  });

  it("goes on without the result where the time was over", async () => {
    [mayWait, ring.isSlow] = [true, true];
    start(0);
    await turn();
    expect([results, ring.waits, vainWaits, isAwaited]).toEqual([[], [1], 1, true]);
    // Not alone any more.
    start(1);
    await turn();
    expect([asked, ring.waits]).toEqual([[true, false], [1]]);
    ring.complete(0, 8);
    ring.complete(1, 8);
    queue.look();
    expect(results).toHaveLength(2);
  });

  it("does not wait for two, for a sync, nor beside one in flight", async () => {
    mayWait = true;
    start(0, 1);
    await turn();
    ring.complete(0, 8);
    queue.look();
    start(2);
    await turn();
    for (const offset of ring.offsetsInFlight) ring.complete(offset, 8);
    queue.look();
    const sync = { operation: RING_FSYNC, buffer: null, bufferOffset: 0, lengthBytes: 0 } as const;
    queue.start({ ...sync, fd: 1, offsetBytes: 9, settle: () => undefined });
    await turn();
    expect([asked, ring.waits]).toEqual([[false, false, false], []]);
  });

  it("gives back a request whose call to wait for it failed", async () => {
    mayWait = true;
    ring.answers.push(-ENXIO);
    start(0);
    await turn();
    expect([results, queue.isBusy]).toEqual([[[0, null]], false]);
  });

  it("takes no completion for a request that is not in flight", async () => {
    start(0);
    await turn();
    ring.completeUnknown(5);
    expect(() => queue.look()).toThrow("the ring has completed 5, which is not in flight");
  });
});
