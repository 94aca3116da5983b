// The client's reading side: bytes in, settled requests out. One event loop; no I/O of its own.
//
//   header ─┬─ simple reply ───────────────► payload of a read ─► settled
//           └─ structured chunk ─► offset ─► payload of a read ─┬─ DONE ─► settled
//                              └─► control (hole, extents, error)┘ else the next header
//
// Where the next bytes go is told before they are read (`landing`): headers into a small staging buffer, a read's
// data straight into the caller's buffer, so that a byte of a large read is moved once, by the kernel; only the part
// that came along with a header is copied.
//
// The server is not trusted. Each header names a request that is in flight; a chunk lies within its request and
// over no other chunk of it; when a read is said to be done every byte has come. Else the connection ends (`Broken`),
// since what follows cannot be read as anything. Bounds: control data of a chunk, pieces of a read.
// Specification: doc/proto.md of NetworkBlockDevice/nbd, "Structured reply chunk message" and what follows.

import { KiB, MiB } from "../../units.js";
import { printable } from "./handshake.js";
import type { Request } from "./request.js";
import type { SocketReader } from "../wire/direct-socket.js";
import {
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_READ,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_ERROR_OFFSET,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  readUint64,
  SIMPLE_REPLY_BYTES,
  STRUCTURED_REPLY_HEADER_BYTES,
} from "../wire/protocol.js";

/** Many short replies come in one read; of a long one not much is copied. */
const STAGING_BYTES = 4 * KiB;
/** A million extents, as many as servers send at a time. */
const MAX_CONTROL_BYTES = 8 * MiB + 4;
/** Servers send the pieces of a read in order, which makes one of all; this many apart is no way to answer. */
const MAX_PIECES = 1024;
const FIRST_ERROR_TYPE = 0x8000;
const HOLE_BYTES = 12;
const OFFSET_BYTES = 8;

/** What the replies are for; the client's. */
export interface ReplySink {
  readonly structured: boolean;
  readonly contexts: ReadonlyMap<number, string>;
  /** The request in flight under this cookie, if there is one. */
  find(cookieHigh: number, cookieLow: number): Request | undefined;
  /** nbdError 0: done. */
  settle(cookieLow: number, request: Request, nbdError: number): void;
  /** The server broke the protocol. */
  broken(problem: string): void;
}

export class ReplyReader implements SocketReader {
  readonly #sink: ReplySink;
  readonly #staging = Buffer.alloc(STAGING_BYTES);
  readonly #view = new DataView(this.#staging.buffer, this.#staging.byteOffset, STAGING_BYTES);
  #start = 0;
  #end = 0;
  /** The message in hand: its request, and where the rest of it goes. */
  #request: Request | undefined;
  #slot = 0;
  #chunkFlags = 0;
  #chunkType = 0;
  /** Where payload goes, undefined between messages, and how much of it is missing. */
  #payload: Uint8Array | undefined;
  #payloadBytes = 0;
  #isBroken = false;

  constructor(sink: ReplySink) {
    this.#sink = sink;
  }

