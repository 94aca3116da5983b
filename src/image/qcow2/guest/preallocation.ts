// Whether an image's metadata was preallocated: many more clusters are counted as used than the file system stores.
//
// Then the tables call clusters data that nobody has ever written, and it is worth asking the file system for holes in
// them. The measure is QEMU's: clusters in use are counted from the start of the file until they exceed what is stored
// by a ninth, and by two at least. It is a hint: what cannot be read counts as not preallocated, as for QEMU.
//
// The file's refcounts are read, not the cached ones: those that a running guest has not flushed yet do not matter to
// the measure. The event loop runs between blocks. Bound: MAX_COUNTED_CLUSTERS, 16 TiB of file with clusters of 64 KiB.
// Main thread.

import { fstatSync } from "node:fs";
import { setImmediate as nextTurn } from "node:timers/promises";
import type { EntryTable } from "../format/entry-table.js";
import type { QcowFile } from "../format/file.js";
import type { Qcow2Header } from "../format/header.js";

const MAX_COUNTED_CLUSTERS = 2 ** 28;
/** Of st_blocks (stat(2)). */
const STAT_BLOCK_BYTES = 512;
/** A refcount table entry is an offset but for its nine lowest bits. */
const TABLE_HIGH_MASK = 0x7fffffff;
const ONES_OF_BYTE = Uint8Array.from({ length: 256 }, (_, byte) => countOnes(byte));

/** Never rejects. */
export async function isMetadataPreallocated(
  header: Qcow2Header,
  refcountTable: EntryTable,
  file: QcowFile,
): Promise<boolean> {
  try {
    return await hasMoreThanStored(header, refcountTable, file);
  } catch {
    return false;
  }
}

async function hasMoreThanStored(
  { clusterBits, refcountOrder }: Qcow2Header,
  refcountTable: EntryTable,
  file: QcowFile,
): Promise<boolean> {
  const clusterSizeBytes = 2 ** clusterBits;
  const storedClusters = Math.floor((fstatSync(file.fd).blocks * STAT_BLOCK_BYTES) / clusterSizeBytes);
  const threshold = Math.max(Math.floor((storedClusters * 10) / 9), storedClusters + 2);
  const endCluster = Math.min(MAX_COUNTED_CLUSTERS, Math.ceil(file.endOffset / clusterSizeBytes));
  const clustersPerBlock = (clusterSizeBytes * 8) / 2 ** refcountOrder;
  const block = new Uint8Array(clusterSizeBytes);
  let counted = 0;
  for (let index = 0; index * clustersPerBlock < endCluster && index < refcountTable.length; index++) {
    const offset = refcountTable.offsetAt(index, TABLE_HIGH_MASK);
    if (offset === 0) continue;
    const completion = file.read(block, 0, block.length, offset);
    if (completion === undefined) await nextTurn();
    else await completion;
    counted += usedClusters(
      block,
      refcountOrder,
      Math.min(clustersPerBlock, endCluster - index * clustersPerBlock),
    );
    if (counted >= threshold) return true;
  }
  return false;
}

/** How many of a block's first refcounts are not zero. */
function usedClusters(block: Uint8Array, refcountOrder: number, clusterCount: number): number {
  if (refcountOrder < 3) return usedOfNarrow(block, 2 ** refcountOrder, clusterCount);
  const bytesEach = 2 ** (refcountOrder - 3);
  const end = clusterCount * bytesEach;
  let used = 0;
  for (let at = 0; at < end; at += bytesEach) {
    let bits = 0;
    for (let byte = at; byte < at + bytesEach; byte++) bits |= block[byte] ?? 0;
    if (bits !== 0) used++;
  }
  return used;
}

/** Refcounts of 1, 2 or 4 bits, from the lowest bit of a byte on. */
function usedOfNarrow(block: Uint8Array, bitsEach: number, clusterCount: number): number {
  let used = 0;
  for (let firstBit = 0; firstBit < clusterCount * bitsEach; firstBit += 8) {
    const rest = clusterCount * bitsEach - firstBit;
    let byte = (block[firstBit / 8] ?? 0) & (rest >= 8 ? 0xff : 2 ** rest - 1);
    // One bit for each refcount that has any.
    if (bitsEach === 4) byte = (byte | (byte >>> 1) | (byte >>> 2) | (byte >>> 3)) & 0x11;
    else if (bitsEach === 2) byte = (byte | (byte >>> 1)) & 0x55;
    used += ONES_OF_BYTE[byte] ?? 0;
  }
  return used;
}

function countOnes(byte: number): number {
  let count = 0;
  for (let rest = byte; rest !== 0; rest >>>= 1) count += rest & 1;
  return count;
}
