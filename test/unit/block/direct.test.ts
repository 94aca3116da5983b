// O_DIRECT over a device of the test's own, which takes whole blocks only and completes requests in any order, in part,
// or not at all; and over the two real ways to a file.
import * as fs from "node:fs";
import { constants, tmpdir } from "node:os";
import * as path from "node:path";
import { setImmediate as turn } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { DirectFile } from "../../../src/block/file/direct.js";
import { DirectIo } from "../../../src/block/file/direct-io.js";
import { pageAlignedMemory } from "../../../src/block/file/fileio.js";
import type { RingRequest } from "../../../src/block/file/ring-queue.js";
import { RING_FSYNC, RING_READ } from "../../../src/native/io-uring.js";
import { beginsPage } from "../../../src/native/pages.js";
import { Random } from "../../support/random.js";

const BLOCK = 4096;
const { EAGAIN, EINVAL, EIO, ENOSPC } = constants.errno;

type Fate = (request: RingRequest) => number | null | undefined;

/** Keeps what is started until the test has it done. */
class Device {
  readonly pending: RingRequest[] = [];
  /** Bytes to do at most, minus errno, null for a ring that failed; undefined: all of it. */
  fate: Fate = () => undefined;

  constructor(readonly bytes: Uint8Array) {}

  start(request: RingRequest): void {
    if (request.buffer !== null) {
      expect([request.offsetBytes % BLOCK, request.lengthBytes % BLOCK]).toEqual([0, 0]);
      expect(beginsPage(request.buffer.buffer, request.buffer.byteOffset + request.bufferOffset)).toBe(true);
    }
    this.pending.push(request);
  }

  /** Does one of the pending requests. */
  complete(index = 0): void {
    const [request] = this.pending.splice(index, 1);
    if (request === undefined) throw new Error("nothing is pending");
    const answer = this.fate(request) ?? (this.fate(request) === null ? null : request.lengthBytes);
    request.settle(answer === null || answer < 0 ? answer : this.transfer(request, answer));
  }

  private transfer({ operation, buffer, bufferOffset, offsetBytes }: RingRequest, most: number): number {
    if (operation === RING_FSYNC || buffer === null) return 0;
    const count = Math.max(0, Math.min(most, this.bytes.length - offsetBytes));
    const place = buffer.subarray(bufferOffset, bufferOffset + count);
    if (operation === RING_READ) place.set(this.bytes.subarray(offsetBytes, offsetBytes + count));
    else this.bytes.set(place, offsetBytes);
    return count;
  }
}

let device: Device;
let file: DirectFile;

beforeEach(() => {
  device = new Device(noise(1, 64 * BLOCK));
  file = DirectFile.growing("disk", -1, () => device.bytes.length, new DirectIo("disk", -1, device));
});

function noise(seed: number, lengthBytes: number): Uint8Array {
  const random = new Random(seed);
  return Uint8Array.from({ length: lengthBytes }, () => random.below(256));
}

/** Completes requests, oldest first, until the operation is over. */
async function finish(operation: Promise<void>): Promise<void> {
  let isOver = false;
  const over = operation.finally(() => (isOver = true));
  over.catch(() => undefined);
  while (!isOver) {
    if (device.pending.length > 0) device.complete();
    await turn();
  }
  return over;
}

