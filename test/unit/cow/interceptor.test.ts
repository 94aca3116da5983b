import { afterEach, describe, expect, it, vi } from "vitest";
import {
  CAPTURED,
  CTL_SPILL_BLOCKS,
  CTL_URGENT_TAIL,
  CTL_USED_BLOCKS,
  DONE,
  READING,
  OWNER_MASK,
} from "../../../src/cow/shared.js";
import { FINE_CUT } from "../../../src/cow/geometry.js";
import { SpillFile } from "../../../src/cow/spill.js";
import { DiskNode } from "../../../src/cow/disk-node.js";
import type { Image } from "../../../src/block/device.js";
import { CowcatcherError } from "../../../src/errors.js";
import {
  BLOCK_BYTES,
  type Engine,
  type EngineOptions,
  makeEngine,
  MiB,
  turns,
} from "../../support/cow-engine.js";

const CLUSTER = 64 * 1024;
let engine: Engine;

function make(options?: EngineOptions): Engine {
  engine = makeEngine(options);
  return engine;
}

afterEach(() => engine.close());

function readError(): CowcatcherError {
  return new CowcatcherError({ code: "IO", object: "disk", problem: "cannot read", errno: "EIO" });
}

describe("a capture whose read fails later", () => {
  it("fails the guest's write, and leaves no rejection that nobody handles, under break-guest-write", async () => {
    const { disk, interceptor, shared, broken } = make({ policy: { onCbwError: "break-guest-write" } });
    const unhandled: unknown[] = [];
    const note = (error: unknown) => unhandled.push(error);
    process.on("unhandledRejection", note);
    try {
      disk.cold = true;
      const write = Promise.resolve(interceptor.beforeWrite(0, BLOCK_BYTES));
      const outcome = write.then(
        () => "went on",
        (error: unknown) => (error as CowcatcherError).errno,
      );
      disk.reads.shift()?.fail(readError());
      await turns();
      for (const read of disk.reads) read.fail(readError());
      expect(await outcome).toBe("EIO");
      await turns();
    } finally {
      process.removeListener("unhandledRejection", note);
    }
    expect(unhandled).toEqual([]);
    expect(broken).toEqual([]);
    expect(shared.chunkWords[0] & OWNER_MASK).toBe(0);
    expect(shared.control[CTL_USED_BLOCKS]).toBe(0);
  });

  it("ends the snapshot once, and lets the write go on, under break-snapshot", async () => {
    const { disk, interceptor, broken } = make();
    disk.cold = true;
    const write = interceptor.beforeWrite(0, BLOCK_BYTES);
    disk.reads[0]?.fail(readError());
    await write;
    expect(broken.map(({ errno }) => errno)).toEqual(["EIO"]);
    expect(interceptor.detached).toBe(true);
  });
});

describe("after detach", () => {
  it("a cold read that ends does not write to the spill, whose descriptor may be another file's by then", async () => {
    // Buffer of one slot less than the write needs, so that the capture goes to the spill.
    const { disk, interceptor, shared, spillFd, spill: description } = make({ bufferBytes: CLUSTER });
    disk.cold = true;
    const write = interceptor.beforeWrite(0, 2 * CLUSTER);
    expect(disk.reads.length).toBeGreaterThan(0);
    interceptor.detach();
    disk.cold = false;
    for (const read of disk.reads) read.finish();
    await write;
    const spill = new SpillFile(description, shared.geometry);
    const bitmap = new Uint8Array(shared.geometry.blocksPerChunk / 8);
    spill.readBitmap(0, bitmap);
    expect(bitmap.every((byte) => byte === 0)).toBe(true);
    const data = Buffer.alloc(BLOCK_BYTES);
    const { readSync } = await import("node:fs");
    expect(readSync(spillFd, data, 0, BLOCK_BYTES, 0)).toBe(0);
  });

  it("says when no read goes into the buffer any more, so that the memory can be given to another job", async () => {
    const { disk, interceptor } = make();
    disk.cold = true;
    const write = interceptor.beforeWrite(0, BLOCK_BYTES);
    interceptor.detach();
    let settled = false;
    const settling = interceptor.idle().then(() => {
      settled = true;
    });
    await turns();
    expect(settled).toBe(false);
    disk.reads[0]?.finish();
    await settling;
    await write;
  });
});

