// The spill: where captures go when the buffer is full. A sparse file, which the main thread fills and the workers
// drain; its storage need not be the guest's, and may be slow or not answer.
//
// Layout. Block b of the disk stands at offset b × 4096, so there is nothing to allocate and no index to keep. Which
// blocks stand there a bitmap says, one bit a block, in the memory that the job's threads share: 32 bytes a chunk of
// 1 MiB, 32 MiB for 1 TiB of disk, of which the system gives pages only to what is touched, which are the chunks that
// spill. (It stood in the file once. Then each look at it was a read of the spill's storage, on the guest's path.)
//
// A chunk's part of file and bitmap is touched only by the chunk's owner (see shared.ts). The mark SPILLED in the
// chunk's word says whether its bitmap has a bit set. Draining punches a hole, so the file takes no more room than what
// stands in it.
//
// SpillFile is a worker's: its calls block. The main thread makes none of them; what it has instead writes and reads
// through a thread of its own (backup/storage/remote-spill.ts).

import { readSync, writeSync } from "node:fs";
import { CowcatcherError, ioError } from "../errors.js";
import type { Completion } from "../block/device.js";
import { libc } from "../native/libc.js";
import { BLOCK_BYTES, type Geometry } from "./geometry.js";

export interface SpillDescription {
  path: string;
  fd: number;
  /** As long as spillBitmapBytes says; zero at first. */
  bitmaps: SharedArrayBuffer;
}

/** Length of the bitmaps of all chunks. */
export function spillBitmapBytes({ chunkCount, blocksPerChunk }: Geometry): number {
  return Math.max(1, (chunkCount * blocksPerChunk) / 8);
}

/** What the thread that captures needs of the spill. */
export interface SpillPlace {
  readonly path: string;
  /** Fills `bitmap` (blocksPerChunk bits, lowest first) with the chunk's spilled blocks. */
  readBitmap(chunk: number, bitmap: Uint8Array): void;
  writeBitmap(chunk: number, bitmap: Uint8Array): void;
  /** `buffer` may be used again when this returns. @throws CowcatcherError NO_SPACE or IO, or rejects with it. */
  writeBlocks(
    buffer: Uint8Array,
    bufferOffset: number,
    chunk: number,
    blockInChunk: number,
    count: number,
  ): Completion;
  /** Spilled bytes by their offset on the disk. Rejects with CowcatcherError IO. */
  readBytes(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  /** The job has ended: nobody waits any more for what was begun, nor does anything begin. */
  abandon?(): void;
}

/** The bitmaps in shared memory. */
export class SpillBitmaps {
  readonly #bytes: Uint8Array;
  readonly #bytesPerChunk: number;

  constructor(memory: SharedArrayBuffer, geometry: Geometry) {
    this.#bytes = new Uint8Array(memory);
    this.#bytesPerChunk = geometry.blocksPerChunk / 8;
  }

  read(chunk: number, bitmap: Uint8Array): void {
    const from = chunk * this.#bytesPerChunk;
    bitmap.set(this.#bytes.subarray(from, from + this.#bytesPerChunk));
  }

  write(chunk: number, bitmap: Uint8Array): void {
    this.#bytes.set(bitmap.subarray(0, this.#bytesPerChunk), chunk * this.#bytesPerChunk);
  }
}

/** One thread's hands on the spill file. */
export class SpillFile implements SpillPlace {
  readonly #bitmaps: SpillBitmaps;

  constructor(
    readonly description: SpillDescription,
    readonly geometry: Geometry,
  ) {
    this.#bitmaps = new SpillBitmaps(description.bitmaps, geometry);
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

  /** @throws CowcatcherError NO_SPACE or IO. */
  writeBlocks(
    buffer: Uint8Array,
    bufferOffset: number,
    chunk: number,
    blockInChunk: number,
    count: number,
  ): Completion {
    const offset = chunk * this.geometry.chunkBytes + blockInChunk * BLOCK_BYTES;
    this.#transfer("write", writeSync, buffer, bufferOffset, count * BLOCK_BYTES, offset);
    return undefined;
  }

  /** @throws CowcatcherError IO, also when the file ends before them: it was cut short from outside. */
  readBlocks(
    buffer: Uint8Array,
    bufferOffset: number,
    chunk: number,
    blockInChunk: number,
    count: number,
  ): void {
    const offset = chunk * this.geometry.chunkBytes + blockInChunk * BLOCK_BYTES;
    this.readBytes(buffer, bufferOffset, count * BLOCK_BYTES, offset);
  }

  /** @throws CowcatcherError IO, also when the file ends before them. */
  readBytes(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): undefined {
    const count = this.#transfer("read", readSync, buffer, bufferOffset, lengthBytes, offsetBytes);
    if (count < lengthBytes) throw this.#lostData(offsetBytes);
    return undefined;
  }

  #lostData(offsetBytes: number): CowcatcherError {
    return new CowcatcherError({
      code: "IO",
      object: this.description.path,
      problem: "the spill file has lost what was written to it",
      offsetBytes,
    });
  }

  /** Gives the room of drained blocks back to the file system, where it can. */
  punch(chunk: number, blockInChunk: number, count: number): void {
    const offset = chunk * this.geometry.chunkBytes + blockInChunk * BLOCK_BYTES;
    libc?.punchHole(this.description.fd, offset, count * BLOCK_BYTES);
  }

  #transfer(
    action: "read" | "write",
    call: (fd: number, buffer: Uint8Array, offset: number, length: number, position: number) => number,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number {
    const { fd, path } = this.description;
    let done = 0;
    try {
      while (done < lengthBytes) {
        const count = call(fd, buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
        if (count === 0) break;
        done += count;
      }
    } catch (error) {
      throw ioError(`${action} the spill file`, path, error, offsetBytes + done);
    }
    return done;
  }
}
