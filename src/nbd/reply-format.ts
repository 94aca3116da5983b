// The forms that replies have on the wire, written into a ReplyQueue's slab.
//
// A cookie travels as two 32-bit halves: it is the client's, opaque, and a BigInt would be an allocation a request.

import { BASE_ALLOCATION_ID } from "./handshake.js";
import type { ExtentList } from "./extents.js";
import {
  ERROR_CHUNK_BYTES,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_NONE,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  SIMPLE_REPLY_BYTES,
  STRUCTURED_REPLY_HEADER_BYTES,
  writeUint64,
} from "./protocol.js";
import type { ReplyQueue } from "./reply-queue.js";

export function writeSimpleReply(view: DataView, at: number, high: number, low: number, error: number): void {
  view.setUint32(at, NBD_SIMPLE_REPLY_MAGIC);
  view.setUint32(at + 4, error);
  view.setUint32(at + 8, high);
  view.setUint32(at + 12, low);
}

export function appendSimpleReply(replies: ReplyQueue, high: number, low: number, error: number): void {
  const at = replies.reserve(SIMPLE_REPLY_BYTES);
  writeSimpleReply(replies.slab.view, at, high, low, error);
  replies.commit(SIMPLE_REPLY_BYTES);
}

/** A structured reply's header; with offsetBytes, also the 64-bit offset that content chunks begin with. */
export function writeChunkHeader(
  view: DataView,
  at: number,
  isLast: boolean,
  type: number,
  high: number,
  low: number,
  lengthBytes: number,
  offsetBytes?: number,
): void {
  view.setUint32(at, NBD_STRUCTURED_REPLY_MAGIC);
  view.setUint16(at + 4, isLast ? NBD_REPLY_FLAG_DONE : 0);
  view.setUint16(at + 6, type);
  view.setUint32(at + 8, high);
  view.setUint32(at + 12, low);
  view.setUint32(at + 16, lengthBytes);
  if (offsetBytes !== undefined) writeUint64(view, at + 20, offsetBytes);
}

export function appendNoneChunk(replies: ReplyQueue, high: number, low: number): void {
  const at = replies.reserve(STRUCTURED_REPLY_HEADER_BYTES);
  writeChunkHeader(replies.slab.view, at, true, NBD_REPLY_TYPE_NONE, high, low, 0);
  replies.commit(STRUCTURED_REPLY_HEADER_BYTES);
}

export function appendErrorChunk(replies: ReplyQueue, high: number, low: number, error: number): void {
  const at = replies.reserve(ERROR_CHUNK_BYTES);
  const { view } = replies.slab;
  writeChunkHeader(view, at, true, NBD_REPLY_TYPE_ERROR, high, low, 6);
  view.setUint32(at + 20, error);
  view.setUint16(at + 24, 0);
  replies.commit(ERROR_CHUNK_BYTES);
}

export function appendBlockStatus(replies: ReplyQueue, high: number, low: number, extents: ExtentList): void {
  const { lengthsBytes, flags } = extents;
  const payloadBytes = 4 + 8 * lengthsBytes.length;
  const at = replies.reserve(STRUCTURED_REPLY_HEADER_BYTES + payloadBytes);
  const { view } = replies.slab;
  writeChunkHeader(view, at, true, NBD_REPLY_TYPE_BLOCK_STATUS, high, low, payloadBytes);
  view.setUint32(at + 20, BASE_ALLOCATION_ID);
  lengthsBytes.forEach((lengthBytes, i) => {
    view.setUint32(at + 24 + 8 * i, lengthBytes);
    view.setUint32(at + 28 + 8 * i, flags[i] ?? 0);
  });
  replies.commit(STRUCTURED_REPLY_HEADER_BYTES + payloadBytes);
}
