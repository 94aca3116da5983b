// A new refcount structure in place of a damaged one, and with it, where need be, a new snapshot table.
//
//   count the references of everything but the old structure
//   place the new snapshot table, blocks and refcount table where nothing is
//   write them ─► sync ─► the header's fields, bytes 48 to 71, in one write ─► sync
//
// The header's fields for refcount table and snapshot table are neighbours within one sector, so one write switches to
// all that is new. Until then nothing that the image refers to has changed; a repair that is killed leaves clusters
// behind the image's end that nothing refers to. The old structure is not counted, so it is free after the switch.
//
// Where "nothing is": behind the end of a regular file. Holes between clusters would do as well, but in a damaged
// image they may hold what a lost table referred to. A block device has no other place, so there the first clusters
// behind the last one in use are taken, then holes, and the old structure's own clusters only if nothing else is
// left: a repair killed then finds no structure at all, and makes it again from the tables.

import { CowcatcherError } from "../../../errors.js";
import { MiB } from "../../../units.js";
import { setRefcountIn } from "./blocks.js";
import type { CheckState } from "./state.js";
import { FIELD_OFFSET, MAX_REFCOUNT_TABLE_BYTES } from "../format/header.js";

/** Bytes 48 to 71 of the header. */
const SWITCHED_BYTES = 24;

/** Clusters for what is new, and the reference counts with them. */
class Placement {
  /** By index of the refcount table: offset of the block in clusters. */
  readonly blocks = new Map<number, number>();
  tableCluster = 0;
  tableClusters = 0;
  readonly clustersPerBlock: number;
  /** References to clusters from the file's end on. */
  private readonly added = new Set<number>();
  private readonly fileClusters: number;
  private next: number;
  private lastBlockIndex = 0;

  /** @param occupied references with the old structure's. */
  constructor(
    private readonly state: CheckState,
    private readonly occupied: CheckState["references"],
  ) {
    this.clustersPerBlock = (state.clusterSizeBytes * 8) / 2 ** state.header.refcountOrder;
    this.fileClusters = state.hostClusterCount;
    this.next = state.file.isBlockDevice ? this.firstBehindAll() : this.fileClusters;
  }

  private firstBehindAll(): number {
    let cluster = this.fileClusters;
    while (cluster > 0 && (this.occupied[cluster - 1] ?? 0) === 0 && this.referencesOf(cluster - 1) === 0) {
      cluster--;
    }
    return cluster;
  }

  referencesOf(cluster: number): number {
    if (this.added.has(cluster)) return 1;
    return cluster < this.fileClusters ? (this.state.references[cluster] ?? 0) : 0;
  }

  /** `count` clusters in a row. @throws CowcatcherError NO_SPACE on a full block device */
  take(count: number): number {
    const { isBlockDevice } = this.state.file;
    if (isBlockDevice && this.next + count > this.fileClusters) {
      return this.takeHole(count, this.occupied) ?? this.takeHole(count, []) ?? this.refuse(count);
    }
    const first = this.next;
    this.next += count;
    for (let cluster = first; cluster < this.next; cluster++) this.added.add(cluster);
    return first;
  }

  private takeHole(count: number, occupied: ArrayLike<number>): number | null {
    let run = 0;
    for (let cluster = 0; cluster < this.fileClusters; cluster++) {
      run = this.referencesOf(cluster) === 0 && (occupied[cluster] ?? 0) === 0 ? run + 1 : 0;
      if (run < count) continue;
      const first = cluster - count + 1;
      for (let taken = first; taken <= cluster; taken++) this.added.add(taken);
      return first;
    }
    return null;
  }

  private refuse(count: number): never {
    throw new CowcatcherError({
      code: "NO_SPACE",
      object: this.state.name,
      problem: `the device has no room for ${count} more clusters of metadata`,
      hint: "make the device larger",
    });
  }

  private giveBack(first: number, count: number): void {
    for (let cluster = first; cluster < first + count; cluster++) this.added.delete(cluster);
  }

