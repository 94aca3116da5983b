// Clients that mean harm, or are broken: other guests go on, memory stays bounded, nothing leaks.
import { readdirSync } from "node:fs";
import { afterEach, describe, expect, test, vi } from "vitest";
import type { Completion } from "../../../../src/block/device.js";
import * as nbd from "../../../../src/nbd/wire/protocol.js";
import { MAX_WARNINGS } from "../../../../src/nbd/server/bounded-log.js";
import { CLOSE_DRAIN_MS } from "../../../../src/nbd/server/limits.js";
import type { NbdServerOptions } from "../../../../src/nbd/server/server.js";
import {
  goData,
  MemoryDevice,
  metaData,
  optionBytes,
  requestBytes,
  TestServer,
  until,
  type RawClient,
} from "../../../support/nbd-peer.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const CLIENT_FLAGS = Buffer.from([0, 0, 0, 3]);

let server: TestServer;
afterEach(async () => {
  await server.stop();
});

async function start(device: MemoryDevice, options: Partial<NbdServerOptions> = {}): Promise<TestServer> {
  const disk = { name: "disk", description: "", device, readOnly: false, canMultiConn: true };
  server = new TestServer([disk], 16, options);
  await server.listen();
  return server;
}

function openFileCount(): number {
  return readdirSync("/proc/self/fd").length;
}

/** An honest guest's round trip. */
async function isServed(client: RawClient): Promise<boolean> {
  client.send(requestBytes(nbd.NBD_CMD_FLUSH, { cookie: 5n }));
  const { error, cookie } = await client.simpleReply();
  return error === 0 && cookie === 5n;
}

const CONVERSATION = Buffer.concat([
  CLIENT_FLAGS,
  optionBytes(nbd.NBD_OPT_LIST),
  optionBytes(nbd.NBD_OPT_STRUCTURED_REPLY),
  optionBytes(nbd.NBD_OPT_SET_META_CONTEXT, metaData("disk", ["base:allocation"])),
  optionBytes(nbd.NBD_OPT_GO, goData("disk", [1, 2, 3])),
  requestBytes(nbd.NBD_CMD_WRITE, { cookie: 1n, offset: 512, payload: Buffer.alloc(40, 9) }),
  requestBytes(nbd.NBD_CMD_READ, { cookie: 2n, offset: 512, length: 40 }),
  requestBytes(nbd.NBD_CMD_BLOCK_STATUS, { cookie: 3n, length: 4096 }),
  requestBytes(nbd.NBD_CMD_DISC),
]);

test.each(["now", "later"] as const)(
  "a disconnect at each byte of a conversation leaves nothing behind (device: %s)",
  async (mode) => {
    const device = new MemoryDevice(64 * KiB);
    device.mode = mode;
    await start(device);
    const honest = await server.client();
    const files = openFileCount();
    const heldBytes = server.server.heldBytes;
    for (let cut = 0; cut <= CONVERSATION.length; cut++) {
      const client = server.connect();
      // Half of them hang up, half of them break off.
      if (cut % 2 === 0) client.socket.end(CONVERSATION.subarray(0, cut));
      else client.socket.write(CONVERSATION.subarray(0, cut), () => client.destroy());
      client.socket.resume();
      if (cut % 50 === 0) expect(await isServed(honest)).toBe(true);
      if (cut % 10 === 9) await until(() => server.server.connectionCount === 1);
      if (cut % 2 === 0) client.socket.on("end", () => client.destroy());
    }
    await until(() => server.server.connectionCount === 1);
    expect(await isServed(honest)).toBe(true);
    await until(() => openFileCount() <= files);
    expect(server.server.heldBytes).toBeLessThanOrEqual(heldBytes + MiB);
  },
);

