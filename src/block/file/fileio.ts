// Whole reads and writes on a file descriptor, for the image drivers and the workers' readers.
//
// A system call may do less than it was asked; these functions go on until the range is done, the file ends or
// an error comes. The synchronous ones use libc where it is there (0.9 µs for 4 KiB in the page cache, against
// 1.6 µs by fs.readSync); the asynchronous ones are calls.ts's: through libuv's pool on the main thread.
// Nothing is kept between calls; any thread may call.

import * as fs from "node:fs";
import { constants } from "node:os";
import { isMainThread } from "node:worker_threads";
import { errnoName } from "../../errno.js";
import { type CowcatcherError, ioError } from "../../errors.js";
import { libc } from "../../native/libc.js";
import { pages } from "../../native/pages.js";
import { KiB } from "../../units.js";

export { closeFile, openFile, statPath, syncFileData } from "./calls.js";

/** What O_DIRECT asks of offsets, lengths and addresses at most: no device in use has larger logical blocks. */
export const DIRECT_ALIGNMENT_BYTES = 4096;
const EINTR = constants.errno.EINTR;

/** A typed error from libc's minus errno. */
export function errnoError(
  action: string,
  object: string,
  minusErrno: number,
  offsetBytes?: number,
): CowcatcherError {
  const code = errnoName(minusErrno);
  return ioError(action, object, Object.assign(new Error(code), { code }), offsetBytes);
}

/**
 * Memory whose address is a multiple of the page size, which O_DIRECT needs. Not shared between threads: copying to and
 * from shared memory is slow.
 */
export function pageAlignedMemory(lengthBytes: number): Uint8Array {
  return pages(lengthBytes);
}

/**
 * Reads until the range is full or the file ends. Blocks its thread.
 * @returns bytes read. @throws CowcatcherError IO with the offset.
 */
