// The transmission phase of one connection: requests in, device calls, replies out.
//
// `consume` handles every request that is whole in the bytes it is given. A device operation that is done at once
// (the usual case: data in the page cache) is answered at once, without a promise, a closure or an object of its
// own; one that goes on is counted in `requestsInFlight` and answered when it settles, in any order.
//
// What a request may do is checked here, before the device hears of it: flags, write permission, range, size. A
// refused write's payload is read and thrown away, then the error is sent.
//
//   running ──DISC, or a broken request──► stopped      nothing more is handled; what is in flight is answered
//      └────────── refuseRequests() ─────► refusing     each request is answered with ESHUTDOWN
//
// A write reaches the device only when its whole payload is there, so a connection that breaks leaves no half write.
//
// Specification: doc/proto.md, "Transmission phase". Main thread only.

import { messageOf } from "../errors.js";
import type { BlockDevice, Completion } from "../image/device.js";
import type { NbdLogger } from "./export.js";
import { ExtentList } from "./extents.js";
import type { Negotiated } from "./handshake.js";
import {
  FLUSH_AFTER_BYTES,
  HOLE_SEARCH_MIN_BYTES,
  MAX_DISCARD_BYTES,
  MAX_LOGGED_ERRORS,
  MAX_REQUESTS_IN_FLIGHT,
  MAX_SLAB_BYTES_PER_CONNECTION,
  MAX_STATUS_EXTENTS,
  MAX_WRITES_QUEUED,
} from "./limits.js";
import {
  MAX_PAYLOAD_BYTES,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_CACHE,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_DF,
  NBD_CMD_FLAG_FAST_ZERO,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLAG_REQ_ONE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_EINVAL,
  NBD_ENOSPC,
  NBD_ENOTSUP,
  NBD_EOVERFLOW,
  NBD_EPERM,
  NBD_ESHUTDOWN,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REQUEST_MAGIC,
  OFFSET_DATA_HEADER_BYTES,
  readUint64,
  REQUEST_HEADER_BYTES,
  SIMPLE_REPLY_BYTES,
} from "./protocol.js";
import type { ReceiveBuffer } from "./receive-buffer.js";
import {
  appendBlockStatus,
  appendErrorChunk,
  appendNoneChunk,
  appendSimpleReply,
  writeChunkHeader,
  writeSimpleReply,
} from "./reply-format.js";
import type { ReplyQueue } from "./reply-queue.js";
import type { Slab } from "./slab.js";
import { HoleSearch, sparseReplyBytes, startSparseRead, type SparseRead } from "./sparse-read.js";
import { nbdErrorOf } from "./wire-error.js";

/** Flags that each command may carry, by command; DF needs structured replies besides. */
const ALLOWED_FLAGS: readonly number[] = (() => {
  const allowed: number[] = [];
  allowed[NBD_CMD_READ] = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF;
  allowed[NBD_CMD_WRITE] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_DISC] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_FLUSH] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_TRIM] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_CACHE] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_WRITE_ZEROES] = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
  allowed[NBD_CMD_BLOCK_STATUS] = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE;
  return allowed;
})();

export class Transmission {
  requestsInFlight = 0;
  /** Bytes that the request at the buffer's start has in all, as far as its header has told. */
  needBytes = REQUEST_HEADER_BYTES;
  /** A bound is reached: whole requests may be left over, and the socket is not to be read. */
  isWaiting = false;
  /** DISC came, or bytes that are no request: `stopReason` says which. */
  isStopped = false;
  stopReason = "";

  private isRefusing = false;
  private discardBytes = 0;
  private discardError = 0;
  private discardCookieHigh = 0;
  private discardCookieLow = 0;
  private errorCount = 0;
  private readonly holeSearch: HoleSearch;
  private handledBytes = 0;

  private readonly device: BlockDevice;
  private readonly isReadOnly: boolean;
  private readonly isStructured: boolean;

  constructor(
    private readonly negotiated: Negotiated,
    private readonly receive: ReceiveBuffer,
    private readonly replies: ReplyQueue,
    private readonly logger: NbdLogger,
    /** Called when a request that went on has been answered: flush, and go on reading. */
    private readonly onSettled: () => void,
  ) {
    this.device = negotiated.nbdExport.device;
    this.isReadOnly = negotiated.nbdExport.readOnly;
    this.isStructured = negotiated.structuredReplies;
    this.holeSearch = new HoleSearch(this.device);
  }

  refuseRequests(): void {
    this.isRefusing = true;
  }

