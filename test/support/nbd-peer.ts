// A hand-driven NBD client and a device in memory, for the server's tests: every byte on the wire is the test's own.

import { mkdtempSync, rmSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { BlockDevice, BlockStatus, Completion, WriteZeroesOptions } from "../../src/block/device.js";
import { listenTcp, listenUnix, type NbdListener } from "../../src/nbd/server/listen.js";
import {
  NBD_CMD_FLAG_DF,
  NBD_OPTION_MAGIC,
  NBD_OPT_GO,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_REPLY_FLAG_DONE,
  NBD_REP_ACK,
  NBD_REQUEST_MAGIC,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
} from "../../src/nbd/wire/protocol.js";
import {
  NbdServer,
  type NbdExport,
  type NbdLogger,
  type NbdServerOptions,
} from "../../src/nbd/server/server.js";

export const DF = NBD_CMD_FLAG_DF;

/** A device in memory. "later": each operation waits until `releaseAll`, or a turn of the loop if `autoRelease`. */
export class MemoryDevice implements BlockDevice {
  readonly name = "memory";
  readonly readOnly = false;
  readonly clusterSizeBytes: number = 0;
  readonly data: Buffer;
  readonly calls: string[] = [];
  mode: "now" | "later" = "now";
  autoRelease = true;
  /** Thrown by the next operations, at once or later as `mode` says. */
  failure: Error | undefined;
  /** Runs for blockStatus: [lengthBytes, isZero]. */
  runs: [number, boolean][] = [];
  waiting: (() => void)[] = [];

  constructor(readonly sizeBytes: number) {
    this.data = Buffer.alloc(sizeBytes);
  }

  releaseAll(): void {
    for (const go of this.waiting.splice(0)) go();
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    this.check(buffer.length, bufferOffset, lengthBytes, offsetBytes);
    return this.run(`read ${offsetBytes}+${lengthBytes}`, () => {
      buffer.set(this.data.subarray(offsetBytes, offsetBytes + lengthBytes), bufferOffset);
    });
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    this.check(buffer.length, bufferOffset, lengthBytes, offsetBytes);
    return this.run(`write ${offsetBytes}+${lengthBytes}`, () => {
      this.data.set(buffer.subarray(bufferOffset, bufferOffset + lengthBytes), offsetBytes);
    });
  }

  writeZeroes(offsetBytes: number, lengthBytes: number, { mayUnmap }: WriteZeroesOptions): Completion {
    this.check(lengthBytes, 0, lengthBytes, offsetBytes);
    return this.run(`zero ${offsetBytes}+${lengthBytes}${mayUnmap ? " unmap" : ""}`, () => {
      this.data.fill(0, offsetBytes, offsetBytes + lengthBytes);
    });
  }

  discard(offsetBytes: number, lengthBytes: number): Completion {
    this.check(lengthBytes, 0, lengthBytes, offsetBytes);
    return this.run(`discard ${offsetBytes}+${lengthBytes}`, () => undefined);
  }

  flush(): Completion {
    return this.run("flush", () => undefined);
  }

  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus> {
    this.check(lengthBytes, 0, lengthBytes, offsetBytes);
    let end = 0;
    for (const [runBytes, zero] of [...this.runs, [Infinity, false] as [number, boolean]]) {
      end += runBytes;
      if (offsetBytes >= end) continue;
      const status: BlockStatus = {
        lengthBytes: Math.min(end - offsetBytes, lengthBytes),
        zero,
        data: !zero,
        depth: 0,
        present: !zero,
        compressed: false,
      };
      return this.mode === "now" ? status : Promise.resolve(status);
    }
    throw new RangeError("no run");
  }

  close(): Promise<void> {
    return Promise.resolve();
  }

  private check(bufferBytes: number, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    const fits = offsetBytes >= 0 && lengthBytes > 0 && offsetBytes + lengthBytes <= this.sizeBytes;
    if (!fits || bufferOffset + lengthBytes > bufferBytes)
      throw new RangeError("the server let a bad range through");
  }

  private run(call: string, action: () => void): Completion {
    this.calls.push(call);
    const finish = (): void => {
      if (this.failure !== undefined) throw this.failure;
      action();
    };
    if (this.mode === "now") {
      finish();
      return undefined;
    }
    return new Promise<void>((resolve, reject) => {
      this.waiting.push(() => {
        try {
          finish();
          resolve();
        } catch (error) {
          reject(error instanceof Error ? error : new Error(String(error)));
        }
      });
      if (this.autoRelease)
        setImmediate(() => {
          this.releaseAll();
        });
    });
  }
}

export class RawClient {
  private readonly chunks: Buffer[] = [];
  private bufferedBytes = 0;
  private isEnded = false;
  private wake: (() => void) | undefined;
  readonly socket: Socket;

  constructor(place: string | { port: number; localAddress: string }) {
    this.socket = connect({
      ...(typeof place === "string" ? { path: place } : { host: "127.0.0.1", ...place }),
      allowHalfOpen: true,
    });
    this.socket.on("data", (chunk: Buffer) => {
      this.chunks.push(chunk);
      this.bufferedBytes += chunk.length;
      this.wake?.();
    });
    const ended = (): void => {
      this.isEnded = true;
      this.wake?.();
    };
    this.socket.on("end", ended);
    this.socket.on("error", () => undefined);
    this.socket.on("close", ended);
  }

  send(...parts: Buffer[]): void {
    this.socket.write(Buffer.concat(parts));
  }

  /** Each part in a write of its own, with a turn of the loop between them. */
  async sendApart(parts: Buffer[]): Promise<void> {
    for (const part of parts) {
      await new Promise<void>((resolve) =>
        this.socket.write(part, () => {
          setImmediate(resolve);
        }),
      );
    }
  }

  async read(byteCount: number): Promise<Buffer> {
    while (this.bufferedBytes < byteCount) {
      if (this.isEnded)
        throw new Error(`the server hung up with ${this.bufferedBytes} of ${byteCount} bytes sent`);
      await new Promise<void>((resolve) => {
        this.wake = resolve;
      });
    }
    const all = Buffer.concat(this.chunks);
    this.chunks.length = 0;
    this.chunks.push(all.subarray(byteCount));
    this.bufferedBytes -= byteCount;
    return all.subarray(0, byteCount);
  }

  /** Resolves when the server has closed its side; returns what came before that. */
  async readToEnd(): Promise<Buffer> {
    while (!this.isEnded)
      await new Promise<void>((resolve) => {
        this.wake = resolve;
      });
    return this.read(this.bufferedBytes);
  }

  destroy(): void {
    this.socket.destroy();
  }

  async option(code: number, data: Buffer = Buffer.alloc(0)): Promise<{ type: number; data: Buffer }[]> {
    this.send(optionBytes(code, data));
    const replies: { type: number; data: Buffer }[] = [];
    for (;;) {
      const header = await this.read(20);
      const reply = { type: header.readUInt32BE(12), data: await this.read(header.readUInt32BE(16)) };
      replies.push(reply);
      if (reply.type === NBD_REP_ACK || reply.type >= 0x80000000) return replies;
    }
  }

  async simpleReply(): Promise<{ error: number; cookie: bigint }> {
    const reply = await this.read(16);
    if (reply.readUInt32BE(0) !== NBD_SIMPLE_REPLY_MAGIC) throw new Error("not a simple reply");
    return { error: reply.readUInt32BE(4), cookie: reply.readBigUInt64BE(8) };
  }

  /** All chunks of one structured reply. */
  async structuredReply(): Promise<{ type: number; cookie: bigint; payload: Buffer }[]> {
    const chunks: { type: number; cookie: bigint; payload: Buffer }[] = [];
    for (;;) {
      const header = await this.read(20);
      if (header.readUInt32BE(0) !== NBD_STRUCTURED_REPLY_MAGIC) throw new Error("not a structured reply");
      const payload = await this.read(header.readUInt32BE(16));
      chunks.push({ type: header.readUInt16BE(6), cookie: header.readBigUInt64BE(8), payload });
      if ((header.readUInt16BE(4) & NBD_REPLY_FLAG_DONE) !== 0) return chunks;
    }
  }
}

export function optionBytes(code: number, data: Buffer = Buffer.alloc(0)): Buffer {
  const header = Buffer.alloc(16);
  header.writeBigUInt64BE(NBD_OPTION_MAGIC, 0);
  header.writeUInt32BE(code, 8);
  header.writeUInt32BE(data.length, 12);
  return Buffer.concat([header, data]);
}

export function stringBytes(text: string): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32BE(Buffer.byteLength(text));
  return Buffer.concat([length, Buffer.from(text)]);
}

