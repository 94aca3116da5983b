// The size of a block device, without ioctl(BLKGETSIZE64), which Node lacks.

import { readFileSync } from "node:fs";
import type { Stats } from "node:fs";
import { DIRECT_ALIGNMENT_BYTES, pageAlignedMemory, readFullySync } from "./fileio.js";
import { CowcatcherError } from "../../errors.js";

/** The unit of /sys/dev/block/…/size, whatever the device's own block size. */
const SYSFS_SECTOR_BYTES = 512;

/** Bytes of the file or block device that `stats` describes. @throws CowcatcherError IO */
export function sizeOf(name: string, fd: number, stats: Stats): number {
  return stats.isBlockDevice() ? blockDeviceSize(name, fd, stats.rdev) : stats.size;
}

function blockDeviceSize(name: string, fd: number, rdev: number): number {
  const sectors = readSysfsSectors(rdev);
  return sectors === null ? searchEnd(name, fd) : sectors * SYSFS_SECTOR_BYTES;
}

/** Linux's dev_t: 12 bits of major from bit 8 on, minor in the low 8 and from bit 20 on. */
function readSysfsSectors(rdev: number): number | null {
  const major = Math.floor(rdev / 2 ** 8) & 0xfff;
  const minor = (rdev & 0xff) | (Math.floor(rdev / 2 ** 12) & 0xfff00);
  try {
    const sectors = Number(readFileSync(`/sys/dev/block/${major}:${minor}/size`, "utf8").trim());
    return Number.isSafeInteger(sectors) ? sectors : null;
  } catch {
    return null;
  }
}

/** Where /sys is not mounted: halving between an offset that can be read and one that cannot, 53 steps at most. */
function searchEnd(name: string, fd: number): number {
  const place = pageAlignedMemory(DIRECT_ALIGNMENT_BYTES);
  const isInside = (block: number): boolean => {
    try {
      const offsetBytes = block * SYSFS_SECTOR_BYTES;
      return readFullySync(name, fd, place, 0, SYSFS_SECTOR_BYTES, offsetBytes) > 0;
    } catch (error) {
      if (error instanceof CowcatcherError && error.errno === "EINVAL") return false;
      throw error;
    }
  };
  let inside = -1;
  let outside = 2 ** 44;
  while (outside - inside > 1) {
    const middle = Math.floor((inside + outside) / 2);
    if (isInside(middle)) inside = middle;
    else outside = middle;
  }
  return outside * SYSFS_SECTOR_BYTES;
}
