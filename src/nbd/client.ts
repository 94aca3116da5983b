// An NBD client: one connection to one export, requests pipelined, replies in any order.
//
//   caller ──► waiting (FIFO, bounded) ──► in flight (a slot each, bounded in number and bytes) ──► settled
//
// A request's cookie is its slot and the slot's generation, so a reply that answers nothing, or answers twice, is
// noticed and ends the connection: after it no reply can be trusted. Requests that are made in one turn of the
// event loop leave in one write. A read's payload goes from the socket's chunk straight into the caller's buffer.
// The first failure of the connection is what every request in flight and every later one rejects with.
//
// No TLS, and simple replies only (client-handshake.ts). Main thread or worker; one event loop owns a client.
// Specification: doc/proto.md of NetworkBlockDevice/nbd, "Transmission".

import { connect, type Socket } from "node:net";
import { CowcatcherError, ioError } from "../errors.js";
import { MiB } from "../units.js";
import { negotiate, protocolError, type ExportInfo } from "./client-handshake.js";
import {
  NBD_CMD_DISC,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_EIO,
  NBD_EINVAL,
  NBD_ENOMEM,
  NBD_ENOSPC,
  NBD_ENOTSUP,
  NBD_EOVERFLOW,
  NBD_EPERM,
  NBD_ESHUTDOWN,
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
  NBD_REQUEST_MAGIC,
  NBD_SIMPLE_REPLY_MAGIC,
  REQUEST_HEADER_BYTES,
  SIMPLE_REPLY_BYTES,
  writeUint64,
} from "./protocol.js";
import { formatNbdUri, parseNbdUri, type NbdAddress } from "./uri.js";

export interface NbdClientOptions {
  /** Requests that the server may hold at a time; more wait in this client. */
  maxInFlight?: number;
  /** For the connection and the negotiation. */
  connectTimeoutMs?: number;
  /** Longest silence of the server while it owes replies. A live backup may hold a guest's write for 45 s. */
  replyTimeoutMs?: number;
}

const DEFAULT_OPTIONS = { maxInFlight: 64, connectTimeoutMs: 30_000, replyTimeoutMs: 120_000 };
const MAX_IN_FLIGHT_BOUND = 1024;
/** Payload of the requests in flight; one request of any size is always let through. */
const MAX_BYTES_IN_FLIGHT = 64 * MiB;
/** Requests that wait for a slot: a caller that has so many open has no bound of its own. */
const MAX_WAITING = 4096;
/** A 32-bit length, rounded down so that it stays aligned to any block size. */
const MAX_RANGE_BYTES = 2 ** 32 - 65_536;
const HANG_UP_TIMEOUT_MS = 5_000;

const ERRNO_OF_NBD: ReadonlyMap<number, string> = new Map([
  [NBD_EPERM, "EPERM"],
  [NBD_EIO, "EIO"],
  [NBD_ENOMEM, "ENOMEM"],
  [NBD_EINVAL, "EINVAL"],
  [NBD_ENOSPC, "ENOSPC"],
  [NBD_EOVERFLOW, "EOVERFLOW"],
  [NBD_ENOTSUP, "ENOTSUP"],
  [NBD_ESHUTDOWN, "ESHUTDOWN"],
]);

const COMMAND_NAMES: Readonly<Record<number, string>> = {
  [NBD_CMD_READ]: "read",
  [NBD_CMD_WRITE]: "write",
  [NBD_CMD_FLUSH]: "flush",
  [NBD_CMD_TRIM]: "trim",
  [NBD_CMD_WRITE_ZEROES]: "write zeroes",
};

interface Request {
  command: number;
  flags: number;
  offsetBytes: number;
  lengthBytes: number;
  /** A read's destination or a write's source: exactly lengthBytes. */
  data: Uint8Array | undefined;
  resolve: () => void;
  reject: (error: CowcatcherError) => void;
}

