// Guest writes: in place where the cluster is the image's own, else into a new cluster.
//
//   cluster is            | whole cluster written          | part of a cluster written
//   normal, COPIED        | in place                       | in place
//   zero, with own host   | there, then the entry          | padded with zeroes, there, then the entry
//   zero, unallocated     | new cluster, then the entry    | the rest from backing or zeroes, new cluster, entry
//   compressed, shared    | new cluster, then the entry    | the rest from the old data, new cluster, entry
//
// The entry changes after the data is written, so no reader sees a mapping whose data is not there. As long as an
// allocation waits for I/O its guest clusters are in `inFlight`: other changes to them wait; reads see the old
// mapping. The table is bounded by the requests that the server admits.
//
// `step` works as in guest-read.ts. Main thread only.

import { toCowcatcherError } from "../../errors.js";
import type { BlockDevice, Completion } from "../device.js";
import type { CachedTable } from "./cached-table.js";
import { ClusterKind, ClusterRun, HIGH_COPIED } from "./entry.js";
import type { QcowFile } from "./file.js";
import type { Flusher } from "./flusher.js";
import type { GuestReader } from "./guest-read.js";
import type { Mapping } from "./mapping.js";

const SECTOR = 512;
/** Scratch clusters kept for partial writes that wait. */
const SPARE_SCRATCH_COUNT = 8;

export class GuestWriter {
  wait: Completion;
  readonly inFlight = new Map<number, Promise<void>>();
  private readonly run = new ClusterRun();
  private readonly nextRun = new ClusterRun();
  private readonly oldRun = new ClusterRun();
  private readonly scratches: Uint8Array[] = [];