describe("the spill's limit", () => {
  it("counts captures whose reads have not ended yet", async () => {
    const { disk, interceptor, broken, shared } = make({
      bufferBytes: CLUSTER,
      spillLimitBytes: 2 * CLUSTER,
    });
    disk.cold = true;
    const first = interceptor.beforeWrite(0, 2 * CLUSTER);
    expect(shared.control[CTL_SPILL_BLOCKS] * BLOCK_BYTES).toBe(2 * CLUSTER);
    const second = interceptor.beforeWrite(MiB, 2 * CLUSTER);
    disk.cold = false;
    for (const read of disk.reads) read.finish();
    await Promise.all([first, second]);
    expect(broken.map(({ code }) => code)).toEqual(["BUFFER_FULL"]);
  });

  it("is given back by a capture that fails", async () => {
    const { disk, interceptor, shared } = make({
      bufferBytes: CLUSTER,
      policy: { onCbwError: "break-guest-write" },
    });
    disk.cold = true;
    const write = Promise.resolve(interceptor.beforeWrite(0, 2 * CLUSTER));
    const outcome = write.catch(() => "failed");
    for (const read of disk.reads) read.fail(readError());
    await turns();
    for (const read of disk.reads) read.fail(readError());
    expect(await outcome).toBe("failed");
    expect(shared.control[CTL_SPILL_BLOCKS]).toBe(0);
  });

  it("is 8 TiB at most, as the blocks in it are counted in 32 bits", () => {
    const { interceptor, broken, shared } = make({ bufferBytes: CLUSTER });
    shared.control[CTL_SPILL_BLOCKS] = 2 ** 31 - 40;
    expect(interceptor.beforeWrite(0, 2 * CLUSTER)).toBeUndefined();
    expect(broken).toEqual([]);
    expect(interceptor.beforeWrite(MiB, 2 * CLUSTER)).toBeUndefined();
    expect(broken.map(({ problem }) => problem)).toEqual([
      `the spill file has reached its limit of ${2 ** 43 - 4096} bytes`,
    ]);
  });

  it("is not passed by a single write", () => {
    const { interceptor, broken, shared } = make({ bufferBytes: CLUSTER, spillLimitBytes: CLUSTER });
    expect(interceptor.beforeWrite(0, 2 * CLUSTER)).toBeUndefined();
    expect(broken.map(({ code }) => code)).toEqual(["BUFFER_FULL"]);
    expect(shared.control[CTL_SPILL_BLOCKS]).toBe(0);
  });
});

describe("a capture that breaks between two reads", () => {
  it("keeps its slots until the reads that go on have ended", async () => {
    const { disk, interceptor, shared } = make({
      bufferBytes: 2 * CLUSTER,
      policy: { onCbwError: "break-guest-write", onBufferFull: "wait" },
    });
    disk.cold = true;
    const read = disk.read.bind(disk);
    let calls = 0;
    disk.read = (...range) => {
      if (++calls === 2) throw readError();
      return read(...range);
    };
    const outcome = Promise.resolve(interceptor.beforeWrite(0, 2 * CLUSTER)).catch(() => "failed");
    await turns();
    // The first of the two reads still fills its slot: the chunk stays claimed, so nothing takes the slot.
    expect(shared.chunkWords[0] & OWNER_MASK).not.toBe(0);
    disk.reads[0]?.finish();
    expect(await outcome).toBe("failed");
    expect(shared.chunkWords[0] & OWNER_MASK).toBe(0);
  });
});

