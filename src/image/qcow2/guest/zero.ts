// write-zeroes and discard: whole clusters by metadata, the rest of a range by writing zeroes (or, for discard, not
// at all).
//
//   cluster is       | write-zeroes, may unmap   | write-zeroes, keep storage | discard (version 3)
//   unallocated      | zero if backing shows     | zero if backing shows      | zero if backing shows
//   zero plain       | as it is                  | as it is                   | as it is
//   zero allocated   | zero plain, host dropped  | as it is                   | zero plain, host dropped
//   normal           | zero plain, host dropped  | zero flag, host kept       | zero plain, host dropped
//   compressed       | zero plain, data dropped  | zero plain, data dropped   | zero plain, data dropped
//
// With subclusters, write-zeroes also handles whole subclusters of one that is not compressed by their bits alone.
//
// Part of a cluster (or subcluster) that this layer does not have becomes zero as a whole, if what the backing file
// shows around the part is zero, as far as its metadata and the file system know (QEMU: is_zero in block/qcow2.c). The
// backing file does not change, so an answer that had to be waited for is good when the step is made again.
//
// Version 2 has no zero flag: without a backing file the cluster becomes unallocated; with one, zeroes are written
// and discard does nothing (unallocated would show the backing file). Where there is no L2 table and nothing shows
// through, none is made.
//
// An external data file that must read as the guest's disk by itself is zeroed first, in all of the range; then the
// entries of whole clusters follow, as for any other. From any other the storage is let go after the entries are changed: at a crash
// between the two, the range still reads as the guest may expect of an operation that was not flushed.
//
// Steps and waiting: range-walk.ts. Main thread only.

import { MiB } from "../../../units.js";
import type { BlockDevice, BlockStatus, Completion } from "../../../block/device.js";
import type { CachedTable } from "../format/cached-table.js";
import { ALL_UNITS, ClusterKind, ClusterRun, hasHost } from "../format/entry.js";
import { unitMask } from "../format/extended-entry.js";
import type { DataFile } from "./data-file.js";
import type { GuestWriter } from "./write.js";
import type { Mapping } from "./mapping.js";
import { RangeWalk } from "./range-walk.js";

/** Of a raw data file, zeroed in one step. */
const RAW_STEP_BYTES = 16 * MiB;

export const enum ZeroMode {
  /** Reads as zeroes afterwards; host clusters stay allocated. */
  Keep,
  /** Reads as zeroes afterwards; host clusters are let go. */
  Unmap,
  /** Host clusters are let go; content afterwards is of no interest. */
  Discard,
}

export class GuestZeroer extends RangeWalk {
  private readonly run = new ClusterRun();
  /** Answers that were waited for, by the offset that they were asked for, until that step is made again. */
  private readonly zeroAround = new Map<number, { lengthBytes: number; isZero: boolean }>();
  private readonly zeroes: Uint8Array;

  constructor(
    mapping: Mapping,
    private readonly backing: BlockDevice | null,
    private readonly writer: GuestWriter,
    private readonly version: 2 | 3,
    private readonly sizeBytes: number,
    name: string,
    /** Null where the guest's clusters stand in the image file. */
    private readonly dataFile: DataFile | null,
  ) {
    super(mapping, name);
    this.zeroes = new Uint8Array(mapping.clusterSizeBytes);
  }

  zero(offsetBytes: number, lengthBytes: number, mode: ZeroMode): Completion {
    return this.walk(this.zeroes, 0, lengthBytes, offsetBytes, mode);
  }

  protected override walkStep(
    _zeroes: Uint8Array,
    _at: number,
    lengthBytes: number,
    offsetBytes: number,
    mode: ZeroMode,
  ): number {
    return this.step(offsetBytes, lengthBytes, mode);
  }

  private step(offsetBytes: number, lengthBytes: number, mode: ZeroMode): number {
    const { mapping } = this;
    const { clusterSizeBytes, entriesPerTable } = mapping;
    const cluster = Math.floor(offsetBytes / clusterSizeBytes);
    const inCluster = offsetBytes - cluster * clusterSizeBytes;
    const l1Index = Math.floor(cluster / entriesPerTable);
    if (this.dataFile?.isRaw) return this.zeroRaw(this.dataFile, offsetBytes, lengthBytes, mode);
    return this.stepByEntries(cluster, inCluster, l1Index, offsetBytes, lengthBytes, mode);
  }

