import { createHash, randomBytes } from "node:crypto";
import { createServer, type Socket } from "node:net";
import { afterEach, describe, expect, test, vi } from "vitest";
import { CowcatcherError } from "../../../../src/errors.js";
import type { NbdExport } from "../../../../src/nbd/server/export.js";
import { MAX_WRITES_QUEUED } from "../../../../src/nbd/server/limits.js";
import * as nbd from "../../../../src/nbd/wire/protocol.js";
import {
  goData,
  MemoryDevice,
  optionBytes,
  RawClient,
  requestBytes,
  TestServer,
  until,
} from "../../../support/nbd-peer.js";

const KiB = 1024;
let running: TestServer | undefined;

async function start(device: MemoryDevice, fields: Partial<NbdExport> = {}, maxConnections?: number) {
  running = await TestServer.start(device, fields, maxConnections);
  return running;
}

afterEach(async () => {
  await running?.stop();
  running = undefined;
});

function disk(sizeBytes = 64 * KiB, mode: "now" | "later" = "now"): MemoryDevice {
  const device = new MemoryDevice(sizeBytes);
  device.mode = mode;
  return device;
}

const WRITES = [
  requestBytes(nbd.NBD_CMD_WRITE, { cookie: 1n, offset: 100, payload: Buffer.from("first") }),
  requestBytes(nbd.NBD_CMD_WRITE, { cookie: 2n, offset: 200, payload: Buffer.alloc(300, 7) }),
];

