// A qcow2 target's geometry, and the memory that the main thread and the workers share while it is written. The
// only place that knows the positions in it. Format: QEMU's docs/interop/qcow2.txt; entries of 8 bytes, 16-bit
// refcounts.
//
// Shared memory, in 32-bit words:
//
//   0..1   the gate                                    (gate.ts)
//   2      NEXT_FREE      host clusters handed out; only ever grows, by compare-exchange
//   3      CLUSTER_LIMIT  NEXT_FREE never exceeds it; constant
//   4      RELEASED_COUNT runs of host clusters that were allocated but hold nothing; may exceed the capacity
//   5..    released runs, RELEASED_CAPACITY pairs (first host cluster, count)
//   then   PACK_LOCK, PACK_CLUSTER, PACK_BYTES: where the next compressed cluster goes (qcow2/hosts.ts)
//   then   L2 places: one word an L1 entry, NONE, ALLOCATING or the L2 table's host cluster
//
// A compressed target has a second block of shared memory: a 16-bit refcount for each host cluster that may come to
// be used. A host cluster is shared by the compressed clusters in it: 29,000 at most, of 2 MiB that zstd makes 73
// bytes of, so 16 bits are enough. It is as long as an image of which nothing gets smaller would need, but memory is
// taken only for what is used: 32 MiB for 1 TiB of clusters of 64 KiB, after compression.
//
// Host clusters are counted in 32 bits: 2^31 of them are 128 TiB with 64 KiB clusters. The bound that counts is
// the lower of this and of QEMU's 8 MiB of refcount table (128 GiB with 512-byte clusters), with room left for
// the refcount structures themselves.
//
// Memory bound: 4 bytes an L1 entry, so at most 16 MiB (QEMU's 32 MiB of L1 table); 512 KiB for 64 TiB with
// 64 KiB clusters, where an L1 entry covers 512 MiB.

import { CowcatcherError } from "../../errors.js";
import { formatBytes, KiB, MiB, roundUp } from "../../units.js";
import { GATE_WORDS } from "../file/gate.js";

export const SECTOR_BYTES = 512;
export const ENTRY_BYTES = 8;
export const REFCOUNT_BYTES = 2;
export const HEADER_CLUSTER_COUNT = 1;
const CLUSTER_BYTES_MIN = 512;
const CLUSTER_BYTES_MAX = 2 * MiB;
/** QEMU's implementation limits, named in the specification. */
const L1_BYTES_MAX = 32 * MiB;
const REFCOUNT_TABLE_BYTES_MAX = 8 * MiB;
const INT32_MAX = 0x7fff_ffff;

export const NEXT_FREE = GATE_WORDS;
export const CLUSTER_LIMIT = GATE_WORDS + 1;
export const RELEASED_COUNT = GATE_WORDS + 2;
export const RELEASED_RUNS = GATE_WORDS + 3;
/** Further runs stay allocated: clusters that `qemu-img check` calls leaked, and harmless. */
export const RELEASED_CAPACITY = 1024;
export const PACK_LOCK = RELEASED_RUNS + 2 * RELEASED_CAPACITY;
export const PACK_CLUSTER = PACK_LOCK + 1;
export const PACK_BYTES = PACK_LOCK + 2;
export const L2_PLACES = PACK_LOCK + 3;

/** 4 GiB of refcounts at most: 128 TiB that nothing can make smaller, with clusters of 64 KiB. */
const REFCOUNTS_MAX = 2 ** 31;
/** For L2 tables that were given up and begun again. */
const SPARE_CLUSTERS = 1024;

/** States of an L2 place; any other value is a host cluster. Cluster 0 is the header's. */
export const NONE = 0;
export const ALLOCATING = -1;

