import { createServer, type Server, type Socket } from "node:net";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../../src/errors.js";
import { NbdClient, type NbdClientOptions } from "../../../../src/nbd/client/client.js";
import {
  NBD_CMD_DISC,
  NBD_CMD_READ,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_NO_ZEROES,
  NBD_INIT_MAGIC,
  NBD_OPTION_MAGIC,
  NBD_OPTION_REPLY_MAGIC,
  NBD_OPT_GO,
  NBD_REP_ACK,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_INFO,
  NBD_SIMPLE_REPLY_MAGIC,
} from "../../../../src/nbd/wire/protocol.js";
import { formatNbdUri, parseNbdUri } from "../../../../src/nbd/wire/uri.js";
import { MemoryDevice, TestServer } from "../../../support/nbd-peer.js";

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function failureOf(promise: Promise<unknown>): Promise<CowcatcherError> {
  const error: unknown = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(CowcatcherError);
  return error as CowcatcherError;
}

describe("NBD URIs", () => {
  it("names the server and the export", () => {
    expect(parseNbdUri("nbd://example.com/disk")).toEqual({
      host: "example.com",
      port: 10_809,
      exportName: "disk",
    });
    expect(parseNbdUri("nbd://[::1]:99/a%20b")).toEqual({ host: "::1", port: 99, exportName: "a b" });
    expect(parseNbdUri("nbd://example.com//disk")).toMatchObject({ exportName: "/disk" });
    expect(parseNbdUri("nbd://example.com")).toMatchObject({ exportName: "" });
    expect(parseNbdUri("nbd+unix:///disk?socket=/run/a+b%20c.sock")).toEqual({
      path: "/run/a+b c.sock",
      exportName: "disk",
    });
  });

  it("refuses what it cannot reach, by name", () => {
    const codeOf = (uri: string): string => {
      try {
        parseNbdUri(uri);
      } catch (error) {
        return (error as CowcatcherError).code;
      }
      return "none";
    };
    expect(codeOf("nbds+vsock://1/")).toBe("UNSUPPORTED");
    expect(codeOf("nbd://host/?tls-certificates=/pki")).toBe("USAGE");
    expect(codeOf("nbds://host/?tls-verify-pear=0")).toBe("USAGE");
    expect(codeOf("nbds://host/?tls-verify-peer=maybe")).toBe("USAGE");
    expect(codeOf("nbds://host/?tls-hostname=a&tls-hostname=b")).toBe("USAGE");
    expect(codeOf("nbds://host/?tls-certificates=/a&tls-psk-file=/b")).toBe("USAGE");
    expect(codeOf("nbd://host/?socket=/s")).toBe("USAGE");
    expect(codeOf("nbd+vsock://1/")).toBe("UNSUPPORTED");
    expect(codeOf("nbd+unix:///disk")).toBe("USAGE");
    expect(codeOf("nbd+unix://host/disk?socket=/s")).toBe("USAGE");
    expect(codeOf("nbd:/disk")).toBe("USAGE");
    expect(codeOf("nbd://host/%ZZ")).toBe("USAGE");
    expect(codeOf("http://host/")).toBe("USAGE");
    expect(codeOf("/a/path")).toBe("USAGE");
  });

  it("say how the way is secured, and verify the server unless told not to", () => {
    expect(parseNbdUri("nbds://host/disk").tls).toMatchObject({ verifyPeer: true });
    expect(parseNbdUri("nbds+unix://alice@/?socket=/s&tls-psk-file=/k").tls).toMatchObject({
      username: "alice",
      pskFile: "/k",
    });
    expect(parseNbdUri("nbds://h/?tls-verify-peer=0&tls-certificates=/pki&tls-hostname=x").tls).toMatchObject(
      {
        verifyPeer: false,
        certificates: "/pki",
        hostname: "x",
      },
    );
  });

  it("come back from their own text", () => {
    for (const uri of [
      "nbd://host/disk",
      "nbd://[::1]:99/",
      "nbd+unix:///a%20b?socket=/run/x%26y.sock",
      "nbds://bob@host/disk?tls-psk-file=/k",
      "nbds+unix://bob@/disk?socket=/s&tls-certificates=/pki&tls-hostname=h&tls-verify-peer=0",
    ]) {
      expect(formatNbdUri(parseNbdUri(uri))).toBe(uri);
    }
  });
});

