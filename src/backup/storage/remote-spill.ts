// The spill as the main thread has it: its file is written, read and closed by a storage thread, since a spill's
// storage may be slow, throttled by its dirty pages, or not answer at all, and the main thread serves the guests.
//
// What is to be written is copied into a place of a small pool in shared memory; when all places are taken the next
// capture waits for one. The guest's write waits for its own capture, no longer than its limit (cow/guest-limit.ts), and
// for nothing that another guest does.
//
//   writeBlocks ─► a place ─► message ─► the thread writes ─► message ─► the place is free, the capture is made
//
// abandon(): the job has ended, and nobody waits any more for what is on its way. It goes on in the thread, in memory
// that stays the spill's own; the file is closed behind it, in the same queue.

import type { Completion } from "../../block/device.js";
import { BLOCK_BYTES, BLOCKS_PER_SLOT, type Geometry } from "../../cow/geometry.js";
import { SpillBitmaps, type SpillDescription, type SpillPlace } from "../../cow/spill.js";
import { copyBytes } from "../../native/libc.js";
import { orAborted } from "./or-aborted.js";
import type { SpillTransfer, StorageHand, StorageHands } from "./protocol.js";

/** A capture is at most one slot. */
const PLACE_BYTES = BLOCKS_PER_SLOT * BLOCK_BYTES;
/** 2 MiB: the thread has its next work at hand, and a guest's deepest queue is as deep. */
const PLACE_COUNT = 32;

export class RemoteSpill implements SpillPlace {
  readonly description: SpillDescription;
  readonly #hand: StorageHand;
  readonly #geometry: Geometry;
  readonly #bitmaps: SpillBitmaps;
  readonly #memory = new SharedArrayBuffer(PLACE_COUNT * PLACE_BYTES);
  readonly #bytes = new Uint8Array(this.#memory);
  readonly #freePlaces = Array.from({ length: PLACE_COUNT }, (_, place) => place);
  readonly #waitingForPlace: ((place: number) => void)[] = [];
  /** What waits for the thread, to be let go by `abandon`. */
  readonly #waits = new Set<() => void>();
  #isAbandoned = false;
  #isClosed = false;

  private constructor(hand: StorageHand, description: SpillDescription, geometry: Geometry) {
    this.#hand = hand;
    this.description = description;
    this.#geometry = geometry;
    this.#bitmaps = new SpillBitmaps(description.bitmaps, geometry);
  }

  /** @throws CowcatcherError as openSpillFile; the signal's reason when that is aborted meanwhile. Nothing is left then. */
  static async open(
    hands: StorageHands,
    place: { spillDir: string | undefined; target: string },
    geometry: Geometry,
    bitmaps: SharedArrayBuffer,
    signal: AbortSignal | undefined,
  ): Promise<RemoteSpill> {
    const hand = hands.take();
    const opening = hand.call("openSpill", place);
    try {
      const file = await orAborted(opening, signal);
      return new RemoteSpill(hand, { ...file, bitmaps }, geometry);
    } catch (error) {
      // It may be opened yet: what it yields goes as soon as it is there.
      void opening.then(({ fd }) => hand.call("closeSpill", fd)).catch(() => undefined);
      void opening.catch(() => undefined).finally(() => hand.release());
      throw error;
    }
  }

  get path(): string {
    return this.description.path;
  }

  readBitmap(chunk: number, bitmap: Uint8Array): void {
    this.#bitmaps.read(chunk, bitmap);
  }

  writeBitmap(chunk: number, bitmap: Uint8Array): void {
    this.#bitmaps.write(chunk, bitmap);
  }

  writeBlocks(
    buffer: Uint8Array,
    bufferOffset: number,
    chunk: number,
    blockInChunk: number,
    count: number,
  ): Completion {
    const lengthBytes = count * BLOCK_BYTES;
    const offsetBytes = chunk * this.#geometry.chunkBytes + blockInChunk * BLOCK_BYTES;
    const place = this.#freePlaces.pop();
    if (place !== undefined) {
      copyBytes(this.#bytes, place * PLACE_BYTES, buffer, bufferOffset, lengthBytes);
      return this.#unlessAbandoned(this.#write(place, lengthBytes, offsetBytes));
    }
    const kept = buffer.slice(bufferOffset, bufferOffset + lengthBytes);
    return this.#unlessAbandoned(this.#writeLater(kept, offsetBytes));
  }

  async #writeLater(bytes: Uint8Array, offsetBytes: number): Promise<void> {
    const place = await new Promise<number>((resolve) => this.#waitingForPlace.push(resolve));
    if (this.#isAbandoned) {
      this.#free(place);
      return;
    }
    this.#bytes.set(bytes, place * PLACE_BYTES);
    await this.#write(place, bytes.length, offsetBytes);
  }

  async #write(place: number, lengthBytes: number, offsetBytes: number): Promise<void> {
    try {
      await this.#hand.call("writeSpill", this.#transfer(place, lengthBytes, offsetBytes));
    } finally {
      this.#free(place);
    }
  }

  #transfer(place: number, lengthBytes: number, offsetBytes: number): SpillTransfer {
    const { fd, path } = this.description;
    return { fd, path, memory: this.#memory, memoryOffset: place * PLACE_BYTES, lengthBytes, offsetBytes };
  }

  #free(place: number): void {
    const next = this.#waitingForPlace.shift();
    if (next === undefined) this.#freePlaces.push(place);
    else next(place);
  }

  async readBytes(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    for (let done = 0; done < lengthBytes && !this.#isAbandoned; done += PLACE_BYTES) {
      const bytes = Math.min(PLACE_BYTES, lengthBytes - done);
      await this.#unlessAbandoned(this.#read(buffer, bufferOffset + done, bytes, offsetBytes + done));
    }
  }

  async #read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const place =
      this.#freePlaces.pop() ?? (await new Promise<number>((resolve) => this.#waitingForPlace.push(resolve)));
    try {
      if (this.#isAbandoned) return;
      await this.#hand.call("readSpill", this.#transfer(place, lengthBytes, offsetBytes));
      // Once it was given up the buffer may be another request's.
      if (!this.#isAbandoned) copyBytes(buffer, bufferOffset, this.#bytes, place * PLACE_BYTES, lengthBytes);
    } finally {
      this.#free(place);
    }
  }

  /** As `work`, or fulfilled when the spill is abandoned: what it was for has ended then. */
  #unlessAbandoned(work: Promise<void>): Promise<void> {
    if (this.#isAbandoned) {
      work.catch(() => undefined);
      return Promise.resolve();
    }
    return new Promise((resolve, reject) => {
      const letGo = (): void => resolve();
      this.#waits.add(letGo);
      work.then(resolve, reject).finally(() => this.#waits.delete(letGo));
    });
  }

  abandon(): void {
    this.#isAbandoned = true;
    for (const letGo of this.#waits) letGo();
    this.#waits.clear();
  }

  /** No thread uses the file any more. Returns at once: it is closed behind what is on its way. Idempotent. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.abandon();
    // What is spilled is nobody's any more; nothing could be done about a failure.
    this.#hand.call("closeSpill", this.description.fd).catch(() => undefined);
    this.#hand.release();
  }
}
