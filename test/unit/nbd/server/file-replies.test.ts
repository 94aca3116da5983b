// Reads whose data leave the page cache for the socket without a copy: whole and in order whatever the socket has room for,
// with everything else behind them.
import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { FileRange } from "../../../../src/block/device.js";
import { SnapshotDevice } from "../../../../src/cow/snapshot-device.js";
import { openRaw } from "../../../../src/image/raw.js";
import { sendFile, type SendFile } from "../../../../src/native/send-file.js";
import { EINVAL, libc } from "../../../../src/native/libc.js";
import { MAX_WRITES_QUEUED } from "../../../../src/nbd/server/limits.js";
import * as nbd from "../../../../src/nbd/wire/protocol.js";
import { KiB, MiB } from "../../../../src/units.js";
import { MemoryDevice, type RawClient, requestBytes, TestServer, until } from "../../../support/nbd-peer.js";

const SIZE = 24 * MiB;
/** More than a socket holds. */
const LONG = 8 * MiB;

/** The server's reads come from the file alone: what it copies would be zeroes. */
class FileDevice extends MemoryDevice {
  rangeCount = 0;
  constructor(
    readonly fd: number,
    private readonly isCached: (offsetBytes: number, lengthBytes: number) => boolean = () => true,
  ) {
    super(SIZE);
  }

  cachedRange(offsetBytes: number, lengthBytes: number): FileRange | undefined {
    if (!this.isCached(offsetBytes, lengthBytes)) return undefined;
    this.rangeCount++;
    return { fd: this.fd, offsetBytes };
  }
}

const MEMORY = "/dev/shm";
const calls = sendFile();
const file = calls !== null && fs.existsSync(MEMORY) ? describe : describe.skip;

