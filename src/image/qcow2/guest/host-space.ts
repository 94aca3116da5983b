// Where the guest's clusters get their host clusters from, and where these go when they are let go.
//
// In the image file (ImageSpace) that is the refcounts and the queue of frees. In an external data file each guest
// cluster has its one place for ever, the same offset as on the guest's disk (DataFileSpace): nothing is counted and
// nothing need be waited for, as whatever is written there is that cluster's own next content.
//
// Main thread only.

import { ClusterKind, type ClusterRun } from "../format/entry.js";
import type { QcowFile } from "../format/file.js";
import type { FreeQueue } from "./frees.js";
import type { Refcounts } from "./refcounts.js";

const SECTOR = 512;

export interface HostSpace {
  /** Out-fields of `allocate`. */
  readonly allocatedCount: number;
  /** The clusters read as zeroes as they are. */
  readonly isFresh: boolean;
  /**
   * Host clusters in a row for up to maxClusters guest clusters from `guestCluster` on; returns the first's offset.
   * @throws CowcatcherError FORMAT or LIMIT
   */
  allocate(guestCluster: number, maxClusters: number): number;
  /** Gives back what `allocate` returned and nothing refers to. */
  unallocate(hostOffset: number, clusterCount: number): void;
  /**
   * The entry that `run` describes, one cluster or its compressed data, is replaced.
   * @param isUnmapped its storage is to go back to the file system, when nobody can read it any more
   */
  drop(run: ClusterRun, isUnmapped: boolean): void;
}

export class ImageSpace implements HostSpace {
  constructor(
    private readonly refcounts: Refcounts,
    private readonly frees: FreeQueue,
    private readonly clusterSizeBytes: number,
  ) {}

  get allocatedCount(): number {
    return this.refcounts.allocatedCount;
  }

  get isFresh(): boolean {
    return this.refcounts.isFresh;
  }

  allocate(_guestCluster: number, maxClusters: number): number {
    return this.refcounts.allocate(maxClusters);
  }

  unallocate(hostOffset: number, clusterCount: number): void {
    this.refcounts.unallocate(hostOffset, clusterCount);
  }

  drop({ kind, hostOffset, compressedBytes, isCopied }: ClusterRun, isUnmapped: boolean): void {
    if (kind === ClusterKind.Compressed) {
      const start = hostOffset - (hostOffset % SECTOR);
      this.frees.dropReadable(start, hostOffset + compressedBytes - start, isUnmapped);
    } else if (isCopied) {
      this.frees.dropClusters(hostOffset, this.clusterSizeBytes, isUnmapped);
    } else {
      this.frees.dropReadable(hostOffset, this.clusterSizeBytes, isUnmapped);
    }
  }
}

export class DataFileSpace implements HostSpace {
  allocatedCount = 0;
  isFresh = false;

  constructor(
    private readonly dataFile: QcowFile,
    private readonly clusterSizeBytes: number,
  ) {}

  allocate(guestCluster: number, maxClusters: number): number {
    const hostOffset = guestCluster * this.clusterSizeBytes;
    this.allocatedCount = maxClusters;
    this.isFresh = !this.dataFile.isBlockDevice && hostOffset >= this.dataFile.endOffset;
    return hostOffset;
  }

  unallocate(): void {
    // The place is that cluster's own, whether it is in use or not.
  }

  drop(): void {
    // As above. That the data file need not keep the bytes is told to it by whoever drops them (guest/zero.ts).
  }
}