describe("lengths", () => {
  test("a write of 4 GiB - 1 ends its connection before a byte is stored for it", async () => {
    await start(new MemoryDevice(64 * KiB));
    const [hostile, honest] = [await server.client(), await server.client()];
    hostile.send(requestBytes(nbd.NBD_CMD_WRITE, { length: 0xffff_ffff }));
    expect((await hostile.readToEnd()).length).toBe(0);
    expect(server.server.heldBytes).toBeLessThan(4 * MiB);
    expect(await isServed(honest)).toBe(true);
  });

  test("an option of 4 GiB - 1 is refused, then the connection ends", async () => {
    await start(new MemoryDevice(64 * KiB));
    const hostile = server.connect();
    await hostile.read(18);
    const header = optionBytes(nbd.NBD_OPT_GO);
    header.writeUInt32BE(0xffff_ffff, 12);
    hostile.send(CLIENT_FLAGS, header);
    const rest = await hostile.readToEnd();
    expect(rest.readUInt32BE(12)).toBe(nbd.NBD_REP_ERR_TOO_BIG);
  });

  test("requests at the advertised maximum are served, one byte more is refused by its error", async () => {
    const size = 33 * MiB;
    await start(new MemoryDevice(size));
    const client = await server.client();
    const payload = Buffer.alloc(nbd.MAX_PAYLOAD_BYTES, 3);
    client.send(requestBytes(nbd.NBD_CMD_WRITE, { payload }));
    expect((await client.simpleReply()).error).toBe(0);
    client.send(requestBytes(nbd.NBD_CMD_READ, { length: nbd.MAX_PAYLOAD_BYTES }));
    expect((await client.simpleReply()).error).toBe(0);
    expect((await client.read(nbd.MAX_PAYLOAD_BYTES)).equals(payload)).toBe(true);
    client.send(requestBytes(nbd.NBD_CMD_READ, { length: nbd.MAX_PAYLOAD_BYTES + 1 }));
    expect((await client.simpleReply()).error).toBe(nbd.NBD_EOVERFLOW);
    client.send(requestBytes(nbd.NBD_CMD_WRITE, { payload: Buffer.alloc(nbd.MAX_PAYLOAD_BYTES + 1) }));
    expect((await client.simpleReply()).error).toBe(nbd.NBD_EINVAL);
    expect(await isServed(client)).toBe(true);
  });
});

describe("clients that do not read", () => {
  test("a flood of options is answered as far as 4 MiB; the rest when the answers are taken", async () => {
    const device = new MemoryDevice(4096);
    const exports = Array.from({ length: 100 }, (_, i) => ({
      name: `${i}${"x".repeat(4000)}`,
      description: "",
      device,
      readOnly: false,
      canMultiConn: true,
    }));
    server = new TestServer(exports);
    await server.listen();
    const flood = server.connect();
    await flood.read(18);
    flood.socket.pause();
    const options = 100;
    flood.send(CLIENT_FLAGS, ...Array.from({ length: options }, () => optionBytes(nbd.NBD_OPT_LIST)));
    await until(() => server.server.heldBytes > 2 * MiB);
    for (let turns = 0; turns < 50; turns++) {
      await new Promise((resolve) => setImmediate(resolve));
      expect(server.server.heldBytes).toBeLessThan(8 * MiB);
    }
    flood.socket.resume();
    for (let i = 0; i < options; i++) {
      for (let type = 0; type !== nbd.NBD_REP_ACK;) {
        const header = await flood.read(20);
        type = header.readUInt32BE(12);
        await flood.read(header.readUInt32BE(16));
      }
    }
  });

  test("all buffers together are bounded, each such client keeps one request; an honest one goes on", async () => {
    await start(new MemoryDevice(2 * MiB), { maxBufferBytes: 24 * MiB });
    const honest = await server.client();
    const hostile = await Promise.all(Array.from({ length: 12 }, () => server.client()));
    const reads = requestBytes(nbd.NBD_CMD_READ, { length: MiB });
    for (const client of hostile) {
      client.socket.pause();
      client.send(...Array.from({ length: 100 }, () => reads));
    }
    let mostBytes = 0;
    for (let i = 0; i < 30; i++) {
      expect(await isServed(honest)).toBe(true);
      mostBytes = Math.max(mostBytes, server.server.heldBytes);
    }
    // A reply of 1 MiB and its header take a slab of 2 MiB; each may have one more than the bound when it starts.
    expect(mostBytes).toBeGreaterThan(8 * MiB);
    expect(mostBytes).toBeLessThanOrEqual(24 * MiB + 12 * 2 * 2 * MiB);
    for (const client of hostile) client.destroy();
    await until(() => server.server.connectionCount === 1);
    expect(server.server.heldBytes).toBeLessThan(2 * MiB);
  });

  test("one that is to be hung up on is cut off when it does not take what it is owed", async () => {
    await start(new MemoryDevice(8 * MiB));
    const mute = await server.client();
    mute.socket.pause();
    mute.send(...Array.from({ length: 3 }, () => requestBytes(nbd.NBD_CMD_READ, { length: 8 * MiB })));
    await until(() => server.server.heldBytes > 16 * MiB);
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    try {
      mute.send(Buffer.alloc(28, 0xee));
      await turnsUntil(() => vi.getTimerCount() > 0);
      vi.advanceTimersByTime(30_001);
    } finally {
      vi.useRealTimers();
    }
    await until(() => server.server.connectionCount === 0);
    expect(server.server.heldBytes).toBe(0);
  });
});

/** `until` waits by a timer, and those stand still here. */
async function turnsUntil(condition: () => boolean): Promise<void> {
  for (let turns = 0; !condition(); turns++) {
    if (turns > 100_000) throw new Error("the condition did not come about");
    await new Promise((resolve) => setImmediate(resolve));
  }
}