file("replies from the page cache", () => {
  const content = randomBytes(SIZE);
  let folder: string;
  let fd: number;
  let server: TestServer;
  let device: FileDevice;

  beforeEach(async () => {
    folder = fs.mkdtempSync(join(MEMORY, "cowcatcher-replies-"));
    const path = join(folder, "disk");
    fs.writeFileSync(path, content);
    fd = fs.openSync(path, "r+");
    device = new FileDevice(fd);
    server = await TestServer.start(device);
  });
  afterEach(async () => {
    vi.restoreAllMocks();
    await server.stop();
    fs.closeSync(fd);
    fs.rmSync(folder, { recursive: true });
  });

  const read = (cookie: number, offset: number, length: number): Buffer =>
    requestBytes(nbd.NBD_CMD_READ, { cookie: BigInt(cookie), offset, length });

  async function expectData(
    client: RawClient,
    cookie: number,
    offset: number,
    length: number,
  ): Promise<void> {
    expect(await client.simpleReply()).toEqual({ error: 0, cookie: BigInt(cookie) });
    const data = await client.read(length);
    expect(data.equals(content.subarray(offset, offset + length)), `reply ${cookie}`).toBe(true);
  }

  it("are whole and in order when many are asked for at once", async () => {
    const client = await server.client();
    const sizes = [64 * KiB, 256 * KiB, 1 * MiB + 17, 70_001, LONG];
    const wanted = sizes.map((length, index) => [index, 4097 * index, length] as const);
    client.send(...wanted.map(([cookie, offset, length]) => read(cookie, offset, length)));
    for (const [cookie, offset, length] of wanted) await expectData(client, cookie, offset, length);
    expect(device.calls).toEqual([]);
  });

  it("are not cut into by what is answered while they wait for the client", async () => {
    const client = await server.client();
    client.socket.pause();
    device.mode = "later";
    device.autoRelease = false;
    const write = requestBytes(nbd.NBD_CMD_WRITE, { cookie: 1n, offset: 0, payload: Buffer.from("early") });
    client.send(write);
    await until(() => device.waiting.length === 1);
    client.send(read(2, 100, LONG));
    await until(() => device.rangeCount === 1);
    // The write ends in the middle of that reply.
    device.releaseAll();
    client.send(requestBytes(nbd.NBD_CMD_FLUSH, { cookie: 3n }), read(4, SIZE - LONG, LONG));
    await until(() => device.waiting.length === 1);
    device.releaseAll();
    // The last read may be copied, as small replies are on their way then.
    device.mode = "now";
    device.data.set(content);
    client.socket.resume();
    await expectData(client, 2, 100, LONG);
    const small = [await client.simpleReply(), await client.simpleReply()];
    expect(small).toEqual([
      { error: 0, cookie: 1n },
      { error: 0, cookie: 3n },
    ]);
    await expectData(client, 4, SIZE - LONG, LONG);
  });

  it("show a write that came before the client took them, as one that came at the same time", async () => {
    const client = await server.client();
    client.socket.pause();
    client.send(read(1, 0, LONG));
    await until(() => device.rangeCount === 1);
    const late = Buffer.alloc(4 * KiB, 0xab);
    fs.writeSync(fd, late, 0, late.length, LONG - late.length);
    client.socket.resume();
    await client.simpleReply();
    const data = await client.read(LONG);
    expect(data.subarray(LONG - late.length).equals(late)).toBe(true);
  });

  it("end the connection where the file has become shorter meanwhile, and nothing follows", async () => {
    const client = await server.client();
    client.socket.pause();
    client.send(read(1, 0, LONG), read(2, 0, 64 * KiB), requestBytes(nbd.NBD_CMD_FLUSH, { cookie: 3n }));
    await until(() => device.rangeCount >= 1);
    fs.ftruncateSync(fd, 4 * MiB);
    client.socket.resume();
    const got = await client.readToEnd();
    expect(got.length).toBeGreaterThan(16);
    expect(got.length).toBeLessThanOrEqual(16 + 4 * MiB);
    expect(got.subarray(16).equals(content.subarray(0, got.length - 16))).toBe(true);
    await until(() => server.server.connectionCount === 0);
  });

  it("go on over what a guest discards meanwhile", async () => {
    const client = await server.client();
    client.socket.pause();
    client.send(read(1, 0, LONG), read(2, 5, 100_000));
    await until(() => device.rangeCount >= 1);
    expect(libc?.punchHole(fd, 4 * MiB, 2 * MiB)).toBe(0);
    client.socket.resume();
    await client.simpleReply();
    const data = await client.read(LONG);
    expect(data.subarray(4 * MiB, 6 * MiB).every((byte) => byte === 0)).toBe(true);
    await expectData(client, 2, 5, 100_000);
  });

  it("are copied where the file system has no way to a socket", async () => {
    const client = await server.client();
    vi.spyOn(calls as SendFile, "sendFile").mockReturnValue(-EINVAL);
    client.send(read(1, 0, LONG), read(2, 5, 100_000));
    await expectData(client, 1, 0, LONG);
    await expectData(client, 2, 5, 100_000);
  });

  it("hold up whoever has many small replies behind one that it does not take", async () => {
    const client = await server.client();
    client.socket.pause();
    client.send(read(1, 0, LONG));
    await until(() => device.rangeCount === 1);
    const COUNT = 3 * MAX_WRITES_QUEUED;
    for (let sent = 0; sent < COUNT; sent++) {
      client.send(requestBytes(nbd.NBD_CMD_FLUSH, { cookie: BigInt(sent) }));
      await new Promise(setImmediate);
    }
    expect(device.calls.length).toBeLessThanOrEqual(MAX_WRITES_QUEUED);
    client.socket.resume();
    await expectData(client, 1, 0, LONG);
    for (let got = 0; got < COUNT; got++) await client.simpleReply();
    expect(device.calls).toHaveLength(COUNT);
  });

  it("are completed before a server that is shut down hangs up", async () => {
    const client = await server.client();
    client.socket.pause();
    client.send(read(1, 0, LONG), read(2, 0, LONG));
    await until(() => device.rangeCount >= 1);
    const closed = server.server.close();
    client.socket.resume();
    await expectData(client, 1, 0, LONG);
    expect((await client.simpleReply()).error).not.toBe(0);
    expect(await client.readToEnd()).toEqual(Buffer.alloc(0));
    client.destroy();
    await closed;
  });

  it("leave nothing behind where the client goes in the middle of one", async () => {
    const client = await server.client();
    client.socket.pause();
    client.send(read(1, 0, LONG));
    await until(() => device.rangeCount === 1);
    client.destroy();
    await until(() => server.server.connectionCount === 0);
  });
});

file("a raw image", () => {
  async function offersOf(where: string): Promise<unknown[]> {
    const folder = fs.mkdtempSync(join(where, "cowcatcher-raw-"));
    const path = join(folder, "disk");
    fs.writeFileSync(path, Buffer.alloc(1 * MiB, 1));
    const fd = fs.openSync(path, "r+");
    const image = await openRaw({ path, name: path, fd, readOnly: false, direct: false, probed: false });
    const whole = image.cachedRange(4096, 512 * KiB) !== undefined;
    fs.ftruncateSync(fd, 64 * KiB);
    const cut = image.cachedRange(0, 128 * KiB) !== undefined;
    fs.ftruncateSync(fd, 1 * MiB);
    await image.close();
    fs.rmSync(folder, { recursive: true });
    return [whole, cut];
  }

  it("offers what is in memory for good, and nothing behind the file's end", async () => {
    expect(await offersOf(MEMORY)).toEqual([true, false]);
  });

  it("offers nothing of a disk: a page that is cached may still be being read", async () => {
    expect(await offersOf(process.cwd())).toEqual([false, false]);
  });

  it("is the only kind: a view of T0 is read, as the disk goes on changing", () => {
    expect("cachedRange" in SnapshotDevice.prototype).toBe(false);
  });
});