describe.each(["now", "later"] as const)("a device that answers %s", (mode) => {
  test("requests split at every byte are handled as if whole", async () => {
    const all = Buffer.concat(WRITES);
    const server = await start(disk(64 * KiB, mode));
    for (let cut = 1; cut < all.length; cut += cut < 70 || cut > 350 ? 1 : 40) {
      const client = await server.client();
      await client.sendApart([all.subarray(0, cut), all.subarray(cut)]);
      expect([await client.simpleReply(), await client.simpleReply()]).toEqual([
        { error: 0, cookie: 1n },
        { error: 0, cookie: 2n },
      ]);
      const read = requestBytes(nbd.NBD_CMD_READ, { offset: 100, length: 5 });
      await client.sendApart([read.subarray(0, cut % 28), read.subarray(cut % 28)]);
      expect((await client.simpleReply()).error).toBe(0);
      expect((await client.read(5)).toString()).toBe("first");
      client.destroy();
    }
    await until(() => server.server.connectionCount === 0);
  });

  test("requests that come byte by byte", async () => {
    const device = disk(64 * KiB, mode);
    const client = await (await start(device)).client();
    await client.sendApart([...(WRITES[0] ?? Buffer.alloc(0))].map((byte) => Buffer.from([byte])));
    expect(await client.simpleReply()).toEqual({ error: 0, cookie: 1n });
    expect(device.calls).toEqual(["write 100+5"]);
  });

  test("a thousand requests in one write are all answered", async () => {
    const device = disk(64 * KiB, mode);
    const client = await (await start(device)).client();
    const expected = Buffer.alloc(64 * KiB);
    const requests: Buffer[] = [];
    for (let i = 0; i < 1000; i++) {
      const payload = randomBytes(60);
      payload.copy(expected, i * 60);
      requests.push(requestBytes(nbd.NBD_CMD_WRITE, { cookie: BigInt(i), offset: i * 60, payload }));
    }
    client.send(...requests);
    const cookies = new Set<bigint>();
    for (let i = 0; i < 1000; i++) {
      const { error, cookie } = await client.simpleReply();
      expect(error).toBe(0);
      cookies.add(cookie);
    }
    expect(cookies.size).toBe(1000);
    expect(device.data.equals(expected)).toBe(true);
  });

  test("a disconnect at any byte of a write applies nothing and harms no one", async () => {
    const device = disk(64 * KiB, mode);
    const server = await start(device);
    const other = await server.client();
    const write = requestBytes(nbd.NBD_CMD_WRITE, { offset: 0, payload: Buffer.alloc(40, 9) });
    for (let sentBytes = 1; sentBytes < write.length; sentBytes++) {
      const client = await server.client();
      await client.sendApart([write.subarray(0, sentBytes)]);
      client.destroy();
    }
    await until(() => server.server.connectionCount === 1);
    expect(device.calls).toEqual([]);
    other.send(requestBytes(nbd.NBD_CMD_READ, { length: 40 }));
    expect((await other.simpleReply()).error).toBe(0);
    expect((await other.read(40)).equals(Buffer.alloc(40))).toBe(true);
  });

  test.each([3 * 1024 * KiB + 5, nbd.MAX_PAYLOAD_BYTES])(
    "a payload of %i bytes, with small requests around it",
    async (payloadBytes) => {
      const device = disk(payloadBytes + 100, mode);
      const client = await (await start(device)).client({ structured: true });
      const payload = randomBytes(payloadBytes);
      const small = requestBytes(nbd.NBD_CMD_WRITE, { offset: 0, payload: Buffer.from("small") });
      client.send(small, requestBytes(nbd.NBD_CMD_WRITE, { offset: 50, payload }), small);
      for (let i = 0; i < 3; i++) expect((await client.simpleReply()).error).toBe(0);
      client.send(requestBytes(nbd.NBD_CMD_READ, { offset: 50, length: payloadBytes }));
      const [chunk] = await client.structuredReply();
      expect(hash(chunk?.payload.subarray(8))).toBe(hash(payload));
    },
    15_000,
  );

  test("device errors become error replies and the connection goes on", async () => {
    const device = disk(64 * KiB, mode);
    const server = await start(device);
    const client = await server.client({ contexts: true });
    const failures: [Error, number][] = [
      [new Error("a bug"), nbd.NBD_EIO],
      [new CowcatcherError({ code: "IO", object: "f", problem: "x", errno: "EIO" }), nbd.NBD_EIO],
      [new CowcatcherError({ code: "IO", object: "f", problem: "x", errno: "EPERM" }), nbd.NBD_EPERM],
      [new CowcatcherError({ code: "NO_SPACE", object: "f", problem: "x" }), nbd.NBD_ENOSPC],
      [new CowcatcherError({ code: "EXISTS", object: "f", problem: "x" }), nbd.NBD_EIO],
    ];
    for (const [failure, expected] of failures) {
      device.failure = failure;
      client.send(
        requestBytes(nbd.NBD_CMD_WRITE, { payload: Buffer.alloc(10) }),
        requestBytes(nbd.NBD_CMD_FLUSH),
      );
      expect((await client.simpleReply()).error).toBe(expected);
      expect((await client.simpleReply()).error).toBe(expected);
      client.send(requestBytes(nbd.NBD_CMD_READ, { length: 512 }));
      const [chunk] = await client.structuredReply();
      expect(chunk?.type).toBe(nbd.NBD_REPLY_TYPE_ERROR);
      expect(chunk?.payload.readUInt32BE(0)).toBe(expected);
    }
    device.failure = undefined;
    client.send(requestBytes(nbd.NBD_CMD_WRITE, { payload: Buffer.from("works") }));
    expect((await client.simpleReply()).error).toBe(0);
    expect(server.warnings.length).toBe(10);
  });

  test("FUA flushes after the operation and before the reply", async () => {
    const device = disk(64 * KiB, mode);
    const client = await (await start(device)).client();
    const flags = nbd.NBD_CMD_FLAG_FUA;
    client.send(requestBytes(nbd.NBD_CMD_WRITE, { flags, payload: Buffer.alloc(8) }));
    await client.simpleReply();
    expect(device.calls).toEqual(["write 0+8", "flush"]);
    client.send(requestBytes(nbd.NBD_CMD_WRITE_ZEROES, { flags, length: 8 }));
    await client.simpleReply();
    expect(device.calls.slice(2)).toEqual(["zero 0+8 unmap", "flush"]);
  });

  test("block status: several extents, one with REQ_ONE, clamped to the request", async () => {
    const device = disk(64 * KiB, mode);
    device.runs = [
      [4096, false],
      [4096, true],
      [4096, true],
      [8192, false],
    ];
    const client = await (await start(device)).client({ contexts: true });
    const extents = async (flags: number, offset: number, length: number): Promise<number[]> => {
      client.send(requestBytes(nbd.NBD_CMD_BLOCK_STATUS, { flags, offset, length }));
      const chunks = await client.structuredReply();
      expect(chunks.map(({ type }) => type)).toEqual([nbd.NBD_REPLY_TYPE_BLOCK_STATUS]);
      const payload = chunks[0]?.payload ?? Buffer.alloc(0);
      return Array.from({ length: (payload.length - 4) / 4 }, (_, i) => payload.readUInt32BE(4 + 4 * i));
    };
    expect(await extents(0, 0, 20480)).toEqual([4096, 0, 8192, 3, 8192, 0]);
    expect(await extents(nbd.NBD_CMD_FLAG_REQ_ONE, 5000, 60000)).toEqual([3192, 3]);
    expect(await extents(0, 0, 5000)).toEqual([4096, 0, 904, 3]);
  });
});