describe("a file with O_DIRECT", () => {
  it("goes on where a read or a write was short", async () => {
    device.fate = ({ lengthBytes }) => Math.min(lengthBytes, BLOCK);
    const before = device.bytes.slice();
    const buffer = new Uint8Array(5 * BLOCK);
    await finish(file.read(buffer, 0, buffer.length, 100));
    expect(Buffer.compare(buffer, before.subarray(100, 100 + buffer.length))).toBe(0);
    const data = noise(2, 5 * BLOCK);
    await finish(file.write(data, 0, data.length, 2 * BLOCK + 7));
    before.set(data, 2 * BLOCK + 7);
    expect(Buffer.compare(device.bytes, before)).toBe(0);
  });

  it.each([
    ["read", EIO, { code: "IO", errno: "EIO", object: "disk", offsetBytes: 3 * BLOCK }],
    ["write", EIO, { code: "IO", errno: "EIO", object: "disk", offsetBytes: 3 * BLOCK }],
    ["write", ENOSPC, { code: "NO_SPACE", errno: "ENOSPC", object: "disk", offsetBytes: 3 * BLOCK }],
  ] as const)("tells where a %s failed (errno %i)", async (action, errno, expected) => {
    device.fate = ({ offsetBytes }) => (offsetBytes >= 3 * BLOCK ? -errno : BLOCK);
    const operation = file[action](pageAlignedMemory(4 * BLOCK), 0, 4 * BLOCK, BLOCK);
    await expect(finish(operation)).rejects.toMatchObject(expected);
    // Nothing is held any more.
    device.fate = () => undefined;
    await finish(file.write(noise(3, 10), 0, 10, 3 * BLOCK));
    await file.close();
  });

  it("copies where the device refuses the memory", async () => {
    const memory = pageAlignedMemory(BLOCK);
    device.fate = ({ buffer }) => (buffer?.buffer === memory.buffer ? -EINVAL : undefined);
    await finish(file.read(memory, 0, BLOCK, BLOCK));
    expect(Buffer.compare(memory, device.bytes.subarray(BLOCK, 2 * BLOCK))).toBe(0);
    memory.fill(7);
    await finish(file.write(memory, 0, BLOCK, 5 * BLOCK));
    expect(Buffer.compare(device.bytes.subarray(5 * BLOCK, 6 * BLOCK), memory)).toBe(0);
  });

  it("has as many guests' requests with the device as a connection may have of them, up to 64", async () => {
    const data = noise(4, BLOCK);
    const writes = Array.from({ length: 64 }, (_, index) => file.write(data, 0, BLOCK, index * BLOCK));
    await turn();
    expect(device.pending.length).toBe(64);
    await finish(Promise.all(writes).then(() => undefined));
    for (let index = 0; index < 64; index++) {
      expect(Buffer.compare(device.bytes.subarray(index * BLOCK, (index + 1) * BLOCK), data)).toBe(0);
    }
  });

  it("closes when the last request is over, and not before", async () => {
    const read = file.read(new Uint8Array(10), 0, 10, 0);
    const write = file.write(noise(5, 10), 0, 10, BLOCK);
    const sync = file.sync();
    let isClosed = false;
    const closed = file.close().then(() => (isClosed = true));
    while (device.pending.length > 0) {
      await turn();
      expect(isClosed).toBe(false);
      device.complete();
      await turn();
    }
    await Promise.all([read, write, sync, closed]);
  });

  it.each([1, 2, 3, 4, 5, 6, 7, 8])(
    "keeps every byte, whatever the order of completions (seed %i)",
    async (seed) => {
      const random = new Random(seed);
      device.fate = ({ lengthBytes }) =>
        random.chance(0.2) ? BLOCK * (1 + random.below(lengthBytes / BLOCK)) : undefined;
      const expected = device.bytes.slice();
      const busy = new Set<readonly [number, number]>();
      const operations: Promise<void>[] = [];
      for (let step = 0; step < 3000; step++) {
        if (random.chance(0.4) && device.pending.length > 0) {
          device.complete(random.below(device.pending.length));
          await turn();
          continue;
        }
        const offset = random.below(expected.length - 1);
        const length = Math.min(1 + random.below(random.pick([8, 600, 3 * BLOCK])), expected.length - offset);
        // In one block with others, often; but on no byte that another is at.
        if ([...busy].some(([from, end]) => offset < end && from < offset + length)) continue;
        const range = [offset, offset + length] as const;
        busy.add(range);
        const isRead = random.chance(0.3);
        const data = isRead ? new Uint8Array(length) : noise(step, length);
        const wanted = expected.slice(offset, offset + length);
        if (!isRead) expected.set(data, offset);
        const operation = isRead ? file.read(data, 0, length, offset) : file.write(data, 0, length, offset);
        operations.push(
          operation.then(() => {
            busy.delete(range);
            if (isRead) expect(Buffer.compare(data, wanted)).toBe(0);
          }),
        );
      }
      await finish(Promise.all(operations).then(() => undefined));
      expect(operations.length).toBeGreaterThan(500);
      expect(Buffer.compare(device.bytes, expected)).toBe(0);
    },
  );
});

