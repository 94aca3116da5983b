// The layer between the qcow2 driver and its file: reads, writes, sync, and nothing else.
//
// It exists for two reasons: O_DIRECT needs aligned buffers, offsets and lengths, which nothing above should know;
// and tests put a recorder here to replay every prefix of what was written.
//
// One process writes the file (its locks say so), so its length is known without asking: `endOffset`. What is read up
// to there must be there: if it is not, another program has cut the file short, and that is an error (file-end.ts). What
// lies beyond reads as zeroes, as a cluster may be allocated and never written to its end; whether anything may be
// wanted there at all is the caller's to ask (stored.ts).
// Main thread only.

import * as fs from "node:fs";
import { ioError } from "../../../errors.js";
import { EAGAIN, EOPNOTSUPP, libc } from "../../../native/libc.js";
import type { Completion } from "../../../block/device.js";
import { sizeOf } from "../../../block/file/device-size.js";
import { assertNotCut, cutShortError, fileEnd } from "../../../block/file/file-end.js";
import {
  closeFile,
  errnoError,
  readFully,
  readFullySync,
  syncFileData,
  writeFullySync,
} from "../../../block/file/fileio.js";

export interface QcowFile {
  readonly name: string;
  readonly fd: number;
  readonly isBlockDevice: boolean;
  /** One past the last byte that is stored. */
  readonly endOffset: number;
  /** Fills buffer[bufferOffset, +lengthBytes); done at once where the page cache has the data. */
  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  /** The same, blocking the thread: for opening, and for what is small and rare. */
  readSync(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void;
  /** The same by libuv's pool, whether the page cache has the data or not. Undefined: such a file has only the others. */
  readInPool?(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void>;
  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  /** Lets go of the storage of a range, which reads as zeroes then: advice. Undefined: such a file has no holes. */
  punch?(offsetBytes: number, lengthBytes: number): void;
  /** fdatasync. Rejects also where the file has become shorter. */
  sync(): Promise<void>;
  /** @throws CowcatcherError IO where the file has become shorter. */
  assertNotCut?(): void;
  /**
   * A copy reads the file: each write looks first whether it has become shorter, as it would let it grow again, with
   * zeroes where something is lost.
   */
  isWatched?: boolean;
  close(): Promise<void>;
}

const TMPFS_MAGIC = 0x01021994;

/** What both kinds of file have in common. */
export abstract class QcowFileBase {
  readonly isBlockDevice: boolean;
  endOffset: number;
  isWatched = false;
  private canPunch = true;

  /** @param endOffset where the file is known to have ended; undefined: it ends where it should */
  constructor(
    readonly fd: number,
    readonly name: string,
    endOffset?: number,
  ) {
    try {
      const stats = fs.fstatSync(fd);
      this.isBlockDevice = stats.isBlockDevice();
      this.endOffset = endOffset ?? sizeOf(name, fd, stats);
    } catch (error) {
      throw ioError("examine", name, error);
    }
  }

  assertNotCut(): void {
    assertNotCut(this.name, this.fd, this.endOffset);
  }

  punch(offsetBytes: number, lengthBytes: number): void {
    if (this.canPunch && libc !== null)
      this.canPunch = libc.punchHole(this.fd, offsetBytes, lengthBytes) >= 0;
  }

  protected grewTo(end: number): void {
    if (end > this.endOffset) this.endOffset = end;
  }

  /** A write that fails halfway may have left bytes behind the end, and they count. */
  protected growByFailedWrite(): void {
    this.grewTo(fileEnd(this.name, this.fd));
  }

  private syncError: Error | null = null;

  /** After a failed fdatasync the kernel has dropped the pages: no later one can make them safe again. */
  async sync(): Promise<void> {
    if (this.syncError !== null) throw this.syncError;
    try {
      await this.syncData();
    } catch (error) {
      this.syncError = ioError("flush", this.name, error);
      throw this.syncError;
    }
    this.assertNotCut();
  }

  protected syncData(): Promise<void> {
    return syncFileData(this.fd);
  }

  async close(): Promise<void> {
    try {
      await closeFile(this.fd);
    } catch (error) {
      throw ioError("close", this.name, error);
    }
  }
}

/** Buffered I/O: reads try the page cache first, writes go to it synchronously. */
export class BufferedFile extends QcowFileBase implements QcowFile {
  /** A file in memory never blocks; tmpfs may lack RWF_NOWAIT. */
  private readonly isMemory: boolean;
  private hasNowait = libc !== null;

  constructor(fd: number, name: string, endOffset?: number) {
    super(fd, name, endOffset);
    this.isMemory = isTmpfs(fd);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const stored = Math.min(lengthBytes, Math.max(0, this.endOffset - offsetBytes));
    if (stored < lengthBytes) buffer.fill(0, bufferOffset + stored, bufferOffset + lengthBytes);
    if (stored === 0) return undefined;
    const done = this.readCached(buffer, bufferOffset, stored, offsetBytes);
    if (done === stored) return undefined;
    return this.readRest(buffer, bufferOffset + done, stored - done, offsetBytes + done);
  }

  /** Bytes that were read without blocking. */
  private readCached(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number {
    if (libc === null) return 0;
    const position = buffer.byteOffset + bufferOffset;
    let result: number;
    if (this.isMemory) result = libc.pread(this.fd, buffer.buffer, position, lengthBytes, offsetBytes);
    else if (!this.hasNowait) return 0;
    else result = libc.readNowait(this.fd, buffer.buffer, position, lengthBytes, offsetBytes);
    if (result >= 0) return result;
    if (result === -EOPNOTSUPP) this.hasNowait = false;
    else if (result !== -EAGAIN) throw errnoError("read", this.name, result, offsetBytes);
    return 0;
  }

  private async readRest(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const done = await readFully(this.name, this.fd, buffer, bufferOffset, lengthBytes, offsetBytes);
    if (done < lengthBytes) throw cutShortError(this.name, offsetBytes + done, this.endOffset);
  }

  async readInPool(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const stored = Math.min(lengthBytes, Math.max(0, this.endOffset - offsetBytes));
    await this.readRest(buffer, bufferOffset, stored, offsetBytes);
    buffer.fill(0, bufferOffset + stored, bufferOffset + lengthBytes);
  }

  readSync(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    // Within the file's size, as read(): a file of /proc says that it is empty, and yet has bytes to read.
    const stored = Math.min(lengthBytes, Math.max(0, this.endOffset - offsetBytes));
    const done = readFullySync(this.name, this.fd, buffer, bufferOffset, stored, offsetBytes);
    if (done < stored) throw cutShortError(this.name, offsetBytes + done, this.endOffset);
    buffer.fill(0, bufferOffset + done, bufferOffset + lengthBytes);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    if (this.isWatched) this.assertNotCut();
    try {
      writeFullySync(this.name, this.fd, buffer, bufferOffset, lengthBytes, offsetBytes);
    } catch (error) {
      this.growByFailedWrite();
      throw error;
    }
    this.grewTo(offsetBytes + lengthBytes);
    return undefined;
  }
}

function isTmpfs(fd: number): boolean {
  try {
    return fs.statfsSync(`/proc/self/fd/${fd}`).type === TMPFS_MAGIC;
  } catch {
    return false;
  }
}