export class NbdClient {
  /** What errors call the export: its URI. */
  readonly name: string;
  readonly info: Readonly<ExportInfo>;
  readonly #socket: Socket;
  readonly #maxInFlight: number;
  readonly #slots: (Request | undefined)[];
  readonly #generations: Uint32Array;
  readonly #freeSlots: number[];
  readonly #waiting: Request[] = [];
  #bytesInFlight = 0;
  #failure: CowcatcherError | undefined;
  #isCorked = false;
  #whenIdle: (() => void) | undefined;

  readonly #replyHeader = Buffer.alloc(SIMPLE_REPLY_BYTES);
  #replyHeaderBytes = 0;
  /** The read whose payload is arriving, its slot, and how much of it is there. */
  #arriving: Request | undefined;
  #arrivingSlot = 0;
  #arrivedBytes = 0;

  private constructor(socket: Socket, name: string, info: ExportInfo, options: Required<NbdClientOptions>) {
    this.#socket = socket;
    this.name = name;
    this.info = info;
    this.#maxInFlight = Math.max(1, Math.min(options.maxInFlight, MAX_IN_FLIGHT_BOUND));
    this.#slots = new Array<Request | undefined>(this.#maxInFlight).fill(undefined);
    this.#generations = new Uint32Array(this.#maxInFlight);
    this.#freeSlots = Array.from({ length: this.#maxInFlight }, (_, i) => i);
    socket.on("data", (chunk: Buffer) => this.#receive(chunk));
    socket.on("error", (cause) => this.#fail(ioError("talk to the server", name, cause)));
    socket.on("close", () => this.#fail(connectionError(name, "the server hung up", "ECONNRESET")));
    socket.setTimeout(options.replyTimeoutMs, () => {
      if (this.inFlight === 0) return;
      const seconds = options.replyTimeoutMs / 1000;
      this.#fail(connectionError(name, `no reply from the server within ${seconds} s`, "ETIMEDOUT"));
    });
  }

  /**
   * Connects, negotiates and enters the export.
   * @throws CowcatcherError USAGE or UNSUPPORTED for the URI; NOT_FOUND for no such socket or export; PROTOCOL;
   *   IO for anything else, with errno where the system gave one (ETIMEDOUT after connectTimeoutMs).
   */
  static async connect(server: string | NbdAddress, options: NbdClientOptions = {}): Promise<NbdClient> {
    const address = typeof server === "string" ? parseNbdUri(server) : server;
    const name = typeof server === "string" ? server : formatNbdUri(address);
    const settings = { ...DEFAULT_OPTIONS, ...options };
    const socket = connect("path" in address ? { path: address.path } : { ...address, noDelay: true });
    let isTimedOut = false;
    const timer = setTimeout(() => {
      isTimedOut = true;
      socket.destroy();
    }, settings.connectTimeoutMs);
    try {
      await connected(socket, name);
      return new NbdClient(socket, name, await negotiate(socket, name, address.exportName), settings);
    } catch (error) {
      socket.destroy();
      if (!isTimedOut) throw error;
      throw connectionError(name, `no connection within ${settings.connectTimeoutMs / 1000} s`, "ETIMEDOUT");
    } finally {
      clearTimeout(timer);
    }
  }

  get sizeBytes(): number {
    return this.info.sizeBytes;
  }

  get readOnly(): boolean {
    return this.#has(NBD_FLAG_READ_ONLY);
  }

  get canTrim(): boolean {
    return this.#has(NBD_FLAG_SEND_TRIM);
  }

  get canWriteZeroes(): boolean {
    return this.#has(NBD_FLAG_SEND_WRITE_ZEROES);
  }

  get canMultiConn(): boolean {
    return this.#has(NBD_FLAG_CAN_MULTI_CONN);
  }

  /** Requests that the server has not answered. */
  get inFlight(): number {
    return this.#maxInFlight - this.#freeSlots.length;
  }

  /**
   * Fills buffer[bufferOffset, +lengthBytes) from the export; lengthBytes at most info.maximumPayloadBytes.
   * This and the other requests reject with CowcatcherError: IO or NO_SPACE with `errno` for the server's own
   * errors, for a range outside the export (EINVAL) and for a lost connection; PROTOCOL if the server broke the
   * rules; LIMIT for a bound of this client.
   */
  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Promise<void> {
    const data = buffer.subarray(bufferOffset, bufferOffset + lengthBytes);
    return this.#request(NBD_CMD_READ, 0, offsetBytes, lengthBytes, data);
  }

  /** Writes buffer[bufferOffset, +lengthBytes), which must stay unchanged until the promise settles. */
  async write(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
    { fua = false } = {},
  ): Promise<void> {
    const data = buffer.subarray(bufferOffset, bufferOffset + lengthBytes);
    const flags = fua && this.#has(NBD_FLAG_SEND_FUA) ? NBD_CMD_FLAG_FUA : 0;
    await this.#request(NBD_CMD_WRITE, flags, offsetBytes, lengthBytes, data);
    if (fua && flags === 0) await this.flush();
  }

  /** Rejects with UNSUPPORTED where the server cannot (`canWriteZeroes`). At most 4 GiB - 64 KiB at a time. */
  async writeZeroes(
    offsetBytes: number,
    lengthBytes: number,
    { mayUnmap = true, fua = false } = {},
  ): Promise<void> {
    if (!this.canWriteZeroes) {
      const problem = "the server cannot write zeroes";
      throw new CowcatcherError({ code: "UNSUPPORTED", object: this.name, problem });
    }
    const fuaFlag = fua && this.#has(NBD_FLAG_SEND_FUA) ? NBD_CMD_FLAG_FUA : 0;
    const flags = fuaFlag | (mayUnmap ? 0 : NBD_CMD_FLAG_NO_HOLE);
    await this.#request(NBD_CMD_WRITE_ZEROES, flags, offsetBytes, lengthBytes, undefined);
    if (fua && fuaFlag === 0) await this.flush();
  }

  /** Advice: where the server does not take it, nothing happens. At most 4 GiB - 64 KiB at a time. */
  trim(offsetBytes: number, lengthBytes: number): Promise<void> {
    if (!this.canTrim) return Promise.resolve();
    return this.#request(NBD_CMD_TRIM, 0, offsetBytes, lengthBytes, undefined);
  }

  /** When it resolves, every write that had completed before the call is on stable storage. */
  flush(): Promise<void> {
    // A server without flush has no cache that could be lost.
    if (!this.#has(NBD_FLAG_SEND_FLUSH)) return Promise.resolve();
    return this.#request(NBD_CMD_FLUSH, 0, 0, 0, undefined);
  }

  /** Waits for the requests at hand, says goodbye and hangs up. No request may follow. Never rejects. */
  async disconnect(): Promise<void> {
    if (this.#failure === undefined && (this.inFlight > 0 || this.#waiting.length > 0)) {
      await new Promise<void>((resolve) => {
        this.#whenIdle = resolve;
      });
    }
    if (this.#failure !== undefined) return;
    this.#failure = connectionError(this.name, "the connection is closed", "ENOTCONN");
    this.#send(NBD_CMD_DISC, 0, 0, 0, 0, 0);
    this.#socket.end();
    const timer = setTimeout(() => this.#socket.destroy(), HANG_UP_TIMEOUT_MS);
    if (!this.#socket.closed) await new Promise((resolve) => this.#socket.once("close", resolve));
    clearTimeout(timer);
  }

  /** Hangs up at once; what is in flight rejects. */
  destroy(): void {
    this.#fail(connectionError(this.name, "the connection is closed", "ENOTCONN"));
  }

  #has(flag: number): boolean {
    return (this.info.transmissionFlags & flag) !== 0;
  }

  #request(
    command: number,
    flags: number,
    offsetBytes: number,
    lengthBytes: number,
    data: Uint8Array | undefined,
  ): Promise<void> {
    const wrong = this.#failure ?? this.#refusalOf(command, offsetBytes, lengthBytes, data);
    if (wrong !== undefined) return Promise.reject(wrong);
    if (lengthBytes === 0 && command !== NBD_CMD_FLUSH) return Promise.resolve();
    return new Promise((resolve, reject) => {
      this.#waiting.push({ command, flags, offsetBytes, lengthBytes, data, resolve, reject });
      this.#start();
    });
  }

  /** Why a request cannot be sent, if it cannot. */
  #refusalOf(
    command: number,
    offsetBytes: number,
    lengthBytes: number,
    data: Uint8Array | undefined,
  ): CowcatcherError | undefined {
    const { minimumBlockBytes, maximumPayloadBytes, sizeBytes } = this.info;
    const refuse = (code: "IO" | "LIMIT", problem: string, errno?: string): CowcatcherError =>
      new CowcatcherError({ code, object: this.name, problem, offsetBytes, errno });
    const what = `cannot ${COMMAND_NAMES[command]} ${lengthBytes} bytes`;
    if (this.#waiting.length >= MAX_WAITING) return refuse("LIMIT", `more than ${MAX_WAITING} requests wait`);
    if (command === NBD_CMD_FLUSH) return undefined;
    if (command !== NBD_CMD_READ && this.readOnly) return refuse("IO", "the export is read-only", "EPERM");
    const isWithin = offsetBytes >= 0 && lengthBytes >= 0 && offsetBytes + lengthBytes <= sizeBytes;
    if (!isWithin || !Number.isSafeInteger(offsetBytes) || !Number.isSafeInteger(lengthBytes)) {
      return refuse("IO", `${what}: outside the export's ${sizeBytes} bytes`, "EINVAL");
    }
    if (data !== undefined && data.length !== lengthBytes) {
      return refuse("IO", `${what}: the buffer holds ${data.length}`, "EINVAL");
    }
    if (offsetBytes % minimumBlockBytes !== 0 || lengthBytes % minimumBlockBytes !== 0) {
      return refuse("IO", `${what}: not aligned to the server's ${minimumBlockBytes} bytes`, "EINVAL");
    }
    const limit = data === undefined ? MAX_RANGE_BYTES : maximumPayloadBytes;
    return lengthBytes > limit
      ? refuse("LIMIT", `${what}: the limit is ${limit} bytes a request`)
      : undefined;
  }

  /** Sends what waits, as far as the bounds allow. */
  #start(): void {
    for (;;) {
      const request = this.#waiting[0];
      if (request === undefined) return;
      const payloadBytes = request.data?.length ?? 0;
      if (this.#bytesInFlight > 0 && this.#bytesInFlight + payloadBytes > MAX_BYTES_IN_FLIGHT) return;
      const slot = this.#freeSlots.pop();
      if (slot === undefined) return;
      this.#waiting.shift();
      this.#slots[slot] = request;
      this.#bytesInFlight += payloadBytes;
      const generation = ((this.#generations[slot] ?? 0) + 1) >>> 0;
      this.#generations[slot] = generation;
      const { command, flags, offsetBytes, lengthBytes, data } = request;
      this.#send(command, flags, slot, generation, offsetBytes, lengthBytes);
      if (command === NBD_CMD_WRITE && data !== undefined) this.#socket.write(data);
    }
  }

  #send(
    command: number,
    flags: number,
    slot: number,
    generation: number,
    offsetBytes: number,
    lengthBytes: number,
  ): void {
    const header = Buffer.allocUnsafe(REQUEST_HEADER_BYTES);
    const view = new DataView(header.buffer, header.byteOffset, REQUEST_HEADER_BYTES);
    view.setUint32(0, NBD_REQUEST_MAGIC);
    view.setUint16(4, flags);
    view.setUint16(6, command);
    view.setUint32(8, generation);
    view.setUint32(12, slot);
    writeUint64(view, 16, offsetBytes);
    view.setUint32(24, lengthBytes);
    if (!this.#isCorked) {
      this.#isCorked = true;
      this.#socket.cork();
      process.nextTick(() => {
        this.#isCorked = false;
        this.#socket.uncork();
      });
    }
    this.#socket.write(header);
  }

  #receive(chunk: Buffer): void {
    let at = 0;
    while (at < chunk.length && this.#failure === undefined) {
      at += this.#arriving === undefined ? this.#takeHeader(chunk, at) : this.#takePayload(chunk, at);
    }
  }

  #takeHeader(chunk: Buffer, at: number): number {
    const takenBytes = chunk.copy(this.#replyHeader, this.#replyHeaderBytes, at);
    this.#replyHeaderBytes += takenBytes;
    if (this.#replyHeaderBytes < SIMPLE_REPLY_BYTES) return takenBytes;
    this.#replyHeaderBytes = 0;
    const header = this.#replyHeader;
    const slot = header.readUInt32BE(12);
    const request = this.#slots[slot];
    if (header.readUInt32BE(0) !== NBD_SIMPLE_REPLY_MAGIC) {
      this.#fail(protocolError(this.name, "the server sent what is not a simple reply"));
    } else if (request === undefined || this.#generations[slot] !== header.readUInt32BE(8)) {
      this.#fail(protocolError(this.name, "the server answered a request that was not made"));
    } else {
      const nbdError = header.readUInt32BE(4);
      if (nbdError === 0 && request.command === NBD_CMD_READ) {
        this.#arriving = request;
        this.#arrivingSlot = slot;
        this.#arrivedBytes = 0;
      } else {
        this.#settle(slot, request, nbdError);
      }
    }
    return takenBytes;
  }

  #takePayload(chunk: Buffer, at: number): number {
    const request = this.#arriving;
    if (request?.data === undefined) return 0;
    const takenBytes = Math.min(chunk.length - at, request.lengthBytes - this.#arrivedBytes);
    request.data.set(chunk.subarray(at, at + takenBytes), this.#arrivedBytes);
    this.#arrivedBytes += takenBytes;
    if (this.#arrivedBytes === request.lengthBytes) {
      this.#arriving = undefined;
      this.#settle(this.#arrivingSlot, request, 0);
    }
    return takenBytes;
  }

  #settle(slot: number, request: Request, nbdError: number): void {
    this.#slots[slot] = undefined;
    this.#freeSlots.push(slot);
    this.#bytesInFlight -= request.data?.length ?? 0;
    if (nbdError === 0) {
      request.resolve();
    } else {
      // A value that the protocol does not list says no more than that the request was refused.
      const errno = ERRNO_OF_NBD.get(nbdError) ?? "EINVAL";
      const action = COMMAND_NAMES[request.command] ?? "finish a request";
      const offset = request.command === NBD_CMD_FLUSH ? undefined : request.offsetBytes;
      request.reject(ioError(action, this.name, { code: errno }, offset));
    }
    this.#start();
    if (this.inFlight === 0 && this.#waiting.length === 0) this.#whenIdle?.();
  }

  #fail(error: CowcatcherError): void {
    if (this.#failure !== undefined) return;
    this.#failure = error;
    this.#socket.destroy();
    const open = [...this.#slots, ...this.#waiting.splice(0)];
    this.#slots.fill(undefined);
    for (const request of open) request?.reject(error);
    this.#whenIdle?.();
  }
}

function connected(socket: Socket, name: string): Promise<void> {
  return new Promise((resolve, reject) => {
    socket.once("connect", resolve);
    socket.once("close", () => reject(connectionError(name, "cannot connect", "ECONNRESET")));
    // Stays for good, so that an error in the middle of the negotiation finds a listener in any case.
    socket.on("error", (cause) => reject(ioError("connect", name, cause)));
  });
}

function connectionError(object: string, problem: string, errno: string): CowcatcherError {
  return new CowcatcherError({ code: "IO", object, problem, errno });
}