export interface Qcow2Geometry {
  clusterBytes: number;
  clusterBits: number;
  /** Of the virtual disk: a multiple of 512, as QEMU rounds it. */
  sizeBytes: number;
  /** Entries of one L2 table. */
  l2EntryCount: number;
  l1EntryCount: number;
  /** Clusters of the L1 table, which follows the header; none for a disk of 0 bytes. */
  l1ClusterCount: number;
  /** Host clusters that guest data and L2 tables may take, header and L1 included. */
  clusterLimit: number;
}

/** @throws CowcatcherError USAGE for a cluster size that qcow2 does not have, LIMIT for a disk it cannot hold. */
export function planGeometry(
  name: string,
  diskBytes: number,
  clusterBytes: number,
  compressed = false,
): Qcow2Geometry {
  const clusterBits = Math.log2(clusterBytes);
  if (
    !Number.isInteger(clusterBits) ||
    clusterBytes < CLUSTER_BYTES_MIN ||
    clusterBytes > CLUSTER_BYTES_MAX
  ) {
    throw new CowcatcherError({
      code: "USAGE",
      object: name,
      problem: `${clusterBytes} is not a qcow2 cluster size`,
      hint: "give a power of two from 512 to 2M",
    });
  }
  const sizeBytes = roundUp(diskBytes, SECTOR_BYTES);
  const l2EntryCount = clusterBytes / ENTRY_BYTES;
  const l1EntryCount = Math.ceil(sizeBytes / (clusterBytes * l2EntryCount));
  const l1EntryCountMax = L1_BYTES_MAX / ENTRY_BYTES;
  if (l1EntryCount > l1EntryCountMax) {
    const most = formatBytes(l1EntryCountMax * l2EntryCount * clusterBytes);
    throw new CowcatcherError({
      code: "LIMIT",
      object: name,
      problem: `a qcow2 image with clusters of ${formatBytes(clusterBytes)} holds at most ${most}`,
      hint: `choose larger clusters${clusterBytes < 64 * KiB ? ", such as 64K" : ""}`,
    });
  }
  return {
    clusterBytes,
    clusterBits,
    sizeBytes,
    l2EntryCount,
    l1EntryCount,
    l1ClusterCount: Math.ceil((l1EntryCount * ENTRY_BYTES) / clusterBytes),
    clusterLimit: compressed
      ? Math.min(hostClusterLimit(clusterBytes), packedClusterLimit(clusterBits))
      : hostClusterLimit(clusterBytes),
  };
}

/** An entry of a compressed cluster has 70 - clusterBits bits for its host offset, of which 56 may be used. */
function packedClusterLimit(clusterBits: number): number {
  return 2 ** (Math.min(56, 70 - clusterBits) - clusterBits);
}

function hostClusterLimit(clusterBytes: number): number {
  const refcountsPerBlock = clusterBytes / REFCOUNT_BYTES;
  const tableEntriesMax = REFCOUNT_TABLE_BYTES_MAX / ENTRY_BYTES;
  const most = Math.min(INT32_MAX, tableEntriesMax * refcountsPerBlock);
  const blockCount = Math.ceil(most / refcountsPerBlock);
  return most - blockCount - Math.ceil((blockCount * ENTRY_BYTES) / clusterBytes);
}

export interface RefcountPlan {
  tableFirstCluster: number;
  tableClusterCount: number;
  /** Blocks follow the table. */
  blockCount: number;
  /** Clusters of the whole file. */
  totalClusterCount: number;
}

/**
 * The refcount structures for `usedClusterCount` clusters and for themselves, after them. Each round adds what
 * the last one's blocks and table need; it grows by an ever smaller share, so it ends after a few.
 */