test("half requests that stall hold what they have sent, and no one else", async () => {
  await start(new MemoryDevice(64 * KiB));
  const honest = await server.client();
  const half = requestBytes(nbd.NBD_CMD_WRITE, { payload: Buffer.alloc(40 * KiB, 1) }).subarray(0, 30 * KiB);
  const stalled = await Promise.all(Array.from({ length: 10 }, () => server.client()));
  for (const client of stalled) client.send(half);
  for (let i = 0; i < 50; i++) expect(await isServed(honest)).toBe(true);
  expect(server.server.heldBytes).toBeLessThan(12 * MiB);
  for (const client of stalled) client.destroy();
  await until(() => server.server.connectionCount === 1);
});

test("hundreds of connections: as many as are allowed are served, further ones refused, none leaks", async () => {
  const files = openFileCount();
  const device = new MemoryDevice(64 * KiB);
  await start(device, { maxConnections: 300 });
  const clients: RawClient[] = [];
  while (clients.length < 300) {
    clients.push(...(await Promise.all(Array.from({ length: 50 }, () => server.client()))));
  }
  await expect(server.client()).rejects.toThrow("GO was refused");
  expect((await Promise.all(clients.map(isServed))).every((served) => served)).toBe(true);
  for (const client of clients) client.destroy();
  await until(() => server.server.connectionCount === 0);
  expect(server.server.heldBytes).toBe(0);
  await server.stop();
  await until(() => openFileCount() <= files);
});

/** What clients that never finish their negotiation have sent when they fall silent. */
const HALF_NEGOTIATIONS: readonly Buffer[] = [
  Buffer.alloc(0),
  CLIENT_FLAGS.subarray(0, 2),
  CLIENT_FLAGS,
  Buffer.concat([CLIENT_FLAGS, optionBytes(nbd.NBD_OPT_LIST).subarray(0, 9)]),
  Buffer.concat([CLIENT_FLAGS, optionBytes(nbd.NBD_OPT_GO, Buffer.alloc(60 * KiB)).subarray(0, 30 * KiB)]),
  Buffer.concat([CLIENT_FLAGS, optionBytes(nbd.NBD_OPT_LIST)]),
];

describe("clients that do not finish their negotiation", () => {
  test("keep nobody out: a newcomer is greeted and gets its disk, and the oldest of them go", async () => {
    await start(new MemoryDevice(64 * KiB), { maxConnections: 2, maxNegotiating: 5 });
    const guest = await server.client();
    const silent: RawClient[] = [];
    for (let i = 0; i < 40; i++) {
      const client = server.connect();
      client.send(HALF_NEGOTIATIONS[i % HALF_NEGOTIATIONS.length] ?? CLIENT_FLAGS);
      await client.read(18);
      silent.push(client);
      expect(server.server.connectionCount).toBeLessThanOrEqual(7);
    }
    const newcomer = await server.client();
    expect(await isServed(newcomer)).toBe(true);
    expect(await isServed(guest)).toBe(true);
    for (const client of silent.slice(0, 35)) await client.readToEnd();
    expect(silent.slice(36).some((client) => client.socket.readableEnded)).toBe(false);
    expect(new Set(server.warnings)).toEqual(
      new Set(["a client that did not finish its negotiation made room for another"]),
    );
    expect(server.warnings.length).toBeLessThanOrEqual(MAX_WARNINGS);
  });

  test("of one address push out those of the same, not a guest that is on its way in from another", async () => {
    const tcp = await startTcp({ maxNegotiating: 4 });
    const guest = tcp.from("127.0.0.2");
    await guest.read(18);
    for (let i = 0; i < 20; i++) await tcp.from("127.0.0.3").read(18);
    guest.send(CLIENT_FLAGS);
    expect((await guest.option(nbd.NBD_OPT_GO, goData("disk"))).at(-1)?.type).toBe(nbd.NBD_REP_ACK);
  });
});

