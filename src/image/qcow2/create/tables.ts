// The tables of a new image, as bytes, from its layout (create/layout.ts). One table is in memory at a time, and so is
// one refcount block: an image of 64 TiB with preallocated metadata has gigabytes of them.

import { ALL_UNITS, HIGH_COPIED, highWord } from "../format/entry.js";
import type { ClusterRange, Layout, MappedRun } from "./layout.js";
import { EXTENDED_ENTRY_BYTES, storeBitmap } from "../format/extended-entry.js";

const ENTRY_BYTES = 8;

export type WriteAt = (bytes: Uint8Array, offsetBytes: number) => void;

/** Each cluster that is used has refcount 1. */
export function writeRefcounts(
  layout: Layout,
  clusterSizeBytes: number,
  refcountBits: number,
  write: WriteAt,
): void {
  const table = new Uint8Array(layout.refcountTable.count * clusterSizeBytes);
  const view = new DataView(table.buffer);
  const clustersPerBlock = (clusterSizeBytes * 8) / refcountBits;
  layout.blocks.forEach((cluster, index) => {
    view.setBigUint64(index * ENTRY_BYTES, BigInt(cluster * clusterSizeBytes));
    const counted = { first: index * clustersPerBlock, count: clustersPerBlock };
    write(refcountBlock(layout, counted, clusterSizeBytes, refcountBits), cluster * clusterSizeBytes);
  });
  write(table, layout.refcountTable.first * clusterSizeBytes);
}

/** Big-endian, and from the lowest bit on where narrower than a byte. */
function refcountBlock(
  { endCluster, gaps }: Layout,
  counted: ClusterRange,
  clusterSizeBytes: number,
  refcountBits: number,
): Uint8Array {
  const bytes = new Uint8Array(clusterSizeBytes);
  const count = Math.max(0, Math.min(counted.count, endCluster - counted.first));
  for (let index = 0; index < count; index++) setRefcount(bytes, refcountBits, index, 1);
  for (const gap of gaps) {
    const from = Math.max(gap.first, counted.first);
    const to = Math.min(gap.first + gap.count, counted.first + counted.count);
    for (let cluster = from; cluster < to; cluster++) {
      setRefcount(bytes, refcountBits, cluster - counted.first, 0);
    }
  }
  return bytes;
}

function setRefcount(bytes: Uint8Array, refcountBits: number, index: number, value: 0 | 1): void {
  if (refcountBits >= 8) {
    bytes[(index + 1) * (refcountBits / 8) - 1] = value;
    return;
  }
  const firstBit = index * refcountBits;
  const at = Math.floor(firstBit / 8);
  const bit = 1 << (firstBit % 8);
  bytes[at] = value === 1 ? (bytes[at] ?? 0) | bit : (bytes[at] ?? 0) & ~bit;
}

export interface MappingForm {
  clusterSizeBytes: number;
  /** Entries of the L1 table. */
  l1Size: number;
  /** Bytes of the disk. */
  sizeBytes: number;
  isExtendedL2: boolean;
  /** Subclusters are shown as they stand in their clusters; else as if they had never been written. */
  isWritten: boolean;
}

/**
 * L2 tables, and the L1 table that refers to them.
 * @returns where the last of the disk's clusters begins, in bytes, if it stands in the image
 */
export function writeMapping(layout: Layout, form: MappingForm, write: WriteAt): number | undefined {
  const { clusterSizeBytes, l1Size } = form;
  const l1 = new Uint8Array(l1Size * ENTRY_BYTES);
  const view = new DataView(l1.buffer);
  let lastData: number | undefined;
  layout.forEachTable((l1Index, cluster, runs) => {
    setEntry(view, l1Index * ENTRY_BYTES, cluster * clusterSizeBytes);
    write(l2Table(form, l1Index, runs), cluster * clusterSizeBytes);
    const last = runs.at(-1);
    if (last !== undefined) lastData = (last.first + last.count - 1) * clusterSizeBytes;
  });
  write(l1, layout.l1.first * clusterSizeBytes);
  return lastData;
}

function setEntry(view: DataView, at: number, offsetBytes: number): void {
  view.setUint32(at, (highWord(offsetBytes) | HIGH_COPIED) >>> 0);
  view.setUint32(at + 4, offsetBytes % 2 ** 32);
}

/** Without runs every cluster of the disk stands at its own place of the data file. */
function l2Table(form: MappingForm, l1Index: number, runs: readonly MappedRun[]): Uint8Array {
  const { clusterSizeBytes, sizeBytes, isExtendedL2, isWritten } = form;
  const entryBytes = isExtendedL2 ? EXTENDED_ENTRY_BYTES : ENTRY_BYTES;
  const entries = clusterSizeBytes / entryBytes;
  const firstCluster = l1Index * entries;
  const count = Math.min(entries, Math.ceil(sizeBytes / clusterSizeBytes) - firstCluster);
  const placed = runs.length > 0 ? runs : [{ index: 0, first: firstCluster, count }];
  const bytes = new Uint8Array(clusterSizeBytes);
  const view = new DataView(bytes.buffer);
  for (const run of placed) {
    for (let offset = 0; offset < run.count; offset++) {
      const index = run.index + offset;
      setEntry(view, index * entryBytes, (run.first + offset) * clusterSizeBytes);
      if (isExtendedL2 && isWritten) storeBitmap(view, index, ALL_UNITS, 0);
    }
  }
  return bytes;
}
