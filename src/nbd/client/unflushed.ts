// What a server has acknowledged and not flushed, and whether a server that is connected to again still has it.
//
//   begin ─► (the request) ─► written, zeroed ─► noted ─startFlush─► … ─flushed─► forgotten
//                                                  └── connection lost, made again ─► lostBy: read back
//
// Only a flush makes a write last. A connection may be lost because the network failed, with the server as it was, or
// because the server did, with all that lay in its caches; the protocol has no way to tell. So after a reconnection,
// before anything else is asked, what was noted is read back and compared. If it is there, the new connection's flush
// covers it as if nothing had happened. If not, the owner knows of the loss and must not claim otherwise.
//
// A note is a digest of the piece, cut at multiples of `unitBytes`. A request on its way leaves what it touches not
// known: it may have been carried out, and is sent again or fails. Bounded: beyond maxPieces or maxBytes the owner is
// told to flush (`isFull`); at twice that, what comes is not noted, and counts as lost after a reconnection.
// One event loop.

import { crc32 } from "node:zlib";
import { CowcatcherError } from "../../errors.js";
import { readRange } from "./io.js";
import type { NbdClient } from "./client.js";

/** A number that is another for other data: of buffer[from, to), 0 or above. */
export type PieceDigest = (buffer: Uint8Array, from: number, to: number) => number;

interface Piece {
  from: number;
  to: number;
  digest: number;
  /** Of which a flush that was started later covers it. */
  epoch: number;
}

export interface UnflushedBounds {
  unitBytes: number;
  maxPieces: number;
  maxBytes: number;
  digest: PieceDigest;
}

const ZEROES = -1;
/** Written over in part: no digest is left of the rest. */
const NOT_KNOWN = -2;
const READS_IN_FLIGHT = 16;
const SECTOR_BYTES = 512;

/** Every byte counts; some 3 GB/s. */
export const digestOfAll: PieceDigest = (buffer, from, to) => crc32(buffer.subarray(from, to));

/**
 * Four bytes of each sector count: a tenth of the time, for who cannot spend it. Storage loses pages, not bytes;
 * a page passes unseen if what it held before has the same at all eight places.
 */
export const digestOfSample: PieceDigest = (buffer, from, to) => {
  let hash = to - from;
  for (let at = from; at + 4 <= to; at += SECTOR_BYTES) {
    const word = buffer[at] | (buffer[at + 1] << 8) | (buffer[at + 2] << 16) | (buffer[at + 3] << 24);
    hash = Math.imul(hash ^ word, 0x9e37_79b1);
    hash ^= hash >>> 15;
  }
  return (hash ^ (buffer[to - 1] ?? 0)) >>> 0;
};

/**
 * What a server has answered but not flushed, to be written again after a lost connection. One thread;
 * bounded.
 */
export class UnflushedWrites {
  readonly #bounds: UnflushedBounds;
  readonly #units = new Map<number, Piece[]>();
  #pieceCount = 0;
  #byteCount = 0;
  #epoch = 0;
  /** Changes up to this epoch were not all noted; -1: they were. */
  #unnotedEpoch = -1;

  constructor(bounds: UnflushedBounds) {
    this.#bounds = bounds;
  }

  /** It is time for a flush. */
  get isFull(): boolean {
    const { maxPieces, maxBytes } = this.#bounds;
    return this.#unnotedEpoch >= 0 || this.#pieceCount >= maxPieces || this.#byteCount >= maxBytes;
  }