function hash(bytes: Buffer | undefined): string {
  return createHash("sha1")
    .update(bytes ?? "")
    .digest("hex");
}

describe("what is checked before the device hears of it", () => {
  const size = 4097;
  test.each<[string, number, number, number | bigint, number, number]>([
    ["read to the last byte", nbd.NBD_CMD_READ, 0, 4096, 1, 0],
    ["read past the end", nbd.NBD_CMD_READ, 0, 4096, 2, nbd.NBD_EINVAL],
    ["read at 2^64 - 1", nbd.NBD_CMD_READ, 0, 2n ** 64n - 1n, 1, nbd.NBD_EINVAL],
    ["read of 2^32 - 1", nbd.NBD_CMD_READ, 0, 0, 2 ** 32 - 1, nbd.NBD_EINVAL],
    ["DF without structured replies", nbd.NBD_CMD_READ, nbd.NBD_CMD_FLAG_DF, 0, 1, nbd.NBD_EINVAL],
    ["read with NO_HOLE", nbd.NBD_CMD_READ, nbd.NBD_CMD_FLAG_NO_HOLE, 0, 1, nbd.NBD_EINVAL],
    ["read of nothing", nbd.NBD_CMD_READ, 0, 0, 0, 0],
    ["zeroes past the end", nbd.NBD_CMD_WRITE_ZEROES, 0, 1, 4097, nbd.NBD_ENOSPC],
    ["fast zeroes", nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_FLAG_FAST_ZERO, 0, 1, nbd.NBD_ENOTSUP],
    ["zeroes", nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_FLAG_NO_HOLE, 0, 4097, 0],
    ["trim past the end", nbd.NBD_CMD_TRIM, 0, 4097, 1, nbd.NBD_EINVAL],
    ["trim", nbd.NBD_CMD_TRIM, 0, 0, 4097, 0],
    ["cache past the end", nbd.NBD_CMD_CACHE, 0, 0, 4098, nbd.NBD_EINVAL],
    ["cache", nbd.NBD_CMD_CACHE, 0, 0, 4097, 0],
    ["flush with an offset", nbd.NBD_CMD_FLUSH, 0, 1, 0, nbd.NBD_EINVAL],
    ["block status that was not negotiated", nbd.NBD_CMD_BLOCK_STATUS, 0, 0, 1, nbd.NBD_EINVAL],
    ["an unknown command", 99, 0, 0, 0, nbd.NBD_EINVAL],
    ["an unknown flag", nbd.NBD_CMD_FLUSH, 1 << 15, 0, 0, nbd.NBD_EINVAL],
  ])("%s", async (_what, command, flags, offset, length, expected) => {
    const device = disk(size);
    const client = await (await start(device)).client();
    client.send(requestBytes(command, { flags, offset, length, cookie: 2n ** 64n - 2n }));
    expect(await client.simpleReply()).toEqual({ error: expected, cookie: 2n ** 64n - 2n });
    if (command === nbd.NBD_CMD_READ && expected === 0) await client.read(length);
    if (expected !== 0) expect(device.calls).toEqual([]);
    client.send(requestBytes(nbd.NBD_CMD_FLUSH));
    expect((await client.simpleReply()).error).toBe(0);
  });

  test.each([
    ["beyond the end", {}, { offset: 4090, payload: Buffer.alloc(8) }, nbd.NBD_ENOSPC],
    ["far beyond the end", {}, { offset: 2n ** 63n, payload: Buffer.alloc(8) }, nbd.NBD_ENOSPC],
    ["of more than the limit", {}, { payload: Buffer.alloc(nbd.MAX_PAYLOAD_BYTES + 1) }, nbd.NBD_EINVAL],
    ["on a read-only export", { readOnly: true }, { payload: Buffer.alloc(70_000) }, nbd.NBD_EPERM],
  ])(
    "a write %s: the payload is thrown away, then the error is sent",
    async (_what, fields, write, expected) => {
      const device = disk(size);
      const client = await (await start(device, fields)).client();
      client.send(requestBytes(nbd.NBD_CMD_WRITE, { ...write, cookie: 5n }), requestBytes(nbd.NBD_CMD_FLUSH));
      expect(await client.simpleReply()).toEqual({ error: expected, cookie: 5n });
      expect((await client.simpleReply()).error).toBe(0);
      expect(device.calls).toEqual(["flush"]);
    },
  );

  test("a read above the limit overflows, even of a large disk", async () => {
    const device = disk(nbd.MAX_PAYLOAD_BYTES + 10);
    const client = await (await start(device)).client({ structured: true });
    client.send(requestBytes(nbd.NBD_CMD_READ, { length: nbd.MAX_PAYLOAD_BYTES + 1 }));
    const [chunk] = await client.structuredReply();
    expect(chunk?.payload.readUInt32BE(0)).toBe(nbd.NBD_EOVERFLOW);
  });

  test.each([
    ["a wrong magic", Buffer.alloc(28)],
    ["a payload too long to throw away", requestBytes(nbd.NBD_CMD_WRITE, { length: 2 ** 32 - 1 })],
  ])("%s ends the connection, after the answers to what came before", async (_what, bytes) => {
    const server = await start(disk());
    const client = await server.client();
    client.send(requestBytes(nbd.NBD_CMD_FLUSH, { cookie: 8n }), bytes);
    expect((await client.readToEnd()).readBigUInt64BE(8)).toBe(8n);
    expect(server.warnings).toEqual(["client broke the protocol"]);
  });
});

