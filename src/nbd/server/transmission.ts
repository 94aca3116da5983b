// The transmission phase of one connection: requests in, device calls, replies out.
//
// `consume` handles every request that is whole in the bytes it is given. A device operation that is done at once
// (the usual case: data in the page cache) is answered at once, without a promise, a closure or an object of its
// own; one that goes on is counted in `requestsInFlight` and answered when it settles, in any order. `request` is
// read into again for each request, so what goes on takes a copy.
//
// What a request may do is checked (request.ts) before the device hears of it. A refused request's payload is read
// and thrown away, then the error is sent.
//
//   running ──DISC, or a broken request──► stopped      nothing more is handled; what is in flight is answered
//      └────────── refuseRequests() ─────► refusing     each request is answered with ESHUTDOWN
//
// A write reaches the device only when its whole payload is there, so a connection that breaks leaves no half write.
//
// Specification: doc/proto.md, "Transmission phase". Main thread only.

import { messageOf } from "../../errors.js";
import type { BlockDevice, Completion, FileRange } from "../../block/device.js";
import type { NbdLogger } from "./export.js";
import type { Negotiated } from "./handshake.js";
import { FileReply } from "./file-reply.js";
import {
  FLUSH_AFTER_BYTES,
  HOLE_SEARCH_MIN_BYTES,
  MAX_DISCARD_BYTES,
  MAX_LOGGED_ERRORS,
  MAX_REQUESTS_IN_FLIGHT,
  MAX_SLAB_BYTES_PER_CONNECTION,
  MAX_WRITES_QUEUED,
  SEND_CACHED_MIN_BYTES,
} from "./limits.js";
import {
  MAX_PAYLOAD_BYTES,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_CACHE,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_DF,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
} from "../wire/protocol.js";
import type { ReceiveBuffer } from "./receive-buffer.js";
import { ReplyWriter } from "./reply-format.js";
import type { ReplyQueue } from "./reply-queue.js";
import { RequestHeader, RequestRules } from "./request.js";
import type { Slab } from "./slab.js";
import { HoleSearch, sparseReplyBytes, startSparseRead, type SparseRead } from "./sparse-read.js";
import { StatusQuery } from "./status-query.js";
import { nbdErrorOf } from "./wire-error.js";

export class Transmission {
  requestsInFlight = 0;
  /** Bytes that the request at the buffer's start has in all, as far as its header has told. */
  needBytes: number;
  /** A bound is reached: whole requests may be left over, and the socket is not to be read. */
  isWaiting = false;
  /** DISC came, or bytes that are no request: `stopReason` says which. */
  isStopped = false;
  stopReason = "";

  private readonly request = new RequestHeader();
  private readonly rules: RequestRules;
  private readonly writer: ReplyWriter;
  private readonly device: BlockDevice;
  private readonly holeSearch: HoleSearch;
  private discardBytes = 0;
  private discarded = this.request;
  private discardError = 0;
  private errorCount = 0;
  private handledBytes = 0;

  constructor(
    private readonly negotiated: Negotiated,
    private readonly receive: ReceiveBuffer,
    private readonly replies: ReplyQueue,
    private readonly logger: NbdLogger,
    /** Called when a request that went on has been answered: flush, and go on reading. */
    private readonly onSettled: () => void,
  ) {
    const { nbdExport, replyForm, contexts } = negotiated;
    this.device = nbdExport.device;
    this.rules = new RequestRules(nbdExport, replyForm, contexts.length);
    this.writer = new ReplyWriter(replies, replyForm);
    this.holeSearch = new HoleSearch(this.device);
    this.needBytes = this.rules.headerBytes;
  }

  refuseRequests(): void {
    this.rules.isRefusing = true;
  }

  /** Handles the whole requests in slab[start, end); returns where it stopped. */
  consume(slab: Slab, start: number, end: number): number {
    const { view } = slab;
    const { request, rules } = this;
    const { headerBytes, isExtended, magic } = rules;
    let at = start;
    this.isWaiting = false;
    this.handledBytes = 0;
    while (!this.isStopped) {
      if (this.discardBytes > 0) {
        at += this.discard(end - at);
        if (this.discardBytes > 0) break;
      }
      this.needBytes = headerBytes;
      if (end - at < headerBytes) break;
      if (view.getUint32(at) !== magic) {
        this.stop(`a request with magic 0x${view.getUint32(at).toString(16)}`);
        break;
      }
      request.read(view, at, isExtended);
      const error = rules.check(request);
      if (error === 0) {
        this.needBytes = headerBytes + request.payloadBytes;
        if (end - at < this.needBytes) break;
      }
      if (this.isOverBound() || (error === 0 && this.isToBeSentNext())) {
        this.isWaiting = true;
        break;
      }
      if (error !== 0) this.refuse(error);
      else this.handle(slab, at + headerBytes);
      at += this.needBytes;
      this.handledBytes += this.needBytes;
      if (this.handledBytes >= FLUSH_AFTER_BYTES || this.replies.gatheredBytes >= FLUSH_AFTER_BYTES) {
        this.handledBytes = 0;
        this.replies.flush();
      }
    }
    if (this.isStopped) this.needBytes = headerBytes;
    return at;
  }

