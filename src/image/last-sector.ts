// Disks are counted in sectors, as QEMU counts them: what lies between a disk's end and that of its last sector belongs
// to it, reads as zeroes, and is provided by whoever provides the disk.

import { roundUp } from "../units.js";
import type { BlockStatus, Image } from "../block/device.js";

export const SECTOR_BYTES = 512;

/** Of what is counted of a disk: up to the end of its last sector, in bytes. */
export function endOfLastSector({ sizeBytes }: Pick<Image, "sizeBytes">): number {
  return roundUp(sizeBytes, SECTOR_BYTES);
}

/** Of a range between the end of a disk and that of its last sector, the range's length at most. */
export function lastSectorStatus(
  image: Pick<Image, "sizeBytes" | "files">,
  offsetBytes: number,
  lengthBytes: number,
): BlockStatus {
  return {
    lengthBytes: Math.min(lengthBytes, endOfLastSector(image) - offsetBytes),
    zero: true,
    data: false,
    depth: 0,
    present: true,
    compressed: false,
    // An export has no place for it.
    hostOffsetBytes: image.files.length === 0 ? undefined : offsetBytes,
  };
}