  private stepByEntries(
    cluster: number,
    inCluster: number,
    l1Index: number,
    offsetBytes: number,
    lengthBytes: number,
    mode: ZeroMode,
  ): number {
    const { mapping } = this;
    const { clusterSizeBytes, entriesPerTable } = mapping;
    const table = mapping.tableFor(l1Index);
    if (table === null) {
      this.wait = mapping.takeWait();
      if (this.wait !== undefined) return 0;
      const showsNothing = this.backing === null || this.backing.sizeBytes <= offsetBytes;
      if (showsNothing) {
        return Math.min(lengthBytes, (l1Index + 1) * mapping.bytesPerTable - offsetBytes);
      }
    }
    const reachesEnd = offsetBytes + lengthBytes >= this.sizeBytes;
    const wholeClusters = reachesEnd
      ? Math.ceil((inCluster + lengthBytes) / clusterSizeBytes)
      : Math.floor((inCluster + lengthBytes) / clusterSizeBytes);
    if (inCluster > 0 || wholeClusters === 0) {
      const partBytes = Math.min(lengthBytes, clusterSizeBytes - inCluster);
      return this.zeroPart(table, cluster, offsetBytes, partBytes, mode);
    }
    if (this.version < 3 && this.backing !== null) {
      if (mode === ZeroMode.Discard) return lengthBytes;
      const count = Math.min(lengthBytes, clusterSizeBytes);
      return this.zeroPart(table, cluster, offsetBytes, count, mode);
    }
    const count = Math.min(wholeClusters, entriesPerTable - (cluster - l1Index * entriesPerTable));
    return Math.min(lengthBytes, this.zeroWhole(cluster, count, mode) * clusterSizeBytes);
  }

  /** A range within one cluster. */
  private zeroPart(
    table: CachedTable | null,
    cluster: number,
    offsetBytes: number,
    wantedBytes: number,
    mode: ZeroMode,
  ): number {
    if (mode === ZeroMode.Discard) return wantedBytes;
    let lengthBytes = wantedBytes;
    if (this.mapping.hasSubclusters) {
      const inUnit = offsetBytes % this.mapping.unitSizeBytes;
      const unitCount = inUnit > 0 ? 0 : this.wholeUnits(offsetBytes, lengthBytes);
      if (unitCount > 0) return this.zeroUnits(cluster, offsetBytes, lengthBytes, unitCount);
      lengthBytes = Math.min(lengthBytes, this.mapping.unitSizeBytes - inUnit);
    }
    if (!this.writer.inFlight.has(cluster)) {
      if (this.readsAsZero(table, offsetBytes)) return lengthBytes;
      if (this.version >= 3 && this.isUnallocated(table, offsetBytes)) {
        const isZeroAround = this.isBackingZeroAround(offsetBytes, lengthBytes);
        if (isZeroAround === undefined) return 0;
        if (isZeroAround) return this.zeroUnitOf(cluster, offsetBytes, mode) ? lengthBytes : 0;
      }
    }
    return this.writeZeroes(offsetBytes, lengthBytes);
  }

  /** The unit shows the backing file; asked after readsAsZero. */
  private isUnallocated(table: CachedTable | null, offsetBytes: number): boolean {
    if (this.backing === null) return false;
    if (table === null) return true;
    const { mapping, run } = this;
    const unit = Math.floor(offsetBytes / mapping.unitSizeBytes);
    mapping.decoder.scan(table.view, unit % mapping.unitsPerTable, 1, run);
    return run.kind === ClusterKind.Unallocated || run.kind === ClusterKind.UnallocatedHosted;
  }

  /** Makes the whole unit zero by metadata; false with `wait` set. */
  private zeroUnitOf(cluster: number, offsetBytes: number, mode: ZeroMode): boolean {
    const { unitSizeBytes, hasSubclusters } = this.mapping;
    if (!hasSubclusters) return this.zeroWhole(cluster, 1, mode) > 0;
    const unitStart = offsetBytes - (offsetBytes % unitSizeBytes);
    return this.zeroUnits(cluster, unitStart, unitSizeBytes, 1) > 0;
  }

  /**
   * Whether the backing file reads as zeroes in the rest of the unit that [offsetBytes, +lengthBytes) is a part of;
   * undefined, with `wait` set, where the answer has to be waited for.
   */
  private isBackingZeroAround(offsetBytes: number, lengthBytes: number): boolean | undefined {
    const known = this.zeroAround.get(offsetBytes);
    if (known?.lengthBytes === lengthBytes) {
      this.zeroAround.delete(offsetBytes);
      return known.isZero;
    }
    const { unitSizeBytes } = this.mapping;
    const unitStart = offsetBytes - (offsetBytes % unitSizeBytes);
    const unitEnd = Math.min(unitStart + unitSizeBytes, this.backing?.sizeBytes ?? 0);
    const answer = this.isBackingZero(unitStart, Math.min(offsetBytes, unitEnd), () =>
      this.isBackingZero(offsetBytes + lengthBytes, unitEnd, () => true),
    );
    if (typeof answer === "boolean") return answer;
    const remember = (isZero: boolean): void => {
      this.zeroAround.set(offsetBytes, { lengthBytes, isZero });
    };
    // What cannot be asked must be read, which tells what is wrong.
    this.wait = answer.then(remember, () => remember(false));
    return undefined;
  }

