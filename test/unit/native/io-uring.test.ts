// io_uring and the eventfd in Node's event loop, with this machine's kernel.
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import type { Socket } from "node:net";
import { constants, tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { addressOf } from "../../../src/native/addresses.js";
import { IoUring, RING_FSYNC, RING_READ, RING_WRITE } from "../../../src/native/io-uring.js";
import { LoopEvent } from "../../../src/native/loop-event.js";

const BLOCK = 4096;
const { EBADF } = constants.errno;

/** Where the system has none (a container's profile, an old kernel) there is nothing to test here. */
const probe = IoUring.open(4, 8);
if (typeof probe !== "number") probe.close();

describe.skipIf(typeof probe === "number")("io_uring", () => {
  let ring: IoUring;
  let event: LoopEvent;
  let folder: string;
  let fd: number;
  let signalled: () => void;

  beforeEach(() => {
    ring = mustOpen(IoUring.open(4, 8));
    event = mustOpen(LoopEvent.open(() => signalled()));
    event.setAwaited(true);
    signalled = () => undefined;
    folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-ring-"));
    fd = fs.openSync(path.join(folder, "file"), "w+");
  });

  afterEach(() => {
    ring.close();
    event.close();
    fs.closeSync(fd);
    fs.rmSync(folder, { recursive: true });
  });

  function mustOpen<T extends object>(opened: T | number): T {
    if (typeof opened === "number") throw new Error(`errno ${-opened}`);
    return opened;
  }

  /** Reaps, each time the loop is woken, until `count` requests are complete: results by tag. */
  async function results(count: number): Promise<Map<number, number>> {
    const found = new Map<number, number>();
    await new Promise<void>((resolve) => {
      signalled = () => {
        ring.reap((tag, result) => found.set(tag, result));
        if (found.size >= count) resolve();
      };
    });
    return found;
  }

  it("writes, syncs and reads, and wakes the loop for each completion", async () => {
    expect(ring.signal(event.fd)).toBe(0);
    const memory = Uint8Array.from({ length: 2 * BLOCK }, (_, index) => index % 251);
    const address = addressOf(memory.buffer);
    ring.prepare(RING_WRITE, fd, address, BLOCK, 3 * BLOCK, 0xffff_fffe);
    expect(ring.submit()).toBe(0);
    expect(await results(1)).toEqual(new Map([[0xffff_fffe, BLOCK]]));
    ring.prepare(RING_FSYNC, fd, 0, 0, 0, 1);
    ring.prepare(RING_READ, fd, address + BLOCK, BLOCK, 3 * BLOCK, 2);
    // The end of the file.
    ring.prepare(RING_READ, fd, address, BLOCK, 4 * BLOCK, 3);
    expect([ring.preparedCount, ring.submit(), ring.preparedCount]).toEqual([3, 0, 0]);
    expect(await results(3)).toEqual(
      new Map([
        [1, 0],
        [2, BLOCK],
        [3, 0],
      ]),
    );
    expect(memory.subarray(BLOCK)).toEqual(memory.subarray(0, BLOCK));
    expect(fs.fstatSync(fd).size).toBe(4 * BLOCK);
  });

  it("waits in the call that hands over, and does not count that in the eventfd", async () => {
    ring.signal(event.fd);
    let count = 0;
    signalled = () => count++;
    const memory = Uint8Array.of(1, 2, 3, 4);
    const found: number[] = [];
    for (let tag = 0; tag < 50; tag++) {
      ring.prepare(RING_WRITE, fd, addressOf(memory.buffer), 4, tag * 4, tag);
      expect(ring.submitAndWait(900_000)).toBe(0);
      ring.reap((reaped) => found.push(reaped));
      expect(found).toHaveLength(tag + 1);
    }
    await new Promise(setImmediate);
    await new Promise(setImmediate);
    expect(count).toBe(0);
    // Those after it are counted again.
    ring.prepare(RING_WRITE, fd, addressOf(memory.buffer), 4, 0, 99);
    ring.submit();
    expect(await results(1)).toEqual(new Map([[99, 4]]));
  });

  it("waits no longer than it is told to", async () => {
    ring.signal(event.fd);
    const pipe = path.join(folder, "pipe");
    execFileSync("mkfifo", [pipe]);
    const end = fs.openSync(pipe, fs.constants.O_RDWR);
    const memory = new Uint8Array(new ArrayBuffer(8));
    ring.prepare(RING_READ, end, addressOf(memory.buffer), 8, 0, 7);
    expect([ring.submitAndWait(1000), ring.preparedCount]).toEqual([0, 0]);
    expect(ring.reap(() => undefined)).toBe(0);
    const late = results(1);
    fs.writeSync(end, Uint8Array.of(5));
    expect([await late, memory[0]]).toEqual([new Map([[7, 1]]), 5]);
    fs.closeSync(end);
  });

  it("takes offsets beyond 4 GiB", async () => {
    ring.signal(event.fd);
    const memory = Uint8Array.of(1, 2, 3, 4);
    const offset = 2 ** 40 + 5;
    ring.prepare(RING_WRITE, fd, addressOf(memory.buffer), 4, offset, 1);
    ring.submit();
    expect(await results(1)).toEqual(new Map([[1, 4]]));
    expect(fs.fstatSync(fd).size).toBe(offset + 4);
  });

  it("gives a failed request's errno, and goes on with the others", async () => {
    ring.signal(event.fd);
    const memory = new Uint8Array(new ArrayBuffer(BLOCK));
    ring.prepare(RING_READ, 12_345, addressOf(memory.buffer), BLOCK, 0, 1);
    ring.prepare(RING_WRITE, fd, addressOf(memory.buffer), BLOCK, 0, 2);
    while (ring.preparedCount > 0) expect(ring.submit()).toBe(0);
    expect(await results(2)).toEqual(
      new Map([
        [1, -EBADF],
        [2, BLOCK],
      ]),
    );
  });

  it("has room for as many as its length, and goes round and round", async () => {
    ring.signal(event.fd);
    const memory = new Uint8Array(new ArrayBuffer(BLOCK));
    for (let round = 0; round < 10; round++) {
      for (let tag = 0; ring.hasRoom; tag++) {
        ring.prepare(RING_WRITE, fd, addressOf(memory.buffer), BLOCK, tag * BLOCK, tag);
      }
      expect(ring.preparedCount).toBe(4);
      ring.submit();
      expect([...(await results(4)).values()]).toEqual(Array(4).fill(BLOCK));
    }
  });

  it("does nothing of what is withdrawn", async () => {
    ring.signal(event.fd);
    const memory = new Uint8Array(new ArrayBuffer(BLOCK));
    ring.prepare(RING_WRITE, fd, addressOf(memory.buffer), BLOCK, 0, 1);
    ring.withdraw();
    expect([ring.preparedCount, ring.submit()]).toEqual([0, 0]);
    ring.prepare(RING_READ, fd, addressOf(memory.buffer), BLOCK, 0, 2);
    ring.submit();
    // The file is as empty as it was.
    expect(await results(1)).toEqual(new Map([[2, 0]]));
  });

  it("has the loop look by itself where the eventfd cannot be read any more", async () => {
    const looked = new Promise<void>((resolve) => (signalled = resolve));
    (event as unknown as { socket: Socket }).socket.destroy(new Error("read EIO"));
    // No signal comes: nothing is in flight.
    await looked;
    event.setAwaited(false);
  });

  it("leaves no descriptor", () => {
    const before = fs.readdirSync("/proc/self/fd").length;
    const other = mustOpen(IoUring.open(4, 8));
    const otherEvent = mustOpen(LoopEvent.open(() => undefined));
    expect(fs.readdirSync("/proc/self/fd").length).toBe(before + 2);
    other.close();
    otherEvent.close();
    expect(fs.readdirSync("/proc/self/fd").length).toBe(before);
  });
});