  /** Handles the whole requests in slab[start, end); returns where it stopped. */
  consume(slab: Slab, start: number, end: number): number {
    const { view } = slab;
    let at = start;
    this.isWaiting = false;
    this.handledBytes = 0;
    while (!this.isStopped) {
      if (this.discardBytes > 0) {
        at += this.discard(end - at);
        if (this.discardBytes > 0) break;
      }
      this.needBytes = REQUEST_HEADER_BYTES;
      if (end - at < REQUEST_HEADER_BYTES) break;
      if (view.getUint32(at) !== NBD_REQUEST_MAGIC) {
        this.stop(`a request with magic 0x${view.getUint32(at).toString(16)}`);
        break;
      }
      const error = this.validate(view, at);
      const isWrite = view.getUint16(at + 6) === NBD_CMD_WRITE;
      if (isWrite && error === 0) {
        this.needBytes = REQUEST_HEADER_BYTES + view.getUint32(at + 24);
        if (end - at < this.needBytes) break;
      }
      if (this.isOverBound()) {
        this.isWaiting = true;
        break;
      }
      if (error !== 0) this.refuse(view, at, error, isWrite);
      else this.handle(slab, at);
      at += this.needBytes;
      this.handledBytes += this.needBytes;
      if (this.handledBytes >= FLUSH_AFTER_BYTES || this.replies.gatheredBytes >= FLUSH_AFTER_BYTES) {
        this.handledBytes = 0;
        this.replies.flush();
      }
    }
    if (this.isStopped) this.needBytes = REQUEST_HEADER_BYTES;
    return at;
  }

  private stop(reason: string): void {
    this.isStopped = true;
    this.stopReason = reason;
  }

  private isOverBound(): boolean {
    if (this.requestsInFlight >= MAX_REQUESTS_IN_FLIGHT) return true;
    if (this.replies.queuedWrites >= MAX_WRITES_QUEUED) return true;
    if (this.receive.heldBytes + this.replies.heldBytes < MAX_SLAB_BYTES_PER_CONNECTION) return false;
    // Only what will be given back is worth waiting for.
    return this.requestsInFlight > 0 || this.replies.isBusy;
  }

  /** The error that the request whose header is at `at` deserves before the device is asked; 0 for none. */
  private validate(view: DataView, at: number): number {
    const flags = view.getUint16(at + 4);
    const command = view.getUint16(at + 6);
    const allowedFlags = ALLOWED_FLAGS[command];
    if (allowedFlags === undefined) return NBD_EINVAL;
    if ((flags & ~allowedFlags) !== 0) return NBD_EINVAL;
    if (command === NBD_CMD_DISC) return 0;
    if (this.isRefusing) return NBD_ESHUTDOWN;
    const offsetBytes = readUint64(view, at + 16);
    const lengthBytes = view.getUint32(at + 24);
    const isBeyondEnd = offsetBytes + lengthBytes > this.device.sizeBytes;
    switch (command) {
      case NBD_CMD_READ:
        if ((flags & NBD_CMD_FLAG_DF) !== 0 && !this.isStructured) return NBD_EINVAL;
        if (isBeyondEnd) return NBD_EINVAL;
        return lengthBytes > MAX_PAYLOAD_BYTES ? NBD_EOVERFLOW : 0;
      case NBD_CMD_WRITE:
        if (this.isReadOnly) return NBD_EPERM;
        if (lengthBytes > MAX_PAYLOAD_BYTES) return NBD_EINVAL;
        return isBeyondEnd ? NBD_ENOSPC : 0;
      case NBD_CMD_WRITE_ZEROES:
        if (this.isReadOnly) return NBD_EPERM;
        if (isBeyondEnd) return NBD_ENOSPC;
        // Whether zeroes would be fast is not known in advance, and then the protocol asks for this refusal.
        return (flags & NBD_CMD_FLAG_FAST_ZERO) !== 0 ? NBD_ENOTSUP : 0;
      case NBD_CMD_TRIM:
        if (this.isReadOnly) return NBD_EPERM;
        return isBeyondEnd ? NBD_EINVAL : 0;
      case NBD_CMD_FLUSH:
        return offsetBytes !== 0 || lengthBytes !== 0 ? NBD_EINVAL : 0;
      case NBD_CMD_BLOCK_STATUS:
        return !this.negotiated.baseAllocation || lengthBytes === 0 || isBeyondEnd ? NBD_EINVAL : 0;
      default:
        return isBeyondEnd ? NBD_EINVAL : 0;
    }
  }

