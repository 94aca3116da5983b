// An NBD client: one connection to one export, requests pipelined, replies in any order.
//
//   caller ──► waiting (FIFO, bounded) ──► in flight (a slot each, bounded in number and bytes) ──► settled
//
// A request's cookie is its slot and the slot's generation, so a reply that answers nothing, or answers twice, is
// noticed and ends the connection: after it no reply can be trusted. Requests that are made in one turn of the
// event loop leave in one write. A read's payload goes from the kernel straight into the caller's buffer
// (client/replies.ts). The first failure of the connection is what every request in flight and every later one
// rejects with. No wait is without an end: the negotiation as a whole and each request have a time limit, so that
// neither silence nor a trickle of bytes holds a caller.
//
// Main thread or worker; one event loop owns a client. Who wants a lost connection made again uses client/session.ts.
// Specification: doc/proto.md of NetworkBlockDevice/nbd, "Transmission".

import { connect, type Socket } from "node:net";
import { CowcatcherError, ioError } from "../../errors.js";
import { libc } from "../../native/libc.js";
import { MiB } from "../../units.js";
import { negotiate, protocolError, type ExportInfo, type Negotiated } from "./handshake.js";
import { ReplyReader, type ReplySink } from "./replies.js";
import { commandName, connectionError, replyError, type Extents, type Request } from "./request.js";
import { readDirectly } from "../wire/direct-socket.js";
import {
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_FAST_ZERO,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_FAST_ZERO,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
  NBD_REQUEST_MAGIC,
  REQUEST_HEADER_BYTES,
  writeUint64,
} from "../wire/protocol.js";
import { formatNbdUri, parseNbdUri, type NbdAddress } from "../wire/uri.js";

export interface NbdClientOptions {
  /** Requests that the server may hold at a time; more wait in this client. */
  maxInFlight?: number;
  /** For the connection and the negotiation. */
  connectTimeoutMs?: number;
  /** Longest time between a request and its answer. A live backup may hold a guest's write for 45 s. */
  replyTimeoutMs?: number;
  /** Structured replies where the server has them; true by default. */
  structured?: boolean;
  /** Metadata contexts to ask for. */
  contexts?: readonly string[];
  /** Asked a few times a second while an answer is awaited: true ends the connection with CANCELLED. */
  isCancelled?: () => boolean;
  /**
   * Cancelled, it makes no more requests but stays connected until `destroy` or the thread's end, and a negotiation is seen to its
   * end: for a server that does not bear a client that hangs up first.
   */
  staysOpen?: boolean;
}

const DEFAULT_OPTIONS = {
  maxInFlight: 64,
  connectTimeoutMs: 30_000,
  replyTimeoutMs: 120_000,
  structured: true,
  contexts: [],
  isCancelled: () => false,
  staysOpen: false,
};
const MAX_IN_FLIGHT_BOUND = 1024;
/** Payload of the requests in flight; one request of any size is always let through. */
const MAX_BYTES_IN_FLIGHT = 64 * MiB;
/** Requests that wait for a slot: a caller that has so many open has no bound of its own. */
const MAX_WAITING = 4096;
/** A 32-bit length, rounded down so that it stays aligned to any block size. */
export const MAX_RANGE_BYTES = 2 ** 32 - 65_536;
const HANG_UP_TIMEOUT_MS = 5_000;
/** How often the age of the requests in flight is looked at. */
const WATCH_MS = 100;

/**
 * One connection to an NBD export, many requests in flight. One thread, that with the event loop it was
 * made in; rejects with CowcatcherError. Follows doc/proto.md.
 */
export class NbdClient {
  /** What errors call the export: its URI. */
  readonly name: string;
  readonly info: Readonly<ExportInfo>;
  /** Metadata contexts that `blockStatus` may be asked for. */
  readonly contexts: ReadonlySet<string>;
  readonly #socket: Socket;
  readonly #maxInFlight: number;
  readonly #slots: (Request | undefined)[];
  readonly #generations: Uint32Array;
  readonly #freeSlots: number[];
  readonly #waiting: Request[] = [];
  readonly #options: Required<NbdClientOptions>;
  #bytesInFlight = 0;
  #failure: CowcatcherError | undefined;
  #isCorked = false;
  #whenIdle: (() => void) | undefined;
  #watch: NodeJS.Timeout | undefined;

