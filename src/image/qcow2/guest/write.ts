// Guest writes: in place where the cluster is the image's own, else into a new cluster.
//
// In place goes by units (entry.ts): whatever is data already, and the image's own. The rest goes by clusters:
//
//   cluster is            | whole cluster written          | part of a cluster written
//   normal, COPIED        | in place                       | in place
//   zero, with own host   | there, then the entry          | padded with zeroes, there, then the entry
//   zero, unallocated     | new cluster, then the entry    | the rest from backing or zeroes, new cluster, entry
//   compressed, shared    | new cluster, then the entry    | the rest from the old data, new cluster, entry
//
// With subclusters a part is not padded to the cluster but to whole subclusters, and only they become allocated: in
// the cluster's own host cluster if it has one, else in a new one. Two exceptions: a compressed cluster is rewritten
// whole, and of a shared one the stretch is copied too that reaches over all its allocated subclusters, as they must
// move along. A part that stands in the own host cluster ends before the first subcluster that is allocated already:
// from there on writes in place may be under way, which know nothing of this one.
//
// The entry changes after the data is written, so no reader sees a mapping whose data is not there. As long as an
// allocation waits for I/O its guest clusters are in `inFlight`: other changes to them wait; reads see the old
// mapping. The table is bounded by the requests that the server admits.
//
// Steps and waiting: range-walk.ts. Main thread only.

import type { BlockDevice, Completion } from "../../../block/device.js";
import type { CachedTable } from "../format/cached-table.js";
import { ALL_UNITS, ClusterKind, ClusterRun, hasHost } from "../format/entry.js";
import { onesFrom, unitMask } from "../format/extended-entry.js";
import type { QcowFile } from "../format/file.js";
import type { Flusher } from "./flusher.js";
import type { GuestReader } from "./read.js";
import type { Mapping } from "./mapping.js";
import { RangeWalk } from "./range-walk.js";

/** Scratch clusters kept for partial writes that wait. */
const SPARE_SCRATCH_COUNT = 8;

/** A part of one cluster, and the stretch of it that is written: all in bytes from the cluster's start. */
interface Part {
  cluster: number;
  /** Its own host cluster's offset; -1 where it gets a new one. */
  ownHost: number;
  inCluster: number;
  lengthBytes: number;
  /** [from, end) is written: whole units. */
  from: number;
  end: number;
  /** Units that hold data afterwards, beside those that do already. */
  units: number;
}

export class GuestWriter extends RangeWalk {
  readonly inFlight = new Map<number, Promise<void>>();
  private readonly run = new ClusterRun();
  private readonly nextRun = new ClusterRun();
  private readonly oldRun = new ClusterRun();
  private readonly scratches: Uint8Array[] = [];
  /** Filled by `partOf`; what waits takes a copy. */
  private readonly part: Part = {
    cluster: 0,
    ownHost: -1,
    inCluster: 0,
    lengthBytes: 0,
    from: 0,
    end: 0,
    units: ALL_UNITS,
  };

  constructor(
    mapping: Mapping,
    /** Holds the guest's clusters. */
    private readonly file: QcowFile,
    private readonly backing: BlockDevice | null,
    private readonly reader: GuestReader,
    private readonly flusher: Flusher,
    private readonly sizeBytes: number,
  ) {
    super(mapping, file.name);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.walk(buffer, bufferOffset, lengthBytes, offsetBytes, 0);
  }