  private refuse(view: DataView, at: number, error: number, hasPayload: boolean): void {
    const payloadBytes = hasPayload ? view.getUint32(at + 24) : 0;
    const high = view.getUint32(at + 8);
    const low = view.getUint32(at + 12);
    if (payloadBytes > MAX_DISCARD_BYTES) {
      this.stop(`a write of ${payloadBytes} bytes (limit ${MAX_DISCARD_BYTES})`);
    } else if (payloadBytes > 0) {
      // A client may not look for a reply before it has sent the whole request.
      this.discardBytes = payloadBytes;
      this.discardError = error;
      this.discardCookieHigh = high;
      this.discardCookieLow = low;
    } else {
      this.replyError(view.getUint16(at + 6), high, low, error);
    }
  }

  private discard(availableBytes: number): number {
    const count = Math.min(this.discardBytes, availableBytes);
    this.discardBytes -= count;
    if (this.discardBytes === 0) {
      appendSimpleReply(this.replies, this.discardCookieHigh, this.discardCookieLow, this.discardError);
    }
    return count;
  }

  private handle(slab: Slab, at: number): void {
    const { view } = slab;
    const flags = view.getUint16(at + 4);
    const command = view.getUint16(at + 6);
    const high = view.getUint32(at + 8);
    const low = view.getUint32(at + 12);
    const offsetBytes = readUint64(view, at + 16);
    const lengthBytes = view.getUint32(at + 24);
    switch (command) {
      case NBD_CMD_READ:
        return this.read(flags, high, low, offsetBytes, lengthBytes);
      case NBD_CMD_DISC:
        return this.stop("");
      case NBD_CMD_BLOCK_STATUS:
        return this.blockStatus(flags, high, low, offsetBytes, lengthBytes);
      default:
        return this.change(command, slab, at, flags, high, low, offsetBytes, lengthBytes);
    }
  }

  /** WRITE, WRITE_ZEROES, TRIM, FLUSH and CACHE: all answered with a simple reply. */
  private change(
    command: number,
    slab: Slab,
    at: number,
    flags: number,
    high: number,
    low: number,
    offsetBytes: number,
    lengthBytes: number,
  ): void {
    let completion: Completion;
    try {
      completion = this.callDevice(command, slab, at, flags, offsetBytes, lengthBytes);
    } catch (error) {
      return this.replyError(command, high, low, this.nbdError(error));
    }
    if (completion === undefined) {
      appendSimpleReply(this.replies, high, low, 0);
    } else {
      void this.answerLater(completion, command, command === NBD_CMD_WRITE ? slab : undefined, high, low);
    }
  }

  private callDevice(
    command: number,
    slab: Slab,
    at: number,
    flags: number,
    offsetBytes: number,
    lengthBytes: number,
  ): Completion {
    const { device } = this;
    if (command === NBD_CMD_FLUSH) return device.flush();
    if (command === NBD_CMD_CACHE || lengthBytes === 0) return undefined;
    let completion: Completion;
    if (command === NBD_CMD_WRITE) {
      completion = device.write(slab.bytes, at + REQUEST_HEADER_BYTES, lengthBytes, offsetBytes);
    } else if (command === NBD_CMD_TRIM) {
      completion = device.discard(offsetBytes, lengthBytes);
    } else {
      const mayUnmap = (flags & NBD_CMD_FLAG_NO_HOLE) === 0;
      completion = device.writeZeroes(offsetBytes, lengthBytes, { mayUnmap });
    }
    if ((flags & NBD_CMD_FLAG_FUA) === 0) return completion;
    return completion === undefined ? device.flush() : completion.then(() => device.flush());
  }

  private async answerLater(
    completion: Promise<void>,
    command: number,
    payload: Slab | undefined,
    high: number,
    low: number,
  ): Promise<void> {
    this.requestsInFlight++;
    if (payload !== undefined) this.receive.retain(payload);
    let error = 0;
    try {
      await completion;
    } catch (reason) {
      error = this.nbdError(reason);
    }
    if (payload !== undefined) this.receive.release(payload);
    this.replyError(command, high, low, error);
    this.settled();
  }

