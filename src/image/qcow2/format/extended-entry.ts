// Extended L2 entries: the 64 bits of a standard entry, then a bitmap of 64 bits. Of each of the cluster's 32
// subclusters it says whether its data stands in the host cluster (bits 0 to 31) and whether it reads as zeroes (bits
// 32 to 63); one with neither shows the backing file. The zero flag of the standard entry (bit 0) has no meaning here.
//
//   bits of a subcluster      with a host cluster    without
//   allocated                 Normal                 invalid
//   zero                      ZeroAllocated          ZeroPlain
//   neither                   UnallocatedHosted      Unallocated
//   both                      invalid                invalid
//
// Of a compressed cluster the bitmap has no meaning, and all of its units are Compressed.
// An invalid bit anywhere in an entry makes all of it invalid, as for QEMU: no one knows which of its bits to believe.
//
// Specification: qcow2, "Extended L2 Entries". A decoder keeps what it decodes in fields, so it belongs to one thread.

import {
  ALL_UNITS,
  ClusterKind,
  type ClusterRun,
  EntryDecoder,
  type EntryGeometry,
  HIGH_COMPRESSED,
  HIGH_COPIED,
  entryHostOffset,
} from "./entry.js";
import { formatError } from "./header.js";

export const EXTENDED_ENTRY_BYTES = 16;
export const SUBCLUSTERS_PER_CLUSTER = 32;
/** The bitmap's words within an entry. */
const ZERO_BITS_OFFSET = 8;
const ALLOCATED_BITS_OFFSET = 12;

/** The decoder for an image's form of L2 entries. */
export function decoderFor(geometry: EntryGeometry & { isExtendedL2: boolean }, name: string): EntryDecoder {
  return geometry.isExtendedL2 ? new ExtendedDecoder(geometry, name) : new EntryDecoder(geometry, name);
}

export class ExtendedDecoder extends EntryDecoder {
  private zeroBits = 0;
  private allocatedBits = 0;

  constructor(geometry: EntryGeometry, name: string) {
    super(geometry, name, EXTENDED_ENTRY_BYTES, SUBCLUSTERS_PER_CLUSTER);
  }

  override scan(view: DataView, index: number, maxUnits: number, run: ClusterRun): void {
    const firstIndex = Math.floor(index / SUBCLUSTERS_PER_CLUSTER);
    const unit = index % SUBCLUSTERS_PER_CLUSTER;
    this.decodeEntry(view, firstIndex, run);
    if (run.kind === ClusterKind.Compressed) {
      run.unitCount = Math.min(maxUnits, SUBCLUSTERS_PER_CLUSTER - unit);
      return;
    }
    const isHosted = run.kind === ClusterKind.Normal;
    const bits = this.chooseKind(unit, isHosted, run);
    let count = onesFrom(bits, unit);
    let nextOffset = run.hostOffset + this.clusterSizeBytes;
    for (
      let next = firstIndex + 1;
      unit + count === (next - firstIndex) * SUBCLUSTERS_PER_CLUSTER && count < maxUnits;
      next++
    ) {
      if (next >= this.entriesPerTable) break;
      const more = this.unitsGoingOn(view, next, isHosted ? nextOffset : -1, run);
      count += more;
      nextOffset += this.clusterSizeBytes;
    }
    run.unitCount = Math.min(count, maxUnits);
    if (isHosted) run.hostOffset += unit * this.unitSizeBytes;
  }

  override scanClusters(view: DataView, index: number, maxClusters: number, run: ClusterRun): void {
    this.decodeEntry(view, index, run);
    run.allocatedBits = this.allocatedBits;
    run.zeroBits = this.zeroBits;
    run.unitCount = 1;
    if (run.kind !== ClusterKind.Normal) return;
    const end = Math.min(maxClusters, this.entriesPerTable - index);
    while (
      run.unitCount < end &&
      this.isPlacedAt(
        view,
        index + run.unitCount,
        run.hostOffset + run.unitCount * this.clusterSizeBytes,
        run.isCopied,
      )
    ) {
      run.unitCount++;
    }
  }

