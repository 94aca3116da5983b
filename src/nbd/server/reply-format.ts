// The forms that replies have on the wire, written into a ReplyQueue's slab.
//
//   form        | done               | failed                            | data of a READ
//   simple      | simple, 16 bytes   | simple                            | simple, data behind it
//   structured  | simple             | READ, BLOCK_STATUS: ERROR chunk;  | OFFSET_DATA chunk
//               |                    | others: simple                    |
//   extended    | NONE chunk         | ERROR chunk                       | OFFSET_DATA chunk
//
// A chunk's header has 20 bytes, an extended one 32: it repeats the request's offset and has a 64-bit length.

import type { ReplyForm } from "./reply-form.js";
import type { ExtentRuns } from "./extents.js";
import {
  EXTENDED_REPLY_HEADER_BYTES,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_READ,
  NBD_EXTENDED_REPLY_MAGIC,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  SIMPLE_REPLY_BYTES,
  STRUCTURED_REPLY_HEADER_BYTES,
  writeUint64,
} from "../wire/protocol.js";
import type { ReplyQueue } from "./reply-queue.js";
import type { RequestHeader } from "./request.js";

/** Of an OFFSET_DATA or OFFSET_HOLE chunk: the 64-bit offset, and the hole's 32-bit length. */
const CHUNK_OFFSET_BYTES = 8;
const HOLE_PAYLOAD_BYTES = 12;
/** Of an ERROR chunk without a message: error value and the message's length. */
const ERROR_PAYLOAD_BYTES = 6;

export class ReplyWriter {
  /** Replies may come in chunks: structured or extended. */
  readonly isChunked: boolean;
  /** What stands before the data of a READ that is answered in one piece. */
  readonly dataHeaderBytes: number;
  /** A hole of a READ. */
  readonly holeBytes: number;
  private readonly isExtended: boolean;
  private readonly chunkHeaderBytes: number;

  constructor(
    readonly replies: ReplyQueue,
    form: ReplyForm,
  ) {
    this.isExtended = form === "extended";
    this.isChunked = form !== "simple";
    this.chunkHeaderBytes = this.isExtended ? EXTENDED_REPLY_HEADER_BYTES : STRUCTURED_REPLY_HEADER_BYTES;
    this.dataHeaderBytes = this.isChunked ? this.chunkHeaderBytes + CHUNK_OFFSET_BYTES : SIMPLE_REPLY_BYTES;
    this.holeBytes = this.chunkHeaderBytes + HOLE_PAYLOAD_BYTES;
  }

  /** Success of a request whose reply has no data; for a READ, of no bytes. */
  success(request: RequestHeader): void {
    if (this.isExtended || (this.isChunked && request.command === NBD_CMD_READ)) return this.none(request);
    this.simple(request, 0);
  }

  error(request: RequestHeader, error: number): void {
    const { command } = request;
    const mustBeChunk =
      this.isExtended || (this.isChunked && (command === NBD_CMD_READ || command === NBD_CMD_BLOCK_STATUS));
    if (!mustBeChunk) return this.simple(request, error);
    const { replies, chunkHeaderBytes } = this;
    const at = replies.reserve(chunkHeaderBytes + ERROR_PAYLOAD_BYTES);
    const { view } = replies.slab;
    this.writeChunkHeader(view, at, request, true, NBD_REPLY_TYPE_ERROR, ERROR_PAYLOAD_BYTES);
    view.setUint32(at + chunkHeaderBytes, error);
    view.setUint16(at + chunkHeaderBytes + 4, 0);
    replies.commit(chunkHeaderBytes + ERROR_PAYLOAD_BYTES);
  }

  /** Writes what stands before a READ's data, dataHeaderBytes in all. */
  writeDataHeader(
    view: DataView,
    at: number,
    request: RequestHeader,
    isLast: boolean,
    offsetBytes: number,
    lengthBytes: number,
  ): void {
    if (!this.isChunked) return writeSimpleReply(view, at, request, 0);
    const payloadBytes = CHUNK_OFFSET_BYTES + lengthBytes;
    this.writeChunkHeader(view, at, request, isLast, NBD_REPLY_TYPE_OFFSET_DATA, payloadBytes);
    writeUint64(view, at + this.chunkHeaderBytes, offsetBytes);
  }

