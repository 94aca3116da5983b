// Storage for a new file, before anything is written to it: none, reserved by the file system, or written as zeroes.
// Synchronous: whoever creates an image waits for it.

import { constants } from "node:os";
import { libc } from "../../native/libc.js";
import { MiB } from "../../units.js";
import { errnoError, writeFullySync } from "./fileio.js";

/** QEMU's modes. `metadata` concerns the format's tables alone. */
export const PREALLOCATIONS = ["off", "metadata", "falloc", "full"] as const;
export type Preallocation = (typeof PREALLOCATIONS)[number];

const PIECE_BYTES = 1 * MiB;
/** One fallocate call. */
const RESERVED_PIECE_BYTES = 1024 * MiB;
const FALLOCATE_UNSUPPORTED = new Set([-constants.errno.EOPNOTSUPP, -constants.errno.ENOSYS]);

/**
 * Of a range that is a hole. Where the file system cannot reserve, zeroes are written, as posix_fallocate does it.
 * @throws CowcatcherError IO or NO_SPACE
 */
export function preallocate(
  fd: number,
  name: string,
  mode: Preallocation,
  offsetBytes: number,
  lengthBytes: number,
): void {
  if (mode === "full" || (mode === "falloc" && !reserve(fd, name, offsetBytes, lengthBytes))) {
    writeZeroes(fd, name, offsetBytes, lengthBytes);
  }
}

function reserve(fd: number, name: string, offsetBytes: number, lengthBytes: number): boolean {
  if (libc === null) return false;
  for (let done = 0; done < lengthBytes; done += RESERVED_PIECE_BYTES) {
    const at = offsetBytes + done;
    const result = libc.allocate(fd, at, Math.min(RESERVED_PIECE_BYTES, lengthBytes - done));
    if (FALLOCATE_UNSUPPORTED.has(result)) return false;
    if (result < 0) throw errnoError("reserve space", name, result, at);
  }
  return true;
}

function writeZeroes(fd: number, name: string, offsetBytes: number, lengthBytes: number): void {
  const zeroes = new Uint8Array(Math.min(PIECE_BYTES, lengthBytes));
  for (let done = 0; done < lengthBytes; done += zeroes.length) {
    writeFullySync(name, fd, zeroes, 0, Math.min(zeroes.length, lengthBytes - done), offsetBytes + done);
  }
}