describe("structured reads", () => {
  test("leave out holes, in order, done on the last chunk", async () => {
    const device = disk(256 * KiB);
    device.data.fill(1);
    device.data.fill(0, 64 * KiB, 128 * KiB);
    device.runs = [
      [64 * KiB, false],
      [64 * KiB, true],
    ];
    const client = await (await start(device)).client({ structured: true });
    client.send(requestBytes(nbd.NBD_CMD_READ, { length: 192 * KiB }));
    const chunks = await client.structuredReply();
    expect(chunks.map(({ type }) => type)).toEqual([1, 2, 1]);
    expect(chunks.map(({ payload }) => Number(payload.readBigUInt64BE(0)))).toEqual([0, 64 * KiB, 128 * KiB]);
    expect(chunks[1]?.payload.readUInt32BE(8)).toBe(64 * KiB);
    expect(chunks[2]?.payload.subarray(8).equals(Buffer.alloc(64 * KiB, 1))).toBe(true);
  });

  test("with DF are one data chunk", async () => {
    const device = disk(256 * KiB);
    device.runs = [
      [64 * KiB, false],
      [64 * KiB, true],
    ];
    const client = await (await start(device)).client({ structured: true });
    client.send(requestBytes(nbd.NBD_CMD_READ, { flags: nbd.NBD_CMD_FLAG_DF, length: 192 * KiB }));
    const chunks = await client.structuredReply();
    expect(chunks.map(({ type, payload }) => [type, payload.length])).toEqual([[1, 192 * KiB + 8]]);
  });

  test("of nothing are one empty chunk", async () => {
    const client = await (await start(disk())).client({ structured: true });
    client.send(requestBytes(nbd.NBD_CMD_READ, { length: 0 }));
    expect((await client.structuredReply()).map(({ type }) => type)).toEqual([nbd.NBD_REPLY_TYPE_NONE]);
  });

  test("that fail in the middle of a sparse range are one error chunk", async () => {
    const device = disk(256 * KiB);
    device.runs = [
      [64 * KiB, true],
      [64 * KiB, false],
    ];
    device.failure = new Error("bad sector");
    const client = await (await start(device)).client({ structured: true });
    client.send(requestBytes(nbd.NBD_CMD_READ, { length: 128 * KiB }));
    expect((await client.structuredReply()).map(({ type }) => type)).toEqual([nbd.NBD_REPLY_TYPE_ERROR]);
  });
});

