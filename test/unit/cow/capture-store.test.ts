import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { CaptureStore, CaptureWork } from "../../../src/cow/capture-store.js";
import { geometryOf } from "../../../src/cow/geometry.js";
import { captureLength, createSharedState, type SharedState } from "../../../src/cow/shared.js";
import type { BlockDevice } from "../../../src/block/device.js";
import { BLOCK_BYTES, MiB } from "../../support/cow-engine.js";

/** A store over a disk of zeroes; writes of some blocks each, one after another. */
function makeStore(bufferBytes: number, sizeBytes: number) {
  const shared = createSharedState(geometryOf(sizeBytes), new SharedArrayBuffer(bufferBytes), bufferBytes);
  const image = { name: "disk", sizeBytes, read: () => undefined } as unknown as BlockDevice;
  const store = new CaptureStore({ shared, image, openSpill: undefined, spillLimitBytes: 0 });
  const work = new CaptureWork();
  const { chunkBytes } = shared.geometry;
  const capture = (offset: number, blockCount: number): void => {
    const chunk = Math.floor(offset / chunkBytes);
    const to = offset + blockCount * BLOCK_BYTES;
    work.reset();
    expect(store.findMissing(chunk, offset, to)).toBe(blockCount);
    store.readIntoSlots(work, chunk, offset, to);
    store.attach(chunk, offset, to, work);
  };
  return { shared, store, capture };
}

/** As a worker does: all captures of the chunk in one chain. The number of blocks. */
function freeChunk(shared: SharedState, chunk: number): number {
  const first = shared.chunkHead(chunk);
  let last = -1;
  let blocks = 0;
  for (let capture = first; capture >= 0; capture = shared.captureNext[capture] ?? -1) {
    last = capture;
    blocks += captureLength(shared.captureInfo[capture] ?? 0);
  }
  shared.setChunkHead(chunk, -1);
  if (last >= 0) shared.pushFreed(first, last, blocks);
  return blocks;
}

describe("what workers have freed", () => {
  it("comes back a bounded number of captures a guest write, however much it is", () => {
    const { shared, store, capture } = makeStore(16 * MiB, 16 * MiB);
    for (let offset = 0; offset < 16 * MiB; offset += BLOCK_BYTES) capture(offset, 1);
    expect(store.freeBlockCount).toBe(0);
    for (let chunk = 0; chunk < 16; chunk++) freeChunk(shared, chunk);
    let calls = 0;
    while (store.freeBlockCount < 2048) {
      const before = store.freeBlockCount;
      store.reclaimIfLow(1);
      expect(store.freeBlockCount).toBeGreaterThan(before);
      expect(store.freeBlockCount - before).toBeLessThanOrEqual(64);
      calls++;
    }
    expect(calls).toBeGreaterThan(10);
  });

  it("comes back at once as far as a write needs it", () => {
    const { shared, store, capture } = makeStore(2 * MiB, 2 * MiB);
    for (let offset = 0; offset < 2 * MiB; offset += BLOCK_BYTES) capture(offset, 1);
    freeChunk(shared, 0);
    store.reclaimIfLow(256);
    expect(store.freeBlockCount).toBe(256);
    freeChunk(shared, 1);
    store.reclaimIfLow(300);
    expect(store.freeBlockCount).toBeGreaterThanOrEqual(300);
  });

  it("is never lost, and never held back from a write that needs it", () => {
    const writes = fc.array(
      fc.oneof(
        fc.record({ capture: fc.integer({ min: 1, max: 256 }) }),
        fc.record({ free: fc.integer({ min: 0, max: 3 }) }),
      ),
      { maxLength: 60 },
    );
    fc.assert(
      fc.property(writes, (steps) => {
        const { shared, store, capture } = makeStore(2 * MiB, 64 * MiB);
        const total = store.freeBlockCount;
        let used = 0;
        let next = 0;
        for (const step of steps) {
          if ("capture" in step) {
            store.reclaimIfLow(step.capture);
            expect(store.freeBlockCount >= step.capture).toBe(total - used >= step.capture);
            if (store.freeBlockCount < step.capture) continue;
            capture(next * MiB, step.capture);
            next++;
            used += step.capture;
          } else if (next > 0) {
            used -= freeChunk(shared, Math.max(0, next - 1 - step.free));
          }
        }
        store.reclaim(total - used);
        expect(store.freeBlockCount).toBe(total - used);
      }),
    );
  });
});
