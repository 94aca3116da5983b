// L2 entries: what the 64 bits of one say, and how far a run of like entries goes.
//
// Entries are handled as two 32-bit words (high, low), never as bigints: they are decoded on the guest's path, by
// the image (main thread) and by readers (workers) alike. A ClusterRun is filled in place, so a look-up allocates
// nothing. Specification: qcow2, "Cluster mapping".

import { CowcatcherError } from "../../errors.js";
import { formatError } from "./header.js";

export const enum ClusterKind {
  Unallocated,
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

export class ClusterRun {
  kind: ClusterKind = ClusterKind.Unallocated;
  /** The host cluster's refcount is exactly one: it may be written in place. */
  isCopied = false;
  /** Of the first cluster; 0 where there is none. For a compressed cluster the byte at which its data starts. */
  hostOffset = 0;
  clusterCount = 0;
  /** Compressed clusters: bytes from hostOffset to the end of the last sector. */
  compressedBytes = 0;
}

export function entryHostOffset(high: number, low: number): number {
  return (high & HIGH_OFFSET_MASK) * WORD + ((low & LOW_OFFSET_MASK) >>> 0);
}

export function highWord(value: number): number {
  return Math.floor(value / WORD);
}

/** What decodes entries of one image: its geometry, and its name for errors. */
export class EntryDecoder {
  readonly clusterSizeBytes: number;
  readonly entriesPerTable: number;
  private readonly compressedHighBits: number;
  private readonly compressedHighMask: number;
  private readonly lowAlignmentMask: number;

  constructor(
    readonly clusterBits: number,
    readonly version: 2 | 3,
    readonly name: string,
  ) {
    this.clusterSizeBytes = 2 ** clusterBits;
    this.entriesPerTable = this.clusterSizeBytes / 8;
    this.compressedHighBits = 62 - (clusterBits - 8) - 32;
    this.compressedHighMask = 2 ** this.compressedHighBits - 1;
    this.lowAlignmentMask = this.clusterSizeBytes - 1;
  }

  /**
   * Describes the run that starts at entry `index`: the longest stretch of at most `maxClusters` entries of one
   * kind, within one table, whose host clusters (where they have any) follow one another.
   * @throws CowcatcherError FORMAT where an entry breaks the specification.
   */
  scan(view: DataView, index: number, maxClusters: number, run: ClusterRun): void {
    const high = view.getUint32(index * 8);
    const low = view.getUint32(index * 8 + 4);
    this.decode(high, low, index, run);
    const end = Math.min(index + maxClusters, this.entriesPerTable);
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
    run.clusterCount = next - index;
  }

  decode(high: number, low: number, index: number, run: ClusterRun): void {
    run.clusterCount = 1;
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
      run.kind = run.hostOffset === 0 ? ClusterKind.Unallocated : ClusterKind.Normal;
    }
    if (low & LOW_OFFSET_MASK & this.lowAlignmentMask) {
      throw formatError(this.name, `L2 entry ${index} points to no cluster boundary`, run.hostOffset);
    }
    if (high & HIGH_OFFSET_UNSAFE) throw hostOffsetLimit(this.name);
  }

  private decodeCompressed(high: number, low: number, run: ClusterRun): void {
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
