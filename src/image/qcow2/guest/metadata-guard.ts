// No guest write may reach the image's own metadata.
//
// In a broken or hostile image an L2 entry with the COPIED flag may point to a cluster that holds a table: a guest
// write would go there in place, and guest data would be taken for metadata. QEMU looks at each write for that; here
// each L2 table is looked at once, when it is loaded into an image that may be written, so that writes cost nothing.
// A table with such an entry is refused as a whole, for reads too: what it says is not to be trusted.
//
// A bit for each host cluster of the file says whether it held metadata when the guard was built: the L1 table, the L2
// tables, the refcount table and its blocks, the snapshot table, the snapshots' own L1 tables, the bitmap directory: as
// far as QEMU looks by default (overlap-check=cached). A bit that is set is only a suspicion, since tables
// move and their clusters are used again; then the tables of the moment are asked, and the bit is dropped if they know
// nothing of it. Not seen: L2
// tables that snapshots alone refer to and bitmaps' tables and data, as with QEMU, and entries that point to a cluster
// which the refcounts call free and which a new table takes.
//
// Main thread only.

import { CowcatcherError } from "../../../errors.js";
import type { EntryTable } from "../format/entry-table.js";

/** 2^28 host clusters: 32 MiB of bits, 16 TiB of file with clusters of 64 KiB. Further out nothing is guarded. */
const MAX_GUARDED_CLUSTERS = 2 ** 28;
const COPIED_HIGH = 0x80000000;
const COMPRESSED_HIGH = 0x40000000;
const OFFSET_HIGH = 0x00ffffff;
const BLOCK_OFFSET_HIGH = 0x7fffffff;
const OFFSET_LOW = 0xfffffe00;
const WORD = 2 ** 32;

export interface GuardedMetadata {
  readonly l1: EntryTable;
  readonly refcountTable: EntryTable;
  /** What stands still: header, L1 tables, snapshot table, bitmap directory. */
  readonly fixed: readonly { what: string; offsetBytes: number; lengthBytes: number }[];
}

export class MetadataGuard {
  private readonly bits: Uint8Array;
  private readonly clusterCount: number;

  /** @param metadata tells the tables as they are at the moment of the call. */
  constructor(
    private readonly name: string,
    private readonly clusterSizeBytes: number,
    fileBytes: number,
    private readonly metadata: () => GuardedMetadata,
  ) {
    this.clusterCount = Math.min(Math.ceil(fileBytes / clusterSizeBytes), MAX_GUARDED_CLUSTERS);
    this.bits = new Uint8Array(Math.ceil(this.clusterCount / 8));
    const { l1, refcountTable, fixed } = metadata();
    for (const { offsetBytes, lengthBytes } of fixed) this.mark(offsetBytes, lengthBytes);
    this.mark(refcountTable.offsetBytes, refcountTable.lengthBytes);
    for (let index = 0; index < l1.length; index++) this.markTable(l1.offsetAt(index, OFFSET_HIGH));
    for (let index = 0; index < refcountTable.length; index++) {
      this.markTable(refcountTable.offsetAt(index, BLOCK_OFFSET_HIGH));
    }
  }

  private markTable(offsetBytes: number): void {
    if (offsetBytes !== 0) this.mark(offsetBytes, this.clusterSizeBytes);
  }

  private mark(offsetBytes: number, lengthBytes: number): void {
    const end = Math.min(Math.ceil((offsetBytes + lengthBytes) / this.clusterSizeBytes), this.clusterCount);
    for (let cluster = Math.floor(offsetBytes / this.clusterSizeBytes); cluster < end; cluster++) {
      this.bits[cluster >>> 3] = (this.bits[cluster >>> 3] ?? 0) | (1 << (cluster & 7));
    }
  }

  /** @throws CowcatcherError FORMAT where an entry of the L2 table lets the guest write over metadata */
  checkTable(view: DataView, entryBytes: number, l2Offset: number): void {
    for (let at = 0; at < view.byteLength; at += entryBytes) {
      const high = view.getUint32(at);
      if ((high & COPIED_HIGH) === 0 || (high & COMPRESSED_HIGH) !== 0) continue;
      const hostOffset = (high & OFFSET_HIGH) * WORD + ((view.getUint32(at + 4) & OFFSET_LOW) >>> 0);
      const cluster = hostOffset / this.clusterSizeBytes;
      // One at no cluster boundary is refused when it is used.
      if (cluster >= this.clusterCount || hostOffset === 0 || !Number.isInteger(cluster)) continue;
      const what = this.overlapAt(hostOffset);
      if (what !== undefined) throw this.overlapError(what, l2Offset + at);
    }
  }

  /** What of the image's metadata stands in this host cluster. A bit that nothing bears out is dropped. */
  overlapAt(hostOffset: number): string | undefined {
    const cluster = hostOffset / this.clusterSizeBytes;
    if (cluster >= this.clusterCount) return undefined;
    const bit = 1 << (cluster & 7);
    if (((this.bits[cluster >>> 3] ?? 0) & bit) === 0) return undefined;
    const what = this.metadataAt(hostOffset);
    if (what === undefined) this.bits[cluster >>> 3] = (this.bits[cluster >>> 3] ?? 0) & ~bit;
    return what;
  }

  /** What stands in the cluster now. */
  private metadataAt(hostOffset: number): string | undefined {
    const { l1, refcountTable, fixed } = this.metadata();
    const end = hostOffset + this.clusterSizeBytes;
    const isIn = (offsetBytes: number, lengthBytes: number): boolean =>
      offsetBytes < end && hostOffset < offsetBytes + lengthBytes;
    for (const { what, offsetBytes, lengthBytes } of fixed) if (isIn(offsetBytes, lengthBytes)) return what;
    if (isIn(refcountTable.offsetBytes, refcountTable.lengthBytes)) return "the refcount table";
    for (let index = 0; index < refcountTable.length; index++) {
      if (refcountTable.offsetAt(index, BLOCK_OFFSET_HIGH) === hostOffset) return "a refcount block";
    }
    for (let index = 0; index < l1.length; index++) {
      if (l1.offsetAt(index, OFFSET_HIGH) === hostOffset) return "an L2 table";
    }
    return undefined;
  }

  private overlapError(what: string, entryOffset: number): CowcatcherError {
    return new CowcatcherError({
      code: "FORMAT",
      object: this.name,
      problem: `an L2 entry would let the guest write over ${what}`,
      hint: "repair the image with cowcatcher check --repair all, or open it read-only",
      offsetBytes: entryOffset,
    });
  }
}
