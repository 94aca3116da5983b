// A worker's way of reading from a server on the same machine: requests and replies by blocking system calls on the
// socket itself, past Node's streams and the event loop, which cost a worker more than the kernel's copy does.
//
// It knows the conversation in which nothing goes wrong: reads, whose data and holes come in ascending order within
// each request, the requests in any order. Whatever else happens (an error, a lost or silent server, a reply that
// should not be) ends this connection, and `read` says so: the caller asks again on the ordinary client
// (client/session.ts), which has the words, the retries and the errors. Reading twice does no harm. After an error the
// other replies are still taken, and only then is goodbye said: a server may not expect it while it answers. To a
// server whose replies cannot be followed nothing is said.
//
// A read's pieces are in flight together. One that waits blocks its thread, in slices of TIMEOUT_MS, so that
// cancelling is noticed: this is for Unix sockets, where the way there and back is no time, and for a thread that waits for
// no other server. (To keep a second read in flight meanwhile was no faster.) One thread.
// Specification: doc/proto.md of NetworkBlockDevice/nbd, "Transmission phase".

import type { Socket } from "node:net";
import { EAGAIN, EINTR, libc, type Libc } from "../../native/libc.js";
import { roundDown, roundUp } from "../../units.js";
import { PIECE_BYTES } from "./io.js";
import { openConnection } from "./client.js";
import {
  NBD_CMD_DISC,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_FLAG_SEND_TRIM,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_REQUEST_MAGIC,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  readUint64,
  REQUEST_HEADER_BYTES,
  SIMPLE_REPLY_BYTES,
  STRUCTURED_REPLY_HEADER_BYTES,
  writeUint64,
} from "../wire/protocol.js";
import type { NbdAddress } from "../wire/uri.js";

const PIECES_IN_FLIGHT = 16;
/** Discards that are not awaited: as many as are told of before their answers are looked at. */
const TRIMS_IN_FLIGHT = 8;
/** How long a system call waits before it is asked whether to give up. */
const TIMEOUT_MS = 100;
/** Of a server that sends nothing at all, as NbdClient's. */
const SILENCE_LIMIT_MS = 120_000;
const NBD_REPLY_TYPE_ERROR_BIT = 0x8000;
/** Of an error chunk: a message of 64 KiB at most, and what stands before and behind it. */
const MAX_ERROR_BYTES = 65_536 + 16;
const OFFSET_BYTES = 8;
const HOLE_BYTES = 12;
/** The header of a piece of data: what is read of a reply before it is known what it is. */
const STAGING_BYTES = STRUCTURED_REPLY_HEADER_BYTES + OFFSET_BYTES;

/** Not documented; where it does not look like this, there is no blocking reader. */
interface SocketWithHandle {
  _handle?: { fd?: number; readStop?: () => unknown } | null;
}

/** Nothing reads or writes the socket through Node from here on; it only closes it. -1: that cannot be. */
function takeDescriptor({ _handle: handle }: SocketWithHandle): number {
  if (typeof handle?.fd !== "number" || typeof handle.readStop !== "function") return -1;
  // A socket that is paused goes on reading until its queue is full.
  handle.readStop();
  return handle.fd;
}

/** The server is on this machine, and its socket is its own. */
export function isForBlocking(address: NbdAddress): boolean {
  return "path" in address && address.tls === undefined;
}

export class BlockingReader {
  readonly #libc: Libc;
  readonly #socket: Socket;
  readonly #fd: number;
  readonly #structured: boolean;
  readonly #minimumBlockBytes: number;
  readonly #pieceBytes: number;
  readonly #isCancelled: () => boolean;
  readonly #staysOpen: boolean;
  readonly #canTrim: boolean;
  #isBroken = false;
  readonly #requests = new DataView(new ArrayBuffer(PIECES_IN_FLIGHT * REQUEST_HEADER_BYTES));
  readonly #staging = new DataView(new ArrayBuffer(STAGING_BYTES + HOLE_BYTES));
  #staged = 0;
  /** Of the pieces in flight: bytes that have come, and bytes asked for (0: answered). */
  readonly #positions = new Float64Array(PIECES_IN_FLIGHT);
  readonly #lengths = new Float64Array(PIECES_IN_FLIGHT);
  #round = 0;
  #trimsOpen = 0;
  /** The chunk in hand is its request's last. */
  #isDone = false;
  /** The server could not carry out one of the requests in flight. */
  #hasError = false;