  /** A change of [offset, +length) is about to be asked for. */
  begin(offsetBytes: number, lengthBytes: number): void {
    if (this.#units.size === 0) return;
    const end = offsetBytes + lengthBytes;
    const { unitBytes } = this.#bounds;
    if (lengthBytes / unitBytes > this.#units.size) {
      for (const unit of [...this.#units.keys()]) this.#blur(unit, offsetBytes, end);
      return;
    }
    for (let unit = Math.floor(offsetBytes / unitBytes); unit * unitBytes < end; unit++) {
      this.#blur(unit, offsetBytes, end);
    }
  }

  #blur(unit: number, from: number, to: number): void {
    const pieces = this.#units.get(unit);
    if (pieces === undefined) return;
    const kept = pieces.filter((piece) => piece.from < from || piece.to > to);
    for (const piece of kept) if (piece.from < to && piece.to > from) piece.digest = NOT_KNOWN;
    this.#replace(unit, pieces, kept);
  }

  /** buffer[bufferOffset, +length) stands at `offsetBytes`, the server says. */
  written(offsetBytes: number, lengthBytes: number, buffer: Uint8Array, bufferOffset: number): void {
    const shift = bufferOffset - offsetBytes;
    this.#note(offsetBytes, lengthBytes, (from, to) => this.#bounds.digest(buffer, from + shift, to + shift));
  }

  zeroed(offsetBytes: number, lengthBytes: number): void {
    this.#note(offsetBytes, lengthBytes, () => ZEROES);
  }

  #note(offsetBytes: number, lengthBytes: number, digest: (from: number, to: number) => number): void {
    const { unitBytes, maxPieces } = this.#bounds;
    const end = offsetBytes + lengthBytes;
    if (this.#pieceCount + lengthBytes / unitBytes > 2 * maxPieces) {
      this.#unnotedEpoch = this.#epoch;
      return;
    }
    for (let from = offsetBytes; from < end;) {
      const unit = Math.floor(from / unitBytes);
      const to = Math.min(end, (unit + 1) * unitBytes);
      this.#blur(unit, from, to);
      const piece = { from, to, digest: digest(from, to), epoch: this.#epoch };
      const pieces = this.#units.get(unit);
      if (pieces === undefined) this.#units.set(unit, [piece]);
      else pieces.push(piece);
      this.#pieceCount++;
      this.#byteCount += to - from;
      from = to;
    }
  }

  /** To be called before a flush is asked for, and its answer given to `flushed` when that has succeeded. */
  startFlush(): number {
    return this.#epoch++;
  }

  flushed(epoch: number): void {
    if (this.#unnotedEpoch <= epoch) this.#unnotedEpoch = -1;
    for (const [unit, pieces] of this.#units) {
      const kept = pieces.filter((piece) => piece.epoch > epoch);
      if (kept.length < pieces.length) this.#replace(unit, pieces, kept);
    }
  }

  #replace(unit: number, old: readonly Piece[], kept: Piece[]): void {
    if (kept.length === old.length) return;
    const bytesOf = (pieces: readonly Piece[]): number =>
      pieces.reduce((sum, { from, to }) => sum + to - from, 0);
    this.#pieceCount -= old.length - kept.length;
    this.#byteCount -= bytesOf(old) - bytesOf(kept);
    if (kept.length === 0) this.#units.delete(unit);
    else this.#units.set(unit, kept);
  }

  /**
   * Reads back what was noted, while nothing else is asked of the server. @returns the loss, if there is one.
   * @throws CowcatcherError the connection was lost again.
   */
  async lostBy(client: NbdClient): Promise<CowcatcherError | undefined> {
    if (this.#unnotedEpoch >= 0) return loss(client, undefined);
    const pieces = [...this.#units.values()].flat();
    let next = 0;
    let lostFrom: number | undefined;
    const lane = async (): Promise<void> => {
      const buffer = new Uint8Array(this.#bounds.unitBytes);
      for (let piece = pieces[next++]; piece !== undefined; piece = pieces[next++]) {
        if (await this.#isThere(client, piece, buffer)) continue;
        lostFrom = Math.min(lostFrom ?? Infinity, piece.from);
      }
    };
    await Promise.all(Array.from({ length: Math.min(READS_IN_FLIGHT, pieces.length) }, lane));
    return lostFrom === undefined ? undefined : loss(client, lostFrom);
  }

  async #isThere(client: NbdClient, { from, to, digest }: Piece, buffer: Uint8Array): Promise<boolean> {
    if (digest === NOT_KNOWN) return false;
    const length = to - from;
    try {
      await readRange(client, buffer, 0, length, from);
    } catch (error) {
      if (client.failure !== undefined) throw error;
      return false;
    }
    if (digest === ZEROES) return buffer.subarray(0, length).every((byte) => byte === 0);
    return this.#bounds.digest(buffer, 0, length) === digest;
  }

  /** The owner has heard of the loss. */
  clear(): void {
    this.#units.clear();
    this.#pieceCount = this.#byteCount = 0;
    this.#unnotedEpoch = -1;
  }
}

function loss(client: NbdClient, offsetBytes: number | undefined): CowcatcherError {
  return new CowcatcherError({
    code: "VERIFY",
    object: client.name,
    problem:
      offsetBytes === undefined
        ? "connected again, and it cannot be known whether the server still has all that it had acknowledged"
        : "connected again, the server does not have what it had acknowledged and not flushed",
    hint: "the server, or its machine, has crashed",
    offsetBytes,
    errno: "EIO",
  });
}