describe("NBD client with this project's server", () => {
  async function start(options: NbdClientOptions = {}, device = new MemoryDevice(1 << 20)) {
    const server = await TestServer.start(device);
    cleanups.push(() => server.stop());
    const client = await NbdClient.connect(server.uri, options);
    cleanups.push(() => client.destroy());
    return { server, device, client };
  }

  it("writes, reads, zeroes, trims, flushes and says goodbye", async () => {
    const { device, client } = await start();
    expect(client.sizeBytes).toBe(1 << 20);
    const source = Buffer.alloc(5000, 7);
    await client.write(source, 1000, 3000, 12_345, { fua: true });
    const destination = Buffer.alloc(3100);
    await client.read(destination, 50, 3000, 12_345);
    expect(destination.subarray(50, 3050).equals(source.subarray(1000, 4000))).toBe(true);
    expect(destination[49]).toBe(0);
    expect(destination[3050]).toBe(0);
    await client.writeZeroes(12_345, 1000);
    await client.writeZeroes(0, 4096, { mayUnmap: false });
    await client.trim(4096, 4096);
    await client.flush();
    expect(device.data[13_344]).toBe(0);
    expect(device.data[13_345]).toBe(7);
    expect(device.calls).toContain("zero 12345+1000 unmap");
    expect(device.calls).toContain("zero 0+4096");
    expect(device.calls).toContain("discard 4096+4096");
    await client.disconnect();
    expect((await failureOf(client.flush())).code).toBe("IO");
  });

  it("settles each of many pipelined requests with its own data", async () => {
    const device = new MemoryDevice(1 << 20);
    device.mode = "later";
    const { client } = await start({ maxInFlight: 5 }, device);
    for (let i = 0; i < device.data.length; i++) device.data[i] = (i >>> 10) & 0xff;
    const buffers = Array.from({ length: 64 }, () => Buffer.alloc(3000));
    await Promise.all(buffers.map((buffer, i) => client.read(buffer, 0, 3000, i * 4096)));
    for (const [i, buffer] of buffers.entries()) {
      expect(buffer.equals(device.data.subarray(i * 4096, i * 4096 + 3000))).toBe(true);
    }
  });

  it("lets no more requests through than it was told, and finishes them before it hangs up", async () => {
    const device = new MemoryDevice(1 << 20);
    device.mode = "later";
    const { client } = await start({ maxInFlight: 3 }, device);
    const writes = Array.from({ length: 10 }, (_, i) => client.write(Buffer.alloc(512, i), 0, 512, i * 512));
    expect(client.inFlight).toBe(3);
    await client.disconnect();
    await Promise.all(writes);
    expect(device.data[9 * 512]).toBe(9);
  });

  it("gives the server's errors with their errno and offset, and goes on", async () => {
    const { device, client } = await start();
    device.failure = new CowcatcherError({ code: "NO_SPACE", object: "x", problem: "full", errno: "ENOSPC" });
    const noSpace = await failureOf(client.write(Buffer.alloc(512), 0, 512, 1024));
    expect(noSpace).toMatchObject({ code: "NO_SPACE", errno: "ENOSPC", offsetBytes: 1024 });
    device.failure = new CowcatcherError({ code: "IO", object: "x", problem: "broken", errno: "EIO" });
    expect(await failureOf(client.read(Buffer.alloc(512), 0, 512, 0))).toMatchObject({
      code: "IO",
      errno: "EIO",
    });
    device.failure = undefined;
    await client.read(Buffer.alloc(512), 0, 512, 0);
  });

  it("refuses, without asking the server, what lies outside the export or is too large", async () => {
    const { device, client } = await start();
    const buffer = Buffer.alloc(512);
    expect(await failureOf(client.read(buffer, 0, 512, (1 << 20) - 511))).toMatchObject({ errno: "EINVAL" });
    expect(await failureOf(client.write(buffer, 0, 513, 0))).toMatchObject({ errno: "EINVAL" });
    expect(await failureOf(client.read(buffer, 0, 512, -1))).toMatchObject({ errno: "EINVAL" });
    expect(device.calls).toEqual([]);
  });

  it("names the export that is not there, and the socket that is not", async () => {
    const { server } = await start();
    const path = server.socketPath;
    const unknown = await failureOf(NbdClient.connect({ path, exportName: "other" }));
    expect(unknown).toMatchObject({ code: "NOT_FOUND" });
    expect(unknown.problem).toContain("'other'");
    const missing = await failureOf(NbdClient.connect({ path: `${path}.no`, exportName: "" }));
    expect(missing).toMatchObject({ code: "NOT_FOUND", errno: "ENOENT" });
  });

  it("rejects what is in flight when the server goes away", async () => {
    const device = new MemoryDevice(1 << 20);
    device.mode = "later";
    device.autoRelease = false;
    const { client } = await start({ maxInFlight: 1 }, device);
    const reads = [0, 1].map((i) => failureOf(client.read(Buffer.alloc(512), 0, 512, i * 512)));
    client.destroy();
    for (const error of await Promise.all(reads)) expect(error.code).toBe("IO");
    device.releaseAll();
  });
});

