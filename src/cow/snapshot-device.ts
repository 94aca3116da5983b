// The disk as it was at T0, as a read-only device: what a guest write has changed since comes from the captures,
// all else from the image that the guest goes on writing to. Main thread only.
//
// It reads what an interceptor without workers has captured (backup/job/snapshot.ts). Nothing is drained there: a block
// that was captured once stays where it is until the snapshot ends, so there are three kinds of block only:
//
//   not held ──capture──► in a slot, or in the spill          and never back
//
// The rule that makes it right: a block that is not held has not changed since T0. The main thread alone captures and
// lets the guest's write go on only afterwards, so between two turns of the event loop the rule holds.
//
// Reading a range: read the image where blocks are not held, then lay the captures over it. When the image's read is
// done at once, nothing came between. When it goes on asynchronously, the guest may write meanwhile, and what was read
// may be new, or torn. So the captures are looked up again after the read: a block that is not held even then had not
// changed while it was read, and one that is held now gets its captured content. Status is asked the same way.
//
// The snapshot can be lost: a capture that fails, a spill at its limit. The interceptor detaches before the guest's
// write goes on. `source.detached` is therefore looked at after every wait and before every answer: from that moment
// each request fails with EIO, and no byte newer than T0 ever passes for T0's.
//
// A reader takes time from the guest, as both live on one thread: a request is served a chunk (1 MiB) a turn of the
// event loop. What stands in the spill is read by the thread that the spill has (backup/storage/remote-spill.ts).

import { CowcatcherError, toCowcatcherError } from "../errors.js";
import type { BlockDevice, BlockStatus, Completion } from "../block/device.js";
import { BLOCK_BYTES } from "./geometry.js";
import { captureLength, captureStart, type SharedState, SPILLED } from "./shared.js";
import type { SpillPlace } from "./spill.js";

export interface SnapshotDeviceOptions {
  /** What errors call it. */
  name: string;
  /** The image itself, below every interceptor. */
  image: BlockDevice;
  shared: SharedState;
  /** Undefined where captures never spill. */
  spill: SpillPlace | undefined;
  /** The interceptor whose captures these are; once it is detached the snapshot is no more. */
  source: { readonly detached: boolean };
}

const NOT_HELD = -1;
const IN_SPILL = -2;
/** Held blocks between two that are not are read over up to this many: cheaper than a second system call. */
const READ_OVER_BLOCKS = 8;
/** Looked through for captures by one status request: 64 GiB, some 0.1 ms. */
const STATUS_CHUNKS_MAX = 65_536;

/**
 * The disk as at T0, read-only: the image with the captures laid over it. Main thread only; every request
 * rejects with IO once the view is lost.
 */
export class SnapshotDevice implements BlockDevice {
  readonly name: string;
  readonly sizeBytes: number;
  readonly readOnly = true;
  readonly clusterSizeBytes: number;
  readonly #options: SnapshotDeviceOptions;
  readonly #shared: SharedState;
  readonly #chunkBytes: number;
  /** Of the chunk in hand: for each block its place in the buffer, in blocks, or one of the two above. */
  readonly #places: Int32Array;
  readonly #spillBitmap: Uint8Array;
  #inFlight = 0;
  #closed = false;
  #onIdle: (() => void) | undefined;

