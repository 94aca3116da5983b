// Replies on their way to the socket.
//
// Replies are laid out one behind another in a slab; `flush` hands the socket everything that has gathered, in one
// write where it is one stretch. A reply whose data the device fills in later is detached: its stretch is left out
// and sent on its own when it is ready (NBD lets replies leave in any order).
//
//   slab   | sealed, with the socket | detached, device reads into it | gathering ....| free |
//                                                                     ^segmentStart    ^end
//
// A reply whose data the page cache has goes to the socket's descriptor itself (file-reply.ts), when nothing else is on its way.
// While the socket has no room for all of it, everything else waits.
//
// A slab's references: one while it is the current slab, one a sealed segment, one a detached stretch. The one that
// gives back the last reference gives the slab back to the pool. `reserve` and the `commit` or `detach` that belongs
// to it happen in one turn with nothing between them.
//
// Main thread only.

import { sendFile } from "../../native/send-file.js";
import { descriptorOf } from "../wire/direct-socket.js";
import type { FileReply } from "./file-reply.js";
import { MAX_NEGOTIATION_REPLY_BYTES, MAX_WRITES_QUEUED } from "./limits.js";
import type { Slab, SlabPool } from "./slab.js";

/** The part of a socket that replies need. */
export interface ReplySocket {
  write(bytes: Buffer, written: (error?: Error | null) => void): unknown;
  cork(): void;
  uncork(): void;
}

export class ReplyQueue {
  /** Capacity of the slabs that this queue holds. */
  heldBytes = 0;
  /** The socket has given a write back: nobody takes replies any more. It says so before it says that it is closed. */
  isBroken = false;
  private current: Slab | undefined;
  private segmentStart = 0;
  private end = 0;
  private ready: { slab: Slab; start: number; end: number }[] = [];
  /** Slabs of the writes that the socket has not taken yet, oldest first; `writtenCount` of them are done. */
  private writing: Slab[] = [];
  private writtenCount = 0;
  private isClosed = false;
  private unfinished: FileReply | undefined;
  private readonly onWritten = (error?: Error | null): void => {
    if (error !== undefined && error !== null) this.isBroken = true;
    this.written();
  };

  constructor(
    private readonly pool: SlabPool,
    private socket: ReplySocket,
    /** Called whenever the socket has taken a write. */
    private readonly onProgress: () => void,
    /** Called when a reply that was begun cannot be completed: the queue is closed. */
    private readonly onFailure: (error: unknown) => void = () => undefined,
  ) {}

  /** The socket has not yet taken everything. */
  get isBusy(): boolean {
    const { writing, writtenCount, ready } = this;
    return (
      writing.length > writtenCount || ready.length > 0 || this.end > this.segmentStart || this.isUnfinished
    );
  }

  /** The server's slabs are nearly used up. */
  get isPoolExhausted(): boolean {
    return this.pool.isExhausted;
  }

  get isFullForOptions(): boolean {
    return this.heldBytes >= MAX_NEGOTIATION_REPLY_BYTES;
  }

  /** What follows goes to another socket (the same connection, over TLS now). Not while busy. */
  useSocket(socket: ReplySocket): void {
    if (this.isBusy) throw new TypeError("replies are on their way to the old socket");
    this.socket = socket;
  }

  /** Writes that the socket has not taken yet, or that wait for a reply that has not left. */
  get queuedWrites(): number {
    return this.writing.length - this.writtenCount + this.ready.length;
  }

  /** The slab that the last `reserve` reserved in. */
  get slab(): Slab {
    if (this.current === undefined) throw new TypeError("nothing is reserved");
    return this.current;
  }

  /** Makes room for a reply of lengthBytes and returns where it goes in `slab`. */
  reserve(lengthBytes: number): number {
    if (this.current !== undefined && this.end + lengthBytes > this.current.capacityBytes) {
      this.seal();
      const full = this.current;
      this.current = undefined;
      this.release(full);
    }
    if (this.current === undefined) {
      this.current = this.pool.take(lengthBytes);
      this.current.references = 1;
      this.heldBytes += this.current.capacityBytes;
      this.segmentStart = 0;
      this.end = 0;
    }
    return this.end;
  }

  /** The first lengthBytes of what was reserved are a reply to send. */
  commit(lengthBytes: number): void {
    this.end += lengthBytes;
  }

  /** Leaves lengthBytes of what was reserved to a device; `sendDetached` or `dropDetached` must follow. */
  detach(lengthBytes: number): Slab {
    const { slab } = this;
    this.seal();
    slab.references++;
    this.end += lengthBytes;
    this.segmentStart = this.end;
    return slab;
  }

  sendDetached(slab: Slab, start: number, lengthBytes: number): void {
    this.ready.push({ slab, start, end: start + lengthBytes });
  }

