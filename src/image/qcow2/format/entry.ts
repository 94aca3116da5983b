// L2 entries: what the 64 bits of one say, and how far a run of like entries goes.
//
// Entries are handled as two 32-bit words (high, low), never as bigints: they are decoded on the guest's path, by
// the image (main thread) and by readers (workers) alike. A ClusterRun is filled in place, so a look-up allocates
// nothing. Specification: qcow2, "Cluster mapping".
//
// Two forms of entry exist, and an image has one of them throughout, so the decoder is chosen at opening: EntryDecoder
// for the standard one, ExtendedDecoder (extended-entry.ts) for 128 bits with a state for each of 32 subclusters.
// What shares its state is called a unit: a cluster, or a subcluster. Whoever reads, or writes in place, counts in
// units (`scan`) and need not know which; whoever allocates counts in clusters (`scanClusters`).
//
// With an external data file a cluster's place there is its place on the guest's disk (`isInDataFile`). That makes
// 0 a valid host offset, told from "none" by the COPIED flag; so ask `hasHost(kind)`, not the offset.

import { CowcatcherError } from "../../../errors.js";
import { formatError } from "./header.js";

export const enum ClusterKind {
  Unallocated,
  /** A subcluster that shows the backing file, in a cluster that has a host cluster. */
  UnallocatedHosted,
  /** Zero flag, no host cluster. */
  ZeroPlain,
  /** Zero flag on a host cluster that is kept. */
  ZeroAllocated,
  Normal,
  Compressed,
}

export const HIGH_COPIED = 0x80000000;
export const HIGH_COMPRESSED = 0x40000000;
export const LOW_ZERO = 1;
const HIGH_OFFSET_MASK = 0x00ffffff;
const LOW_OFFSET_MASK = 0xfffffe00;
const WORD = 2 ** 32;
/** Host offsets from 2^53 on are refused: high word's bits 21 to 23. */
const HIGH_OFFSET_UNSAFE = 0x00e00000;
const SECTOR = 512;

/** Every subcluster, as the bits of a bitmap. */
export const ALL_UNITS = 0xffffffff;

export class ClusterRun {
  kind: ClusterKind = ClusterKind.Unallocated;
  /** The host cluster's refcount is exactly one: it may be written in place. */
  isCopied = false;
  /** Of the first unit; 0 where there is none. For a compressed cluster the byte at which its data starts. */
  hostOffset = 0;
  /** From `scan` units, from `scanClusters` clusters. */
  unitCount = 0;
  /** Compressed clusters: bytes from hostOffset to the end of the last sector. */
  compressedBytes = 0;
  /** From `scanClusters` of extended entries, of the first cluster: one bit a subcluster, unsigned. */
  allocatedBits = 0;
  zeroBits = 0;
}

export function hasHost(kind: ClusterKind): boolean {
  return (
    kind === ClusterKind.Normal ||
    kind === ClusterKind.ZeroAllocated ||
    kind === ClusterKind.UnallocatedHosted
  );
}

export function entryHostOffset(high: number, low: number): number {
  return (high & HIGH_OFFSET_MASK) * WORD + ((low & LOW_OFFSET_MASK) >>> 0);
}

export function highWord(value: number): number {
  return Math.floor(value / WORD);
}

export interface EntryGeometry {
  clusterBits: number;
  version: 2 | 3;
  /** Guest clusters stand in an external data file. */
  isInDataFile: boolean;
}

/** What decodes entries of one image: its geometry, and its name for errors. */
export class EntryDecoder {
  readonly clusterBits: number;
  readonly version: 2 | 3;
  readonly isInDataFile: boolean;
  readonly clusterSizeBytes: number;
  /** Bytes of one entry. */
  readonly entryBytes: number;
  /** Guest clusters that a table maps. */
  readonly entriesPerTable: number;
  readonly unitsPerCluster: number;
  readonly unitSizeBytes: number;
  readonly unitsPerTable: number;
  private readonly compressedHighBits: number;
  private readonly compressedHighMask: number;
  private readonly lowAlignmentMask: number;

  /** Subclasses give the last two. */
  constructor(
    { clusterBits, version, isInDataFile }: EntryGeometry,
    readonly name: string,
    entryBytes = 8,
    unitsPerCluster = 1,
  ) {
    this.clusterBits = clusterBits;
    this.version = version;
    this.isInDataFile = isInDataFile;
    this.clusterSizeBytes = 2 ** clusterBits;
    this.entryBytes = entryBytes;
    this.entriesPerTable = this.clusterSizeBytes / entryBytes;
    this.unitsPerCluster = unitsPerCluster;
    this.unitSizeBytes = this.clusterSizeBytes / unitsPerCluster;
    this.unitsPerTable = this.entriesPerTable * unitsPerCluster;
    this.compressedHighBits = 62 - (clusterBits - 8) - 32;
    this.compressedHighMask = 2 ** this.compressedHighBits - 1;
    this.lowAlignmentMask = this.clusterSizeBytes - 1;
  }

