// Where everything goes in a new image: cluster by cluster as QEMU's allocator would place it, so that metadata is as
// large, and `qemu-img map` the same, as of an image that qemu-img create makes with these options.
//
//     cluster 0          header, extensions, backing file name
//     from cluster 1     refcount table, its first block, the L1 table
//     behind that        by allocation, in the order of the disk (Tables, Data):
//                          each L2 table, then the clusters that it maps
//                        or in one piece (DataFirst):
//                          refcount blocks for all, the refcount table anew, all data clusters, L2 tables from the
//                          second on; the first takes the refcount table's first place
//
// Allocation goes on from where it was. A cluster that no refcount block counts yet makes one, right behind the
// range that was asked for; then the range is asked for again, and found where it was.
//
// QEMU starts with a refcount table of one cluster and moves it when it is full. Here it is as long as it must be from
// the start, found by laying out again with a longer one. That alone differs, and only in images whose refcount
// table is longer than a cluster (16 TiB with clusters of 64 KiB).
//
// Nothing is kept of the tables but a few numbers: `forEachTable` lays them out anew and hands them over one by one.

import { roundUp } from "../../../units.js";
import { EXTENDED_ENTRY_BYTES, SUBCLUSTERS_PER_CLUSTER } from "../format/extended-entry.js";

const ENTRY_BYTES = 8;
const INT_MAX = 2 ** 31 - 1;
/** QEMU allocates by pieces of an L2 table, 64 KiB at most. */
const MAX_L2_SLICE_BYTES = 65536;

/** What of the disk is mapped from the start. */
export const enum Mapped {
  Nothing,
  /** L2 tables alone: what they map stands in an external data file. */
  Tables,
  /** Clusters where the allocation comes to them. */
  Data,
  /** All data clusters in a row. */
  DataFirst,
}

export interface LayoutGeometry {
  clusterSizeBytes: number;
  refcountBits: number;
  /** Entries. */
  l1Size: number;
  /** Bytes of an L2 entry. */
  l2EntryBytes: number;
  sizeBytes: number;
  mapped: Mapped;
}

/** Host clusters [first, first + count). */
export interface ClusterRange {
  first: number;
  count: number;
}

/** Of an L2 table: entries from `index` on refer to host clusters from `first` on. */
export interface MappedRun extends ClusterRange {
  index: number;
}

export interface Layout {
  refcountTable: ClusterRange;
  /** Host cluster of each refcount block. */
  blocks: readonly number[];
  l1: ClusterRange;
  /** Data clusters that stand in a row, where they do. */
  data: ClusterRange | null;
  /** Below `endCluster`, and used by nothing. */
  gaps: readonly ClusterRange[];
  /** One past the last cluster. */
  endCluster: number;
  /** Of the file, in bytes: the last cluster may be in it only as far as something is written there. */
  lengthBytes: number;
  /** In the order of the L1 table. The runs are empty where an external data file is mapped. */
  forEachTable: (visit: TableVisitor) => void;
}

export type TableVisitor = (l1Index: number, cluster: number, runs: readonly MappedRun[]) => void;

/** QEMU's allocator on an image that only grows. */
class Allocator {
  readonly blocks: number[] = [];
  private next = 0;
  /** Refcount blocks among which some may stand at `next` or behind it. */
  private readonly ahead = new Set<number>();
  private aheadEnd = 0;

  constructor(private readonly clustersPerBlock: number) {}

  /** The beginning of every image: header, refcount table, the blocks that count these and themselves. */
  begin(refcountTableClusters: number): void {
    this.next = 1 + refcountTableClusters;
    do this.blocks.push(this.next++);
    while (this.blocks.length * this.clustersPerBlock < this.next);
  }

  /** @returns the first of so many clusters in a row */
  allocate(count: number): number {
    for (;;) {
      const first = this.findFree(count);
      const missing = this.missingBlock(first, first + count);
      if (missing < 0) {
        // From here on `next` does not go back.
        if (this.isAtEnd) this.ahead.clear();
        return first;
      }
      this.addBlock(missing);
      this.next = first;
    }
  }

  /** Nothing stands behind what was allocated last. */
  get isAtEnd(): boolean {
    return this.next >= this.aheadEnd;
  }