  private constructor(negotiated: Negotiated, name: string, options: Required<NbdClientOptions>) {
    const { info, structured, contexts } = negotiated;
    this.name = name;
    this.info = info;
    this.contexts = new Set(contexts.values());
    this.#options = options;
    this.#maxInFlight = Math.max(1, Math.min(options.maxInFlight, MAX_IN_FLIGHT_BOUND));
    this.#slots = new Array<Request | undefined>(this.#maxInFlight).fill(undefined);
    this.#generations = new Uint32Array(this.#maxInFlight);
    this.#freeSlots = Array.from({ length: this.#maxInFlight }, (_, i) => i);
    const sink: ReplySink = {
      structured,
      contexts,
      find: (generation, slot) => (this.#generations[slot] === generation ? this.#slots[slot] : undefined),
      settle: (slot, request, nbdError) => this.#settle(slot, request, nbdError),
      broken: (problem) => this.#fail(protocolError(name, problem)),
    };
    const socket = readDirectly(negotiated.socket, new ReplyReader(sink));
    this.#socket = socket;
    socket.on("error", (cause) => this.#fail(ioError("talk to the server", name, cause)));
    socket.on("end", () => this.#fail(connectionError(name, "the server hung up", "ECONNRESET")));
    socket.on("close", () => this.#fail(connectionError(name, "the server hung up", "ECONNRESET")));
    socket.resume();
  }

  /**
   * Connects, negotiates and enters the export.
   * @throws CowcatcherError USAGE or UNSUPPORTED for the URI; NOT_FOUND for no such socket or export; PROTOCOL;
   *   CANCELLED; IO for anything else, with errno where the system gave one (ETIMEDOUT after connectTimeoutMs).
   */
  static async connect(server: string | NbdAddress, options: NbdClientOptions = {}): Promise<NbdClient> {
    const address = typeof server === "string" ? parseNbdUri(server) : server;
    const name = typeof server === "string" ? server : formatNbdUri(address);
    const settings = { ...DEFAULT_OPTIONS, ...options };
    return new NbdClient(await openConnection(address, name, settings), name, settings);
  }

  /** Why no request can be made any more, if none can. */
  get failure(): CowcatcherError | undefined {
    return this.#failure;
  }

  /** The process that serves it, on this machine; undefined: it cannot be seen from here. */
  get serverProcess(): number | undefined {
    // Not documented; where it does not look like this nobody is seen.
    const fd = (this.#socket as Socket & { _handle?: { fd?: number } | null })._handle?.fd;
    if (libc === null || fd === undefined || fd < 0) return undefined;
    const found = libc.peerProcess(fd);
    return found > 0 ? found : undefined;
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

  get canZeroFast(): boolean {
    return this.#has(NBD_FLAG_SEND_FAST_ZERO);
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

  /**
   * Rejects with UNSUPPORTED where the server cannot (`canWriteZeroes`). At most 4 GiB - 64 KiB at a time.
   * `fast` (only where `canZeroFast`): rejects with errno ENOTSUP where it would take as long as writing the zeroes.
   */
  async writeZeroes(
    offsetBytes: number,
    lengthBytes: number,
    { mayUnmap = true, fua = false, fast = false } = {},
  ): Promise<void> {
    if (!this.canWriteZeroes) {
      const problem = "the server cannot write zeroes";
      throw new CowcatcherError({ code: "UNSUPPORTED", object: this.name, problem });
    }
    const fuaFlag = fua && this.#has(NBD_FLAG_SEND_FUA) ? NBD_CMD_FLAG_FUA : 0;
    const fastFlag = fast && this.canZeroFast ? NBD_CMD_FLAG_FAST_ZERO : 0;
    const flags = fuaFlag | fastFlag | (mayUnmap ? 0 : NBD_CMD_FLAG_NO_HOLE);
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

  /**
   * What the server says of [offsetBytes, +lengthBytes) in a metadata context: at least one extent; the last may
   * reach over the end, and together they may end before it. At most 4 GiB - 64 KiB at a time.
   * Rejects with UNSUPPORTED unless `contexts` has it.
   */
  async blockStatus(context: string, offsetBytes: number, lengthBytes: number): Promise<Extents> {
    if (!this.contexts.has(context)) {
      const problem = `the server does not have the metadata context '${context}' for this export`;
      throw new CowcatcherError({ code: "UNSUPPORTED", object: this.name, problem });
    }
    const made: { request?: Request } = {};
    await this.#request(NBD_CMD_BLOCK_STATUS, 0, offsetBytes, lengthBytes, undefined, made);
    const extents = made.request?.extents?.get(context);
    if (extents === undefined)
      throw protocolError(this.name, `no block status of '${context}' in the answer`);
    return extents;
  }

  /** Waits for the requests at hand, says goodbye and hangs up. No request may follow. Never rejects. */
  async disconnect(): Promise<void> {
    if (this.#failure === undefined && (this.inFlight > 0 || this.#waiting.length > 0)) {
      await new Promise<void>((resolve) => {
        this.#whenIdle = resolve;
      });
    }
    if (this.#failure !== undefined) return;
    clearInterval(this.#watch);
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
    this.#socket.destroy();
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
    made: { request?: Request } = {},
  ): Promise<void> {
    const wrong = this.#failure ?? this.#refusalOf(command, offsetBytes, lengthBytes, data);
    if (wrong !== undefined) return Promise.reject(wrong);
    if (lengthBytes === 0 && command !== NBD_CMD_FLUSH) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const request = { command, flags, offsetBytes, lengthBytes, data, resolve, reject, sentMs: 0 };
      made.request = request;
      this.#waiting.push(request);
      this.#watch ??= setInterval(
        () => this.#lookAtAges(),
        Math.min(WATCH_MS, this.#options.replyTimeoutMs / 2),
      ).unref();
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
    const what = `cannot ${commandName(command)} ${lengthBytes} bytes`;
    if (this.#waiting.length >= MAX_WAITING) return refuse("LIMIT", `more than ${MAX_WAITING} requests wait`);
    if (command === NBD_CMD_FLUSH) return undefined;
    const isReading = command === NBD_CMD_READ || command === NBD_CMD_BLOCK_STATUS;
    if (!isReading && this.readOnly) return refuse("IO", "the export is read-only", "EPERM");
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
      request.sentMs = performance.now();
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

  /** A server that takes too long has failed, whether it is silent or sends a byte now and then. */
  #lookAtAges(): void {
    if (this.#options.isCancelled()) {
      this.#fail(cancelled(this.name));
      return;
    }
    const { replyTimeoutMs } = this.#options;
    const latestMs = performance.now() - replyTimeoutMs;
    if (!this.#slots.some((request) => request !== undefined && request.sentMs < latestMs)) return;
    const problem = `no answer from the server within ${replyTimeoutMs / 1000} s`;
    this.#fail(connectionError(this.name, problem, "ETIMEDOUT"));
  }

  #settle(slot: number, request: Request, nbdError: number): void {
    this.#slots[slot] = undefined;
    this.#freeSlots.push(slot);
    this.#bytesInFlight -= request.data?.length ?? 0;
    if (nbdError === 0) request.resolve();
    else request.reject(replyError(this.name, request, nbdError));
    this.#start();
    if (this.inFlight === 0 && this.#waiting.length === 0) this.#whenIdle?.();
  }

  #fail(error: CowcatcherError): void {
    if (this.#failure !== undefined) return;
    this.#failure = error;
    clearInterval(this.#watch);
    if (error.code === "CANCELLED" && this.#options.staysOpen) this.#socket.unref();
    else this.#socket.destroy();
    const open = [...this.#slots, ...this.#waiting.splice(0)];
    this.#slots.fill(undefined);
    for (const request of open) request?.reject(error);
    this.#whenIdle?.();
  }
}

/** Connects and negotiates; nothing reads the socket yet. Rejects as NbdClient.connect. */
export async function openConnection(
  address: NbdAddress,
  name: string,
  options: Pick<
    NbdClientOptions,
    "connectTimeoutMs" | "isCancelled" | "staysOpen" | "structured" | "contexts"
  >,
): Promise<Negotiated> {
  const settings = { ...DEFAULT_OPTIONS, ...options };
  const socket = connect("path" in address ? { path: address.path } : { ...address, noDelay: true });
  const deadlineMs = performance.now() + settings.connectTimeoutMs;
  let ended: CowcatcherError | undefined;
  const timer = setInterval(
    () => {
      if (!settings.staysOpen && settings.isCancelled()) ended = cancelled(name);
      else if (performance.now() < deadlineMs) return;
      ended ??= connectionError(
        name,
        `no connection within ${settings.connectTimeoutMs / 1000} s`,
        "ETIMEDOUT",
      );
      socket.destroy();
    },
    Math.min(WATCH_MS, settings.connectTimeoutMs),
  );
  try {
    await connected(socket, name);
    return await negotiate(socket, name, address, settings);
  } catch (error) {
    socket.destroy();
    throw ended ?? error;
  } finally {
    clearInterval(timer);
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

function cancelled(object: string): CowcatcherError {
  return new CowcatcherError({ code: "CANCELLED", object, problem: "given up, as asked" });
}
