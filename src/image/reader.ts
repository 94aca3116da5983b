// A worker's readers of the source at T0, one kind for each SourceDescription.
//
// A worker has nothing else to do while it reads, so raw reads are plain synchronous preads: no event loop, no
// promise. Each reader belongs to one thread; descriptors are the main thread's, shared and never closed here.

import type { RawSourceDescription, SourceDescription, SourceReader, Completion } from "../block/device.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { KiB, roundDown, roundUp } from "../units.js";
import {
  DIRECT_ALIGNMENT_BYTES,
  type Extent,
  fileHole,
  pageAlignedMemory,
  readFullySync,
  readOnceSync,
} from "../block/file/fileio.js";
import { NbdSourceReader } from "../nbd/client/reader.js";
import { RbdSourceReader } from "../rbd/reader.js";
import { Qcow2SourceReader } from "./qcow2/reader.js";

const BOUNCE_BYTES = 64 * KiB;

/**
 * Opens the reader for a description, and those of its backing chain. Any thread; the reader stays there.
 * @param isCancelled asked while an NBD server's answer is awaited; true ends the wait
 * @param mayBlock the thread waits for no other server meanwhile
 */
export function openSource(
  description: SourceDescription,
  isCancelled: () => boolean = () => false,
  mayBlock = true,
): SourceReader {
  switch (description.format) {
    case "raw":
      return description.direct ? new DirectRawSourceReader(description) : new RawSourceReader(description);
    case "null":
      return new NullSourceReader(description.sizeBytes);
    case "nbd":
      return new NbdSourceReader(description, isCancelled, mayBlock);
    case "rbd":
      return new RbdSourceReader(description, isCancelled);
    case "qcow2": {
      const { backing } = description;
      const below = backing === null ? null : openSource(backing, isCancelled, mayBlock);
      return new Qcow2SourceReader(description, below);
    }
  }
}

class NullSourceReader implements SourceReader {
  constructor(readonly sizeBytes: number) {}

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number): Completion {
    buffer.fill(0, bufferOffset, bufferOffset + lengthBytes);
    return undefined;
  }

  extent(_offsetBytes: number, lengthBytes: number): Extent {
    return { lengthBytes, zero: true };
  }

  close(): void {
    // Nothing was opened.
  }
}

class RawSourceReader implements SourceReader {
  readonly sizeBytes: number;
  /**
   * End of the last hole that the file system told of, from knownHoleStart on. It stays true of T0: a hole that becomes
   * data has been captured first.
   */
  private knownHoleStart = 0;
  private knownHoleEnd = 0;

  constructor(protected readonly description: RawSourceDescription) {
    this.sizeBytes = description.sizeBytes;
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const { name, fd } = this.description;
    try {
      const count = readFullySync(name, fd, buffer, bufferOffset, lengthBytes, offsetBytes);
      if (count < lengthBytes) buffer.fill(0, bufferOffset + count, bufferOffset + lengthBytes);
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, this.description.name));
    }
  }

  /**
   * A stretch that begins with data counts as data up to its end: where the data ends only SEEK_HOLE could say, at the
   * guest's expense (fileHole). Holes inside are read, from no disk, and found to be zero.
   */
  extent(offsetBytes: number, lengthBytes: number): Extent {
    if (offsetBytes < this.knownHoleStart || offsetBytes >= this.knownHoleEnd) {
      this.knownHoleStart = offsetBytes;
      this.knownHoleEnd = offsetBytes + fileHole(this.description.fd, offsetBytes);
    }
    const holeBytes = this.knownHoleEnd - offsetBytes;
    if (holeBytes <= 0) return { lengthBytes, zero: false };
    return { lengthBytes: Math.min(lengthBytes, holeBytes), zero: true };
  }

  close(): void {
    // The descriptor is the main thread's.
  }
}

/** O_DIRECT: whole blocks into aligned memory go straight, all else block by block through a bounce buffer. */
class DirectRawSourceReader extends RawSourceReader {
  private bounce: Uint8Array | null = null;

  override read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Completion {
    try {
      const wholeBytes = roundDown(lengthBytes, DIRECT_ALIGNMENT_BYTES);
      const canGoStraight =
        offsetBytes % DIRECT_ALIGNMENT_BYTES === 0 && offsetBytes + wholeBytes <= this.sizeBytes;
      const done =
        canGoStraight && this.readStraight(buffer, bufferOffset, wholeBytes, offsetBytes) ? wholeBytes : 0;
      this.readBounced(buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, this.description.name));
    }
  }

  /** @returns false where the kernel refuses the memory's alignment. */
  private readStraight(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): boolean {
    const { name, fd } = this.description;
    try {
      const count = readFullySync(name, fd, buffer, bufferOffset, lengthBytes, offsetBytes);
      if (count < lengthBytes) buffer.fill(0, bufferOffset + count, bufferOffset + lengthBytes);
      return true;
    } catch (error) {
      if (error instanceof CowcatcherError && error.errno === "EINVAL") return false;
      throw error;
    }
  }

  private readBounced(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): void {
    const end = offsetBytes + lengthBytes;
    let at = offsetBytes;
    while (at < end) {
      this.bounce ??= pageAlignedMemory(BOUNCE_BYTES);
      const from = roundDown(at, DIRECT_ALIGNMENT_BYTES);
      const until = Math.min(from + BOUNCE_BYTES, roundUp(end, DIRECT_ALIGNMENT_BYTES));
      this.fillBounce(this.bounce, from, until - from);
      const count = Math.min(until, end) - at;
      buffer.set(this.bounce.subarray(at - from, at - from + count), bufferOffset + (at - offsetBytes));
      at += count;
    }
  }

  private fillBounce(bounce: Uint8Array, offsetBytes: number, lengthBytes: number): void {
    const { name, fd, sizeBytes } = this.description;
    const wholeEnd = roundDown(sizeBytes, DIRECT_ALIGNMENT_BYTES);
    const wholeBytes = Math.max(0, Math.min(lengthBytes, wholeEnd - offsetBytes));
    let done = readFullySync(name, fd, bounce, 0, wholeBytes, offsetBytes);
    if (done === wholeBytes && wholeBytes < lengthBytes) {
      // The block that the file's end cuts short, in one call: going on from its odd end would be refused.
      done += readOnceSync(name, fd, bounce, wholeBytes, DIRECT_ALIGNMENT_BYTES, wholeEnd);
    }
    bounce.fill(0, done, lengthBytes);
  }
}