  get endCluster(): number {
    return Math.max(this.next, this.aheadEnd);
  }

  private findFree(count: number): number {
    let first = this.next;
    if (this.isAtEnd) {
      this.next += count;
      return first;
    }
    for (let free = 0; free < count; this.next++) {
      if (this.ahead.has(this.next)) {
        first = this.next + 1;
        free = 0;
      } else free++;
    }
    return first;
  }

  private missingBlock(first: number, end: number): number {
    const last = Math.floor((end - 1) / this.clustersPerBlock);
    for (let index = Math.floor(first / this.clustersPerBlock); index <= last; index++) {
      if (this.blocks[index] === undefined) return index;
    }
    return -1;
  }

  /** If nothing counts the place yet that it would take, it is that place's block that is made. */
  private addBlock(index: number): void {
    const cluster = this.findFree(1);
    const countedBy = Math.floor(cluster / this.clustersPerBlock);
    if (countedBy !== index && this.blocks[countedBy] === undefined) {
      this.addBlock(countedBy);
      return;
    }
    this.blocks[index] = cluster;
    this.ahead.add(cluster);
    this.aheadEnd = Math.max(this.aheadEnd, cluster + 1);
  }
}

export function layOut(geometry: LayoutGeometry): Layout {
  return geometry.mapped === Mapped.DataFirst ? layOutDataFirst(geometry) : layOutInOrder(geometry);
}

function layOutInOrder(geometry: LayoutGeometry): Layout {
  const { clusterSizeBytes } = geometry;
  for (let tableClusters = 1; ;) {
    const allocator = new Allocator(clustersPerBlock(geometry));
    const l1 = beginWithL1(allocator, geometry, tableClusters);
    allocateTables(allocator, geometry, () => undefined);
    const needed = Math.ceil((allocator.blocks.length * ENTRY_BYTES) / clusterSizeBytes);
    if (needed > tableClusters) {
      tableClusters = needed;
      continue;
    }
    return {
      refcountTable: { first: 1, count: tableClusters },
      blocks: allocator.blocks,
      l1,
      data: null,
      gaps: [],
      endCluster: allocator.endCluster,
      lengthBytes: allocator.endCluster * clusterSizeBytes - unwrittenTail(allocator, geometry),
      forEachTable: (visit) => {
        const again = new Allocator(clustersPerBlock(geometry));
        beginWithL1(again, geometry, tableClusters);
        allocateTables(again, geometry, visit);
      },
    };
  }
}

/** Bytes at the end of the last cluster that nothing is written to. */
function unwrittenTail(allocator: Allocator, geometry: LayoutGeometry): number {
  const { clusterSizeBytes, l1Size, sizeBytes, mapped } = geometry;
  if (l1Size === 0 || !allocator.isAtEnd) return 0;
  if (mapped === Mapped.Nothing) {
    const l1Bytes = l1Size * ENTRY_BYTES;
    return roundUp(l1Bytes, clusterSizeBytes) - l1Bytes;
  }
  return mapped === Mapped.Data
    ? roundUp(sizeBytes, clusterSizeBytes) - roundUp(sizeBytes, subclusterBytes(geometry))
    : 0;
}

/** What a write fills up with zeroes: a cluster, or a subcluster where L2 entries are extended. */
export function subclusterBytes({
  clusterSizeBytes,
  l2EntryBytes,
}: Pick<LayoutGeometry, "clusterSizeBytes" | "l2EntryBytes">): number {
  return l2EntryBytes === EXTENDED_ENTRY_BYTES
    ? clusterSizeBytes / SUBCLUSTERS_PER_CLUSTER
    : clusterSizeBytes;
}

function clustersPerBlock({ clusterSizeBytes, refcountBits }: LayoutGeometry): number {
  return (clusterSizeBytes * 8) / refcountBits;
}

function beginWithL1(
  allocator: Allocator,
  { l1Size, clusterSizeBytes }: LayoutGeometry,
  tableClusters: number,
): ClusterRange {
  allocator.begin(tableClusters);
  const count = Math.ceil((l1Size * ENTRY_BYTES) / clusterSizeBytes);
  return { first: allocator.allocate(count), count };
}