  private stop(reason: string): void {
    this.isStopped = true;
    this.stopReason = reason;
  }

  private isOverBound(): boolean {
    if (this.requestsInFlight >= MAX_REQUESTS_IN_FLIGHT) return true;
    if (this.replies.queuedWrites >= MAX_WRITES_QUEUED) return true;
    const isOwnBoundReached =
      this.receive.heldBytes + this.replies.heldBytes >= MAX_SLAB_BYTES_PER_CONNECTION;
    if (!isOwnBoundReached && !this.replies.isPoolExhausted) return false;
    // Only what will be given back is worth waiting for.
    return this.requestsInFlight > 0 || this.replies.isBusy;
  }

  /** A read that needs no copy if it waits for the one that is being sent. */
  private isToBeSentNext(): boolean {
    if (!this.replies.isUnfinished || this.request.command !== NBD_CMD_READ) return false;
    return this.cachedRange() !== undefined;
  }

  private refuse(error: number): void {
    const { request, rules } = this;
    const { payloadBytes } = request;
    const limitBytes = rules.isExtended ? MAX_PAYLOAD_BYTES : MAX_DISCARD_BYTES;
    if (payloadBytes > limitBytes) {
      this.stop(`a request with ${payloadBytes} bytes of payload (limit ${limitBytes})`);
    } else if (payloadBytes > 0) {
      // A client may not look for a reply before it has sent the whole request.
      this.discardBytes = payloadBytes;
      this.discardError = error;
      this.discarded = request.copy();
    } else {
      this.writer.error(request, error);
    }
  }

  private discard(availableBytes: number): number {
    const count = Math.min(this.discardBytes, availableBytes);
    this.discardBytes -= count;
    if (this.discardBytes === 0) this.writer.error(this.discarded, this.discardError);
    return count;
  }

  private handle(slab: Slab, payloadAt: number): void {
    switch (this.request.command) {
      case NBD_CMD_READ:
        return this.read();
      case NBD_CMD_DISC:
        return this.stop("");
      case NBD_CMD_BLOCK_STATUS:
        return this.blockStatus(slab, payloadAt);
      default:
        return this.change(slab, payloadAt);
    }
  }

  /** WRITE, WRITE_ZEROES, TRIM, FLUSH and CACHE: their replies have no data. */
  private change(slab: Slab, payloadAt: number): void {
    const { request } = this;
    let completion: Completion;
    try {
      completion = this.callDevice(slab, payloadAt);
    } catch (error) {
      return this.writer.error(request, this.nbdError(error));
    }
    if (completion === undefined) this.writer.success(request);
    else void this.answerLater(completion, request.copy(), slab);
  }

  private callDevice(slab: Slab, payloadAt: number): Completion {
    const { device, request } = this;
    const { command, offsetBytes, lengthBytes } = request;
    if (command === NBD_CMD_FLUSH) return device.flush();
    // Advice without effect: what is read soon is read ahead by the system.
    if (command === NBD_CMD_CACHE || lengthBytes === 0) return undefined;
    let completion: Completion;
    if (command === NBD_CMD_WRITE) {
      completion = device.write(slab.bytes, payloadAt, lengthBytes, offsetBytes);
    } else if (command === NBD_CMD_TRIM) {
      completion = device.discard(offsetBytes, lengthBytes);
    } else {
      const mayUnmap = !request.has(NBD_CMD_FLAG_NO_HOLE);
      completion = device.writeZeroes(offsetBytes, lengthBytes, { mayUnmap });
    }
    if (!request.has(NBD_CMD_FLAG_FUA)) return completion;
    return completion === undefined ? device.flush() : completion.then(() => device.flush());
  }