export function goData(name: string, infoTypes: number[] = []): Buffer {
  return Buffer.concat([stringBytes(name), uint16s([infoTypes.length, ...infoTypes])]);
}

export function metaData(name: string, queries: string[]): Buffer {
  const count = Buffer.alloc(4);
  count.writeUInt32BE(queries.length);
  return Buffer.concat([stringBytes(name), count, ...queries.map(stringBytes)]);
}

function uint16s(values: number[]): Buffer {
  const bytes = Buffer.alloc(2 * values.length);
  values.forEach((value, i) => bytes.writeUInt16BE(value, 2 * i));
  return bytes;
}

export interface RequestFields {
  flags?: number;
  cookie?: bigint;
  offset?: number | bigint;
  length?: number;
  payload?: Buffer;
}

export function requestBytes(command: number, fields: RequestFields = {}): Buffer {
  const { flags = 0, cookie = 0n, offset = 0, payload } = fields;
  const header = Buffer.alloc(28);
  header.writeUInt32BE(NBD_REQUEST_MAGIC, 0);
  header.writeUInt16BE(flags, 4);
  header.writeUInt16BE(command, 6);
  header.writeBigUInt64BE(cookie, 8);
  header.writeBigUInt64BE(BigInt(offset), 16);
  header.writeUInt32BE(fields.length ?? payload?.length ?? 0, 24);
  return payload === undefined ? header : Buffer.concat([header, payload]);
}