function allocateTables(allocator: Allocator, geometry: LayoutGeometry, visit: TableVisitor): void {
  const { mapped, l1Size } = geometry;
  if (mapped === Mapped.Nothing) return;
  for (let l1Index = 0; l1Index < l1Size; l1Index++) {
    const cluster = allocator.allocate(1);
    visit(l1Index, cluster, mapped === Mapped.Data ? allocateRuns(allocator, geometry, l1Index) : []);
  }
}

/** The data clusters of one L2 table. */
function allocateRuns(allocator: Allocator, geometry: LayoutGeometry, l1Index: number): MappedRun[] {
  const { clusterSizeBytes, l2EntryBytes } = geometry;
  const sliceEntries = Math.min(clusterSizeBytes, MAX_L2_SLICE_BYTES) / l2EntryBytes;
  const maxCount = Math.floor(INT_MAX / clusterSizeBytes);
  const end = entriesInUse(geometry, l1Index);
  const runs: MappedRun[] = [];
  // QEMU's request goes on over slices, for as long as what it gets is in a row.
  let requestLeft = maxCount;
  for (let index = 0; index < end;) {
    const count = Math.min(end - index, requestLeft, sliceEntries - (index % sliceEntries));
    const first = allocator.allocate(count);
    const last = runs.at(-1);
    if (last !== undefined && last.first + last.count === first) {
      last.count += count;
      requestLeft -= count;
    } else {
      runs.push({ index, first, count });
      requestLeft = maxCount - count;
    }
    if (requestLeft === 0) requestLeft = maxCount;
    index += count;
  }
  return runs;
}

/** Entries of an L2 table whose clusters lie within the disk. */
function entriesInUse(
  { clusterSizeBytes, l2EntryBytes, sizeBytes }: LayoutGeometry,
  l1Index: number,
): number {
  const entries = clusterSizeBytes / l2EntryBytes;
  return Math.min(entries, Math.ceil(sizeBytes / clusterSizeBytes) - l1Index * entries);
}

function layOutDataFirst(geometry: LayoutGeometry): Layout {
  const { clusterSizeBytes, l2EntryBytes, sizeBytes, l1Size } = geometry;
  const allocator = new Allocator(clustersPerBlock(geometry));
  const l1 = beginWithL1(allocator, geometry, 1);
  const start = allocator.endCluster;
  const dataCount = Math.ceil(sizeBytes / clusterSizeBytes);
  const { blockCount, tableCount } = planRefcounts(
    geometry,
    allocator.blocks.length,
    start,
    dataCount + l1Size,
  );
  const blocks = [...allocator.blocks];
  for (let cluster = start; blocks.length < blockCount; cluster++) blocks.push(cluster);
  const refcountTable = { first: start + blockCount - allocator.blocks.length, count: tableCount };
  const data = { first: refcountTable.first + tableCount, count: dataCount };
  const dataEnd = data.first + dataCount;
  const endCluster = dataEnd + Math.max(0, l1Size - 1);
  return {
    refcountTable,
    blocks,
    l1,
    data,
    gaps: l1Size === 0 ? [{ first: 1, count: 1 }] : [],
    endCluster,
    lengthBytes: endCluster * clusterSizeBytes,
    forEachTable: (visit) => {
      const entries = clusterSizeBytes / l2EntryBytes;
      for (let l1Index = 0; l1Index < l1Size; l1Index++) {
        const first = data.first + l1Index * entries;
        const run = { index: 0, first, count: entriesInUse(geometry, l1Index) };
        visit(l1Index, l1Index === 0 ? 1 : dataEnd + l1Index - 1, [run]);
      }
    },
  };
}

/** How many refcount blocks, and clusters of the table, count `start` clusters, `more` ones and themselves. */
function planRefcounts(
  geometry: LayoutGeometry,
  existingBlocks: number,
  start: number,
  more: number,
): { blockCount: number; tableCount: number } {
  let blockCount = existingBlocks;
  for (;;) {
    const tableCount = Math.ceil((blockCount * ENTRY_BYTES) / geometry.clusterSizeBytes);
    const total = start + blockCount - existingBlocks + tableCount + more;
    const needed = Math.ceil(total / clustersPerBlock(geometry));
    if (needed <= blockCount) return { blockCount, tableCount };
    blockCount = needed;
  }
}
