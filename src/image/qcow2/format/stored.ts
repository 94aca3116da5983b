// Whether what a table or a mapping refers to is in the file at all.
//
// A file that was copied in part, or filled its disk, ends sooner than its tables say. QEMU reads what is missing as
// zeroes; here it is an error. What is legal: the file's last host cluster may be stored in part, as nobody need write a
// new cluster to its end, and zeroes follow then; the last sector of compressed data likewise. Tables are always
// written whole, so nothing of one may be missing. (qemu-img create with preallocation=metadata makes the file as long as
// all the clusters that it maps: preallocate_co in block/qcow2.c of qemu/qemu.)
// Any thread.

import { CowcatcherError } from "../../../errors.js";
import type { QcowFile } from "./file.js";

const SECTOR_BYTES = 512;

type Place = Pick<QcowFile, "name" | "endOffset">;

/** @param what the table, for the error. @throws CowcatcherError FORMAT where a part of it is missing */
export function assertStored(file: Place, what: string, offsetBytes: number, lengthBytes: number): void {
  if (lengthBytes > 0 && offsetBytes + lengthBytes > file.endOffset) throw notStored(file, what, offsetBytes);
}

/**
 * Of a run of guest data: that no cluster of it is missing as a whole.
 * @throws CowcatcherError FORMAT
 */
export function assertClustersStored(
  file: Place,
  clusterSizeBytes: number,
  offsetBytes: number,
  lengthBytes: number,
): void {
  const end = offsetBytes + lengthBytes;
  if (end <= file.endOffset) return;
  const lastCluster = end - 1 - ((end - 1) % clusterSizeBytes);
  if (lastCluster >= file.endOffset)
    throw notStored(file, "a cluster", Math.max(offsetBytes, file.endOffset));
}

/**
 * Of compressed data, which begins anywhere and is counted in sectors: how much of it there is. The sector with its end
 * may be stored in part; the decompressor is to get no more than that, and says if it needs more.
 * @throws CowcatcherError FORMAT where a whole sector of it is missing
 */
export function compressedBytesStored(file: Place, offsetBytes: number, lengthBytes: number): number {
  const missing = offsetBytes + lengthBytes - file.endOffset;
  if (missing >= SECTOR_BYTES) throw notStored(file, "a compressed cluster", offsetBytes);
  return lengthBytes - Math.max(0, missing);
}

function notStored(file: Place, what: string, offsetBytes: number): CowcatcherError {
  return new CowcatcherError({
    code: "FORMAT",
    object: file.name,
    problem: `${what} lies behind the end of the file, at ${file.endOffset} bytes: the file has been cut short`,
    hint: "copy the whole file again; what is missing is lost otherwise",
    offsetBytes,
  });
}
