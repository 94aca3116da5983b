// Positioned writes and zeroes that answer with minus errno instead of an exception, so that a caller can take
// another way (a buffered descriptor where O_DIRECT says EINVAL, written zeroes where the device has no command
// for them) and can name the guest's offset in the error, not the file's. They block their thread; workers only.

import { writeSync } from "node:fs";
import { constants } from "node:os";
import { type CowcatcherError } from "../../errors.js";
import { errnoError, pageAlignedMemory } from "../../block/file/fileio.js";
import { libc } from "../../native/libc.js";
import { MiB } from "../../units.js";

const { EINTR, EINVAL, EIO } = constants.errno;

/** Writes the whole range, however many calls it takes. @returns 0 or minus errno. */
export function pwriteAll(
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  fileOffsetBytes: number,
): number {
  let done = 0;
  while (done < lengthBytes) {
    const result = pwriteOnce(fd, buffer, bufferOffset + done, lengthBytes - done, fileOffsetBytes + done);
    if (result === -EINTR) continue;
    if (result < 0) return result;
    // A write of nothing without an error would loop for ever.
    if (result === 0) return -EIO;
    done += result;
  }
  return 0;
}

function pwriteOnce(
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  fileOffsetBytes: number,
): number {
  if (libc !== null) {
    return libc.pwrite(fd, buffer.buffer, buffer.byteOffset + bufferOffset, lengthBytes, fileOffsetBytes);
  }
  try {
    return writeSync(fd, buffer, bufferOffset, lengthBytes, fileOffsetBytes);
  } catch (error) {
    const number = (error as NodeJS.ErrnoException).errno;
    return number === undefined ? -EIO : number;
  }
}

/**
 * As pwriteAll, on an O_DIRECT descriptor if there is one. What O_DIRECT refuses (the odd end of a disk, a buffer
 * that is not aligned) goes through `bufferedFd` to the same place. The two never meet in one page, since only
 * the disk's last range is odd.
 */
export function pwriteData(
  dataFd: number,
  bufferedFd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  fileOffsetBytes: number,
): number {
  const result = pwriteAll(dataFd, buffer, bufferOffset, lengthBytes, fileOffsetBytes);
  if (result !== -EINVAL || dataFd === bufferedFd) return result;
  return pwriteAll(bufferedFd, buffer, bufferOffset, lengthBytes, fileOffsetBytes);
}

/** A failed write as the error the user sees: the target's name and the guest's offset. */
export function writeError(name: string, minusErrno: number, guestOffsetBytes: number): CowcatcherError {
  return errnoError("write", name, minusErrno, guestOffsetBytes);
}

/** Large enough that a call's cost is lost in the copying. */
const ZEROES_BYTES = 1 * MiB;
let zeroes: Uint8Array | null = null;

/**
 * Makes ranges of a block device zero. Tries to release them (a thin device then stays thin), then to zero them
 * in the device, then writes zeroes. A way that failed once is not tried again: the device does not have it, or
 * the range was odd, and odd ranges are rare and at the end.
 */
export class Zeroer {
  #canPunch = libc !== null;
  #canZero = libc !== null;

  /** @returns 0 or minus errno. */
  zero(fd: number, fileOffsetBytes: number, lengthBytes: number): number {
    if (this.#canPunch && libc !== null) {
      if (libc.punchHole(fd, fileOffsetBytes, lengthBytes) === 0) return 0;
      this.#canPunch = false;
    }
    if (this.#canZero && libc !== null) {
      if (libc.zeroRange(fd, fileOffsetBytes, lengthBytes) === 0) return 0;
      this.#canZero = false;
    }
    return writeZeroBytes(fd, fileOffsetBytes, lengthBytes);
  }
}

function writeZeroBytes(fd: number, fileOffsetBytes: number, lengthBytes: number): number {
  zeroes ??= pageAlignedMemory(ZEROES_BYTES);
  for (let done = 0; done < lengthBytes; done += ZEROES_BYTES) {
    const bytes = Math.min(ZEROES_BYTES, lengthBytes - done);
    const result = pwriteAll(fd, zeroes, 0, bytes, fileOffsetBytes + done);
    if (result < 0) return result;
  }
  return 0;
}