describe("the way to the file", () => {
  let folder: string;
  let fd: number;

  beforeEach(() => {
    folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-direct-"));
    fs.writeFileSync(path.join(folder, "disk"), noise(9, 4 * BLOCK));
    fd = fs.openSync(path.join(folder, "disk"), fs.constants.O_RDWR | fs.constants.O_DIRECT);
  });

  afterEach(() => {
    fs.closeSync(fd);
    fs.rmSync(folder, { recursive: true });
    vi.unstubAllEnvs();
    vi.resetModules();
  });

  it.each([null, -EAGAIN])("is the pool for a request that the ring gives back with %s", async (answer) => {
    device.fate = () => answer;
    const real = DirectFile.growing("disk", fd, () => 4 * BLOCK, new DirectIo("disk", fd, device));
    const buffer = new Uint8Array(4 * BLOCK);
    await finish(real.read(buffer, 0, buffer.length, 0));
    expect(Buffer.compare(buffer, noise(9, 4 * BLOCK))).toBe(0);
    await finish(real.write(Uint8Array.of(1, 2, 3), 0, 3, 10));
    await finish(real.sync());
    expect(fs.readFileSync(path.join(folder, "disk")).subarray(10, 13)).toEqual(Buffer.of(1, 2, 3));
  });

  it.each(["0", "1"])("is decided once and said (COWCATCHER_NO_IO_URING=%s)", async (isForbidden) => {
    vi.stubEnv("COWCATCHER_NO_IO_URING", isForbidden);
    const { describeDirectIo } = await import("../../../src/block/file/direct-io.js");
    const { DirectFile: Fresh } = await import("../../../src/block/file/direct.js");
    const { method, reason } = await describeDirectIo();
    if (isForbidden === "1") expect(reason).toBe("COWCATCHER_NO_IO_URING is set");
    expect(method).toBe(reason === undefined ? "io_uring" : "threads");
    const before = fs.readdirSync("/proc/self/fd").length;
    const files = [0, 1].map(() => Fresh.growing("disk", fd, () => 4 * BLOCK));
    const buffer = new Uint8Array(4 * BLOCK);
    for (const [index, each] of files.entries()) {
      await each.write(Uint8Array.of(index), 0, 1, index * BLOCK);
      await each.sync();
    }
    // The ring and its eventfd, for both files together; not before the first request, not after the last file.
    expect(fs.readdirSync("/proc/self/fd").length - before).toBe(method === "io_uring" ? 2 : 0);
    vi.stubEnv("COWCATCHER_NO_IO_URING", "1");
    await files[0]?.close();
    await files[1]?.read(buffer, 0, buffer.length, 0);
    await files[1]?.close();
    expect(fs.readdirSync("/proc/self/fd").length).toBe(before);
    expect([buffer[0], buffer[BLOCK]]).toEqual([0, 1]);
  });

  it("names the system's error", async () => {
    const readOnly = fs.openSync(path.join(folder, "disk"), fs.constants.O_RDONLY | fs.constants.O_DIRECT);
    const real = DirectFile.growing("disk", readOnly, () => 4 * BLOCK);
    const write = real.write(Uint8Array.of(1), 0, 1, BLOCK + 5);
    await expect(write).rejects.toMatchObject({ code: "IO", errno: "EBADF", offsetBytes: BLOCK });
    await real.close();
    fs.closeSync(readOnly);
  });
});
