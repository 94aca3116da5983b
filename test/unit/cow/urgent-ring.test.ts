import { expect, it } from "vitest";
import { Drainer } from "../../../src/cow/drain.js";
import { geometryOf } from "../../../src/cow/geometry.js";
import {
  createSharedState,
  CTL_RUN,
  CTL_SWEEP,
  CTL_URGENT_HEAD,
  CTL_URGENT_TAIL,
  QUEUED,
  RUN_RUNNING,
  type SharedState,
} from "../../../src/cow/shared.js";
import { BLOCK_BYTES, makeEngine, MiB } from "../../support/cow-engine.js";

function popAll(shared: SharedState): number[] {
  const chunks: number[] = [];
  for (let chunk = shared.popUrgent(); chunk >= 0; chunk = shared.popUrgent()) chunks.push(chunk);
  return chunks;
}

function drainerOf(shared: SharedState): Drainer {
  return new Drainer({
    shared,
    reader: {
      sizeBytes: shared.geometry.sizeBytes,
      read: (buffer, offset, length) => void buffer.fill(1, offset, offset + length),
      extent: (_offset, lengthBytes) => ({ lengthBytes, zero: false }),
      close: () => undefined,
    },
    writer: { write: () => undefined, writeZeroes: () => undefined, close: () => undefined },
    topOnly: false,
    zeroUnitBytes: BLOCK_BYTES,
    spill: null,
    chunkBuffer: new Uint8Array(MiB),
    onSourceError: "report",
    onTargetError: "report",
    targetRetries: 0,
    onStop: () => undefined,
    now: () => 0n,
  });
}

it("keeps each chunk, also where one that the sweep has taken is queued again before its entry is out", () => {
  const engine = makeEngine({ sizeBytes: 2 * MiB });
  try {
    const { shared, interceptor } = engine;
    Atomics.store(shared.control, CTL_RUN, RUN_RUNNING);
    const steps = drainerOf(shared).run();
    const stepUntil = (isReached: () => boolean): void => {
      for (let i = 0; i < 100 && !isReached(); i++) steps.next();
      expect(isReached()).toBe(true);
    };
    stepUntil(() => Atomics.load(shared.control, CTL_SWEEP) === 1);
    // The worker has chunk 0 from the sweep and has not claimed it yet.
    expect(interceptor.beforeWrite(MiB, 1)).toBeUndefined();
    expect(interceptor.beforeWrite(0, 1)).toBeUndefined();
    stepUntil(() => ((shared.chunkWords[0] ?? 0) & QUEUED) === 0);
    expect(interceptor.beforeWrite(BLOCK_BYTES, 1)).toBeUndefined();
    expect(popAll(shared)).toEqual([1, 0, 0]);
  } finally {
    engine.close();
  }
});

it("goes on when its counters have come to the end of 31 bits", () => {
  const shared = createSharedState(geometryOf(3 * MiB), new SharedArrayBuffer(0), 0);
  const { length } = shared.urgentRing;
  const last = Math.floor((2 ** 31 - 1) / length) * length - 1;
  shared.control[CTL_URGENT_HEAD] = last;
  shared.control[CTL_URGENT_TAIL] = last;
  for (let round = 0; round < 2 * length; round++) {
    for (const chunk of [2, 0, 1]) shared.pushUrgent(chunk);
    expect(popAll(shared)).toEqual([2, 0, 1]);
  }
});