describe("bounds", () => {
  test("requests in flight are bounded, and all are answered in the end", async () => {
    const device = disk(64 * KiB, "later");
    device.autoRelease = false;
    const client = await (await start(device)).client();
    const write = (i: number) =>
      requestBytes(nbd.NBD_CMD_WRITE, { cookie: BigInt(i), payload: Buffer.alloc(512) });
    client.send(...Array.from({ length: 1000 }, (_, i) => write(i)));
    await until(() => device.waiting.length === 256);
    const answered = new Set<bigint>();
    const reading = (async () => {
      while (answered.size < 1000) answered.add((await client.simpleReply()).cookie);
    })();
    let most = 0;
    await until(() => {
      most = Math.max(most, device.waiting.length);
      device.releaseAll();
      return answered.size === 1000;
    });
    await reading;
    expect(most).toBeLessThanOrEqual(256);
  });

  test("a client that does not take its replies stops being served, and others go on", async () => {
    const device = disk(1024 * KiB);
    const server = await start(device);
    const greedy = await server.client();
    greedy.socket.pause();
    const reads = 2000;
    const request = requestBytes(nbd.NBD_CMD_READ, { length: 1024 * KiB });
    greedy.send(...Array.from({ length: reads }, () => request));
    const other = await server.client();
    for (let i = 0; i < 50; i++) {
      other.send(requestBytes(nbd.NBD_CMD_FLUSH));
      await other.simpleReply();
    }
    const served = device.calls.filter((call) => call.startsWith("read")).length;
    expect(served).toBeGreaterThan(0);
    expect(served).toBeLessThan(100);
    greedy.destroy();
    await until(() => server.server.connectionCount === 1);
  });

  test("a client that takes no short replies either is answered in the end", async () => {
    const device = disk();
    const client = await (await start(device)).client();
    client.socket.pause();
    const flushes = 6 * MAX_WRITES_QUEUED;
    // In turns of their own, so that each reply is a write: many that come at once are answered by one.
    for (let sent = 0; sent < flushes; sent++) {
      client.send(requestBytes(nbd.NBD_CMD_FLUSH));
      await new Promise(setImmediate);
    }
    let seen = -1;
    await until(() => {
      const isSettled = seen === device.calls.length && seen > 0;
      seen = device.calls.length;
      return isSettled;
    });
    expect(device.calls.length).toBeLessThan(flushes);
    client.socket.resume();
    expect((await client.read(16 * flushes)).length).toBe(16 * flushes);
    expect(device.calls.length).toBe(flushes);
  });

  test("connections beyond the limit are refused", async () => {
    const server = await start(disk(), {}, 1);
    const first = await server.client();
    await expect(server.client()).rejects.toThrow("GO was refused");
    first.destroy();
    await until(() => server.server.connectionCount === 0);
    await server.client();
  });
});