  landing(): Buffer {
    const payload = this.#payload;
    if (payload !== undefined && !this.#isBroken) {
      const at = payload.byteOffset + this.#payloadBytes;
      return Buffer.from(payload.buffer, at, payload.length - this.#payloadBytes);
    }
    if (this.#start > 0) {
      this.#staging.copyWithin(0, this.#start, this.#end);
      this.#end -= this.#start;
      this.#start = 0;
    }
    return this.#staging.subarray(this.#end);
  }

  received(byteCount: number): void {
    if (this.#isBroken) return;
    if (this.#payload !== undefined) {
      this.#payloadBytes += byteCount;
      if (this.#payloadBytes === this.#payload.length) this.#finishPayload();
      return;
    }
    this.#end += byteCount;
    while (this.#takeStaged());
    if (this.#isBroken || this.#start === this.#end) this.#start = this.#end = 0;
  }

  /** One step on what is staged; false: more must come first. */
  #takeStaged(): boolean {
    if (this.#isBroken) return false;
    const payload = this.#payload;
    if (payload === undefined) return this.#takeHeader();
    const count = Math.min(payload.length - this.#payloadBytes, this.#end - this.#start);
    payload.set(this.#staging.subarray(this.#start, this.#start + count), this.#payloadBytes);
    this.#start += count;
    this.#payloadBytes += count;
    if (this.#payloadBytes < payload.length) return false;
    this.#finishPayload();
    return true;
  }

  #takeHeader(): boolean {
    const available = this.#end - this.#start;
    if (available < SIMPLE_REPLY_BYTES) return false;
    const magic = this.#view.getUint32(this.#start);
    if (magic === NBD_SIMPLE_REPLY_MAGIC) return this.#takeSimple();
    if (magic !== NBD_STRUCTURED_REPLY_MAGIC || !this.#sink.structured) {
      return this.#break("the server sent what is not a reply");
    }
    return available < STRUCTURED_REPLY_HEADER_BYTES ? false : this.#takeChunkHeader(available);
  }

  #takeSimple(): boolean {
    const request = this.#findRequest();
    if (request === undefined) return false;
    const nbdError = this.#view.getUint32(this.#start + 4);
    const { command, data } = request;
    if (this.#sink.structured && (command === NBD_CMD_READ || command === NBD_CMD_BLOCK_STATUS)) {
      return this.#break("the server sent a simple reply where a structured one was agreed");
    }
    this.#start += SIMPLE_REPLY_BYTES;
    if (nbdError === 0 && command === NBD_CMD_READ && data !== undefined) {
      this.#chunkType = NBD_REPLY_TYPE_NONE;
      this.#chunkFlags = NBD_REPLY_FLAG_DONE;
      this.#expect(request, data);
    } else {
      this.#sink.settle(this.#slot, request, nbdError);
    }
    return true;
  }

  #findRequest(): Request | undefined {
    this.#slot = this.#view.getUint32(this.#start + 12);
    const request = this.#sink.find(this.#view.getUint32(this.#start + 8), this.#slot);
    if (request === undefined) this.#break("the server answered a request that was not made");
    return request;
  }

  #takeChunkHeader(available: number): boolean {
    const request = this.#findRequest();
    if (request === undefined) return false;
    const flags = this.#view.getUint16(this.#start + 4);
    const type = this.#view.getUint16(this.#start + 6);
    const lengthBytes = this.#view.getUint32(this.#start + 16);
    if (type === NBD_REPLY_TYPE_OFFSET_DATA) {
      if (available < STRUCTURED_REPLY_HEADER_BYTES + OFFSET_BYTES) return false;
      const offset = readUint64(this.#view, this.#start + STRUCTURED_REPLY_HEADER_BYTES);
      const place = this.#cover(request, offset, lengthBytes - OFFSET_BYTES);
      if (place === undefined) return false;
      this.#begin(flags, type, STRUCTURED_REPLY_HEADER_BYTES + OFFSET_BYTES);
      this.#expect(request, place);
      return true;
    }
    if (lengthBytes > MAX_CONTROL_BYTES) {
      return this.#break(`a chunk of ${lengthBytes} bytes (limit ${MAX_CONTROL_BYTES})`);
    }
    this.#begin(flags, type, STRUCTURED_REPLY_HEADER_BYTES);
    this.#expect(request, new Uint8Array(lengthBytes));
    if (lengthBytes === 0) this.#finishPayload();
    return true;
  }

  #begin(flags: number, type: number, headerBytes: number): void {
    this.#chunkFlags = flags;
    this.#chunkType = type;
    this.#start += headerBytes;
  }

  #expect(request: Request, payload: Uint8Array): void {
    this.#request = request;
    this.#payload = payload;
    this.#payloadBytes = 0;
  }

  #finishPayload(): void {
    const [request, payload] = [this.#request, this.#payload];
    this.#request = this.#payload = undefined;
    if (request === undefined || payload === undefined) return;
    const type = this.#chunkType;
    const isData = payload.buffer === request.data?.buffer;
    if (!isData && !this.#takeControl(request, type, payload)) return;
    if ((this.#chunkFlags & NBD_REPLY_FLAG_DONE) === 0) {
      if (type === NBD_REPLY_TYPE_NONE) this.#break("an empty chunk that is not the last");
      return;
    }
    const nbdError = request.nbdError ?? 0;
    const isSimple = isData && type === NBD_REPLY_TYPE_NONE;
    if (nbdError === 0 && !isSimple && !this.#isAnswered(request)) return;
    this.#sink.settle(this.#slot, request, nbdError);
  }

  /** At the last chunk: whether all that was asked for has come. */
  #isAnswered(request: Request): boolean {
    if (request.command === NBD_CMD_READ) {
      const { covered, lengthBytes } = request;
      if (covered?.length === 2 && covered[0] === 0 && covered[1] === lengthBytes) return true;
      return this.#break("the server left out a part of a read");
    }
    if (request.command === NBD_CMD_BLOCK_STATUS && request.extents === undefined) {
      return this.#break("the server left out the block status");
    }
    return true;
  }

  #takeControl(request: Request, type: number, bytes: Uint8Array): boolean {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    if (type >= FIRST_ERROR_TYPE) return this.#takeError(request, type, view);
    switch (type) {
      case NBD_REPLY_TYPE_NONE:
        return bytes.length === 0 || this.#break(`an empty chunk of ${bytes.length} bytes`);
      case NBD_REPLY_TYPE_OFFSET_HOLE:
        return this.#takeHole(request, view);
      case NBD_REPLY_TYPE_BLOCK_STATUS:
        return this.#takeExtents(request, view);
      default:
        return this.#break(`a chunk of the unknown type ${type}`);
    }
  }

  #takeHole(request: Request, view: DataView): boolean {
    if (view.byteLength !== HOLE_BYTES) return this.#break(`a hole chunk of ${view.byteLength} bytes`);
    const place = this.#cover(request, readUint64(view, 0), view.getUint32(8));
    place?.fill(0);
    return place !== undefined;
  }

  #takeExtents(request: Request, view: DataView): boolean {
    const count = (view.byteLength - 4) / 8;
    const context = count >= 1 ? this.#sink.contexts.get(view.getUint32(0)) : undefined;
    const isAsked = request.command === NBD_CMD_BLOCK_STATUS && context !== undefined;
    if (!isAsked || !Number.isInteger(count) || request.extents?.has(context) === true) {
      return this.#break("a block status that was not asked for, or is malformed");
    }
    const [lengths, flags]: [number[], number[]] = [[], []];
    for (let i = 0; i < count; i++) {
      const lengthBytes = view.getUint32(4 + i * 8);
      if (lengthBytes === 0) return this.#break("an extent of no length");
      lengths.push(lengthBytes);
      flags.push(view.getUint32(8 + i * 8));
    }
    (request.extents ??= new Map()).set(context, { lengths, flags });
    return true;
  }

  #takeError(request: Request, type: number, view: DataView): boolean {
    const textBytes = view.byteLength < 6 ? -1 : view.getUint16(4);
    const hasOffset = type === NBD_REPLY_TYPE_ERROR_OFFSET;
    const expected = 6 + textBytes + (hasOffset ? OFFSET_BYTES : 0);
    const isKnown = hasOffset || type === NBD_REPLY_TYPE_ERROR;
    if (textBytes < 0 || (isKnown ? view.byteLength !== expected : view.byteLength < expected)) {
      return this.#break("a malformed error chunk");
    }
    const nbdError = view.getUint32(0);
    if (nbdError === 0) return this.#break("an error chunk without an error");
    if (request.nbdError !== undefined) return true;
    request.nbdError = nbdError;
    request.nbdErrorText = printable(Buffer.from(view.buffer, view.byteOffset + 6, textBytes));
    const offset = hasOffset ? readUint64(view, 6 + textBytes) : NaN;
    const isWithin = offset >= request.offsetBytes && offset < request.offsetBytes + request.lengthBytes;
    request.nbdErrorOffset = isWithin ? offset : undefined;
    return true;
  }

  /** Notes that a piece of a read comes now. @returns where it goes; undefined: it cannot be, and that is the end. */
  #cover(request: Request, offsetBytes: number, lengthBytes: number): Uint8Array | undefined {
    const from = offsetBytes - request.offsetBytes;
    const to = from + lengthBytes;
    const { data } = request;
    if (request.command !== NBD_CMD_READ || data === undefined || lengthBytes < 1) {
      this.#break("data that was not asked for");
      return undefined;
    }
    if (from < 0 || to > request.lengthBytes || !this.#addPiece((request.covered ??= []), from, to)) {
      this.#break("a piece of a read outside of it, or twice");
      return undefined;
    }
    return data.subarray(from, to);
  }

  /** Adds [from, to) to sorted, disjoint pairs. False: it overlaps, or there are too many. */
  #addPiece(covered: number[], from: number, to: number): boolean {
    let at = covered.length;
    while (at > 0 && (covered[at - 2] ?? 0) >= from) at -= 2;
    if (at > 0 && (covered[at - 1] ?? 0) > from) return false;
    if (at < covered.length && (covered[at] ?? 0) < to) return false;
    const joinsLeft = at > 0 && covered[at - 1] === from;
    const joinsRight = at < covered.length && covered[at] === to;
    if (joinsLeft && joinsRight) covered.splice(at - 1, 2);
    else if (joinsLeft) covered[at - 1] = to;
    else if (joinsRight) covered[at] = from;
    else covered.splice(at, 0, from, to);
    return covered.length <= 2 * MAX_PIECES;
  }

  #break(problem: string): false {
    this.#isBroken = true;
    this.#sink.broken(problem);
    return false;
  }
}
