// The layer between the qcow2 driver and its file: reads, writes, sync, and nothing else.
//
// It exists for two reasons: O_DIRECT needs aligned buffers, offsets and lengths, which nothing above should know;
// and tests put a recorder here to replay every prefix of what was written.
//
// What lies beyond the end of the file reads as zeroes (a cluster may be allocated and never written to its end).
// Main thread only. One process writes the file (its locks say so), so its length is known without asking.

import * as fs from "node:fs";
import { getSystemErrorName } from "node:util";
import { ioError } from "../../errors.js";
import { EAGAIN, EOPNOTSUPP, libc } from "../../native/libc.js";
import type { Completion } from "../device.js";

export interface QcowFile {
  readonly name: string;
  readonly fd: number;
  readonly isBlockDevice: boolean;
  /** One past the last byte that may be other than zero. */
  readonly endOffset: number;
  /** Fills buffer[bufferOffset, +lengthBytes); done at once where the page cache has the data. */
  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  /** The same, blocking the thread: for opening, and for what is small and rare. */
  readSync(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void;
  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  /** fdatasync. */
  sync(): Promise<void>;
  close(): Promise<void>;
}

/** fs.close as a promise, with typed errors. */
export function closeFd(fd: number, name: string): Promise<void> {
  return new Promise((resolve, reject) => {
    fs.close(fd, (error) => (error ? reject(ioError("close", name, error)) : resolve()));
  });
}

export function fdatasync(fd: number, name: string): Promise<void> {
  return new Promise((resolve, reject) => {
    fs.fdatasync(fd, (error) => (error ? reject(ioError("flush", name, error)) : resolve()));
  });
}

/** Reads until done or the end of the file; resolves with the count. */
export async function readFully(
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
  name: string,
): Promise<number> {
  let done = 0;
  while (done < lengthBytes) {
    const count = await new Promise<number>((resolve, reject) => {
      fs.read(fd, buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done, (error, bytesRead) =>
        error ? reject(ioError("read", name, error, offsetBytes + done)) : resolve(bytesRead),
      );
    });
    if (count === 0) break;
    done += count;
  }
  return done;
}

/** A negated errno as the kind of error that Node throws. */
export function systemError(result: number): Error {
  const code = getSystemErrorName(result);
  return Object.assign(new Error(code), { code });
}

export interface FileFacts {
  isBlockDevice: boolean;
  sizeBytes: number;
}

/** @throws CowcatcherError IO */
export function fileFacts(fd: number, name: string): FileFacts {
  try {
    const stat = fs.fstatSync(fd);
    if (!stat.isBlockDevice()) return { isBlockDevice: false, sizeBytes: stat.size };
    return { isBlockDevice: true, sizeBytes: blockDeviceSize(fd) };
  } catch (cause) {
    throw ioError("examine", name, cause);
  }
}

/** A device has no length in fstat; the last offset that can be read is found by bisection. */
function blockDeviceSize(fd: number): number {
  const block = Buffer.alloc(4096);
  let low = 0;
  let high = 2 ** 41; // in blocks of 4 KiB: 8 PiB
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    let count = 0;
    try {
      count = fs.readSync(fd, block, 0, block.length, middle * block.length);
    } catch {
      count = 0;
    }
    if (count === block.length) low = middle + 1;
    else high = middle;
  }
  return low * block.length;
}

const TMPFS_MAGIC = 0x01021994;

/** Buffered I/O: reads try the page cache first, writes go to it synchronously. */
export class BufferedFile implements QcowFile {
  readonly isBlockDevice: boolean;
  endOffset: number;
  /** A file in memory never blocks; tmpfs may lack RWF_NOWAIT. */
  private readonly isMemory: boolean;
  private hasNowait = libc !== null;

  constructor(
    readonly fd: number,
    readonly name: string,
  ) {
    const facts = fileFacts(fd, name);
    this.isBlockDevice = facts.isBlockDevice;
    this.endOffset = facts.sizeBytes;
    this.isMemory = process.platform === "linux" && isTmpfs(fd);
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
    else if (result !== -EAGAIN) throw ioError("read", this.name, systemError(result), offsetBytes);
    return 0;
  }

  private async readRest(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const done = await readFully(this.fd, buffer, bufferOffset, lengthBytes, offsetBytes, this.name);
    if (done < lengthBytes) buffer.fill(0, bufferOffset + done, bufferOffset + lengthBytes);
  }

  readSync(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    let done = 0;
    try {
      while (done < lengthBytes) {
        const count = fs.readSync(
          this.fd,
          buffer,
          bufferOffset + done,
          lengthBytes - done,
          offsetBytes + done,
        );
        if (count === 0) break;
        done += count;
      }
    } catch (cause) {
      throw ioError("read", this.name, cause, offsetBytes + done);
    }
    buffer.fill(0, bufferOffset + done, bufferOffset + lengthBytes);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    let done = 0;
    while (done < lengthBytes) {
      done += this.writeOnce(buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
    }
    this.endOffset = Math.max(this.endOffset, offsetBytes + lengthBytes);
    return undefined;
  }

  private writeOnce(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number {
    try {
      if (libc === null) return fs.writeSync(this.fd, buffer, bufferOffset, lengthBytes, offsetBytes);
      const position = buffer.byteOffset + bufferOffset;
      const count = libc.pwrite(this.fd, buffer.buffer, position, lengthBytes, offsetBytes);
      if (count < 0) throw systemError(count);
      return count;
    } catch (cause) {
      throw ioError("write", this.name, cause, offsetBytes);
    }
  }

  sync(): Promise<void> {
    return fdatasync(this.fd, this.name);
  }

  close(): Promise<void> {
    return closeFd(this.fd, this.name);
  }
}

function isTmpfs(fd: number): boolean {
  try {
    return fs.statfsSync(`/proc/self/fd/${fd}`).type === TMPFS_MAGIC;
  } catch {
    return false;
  }
}