  /** Of [from, to), and if so what `then` says; at once where the backing file can tell at once. */
  private isBackingZero(
    from: number,
    to: number,
    then: () => boolean | Promise<boolean>,
  ): boolean | Promise<boolean> {
    if (from >= to || this.backing === null) return then();
    const goOn = ({ zero, lengthBytes }: BlockStatus): boolean | Promise<boolean> =>
      zero && lengthBytes > 0 && this.isBackingZero(from + lengthBytes, to, then);
    const status = this.backing.blockStatus(from, to - from);
    return status instanceof Promise ? status.then(goOn) : goOn(status);
  }

  private writeZeroes(offsetBytes: number, lengthBytes: number): number {
    const count = this.writer.step(this.zeroes, 0, lengthBytes, offsetBytes);
    this.wait = this.writer.wait;
    this.writer.wait = undefined;
    return count;
  }

  /** Of a range that starts with a unit; the last one counts as whole where the disk ends within it. */
  private wholeUnits(offsetBytes: number, lengthBytes: number): number {
    const count = lengthBytes / this.mapping.unitSizeBytes;
    return offsetBytes + lengthBytes >= this.sizeBytes ? Math.ceil(count) : Math.floor(count);
  }

  private readsAsZero(table: CachedTable | null, offsetBytes: number): boolean {
    const { mapping, run, backing } = this;
    const unit = Math.floor(offsetBytes / mapping.unitSizeBytes);
    const showsNothing = backing === null || backing.sizeBytes <= unit * mapping.unitSizeBytes;
    if (table === null) return showsNothing;
    mapping.decoder.scan(table.view, unit % mapping.unitsPerTable, 1, run);
    const isUnallocated = run.kind === ClusterKind.Unallocated || run.kind === ClusterKind.UnallocatedHosted;
    if (isUnallocated) return showsNothing;
    return run.kind === ClusterKind.ZeroPlain || run.kind === ClusterKind.ZeroAllocated;
  }

  /** Whole subclusters of one cluster, by their bits; returns the bytes done (0 with `wait` set). */
  private zeroUnits(cluster: number, offsetBytes: number, lengthBytes: number, unitCount: number): number {
    const { mapping, run } = this;
    const { unitSizeBytes } = mapping;
    const table = this.tableToChange(cluster);
    if (table === null) return 0;
    const index = cluster % mapping.entriesPerTable;
    mapping.decoder.scanClusters(table.view, index, 1, run);
    if (run.kind === ClusterKind.Compressed) return this.writeZeroes(offsetBytes, lengthBytes);
    const first = (offsetBytes / unitSizeBytes) % mapping.decoder.unitsPerCluster;
    const units = unitMask(first, first + unitCount);
    const showsNothing = this.backing === null || this.backing.sizeBytes <= offsetBytes;
    const isZero = (units & ~run.zeroBits) === 0 || (showsNothing && (units & run.allocatedBits) === 0);
    if (!isZero) mapping.setZeroUnits(table, index, units);
    return Math.min(lengthBytes, unitCount * unitSizeBytes);
  }

  /** The L2 table, if the cluster may be changed now; null with `wait` set. */
  private tableToChange(cluster: number): CachedTable | null {
    const { mapping, writer } = this;
    this.wait = writer.inFlight.get(cluster);
    if (this.wait !== undefined) return null;
    const table = mapping.writableTable(Math.floor(cluster / mapping.entriesPerTable));
    if (table === null) this.wait = mapping.takeWait();
    return table;
  }

