// The benchmark's guest: random writes of one size over NBD, a fixed number in flight, as cheap as they can be made,
// because what the guest costs is taken from the server that it measures.
//
// Each request is built once, header and payload in one buffer; a write changes its offset and goes out. A reply is
// answered with the next write of the same slot, and all that a chunk of replies asks for leaves in one system call.
// The cookie is the slot's number. No promise, closure or object a request, apart from those of the socket.
//
//   slot: free ──write──► in flight (sentMs[slot] > 0) ──reply──► free ──write──► …   until it is stopped
//
// It writes from `start` to `stop`, and all that time is in its timeline. Figures are those of a window in it: of the writes
// that were in flight at its start or sent in it, each of which is waited for.
//
// The handshake is the shortest there is, EXPORT_NAME; this guest talks to no other server than ours. It belongs to
// the benchmark's main thread; the server is another process. Specification: doc/proto.md of NetworkBlockDevice/nbd.

import { randomFillSync } from "node:crypto";
import { connect, type Socket } from "node:net";
import { CowcatcherError, ioError } from "../errors.js";
import {
  NBD_CMD_DISC,
  NBD_CMD_WRITE,
  NBD_FLAG_C_FIXED_NEWSTYLE,
  NBD_FLAG_C_NO_ZEROES,
  NBD_INIT_MAGIC,
  NBD_OPTION_MAGIC,
  NBD_OPT_EXPORT_NAME,
  NBD_REQUEST_MAGIC,
  NBD_SIMPLE_REPLY_MAGIC,
  OPTION_HEADER_BYTES,
  REQUEST_HEADER_BYTES,
  SIMPLE_REPLY_BYTES,
  readUint64,
  writeUint64,
} from "../nbd/wire/protocol.js";
import { KiB } from "../units.js";
import { LatencyHistogram } from "./latency-histogram.js";
import { Timeline } from "./timeline.js";

export interface GuestOptions {
  socketPath: string;
  exportName: string;
  blockBytes: number;
  ioDepth: number;
}

export interface GuestFigures {
  writeCount: number;
  /** From the first write to the last reply. */
  seconds: number;
  iops: number;
  averageMs: number;
  p99Ms: number;
  longestMs: number;
}

/** Of the writes in flight at its start, and of those sent until its time is up. */
interface Window {
  startMs: number;
  endMs: number;
  /** Its writes that are not answered yet. */
  inFlight: number;
  lastReplyMs: number;
  histogram: LatencyHistogram;
  settle: (error?: CowcatcherError) => void;
}

const GREETING_BYTES = 18;
/** The answer to EXPORT_NAME without zeroes: size and flags. */
const EXPORT_BYTES = 10;
const RECEIVE_BYTES = 64 * KiB;
const CONNECT_MS = 10_000;
/** A server holds a write for --guest-timeout (45 s) at most. */
const SILENCE_MS = 120_000;

export class BenchGuest {
  readonly #socket: Socket;
  readonly #name: string;
  readonly #blockBytes: number;
  readonly #blockCount: number;
  readonly #requests: Buffer[];
  readonly #views: DataView[];
  /** When the slot's write went out; 0: the slot is free. */
  readonly #sentMs: Float64Array;
  readonly #partialReply = Buffer.alloc(SIMPLE_REPLY_BYTES);
  #partialBytes = 0;
  #inFlight = 0;
  #isWriting = false;
  #timeline = new Timeline(0);
  #window: Window | undefined;
  /** Which slots' writes are the window's. */
  readonly #inWindow: Uint8Array;
  #failure: CowcatcherError | undefined;
  #whenIdle: ((error?: CowcatcherError) => void) | undefined;

