// The T0 view one rule at a time; test/model/snapshot.test.ts has the schedules.
import { describe, expect, it } from "vitest";
import { geometryOf } from "../../../src/cow/geometry.js";
import { Interceptor } from "../../../src/cow/interceptor.js";
import { allocatePages } from "../../../src/cow/page-memory.js";
import { createSharedState } from "../../../src/cow/shared.js";
import { memoryAlone } from "../../../src/cow/slot-memory.js";
import { SnapshotDevice } from "../../../src/cow/snapshot-device.js";
import type { BlockDevice, BlockStatus, Completion } from "../../../src/block/device.js";
import { GiB } from "../../../src/units.js";
import { BLOCK_BYTES, MiB } from "../../support/cow-engine.js";

const SIZE_BYTES = 4 * MiB;

/** All of it is told to be a hole; status is answered when the test says so, while `isSlow`. */
class HoleDisk implements Pick<
  BlockDevice,
  "name" | "sizeBytes" | "clusterSizeBytes" | "read" | "blockStatus"
> {
  readonly name = "disk";
  readonly sizeBytes = SIZE_BYTES;
  readonly clusterSizeBytes = 65_536;
  readonly content = new Uint8Array(SIZE_BYTES);
  readonly readLengths: number[] = [];
  isSlow = false;
  answer: () => void = () => undefined;

  read(buffer: Uint8Array, bufferOffset: number, length: number, offset: number): Completion {
    this.readLengths.push(length);
    buffer.set(this.content.subarray(offset, offset + length), bufferOffset);
    return undefined;
  }

  blockStatus(_offset: number, lengthBytes: number): BlockStatus | Promise<BlockStatus> {
    const status = { lengthBytes, zero: true, data: false, depth: 0, present: false, compressed: false };
    if (!this.isSlow) return status;
    return new Promise((resolve) => (this.answer = () => resolve(status)));
  }
}

/** @param slots may be longer than what is used of it: memory goes from job to job. */
function makeSnapshot(slots = allocatePages(MiB, "test")) {
  const disk = new HoleDisk();
  const image = disk as unknown as BlockDevice;
  const shared = createSharedState(geometryOf(SIZE_BYTES), memoryAlone(slots), MiB);
  const interceptor = new Interceptor({
    shared,
    image,
    openSpill: undefined,
    spillLimitBytes: 0,
    policy: { onBufferFull: "cancel", onCbwError: "break-snapshot", guestTimeoutMs: 1e9 },
    onBroken: () => undefined,
  });
  const device = new SnapshotDevice({
    name: "disk-snapshot",
    image,
    shared,
    spill: undefined,
    source: interceptor,
  });
  /** What stood there at T0 was 7; the guest makes it a hole. */
  const punch = (offset: number, length: number) => {
    disk.content.fill(7, offset, offset + length);
    expect(interceptor.beforeWrite(offset, length)).toBeUndefined();
    disk.content.fill(0, offset, offset + length);
  };
  return { disk, device, interceptor, punch };
}

describe("status", () => {
  it("ends a hole before a block that the guest has made one since, in whatever chunk", () => {
    const { device, punch } = makeSnapshot();
    punch(2 * MiB + 3 * BLOCK_BYTES, 100);
    const first = device.blockStatus(MiB / 2, 3 * MiB) as BlockStatus;
    expect(first).toMatchObject({ zero: true, lengthBytes: 1.5 * MiB });
    const rest = device.blockStatus(2 * MiB, MiB) as BlockStatus;
    expect(rest).toMatchObject({ zero: true, lengthBytes: 3 * BLOCK_BYTES });
    const held = device.blockStatus(2 * MiB + 3 * BLOCK_BYTES + 1, MiB) as BlockStatus;
    expect(held).toMatchObject({ zero: false, data: true, lengthBytes: BLOCK_BYTES - 1 });
    expect(device.blockStatus(2 * MiB + 4 * BLOCK_BYTES, MiB)).toMatchObject({
      zero: true,
      lengthBytes: MiB,
    });
  });

  it("that comes late says nothing of what the guest has changed meanwhile", async () => {
    const { disk, device, punch } = makeSnapshot();
    disk.isSlow = true;
    const early = device.blockStatus(0, MiB);
    punch(8 * BLOCK_BYTES, BLOCK_BYTES);
    disk.answer();
    expect(await early).toMatchObject({ zero: true, lengthBytes: 8 * BLOCK_BYTES });
    const other = device.blockStatus(2 * MiB, MiB);
    punch(2 * MiB, 2 * BLOCK_BYTES);
    disk.answer();
    expect(await other).toMatchObject({ zero: false, data: true, lengthBytes: 2 * BLOCK_BYTES });
  });

  it("of a hole that the guest has written into is still a hole", () => {
    const { device, interceptor } = makeSnapshot();
    expect(interceptor.beforeWrite(10_000, 20_000)).toBeUndefined();
    const held = device.blockStatus(2 * BLOCK_BYTES, MiB - 2 * BLOCK_BYTES);
    expect(held).toMatchObject({ zero: true, data: false, lengthBytes: 6 * BLOCK_BYTES });
  });

  it.each([3, 4])("of changed data is data, also with a buffer of %i GiB", (gibibytes) => {
    const { device, punch } = makeSnapshot(allocatePages(gibibytes * GiB, "test"));
    punch(0, BLOCK_BYTES);
    expect(device.blockStatus(0, MiB)).toMatchObject({ zero: false, data: true, lengthBytes: BLOCK_BYTES });
  });

  it("is an error once the snapshot is over", () => {
    const { device, interceptor } = makeSnapshot();
    interceptor.detach();
    expect(() => device.blockStatus(0, 1)).toThrow("disk-snapshot: the snapshot has ended at offset 0");
  });
});

describe("reading", () => {
  it("takes one read where few blocks are captured, and none where all are", () => {
    const { disk, device, punch } = makeSnapshot();
    punch(0, BLOCK_BYTES);
    punch(4 * BLOCK_BYTES, BLOCK_BYTES);
    punch(20 * BLOCK_BYTES, 10 * BLOCK_BYTES);
    disk.readLengths.length = 0;
    const buffer = new Uint8Array(30 * BLOCK_BYTES);
    expect(device.read(buffer, 0, buffer.length, 0)).toBeUndefined();
    expect(disk.readLengths).toEqual([19 * BLOCK_BYTES]);
    const sevens = [0, 4, 20, 29].map((block) => buffer[block * BLOCK_BYTES]);
    expect(sevens).toEqual([7, 7, 7, 7]);
    expect([1, 3, 5, 19].map((block) => buffer[block * BLOCK_BYTES])).toEqual([0, 0, 0, 0]);
    expect(device.read(buffer, 0, 9 * BLOCK_BYTES, 20 * BLOCK_BYTES + 100)).toBeUndefined();
    expect(disk.readLengths).toHaveLength(1);
  });

  it("serves a long request a chunk a turn, so that the guest gets its turns, too", async () => {
    const { disk, device } = makeSnapshot();
    const reading = device.read(new Uint8Array(SIZE_BYTES), 0, SIZE_BYTES, 0);
    expect(disk.readLengths).toEqual([MiB]);
    await reading;
    expect(disk.readLengths).toEqual([MiB, MiB, MiB, MiB]);
  });

  it("refuses every change", async () => {
    const { device } = makeSnapshot();
    for (const change of [
      device.write(new Uint8Array(1), 0, 1, 0),
      device.writeZeroes(0),
      device.discard(0),
    ]) {
      await expect(change).rejects.toMatchObject({ errno: "EROFS" });
    }
    expect(device.flush()).toBeUndefined();
  });
});