  dropDetached(slab: Slab): void {
    this.release(slab);
  }

  /** A reply made elsewhere; copied. */
  append(bytes: Uint8Array): void {
    const at = this.reserve(bytes.length);
    this.slab.bytes.set(bytes, at);
    this.commit(bytes.length);
  }

  /** Bytes that gathered since the last flush, in the current slab. */
  get gatheredBytes(): number {
    return this.end - this.segmentStart;
  }

  /** Nothing is on its way to the socket: what is written to its descriptor now comes next. */
  get canSendNow(): boolean {
    return !this.isBusy && !this.isClosed && !this.isBroken && descriptorOf(this.socket) !== undefined;
  }

  /** A reply that `sendNow` has begun has not left yet. Others wait for it. */
  get isUnfinished(): boolean {
    return this.unfinished !== undefined;
  }

  /**
   * Sends a reply whose head was reserved last, headerBytes long, and whose data are a file's: as much as the socket has room
   * for, and the rest when it has. Only where `canSendNow`.
   */
  sendNow(headerBytes: number, data: FileReply): void {
    const { slab, end: at } = this;
    const socketFd = descriptorOf(this.socket);
    const { buffer, byteOffset } = slab.bytes;
    const result =
      socketFd === undefined ? 0 : sendFile()?.sendHead(socketFd, buffer, byteOffset + at, headerBytes);
    const sent = Math.max(0, result ?? 0);
    this.unfinished = data;
    if (sent < headerBytes) this.writeNow(at + sent, at + headerBytes);
    else this.sendOn(data);
  }

  private sendOn(data: FileReply): void {
    try {
      if (data.sendTo(descriptorOf(this.socket)) === "done") {
        this.unfinished = undefined;
        this.giveBackIdle();
        this.flush();
      } else {
        this.seal();
        const at = this.reserve(data.copyBytes);
        this.writeNow(at, at + data.copyNext(this.slab.bytes, at));
      }
    } catch (error) {
      // The client has the head of a reply that says that it went well.
      this.close();
      this.onFailure(error);
    }
  }

  /** What was reserved last, past what is ready. */
  private writeNow(start: number, end: number): void {
    const { slab } = this;
    slab.references++;
    this.segmentStart = this.end = end;
    this.writing.push(slab);
    this.socket.write(slab.bytes.subarray(start, end), this.onWritten);
  }

  /** The current slab, where no reply is in it. */
  private giveBackIdle(): void {
    const { current } = this;
    if (current === undefined || current.references > 1 || this.end !== this.segmentStart) return;
    this.current = undefined;
    this.release(current);
  }

  flush(): void {
    this.seal();
    if (this.ready.length === 0 || this.isUnfinished) return;
    const segments = this.ready;
    this.ready = [];
    if (this.isClosed) {
      for (const { slab } of segments) this.release(slab);
      return;
    }
    if (segments.length > 1) this.socket.cork();
    for (const { slab, start, end } of segments) {
      this.writing.push(slab);
      this.socket.write(slab.bytes.subarray(start, end), this.onWritten);
    }
    if (segments.length > 1) this.socket.uncork();
  }

  /** The socket is gone: replies are dropped from now on. */
  close(): void {
    this.isClosed = true;
    this.unfinished = undefined;
    this.flush();
    while (this.writtenCount < this.writing.length) this.written();
    const { current } = this;
    this.current = undefined;
    if (current !== undefined) this.release(current);
  }

  private seal(): void {
    if (this.current === undefined || this.end === this.segmentStart) return;
    this.current.references++;
    this.ready.push({ slab: this.current, start: this.segmentStart, end: this.end });
    this.segmentStart = this.end;
  }

  private written(): void {
    const slab = this.writing[this.writtenCount];
    // A socket calls back for writes that `close` has accounted for already.
    if (slab === undefined) return;
    this.writtenCount++;
    if (this.writtenCount === this.writing.length || this.writtenCount >= MAX_WRITES_QUEUED) {
      this.writing.splice(0, this.writtenCount);
      this.writtenCount = 0;
    }
    this.release(slab);
    const { unfinished, isBroken } = this;
    const isSent = this.writing.length === this.writtenCount;
    if (unfinished !== undefined && isSent && !isBroken) this.sendOn(unfinished);
    this.onProgress();
  }

  private release(slab: Slab): void {
    slab.references--;
    // The current slab, once nobody else needs it, goes back too: the next reply starts at a slab's beginning.
    if (slab === this.current && slab.references === 1 && this.end === this.segmentStart) {
      this.current = undefined;
      slab.references = 0;
    }
    if (slab.references > 0) return;
    this.heldBytes -= slab.capacityBytes;
    this.pool.give(slab);
  }
}