  /** Blocks for all that is referred to, and a table for them; both refer to themselves, so it takes some rounds. */
  placeStructure(): void {
    const { clusterSizeBytes, references } = this.state;
    for (let first = 0; first < this.fileClusters; first += this.clustersPerBlock) {
      const end = Math.min(first + this.clustersPerBlock, this.fileClusters);
      if (!this.state.mayRefer(first, end)) continue;
      if (references.subarray(first, end).every((count) => count === 0)) continue;
      this.placeBlock(first / this.clustersPerBlock);
    }
    for (;;) {
      this.placeBlocksOfAdded();
      const wanted = Math.ceil(((this.lastBlockIndex + 1) * 8) / clusterSizeBytes);
      if (wanted <= this.tableClusters) return;
      this.assertTableFits(wanted);
      this.giveBack(this.tableCluster, this.tableClusters);
      this.tableClusters = wanted;
      this.tableCluster = this.take(wanted);
    }
  }

  /** A block's own cluster may need another block: the set grows while it is walked. */
  private placeBlocksOfAdded(): void {
    for (const cluster of this.added) this.placeBlock(Math.floor(cluster / this.clustersPerBlock));
  }

  private placeBlock(index: number): void {
    if (this.blocks.has(index)) return;
    this.blocks.set(index, this.take(1));
    this.lastBlockIndex = Math.max(this.lastBlockIndex, index);
  }

  private assertTableFits(clusters: number): void {
    const { clusterSizeBytes, name } = this.state;
    if (clusters * clusterSizeBytes <= Math.max(MAX_REFCOUNT_TABLE_BYTES, clusterSizeBytes)) return;
    throw new CowcatcherError({
      code: "LIMIT",
      object: name,
      problem: `the refcount table would outgrow its limit of ${MAX_REFCOUNT_TABLE_BYTES / MiB} MiB`,
      hint: "copy the image to one with larger clusters",
    });
  }
}

/**
 * Writes a new refcount structure for the references that `state` has counted (without the old structure), and a
 * new snapshot table where one is given; then switches the header, on disk and in `state.header`. `occupied` are
 * the references with the old structure's, which is left alone where that can be.
 * @throws CowcatcherError IO, NO_SPACE, LIMIT; the image is as it was then, but for clusters behind its end.
 */
export async function rebuildRefcounts(
  state: CheckState,
  snapshotTable: Uint8Array | null,
  occupied: CheckState["references"],
): Promise<void> {
  const { clusterSizeBytes, header } = state;
  const placement = new Placement(state, occupied);
  let snapshotsOffset = header.snapshotsOffset;
  if (snapshotTable !== null) {
    const clusters = Math.ceil(snapshotTable.length / clusterSizeBytes);
    snapshotsOffset = placement.take(clusters) * clusterSizeBytes;
    const whole = new Uint8Array(clusters * clusterSizeBytes);
    whole.set(snapshotTable);
    await state.write(whole, snapshotsOffset);
  }
  placement.placeStructure();
  await writeBlocks(state, placement);
  await writeTable(state, placement);
  await state.file.sync();
  const fields = new Uint8Array(SWITCHED_BYTES);
  const view = new DataView(fields.buffer);
  view.setBigUint64(0, BigInt(placement.tableCluster * clusterSizeBytes));
  view.setUint32(8, placement.tableClusters);
  view.setUint32(12, header.snapshotCount);
  view.setBigUint64(16, BigInt(snapshotsOffset));
  await state.write(fields, FIELD_OFFSET.refcountTableOffset);
  await state.file.sync();
  header.refcountTableOffset = placement.tableCluster * clusterSizeBytes;
  header.refcountTableClusters = placement.tableClusters;
  header.snapshotsOffset = snapshotsOffset;
}

async function writeBlocks(state: CheckState, placement: Placement): Promise<void> {
  const refcountBits = 2 ** state.header.refcountOrder;
  const { clustersPerBlock } = placement;
  for (const [index, place] of placement.blocks) {
    const bytes = new Uint8Array(state.clusterSizeBytes);
    const view = new DataView(bytes.buffer);
    const first = index * clustersPerBlock;
    for (let cluster = first; cluster < first + clustersPerBlock; cluster++) {
      const references = placement.referencesOf(cluster);
      if (references > 0) setRefcountIn(view, cluster - first, refcountBits, references);
    }
    await state.write(bytes, place * state.clusterSizeBytes);
  }
}

async function writeTable(state: CheckState, placement: Placement): Promise<void> {
  const { clusterSizeBytes } = state;
  const table = new Uint8Array(placement.tableClusters * clusterSizeBytes);
  const view = new DataView(table.buffer);
  for (const [index, place] of placement.blocks) {
    view.setBigUint64(index * 8, BigInt(place * clusterSizeBytes));
  }
  await state.write(table, placement.tableCluster * clusterSizeBytes);
}