  private async answerLater(completion: Promise<void>, request: RequestHeader, slab: Slab): Promise<void> {
    this.requestsInFlight++;
    const isWrite = request.command === NBD_CMD_WRITE;
    if (isWrite) this.receive.retain(slab);
    let error = 0;
    try {
      await completion;
    } catch (reason) {
      error = this.nbdError(reason);
    }
    if (isWrite) this.receive.release(slab);
    if (error === 0) this.writer.success(request);
    else this.writer.error(request, error);
    this.settled();
  }

  private read(): void {
    const { replies, request, writer } = this;
    const { offsetBytes, lengthBytes } = request;
    if (lengthBytes === 0) return writer.success(request);
    if (writer.isChunked && lengthBytes >= HOLE_SEARCH_MIN_BYTES && !request.has(NBD_CMD_FLAG_DF)) {
      const plan = this.holeSearch.plan(offsetBytes, lengthBytes);
      if (plan !== undefined) return this.readSparse(plan);
    }
    if (this.sendCached()) return;
    const replyBytes = writer.dataHeaderBytes + lengthBytes;
    const at = replies.reserve(replyBytes);
    const { slab } = replies;
    writer.writeDataHeader(slab.view, at, request, true, offsetBytes, lengthBytes);
    let completion: Completion;
    try {
      completion = this.device.read(slab.bytes, at + writer.dataHeaderBytes, lengthBytes, offsetBytes);
    } catch (error) {
      return writer.error(request, this.nbdError(error));
    }
    if (completion === undefined) replies.commit(replyBytes);
    else void this.sendLater(completion, request.copy(), at, replyBytes);
  }

  /** Sends what the page cache has without a copy, where nothing else is on its way. */
  private sendCached(): boolean {
    const { replies, request, writer, device } = this;
    if (!replies.canSendNow) return false;
    const range = this.cachedRange();
    if (range === undefined) return false;
    const { dataHeaderBytes } = writer;
    const { offsetBytes, lengthBytes } = request;
    const at = replies.reserve(dataHeaderBytes);
    writer.writeDataHeader(replies.slab.view, at, request, true, offsetBytes, lengthBytes);
    replies.sendNow(dataHeaderBytes, new FileReply(device.name, range, lengthBytes));
    return true;
  }

  private cachedRange(): FileRange | undefined {
    const { offsetBytes, lengthBytes } = this.request;
    if (lengthBytes < SEND_CACHED_MIN_BYTES) return undefined;
    return this.device.cachedRange?.(offsetBytes, lengthBytes);
  }

  private readSparse(plan: SparseRead): void {
    const { replies, request, writer } = this;
    const replyBytes = sparseReplyBytes(plan, writer);
    const at = replies.reserve(replyBytes);
    let completion: Completion;
    try {
      completion = startSparseRead(plan, this.device, replies.slab, at, writer, request);
    } catch (error) {
      return writer.error(request, this.nbdError(error));
    }
    if (completion === undefined) replies.commit(replyBytes);
    else void this.sendLater(completion, request.copy(), at, replyBytes);
  }

  /** Sends slab[at, +replyBytes), already laid out, once the device has filled it. */
  private async sendLater(
    completion: Promise<void>,
    request: RequestHeader,
    at: number,
    replyBytes: number,
  ): Promise<void> {
    this.requestsInFlight++;
    const slab = this.replies.detach(replyBytes);
    try {
      await completion;
      this.replies.sendDetached(slab, at, replyBytes);
    } catch (error) {
      this.replies.dropDetached(slab);
      this.writer.error(request, this.nbdError(error));
    }
    this.settled();
  }

  private blockStatus(slab: Slab, payloadAt: number): void {
    const { request, writer, rules } = this;
    const query = new StatusQuery(this.device, this.negotiated.contexts, request);
    const error = query.readPayload(slab.view, payloadAt, (whole) => !rules.isBeyondEnd(whole));
    if (error !== 0) return writer.error(request, error);
    try {
      const rest = query.gather();
      if (rest === undefined) query.answer(writer);
      else void this.answerStatusLater(query, rest);
    } catch (failure) {
      writer.error(request, this.nbdError(failure));
    }
  }

  private async answerStatusLater(query: StatusQuery, completion: Promise<void>): Promise<void> {
    this.requestsInFlight++;
    try {
      await completion;
      query.answer(this.writer);
    } catch (error) {
      this.writer.error(query.request, this.nbdError(error));
    }
    this.settled();
  }

  private settled(): void {
    this.requestsInFlight--;
    this.onSettled();
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