  private constructor(socket: Socket, sizeBytes: number, options: GuestOptions, receiver: Receiver) {
    const { socketPath, blockBytes, ioDepth } = options;
    this.#socket = socket;
    this.#name = socketPath;
    this.#blockBytes = blockBytes;
    this.#blockCount = Math.floor(sizeBytes / blockBytes);
    this.#requests = Array.from({ length: ioDepth }, (_, slot) => writeRequest(slot, blockBytes));
    this.#views = this.#requests.map(({ buffer, byteOffset }) => new DataView(buffer, byteOffset));
    this.#sentMs = new Float64Array(ioDepth);
    this.#inWindow = new Uint8Array(ioDepth);
    receiver.take = (bytes) => this.#receive(bytes);
    receiver.fail = (error) => this.#fail(error);
    socket.setTimeout(SILENCE_MS, () => {
      if (this.#inFlight > 0) this.#fail(this.#error(`no reply within ${SILENCE_MS / 1000} s`, "ETIMEDOUT"));
    });
  }

  /** @throws CowcatcherError IO if it cannot connect, PROTOCOL if no NBD server of ours is there. */
  static async connect(options: GuestOptions): Promise<BenchGuest> {
    const { socketPath, exportName, blockBytes } = options;
    const receiver = new Receiver(socketPath);
    const landing = Buffer.alloc(RECEIVE_BYTES);
    const onread = {
      buffer: landing,
      callback: (byteCount: number) => {
        receiver.take(landing.subarray(0, byteCount));
        return true;
      },
    };
    const socket = connect({ path: socketPath, onread });
    socket.on("error", (cause) => receiver.fail(ioError("talk to the server", socketPath, cause)));
    socket.on("close", () => receiver.fail(closedError(socketPath)));
    try {
      const greeting = await receiver.read(GREETING_BYTES);
      if (
        greeting.readBigUInt64BE(0) !== NBD_INIT_MAGIC ||
        greeting.readBigUInt64BE(8) !== NBD_OPTION_MAGIC
      ) {
        throw protocolError(socketPath, "the server does not speak NBD's newstyle");
      }
      socket.write(exportNameOption(exportName));
      const answer = await receiver.read(EXPORT_BYTES);
      const sizeBytes = readUint64(new DataView(answer.buffer, answer.byteOffset), 0);
      if (sizeBytes < blockBytes)
        throw protocolError(socketPath, `the export has ${sizeBytes} bytes, less than a write`);
      return new BenchGuest(socket, sizeBytes, options, receiver);
    } catch (error) {
      socket.destroy();
      throw error;
    }
  }

  /** Writes until `stop`. Once. @throws CowcatcherError IO where the connection is lost already */
  start(): Timeline {
    if (this.#failure !== undefined) throw this.#failure;
    const startMs = performance.now();
    this.#timeline = new Timeline(startMs);
    this.#isWriting = true;
    this.#socket.cork();
    for (let slot = 0; slot < this.#requests.length; slot++) this.#send(slot, startMs);
    this.#socket.uncork();
    return this.#timeline;
  }

  /**
   * The figures of the next `runtimeMs`. While it writes; one at a time.
   * @throws CowcatcherError IO for a write that the server refused, with its offset, or a lost connection.
   */
  async measure(runtimeMs: number): Promise<GuestFigures> {
    if (this.#failure !== undefined) throw this.#failure;
    const startMs = performance.now();
    const histogram = new LatencyHistogram();
    const window: Window = {
      startMs,
      endMs: startMs + runtimeMs,
      inFlight: 0,
      lastReplyMs: startMs,
      histogram,
      settle: () => undefined,
    };
    // What is in flight counts as sent just now: it waits for what is measured, from here on.
    for (let slot = 0; slot < this.#sentMs.length; slot++) {
      const isInFlight = (this.#sentMs[slot] ?? 0) > 0;
      this.#inWindow[slot] = Number(isInFlight);
      if (!isInFlight) continue;
      this.#sentMs[slot] = startMs;
      window.inFlight++;
    }
    this.#window = window;
    try {
      await new Promise<void>((resolve, reject) => {
        window.settle = (error) => (error === undefined ? resolve() : reject(error));
      });
    } finally {
      this.#window = undefined;
    }
    const seconds = (window.lastReplyMs - startMs) / 1000;
    return {
      writeCount: histogram.count,
      seconds,
      iops: histogram.count / seconds,
      averageMs: histogram.averageMicroseconds / 1000,
      p99Ms: histogram.percentileMicroseconds(0.99) / 1000,
      longestMs: histogram.longestMicroseconds / 1000,
    };
  }

  /** Begins no more writes, and waits for those in flight. @throws CowcatcherError as measure */
  async stop(): Promise<void> {
    this.#isWriting = false;
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#inFlight === 0) return;
    await new Promise<void>((resolve, reject) => {
      this.#whenIdle = (error) => (error === undefined ? resolve() : reject(error));
    });
  }

  /** Says goodbye and hangs up; what is in flight fails. */
  close(): void {
    if (this.#failure === undefined && this.#inFlight === 0) {
      const goodbye = Buffer.alloc(REQUEST_HEADER_BYTES);
      goodbye.writeUInt32BE(NBD_REQUEST_MAGIC, 0);
      goodbye.writeUInt16BE(NBD_CMD_DISC, 6);
      this.#failure = closedError(this.#name);
      this.#socket.end(goodbye);
    }
    this.#fail(closedError(this.#name));
  }

  #send(slot: number, nowMs: number): void {
    const request = this.#requests[slot];
    const view = this.#views[slot];
    if (request === undefined || view === undefined) return;
    writeUint64(view, 16, Math.floor(Math.random() * this.#blockCount) * this.#blockBytes);
    this.#sentMs[slot] = nowMs;
    this.#inFlight++;
    const window = this.#window;
    if (window !== undefined && nowMs < window.endMs) {
      this.#inWindow[slot] = 1;
      window.inFlight++;
    }
    this.#socket.write(request);
  }

  #receive(bytes: Buffer): void {
    const nowMs = performance.now();
    let at = 0;
    this.#socket.cork();
    while (at < bytes.length && this.#failure === undefined) {
      if (this.#partialBytes === 0 && bytes.length - at >= SIMPLE_REPLY_BYTES) {
        this.#takeReply(bytes, at, nowMs);
        at += SIMPLE_REPLY_BYTES;
        continue;
      }
      const takenBytes = bytes.copy(this.#partialReply, this.#partialBytes, at);
      at += takenBytes;
      this.#partialBytes += takenBytes;
      if (this.#partialBytes < SIMPLE_REPLY_BYTES) break;
      this.#partialBytes = 0;
      this.#takeReply(this.#partialReply, 0, nowMs);
    }
    this.#socket.uncork();
    const window = this.#window;
    if (window !== undefined && nowMs >= window.endMs && window.inFlight === 0) window.settle();
    if (this.#inFlight === 0) this.#whenIdle?.();
  }

  #takeReply(bytes: Buffer, at: number, nowMs: number): void {
    const slot = bytes.readUInt32BE(at + 12);
    const sentMs = this.#sentMs[slot] ?? 0;
    if (bytes.readUInt32BE(at) !== NBD_SIMPLE_REPLY_MAGIC || sentMs === 0) {
      this.#fail(protocolError(this.#name, "the server sent what answers no write"));
      return;
    }
    const nbdError = bytes.readUInt32BE(at + 4);
    if (nbdError !== 0) {
      const view = this.#views[slot];
      const offsetBytes = view === undefined ? undefined : readUint64(view, 16);
      this.#fail(this.#error(`the server refused a write with error ${nbdError}`, "EIO", offsetBytes));
      return;
    }
    this.#timeline.record(nowMs);
    const window = this.#window;
    if (window !== undefined && this.#inWindow[slot] === 1) {
      window.histogram.record((nowMs - sentMs) * 1000);
      window.lastReplyMs = nowMs;
      window.inFlight--;
      this.#inWindow[slot] = 0;
    }
    this.#sentMs[slot] = 0;
    this.#inFlight--;
    if (this.#isWriting) this.#send(slot, nowMs);
  }

  #fail(error: CowcatcherError): void {
    this.#failure ??= error;
    this.#socket.destroySoon();
    this.#window?.settle(this.#failure);
    this.#whenIdle?.(this.#failure);
  }

  #error(problem: string, errno: string, offsetBytes?: number): CowcatcherError {
    return new CowcatcherError({ code: "IO", object: this.#name, problem, errno, offsetBytes });
  }
}

/** The socket's bytes: a few exact counts during the handshake, whatever comes afterwards. */
class Receiver {
  #bytes = Buffer.alloc(0);
  #failure: CowcatcherError | undefined;
  #wake: (() => void) | undefined;

  constructor(private readonly name: string) {}

  /** Replaced when the handshake is over. */
  take = (bytes: Buffer): void => {
    this.#bytes = Buffer.concat([this.#bytes, bytes]);
    this.#wake?.();
  };

  fail = (error: CowcatcherError): void => {
    this.#failure ??= error;
    this.#wake?.();
  };

  async read(lengthBytes: number): Promise<Buffer> {
    const timer = setTimeout(() => {
      const problem = `no handshake within ${CONNECT_MS / 1000} s`;
      this.fail(new CowcatcherError({ code: "IO", object: this.name, problem, errno: "ETIMEDOUT" }));
    }, CONNECT_MS);
    try {
      while (this.#bytes.length < lengthBytes) {
        if (this.#failure !== undefined) throw this.#failure;
        await new Promise<void>((resolve) => {
          this.#wake = resolve;
        });
      }
    } finally {
      clearTimeout(timer);
    }
    const read = this.#bytes.subarray(0, lengthBytes);
    this.#bytes = this.#bytes.subarray(lengthBytes);
    return read;
  }
}

/** Header and payload; random, so that no storage compresses it. */
function writeRequest(slot: number, blockBytes: number): Buffer {
  const request = Buffer.allocUnsafeSlow(REQUEST_HEADER_BYTES + blockBytes).fill(0, 0, REQUEST_HEADER_BYTES);
  request.writeUInt32BE(NBD_REQUEST_MAGIC, 0);
  request.writeUInt16BE(NBD_CMD_WRITE, 6);
  request.writeUInt32BE(slot, 12);
  request.writeUInt32BE(blockBytes, 24);
  return randomFillSync(request, REQUEST_HEADER_BYTES);
}

/** The client's flags, and the option that ends the negotiation. */
function exportNameOption(exportName: string): Buffer {
  const name = Buffer.from(exportName);
  const bytes = Buffer.alloc(4 + OPTION_HEADER_BYTES);
  bytes.writeUInt32BE(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES, 0);
  bytes.writeBigUInt64BE(NBD_OPTION_MAGIC, 4);
  bytes.writeUInt32BE(NBD_OPT_EXPORT_NAME, 12);
  bytes.writeUInt32BE(name.length, 16);
  return Buffer.concat([bytes, name]);
}

function closedError(name: string): CowcatcherError {
  return new CowcatcherError({
    code: "IO",
    object: name,
    problem: "the server hung up",
    errno: "ECONNRESET",
  });
}

function protocolError(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "PROTOCOL", object, problem });
}