  /** Changes up to `count` entries; returns how many clusters are done (0 with `wait` set). */
  private zeroWhole(cluster: number, count: number, mode: ZeroMode): number {
    const { mapping, writer } = this;
    const table = this.tableToChange(cluster);
    if (table === null) return 0;
    const { clusterSizeBytes } = mapping;
    const firstIndex = cluster % mapping.entriesPerTable;
    let done = 0;
    for (; done < count; done++) {
      if (writer.inFlight.size > 0 && writer.inFlight.has(cluster + done)) break;
      this.zeroEntry(table, firstIndex + done, (cluster + done) * clusterSizeBytes, mode);
    }
    if (this.dataFile !== null && !this.dataFile.isRaw && mode !== ZeroMode.Keep) {
      const pending = this.dataFile.discard(cluster * clusterSizeBytes, done * clusterSizeBytes);
      if (pending !== undefined) this.holdUntil(pending, cluster, done);
    }
    return done;
  }

  private zeroEntry(table: CachedTable, index: number, startBytes: number, mode: ZeroMode): void {
    const { mapping, run, backing } = this;
    mapping.decoder.scanClusters(table.view, index, 1, run);
    const { kind } = run;
    const isAllZero = mapping.hasSubclusters && run.zeroBits === ALL_UNITS;
    if (kind === ClusterKind.ZeroPlain) return;
    if (kind === ClusterKind.Unallocated) {
      if (isAllZero || backing === null || backing.sizeBytes <= startBytes) return;
    } else if (mode === ZeroMode.Keep && (kind === ClusterKind.ZeroAllocated || isAllZero)) {
      return;
    } else if (mode === ZeroMode.Keep && hasHost(kind) && this.version >= 3) {
      mapping.setZeroUnits(table, index, ALL_UNITS);
      return;
    } else {
      this.writer.dropEntry(table, index, -1, mode !== ZeroMode.Keep);
    }
    mapping.setZeroPlain(table, index, this.version >= 3);
  }

  /**
   * A raw data file is zeroed itself; then the entries of whole clusters are changed as in any other image. Nobody else
   * is at these clusters in between: what was written there would be hidden by an entry that says zero.
   */
  private zeroRaw(dataFile: DataFile, offsetBytes: number, wantedBytes: number, mode: ZeroMode): number {
    const { clusterSizeBytes } = this.mapping;
    const { inFlight } = this.writer;
    const first = Math.floor(offsetBytes / clusterSizeBytes);
    const end = Math.ceil((offsetBytes + Math.min(wantedBytes, RAW_STEP_BYTES)) / clusterSizeBytes);
    for (let cluster = first; inFlight.size > 0 && cluster < end; cluster++) {
      // Who is at it may have read the old content, and be about to write it back around its own.
      this.wait = inFlight.get(cluster);
      if (this.wait !== undefined) return 0;
    }
    const lengthBytes = Math.min(wantedBytes, end * clusterSizeBytes - offsetBytes);
    const reachesEnd = offsetBytes + lengthBytes >= this.sizeBytes;
    const firstWhole = Math.ceil(offsetBytes / clusterSizeBytes);
    const endWhole = reachesEnd ? end : Math.floor((offsetBytes + lengthBytes) / clusterSizeBytes);
    const pending = dataFile.zero(offsetBytes, lengthBytes, mode !== ZeroMode.Keep);
    this.writer.markUnsynced();
    let work = pending;
    if (firstWhole < endWhole) work = this.zeroEntriesAfter(pending, firstWhole, endWhole, mode);
    if (work !== undefined)
      this.holdUntil(
        work.then(() => this.writer.markUnsynced()),
        first,
        end - first,
      );
    return lengthBytes;
  }

  /** The clusters' entries, when the data file is done; at once if it is and their tables are there. */
  private zeroEntriesAfter(
    pending: Completion,
    firstCluster: number,
    endCluster: number,
    mode: ZeroMode,
  ): Completion {
    if (pending !== undefined) {
      return pending.then(() => this.zeroEntriesAfter(undefined, firstCluster, endCluster, mode));
    }
    for (let cluster = firstCluster; cluster < endCluster;) {
      const { mapping } = this;
      const table = mapping.writableTable(Math.floor(cluster / mapping.entriesPerTable));
      if (table === null) {
        const wait = mapping.takeWait() ?? Promise.resolve();
        return wait.then(() => this.zeroEntriesAfter(undefined, cluster, endCluster, mode));
      }
      const index = cluster % mapping.entriesPerTable;
      const count = Math.min(endCluster - cluster, mapping.entriesPerTable - index);
      for (let done = 0; done < count; done++) {
        this.zeroEntry(table, index + done, (cluster + done) * mapping.clusterSizeBytes, mode);
      }
      cluster += count;
    }
    return undefined;
  }

  private holdUntil(pending: Promise<void>, cluster: number, count: number): void {
    this.writer.track(cluster, count, pending);
    this.wait = this.writer.wait;
    this.writer.wait = undefined;
  }
}
