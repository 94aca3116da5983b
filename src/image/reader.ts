// A worker's readers of the source at T0, one kind for each SourceDescription.
//
// A worker has nothing else to do while it reads, so raw reads are plain synchronous preads: no event loop, no
// promise. The main thread, where it copies, has its large reads done by libuv's pool, and writes meanwhile. Each reader
// belongs to one thread; descriptors are the main thread's, shared and never closed here.

import type { RawSourceDescription, SourceDescription, SourceReader, Completion } from "../block/device.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { KiB, roundDown } from "../units.js";
import { readDirectSync } from "../block/file/direct.js";
import { assertNotCut, cutShortError } from "../block/file/file-end.js";
import {
  DIRECT_ALIGNMENT_BYTES,
  type Extent,
  fileHole,
  pageAlignedMemory,
  POOL_READ_MIN_BYTES,
  readFully,
  readFullySync,
} from "../block/file/fileio.js";
import { NbdSourceReader } from "../nbd/client/reader.js";
import { RbdSourceReader } from "../rbd/reader.js";
import { Qcow2SourceReader } from "./qcow2/reader.js";

/** Whole blocks; what is read through it is the exception. */
const BOUNCE_BYTES = 64 * KiB;

/**
 * Opens the reader for a description, and those of its backing chain. Any thread; the reader stays there.
 * @param isCancelled asked while an NBD server's answer is awaited; true ends the wait
 * @param mayBlock the thread waits for no other server meanwhile
 * @param fromPool libuv's pool does large reads of cached files, several at a time; main thread
 */
export function openSource(
  description: SourceDescription,
  isCancelled: () => boolean = () => false,
  mayBlock = true,
  fromPool = false,
): SourceReader {
  switch (description.format) {
    case "raw":
      return description.direct
        ? new DirectRawSourceReader(description)
        : new RawSourceReader(description, fromPool);
    case "null":
      return new NullSourceReader(description.sizeBytes);
    case "nbd":
      return new NbdSourceReader(description, isCancelled, mayBlock);
    case "rbd":
      return new RbdSourceReader(description, isCancelled);
    case "qcow2": {
      const { backing } = description;
      const below = backing === null ? null : openSource(backing, isCancelled, mayBlock, fromPool);
      return new Qcow2SourceReader(description, below, fromPool);
    }
    case "repository":
      // No image builds on a backup.
      throw new CowcatcherError({
        code: "INTERNAL",
        object: description.name,
        problem: "a backup is opened by repository/open.ts",
      });
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

  constructor(
    protected readonly description: RawSourceDescription,
    private readonly fromPool = false,
  ) {
    this.sizeBytes = description.sizeBytes;
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const { name, fd, sizeBytes } = this.description;
    if (this.fromPool && lengthBytes >= POOL_READ_MIN_BYTES)
      return this.readFromPool(buffer, bufferOffset, lengthBytes, offsetBytes);
    try {
      const count = readFullySync(name, fd, buffer, bufferOffset, lengthBytes, offsetBytes);
      if (count < lengthBytes) throw cutShortError(name, offsetBytes + count, sizeBytes);
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, name));
    }
  }

  private async readFromPool(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const { name, fd, sizeBytes } = this.description;
    const count = await readFully(name, fd, buffer, bufferOffset, lengthBytes, offsetBytes);
    if (count < lengthBytes) throw cutShortError(name, offsetBytes + count, sizeBytes);
  }

  /**
   * A stretch that begins with data counts as data up to its end: where the data ends only SEEK_HOLE could say, at the
   * guest's expense (fileHole). Holes inside are read, from no disk, and found to be zero.
   * @throws CowcatcherError IO where the hole is what has been cut off the file.
   */
  extent(offsetBytes: number, lengthBytes: number): Extent {
    const { name, fd, sizeBytes } = this.description;
    if (offsetBytes < this.knownHoleStart || offsetBytes >= this.knownHoleEnd) {
      const holeBytes = fileHole(fd, offsetBytes);
      // No data follows: either this is the file's last hole, or the file has no end there any more.
      if (holeBytes === Infinity) assertNotCut(name, fd, sizeBytes, offsetBytes);
      this.knownHoleStart = offsetBytes;
      this.knownHoleEnd = offsetBytes + holeBytes;
    }
    const holeBytes = this.knownHoleEnd - offsetBytes;
    if (holeBytes <= 0) return { lengthBytes, zero: false };
    return { lengthBytes: Math.min(lengthBytes, holeBytes), zero: true };
  }

  close(): void {
    // The descriptor is the main thread's.
  }
}

/** O_DIRECT: whole blocks into aligned memory go straight, all else through a bounce buffer. */
class DirectRawSourceReader extends RawSourceReader {
  private bounce: Uint8Array | null = null;

  override read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Completion {
    const { name, fd, sizeBytes } = this.description;
    this.bounce ??= pageAlignedMemory(BOUNCE_BYTES);
    try {
      // The last block may be cut short by the file's end; all before it goes straight.
      const isToEnd = offsetBytes + lengthBytes === sizeBytes;
      const body = isToEnd ? roundDown(sizeBytes, DIRECT_ALIGNMENT_BYTES) - offsetBytes : lengthBytes;
      const first = body > 0 ? body : lengthBytes;
      readDirectSync(name, fd, sizeBytes, this.bounce, buffer, bufferOffset, first, offsetBytes);
      const rest = lengthBytes - first;
      if (rest > 0) {
        const at = bufferOffset + first;
        readDirectSync(name, fd, sizeBytes, this.bounce, buffer, at, rest, offsetBytes + first);
      }
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, name));
    }
  }
}
