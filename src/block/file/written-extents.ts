// Which ranges of a file are written: that its file system holds data for, and calls data for as long as nobody punches them out.
//
// SEEK_DATA is no such answer. Of a range that was allocated and never written (fallocate, an extent size hint of XFS) it says
// "data" while pages of zeroes that were only read stand in the page cache, and "hole" when they are gone.
// Specification: the kernel's Documentation/filesystems/fiemap.rst.

import { type ExtentMap, ExtentMapBuilder } from "../extent-map.js";
import { libc } from "../../native/libc.js";

const HEADER_BYTES = 32;
const EXTENT_BYTES = 56;
const EXTENTS_PER_CALL = 1024;
const FIEMAP_EXTENT_LAST = 0x1;
const FIEMAP_EXTENT_UNWRITTEN = 0x800;

/**
 * Flagged: written, or about to be (delayed allocation). Synchronous: some system calls, 1024 extents each.
 * @returns null where the file system does not tell, or of more extents than a map holds
 */
export function writtenExtents(fd: number, sizeBytes: number): ExtentMap | null {
  if (libc === null) return null;
  // struct fiemap, and behind it structs fiemap_extent: in the machine's byte order, which is little-endian (native/libc.ts).
  const answer = new DataView(new ArrayBuffer(HEADER_BYTES + EXTENTS_PER_CALL * EXTENT_BYTES));
  const map = new ExtentMapBuilder();
  let isLast = false;
  while (!isLast && map.endBytes < sizeBytes) {
    answer.setBigUint64(0, BigInt(map.endBytes), true);
    answer.setBigUint64(8, BigInt(sizeBytes - map.endBytes), true);
    answer.setUint32(16, 0, true);
    answer.setUint32(24, EXTENTS_PER_CALL, true);
    if (libc.extentMap(fd, answer.buffer) < 0) return null;
    const count = answer.getUint32(20, true);
    if (count === 0) break;
    const before = map.endBytes;
    for (let at = HEADER_BYTES; at < HEADER_BYTES + count * EXTENT_BYTES; at += EXTENT_BYTES) {
      if (map.isFull) return null;
      const start = Number(answer.getBigUint64(at, true));
      const end = Math.min(start + Number(answer.getBigUint64(at + 16, true)), sizeBytes);
      const flags = answer.getUint32(at + 40, true);
      map.add(Math.min(start, sizeBytes), false);
      map.add(end, (flags & FIEMAP_EXTENT_UNWRITTEN) === 0);
      isLast = (flags & FIEMAP_EXTENT_LAST) !== 0;
    }
    if (map.endBytes === before && !isLast) return null;
  }
  return map.finish();
}