  /** The same as `scan`, but of clusters; of an extended entry's kinds only the first two and Normal, Compressed. */
  scanClusters(view: DataView, index: number, maxClusters: number, run: ClusterRun): void {
    this.scan(view, index, maxClusters, run);
  }

  /**
   * Describes the run that starts at unit `index` of the table: the longest stretch of at most `maxUnits` units of one
   * kind, within one table, whose places in the file (where they have any) follow one another.
   * @throws CowcatcherError FORMAT where an entry breaks the specification.
   */
  scan(view: DataView, index: number, maxUnits: number, run: ClusterRun): void {
    const high = view.getUint32(index * 8);
    const low = view.getUint32(index * 8 + 4);
    this.decode(high, low, index, run);
    const end = Math.min(index + maxUnits, this.entriesPerTable);
    let next = index + 1;
    if (run.kind === ClusterKind.Normal || run.kind === ClusterKind.ZeroAllocated) {
      let expectedHigh = high;
      let expectedLow = low;
      for (; next < end; next++) {
        expectedLow += this.clusterSizeBytes;
        if (expectedLow >= WORD) {
          expectedLow -= WORD;
          expectedHigh += 1;
        }
        if (view.getUint32(next * 8 + 4) !== expectedLow || view.getUint32(next * 8) !== expectedHigh) break;
      }
    } else if (run.kind !== ClusterKind.Compressed) {
      while (next < end && view.getUint32(next * 8) === high && view.getUint32(next * 8 + 4) === low) next++;
    }
    run.unitCount = next - index;
  }

  decode(high: number, low: number, index: number, run: ClusterRun): void {
    run.unitCount = 1;
    if (high & HIGH_COMPRESSED) {
      this.decodeCompressed(high, low, run);
      return;
    }
    run.isCopied = (high & HIGH_COPIED) !== 0;
    run.hostOffset = entryHostOffset(high, low);
    if (low & LOW_ZERO) {
      if (this.version < 3) {
        throw formatError(this.name, `L2 entry ${index} has the zero flag, which version 2 has not`);
      }
      run.kind = run.hostOffset === 0 ? ClusterKind.ZeroPlain : ClusterKind.ZeroAllocated;
    } else {
      const isPlaced = run.hostOffset !== 0 || (this.isInDataFile && run.isCopied);
      run.kind = isPlaced ? ClusterKind.Normal : ClusterKind.Unallocated;
    }
    this.checkHost(high, low, index, run);
  }

  protected checkHost(high: number, low: number, index: number, run: ClusterRun): void {
    if (low & LOW_OFFSET_MASK & this.lowAlignmentMask) {
      throw formatError(this.name, `L2 entry ${index} points to no cluster boundary`, run.hostOffset);
    }
    if (high & HIGH_OFFSET_UNSAFE) throw hostOffsetLimit(this.name);
  }

  /**
   * Checks the places that a table of an image with an external data file names: each must be the guest's own, and
   * nothing can be compressed. `firstCluster` is the table's first guest cluster.
   * @throws CowcatcherError FORMAT
   */
  checkPlaces(view: DataView, firstCluster: number): void {
    for (let index = 0; index < this.entriesPerTable; index++) {
      const high = view.getUint32(index * this.entryBytes);
      if (high & HIGH_COMPRESSED) {
        throw formatError(this.name, `L2 entry ${index} is compressed, which a data file cannot hold`);
      }
      const low = view.getUint32(index * this.entryBytes + 4);
      const hostOffset = entryHostOffset(high, low);
      const guestOffset = (firstCluster + index) * this.clusterSizeBytes;
      // With COPIED, 0 is a place; not under a zero flag, which extended entries have not (see decode).
      const hasZeroFlag = this.unitsPerCluster === 1 && (low & LOW_ZERO) !== 0;
      const isPlaced = hostOffset !== 0 || ((high & HIGH_COPIED) !== 0 && !hasZeroFlag);
      if (isPlaced && hostOffset !== guestOffset) {
        throw formatError(
          this.name,
          `L2 entry ${index} places the guest's offset ${guestOffset} elsewhere in the data file`,
          hostOffset,
        );
      }
    }
  }

  isCompressedAt(view: DataView, index: number): boolean {
    return (view.getUint32(index * this.entryBytes) & HIGH_COMPRESSED) !== 0;
  }

  protected decodeCompressed(high: number, low: number, run: ClusterRun): void {
    const offset = (high & this.compressedHighMask) * WORD + low;
    if (!Number.isSafeInteger(offset)) throw hostOffsetLimit(this.name);
    const extraSectors = (high & 0x3fffffff) >>> this.compressedHighBits;
    run.kind = ClusterKind.Compressed;
    run.isCopied = false;
    run.hostOffset = offset;
    run.compressedBytes = (extraSectors + 1) * SECTOR - (offset % SECTOR);
  }
}

function hostOffsetLimit(name: string): CowcatcherError {
  return new CowcatcherError({
    code: "LIMIT",
    object: name,
    problem: "a host offset is outside the limit: 2^53",
  });
}