  /** Writes a hole of a READ, holeBytes in all. */
  writeHole(
    view: DataView,
    at: number,
    request: RequestHeader,
    isLast: boolean,
    offsetBytes: number,
    lengthBytes: number,
  ): void {
    this.writeChunkHeader(view, at, request, isLast, NBD_REPLY_TYPE_OFFSET_HOLE, HOLE_PAYLOAD_BYTES);
    writeUint64(view, at + this.chunkHeaderBytes, offsetBytes);
    view.setUint32(at + this.chunkHeaderBytes + CHUNK_OFFSET_BYTES, lengthBytes);
  }

  /** The answer to BLOCK_STATUS: a chunk for each context, ids and runs in the same order. */
  blockStatus(request: RequestHeader, ids: readonly number[], runs: readonly ExtentRuns[]): void {
    runs.forEach((extents, i) => {
      this.statusChunk(request, i === runs.length - 1, ids[i] ?? 0, extents);
    });
  }

  private statusChunk(request: RequestHeader, isLast: boolean, id: number, extents: ExtentRuns): void {
    const { lengthsBytes, flags } = extents;
    const { replies, chunkHeaderBytes, isExtended } = this;
    const headBytes = isExtended ? 8 : 4;
    const extentBytes = isExtended ? 16 : 8;
    const payloadBytes = headBytes + extentBytes * lengthsBytes.length;
    const at = replies.reserve(chunkHeaderBytes + payloadBytes);
    const { view } = replies.slab;
    const type = isExtended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS;
    this.writeChunkHeader(view, at, request, isLast, type, payloadBytes);
    view.setUint32(at + chunkHeaderBytes, id);
    if (isExtended) view.setUint32(at + chunkHeaderBytes + 4, lengthsBytes.length);
    let place = at + chunkHeaderBytes + headBytes;
    lengthsBytes.forEach((lengthBytes, i) => {
      if (isExtended) {
        writeUint64(view, place, lengthBytes);
        writeUint64(view, place + 8, flags[i] ?? 0);
      } else {
        view.setUint32(place, lengthBytes);
        view.setUint32(place + 4, flags[i] ?? 0);
      }
      place += extentBytes;
    });
    replies.commit(chunkHeaderBytes + payloadBytes);
  }

  private simple(request: RequestHeader, error: number): void {
    const at = this.replies.reserve(SIMPLE_REPLY_BYTES);
    writeSimpleReply(this.replies.slab.view, at, request, error);
    this.replies.commit(SIMPLE_REPLY_BYTES);
  }

  private none(request: RequestHeader): void {
    const at = this.replies.reserve(this.chunkHeaderBytes);
    this.writeChunkHeader(this.replies.slab.view, at, request, true, NBD_REPLY_TYPE_NONE, 0);
    this.replies.commit(this.chunkHeaderBytes);
  }

  private writeChunkHeader(
    view: DataView,
    at: number,
    request: RequestHeader,
    isLast: boolean,
    type: number,
    payloadBytes: number,
  ): void {
    view.setUint32(at, this.isExtended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    view.setUint16(at + 4, isLast ? NBD_REPLY_FLAG_DONE : 0);
    view.setUint16(at + 6, type);
    view.setUint32(at + 8, request.cookieHigh);
    view.setUint32(at + 12, request.cookieLow);
    if (this.isExtended) {
      view.setUint32(at + 16, request.offsetHigh);
      view.setUint32(at + 20, request.offsetLow);
      writeUint64(view, at + 24, payloadBytes);
    } else {
      view.setUint32(at + 16, payloadBytes);
    }
  }
}

function writeSimpleReply(view: DataView, at: number, request: RequestHeader, error: number): void {
  view.setUint32(at, NBD_SIMPLE_REPLY_MAGIC);
  view.setUint32(at + 4, error);
  view.setUint32(at + 8, request.cookieHigh);
  view.setUint32(at + 12, request.cookieLow);
}
