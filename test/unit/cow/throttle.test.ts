import fc from "fast-check";
import { afterEach, describe, expect, it, vi } from "vitest";
import { Drainer } from "../../../src/cow/drain.js";
import type { DrainStep } from "../../../src/cow/drain-io.js";
import { geometryOf } from "../../../src/cow/geometry.js";
import {
  CNT_RATE_LIMIT,
  CNT_RATE_NEXT_NS,
  createSharedState,
  CTL_RUN,
  RUN_ABORTING,
  RUN_PAUSED,
  RUN_RUNNING,
} from "../../../src/cow/shared.js";
import { bookTransfer, changeLimit } from "../../../src/cow/throttle.js";

const SECOND = 1_000_000_000n;
const MiB = 1024 * 1024;

function countersOf(limit: bigint): BigInt64Array {
  const counters = new BigInt64Array(new SharedArrayBuffer(64));
  counters[CNT_RATE_LIMIT] = limit;
  return counters;
}

describe("bookTransfer", () => {
  it("without a limit lets everything through at once", () => {
    expect(bookTransfer(countersOf(0n), 1e9, 5n)).toBe(0n);
  });

  it("keeps to the limit in the long run, whatever is written by whom and when", () => {
    const transfers = fc.array(
      fc.record({ bytes: fc.integer({ min: 1, max: 4 * MiB }), idleNs: fc.nat(1e9) }),
      {
        minLength: 1,
        maxLength: 100,
      },
    );
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 1e9 }), transfers, (limit, steps) => {
        const counters = countersOf(BigInt(limit));
        let now = 0n;
        let end = 0n;
        for (const { bytes, idleNs } of steps) {
          now += BigInt(idleNs);
          const start = bookTransfer(counters, bytes, now);
          expect(start >= now).toBe(true);
          // Not before the one before it is paid for.
          expect(start >= end).toBe(true);
          end = start + (BigInt(bytes) * SECOND) / BigInt(limit);
        }
      }),
    );
  });

  it("does not make up for a pause by a burst", () => {
    const counters = countersOf(1000n);
    bookTransfer(counters, 1000, 0n);
    expect(bookTransfer(counters, 1000, 100n * SECOND)).toBe(100n * SECOND);
    expect(bookTransfer(counters, 1000, 100n * SECOND)).toBe(101n * SECOND);
  });

  describe("while the limit is changed", () => {
    afterEach(() => void vi.restoreAllMocks());

    /** Runs `change` when a worker has computed its booking and is about to make it. */
    function justBeforeBooking(change: () => void): void {
      const compareExchange = Atomics.compareExchange.bind(Atomics);
      const spy = vi.spyOn(Atomics, "compareExchange") as unknown as ReturnType<typeof vi.fn>;
      spy.mockImplementationOnce((...parameters: Parameters<typeof compareExchange>) => {
        change();
        return compareExchange(...parameters);
      });
    }

    it.each([
      ["after a first booking", 1],
      ["before any booking", 0],
    ])("books at the new limit: %s", (_when, bookings) => {
      const counters = countersOf(0n);
      changeLimit(counters, 1);
      for (let i = 0; i < bookings; i++) bookTransfer(counters, 1, SECOND);
      justBeforeBooking(() => changeLimit(counters, MiB));
      // At the old limit this transfer would take twelve days.
      expect(bookTransfer(counters, MiB, 5n * SECOND)).toBe(5n * SECOND);
      expect(bookTransfer(counters, MiB, 5n * SECOND)).toBe(6n * SECOND);
    });

    it("books nothing if there is no limit any more", () => {
      const counters = countersOf(0n);
      changeLimit(counters, 1);
      bookTransfer(counters, MiB, SECOND);
      justBeforeBooking(() => changeLimit(counters, 0));
      expect(bookTransfer(counters, MiB, 2n * SECOND)).toBe(0n);
      changeLimit(counters, 1);
      expect(bookTransfer(counters, 1, 3n * SECOND)).toBe(3n * SECOND);
    });
  });

  it("takes limits of one byte and of eight exbibytes", () => {
    expect(bookTransfer(countersOf(1n), MiB, 0n)).toBe(0n);
    const slow = countersOf(1n);
    bookTransfer(slow, MiB, 0n);
    expect(bookTransfer(slow, 1, 0n)).toBe(BigInt(MiB) * SECOND);
    const fast = countersOf(2n ** 63n - 1n);
    bookTransfer(fast, 2 ** 30, 7n);
    expect(bookTransfer(fast, 1, 7n)).toBe(7n);
  });
});

describe("a worker under a limit", () => {
  /** A worker that copies a disk of two chunks of data at 1 MiB a second, up to its first sleep. */
  function sleeper() {
    const geometry = geometryOf(2 * MiB);
    const shared = createSharedState(geometry, new SharedArrayBuffer(0), 0);
    const clock = { now: 0n };
    const written: number[] = [];
    Atomics.store(shared.counters, CNT_RATE_LIMIT, BigInt(MiB));
    Atomics.store(shared.control, CTL_RUN, RUN_RUNNING);
    const drainer = new Drainer({
      shared,
      reader: {
        sizeBytes: 2 * MiB,
        read: (buffer, offset, length) => void buffer.fill(1, offset, offset + length),
        extent: (_offset, lengthBytes) => ({ lengthBytes, zero: false }),
        close: () => undefined,
      },
      writer: {
        write: (_buffer, _at, _length, offset) => void written.push(offset),
        writeZeroes: () => undefined,
        close: () => undefined,
      },
      topOnly: false,
      zeroUnitBytes: 4096,
      spill: null,
      chunkBuffer: new Uint8Array(MiB),
      onSourceError: "report",
      onTargetError: "report",
      targetRetries: 0,
      onStop: () => undefined,
      now: () => clock.now,
    });
    const steps = drainer.run();
    const next = (): DrainStep => {
      for (;;) {
        const result = steps.next();
        if (result.done) return { kind: "step" };
        if (result.value.kind !== "step") return result.value;
      }
    };
    return { shared, clock, written, next };
  }

  it("that a pause wakes sleeps on until its time, and does not pay twice", () => {
    const { shared, clock, written, next } = sleeper();
    expect(next()).toEqual({ kind: "sleep", untilNs: SECOND });
    expect(written).toEqual([0]);
    Atomics.store(shared.control, CTL_RUN, RUN_PAUSED);
    expect(next()).toEqual({ kind: "sleep", untilNs: SECOND });
    Atomics.store(shared.control, CTL_RUN, RUN_RUNNING);
    expect(next()).toEqual({ kind: "sleep", untilNs: SECOND });
    clock.now = SECOND;
    next();
    expect(written).toEqual([0, MiB]);
    expect(shared.counters[CNT_RATE_NEXT_NS]).toBe(2n * SECOND);
  });

  it("goes on at another limit at once", () => {
    const { shared, written, next } = sleeper();
    next();
    Atomics.store(shared.counters, CNT_RATE_LIMIT, 0n);
    Atomics.store(shared.counters, CNT_RATE_NEXT_NS, 0n);
    next();
    expect(written).toEqual([0, MiB]);
  });

  it("does not write any more once the job is aborted", () => {
    const { shared, written, next } = sleeper();
    next();
    Atomics.store(shared.control, CTL_RUN, RUN_ABORTING);
    expect(next()).toEqual({ kind: "step" });
    expect(written).toEqual([0]);
  });
});