  /** Sets `run` to the entry's kind as a cluster (Unallocated, Normal or Compressed) and the fields to its bitmap. */
  private decodeEntry(view: DataView, index: number, run: ClusterRun): void {
    const at = index * EXTENDED_ENTRY_BYTES;
    const high = view.getUint32(at);
    const low = view.getUint32(at + 4);
    if (high & HIGH_COMPRESSED) {
      this.zeroBits = 0;
      this.allocatedBits = 0;
      this.decodeCompressed(high, low, run);
      return;
    }
    this.zeroBits = view.getUint32(at + ZERO_BITS_OFFSET);
    this.allocatedBits = view.getUint32(at + ALLOCATED_BITS_OFFSET);
    run.isCopied = (high & HIGH_COPIED) !== 0;
    run.hostOffset = entryHostOffset(high, low);
    const isPlaced = run.hostOffset !== 0 || (this.isInDataFile && run.isCopied);
    run.kind = isPlaced ? ClusterKind.Normal : ClusterKind.Unallocated;
    if ((this.zeroBits & this.allocatedBits) !== 0) {
      throw formatError(
        this.name,
        `L2 entry ${index} calls a subcluster both allocated and zero`,
        run.hostOffset,
      );
    }
    if (!isPlaced && this.allocatedBits !== 0) {
      throw formatError(this.name, `L2 entry ${index} has allocated subclusters, but no host cluster`);
    }
    this.checkHost(high, low, index, run);
  }

  /** Sets the kind of one subcluster; returns the bits of all that are like it. */
  private chooseKind(unit: number, isHosted: boolean, run: ClusterRun): number {
    if ((this.allocatedBits >>> unit) & 1) {
      run.kind = ClusterKind.Normal;
      return this.allocatedBits;
    }
    if ((this.zeroBits >>> unit) & 1) {
      run.kind = isHosted ? ClusterKind.ZeroAllocated : ClusterKind.ZeroPlain;
      return this.zeroBits;
    }
    run.kind = isHosted ? ClusterKind.UnallocatedHosted : ClusterKind.Unallocated;
    return ~(this.allocatedBits | this.zeroBits);
  }

  /** How many subclusters of entry `next`, from its first on, go on with `run`; `hostOffset` -1: without a place. */
  private unitsGoingOn(view: DataView, next: number, hostOffset: number, run: ClusterRun): number {
    const at = next * EXTENDED_ENTRY_BYTES;
    const isAlike =
      hostOffset < 0
        ? view.getUint32(at) === 0 && (view.getUint32(at + 4) & ~1) === 0
        : this.isPlacedAt(view, next, hostOffset, run.isCopied);
    if (!isAlike) return 0;
    const zeroBits = view.getUint32(at + ZERO_BITS_OFFSET);
    const allocatedBits = view.getUint32(at + ALLOCATED_BITS_OFFSET);
    // The run ends before an invalid entry: the next scan starts there and says so.
    if ((zeroBits & allocatedBits) !== 0 || (hostOffset < 0 && allocatedBits !== 0)) return 0;
    switch (run.kind) {
      case ClusterKind.Normal:
        return onesFrom(allocatedBits, 0);
      case ClusterKind.ZeroAllocated:
      case ClusterKind.ZeroPlain:
        return onesFrom(zeroBits, 0);
      case ClusterKind.Unallocated:
      case ClusterKind.UnallocatedHosted:
        return onesFrom(~(allocatedBits | zeroBits), 0);
      case ClusterKind.Compressed:
        return 0;
    }
  }

  private isPlacedAt(view: DataView, index: number, hostOffset: number, isCopied: boolean): boolean {
    const at = index * EXTENDED_ENTRY_BYTES;
    const high = view.getUint32(at);
    return (
      (high & HIGH_COMPRESSED) === 0 &&
      entryHostOffset(high, view.getUint32(at + 4)) === hostOffset &&
      ((high & HIGH_COPIED) !== 0) === isCopied
    );
  }
}

export function storeBitmap(view: DataView, index: number, allocatedBits: number, zeroBits: number): void {
  view.setUint32(index * EXTENDED_ENTRY_BYTES + ZERO_BITS_OFFSET, zeroBits >>> 0);
  view.setUint32(index * EXTENDED_ENTRY_BYTES + ALLOCATED_BITS_OFFSET, allocatedBits >>> 0);
}

/** Bits for subclusters [first, end). */
export function unitMask(first: number, end: number): number {
  const upTo = end >= SUBCLUSTERS_PER_CLUSTER ? ALL_UNITS : 2 ** end - 1;
  return (upTo & ~(2 ** first - 1)) >>> 0;
}

/** How many bits in a row, from bit `first` on, are 1. */
export function onesFrom(bits: number, first: number): number {
  const zeroes = ~bits >>> first;
  return zeroes === 0 ? SUBCLUSTERS_PER_CLUSTER - first : 31 - Math.clz32(zeroes & -zeroes);
}