  private constructor(
    native: Libc,
    socket: Socket,
    fd: number,
    { structured, info }: Awaited<ReturnType<typeof openConnection>>,
    isCancelled: () => boolean,
    staysOpen: boolean,
  ) {
    this.#libc = native;
    this.#socket = socket;
    this.#fd = fd;
    this.#structured = structured;
    this.#minimumBlockBytes = info.minimumBlockBytes;
    this.#pieceBytes = roundDown(Math.min(PIECE_BYTES, info.maximumPayloadBytes), info.minimumBlockBytes);
    this.#isCancelled = isCancelled;
    this.#staysOpen = staysOpen;
    this.#canTrim = (info.transmissionFlags & NBD_FLAG_SEND_TRIM) !== 0;
  }

  /**
   * A connection to the export of `sizeBytes`. Null: this is no place for it (no native calls, TCP, TLS, blocks
   * larger than a piece, another export).
   * @param staysOpen it is not this side that hangs up, whatever happens
   * @throws CowcatcherError as NbdClient.connect
   */
  static async open(
    address: NbdAddress,
    name: string,
    sizeBytes: number,
    isCancelled: () => boolean,
    staysOpen = false,
  ): Promise<BlockingReader | null> {
    if (libc === null || !isForBlocking(address)) return null;
    const negotiation = { isCancelled, staysOpen, structured: true, contexts: [] };
    const connection = await openConnection(address, name, negotiation);
    const { socket, info } = connection;
    const fd = takeDescriptor(socket as unknown as SocketWithHandle);
    const fits = info.sizeBytes === sizeBytes && info.minimumBlockBytes <= PIECE_BYTES;
    if (fd < 0 || !fits || socket.readableLength > 0) {
      socket.destroy();
      return null;
    }
    libc.makeBlocking(fd, TIMEOUT_MS);
    return new BlockingReader(libc, socket, fd, connection, isCancelled, staysOpen);
  }

