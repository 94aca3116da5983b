// The file of an export's disk, read past the server, which goes on writing to it. A worker's; one thread.
//
// Of a guest's raw disk the server's own work for a read is a copy of the file's bytes through its one thread and a socket,
// which the guest's requests wait for. On the same machine the bytes can be had from the file itself:
//
//   read the live file ──► lay over it what was kept of T0, looked up afterwards
//
// It is right for the reason that a read of a disk of our own is (cow/chunk-copy.ts). Whoever keeps the old data has it
// before the guest's write to the file begins. So a byte of what was read is T0's, or its old data is there by the
// time that the read is over. Where the old data is in our own buffer, the workers lay it over themselves. Where it is
// in a file of its server's (`oldDataFd`) it is laid over here: that file has data just where something was kept, and a
// hole elsewhere. Not kept as data are zeroes: what QEMU finds a hole when it is to keep it. So only what was written by T0
// is read here (`written`, block/file/written-extents.ts), and that is a hole no more before it is kept.
//
// The page cache is one for both, or both read with O_DIRECT. What cannot be read is asked of the server, who has the words.

import { EINTR, ENXIO, libc } from "../../native/libc.js";
import type { LiveFileDescription } from "../../block/device.js";
import { ExtentReader } from "../../block/extent-map.js";

export class LiveFile {
  readonly #fd: number;
  readonly #oldDataFd: number | null;
  readonly #written: ExtentReader | null;

  constructor({ fd, oldDataFd, written }: LiveFileDescription) {
    this.#fd = fd;
    this.#oldDataFd = oldDataFd;
    this.#written = written === undefined ? null : new ExtentReader(written, false);
  }

  /** True: the buffer has the range as at T0, but for what the caller lays over it. False: nothing is known. */
  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): boolean {
    if (this.#written !== null) {
      const known = this.#written.extentAt(offsetBytes, lengthBytes);
      if (!known.flag || known.lengthBytes < lengthBytes) return false;
    }
    if (!readWhole(this.#fd, buffer, bufferOffset, lengthBytes, offsetBytes)) return false;
    return (
      this.#oldDataFd === null ||
      this.#layOver(this.#oldDataFd, buffer, bufferOffset, lengthBytes, offsetBytes)
    );
  }

  #layOver(
    fd: number,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): boolean {
    if (libc === null) return false;
    const end = offsetBytes + lengthBytes;
    for (let at = offsetBytes; at < end;) {
      const start = libc.seekData(fd, at);
      if (start === -ENXIO || start >= end) return true;
      if (start < at) return false;
      // Where the data has been let go of meanwhile it ends where it began: that is not asked for any more.
      const stop = Math.min(end, libc.seekHole(fd, start));
      if (stop <= start) return false;
      if (!readWhole(fd, buffer, bufferOffset + start - offsetBytes, stop - start, start)) return false;
      at = stop;
    }
    return true;
  }
}

function readWhole(
  fd: number,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): boolean {
  if (libc === null) return false;
  const base = buffer.byteOffset + bufferOffset;
  for (let done = 0; done < lengthBytes;) {
    const count = libc.pread(fd, buffer.buffer, base + done, lengthBytes - done, offsetBytes + done);
    if (count === -EINTR) continue;
    if (count <= 0) return false;
    done += count;
  }
  return true;
}