describe("NBD client with a server that breaks the rules", () => {
  async function fakeServer(serve: (socket: Socket) => void): Promise<{ path: string; exportName: string }> {
    const folder = mkdtempSync(join(tmpdir(), "cowcatcher-nbd-fake-"));
    const path = join(folder, "nbd.sock");
    const sockets: Socket[] = [];
    const server: Server = createServer((socket) => {
      sockets.push(socket);
      socket.on("error", () => undefined);
      serve(socket);
    });
    await new Promise<void>((resolve) => server.listen(path, resolve));
    cleanups.push(() => {
      for (const socket of sockets) socket.destroy();
      server.close();
      rmSync(folder, { recursive: true, force: true });
    });
    return { path, exportName: "disk" };
  }

  /** The scripts know one option. */
  function connect(
    address: { path: string; exportName: string },
    options: NbdClientOptions = {},
  ): Promise<NbdClient> {
    return NbdClient.connect(address, { structured: false, ...options });
  }

  function greeting(): Buffer {
    const bytes = Buffer.alloc(18);
    bytes.writeBigUInt64BE(NBD_INIT_MAGIC, 0);
    bytes.writeBigUInt64BE(NBD_OPTION_MAGIC, 8);
    bytes.writeUInt16BE(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES, 16);
    return bytes;
  }

  function optionReply(type: number, data = Buffer.alloc(0)): Buffer {
    const header = Buffer.alloc(20);
    header.writeBigUInt64BE(NBD_OPTION_REPLY_MAGIC, 0);
    header.writeUInt32BE(NBD_OPT_GO, 8);
    header.writeUInt32BE(type, 12);
    header.writeUInt32BE(data.length, 16);
    return Buffer.concat([header, data]);
  }

  function exportInfo(sizeBytes: bigint): Buffer {
    const info = Buffer.alloc(12);
    info.writeBigUInt64BE(sizeBytes, 2);
    info.writeUInt16BE(NBD_FLAG_HAS_FLAGS, 10);
    return optionReply(NBD_REP_INFO, info);
  }

  /** Sends `answer` after the greeting has been answered, then hands requests to `onRequest`. */
  function scripted(answer: Buffer, onRequest?: (socket: Socket, request: Buffer) => void) {
    return fakeServer((socket) => {
      socket.write(greeting());
      let isNegotiated = false;
      socket.on("data", (data) => {
        if (isNegotiated) onRequest?.(socket, data);
        else socket.write(answer);
        isNegotiated = true;
      });
    });
  }

  function simpleReply(request: Buffer, changes: { magic?: number; cookie?: number; error?: number } = {}) {
    const reply = Buffer.alloc(16);
    reply.writeUInt32BE(changes.magic ?? NBD_SIMPLE_REPLY_MAGIC, 0);
    reply.writeUInt32BE(changes.error ?? 0, 4);
    request.copy(reply, 8, 8, 16);
    if (changes.cookie !== undefined) reply.writeUInt32BE(changes.cookie, 12);
    return reply;
  }

  const ready = Buffer.concat([exportInfo(1024n), optionReply(NBD_REP_ACK)]);

  it.each([
    ["no NBD at all", Buffer.from("SSH-2.0-OpenSSH_9.2p1 Debian\r\n"), "PROTOCOL"],
    ["no known style", Buffer.from("NBDMAGICNEWMAGIC\0\0"), "PROTOCOL"],
  ])("refuses a greeting: %s", async (_name, bytes, code) => {
    const address = await fakeServer((socket) => socket.write(bytes));
    expect((await failureOf(connect(address))).code).toBe(code);
  });

  it.each([
    ["TLS required", optionReply(NBD_REP_ERR_TLS_REQD, Buffer.from("no\u001b[31m way\n")), "UNSUPPORTED"],
    ["no size", optionReply(NBD_REP_ACK), "PROTOCOL"],
    ["a size beyond 2^53", exportInfo(1n << 60n), "LIMIT"],
    ["an unknown reply", optionReply(99), "PROTOCOL"],
    ["wrong magic", Buffer.alloc(20), "PROTOCOL"],
    ["too many replies", Buffer.concat(Array.from({ length: 70 }, () => exportInfo(1n))), "PROTOCOL"],
  ])("refuses an answer to GO: %s", async (_name, answer, code) => {
    const error = await failureOf(connect(await scripted(answer)));
    expect(error.code).toBe(code);
    expect(error.message).not.toMatch(/\p{Cc}/u);
  });

  it.each([
    ["wrong magic", { magic: 0x668e33ef }],
    ["a slot that is not in use", { cookie: 7 }],
    ["a slot that does not exist", { cookie: 0xffffffff }],
  ])("ends the connection for a reply with %s", async (_name, changes) => {
    const address = await scripted(ready, (socket, request) => socket.write(simpleReply(request, changes)));
    const client = await connect(address);
    const read = client.read(Buffer.alloc(512), 0, 512, 0);
    expect((await failureOf(read)).code).toBe("PROTOCOL");
    expect((await failureOf(client.flush().then(() => client.read(Buffer.alloc(1), 0, 1, 0)))).code).toBe(
      "PROTOCOL",
    );
  });

  it("ends the connection for a second reply to one request", async () => {
    const address = await scripted(ready, (socket, request) => {
      const reply = Buffer.concat([simpleReply(request), Buffer.alloc(8)]);
      socket.write(Buffer.concat([reply, reply]));
    });
    const client = await connect(address);
    await client.read(Buffer.alloc(8), 0, 8, 0);
    expect((await failureOf(client.read(Buffer.alloc(8), 0, 8, 0))).code).toBe("PROTOCOL");
  });

  it("takes replies byte by byte, and an unlisted error value as EINVAL", async () => {
    const address = await scripted(ready, (socket, request) => {
      if (request.readUInt16BE(6) === NBD_CMD_DISC) return void socket.end();
      expect(request.readUInt16BE(6)).toBe(NBD_CMD_READ);
      const isFirst = request.readUInt32BE(20) === 0;
      const reply = isFirst
        ? Buffer.concat([simpleReply(request), Buffer.from("12345678")])
        : simpleReply(request, { error: 999 });
      socket.setNoDelay(true);
      for (let i = 0; i < reply.length; i++) socket.write(reply.subarray(i, i + 1));
    });
    const client = await connect(address);
    const buffer = Buffer.alloc(8);
    await client.read(buffer, 0, 8, 0);
    expect(buffer.toString()).toBe("12345678");
    expect(await failureOf(client.read(buffer, 0, 8, 8))).toMatchObject({ code: "IO", errno: "EINVAL" });
    await client.disconnect();
  });

  it("gives up on a server that is silent, in the negotiation and after it", async () => {
    const mute = await fakeServer(() => undefined);
    const noGreeting = await failureOf(connect(mute, { connectTimeoutMs: 50 }));
    expect(noGreeting).toMatchObject({ code: "IO", errno: "ETIMEDOUT" });
    const client = await connect(await scripted(ready), { replyTimeoutMs: 50 });
    const read = client.read(Buffer.alloc(8), 0, 8, 0);
    expect(await failureOf(read)).toMatchObject({ code: "IO", errno: "ETIMEDOUT" });
  });
});