describe("a server without a place", () => {
  test("says so to who wants in, answers all else, and lets the same client in when there is one", async () => {
    await start(new MemoryDevice(64 * KiB), { maxConnections: 1 });
    const guest = await server.client();
    const second = server.connect();
    await second.read(18);
    second.send(CLIENT_FLAGS);
    const refused = await second.option(nbd.NBD_OPT_GO, goData("disk"));
    expect(refused.map(({ type }) => type)).toEqual([nbd.NBD_REP_ERR_POLICY]);
    expect(refused[0]?.data.toString()).toContain("--max-connections");
    expect((await second.option(nbd.NBD_OPT_INFO, goData("disk"))).at(-1)?.type).toBe(nbd.NBD_REP_ACK);
    const old = server.connect();
    await old.read(18);
    old.send(CLIENT_FLAGS, optionBytes(nbd.NBD_OPT_EXPORT_NAME, Buffer.from("disk")));
    expect((await old.readToEnd()).length).toBe(0);
    guest.destroy();
    await until(() => server.server.connectionCount === 1);
    expect((await second.option(nbd.NBD_OPT_GO, goData("disk"))).at(-1)?.type).toBe(nbd.NBD_REP_ACK);
    expect(await isServed(second)).toBe(true);
  });

  test("keeps one in sixteen for other addresses", async () => {
    const tcp = await startTcp({ maxConnections: 16 });
    const enter = async (address: string): Promise<number | undefined> => {
      const client = tcp.from(address);
      await client.read(18);
      client.send(CLIENT_FLAGS);
      return (await client.option(nbd.NBD_OPT_GO, goData("disk"))).at(-1)?.type;
    };
    for (let i = 0; i < 15; i++) expect(await enter("127.0.0.2")).toBe(nbd.NBD_REP_ACK);
    expect(await enter("127.0.0.2")).toBe(nbd.NBD_REP_ERR_POLICY);
    expect(await enter("127.0.0.3")).toBe(nbd.NBD_REP_ACK);
    expect(await enter("127.0.0.4")).toBe(nbd.NBD_REP_ERR_POLICY);
  });
});

test("nothing more is read for a client that is gone, however much it had asked for", async () => {
  const device = new MemoryDevice(8 * MiB);
  await start(device);
  const greedy = await server.client();
  greedy.socket.pause();
  greedy.send(...Array.from({ length: 300 }, () => requestBytes(nbd.NBD_CMD_READ, { length: 8 * MiB })));
  await until(() => server.server.heldBytes > 40 * MiB);
  const readCount = device.calls.length;
  greedy.destroy();
  await until(() => server.server.connectionCount === 0);
  expect(device.calls.length).toBe(readCount);
  expect(server.server.heldBytes).toBe(0);
});

test("the server's end waits three seconds for clients that sit there, whatever they are at", async () => {
  await start(new MemoryDevice(8 * MiB));
  for (const half of HALF_NEGOTIATIONS) server.connect().send(half);
  const [idle, halfHeader, halfPayload, mute] = await Promise.all(
    Array.from({ length: 4 }, () => server.client()),
  );
  const write = requestBytes(nbd.NBD_CMD_WRITE, { payload: Buffer.alloc(MiB) });
  halfHeader?.send(write.subarray(0, 20));
  halfPayload?.send(write.subarray(0, 500 * KiB));
  mute?.socket.pause();
  for (let i = 0; i < 50; i++) mute?.send(requestBytes(nbd.NBD_CMD_READ, { length: 8 * MiB }));
  await until(() => server.server.heldBytes > 40 * MiB);
  // None of them hangs up by itself.
  for (const client of [idle, halfHeader, halfPayload]) if (client) client.socket.allowHalfOpen = true;
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
  let isClosed = false;
  try {
    void server.server.close().then(() => (isClosed = true));
    for (let turns = 0; turns < 100; turns++) await new Promise((resolve) => setImmediate(resolve));
    vi.advanceTimersByTime(CLOSE_DRAIN_MS);
    await turnsUntil(() => isClosed);
  } finally {
    vi.useRealTimers();
  }
  expect(server.server.connectionCount).toBe(0);
});

/** A server on TCP, and clients from any of this machine's loopback addresses. */
async function startTcp(
  options: Partial<NbdServerOptions>,
): Promise<{ from: (address: string) => RawClient }> {
  await start(new MemoryDevice(64 * KiB), options);
  return server.listenTcp();
}

test("bad magic ends its connection alone", async () => {
  await start(new MemoryDevice(64 * KiB));
  const [hostile, honest] = [await server.client(), await server.client()];
  hostile.send(Buffer.alloc(28, 0x25));
  expect((await hostile.readToEnd()).length).toBe(0);
  expect(await isServed(honest)).toBe(true);
  expect(server.warnings).toEqual(["client broke the protocol"]);
});

describe("multi-conn", () => {
  /** A disk with a write-back cache: what is not flushed is lost. */
  class CachingDevice extends MemoryDevice {
    readonly stable = Buffer.alloc(64 * KiB);
    override flush(): Completion {
      this.data.copy(this.stable);
      return super.flush();
    }
  }

  test("a flush on one connection makes stable what another was told is written", async () => {
    const device = new CachingDevice(64 * KiB);
    await start(device);
    const [writer, flusher] = [await server.client(), await server.client()];
    writer.send(requestBytes(nbd.NBD_CMD_WRITE, { offset: 100, payload: Buffer.from("promise") }));
    await writer.simpleReply();
    expect(device.stable.toString("latin1", 100, 107)).not.toBe("promise");
    expect(await isServed(flusher)).toBe(true);
    expect(device.stable.toString("latin1", 100, 107)).toBe("promise");
  });
});
