// An NBD server that does what a test tells it to: the other side of client tests and of the client's fuzzer.
//
// It holds a disk in memory and answers as the protocol has it. A test may have a say in two places: `onRequest`
// decides what becomes of a request (an answer, an error, silence, the end), and `send` sees every message before it
// leaves, in its parts, and may spoil it. One connection's messages leave in the order in which they were made.

import { mkdtempSync, rmSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { TLSSocket, type TLSSocketOptions } from "node:tls";
import * as nbd from "../../src/nbd/wire/protocol.js";

export interface ScriptRequest {
  /** Of connections, from 0 on. */
  connection: number;
  command: number;
  flags: number;
  cookie: bigint;
  offset: number;
  length: number;
}

/** An error value goes to the client as such. */
export type Verdict = "answer" | "silence" | "hang up" | number;

/** What a message is, for who spoils it. */
export interface MessageKind {
  phase: "greeting" | "option" | "reply";
  /** Of the transmission: what is answered. */
  request?: ScriptRequest;
}

export interface ScriptOptions {
  data: Buffer;
  /** What the export claims to have; else data.length. */
  sizeBytes?: bigint;
  /** NBD_FLAG_… beside HAS_FLAGS. */
  flags?: number;
  /** Minimum, preferred, maximum. */
  blockSizes?: [number, number, number] | undefined;
  structured?: boolean;
  /** Metadata contexts, with the ids 1, 2, … */
  contexts?: readonly string[];
  tls?: TLSSocketOptions;
  onRequest?: (request: ScriptRequest) => Verdict | Promise<Verdict>;
  /** The parts of an answer to a request; undefined: an honest one in one piece. */
  answer?: (request: ScriptRequest, isStructured: boolean) => Buffer[] | undefined;
  /** Takes the messages on their way out. */
  send?: (messages: Buffer[], kind: MessageKind, socket: Socket) => void;
}

export const ALL_FLAGS =
  nbd.NBD_FLAG_SEND_FLUSH |
  nbd.NBD_FLAG_SEND_FUA |
  nbd.NBD_FLAG_SEND_TRIM |
  nbd.NBD_FLAG_SEND_WRITE_ZEROES |
  nbd.NBD_FLAG_CAN_MULTI_CONN;

const DEFAULTS = { flags: ALL_FLAGS, structured: false, contexts: [] as readonly string[] };

export class ScriptedServer {
  readonly folder = mkdtempSync(join(tmpdir(), "cowcatcher-script-"));
  readonly socketPath = join(this.folder, "nbd.sock");
  readonly requests: ScriptRequest[] = [];
  readonly sockets = new Set<Socket>();
  connectionCount = 0;
  /** May be changed between connections. */
  options: ScriptOptions & typeof DEFAULTS;
  private readonly server: Server;

  constructor(options: ScriptOptions) {
    this.options = { ...DEFAULTS, ...options };
    this.server = createServer((socket) => {
      new Connection(this, socket, this.connectionCount++).begin();
    });
  }

  static async start(options: ScriptOptions): Promise<ScriptedServer> {
    const started = new ScriptedServer(options);
    await new Promise<void>((resolve) => started.server.listen(started.socketPath, resolve));
    return started;
  }

  get uri(): string {
    return `nbd+unix:///disk?socket=${this.socketPath}`;
  }

  /** The number of requests of this kind so far. */
  count(command: number): number {
    return this.requests.filter((request) => request.command === command).length;
  }

  hangUp(): void {
    for (const socket of this.sockets) socket.destroy();
  }

  async stop(): Promise<void> {
    this.hangUp();
    await new Promise((resolve) => this.server.close(resolve));
    rmSync(this.folder, { recursive: true, force: true });
  }
}

class Connection {
  private bytes: Buffer = Buffer.alloc(0);
  private isTransmitting = false;
  private isStructured = false;
  private hasFlags = false;

  constructor(
    private readonly script: ScriptedServer,
    private socket: Socket,
    private readonly index: number,
  ) {}

  begin(): void {
    this.adopt(this.socket);
    const greeting = Buffer.alloc(18);
    greeting.writeBigUInt64BE(nbd.NBD_INIT_MAGIC, 0);
    greeting.writeBigUInt64BE(nbd.NBD_OPTION_MAGIC, 8);
    greeting.writeUInt16BE(nbd.NBD_FLAG_FIXED_NEWSTYLE | nbd.NBD_FLAG_NO_ZEROES, 16);
    this.send([greeting], { phase: "greeting" });
  }

  private adopt(socket: Socket): void {
    const { sockets } = this.script;
    this.socket = socket;
    sockets.add(socket);
    socket.on("error", () => undefined);
    socket.on("close", () => sockets.delete(socket));
    socket.on("data", (chunk: Buffer) => {
      this.bytes = Buffer.concat([this.bytes, chunk]);
      while (this.step());
    });
  }

  private send(messages: Buffer[], kind: MessageKind): void {
    const { socket } = this;
    if (socket.destroyed || messages.length === 0) return;
    if (this.script.options.send !== undefined) this.script.options.send(messages, kind, socket);
    else socket.write(Buffer.concat(messages));
  }

  private take(count: number): Buffer {
    const taken = this.bytes.subarray(0, count);
    this.bytes = this.bytes.subarray(count);
    return taken;
  }

  /** False: more must come first. */
  private step(): boolean {
    if (this.isTransmitting) return this.takeRequest();
    if (!this.hasFlags) {
      if (this.bytes.length < 4) return false;
      this.take(4);
      this.hasFlags = true;
      return true;
    }
    if (this.bytes.length < 16) return false;
    const lengthBytes = this.bytes.readUInt32BE(12);
    if (this.bytes.length < 16 + lengthBytes) return false;
    const message = this.take(16 + lengthBytes);
    this.answerOption(message.readUInt32BE(8), message.subarray(16));
    return true;
  }

  private answerOption(option: number, data: Buffer): void {
    const { options } = this.script;
    const reply = (type: number, payload?: Buffer): Buffer => optionReply(option, type, payload);
    const ack = reply(nbd.NBD_REP_ACK);
    const send = (...messages: Buffer[]): void => this.send(messages, { phase: "option" });
    if (option === nbd.NBD_OPT_STARTTLS && options.tls !== undefined) {
      send(ack);
      this.socket.removeAllListeners("data");
      this.hasFlags = true;
      this.adopt(new TLSSocket(this.socket, { isServer: true, ...options.tls }));
    } else if (option === nbd.NBD_OPT_STRUCTURED_REPLY && options.structured) {
      this.isStructured = true;
      send(ack);
    } else if (option === nbd.NBD_OPT_SET_META_CONTEXT && this.isStructured) {
      send(...this.contextReplies(option, data), ack);
    } else if (option === nbd.NBD_OPT_GO) {
      send(...this.exportInfo().map((info) => reply(nbd.NBD_REP_INFO, info)), ack);
      this.isTransmitting = true;
    } else {
      send(reply(nbd.NBD_REP_ERR_UNSUP));
    }
  }

  private contextReplies(option: number, data: Buffer): Buffer[] {
    return this.script.options.contexts.flatMap((name, i) => {
      if (!data.includes(name)) return [];
      const payload = Buffer.concat([uint32(i + 1), Buffer.from(name)]);
      return [optionReply(option, nbd.NBD_REP_META_CONTEXT, payload)];
    });
  }

  private exportInfo(): Buffer[] {
    const { data, sizeBytes = BigInt(data.length), flags, blockSizes } = this.script.options;
    const info = Buffer.alloc(12);
    info.writeUInt16BE(nbd.NBD_INFO_EXPORT, 0);
    info.writeBigUInt64BE(sizeBytes, 2);
    info.writeUInt16BE(nbd.NBD_FLAG_HAS_FLAGS | flags, 10);
    if (blockSizes === undefined) return [info];
    const sizes = Buffer.alloc(14);
    sizes.writeUInt16BE(nbd.NBD_INFO_BLOCK_SIZE, 0);
    blockSizes.forEach((bytes, i) => sizes.writeUInt32BE(bytes, 2 + 4 * i));
    return [info, sizes];
  }

  private takeRequest(): boolean {
    if (this.bytes.length < nbd.REQUEST_HEADER_BYTES) return false;
    const command = this.bytes.readUInt16BE(6);
    const length = this.bytes.readUInt32BE(24);
    const payloadBytes = command === nbd.NBD_CMD_WRITE ? length : 0;
    if (this.bytes.length < nbd.REQUEST_HEADER_BYTES + payloadBytes) return false;
    const header = this.take(nbd.REQUEST_HEADER_BYTES);
    const payload = Buffer.from(this.take(payloadBytes));
    const request: ScriptRequest = {
      connection: this.index,
      command,
      flags: header.readUInt16BE(4),
      cookie: header.readBigUInt64BE(8),
      offset: Number(header.readBigUInt64BE(16)),
      length,
    };
    this.script.requests.push(request);
    if (command === nbd.NBD_CMD_DISC) this.socket.end();
    else this.handle(request, payload);
    return true;
  }

  private handle(request: ScriptRequest, payload: Buffer): void {
    const verdict = this.script.options.onRequest?.(request) ?? "answer";
    if (verdict instanceof Promise) void verdict.then((decided) => this.carryOut(decided, request, payload));
    else this.carryOut(verdict, request, payload);
  }

  private carryOut(verdict: Verdict, request: ScriptRequest, payload: Buffer): void {
    const { options } = this.script;
    if (verdict === "silence") return;
    if (verdict === "hang up") {
      this.socket.destroy();
      return;
    }
    const messages =
      typeof verdict === "number"
        ? [this.isStructured ? errorChunk(request, verdict) : simpleReply(request, verdict)]
        : (options.answer?.(request, this.isStructured) ?? this.honest(request, payload));
    this.send(messages, { phase: "reply", request });
  }

  private honest(request: ScriptRequest, payload: Buffer): Buffer[] {
    const { data } = this.script.options;
    const { command, offset, length } = request;
    if (command === nbd.NBD_CMD_WRITE) payload.copy(data, offset);
    if (command === nbd.NBD_CMD_WRITE_ZEROES) data.fill(0, offset, offset + length);
    if (command === nbd.NBD_CMD_READ) {
      const read = Buffer.from(data.subarray(offset, offset + length));
      return this.isStructured ? [dataChunk(request, offset, read, true)] : [simpleReply(request, 0), read];
    }
    if (command === nbd.NBD_CMD_BLOCK_STATUS) return [statusChunk(request, 1, [[length, 0]], true)];
    return [simpleReply(request, 0)];
  }
}

export function optionReply(option: number, type: number, data: Buffer = Buffer.alloc(0)): Buffer {
  const header = Buffer.alloc(20);
  header.writeBigUInt64BE(nbd.NBD_OPTION_REPLY_MAGIC, 0);
  header.writeUInt32BE(option, 8);
  header.writeUInt32BE(type, 12);
  header.writeUInt32BE(data.length, 16);
  return Buffer.concat([header, data]);
}

export function simpleReply({ cookie }: { cookie: bigint }, error: number): Buffer {
  const reply = Buffer.alloc(16);
  reply.writeUInt32BE(nbd.NBD_SIMPLE_REPLY_MAGIC, 0);
  reply.writeUInt32BE(error, 4);
  reply.writeBigUInt64BE(cookie, 8);
  return reply;
}

export function chunk(
  { cookie }: { cookie: bigint },
  type: number,
  payload: Buffer,
  isLast: boolean,
): Buffer {
  const header = Buffer.alloc(20);
  header.writeUInt32BE(nbd.NBD_STRUCTURED_REPLY_MAGIC, 0);
  header.writeUInt16BE(isLast ? nbd.NBD_REPLY_FLAG_DONE : 0, 4);
  header.writeUInt16BE(type, 6);
  header.writeBigUInt64BE(cookie, 8);
  header.writeUInt32BE(payload.length, 16);
  return Buffer.concat([header, payload]);
}

export function dataChunk(
  request: { cookie: bigint },
  offset: number,
  data: Buffer,
  isLast: boolean,
): Buffer {
  return chunk(request, nbd.NBD_REPLY_TYPE_OFFSET_DATA, Buffer.concat([uint64(offset), data]), isLast);
}

export function holeChunk(
  request: { cookie: bigint },
  offset: number,
  length: number,
  isLast: boolean,
): Buffer {
  const payload = Buffer.concat([uint64(offset), uint32(length)]);
  return chunk(request, nbd.NBD_REPLY_TYPE_OFFSET_HOLE, payload, isLast);
}

export function errorChunk(
  request: { cookie: bigint },
  error: number,
  { text, offset, isLast = true }: { text?: Buffer; offset?: number | undefined; isLast?: boolean } = {},
): Buffer {
  const head = Buffer.alloc(6);
  head.writeUInt32BE(error, 0);
  head.writeUInt16BE(text?.length ?? 0, 4);
  const type = offset === undefined ? nbd.NBD_REPLY_TYPE_ERROR : nbd.NBD_REPLY_TYPE_ERROR_OFFSET;
  const tail = offset === undefined ? [] : [uint64(offset)];
  return chunk(request, type, Buffer.concat([head, ...(text === undefined ? [] : [text]), ...tail]), isLast);
}

export function statusChunk(
  request: { cookie: bigint },
  id: number,
  extents: readonly (readonly [length: number, flags: number])[],
  isLast: boolean,
): Buffer {
  const payload = Buffer.alloc(4 + 8 * extents.length);
  payload.writeUInt32BE(id, 0);
  for (const [i, [length, flags]] of extents.entries()) {
    payload.writeUInt32BE(length, 4 + 8 * i);
    payload.writeUInt32BE(flags, 8 + 8 * i);
  }
  return chunk(request, nbd.NBD_REPLY_TYPE_BLOCK_STATUS, payload, isLast);
}

export function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

export function uint64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value));
  return bytes;
}
