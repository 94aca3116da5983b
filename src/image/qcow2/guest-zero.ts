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
// Version 2 has no zero flag: without a backing file the cluster becomes unallocated; with one, zeroes are written
// and discard does nothing (unallocated would show the backing file). A discard skips ranges without an L2 table
// rather than make one.
//
// Steps and waiting as in guest-read.ts. Main thread only.

import { toCowcatcherError } from "../../errors.js";
import type { BlockDevice, Completion } from "../device.js";
import type { CachedTable } from "./cached-table.js";
import { ClusterKind, ClusterRun, HIGH_COPIED, LOW_ZERO } from "./entry.js";
import type { GuestWriter } from "./guest-write.js";
import type { Mapping } from "./mapping.js";

export const enum ZeroMode {
  /** Reads as zeroes afterwards; host clusters stay allocated. */
  Keep,
  /** Reads as zeroes afterwards; host clusters are let go. */
  Unmap,
  /** Host clusters are let go; content afterwards is of no interest. */
  Discard,
}

export class GuestZeroer {
  private wait: Completion;
  private readonly run = new ClusterRun();
  private readonly zeroes: Uint8Array;

  constructor(
    private readonly mapping: Mapping,
    private readonly backing: BlockDevice | null,
    private readonly writer: GuestWriter,
    private readonly version: 2 | 3,
    private readonly sizeBytes: number,
    private readonly name: string,
  ) {
    this.zeroes = new Uint8Array(mapping.clusterSizeBytes);
  }

  zero(offsetBytes: number, lengthBytes: number, mode: ZeroMode): Completion {
    let done = 0;
    try {
      while (done < lengthBytes) {
        const count = this.step(offsetBytes + done, lengthBytes - done, mode);
        if (this.wait !== undefined) return this.zeroOn(count, offsetBytes + done, lengthBytes - done, mode);
        done += count;
      }
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, this.name));
    }
  }

  private async zeroOn(
    pendingBytes: number,
    offsetBytes: number,
    lengthBytes: number,
    mode: ZeroMode,
  ): Promise<void> {
    const operation = this.mapping.frees.beginOperation();
    let done = 0;
    let count = pendingBytes;
    try {
      for (;;) {
        const { wait } = this;
        this.wait = undefined;
        if (wait !== undefined) await wait;
        done += count;
        if (done >= lengthBytes) return;
        count = this.step(offsetBytes + done, lengthBytes - done, mode);
      }
    } finally {
      this.mapping.frees.endOperation(operation);
    }
  }

  private step(offsetBytes: number, lengthBytes: number, mode: ZeroMode): number {
    const { mapping } = this;
    const { clusterSizeBytes, entriesPerTable } = mapping;
    const cluster = Math.floor(offsetBytes / clusterSizeBytes);
    const inCluster = offsetBytes - cluster * clusterSizeBytes;
    const l1Index = Math.floor(cluster / entriesPerTable);
    const table = mapping.tableFor(l1Index);
    if (table === null) {
      this.wait = mapping.takeWait();
      if (this.wait !== undefined) return 0;
      const showsNothing = this.backing === null || this.backing.sizeBytes <= offsetBytes;
      if (showsNothing || mode === ZeroMode.Discard) {
        return Math.min(lengthBytes, (l1Index + 1) * mapping.bytesPerTable - offsetBytes);
      }
    }
    const reachesEnd = offsetBytes + lengthBytes >= this.sizeBytes;
    const wholeClusters = reachesEnd
      ? Math.ceil((inCluster + lengthBytes) / clusterSizeBytes)
      : Math.floor((inCluster + lengthBytes) / clusterSizeBytes);
    if (inCluster > 0 || wholeClusters === 0) {
      return this.zeroPart(
        table,
        cluster,
        offsetBytes,
        Math.min(lengthBytes, clusterSizeBytes - inCluster),
        mode,
      );
    }
    if (this.version < 3 && this.backing !== null) {
      if (mode === ZeroMode.Discard) return lengthBytes;
      const count = Math.min(lengthBytes, clusterSizeBytes);
      return this.zeroPart(table, cluster, offsetBytes, count, mode);
    }
    const count = Math.min(wholeClusters, entriesPerTable - (cluster - l1Index * entriesPerTable));
    return Math.min(lengthBytes, this.zeroWhole(l1Index, cluster, count, mode) * clusterSizeBytes);
  }

  /** A range within one cluster. */
  private zeroPart(
    table: CachedTable | null,
    cluster: number,
    offsetBytes: number,
    lengthBytes: number,
    mode: ZeroMode,
  ): number {
    if (mode === ZeroMode.Discard) return lengthBytes;
    if (!this.writer.inFlight.has(cluster) && this.readsAsZero(table, cluster)) return lengthBytes;
    const count = this.writer.step(this.zeroes, 0, lengthBytes, offsetBytes);
    this.wait = this.writer.wait;
    this.writer.wait = undefined;
    return count;
  }

  private readsAsZero(table: CachedTable | null, cluster: number): boolean {
    const { mapping, run, backing } = this;
    const showsNothing = backing === null || backing.sizeBytes <= cluster * mapping.clusterSizeBytes;
    if (table === null) return showsNothing;
    mapping.decoder.scan(table.view, cluster % mapping.entriesPerTable, 1, run);
    if (run.kind === ClusterKind.Unallocated) return showsNothing;
    return run.kind === ClusterKind.ZeroPlain || run.kind === ClusterKind.ZeroAllocated;
  }

  /** Changes up to `count` entries; returns how many clusters are done (0 with `wait` set). */
  private zeroWhole(l1Index: number, cluster: number, count: number, mode: ZeroMode): number {
    const { mapping, writer } = this;
    this.wait = writer.inFlight.get(cluster);
    if (this.wait !== undefined) return 0;
    const table = mapping.writableTable(l1Index);
    if (table === null) {
      this.wait = mapping.takeWait();
      return 0;
    }
    const firstIndex = cluster % mapping.entriesPerTable;
    for (let done = 0; done < count; done++) {
      if (writer.inFlight.size > 0 && writer.inFlight.has(cluster + done)) return done;
      this.zeroEntry(table, firstIndex + done, (cluster + done) * mapping.clusterSizeBytes, mode);
    }
    return count;
  }

  private zeroEntry(table: CachedTable, index: number, startBytes: number, mode: ZeroMode): void {
    const { mapping, run, backing } = this;
    mapping.decoder.scan(table.view, index, 1, run);
    const { kind, hostOffset, isCopied } = run;
    if (kind === ClusterKind.ZeroPlain) return;
    if (kind === ClusterKind.Unallocated) {
      if (backing === null || backing.sizeBytes <= startBytes) return;
    } else if (mode === ZeroMode.Keep && kind === ClusterKind.ZeroAllocated) {
      return;
    } else if (mode === ZeroMode.Keep && kind === ClusterKind.Normal && this.version >= 3) {
      mapping.setEntry(table, index, hostOffset, isCopied ? HIGH_COPIED : 0, LOW_ZERO);
      return;
    } else {
      this.writer.dropEntry(table, index, 0);
    }
    mapping.setEntry(table, index, 0, 0, this.version >= 3 ? LOW_ZERO : 0);
  }
}