export function readFullySync(
  name: string,
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): number {
  let done = 0;
  while (done < lengthBytes) {
    const count = readOnceSync(name, fd, buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
    if (count === 0) break;
    done += count;
  }
  return done;
}

/** One read, which may be short. Blocks its thread. @throws CowcatcherError IO with the offset. */
export function readOnceSync(
  name: string,
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): number {
  return transferSync("read", name, fd, buffer, bufferOffset, lengthBytes, offsetBytes);
}

/** Writes the whole range. Blocks its thread. @throws CowcatcherError IO or NO_SPACE with the offset. */
export function writeFullySync(
  name: string,
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): void {
  let done = 0;
  while (done < lengthBytes) {
    const at = offsetBytes + done;
    const count = transferSync("write", name, fd, buffer, bufferOffset + done, lengthBytes - done, at);
    if (count === 0) throw wroteNothing(name, at);
    done += count;
  }
}

export type TransferAction = "read" | "write";
export type Transfer = typeof transfer;

/** One pread or pwrite, which may be short. */
function transferSync(
  action: TransferAction,
  name: string,
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): number {
  if (libc === null) {
    try {
      return action === "read"
        ? fs.readSync(fd, buffer, bufferOffset, lengthBytes, offsetBytes)
        : fs.writeSync(fd, buffer, bufferOffset, lengthBytes, offsetBytes);
    } catch (error) {
      throw ioError(action, name, error, offsetBytes);
    }
  }
  const position = buffer.byteOffset + bufferOffset;
  let result: number;
  do {
    result =
      action === "read"
        ? libc.pread(fd, buffer.buffer, position, lengthBytes, offsetBytes)
        : libc.pwrite(fd, buffer.buffer, position, lengthBytes, offsetBytes);
  } while (result === -EINTR);
  if (result < 0) throw errnoError(action, name, result, offsetBytes);
  return result;
}

/** Without an error the kernel writes nothing only to a broken device; to go on would be to loop for ever. */
function wroteNothing(name: string, offsetBytes: number): CowcatcherError {
  return errnoError("write", name, -constants.errno.EIO, offsetBytes);
}

/** What is shorter is read sooner than libuv's pool is asked: for callers that have the choice. */
export const POOL_READ_MIN_BYTES = 128 * KiB;

/** As readFullySync; on the main thread through libuv's pool. */
export async function readFully(
  name: string,
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): Promise<number> {
  let done = 0;
  while (done < lengthBytes) {
    const at = offsetBytes + done;
    const count = await transfer("read", name, fd, buffer, bufferOffset + done, lengthBytes - done, at);
    if (count === 0) break;
    done += count;
  }
  return done;
}

/**
 * As writeFullySync; on the main thread through libuv's pool.
 * @param transferOnce another way than the pool
 */
export async function writeFully(
  name: string,
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
  transferOnce: Transfer = transfer,
): Promise<void> {
  let done = 0;
  while (done < lengthBytes) {
    const at = offsetBytes + done;
    const count = await transferOnce("write", name, fd, buffer, bufferOffset + done, lengthBytes - done, at);
    if (count === 0) throw wroteNothing(name, at);
    done += count;
  }
}

/**
 * One pread or pwrite, which may be short. As transferSync; on the main thread through libuv's pool.
 * @throws CowcatherError IO or NO_SPACE with the offset.
 */
export function transfer(
  action: TransferAction,
  name: string,
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): Promise<number> {
  return new Promise((resolve, reject) => {
    if (!isMainThread) {
      resolve(transferSync(action, name, fd, buffer, bufferOffset, lengthBytes, offsetBytes));
      return;
    }
    const settle = (error: Error | null, count: number): void => {
      if (error) reject(ioError(action, name, error, offsetBytes));
      else resolve(count);
    };
    if (action === "read") fs.read(fd, buffer, bufferOffset, lengthBytes, offsetBytes, settle);
    else fs.write(fd, buffer, bufferOffset, lengthBytes, offsetBytes, settle);
  });
}

/**
 * Reads the first bytes of a file, for probing: fewer where the file is shorter. With O_DIRECT the address and
 * length must be aligned, hence a place of its own (one a thread, as it is used within one synchronous call).
 */
export function readFirstBytes(name: string, fd: number, lengthBytes: number): Uint8Array {
  firstBytesPlace ??= pageAlignedMemory(DIRECT_ALIGNMENT_BYTES);
  // One call: with O_DIRECT, going on from the odd end of a file would be refused.
  const count = readOnceSync(name, fd, firstBytesPlace, 0, firstBytesPlace.length, 0);
  return firstBytesPlace.slice(0, Math.min(count, lengthBytes));
}

let firstBytesPlace: Uint8Array | null = null;

export interface Extent {
  lengthBytes: number;
  zero: boolean;
}

/**
 * The run from offsetBytes on, at most lengthBytes, that is a hole (zero) or data, by SEEK_DATA and SEEK_HOLE:
 * two system calls however long the run is. What lies past the end of the file is a hole. Where the file cannot
 * tell (a block device, no libc) all of it is data.
 */
export function fileExtent(fd: number, offsetBytes: number, lengthBytes: number): Extent {
  if (libc === null) return { lengthBytes, zero: false };
  const dataAt = libc.seekData(fd, offsetBytes);
  if (dataAt === -constants.errno.ENXIO) return { lengthBytes, zero: true };
  if (dataAt < 0) return { lengthBytes, zero: false };
  if (dataAt > offsetBytes) return { lengthBytes: Math.min(lengthBytes, dataAt - offsetBytes), zero: true };
  const holeAt = libc.seekHole(fd, offsetBytes);
  const run = holeAt > offsetBytes ? holeAt - offsetBytes : lengthBytes;
  return { lengthBytes: Math.min(lengthBytes, run), zero: false };
}

/**
 * How far the hole at offsetBytes goes, 0 where there is data or the file cannot tell, Infinity where no data follows.
 * One SEEK_DATA, which ends at the first byte of data. SEEK_HOLE would walk to the end of the data (on tmpfs page by
 * page, 15 ms a GiB) and hold the inode's lock meanwhile, which every write to the file waits for.
 */
export function fileHole(fd: number, offsetBytes: number): number {
  const dataAt = libc === null ? offsetBytes : libc.seekData(fd, offsetBytes);
  if (dataAt === -constants.errno.ENXIO) return Infinity;
  return Math.max(0, dataAt - offsetBytes);
}

/**
 * `fileExtent`, with the last run of data remembered: SEEK_HOLE may walk all of a large file to find the next hole,
 * and whoever reads through a file asks again for each stretch of it. One thread.
 */
export class FileExtents {
  private dataFrom = 0;
  private dataEnd = 0;

  constructor(private readonly fd: number) {}

  /** A hole that another process has made meanwhile may still count as data. */
  extentAt(offsetBytes: number, lengthBytes: number): Extent {
    if (offsetBytes < this.dataFrom || offsetBytes >= this.dataEnd) {
      const extent = fileExtent(this.fd, offsetBytes, Number.MAX_SAFE_INTEGER - offsetBytes);
      if (extent.zero) return { lengthBytes: Math.min(lengthBytes, extent.lengthBytes), zero: true };
      this.dataFrom = offsetBytes;
      this.dataEnd = offsetBytes + extent.lengthBytes;
    }
    return { lengthBytes: Math.min(lengthBytes, this.dataEnd - offsetBytes), zero: false };
  }

  /** To be called when this process may have made a hole. */
  forget(): void {
    this.dataFrom = this.dataEnd = 0;
  }
}
