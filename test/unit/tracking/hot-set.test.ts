import { expect, it } from "vitest";
import { LOG_BYTES, LogWriter, readLog } from "../../../src/tracking/activity-log.js";
import type { TrackingFile } from "../../../src/tracking/folder.js";
import { HotSet } from "../../../src/tracking/hot-set.js";

const GENERATION = "0a8dd5a2-5c3b-4b8f-9a59-5a0f4f1f6c11";

/** A set whose syncs end when the test says so, unless they are to end by themselves. */
function makeSet(limit: number, { holdsSyncs = false, extentCount = 1 << 20 } = {}) {
  const log = new Uint8Array(LOG_BYTES);
  const syncs: (() => void)[] = [];
  let writeCount = 0;
  const writeDurably = (bytes: Uint8Array, offsetBytes: number): Promise<void> => {
    log.set(bytes, offsetBytes);
    writeCount++;
    return Promise.resolve();
  };
  const writer = new LogWriter(GENERATION, 1);
  for (const { bytes, offsetBytes } of writer.base([])) log.set(bytes, offsetBytes);
  const hot = new HotSet({
    file: { writeDurably } as unknown as TrackingFile,
    log: writer,
    limit,
    extentCount,
    syncBits: () => (holdsSyncs ? new Promise((resolve) => syncs.push(resolve)) : Promise.resolve()),
    onFailed: () => Promise.reject(new Error("the log failed")),
  });
  const logged = (): number[] => [...(readLog(log, GENERATION)?.hot ?? [])].sort((a, b) => a - b);
  return { hot, syncs, logged, writes: () => writeCount };
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

it("an extent that got a bit since the sync began stays, and the sync is made again", async () => {
  const { hot, syncs, logged } = makeSet(2, { holdsSyncs: true });
  await hot.request(0, 1);
  const third = hot.request(7, 7);
  await turn();
  expect(syncs.length).toBe(1);
  hot.touch(0, 1);
  syncs.shift()?.();
  await turn();
  expect(hot.areHot(0, 1)).toBe(true);
  expect(logged()).toEqual([0, 1]);
  // Now one of them has no bit that is younger than the sync.
  hot.touch(1, 1);
  syncs.shift()?.();
  await third;
  expect([hot.areHot(0, 0), hot.areHot(1, 1), hot.areHot(7, 7)]).toEqual([false, true, true]);
  expect(logged()).toEqual([1, 7]);
});

it("who asks just as the log's last order is done is served", async () => {
  for (let delay = 0; delay < 8; delay++) {
    const { hot } = makeSet(64);
    let isServed = false;
    const asks = async (): Promise<void> => {
      await hot.request(0, 0);
      for (let microtask = 0; microtask < delay; microtask++) await Promise.resolve();
      await hot.request(1, 1);
      isServed = true;
    };
    void asks();
    await turn();
    expect(isServed, `${delay} microtasks later`).toBe(true);
  }
});

it("a guest that needs many extents waits for few writes to the log, and all that is hot is in it", async () => {
  const { hot, logged, writes } = makeSet(4096, { extentCount: 256 });
  let waits = 0;
  for (let i = 0; i < 256; i++) {
    const extent = (i * 101) % 256;
    if (hot.areHot(extent, extent)) continue;
    waits++;
    await hot.request(extent, extent);
  }
  expect(waits).toBeLessThan(128);
  expect(writes()).toBeLessThan(128);
  expect([hot.size, logged().length]).toEqual([256, 256]);
});

it("neighbours get no more than half of the set, and what was asked for all of it", async () => {
  const { hot, logged } = makeSet(64);
  for (let extent = 0; extent < 63; extent++) {
    await hot.request(extent * 1000, extent * 1000);
    expect(hot.size).toBeLessThanOrEqual(Math.max(32, extent + 1 + 31));
  }
  for (let extent = 63; extent < 500; extent++) {
    await hot.request(extent * 1000, extent * 1000);
    expect(hot.size).toBeLessThanOrEqual(64);
    expect(hot.areHot(extent * 1000, extent * 1000)).toBe(true);
  }
  expect(logged().length).toBe(hot.size);
});