describe("without a buffer", () => {
  it("writes that wait for clusters in a worker's hands neither wake each other nor queue the chunk again", async () => {
    const { interceptor, shared, drain } = make({ bufferBytes: 0 });
    const writes = [0, 1, 2].map((i) => Promise.resolve(interceptor.beforeWrite(i * CLUSTER, BLOCK_BYTES)));
    await turns();
    // A worker has popped the chunk and holds its clusters.
    expect(shared.popUrgent()).toBe(0);
    shared.clusterStates.fill(READING, 0, 3);
    shared.release(0, 8, 0);
    await turns();
    const pushed = shared.control[CTL_URGENT_TAIL];
    const release = vi.spyOn(shared, "release");
    await turns(50);
    expect(release).not.toHaveBeenCalled();
    expect(shared.control[CTL_URGENT_TAIL]).toBe(pushed);
    drain(0);
    await Promise.all(writes);
  });

  it("a write is let go when its clusters are done just before it begins to wait", async () => {
    const { interceptor, shared, drain } = make({ bufferBytes: 0 });
    const announceWait = shared.announceWait.bind(shared);
    shared.announceWait = (chunk) => {
      shared.announceWait = announceWait;
      drain(chunk);
      return announceWait(chunk);
    };
    await interceptor.beforeWrite(0, BLOCK_BYTES);
  });

  it("asks for the clusters of a write alone, and for 64 KiB where the guest goes on from where it was", async () => {
    const { interceptor, shared, drain } = make({ bufferBytes: 0, cut: FINE_CUT });
    const asked = () => [...shared.clusterStates.keys()].filter((i) => shared.clusterStates[i] === CAPTURED);
    const writes = [Promise.resolve(interceptor.beforeWrite(MiB + 40 * 1024, 16 * 1024))];
    expect(asked()).toEqual([66, 67]);
    writes.push(Promise.resolve(interceptor.beforeWrite(2 * MiB - BLOCK_BYTES, BLOCK_BYTES)));
    writes.push(Promise.resolve(interceptor.beforeWrite(2 * MiB, BLOCK_BYTES)));
    expect(asked()).toEqual([66, 67, 127, 128, 129, 130, 131]);
    for (const chunk of [4, 7, 8]) drain(chunk);
    await Promise.all(writes);
  });
});

describe("a long trim", () => {
  it("ends when its blocks are captured, not when the backup does, and lets others run meanwhile", async () => {
    const { interceptor, shared, disk } = make({ sizeBytes: 40 * MiB, bufferBytes: 64 * MiB });
    let trimmed = false;
    const image = Object.assign(disk, { discard: () => void (trimmed = true) });
    const node = new DiskNode("disk", image as unknown as Image);
    await DiskNode.quiesceAll([node], () => node.addInterceptor(interceptor), 1e4);
    const trimming = node.discard(0, 40 * MiB);
    expect(shared.control[CTL_USED_BLOCKS] * BLOCK_BYTES).toBeLessThanOrEqual(4 * MiB);
    await turns(20);
    expect(shared.control[CTL_USED_BLOCKS] * BLOCK_BYTES).toBe(40 * MiB);
    expect(trimmed).toBe(true);
    await trimming;
    // What is captured already needs no turn of the event loop.
    expect(node.discard(0, 40 * MiB)).toBeUndefined();
  });

  it("takes no turn of the event loop either where all is done", () => {
    const { interceptor, shared } = make({ sizeBytes: 40 * MiB });
    shared.clusterStates.fill(DONE);
    expect(interceptor.beforeWrite(0, 40 * MiB)).toBeUndefined();
  });
});

describe("a full buffer under `wait`", () => {
  it("serves a large write before small ones that came later", async () => {
    const { interceptor, shared, freeCaptures } = make({
      sizeBytes: 8 * MiB,
      bufferBytes: 2 * MiB,
      policy: { onBufferFull: "wait" },
    });
    // Full but for nothing: 512 blocks.
    expect(interceptor.beforeWrite(0, 2 * MiB)).toBeUndefined();
    expect(shared.control[CTL_USED_BLOCKS]).toBe(512);
    const order: string[] = [];
    const large = Promise.resolve(interceptor.beforeWrite(4 * MiB, MiB)).then(() => order.push("large"));
    await turns();
    const small = Array.from({ length: 8 }, (_, i) =>
      Promise.resolve(interceptor.beforeWrite(6 * MiB + i * BLOCK_BYTES, BLOCK_BYTES)).then(() =>
        order.push("small"),
      ),
    );
    await turns();
    expect(freeCaptures(0)).toBe(256);
    // A write that comes now finds free blocks, but others were here before it.
    const late = Promise.resolve(interceptor.beforeWrite(7 * MiB, BLOCK_BYTES)).then(() =>
      order.push("late"),
    );
    await large;
    expect(order[0]).toBe("large");
    freeCaptures(1);
    await Promise.all([...small, late]);
    expect(order.at(-1)).toBe("late");
  });

  it("does not hold up a write whose blocks are captured already", () => {
    const { interceptor } = make({
      sizeBytes: 8 * MiB,
      bufferBytes: 2 * MiB,
      policy: { onBufferFull: "wait" },
    });
    expect(interceptor.beforeWrite(0, 2 * MiB)).toBeUndefined();
    void Promise.resolve(interceptor.beforeWrite(4 * MiB, MiB));
    expect(interceptor.beforeWrite(BLOCK_BYTES, BLOCK_BYTES)).toBeUndefined();
    interceptor.detach();
  });
});