  protected override walkStep(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number {
    return this.step(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  /** Serves the first run of [offsetBytes, +lengthBytes): bytes done, or to be done when `wait` is over. */
  step(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): number {
    const { mapping, run } = this;
    const { unitSizeBytes, unitsPerTable } = mapping;
    const unit = Math.floor(offsetBytes / unitSizeBytes);
    const l1Index = Math.floor(unit / unitsPerTable);
    const table = mapping.tableFor(l1Index);
    if (table !== null) {
      const inUnit = offsetBytes - unit * unitSizeBytes;
      const maxUnits = Math.ceil((inUnit + lengthBytes) / unitSizeBytes);
      mapping.decoder.scan(table.view, unit - l1Index * unitsPerTable, maxUnits, run);
      if (run.kind === ClusterKind.Normal && run.isCopied) {
        const count = Math.min(lengthBytes, run.unitCount * unitSizeBytes - inUnit);
        this.writeInPlace(buffer, bufferOffset, count, run.hostOffset + inUnit);
        return count;
      }
    } else if ((this.wait = mapping.takeWait()) !== undefined) {
      return 0;
    }
    return this.writeNew(l1Index, buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  /** What cannot be written in place; the result is as for `step`. */
  private writeNew(
    l1Index: number,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number {
    const { mapping, run } = this;
    const { clusterSizeBytes } = mapping;
    const cluster = Math.floor(offsetBytes / clusterSizeBytes);
    const inCluster = offsetBytes - cluster * clusterSizeBytes;
    this.wait = this.inFlight.get(cluster);
    if (this.wait !== undefined) return 0;
    const table = mapping.writableTable(l1Index);
    if (table === null) {
      this.wait = mapping.takeWait();
      return 0;
    }
    const wholeClusters = Math.floor(lengthBytes / clusterSizeBytes);
    const index = cluster % mapping.entriesPerTable;
    mapping.decoder.scanClusters(table.view, index, Math.max(1, wholeClusters), run);
    if (inCluster === 0 && wholeClusters > 0) {
      return this.writeWhole(table, cluster, wholeClusters, buffer, bufferOffset);
    }
    const part = this.partOf(cluster, inCluster, Math.min(lengthBytes, clusterSizeBytes - inCluster));
    const { lengthBytes: partBytes } = part;
    this.writePart(table, part, buffer, bufferOffset);
    return partBytes;
  }

  private writeInPlace(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    hostOffset: number,
  ): void {
    const completion = this.file.write(buffer, bufferOffset, lengthBytes, hostOffset);
    if (completion === undefined) this.flusher.hasUnsyncedData = true;
    else {
      this.wait = completion.then(() => {
        this.flusher.hasUnsyncedData = true;
      });
    }
  }

  /** Writes up to `maxClusters` whole clusters, none of which can be written in place, to one host run. */
  private writeWhole(
    table: CachedTable,
    cluster: number,
    maxClusters: number,
    buffer: Uint8Array,
    bufferOffset: number,
  ): number {
    const { run, mapping } = this;
    const { clusterSizeBytes } = mapping;
    let hostOffset = run.hostOffset;
    let count = Math.min(maxClusters, run.unitCount);
    const isOwnHost = hasHost(run.kind) && run.isCopied;
    if (!isOwnHost) {
      count = this.countToAllocate(table, cluster, maxClusters);
      hostOffset = mapping.space.allocate(cluster, count);
      count = mapping.space.allocatedCount;
    } else {
      while (count > 1 && this.isAnyInFlight(cluster + 1, count - 1)) count--;
    }
    const lengthBytes = count * clusterSizeBytes;
    try {
      const completion = this.file.write(buffer, bufferOffset, lengthBytes, hostOffset);
      if (completion === undefined) this.commit(table, cluster, count, hostOffset, ALL_UNITS);
      else {
        this.track(
          cluster,
          count,
          this.commitAfter(completion, cluster, count, hostOffset, isOwnHost, ALL_UNITS),
        );
      }
    } catch (error) {
      if (!isOwnHost) mapping.space.unallocate(hostOffset, count);
      throw error;
    }
    return lengthBytes;
  }

  private isAnyInFlight(cluster: number, count: number): boolean {
    if (this.inFlight.size === 0) return false;
    for (let index = 0; index < count; index++) if (this.inFlight.has(cluster + index)) return true;
    return false;
  }

  /** Clusters from `cluster` on that need a new host cluster and nobody else is changing; at least 1. */
  private countToAllocate(table: CachedTable, cluster: number, maxClusters: number): number {
    const { nextRun, mapping } = this;
    const index = cluster % mapping.entriesPerTable;
    const limit = Math.min(maxClusters, mapping.entriesPerTable - index);
    for (let count = 1; count < limit; count++) {
      if (this.inFlight.size > 0 && this.inFlight.has(cluster + count)) return count;
      mapping.decoder.scanClusters(table.view, index + count, 1, nextRun);
      if (hasHost(nextRun.kind) && nextRun.isCopied) return count;
    }
    return limit;
  }

  /** What has to be written for a part of the cluster that `run` describes. */
  private partOf(cluster: number, inCluster: number, wantedBytes: number): Part {
    const { run, mapping, part } = this;
    const isOwn = hasHost(run.kind) && run.isCopied;
    part.cluster = cluster;
    part.ownHost = isOwn ? run.hostOffset : -1;
    part.inCluster = inCluster;
    part.lengthBytes = wantedBytes;
    part.from = 0;
    part.end = mapping.clusterSizeBytes;
    part.units = ALL_UNITS;
    if (mapping.hasSubclusters && run.kind !== ClusterKind.Compressed) this.narrowToUnits(part, isOwn);
    return part;
  }

  private narrowToUnits(part: Part, isOwn: boolean): void {
    const { run } = this;
    const { unitSizeBytes } = this.mapping;
    const { inCluster, lengthBytes } = part;
    const first = Math.floor(inCluster / unitSizeBytes);
    let end = Math.ceil((inCluster + lengthBytes) / unitSizeBytes);
    if (isOwn) end = Math.min(end, first + onesFrom(~run.allocatedBits, first));
    part.lengthBytes = Math.min(lengthBytes, end * unitSizeBytes - inCluster);
    part.units = unitMask(first, end);
    // What is allocated in a shared cluster must come along to the new one.
    const stretch = isOwn ? part.units : part.units | run.allocatedBits;
    part.from = (31 - Math.clz32(stretch & -stretch)) * unitSizeBytes;
    part.end = (32 - Math.clz32(stretch)) * unitSizeBytes;
  }

  /** Writes a part of one cluster that cannot be written in place. */
  private writePart(table: CachedTable, part: Part, buffer: Uint8Array, bufferOffset: number): void {
    const { mapping } = this;
    const { cluster, ownHost, inCluster, lengthBytes, from, end } = part;
    const start = cluster * mapping.clusterSizeBytes;
    if (inCluster === from && inCluster + lengthBytes === end) {
      const hostOffset = ownHost < 0 ? mapping.space.allocate(cluster, 1) : ownHost;
      this.writeCluster(table, part, hostOffset, buffer, bufferOffset, lengthBytes, inCluster);
      return;
    }
    if (ownHost < 0 && this.readsAsZero(part)) {
      const hostOffset = mapping.space.allocate(cluster, 1);
      if (mapping.space.isFresh) {
        // The rest of the cluster is a hole of the file: it reads as zeroes already.
        this.writeCluster(table, part, hostOffset, buffer, bufferOffset, lengthBytes, inCluster);
        return;
      }
      mapping.space.unallocate(hostOffset, 1);
    }
    const scratch = this.scratches.pop() ?? new Uint8Array(mapping.clusterSizeBytes);
    const stored = Math.min(end, this.sizeBytes - start);
    const completion = this.reader.read(scratch, from, stored - from, start + from);
    if (completion !== undefined) {
      const source = buffer.subarray(bufferOffset, bufferOffset + lengthBytes);
      this.track(cluster, 1, this.mergeAfter(completion, { ...part }, scratch, stored, source));
      return;
    }
    scratch.fill(0, stored, end);
    const source = buffer.subarray(bufferOffset, bufferOffset + lengthBytes);
    scratch.set(source, inCluster);
    const hostOffset = ownHost < 0 ? mapping.space.allocate(cluster, 1) : ownHost;
    this.writeCluster(table, part, hostOffset, scratch, from, end - from, from);
    this.recycleAfter(scratch);
  }

  /** The part that waits: old content, then the new bytes over it, then as in `writePart`. */
  private async mergeAfter(
    completion: Promise<void>,
    part: Part,
    scratch: Uint8Array,
    stored: number,
    source: Uint8Array,
  ): Promise<void> {
    const { space } = this.mapping;
    const { cluster, ownHost, inCluster, from, end, units } = part;
    await completion;
    scratch.fill(0, stored, end);
    scratch.set(source, inCluster);
    const isOwnHost = ownHost >= 0;
    const hostOffset = isOwnHost ? ownHost : space.allocate(cluster, 1);
    let written: Completion;
    try {
      written = this.file.write(scratch, from, end - from, hostOffset + from);
    } catch (error) {
      if (!isOwnHost) space.unallocate(hostOffset, 1);
      throw error;
    }
    await this.commitAfter(written ?? Promise.resolve(), cluster, 1, hostOffset, isOwnHost, units);
    this.recycle(scratch);
  }

  private writeCluster(
    table: CachedTable,
    { cluster, ownHost, units }: Part,
    hostOffset: number,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    inCluster: number,
  ): void {
    const isOwnHost = ownHost >= 0;
    try {
      const completion = this.file.write(buffer, bufferOffset, lengthBytes, hostOffset + inCluster);
      if (completion === undefined) this.commit(table, cluster, 1, hostOffset, units);
      else this.track(cluster, 1, this.commitAfter(completion, cluster, 1, hostOffset, isOwnHost, units));
    } catch (error) {
      if (!isOwnHost) this.mapping.space.unallocate(hostOffset, 1);
      throw error;
    }
  }

  private recycle(scratch: Uint8Array): void {
    if (this.scratches.length < SPARE_SCRATCH_COUNT) this.scratches.push(scratch);
  }

  private recycleAfter(scratch: Uint8Array): void {
    // A write that still waits reads from the scratch; the collector takes that one.
    if (this.wait === undefined) this.recycle(scratch);
  }

  /** Whether [from, end) of the cluster that `run` describes reads as zeroes. */
  private readsAsZero({ cluster, units }: Part): boolean {
    const { run, mapping, backing } = this;
    if (run.kind === ClusterKind.ZeroPlain || run.kind === ClusterKind.ZeroAllocated) return true;
    if (run.kind !== ClusterKind.Unallocated) return false;
    if (mapping.hasSubclusters && (units & ~run.zeroBits) === 0) return true;
    return backing === null || backing.sizeBytes <= cluster * mapping.clusterSizeBytes;
  }

  /** The file was written to otherwise than by a change of entries: the next flush must sync it. */
  markUnsynced(): void {
    this.flusher.hasUnsyncedData = true;
  }

  /** Makes others wait that want to change these clusters, and the caller for `work`. */
  track(cluster: number, count: number, work: Promise<void>): void {
    const tracked = work.finally(() => {
      for (let index = 0; index < count; index++) this.inFlight.delete(cluster + index);
    });
    // Whoever waits for the cluster only wants its turn; the error is the writer's.
    const turn = tracked.catch(() => undefined);
    for (let index = 0; index < count; index++) this.inFlight.set(cluster + index, turn);
    this.wait = tracked;
  }

  private async commitAfter(
    completion: Promise<void>,
    cluster: number,
    count: number,
    hostOffset: number,
    isOwnHost: boolean,
    units: number,
  ): Promise<void> {
    try {
      await completion;
      let table = this.mapping.writableTable(Math.floor(cluster / this.mapping.entriesPerTable));
      while (table === null) {
        await this.mapping.takeWait();
        table = this.mapping.writableTable(Math.floor(cluster / this.mapping.entriesPerTable));
      }
      this.commit(table, cluster, count, hostOffset, units);
    } catch (error) {
      if (!isOwnHost) this.mapping.space.unallocate(hostOffset, count);
      throw error;
    }
  }

  /** The data is written: points the entries to it and drops what they pointed to. */
  private commit(
    table: CachedTable,
    cluster: number,
    count: number,
    hostOffset: number,
    units: number,
  ): void {
    const { mapping } = this;
    const firstIndex = cluster % mapping.entriesPerTable;
    for (let index = 0; index < count; index++) {
      const newHost = hostOffset + index * mapping.clusterSizeBytes;
      this.dropEntry(table, firstIndex + index, newHost);
      mapping.setNormal(table, firstIndex + index, newHost, units);
    }
    this.flusher.hasUnsyncedData = true;
  }

  /**
   * Drops the host space that an entry refers to, unless it is `keptHost`. The caller replaces the entry.
   * @param isUnmapped the guest does not want it any more: its storage goes back to the file system
   */
  dropEntry(table: CachedTable, index: number, keptHost: number, isUnmapped = false): void {
    const { oldRun, mapping } = this;
    mapping.decoder.scanClusters(table.view, index, 1, oldRun);
    const { kind, hostOffset } = oldRun;
    if (kind !== ClusterKind.Compressed && (!hasHost(kind) || hostOffset === keptHost)) return;
    mapping.space.drop(oldRun, isUnmapped);
  }
}