  constructor(
    private readonly mapping: Mapping,
    private readonly file: QcowFile,
    private readonly backing: BlockDevice | null,
    private readonly reader: GuestReader,
    private readonly flusher: Flusher,
    private readonly sizeBytes: number,
  ) {}

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    let done = 0;
    try {
      while (done < lengthBytes) {
        const count = this.step(buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
        if (this.wait !== undefined) {
          return this.writeOn(count, buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
        }
        done += count;
      }
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, this.file.name));
    }
  }

  private async writeOn(
    pendingBytes: number,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
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
        count = this.step(buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
      }
    } finally {
      this.mapping.frees.endOperation(operation);
    }
  }

  /** Serves the first run of [offsetBytes, +lengthBytes): bytes done, or to be done when `wait` is over. */
  step(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): number {
    const { mapping, run } = this;
    const { clusterSizeBytes, entriesPerTable } = mapping;
    const cluster = Math.floor(offsetBytes / clusterSizeBytes);
    const inCluster = offsetBytes - cluster * clusterSizeBytes;
    const l1Index = Math.floor(cluster / entriesPerTable);
    const index = cluster - l1Index * entriesPerTable;
    let table = mapping.tableFor(l1Index);
    if (table !== null) {
      const maxClusters = Math.ceil((inCluster + lengthBytes) / clusterSizeBytes);
      mapping.decoder.scan(table.view, index, maxClusters, run);
      if (run.kind === ClusterKind.Normal && run.isCopied) {
        const count = Math.min(lengthBytes, run.clusterCount * clusterSizeBytes - inCluster);
        this.writeInPlace(buffer, bufferOffset, count, run.hostOffset + inCluster);
        return count;
      }
    } else if ((this.wait = mapping.takeWait()) !== undefined) {
      return 0;
    }
    this.wait = this.inFlight.get(cluster);
    if (this.wait !== undefined) return 0;
    table = mapping.writableTable(l1Index);
    if (table === null) {
      this.wait = mapping.takeWait();
      return 0;
    }
    mapping.decoder.scan(table.view, index, this.entriesPerRequest(lengthBytes), run);
    if (inCluster === 0 && lengthBytes >= clusterSizeBytes) {
      const wholeClusters = Math.floor(lengthBytes / clusterSizeBytes);
      return this.writeWhole(table, cluster, wholeClusters, buffer, bufferOffset);
    }
    const count = Math.min(lengthBytes, clusterSizeBytes - inCluster);
    this.writePart(table, cluster, inCluster, buffer, bufferOffset, count);
    return count;
  }

  private entriesPerRequest(lengthBytes: number): number {
    return Math.max(1, Math.floor(lengthBytes / this.mapping.clusterSizeBytes));
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
    let count = Math.min(maxClusters, run.clusterCount);
    const isOwnHost = run.kind === ClusterKind.ZeroAllocated && run.isCopied;
    if (!isOwnHost) {
      count = this.countToAllocate(table, cluster, maxClusters);
      hostOffset = mapping.refcounts.allocate(count);
      count = mapping.refcounts.allocatedCount;
    } else {
      while (count > 1 && this.isAnyInFlight(cluster + 1, count - 1)) count--;
    }
    const lengthBytes = count * clusterSizeBytes;
    try {
      const completion = this.file.write(buffer, bufferOffset, lengthBytes, hostOffset);
      if (completion === undefined) this.commit(table, cluster, count, hostOffset);
      else this.track(cluster, count, this.commitAfter(completion, cluster, count, hostOffset, isOwnHost));
    } catch (error) {
      if (!isOwnHost) mapping.refcounts.unallocate(hostOffset, count);
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
      mapping.decoder.scan(table.view, index + count, 1, nextRun);
      const hasOwnHost = nextRun.kind === ClusterKind.Normal || nextRun.kind === ClusterKind.ZeroAllocated;
      if (hasOwnHost && nextRun.isCopied) return count;
    }
    return limit;
  }

  /** Writes a part of one cluster that cannot be written in place. */
  private writePart(
    table: CachedTable,
    cluster: number,
    inCluster: number,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
  ): void {
    const { run, mapping } = this;
    const start = cluster * mapping.clusterSizeBytes;
    const isOwnHost = run.kind === ClusterKind.ZeroAllocated && run.isCopied;
    const ownHost = isOwnHost ? run.hostOffset : 0;
    if (!isOwnHost && this.readsAsZero(run.kind, start)) {
      const hostOffset = mapping.refcounts.allocate(1);
      if (mapping.refcounts.isFresh) {
        // The rest of the cluster is a hole of the file: it reads as zeroes already.
        this.writeCluster(table, cluster, hostOffset, false, buffer, bufferOffset, lengthBytes, inCluster);
        return;
      }
      mapping.refcounts.unallocate(hostOffset, 1);
    }
    const scratch = this.scratches.pop() ?? new Uint8Array(mapping.clusterSizeBytes);
    const stored = Math.min(mapping.clusterSizeBytes, this.sizeBytes - start);
    const completion = this.reader.read(scratch, 0, stored, start);
    if (completion !== undefined) {
      const source = buffer.subarray(bufferOffset, bufferOffset + lengthBytes);
      this.track(
        cluster,
        1,
        this.mergeAfter(completion, cluster, ownHost, scratch, stored, source, inCluster),
      );
      return;
    }
    scratch.fill(0, stored);
    const source = buffer.subarray(bufferOffset, bufferOffset + lengthBytes);
    scratch.set(source, inCluster);
    const hostOffset = isOwnHost ? ownHost : mapping.refcounts.allocate(1);
    this.writeCluster(table, cluster, hostOffset, isOwnHost, scratch, 0, scratch.length, 0);
    this.recycleAfter(scratch);
  }

  /** The part that waits: old content, then the new bytes over it, then as in `writePart`. */
  private async mergeAfter(
    completion: Promise<void>,
    cluster: number,
    ownHost: number,
    scratch: Uint8Array,
    stored: number,
    source: Uint8Array,
    inCluster: number,
  ): Promise<void> {
    const { refcounts } = this.mapping;
    await completion;
    scratch.fill(0, stored);
    scratch.set(source, inCluster);
    const hostOffset = ownHost === 0 ? refcounts.allocate(1) : ownHost;
    let written: Completion;
    try {
      written = this.file.write(scratch, 0, scratch.length, hostOffset);
    } catch (error) {
      if (ownHost === 0) refcounts.unallocate(hostOffset, 1);
      throw error;
    }
    await this.commitAfter(written ?? Promise.resolve(), cluster, 1, hostOffset, ownHost !== 0);
    this.recycle(scratch);
  }

  private writeCluster(
    table: CachedTable,
    cluster: number,
    hostOffset: number,
    isOwnHost: boolean,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    inCluster: number,
  ): void {
    try {
      const completion = this.file.write(buffer, bufferOffset, lengthBytes, hostOffset + inCluster);
      if (completion === undefined) this.commit(table, cluster, 1, hostOffset);
      else this.track(cluster, 1, this.commitAfter(completion, cluster, 1, hostOffset, isOwnHost));
    } catch (error) {
      if (!isOwnHost) this.mapping.refcounts.unallocate(hostOffset, 1);
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

  private readsAsZero(kind: ClusterKind, startBytes: number): boolean {
    if (kind === ClusterKind.ZeroPlain || kind === ClusterKind.ZeroAllocated) return true;
    if (kind !== ClusterKind.Unallocated) return false;
    return this.backing === null || this.backing.sizeBytes <= startBytes;
  }

  private track(cluster: number, count: number, work: Promise<void>): void {
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
  ): Promise<void> {
    try {
      await completion;
      let table = this.mapping.writableTable(Math.floor(cluster / this.mapping.entriesPerTable));
      while (table === null) {
        await this.mapping.takeWait();
        table = this.mapping.writableTable(Math.floor(cluster / this.mapping.entriesPerTable));
      }
      this.commit(table, cluster, count, hostOffset);
    } catch (error) {
      if (!isOwnHost) this.mapping.refcounts.unallocate(hostOffset, count);
      throw error;
    }
  }

  /** The data is written: points the entries to it and drops what they pointed to. */
  private commit(table: CachedTable, cluster: number, count: number, hostOffset: number): void {
    const { mapping } = this;
    const firstIndex = cluster % mapping.entriesPerTable;
    for (let index = 0; index < count; index++) {
      const newHost = hostOffset + index * mapping.clusterSizeBytes;
      this.dropEntry(table, firstIndex + index, newHost);
      mapping.setEntry(table, firstIndex + index, newHost, HIGH_COPIED, 0);
    }
    this.flusher.hasUnsyncedData = true;
  }

  /** Drops the host space that an entry refers to, unless it is `keptHost`. The caller replaces the entry. */
  dropEntry(table: CachedTable, index: number, keptHost: number): void {
    const { oldRun, mapping } = this;
    mapping.decoder.scan(table.view, index, 1, oldRun);
    const { kind, hostOffset, compressedBytes, isCopied } = oldRun;
    if (hostOffset === 0 || hostOffset === keptHost) return;
    if (kind === ClusterKind.Compressed) {
      const start = hostOffset - (hostOffset % SECTOR);
      mapping.frees.dropReadable(start, hostOffset + compressedBytes - start);
    } else if (isCopied) {
      mapping.frees.dropClusters(hostOffset, mapping.clusterSizeBytes);
    } else {
      mapping.frees.dropReadable(hostOffset, mapping.clusterSizeBytes);
    }
  }
}
