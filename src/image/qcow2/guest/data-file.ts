// An external data file: a QcowFile that the guest's clusters stand in, and the two things that only it is asked for,
// zeroes and letting storage go. It is never in the image's format, and never probed.
//
// Zeroes come from fallocate where the file system has it, a piece in each turn of the event loop; else they are
// written, which is also what happens with O_DIRECT, where a write of part of a block reads and writes all of it, and
// fallocate would not know of that (direct-file.ts keeps writes apart, but only writes).
// Main thread only.

import { constants } from "node:os";
import { setImmediate as nextTurn } from "node:timers/promises";
import { libc } from "../../../native/libc.js";
import { KiB, MiB } from "../../../units.js";
import type { Completion } from "../../../block/device.js";
import { errnoError } from "../../../block/file/fileio.js";
import { BufferedFile, type QcowFile } from "../format/file.js";

/** One fallocate call. */
const PIECE_BYTES = 16 * MiB;
/** Up to here zeroes are written: cheaper than fallocate, which may wait for dirty pages. */
const WRITTEN_BYTES = 64 * KiB;
const ZEROES = new Uint8Array(256 * KiB);
const FALLOCATE_UNSUPPORTED = new Set([
  -constants.errno.EOPNOTSUPP,
  -constants.errno.ENOSYS,
  -constants.errno.ENODEV,
  -constants.errno.EINVAL,
]);

export class DataFile {
  private canFallocate: boolean;

  constructor(
    readonly file: QcowFile,
    /** It must read as the guest's disk by itself. */
    readonly isRaw: boolean,
  ) {
    this.canFallocate = libc !== null && file instanceof BufferedFile;
  }

  /** The range reads as zeroes afterwards. @throws CowcatcherError IO or NO_SPACE */
  zero(offsetBytes: number, lengthBytes: number, mayUnmap: boolean): Completion {
    const end = this.endWithin(offsetBytes + lengthBytes);
    if (offsetBytes >= end) return undefined;
    if (end - offsetBytes <= WRITTEN_BYTES && !mayUnmap) {
      return this.file.write(ZEROES, 0, end - offsetBytes, offsetBytes);
    }
    const pieceEnd = Math.min(end, offsetBytes + PIECE_BYTES);
    if (!this.fallocate(offsetBytes, pieceEnd, mayUnmap)) return this.writeZeroes(offsetBytes, end);
    return pieceEnd === end ? undefined : this.zeroRest(pieceEnd, end, mayUnmap);
  }

  /** The bytes are of no interest any more: advice, so that no error comes of it. */
  discard(offsetBytes: number, lengthBytes: number): Completion {
    const end = this.endWithin(offsetBytes + lengthBytes);
    if (!this.canFallocate || offsetBytes >= end) return undefined;
    const pieceEnd = Math.min(end, offsetBytes + PIECE_BYTES);
    libc?.punchHole(this.file.fd, offsetBytes, pieceEnd - offsetBytes);
    return pieceEnd === end ? undefined : this.discardRest(pieceEnd, end);
  }

  /** What lies beyond the end of a regular file reads as zeroes and takes no space. */
  private endWithin(end: number): number {
    return this.file.isBlockDevice ? end : Math.min(end, this.file.endOffset);
  }

  private async zeroRest(offsetBytes: number, end: number, mayUnmap: boolean): Promise<void> {
    for (let at = offsetBytes; at < end; at += PIECE_BYTES) {
      await nextTurn();
      if (!this.fallocate(at, Math.min(end, at + PIECE_BYTES), mayUnmap)) {
        await this.writeZeroes(at, end);
        return;
      }
    }
  }

  private async discardRest(offsetBytes: number, end: number): Promise<void> {
    for (let at = offsetBytes; at < end; at += PIECE_BYTES) {
      await nextTurn();
      libc?.punchHole(this.file.fd, at, Math.min(end, at + PIECE_BYTES) - at);
    }
  }

  /** @returns false where the file system cannot */
  private fallocate(offsetBytes: number, end: number, mayUnmap: boolean): boolean {
    if (!this.canFallocate || libc === null) return false;
    const { fd, name } = this.file;
    const lengthBytes = end - offsetBytes;
    const result = mayUnmap
      ? libc.punchHole(fd, offsetBytes, lengthBytes)
      : libc.zeroRange(fd, offsetBytes, lengthBytes);
    if (FALLOCATE_UNSUPPORTED.has(result)) return false;
    if (result < 0) throw errnoError("write zeroes", name, result, offsetBytes);
    return true;
  }

  private async writeZeroes(offsetBytes: number, end: number): Promise<void> {
    for (let at = offsetBytes; at < end; at += ZEROES.length) {
      await this.file.write(ZEROES, 0, Math.min(end - at, ZEROES.length), at);
      await nextTurn();
    }
  }
}