describe("sockets", () => {
  test("one that cannot be read directly is read by copy, with what it had received already", async () => {
    const device = disk(8 * 1024 * KiB, "later");
    const server = await start(device);
    const path = `${server.socketPath}2`;
    const sockets = new Promise<Socket>((resolve) => {
      const listening = createServer({ allowHalfOpen: true }, (socket) => {
        listening.close();
        resolve(socket);
      }).listen(path);
    });
    const client = new RawClient(path);
    client.send(Buffer.from([0, 0, 0, 3]), optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    const socket = await sockets;
    await until(() => {
      socket.read(0);
      return socket.readableLength > 0;
    });
    server.server.accept(socket);
    expect((await client.read(18 + 20 + 12 + 20)).readUInt32BE(18 + 32 + 12)).toBe(nbd.NBD_REP_ACK);
    const payload = randomBytes(3 * 1024 * KiB);
    const requests = Array.from({ length: 600 }, (_, i) =>
      requestBytes(nbd.NBD_CMD_WRITE, { offset: i * 512, payload: payload.subarray(i * 512, i * 512 + 512) }),
    );
    client.send(...requests, requestBytes(nbd.NBD_CMD_WRITE, { offset: 4096 * KiB, payload }));
    for (let i = 0; i <= 600; i++) expect((await client.simpleReply()).error).toBe(0);
    expect(hash(device.data.subarray(0, 600 * 512))).toBe(hash(payload.subarray(0, 600 * 512)));
    expect(hash(device.data.subarray(4096 * KiB, 7168 * KiB))).toBe(hash(payload));
    client.send(requestBytes(nbd.NBD_CMD_DISC));
    expect((await client.readToEnd()).length).toBe(0);
    client.destroy();
    await until(() => server.server.connectionCount === 0);
  });

  test("a client that does not negotiate is dropped in time, one that has is not", async () => {
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    try {
      const server = await start(disk());
      const [silent, served] = [server.connect(), await server.client()];
      await silent.read(18);
      vi.advanceTimersByTime(29_000);
      silent.send(Buffer.from([0, 0, 0, 3]));
      expect((await silent.option(nbd.NBD_OPT_LIST)).length).toBe(2);
      vi.advanceTimersByTime(2_000);
      expect((await silent.readToEnd()).length).toBe(0);
      served.send(requestBytes(nbd.NBD_CMD_FLUSH));
      expect((await served.simpleReply()).error).toBe(0);
    } finally {
      vi.useRealTimers();
    }
  });

  test("a close that a device holds up ends after its bound", async () => {
    const device = disk(64 * KiB, "later");
    device.autoRelease = false;
    const server = await start(device);
    const client = await server.client();
    client.send(requestBytes(nbd.NBD_CMD_FLUSH));
    await until(() => device.waiting.length === 1);
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    try {
      const closing = server.server.close();
      vi.advanceTimersByTime(10_001);
      await closing;
    } finally {
      vi.useRealTimers();
    }
    expect(server.warnings).toEqual(["clients cut off at shutdown"]);
    expect((await client.readToEnd()).length).toBe(0);
    device.releaseAll();
    await until(() => server.server.connectionCount === 0);
  });
});

describe("the end of a connection", () => {
  test("DISC: what is in flight is answered first, what follows is not handled", async () => {
    const device = disk(64 * KiB, "later");
    const client = await (await start(device)).client();
    const write = requestBytes(nbd.NBD_CMD_WRITE, { cookie: 1n, payload: Buffer.alloc(10) });
    client.send(write, requestBytes(nbd.NBD_CMD_DISC), write);
    expect((await client.readToEnd()).length).toBe(16);
    expect(device.calls).toEqual(["write 0+10"]);
  });

  test("a client that closes its side gets its answers", async () => {
    const device = disk(64 * KiB, "later");
    const client = await (await start(device)).client();
    client.socket.end(requestBytes(nbd.NBD_CMD_WRITE, { cookie: 3n, payload: Buffer.alloc(10) }));
    expect((await client.readToEnd()).readBigUInt64BE(8)).toBe(3n);
  });

  test("a client that vanishes is gone when its requests are done", async () => {
    const device = disk(64 * KiB, "later");
    device.autoRelease = false;
    const server = await start(device);
    const client = await server.client();
    client.send(
      requestBytes(nbd.NBD_CMD_WRITE, { payload: Buffer.from("kept") }),
      requestBytes(nbd.NBD_CMD_READ, { length: 4 }),
    );
    await until(() => device.waiting.length === 2);
    client.destroy();
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(server.server.connectionCount).toBe(1);
    device.releaseAll();
    await until(() => server.server.connectionCount === 0);
    expect(device.data.toString("utf8", 0, 4)).toBe("kept");
  });

  test("close finishes what is in flight, refuses what comes, and ends every connection", async () => {
    const device = disk(64 * KiB, "later");
    device.autoRelease = false;
    const server = await start(device);
    const [busy, idle, talking] = [await server.client(), await server.client(), server.connect()];
    await talking.read(18);
    busy.send(requestBytes(nbd.NBD_CMD_WRITE, { cookie: 1n, payload: Buffer.from("done") }));
    await until(() => device.waiting.length === 1);
    const closing = server.server.close();
    expect((await idle.readToEnd()).length).toBe(0);
    expect((await talking.readToEnd()).length).toBe(0);
    device.releaseAll();
    expect(await busy.simpleReply()).toEqual({ error: 0, cookie: 1n });
    expect((await busy.readToEnd()).length).toBe(0);
    for (const client of [busy, idle, talking]) client.socket.end();
    await closing;
    expect(server.server.connectionCount).toBe(0);
    expect(device.data.toString("utf8", 0, 4)).toBe("done");
  });

  test("requests that come while it closes are answered with ESHUTDOWN", async () => {
    const device = disk(64 * KiB, "later");
    device.autoRelease = false;
    const server = await start(device);
    const client = await server.client({ structured: true });
    client.send(requestBytes(nbd.NBD_CMD_WRITE, { cookie: 1n, payload: Buffer.alloc(4) }));
    await until(() => device.waiting.length === 1);
    const closing = server.server.close();
    client.send(requestBytes(nbd.NBD_CMD_WRITE, { cookie: 2n, payload: Buffer.alloc(4) }));
    expect(await client.simpleReply()).toEqual({ error: nbd.NBD_ESHUTDOWN, cookie: 2n });
    client.send(requestBytes(nbd.NBD_CMD_READ, { length: 4 }));
    expect((await client.structuredReply())[0]?.payload.readUInt32BE(0)).toBe(nbd.NBD_ESHUTDOWN);
    device.releaseAll();
    expect(await client.simpleReply()).toEqual({ error: 0, cookie: 1n });
    client.socket.end();
    await closing;
    expect(device.calls.length).toBe(1);
  });

  test("ABORT is acknowledged and ends it", async () => {
    const client = (await start(disk())).connect();
    await client.read(18);
    client.send(Buffer.from([0, 0, 0, 3]), optionBytes(nbd.NBD_OPT_ABORT));
    expect((await client.readToEnd()).readUInt32BE(12)).toBe(nbd.NBD_REP_ACK);
  });
});