  private read(flags: number, high: number, low: number, offsetBytes: number, lengthBytes: number): void {
    const { replies, isStructured } = this;
    if (isStructured && lengthBytes === 0) return appendNoneChunk(replies, high, low);
    if (isStructured && lengthBytes >= HOLE_SEARCH_MIN_BYTES && (flags & NBD_CMD_FLAG_DF) === 0) {
      const plan = this.holeSearch.plan(offsetBytes, lengthBytes);
      if (plan !== undefined) return this.readSparse(plan, high, low, offsetBytes);
    }
    const headerBytes = isStructured ? OFFSET_DATA_HEADER_BYTES : SIMPLE_REPLY_BYTES;
    const at = replies.reserve(headerBytes + lengthBytes);
    const { slab } = replies;
    if (isStructured) {
      writeChunkHeader(
        slab.view,
        at,
        true,
        NBD_REPLY_TYPE_OFFSET_DATA,
        high,
        low,
        8 + lengthBytes,
        offsetBytes,
      );
    } else {
      writeSimpleReply(slab.view, at, high, low, 0);
    }
    let completion: Completion;
    try {
      completion =
        lengthBytes === 0
          ? undefined
          : this.device.read(slab.bytes, at + headerBytes, lengthBytes, offsetBytes);
    } catch (error) {
      return this.replyError(NBD_CMD_READ, high, low, this.nbdError(error));
    }
    if (completion === undefined) replies.commit(headerBytes + lengthBytes);
    else void this.sendLater(completion, at, headerBytes + lengthBytes, high, low);
  }

  private readSparse(plan: SparseRead, high: number, low: number, offsetBytes: number): void {
    const replyBytes = sparseReplyBytes(plan);
    const at = this.replies.reserve(replyBytes);
    let completion: Completion;
    try {
      completion = startSparseRead(plan, this.device, this.replies.slab, at, high, low, offsetBytes);
    } catch (error) {
      return this.replyError(NBD_CMD_READ, high, low, this.nbdError(error));
    }
    if (completion === undefined) this.replies.commit(replyBytes);
    else void this.sendLater(completion, at, replyBytes, high, low);
  }

  /** Sends slab[at, +replyBytes), already laid out, once the device has filled it. */
  private async sendLater(
    completion: Promise<void>,
    at: number,
    replyBytes: number,
    high: number,
    low: number,
  ): Promise<void> {
    this.requestsInFlight++;
    const slab = this.replies.detach(replyBytes);
    try {
      await completion;
      this.replies.sendDetached(slab, at, replyBytes);
    } catch (error) {
      this.replies.dropDetached(slab);
      this.replyError(NBD_CMD_READ, high, low, this.nbdError(error));
    }
    this.settled();
  }

  private blockStatus(
    flags: number,
    high: number,
    low: number,
    offsetBytes: number,
    lengthBytes: number,
  ): void {
    const maxExtents = (flags & NBD_CMD_FLAG_REQ_ONE) !== 0 ? 1 : MAX_STATUS_EXTENTS;
    const extents = new ExtentList(this.device, offsetBytes, lengthBytes, maxExtents);
    try {
      const rest = extents.gather();
      if (rest === undefined) appendBlockStatus(this.replies, high, low, extents);
      else void this.answerStatusLater(extents, extents.gatherRest(rest), high, low);
    } catch (error) {
      this.replyError(NBD_CMD_BLOCK_STATUS, high, low, this.nbdError(error));
    }
  }

  private async answerStatusLater(
    extents: ExtentList,
    completion: Promise<void>,
    high: number,
    low: number,
  ): Promise<void> {
    this.requestsInFlight++;
    try {
      await completion;
      appendBlockStatus(this.replies, high, low, extents);
    } catch (error) {
      this.replyError(NBD_CMD_BLOCK_STATUS, high, low, this.nbdError(error));
    }
    this.settled();
  }

  private settled(): void {
    this.requestsInFlight--;
    this.onSettled();
  }

  /** Answers with `error`, or with success where it is 0, in the form that the command's reply must have. */
  private replyError(command: number, high: number, low: number, error: number): void {
    const mustBeChunk = this.isStructured && (command === NBD_CMD_READ || command === NBD_CMD_BLOCK_STATUS);
    if (mustBeChunk) appendErrorChunk(this.replies, high, low, error);
    else appendSimpleReply(this.replies, high, low, error);
  }

  private nbdError(error: unknown): number {
    this.errorCount++;
    const exportName = this.negotiated.nbdExport.name;
    // A failing disk fails thousands of requests; the first ones tell what is wrong.
    if (this.errorCount <= MAX_LOGGED_ERRORS) {
      this.logger.warn({ export: exportName, problem: messageOf(error) }, "device error");
    }
    this.logger.debug({ export: exportName, err: error }, "device error");
    return nbdErrorOf(error);
  }
}