  /** True: the buffer has the range. False: this connection is closed now, and nothing is known. */
  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): boolean {
    // Its descriptor may be another file's by now.
    if (this.#isBroken || this.#socket.destroyed || !this.#settleTrims()) return false;
    const unit = this.#minimumBlockBytes;
    const end = offsetBytes + lengthBytes;
    const isAligned = offsetBytes % unit === 0 && end % unit === 0;
    let at = offsetBytes;
    while (isAligned && at < end) {
      const start = at;
      let count = 0;
      while (at < end && count < PIECES_IN_FLIGHT) {
        // Cut at multiples of the piece, so that pieces stay aligned whatever the start is.
        const next = Math.min(end, roundDown(at, this.#pieceBytes) + this.#pieceBytes);
        this.#putRequest(count++, at, next - at);
        at = next;
      }
      this.#hasError = false;
      if (!this.#send(count) || !this.#receiveAll(count, buffer, bufferOffset + start - offsetBytes)) {
        this.#isBroken = true;
        if (!this.#staysOpen) this.#socket.destroy();
        return false;
      }
      if (this.#hasError) break;
      if (at === end) return true;
    }
    this.close();
    return false;
  }

  /** Has the whole blocks of the range discarded, some time soon. False: it is not known to be done. */
  trim(offsetBytes: number, lengthBytes: number): boolean {
    if (!this.#canTrim || this.#isBroken || this.#socket.destroyed) return false;
    const unit = this.#minimumBlockBytes;
    const start = roundUp(offsetBytes, unit);
    const end = roundDown(offsetBytes + lengthBytes, unit);
    if (end <= start) return true;
    if (this.#trimsOpen === TRIMS_IN_FLIGHT && !this.#settleTrims()) return false;
    this.#putRequest(this.#trimsOpen, start, end - start, NBD_CMD_TRIM);
    if (this.#send(1, this.#trimsOpen)) {
      this.#trimsOpen++;
      return true;
    }
    this.close();
    return false;
  }

  /** Takes the answers to all that was discarded: nothing else may come on the connection before them. */
  #settleTrims(): boolean {
    if (this.#trimsOpen === 0) return true;
    const view = this.#staging;
    let open = this.#trimsOpen;
    // Answered without structure whatever was negotiated: only an error has one (and is 20 bytes at least).
    for (; open > 0 && this.#stage(SIMPLE_REPLY_BYTES, SIMPLE_REPLY_BYTES); open--) {
      const isOurs = view.getUint32(8) === this.#round && view.getUint32(12) < this.#trimsOpen;
      const isAnswered = view.getUint32(0) === NBD_SIMPLE_REPLY_MAGIC && view.getUint32(4) === 0;
      if (!isOurs || !isAnswered) break;
      this.#unstage(SIMPLE_REPLY_BYTES);
    }
    this.#trimsOpen = 0;
    this.#round = (this.#round + 1) >>> 0;
    if (open === 0) return true;
    this.close();
    return false;
  }

  /** Says goodbye. Nothing may be in flight. */
  close(): void {
    this.#isBroken = true;
    if (this.#socket.destroyed || this.#staysOpen) return;
    const goodbye = new DataView(new ArrayBuffer(REQUEST_HEADER_BYTES));
    goodbye.setUint32(0, NBD_REQUEST_MAGIC);
    goodbye.setUint16(6, NBD_CMD_DISC);
    this.#libc.send(this.#fd, goodbye.buffer, 0, REQUEST_HEADER_BYTES);
    this.#socket.destroy();
  }

  #putRequest(index: number, offsetBytes: number, lengthBytes: number, command = NBD_CMD_READ): void {
    const view = this.#requests;
    const at = index * REQUEST_HEADER_BYTES;
    view.setUint32(at, NBD_REQUEST_MAGIC);
    view.setUint16(at + 4, 0);
    view.setUint16(at + 6, command);
    view.setUint32(at + 8, this.#round);
    view.setUint32(at + 12, index);
    writeUint64(view, at + 16, offsetBytes);
    view.setUint32(at + 24, lengthBytes);
    this.#positions[index] = 0;
    this.#lengths[index] = lengthBytes;
  }

  #send(count: number, first = 0): boolean {
    const length = count * REQUEST_HEADER_BYTES;
    // A server that does not take a few hundred bytes at once is none to wait for here.
    const start = first * REQUEST_HEADER_BYTES;
    return this.#libc.send(this.#fd, this.#requests.buffer, start, length) === length;
  }

  /** The replies to `count` requests, the first of which starts at `bufferOffset`. */
  #receiveAll(count: number, buffer: Uint8Array, bufferOffset: number): boolean {
    const base = buffer.byteOffset + bufferOffset;
    const firstOffset = readUint64(this.#requests, 16);
    let open = count;
    while (open > 0) {
      const index = this.#receiveChunk(buffer.buffer, base, firstOffset, count);
      if (index < 0) return false;
      if (this.#lengths[index] === 0) open--;
    }
    this.#round = (this.#round + 1) >>> 0;
    return true;
  }

  /** One reply, or one chunk of one: the request's index, or -1 for what ends the connection. */
  #receiveChunk(buffer: ArrayBufferLike, base: number, firstOffset: number, count: number): number {
    const view = this.#staging;
    const headerBytes = this.#structured ? STRUCTURED_REPLY_HEADER_BYTES : SIMPLE_REPLY_BYTES;
    if (!this.#stage(headerBytes)) return -1;
    const index = view.getUint32(12);
    if (view.getUint32(8) !== this.#round || index >= count || this.#lengths[index] === 0) return -1;
    const start = readUint64(this.#requests, index * REQUEST_HEADER_BYTES + 16);
    const length = this.#lengths[index] ?? 0;
    const position = this.#positions[index] ?? 0;
    let coveredBytes = length;
    if (!this.#structured) {
      if (view.getUint32(0) !== NBD_SIMPLE_REPLY_MAGIC) return -1;
      const isError = view.getUint32(4) !== 0;
      this.#unstage(headerBytes);
      // An error comes without data, and answers the request.
      if (isError) this.#hasError = true;
      else if (!this.#receive(buffer, base + start - firstOffset, length)) return -1;
    } else {
      if (view.getUint32(0) !== NBD_STRUCTURED_REPLY_MAGIC) return -1;
      const type = view.getUint16(6);
      const payloadBytes = view.getUint32(16);
      const at = base + start - firstOffset + position;
      coveredBytes = this.#receivePayload(
        buffer,
        at,
        type,
        payloadBytes,
        start + position,
        length - position,
      );
      if (coveredBytes < 0) return -1;
      coveredBytes += position;
    }
    this.#positions[index] = coveredBytes;
    const isDone = !this.#structured || this.#isDone;
    if (isDone && coveredBytes !== length && !this.#hasError) return -1;
    if (isDone) this.#lengths[index] = 0;
    return index;
  }

  /** @returns bytes of the request that this chunk covers; -1: it must not be */
  #receivePayload(
    buffer: ArrayBufferLike,
    at: number,
    type: number,
    payloadBytes: number,
    expectedOffset: number,
    expectedBytes: number,
  ): number {
    const view = this.#staging;
    this.#isDone = (view.getUint16(4) & NBD_REPLY_FLAG_DONE) !== 0;
    const header = STRUCTURED_REPLY_HEADER_BYTES;
    if (type === NBD_REPLY_TYPE_NONE) {
      this.#unstage(header);
      return payloadBytes === 0 && this.#isDone ? 0 : -1;
    }
    if (type === NBD_REPLY_TYPE_OFFSET_DATA) {
      const dataBytes = payloadBytes - OFFSET_BYTES;
      if (dataBytes < 1 || dataBytes > expectedBytes || !this.#stage(header + OFFSET_BYTES)) return -1;
      if (readUint64(view, header) !== expectedOffset) return -1;
      this.#unstage(header + OFFSET_BYTES);
      return this.#receive(buffer, at, dataBytes) ? dataBytes : -1;
    }
    if ((type & NBD_REPLY_TYPE_ERROR_BIT) !== 0) {
      this.#hasError = true;
      this.#unstage(header);
      return this.#skip(payloadBytes) ? 0 : -1;
    }
    if (type !== NBD_REPLY_TYPE_OFFSET_HOLE || payloadBytes !== HOLE_BYTES) return -1;
    if (!this.#stage(header + HOLE_BYTES) || readUint64(view, header) !== expectedOffset) return -1;
    const holeBytes = view.getUint32(header + OFFSET_BYTES);
    if (holeBytes < 1 || holeBytes > expectedBytes) return -1;
    this.#unstage(header + HOLE_BYTES);
    new Uint8Array(buffer, at, holeBytes).fill(0);
    return holeBytes;
  }

  /** Sees to it that the staging holds so many bytes; of the header after it, no more than fits may be there too. */
  #stage(byteCount: number, mostBytes?: number): boolean {
    const startMs = performance.now();
    while (this.#staged < byteCount) {
      // Not past the shortest reply that may follow: payload is not to land here.
      const header = this.#structured ? STRUCTURED_REPLY_HEADER_BYTES : SIMPLE_REPLY_BYTES;
      const most = mostBytes ?? Math.max(byteCount, header);
      const got = this.#libc.receive(this.#fd, this.#staging.buffer, this.#staged, most - this.#staged);
      if (got > 0) this.#staged += got;
      else if (!this.#mayWait(got, startMs)) return false;
    }
    return true;
  }

  #unstage(byteCount: number): void {
    new Uint8Array(this.#staging.buffer).copyWithin(0, byteCount, this.#staged);
    this.#staged -= byteCount;
  }

  #receive(buffer: ArrayBufferLike, at: number, lengthBytes: number): boolean {
    let startMs = performance.now();
    let done = 0;
    while (done < lengthBytes) {
      const got = this.#libc.receive(this.#fd, buffer, at + done, lengthBytes - done);
      if (got > 0) {
        done += got;
        startMs = performance.now();
      } else if (!this.#mayWait(got, startMs)) {
        return false;
      }
    }
    return true;
  }

  /** Of an error's explanation, which the ordinary client asks for again. */
  #skip(lengthBytes: number): boolean {
    if (lengthBytes > MAX_ERROR_BYTES) return false;
    const fromStaging = Math.min(lengthBytes, this.#staged);
    this.#unstage(fromStaging);
    return this.#receive(new ArrayBuffer(lengthBytes), 0, lengthBytes - fromStaging);
  }

  #mayWait(result: number, startMs: number): boolean {
    if (result !== -EAGAIN && result !== -EINTR) return false;
    return !this.#isCancelled() && performance.now() - startMs < SILENCE_LIMIT_MS;
  }
}