  constructor(options: SnapshotDeviceOptions) {
    const { name, image, shared } = options;
    this.name = name;
    this.sizeBytes = image.sizeBytes;
    this.clusterSizeBytes = image.clusterSizeBytes;
    this.#options = options;
    this.#shared = shared;
    this.#chunkBytes = shared.geometry.chunkBytes;
    this.#places = new Int32Array(shared.geometry.blocksPerChunk);
    this.#spillBitmap = new Uint8Array(shared.geometry.blocksPerChunk / 8);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const end = offsetBytes + lengthBytes;
    const turnEnd = Math.min(end, offsetBytes + this.#chunkBytes);
    try {
      for (let at = offsetBytes; at < turnEnd;) {
        const to = this.#pieceEnd(at, end);
        const pending = this.#readInChunk(buffer, bufferOffset + (at - offsetBytes), at, to);
        if (pending || (to >= turnEnd && to < end)) {
          return this.#track(this.#readRest(pending, buffer, bufferOffset - offsetBytes, to, end));
        }
        at = to;
      }
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, this.name));
    }
  }

  /** `begun`: what comes before `from` and goes on already; `shift`: from offset on the disk to that in the buffer. */
  async #readRest(
    begun: Completion,
    buffer: Uint8Array,
    shift: number,
    from: number,
    end: number,
  ): Promise<void> {
    if (begun) await begun;
    for (let at = from; at < end;) {
      await nextTurn();
      const to = this.#pieceEnd(at, end);
      await this.#readInChunk(buffer, at + shift, at, to);
      at = to;
    }
  }

  #pieceEnd(at: number, end: number): number {
    return Math.min(end, (Math.floor(at / this.#chunkBytes) + 1) * this.#chunkBytes);
  }

  /** [from, to) lies in one chunk. @throws CowcatcherError; a promise rejects only when no read uses the buffer. */
  #readInChunk(buffer: Uint8Array, bufferOffset: number, from: number, to: number): Completion {
    this.#requireIntact(from);
    const pending = this.#readNotHeld(buffer, bufferOffset, from, to);
    if (pending === null) return this.#layCaptures(buffer, bufferOffset, from, to);
    return allDone(pending).then(() => this.#layCaptures(buffer, bufferOffset, from, to));
  }

  /** Reads from the image what is not held, and short held stretches between; null when all of it is done. */
  #readNotHeld(buffer: Uint8Array, bufferOffset: number, from: number, to: number): Promise<void>[] | null {
    const { image } = this.#options;
    if (!this.#findPlaces(this.#chunkOf(from))) {
      const whole = image.read(buffer, bufferOffset, to - from, from);
      return whole ? [whole] : null;
    }
    let pending: Promise<void>[] | null = null;
    for (let at = from; at < to;) {
      const end = this.#notHeldEnd(at, to);
      if (end === at) {
        at = Math.min(to, (Math.floor(at / BLOCK_BYTES) + 1) * BLOCK_BYTES);
        continue;
      }
      const read = startRead(image, buffer, bufferOffset + (at - from), at, end);
      if (read) (pending ??= []).push(read);
      at = end;
    }
    return pending;
  }

  /** End of the stretch from `at` on that is worth one read of the image; `at` itself if its block is held. */
  #notHeldEnd(at: number, to: number): number {
    let end = at;
    let gap = 0;
    for (let block = Math.floor(at / BLOCK_BYTES); block * BLOCK_BYTES < to; block++) {
      if (this.#places[block % this.#places.length] !== NOT_HELD) {
        if (end === at || ++gap > READ_OVER_BLOCKS) break;
      } else {
        gap = 0;
        end = Math.min((block + 1) * BLOCK_BYTES, to);
      }
    }
    return end;
  }

  /** Copies what is held of [from, to) into the buffer, whatever stands there. */
  #layCaptures(buffer: Uint8Array, bufferOffset: number, from: number, to: number): Completion {
    this.#requireIntact(from);
    if (!this.#findPlaces(this.#chunkOf(from))) return undefined;
    const { slots } = this.#shared;
    let pending: Promise<void>[] | null = null;
    for (let at = from; at < to;) {
      const block = Math.floor(at / BLOCK_BYTES);
      const place = this.#places[block % this.#places.length];
      let end = Math.min(to, (block + 1) * BLOCK_BYTES);
      if (place >= 0) {
        const start = place * BLOCK_BYTES + (at - block * BLOCK_BYTES);
        slots.read(start, buffer, bufferOffset + (at - from), end - at);
      } else if (place === IN_SPILL) {
        end = this.#spilledEnd(end, to);
        const read = this.#readSpilled(buffer, bufferOffset + (at - from), at, end);
        if (read) (pending ??= []).push(read);
      }
      at = end;
    }
    return pending === null ? undefined : this.#whenStillIntact(allDone(pending), from);
  }

  /** The spill's descriptor is closed when the snapshot ends, but not before the reads that use it are over. */
  async #whenStillIntact(pending: Promise<void>, from: number): Promise<void> {
    await pending;
    this.#requireIntact(from);
  }

  #spilledEnd(end: number, to: number): number {
    while (end < to && this.#places[(end / BLOCK_BYTES) % this.#places.length] === IN_SPILL) {
      end = Math.min(to, end + BLOCK_BYTES);
    }
    return end;
  }

  #readSpilled(buffer: Uint8Array, bufferOffset: number, from: number, to: number): Completion {
    return this.#options.spill?.readBytes(buffer, bufferOffset, to - from, from);
  }

  /** Fills #places for the chunk; false if nothing of it is held (#places is not valid then). */
  #findPlaces(chunk: number): boolean {
    const shared = this.#shared;
    const isSpilled = (shared.chunkWords[chunk] & SPILLED) !== 0;
    let capture = shared.chunkHead(chunk);
    if (capture < 0 && !isSpilled) return false;
    const places = this.#places.fill(NOT_HELD);
    if (isSpilled) {
      this.#options.spill?.readBitmap(chunk, this.#spillBitmap);
      for (let block = 0; block < places.length; block++) {
        if ((this.#spillBitmap[block >> 3] >> (block & 7)) & 1) places[block] = IN_SPILL;
      }
    }
    for (; capture >= 0; capture = shared.captureNext[capture]) {
      const info = shared.captureInfo[capture];
      const start = captureStart(info);
      for (let i = 0; i < captureLength(info); i++) places[start + i] = capture + i;
    }
    return true;
  }

  /** @throws CowcatcherError IO once the snapshot is lost. */
  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus> {
    this.#requireIntact(offsetBytes);
    const held = this.#heldStatus(offsetBytes, lengthBytes);
    if (held !== undefined) return held;
    const unchangedBytes = this.#unchangedBytes(offsetBytes, lengthBytes);
    const status = this.#options.image.blockStatus(offsetBytes, unchangedBytes);
    if (!(status instanceof Promise)) return status;
    return this.#trackStatus(
      status.then((answer) => {
        // The guest may have written meanwhile: only what is not held even now had its old status all along.
        this.#requireIntact(offsetBytes);
        const bytes = Math.min(answer.lengthBytes, this.#unchangedBytes(offsetBytes, unchangedBytes));
        return (
          this.#heldStatus(offsetBytes, lengthBytes) ?? {
            ...answer,
            lengthBytes: bytes,
          }
        );
      }),
    );
  }

  /** Status of the held blocks of like kind from the offset on; undefined if its block is not held. */
  #heldStatus(offsetBytes: number, lengthBytes: number): BlockStatus | undefined {
    const chunk = this.#chunkOf(offsetBytes);
    if (!this.#findPlaces(chunk)) return undefined;
    const to = this.#pieceEnd(offsetBytes, offsetBytes + lengthBytes);
    const first = Math.floor(offsetBytes / BLOCK_BYTES);
    if (this.#placeOf(first) === NOT_HELD) return undefined;
    const zero = this.#isHeldZero(first);
    let block = first + 1;
    while (block * BLOCK_BYTES < to && this.#placeOf(block) !== NOT_HELD && this.#isHeldZero(block) === zero)
      block++;
    return {
      lengthBytes: Math.min(to, block * BLOCK_BYTES) - offsetBytes,
      zero,
      data: !zero,
      depth: 0,
      present: true,
      compressed: false,
    };
  }

  #placeOf(block: number): number {
    return this.#places[block % this.#places.length];
  }

  /** A guest that writes into a hole has zeroes captured, and a hole it remains. In the spill nobody looks. */
  #isHeldZero(block: number): boolean {
    const place = this.#placeOf(block);
    return place >= 0 && this.#shared.slots.isZeroBlock(place * BLOCK_BYTES);
  }

  /** Bytes from the offset on, at most lengthBytes, before the next held block; at least to the chunk's end if none. */
  #unchangedBytes(offsetBytes: number, lengthBytes: number): number {
    const end = offsetBytes + lengthBytes;
    const first = this.#chunkOf(offsetBytes);
    const inChunk = this.#pieceEnd(offsetBytes, end);
    if (this.#findPlaces(first)) {
      for (let block = Math.floor(offsetBytes / BLOCK_BYTES); block * BLOCK_BYTES < inChunk; block++) {
        if (this.#placeOf(block) !== NOT_HELD) return Math.max(0, block * BLOCK_BYTES - offsetBytes);
      }
    }
    const { chunkHeads, chunkWords } = this.#shared;
    const last = Math.min(this.#chunkOf(end - 1), first + STATUS_CHUNKS_MAX);
    let chunk = first + 1;
    while (chunk <= last && chunkHeads[chunk] === 0 && (chunkWords[chunk] & SPILLED) === 0) chunk++;
    return Math.min(end, chunk * this.#chunkBytes) - offsetBytes;
  }

  #chunkOf(offsetBytes: number): number {
    return Math.floor(offsetBytes / this.#chunkBytes);
  }

  #requireIntact(offsetBytes: number): void {
    if (!this.#closed && !this.#options.source.detached) return;
    throw new CowcatcherError({
      code: "IO",
      object: this.name,
      problem: "the snapshot has ended",
      hint: "cowcatcher jobs shows why; start another one",
      errno: "EIO",
      offsetBytes,
    });
  }

  #track(completion: Promise<void>): Promise<void> {
    this.#inFlight++;
    return completion.finally(() => this.#leave());
  }

  #trackStatus(status: Promise<BlockStatus>): Promise<BlockStatus> {
    this.#inFlight++;
    return status.finally(() => this.#leave());
  }

  #leave(): void {
    this.#inFlight--;
    if (this.#inFlight === 0) this.#onIdle?.();
  }

  /** Refuses further requests; fulfilled when those in flight are over and neither buffer nor spill is looked at. */
  async close(): Promise<void> {
    this.#closed = true;
    if (this.#inFlight === 0) return;
    await new Promise<void>((resolve) => {
      this.#onIdle = resolve;
    });
  }

  flush(): Completion {
    return undefined;
  }

  write(_buffer: Uint8Array, _bufferOffset: number, _lengthBytes: number, offsetBytes: number): Completion {
    return this.#refuseChange(offsetBytes);
  }

  writeZeroes(offsetBytes: number): Completion {
    return this.#refuseChange(offsetBytes);
  }

  discard(offsetBytes: number): Completion {
    return this.#refuseChange(offsetBytes);
  }

  #refuseChange(offsetBytes: number): Completion {
    return Promise.reject(
      new CowcatcherError({
        code: "IO",
        object: this.name,
        problem: "cannot write: a snapshot is read-only",
        errno: "EROFS",
        offsetBytes,
      }),
    );
  }
}

/** A read that throws after an earlier one went on must not let go of the buffer that the earlier one still fills. */
function startRead(
  image: BlockDevice,
  buffer: Uint8Array,
  bufferOffset: number,
  from: number,
  to: number,
): Completion {
  try {
    return image.read(buffer, bufferOffset, to - from, from);
  } catch (error) {
    return Promise.reject(toCowcatcherError(error, image.name));
  }
}

/** Like Promise.all, but it settles only when nothing fills the buffer any more. */
async function allDone(pending: Promise<void>[]): Promise<void> {
  for (const outcome of await Promise.allSettled(pending)) {
    if (outcome.status === "rejected") throw outcome.reason;
  }
}

function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
