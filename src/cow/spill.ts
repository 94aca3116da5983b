// The spill: where captures go when the buffer is full. A sparse local file, shared by the main thread, which
// writes it, and the workers, which drain it.
//
// Layout. Block b of the disk stands at offset b × 4096, so there is nothing to allocate and no index to keep.
// After the disk's end, aligned to a block, each chunk has a bitmap of its spilled blocks (32 bytes for a chunk of
// 1 MiB). The bitmaps live in the file because the file is sparse and in the page cache: in memory they would
// cost 32 MiB a TiB of disk whether or not anything spills.
//
// A chunk's part of the file is touched only by the chunk's owner (see shared.ts). The mark SPILLED in the chunk's
// word says whether its bitmap has a bit set; without it the bitmap need not be read. Draining punches a hole, so
// the file takes no more room than what stands in it.

import { readSync, writeSync } from "node:fs";
import { CowcatcherError, ioError } from "../errors.js";
import type { Completion } from "../block/device.js";
import { readFully } from "../block/file/fileio.js";
import { libc } from "../native/libc.js";
import { roundUp } from "../units.js";
import { BLOCK_BYTES, type Geometry } from "./geometry.js";

export interface SpillDescription {
  path: string;
  fd: number;
}

/** One thread's hands on the spill file. */
export class SpillFile {
  readonly #bitmapStart: number;
  readonly #bitmapBytes: number;

  constructor(
    readonly description: SpillDescription,
    readonly geometry: Geometry,
  ) {
    this.#bitmapStart = roundUp(geometry.sizeBytes, BLOCK_BYTES);
    this.#bitmapBytes = geometry.blocksPerChunk / 8;
  }

  /** Fills `bitmap` (blocksPerChunk bits, lowest first) with the chunk's spilled blocks. */
  readBitmap(chunk: number, bitmap: Uint8Array): void {
    bitmap.fill(0);
    this.#transfer(
      "read",
      readSync,
      bitmap,
      0,
      this.#bitmapBytes,
      this.#bitmapStart + chunk * this.#bitmapBytes,
    );
  }

  writeBitmap(chunk: number, bitmap: Uint8Array): void {
    this.#transfer(
      "write",
      writeSync,
      bitmap,
      0,
      this.#bitmapBytes,
      this.#bitmapStart + chunk * this.#bitmapBytes,
    );
  }

  /** @throws CowcatcherError NO_SPACE or IO. */
  writeBlocks(
    buffer: Uint8Array,
    bufferOffset: number,
    chunk: number,
    blockInChunk: number,
    count: number,
  ): void {
    const offset = chunk * this.geometry.chunkBytes + blockInChunk * BLOCK_BYTES;
    this.#transfer("write", writeSync, buffer, bufferOffset, count * BLOCK_BYTES, offset);
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
    const wanted = count * BLOCK_BYTES;
    if (this.#transfer("read", readSync, buffer, bufferOffset, wanted, offset) === wanted) return;
    throw this.#lostData(offset);
  }

  /**
   * Main thread: reads spilled bytes by their offset on the disk, at once if they are in the page cache, else through
   * libuv's pool. Rejects with CowcatcherError IO. The descriptor must stay open until completion.
   */
  readBytes(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const { fd } = this.description;
    let done = 0;
    if (libc !== null) {
      const at = buffer.byteOffset + bufferOffset;
      // An error, such as that of a file system without RWF_NOWAIT, is the asynchronous read's to find.
      done = Math.max(0, libc.readNowait(fd, buffer.buffer, at, lengthBytes, offsetBytes));
      if (done === lengthBytes) return undefined;
    }
    return this.#readLater(buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
  }

  async #readLater(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const { fd, path } = this.description;
    const count = await readFully(path, fd, buffer, bufferOffset, lengthBytes, offsetBytes);
    if (count < lengthBytes) throw this.#lostData(offsetBytes + count);
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
        // Reading past what was ever written: the bitmap of a chunk that never spilled.
        if (count === 0) break;
        done += count;
      }
    } catch (error) {
      throw ioError(`${action} the spill file`, path, error, offsetBytes + done);
    }
    return done;
  }
}