/** A server with one export, "disk", on a Unix socket in a folder of its own. */
export class TestServer {
  readonly folder = mkdtempSync(join(tmpdir(), "cowcatcher-nbd-"));
  readonly socketPath = join(this.folder, "nbd.sock");
  readonly warnings: string[] = [];
  readonly server: NbdServer;
  private readonly listeners: NbdListener[] = [];
  private readonly clients: RawClient[] = [];

  constructor(exports: NbdExport[], maxConnections = 16, options: Partial<NbdServerOptions> = {}) {
    const ignore = (): void => undefined;
    const warn = (_fields: object, message: string): void => void this.warnings.push(message);
    const logger: NbdLogger = { debug: ignore, info: ignore, warn, error: warn };
    const byName = new Map(exports.map((nbdExport) => [nbdExport.name, nbdExport]));
    this.server = new NbdServer({ exports: byName, maxConnections, logger, ...options });
  }

  static async start(device: BlockDevice, fields: Partial<NbdExport> = {}, maxConnections?: number) {
    const nbdExport = {
      name: "disk",
      description: "",
      device,
      readOnly: false,
      canMultiConn: true,
      ...fields,
    };
    const started = new TestServer([nbdExport], maxConnections);
    await started.listen();
    return started;
  }

  async listen(): Promise<void> {
    const listener = await listenUnix(this.socketPath);
    this.listeners.push(listener);
    listener.serve(this.server);
  }

  /** Besides the Unix socket; clients of it come from whichever of the loopback addresses they are told. */
  async listenTcp(): Promise<{ from: (localAddress: string) => RawClient }> {
    const listener = await listenTcp("127.0.0.1", 0);
    this.listeners.push(listener);
    listener.serve(this.server);
    const port = Number(listener.address.split(":")[1]);
    return {
      from: (localAddress) => {
        const client = new RawClient({ port, localAddress });
        this.clients.push(client);
        return client;
      },
    };
  }

  get uri(): string {
    return `nbd+unix:///disk?socket=${this.socketPath}`;
  }

  /** Connected, before the greeting is read. */
  connect(): RawClient {
    const client = new RawClient(this.socketPath);
    this.clients.push(client);
    return client;
  }

  /** In the transmission phase. */
  async client(options: { structured?: boolean; contexts?: boolean } = {}): Promise<RawClient> {
    const client = this.connect();
    await client.read(18);
    client.send(Buffer.from([0, 0, 0, 3]));
    if (options.structured === true || options.contexts === true)
      await client.option(NBD_OPT_STRUCTURED_REPLY);
    if (options.contexts === true) {
      await client.option(NBD_OPT_SET_META_CONTEXT, metaData("disk", ["base:allocation"]));
    }
    const replies = await client.option(NBD_OPT_GO, goData("disk"));
    if (replies.at(-1)?.type !== NBD_REP_ACK) {
      client.destroy();
      throw new Error("GO was refused");
    }
    return client;
  }

  async stop(): Promise<void> {
    for (const client of this.clients) client.destroy();
    for (const listener of this.listeners) await listener.close();
    await this.server.close();
    rmSync(this.folder, { recursive: true, force: true });
  }
}

/** Waits for a condition that events bring about; fails after a minute. */
export async function until(condition: () => boolean): Promise<void> {
  const deadline = Date.now() + 60_000;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error("the condition did not come about");
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}