export function planRefcounts(usedClusterCount: number, clusterBytes: number): RefcountPlan {
  const refcountsPerBlock = clusterBytes / REFCOUNT_BYTES;
  let blockCount = 0;
  let tableClusterCount = 0;
  for (;;) {
    const totalClusterCount = usedClusterCount + tableClusterCount + blockCount;
    const blocksNeeded = Math.ceil(totalClusterCount / refcountsPerBlock);
    const tableNeeded = Math.ceil((blocksNeeded * ENTRY_BYTES) / clusterBytes);
    if (blocksNeeded === blockCount && tableNeeded === tableClusterCount) {
      return { tableFirstCluster: usedClusterCount, tableClusterCount, blockCount, totalClusterCount };
    }
    blockCount = blocksNeeded;
    tableClusterCount = tableNeeded;
  }
}

/** Bytes of an image of which all of `diskBytes` (whole clusters) is allocated, every table included. */
export function planFullImage(diskBytes: number, clusterBytes: number): number {
  const dataCount = diskBytes / clusterBytes;
  const entriesPerTable = clusterBytes / ENTRY_BYTES;
  const l2Count = Math.ceil(dataCount / entriesPerTable);
  const l1ClusterCount = Math.ceil(l2Count / entriesPerTable);
  const usedCount = HEADER_CLUSTER_COUNT + l1ClusterCount + l2Count + dataCount;
  return planRefcounts(usedCount, clusterBytes).totalClusterCount * clusterBytes;
}

/** Main thread, before any worker. */
export function createShared(geometry: Qcow2Geometry): SharedArrayBuffer {
  const shared = new SharedArrayBuffer((L2_PLACES + geometry.l1EntryCount) * Int32Array.BYTES_PER_ELEMENT);
  const words = new Int32Array(shared);
  words[NEXT_FREE] = HEADER_CLUSTER_COUNT + geometry.l1ClusterCount;
  words[CLUSTER_LIMIT] = geometry.clusterLimit;
  // No room yet: the first compressed cluster takes a host cluster.
  words[PACK_BYTES] = geometry.clusterBytes;
  return shared;
}

/**
 * Main thread, before any worker: the refcounts of a compressed target.
 * @throws CowcatcherError LIMIT where they would take more memory than there can be.
 */
export function createRefcounts(name: string, geometry: Qcow2Geometry): SharedArrayBuffer {
  const { clusterBytes, sizeBytes, l1EntryCount, clusterLimit } = geometry;
  const firstFree = HEADER_CLUSTER_COUNT + geometry.l1ClusterCount;
  // Each guest cluster takes one at most, and a write that is tried again takes what it took before.
  const most = firstFree + l1EntryCount + Math.ceil(sizeBytes / clusterBytes) + SPARE_CLUSTERS;
  const clusterCount = Math.min(most, clusterLimit);
  if (clusterCount > REFCOUNTS_MAX) {
    throw new CowcatcherError({
      code: "LIMIT",
      object: name,
      problem: `a compressed target has at most ${REFCOUNTS_MAX} clusters; this one may need ${clusterCount}`,
      hint: "choose larger clusters",
    });
  }
  const refcounts = new SharedArrayBuffer(clusterCount * REFCOUNT_BYTES);
  new Uint16Array(refcounts).fill(1, 0, firstFree);
  return refcounts;
}

/** Any thread. @returns the first of `clusterCount` contiguous host clusters, or -1 when the limit is reached. */
export function allocateClusters(words: Int32Array, clusterCount: number): number {
  const limit = words[CLUSTER_LIMIT] ?? 0;
  let first = Atomics.load(words, NEXT_FREE);
  while (first + clusterCount <= limit) {
    const seen = Atomics.compareExchange(words, NEXT_FREE, first, first + clusterCount);
    if (seen === first) return first;
    first = seen;
  }
  return -1;
}

/** Any thread. The clusters get refcount 0 at the end; they are not handed out again. */
export function releaseClusters(words: Int32Array, first: number, clusterCount: number): void {
  const index = Atomics.add(words, RELEASED_COUNT, 1);
  if (index >= RELEASED_CAPACITY) return;
  words[RELEASED_RUNS + 2 * index] = first;
  words[RELEASED_RUNS + 2 * index + 1] = clusterCount;
}
