// The guest's mapping: L1 in memory, L2 tables in a bounded cache, and what a change to either needs.
//
// Waiting. A look-up either succeeds at once or leaves a promise in `wait`; the caller awaits it and looks again.
// So the common case allocates nothing and the other needs no second code path.
//
// Copy on write of tables. An L2 table is changed in place only if it is the active image's alone: its L1 entry has
// the COPIED flag (else an internal snapshot shares it). A table is also moved, when it is next written, if it still
// stands where a frozen L1 table (freeze, below) says: workers read T0's tables from the file, and must find them
// as they were.
//
// Main thread only.

import type { Completion } from "../../../block/device.js";
import { MiB } from "../../../units.js";
import { CachedTable, TableCache } from "../format/cached-table.js";
import { ALL_UNITS, type EntryDecoder, HIGH_COPIED, LOW_ZERO, highWord } from "../format/entry.js";
import { EntryTable } from "../format/entry-table.js";
import { decoderFor, storeBitmap } from "../format/extended-entry.js";
import type { QcowFile } from "../format/file.js";
import { FreeQueue, REGION_NUMBERS } from "./frees.js";
import { type Qcow2Header, hasExternalDataFile, isExtendedL2 } from "../format/header.js";
import { DataFileSpace, type HostSpace, ImageSpace } from "./host-space.js";
import { assertNothingLost } from "./lost-clusters.js";
import { type GuardedMetadata, MetadataGuard } from "./metadata-guard.js";
import type { SnapshotTable } from "../format/snapshots.js";
import { assertStored } from "../format/stored.js";
import { Refcounts, type ReservedRange } from "./refcounts.js";
import { Unmapper } from "./unmapper.js";

/** Bound of the L2 cache in bytes: 256 GiB of guest disk with clusters of 64 KiB. */
export const L2_CACHE_BYTES = 32 * MiB;
/** Fewer would not do for one request and a flush at a time. */
const L2_CACHE_MIN_TABLES = 16;
/** With tiny clusters the overhead of a table would outweigh its content. */
const L2_CACHE_MAX_TABLES = 16384;
/** 64 PB, of which numbers here allow 2^53. */
export const L1_HIGH_MASK = 0x00ffffff;

export interface FrozenTables {
  l1: EntryTable;
  /** L1 indexes of the tables that were handed over in memory. */
  handedOver: ReadonlySet<number>;
}

export class Mapping {
  readonly decoder: EntryDecoder;
  readonly l1: EntryTable;
  readonly l2: TableCache;
  readonly refcounts: Refcounts;
  readonly frees = new FreeQueue();
  /** Of the guest's clusters; tables are always allocated in the image file, by `refcounts`. */
  readonly space: HostSpace;
  readonly clusterSizeBytes: number;
  readonly entriesPerTable: number;
  /** What shares its state, in bytes: a cluster, or a subcluster (entry.ts). */
  readonly unitSizeBytes: number;
  readonly unitsPerTable: number;
  readonly hasSubclusters: boolean;
  /** Guest bytes that one L2 table maps. */
  readonly bytesPerTable: number;
  /** Set where a look-up returned null because it has to wait. */
  wait: Promise<void> | undefined;
  readonly frozen = new Set<FrozenTables>();
  /** Called when dirty tables crowd the caches: starts a flush; what it returns must be awaited if `mustWait`. */
  relieve: (mustWait: boolean) => Completion = () => undefined;

  /** Told whenever host clusters have been freed. */
  whenFreed: () => void = () => undefined;
  readonly unmapper: Unmapper;

  private readonly loading = new Map<number, Promise<void>>();
  /** What stands still as long as the image is open. */
  private readonly fixedMetadata: ReservedRange[] = [];
  private guard: MetadataGuard | undefined;

  constructor(
    header: Qcow2Header,
    private readonly file: QcowFile,
    dataFile: QcowFile = file,
  ) {
    const { clusterBits, version } = header;
    const isInDataFile = hasExternalDataFile(header);
    const geometry = { clusterBits, version, isInDataFile, isExtendedL2: isExtendedL2(header) };
    this.decoder = decoderFor(geometry, file.name);
    this.unitSizeBytes = this.decoder.unitSizeBytes;
    this.unitsPerTable = this.decoder.unitsPerTable;
    this.hasSubclusters = geometry.isExtendedL2;
    this.clusterSizeBytes = this.decoder.clusterSizeBytes;
    this.entriesPerTable = this.decoder.entriesPerTable;
    this.bytesPerTable = this.clusterSizeBytes * this.entriesPerTable;
    const bytes = new Uint8Array(header.l1Size * 8);
    assertStored(file, "the L1 table", header.l1TableOffset, bytes.length);
    file.readSync(bytes, 0, bytes.length, header.l1TableOffset);
    this.l1 = EntryTable.fromBytes(bytes, header.l1TableOffset);
    this.l1.checkOffsets(this.clusterSizeBytes, L1_HIGH_MASK, "L1 table", file.name);
    const tables = Math.floor(L2_CACHE_BYTES / this.clusterSizeBytes);
    this.l2 = new TableCache(Math.min(L2_CACHE_MAX_TABLES, Math.max(L2_CACHE_MIN_TABLES, tables)));
    const reserved = this.fixedMetadata;
    reserved.push(
      { what: "the header", offsetBytes: 0, lengthBytes: this.clusterSizeBytes },
      { what: "the L1 table", offsetBytes: header.l1TableOffset, lengthBytes: bytes.length },
    );
    this.refcounts = new Refcounts(
      header,
      file,
      () => reserved,
      (offsetBytes) => this.guard?.overlapAt(offsetBytes),
    );
    this.unmapper = new Unmapper(file, this.refcounts, this.clusterSizeBytes, () => this.whenFreed());
    this.space = isInDataFile
      ? new DataFileSpace(dataFile, this.clusterSizeBytes)
      : new ImageSpace(this.refcounts, this.frees, this.clusterSizeBytes);
  }

  /** From now on no L2 table is used that lets the guest write over metadata: for an image that may be written. */
  guardMetadata(
    header: Qcow2Header,
    { entries, lengthBytes: snapshotBytes }: SnapshotTable,
    hasBitmaps: boolean,
  ): void {
    this.refcounts.assertStored();
    if (!this.file.isBlockDevice && !hasExternalDataFile(header)) {
      assertNothingLost(this.file, this.refcounts, this.decoder, [header, ...entries]);
    }
    const { fixedMetadata } = this;
    const addFixed = (what: string, offsetBytes: number, lengthBytes: number): void => {
      if (lengthBytes > 0) fixedMetadata.push({ what, offsetBytes, lengthBytes });
    };
    addFixed("the snapshot table", header.snapshotsOffset, snapshotBytes);
    for (const { l1TableOffset, l1Size, name } of entries) {
      addFixed(`the L1 table of snapshot '${name}'`, l1TableOffset, l1Size * 8);
    }
    const { bitmaps } = header;
    // Another program may have freed those that were out of date, and their clusters may be in use for something else.
    if (hasBitmaps && bitmaps !== null)
      addFixed("the bitmap directory", bitmaps.directoryOffset, bitmaps.directoryBytes);
    const { file, clusterSizeBytes, l1, refcounts, fixedMetadata: fixed } = this;
    const metadata = (): GuardedMetadata => ({ l1, refcountTable: refcounts.table, fixed });
    this.guard = new MetadataGuard(file.name, clusterSizeBytes, file.endOffset, metadata);
  }

  takeWait(): Promise<void> | undefined {
    const { wait } = this;
    this.wait = undefined;
    return wait;
  }

  /** The L2 table for reading; null where there is none, or (with `wait` set) not yet. */
  tableFor(l1Index: number): CachedTable | null {
    const cached = this.l2.get(l1Index);
    if (cached !== undefined) return cached;
    const offset = this.l1.offsetAt(l1Index, L1_HIGH_MASK);
    return offset === 0 ? null : this.load(l1Index, offset);
  }

  /** The L2 table for changing, made or copied if need be; null (with `wait` set) where the caller must wait. */
  writableTable(l1Index: number): CachedTable | null {
    if (this.isCrowded()) {
      this.wait = this.relieve(this.l2.dirtyCount >= this.l2.capacity * 0.75);
      if (this.wait !== undefined) return null;
    }
    if (this.l1.offsetAt(l1Index, L1_HIGH_MASK) === 0) return this.createTable(l1Index);
    const table = this.tableFor(l1Index);
    if (table !== null && (this.l1.highWordAt(l1Index) & HIGH_COPIED) === 0) this.move(table);
    return table;
  }

  private isCrowded(): boolean {
    return this.l2.dirtyCount >= this.l2.capacity / 2 || this.refcounts.isCrowded;
  }

  /** The cluster stands at hostOffset. The units in `writtenUnits` hold data there, the others are as they were. */
  setNormal(table: CachedTable, index: number, hostOffset: number, writtenUnits = ALL_UNITS): void {
    const at = this.willSet(table, index);
    if (this.hasSubclusters) {
      const wasCompressed = this.decoder.isCompressedAt(table.view, index);
      const zeroBits = wasCompressed ? 0 : table.view.getUint32(at + 8);
      const allocatedBits = wasCompressed ? 0 : table.view.getUint32(at + 12);
      storeBitmap(table.view, index, allocatedBits | writtenUnits, zeroBits & ~writtenUnits);
    }
    table.view.setUint32(at, (highWord(hostOffset) | HIGH_COPIED) >>> 0);
    table.view.setUint32(at + 4, (hostOffset % 2 ** 32) >>> 0);
  }

  /** The whole cluster reads as zeroes and has no host cluster; without `isFlagged` it is merely unallocated. */
  setZeroPlain(table: CachedTable, index: number, isFlagged: boolean): void {
    const at = this.willSet(table, index);
    table.view.setUint32(at, 0);
    table.view.setUint32(at + 4, isFlagged && !this.hasSubclusters ? LOW_ZERO : 0);
    if (this.hasSubclusters) storeBitmap(table.view, index, 0, ALL_UNITS);
  }

  /** Units of a cluster that is not compressed read as zeroes; where it stands is not changed. */
  setZeroUnits(table: CachedTable, index: number, units: number): void {
    const at = this.willSet(table, index);
    if (this.hasSubclusters) {
      const zeroBits = table.view.getUint32(at + 8) | units;
      storeBitmap(table.view, index, table.view.getUint32(at + 12) & ~units, zeroBits);
    } else {
      table.view.setUint32(at + 4, (table.view.getUint32(at + 4) | LOW_ZERO) >>> 0);
    }
  }

  /** @returns where in the table the entry begins */
  private willSet(table: CachedTable, index: number): number {
    const { entryBytes } = this.decoder;
    const at = index * entryBytes;
    this.l2.willChange(table, at, at + entryBytes);
    return at;
  }

  private createTable(l1Index: number): CachedTable {
    const offset = this.refcounts.allocate(1);
    const table = new CachedTable(l1Index, offset, new Uint8Array(this.clusterSizeBytes));
    this.l2.put(table);
    this.l2.willChange(table, 0, this.clusterSizeBytes);
    this.l1.set(l1Index, offset, HIGH_COPIED);
    return table;
  }

  /** Gives the table a place of its own; the old one loses a reference. */
  private move(table: CachedTable): void {
    const oldOffset = table.offsetBytes;
    table.offsetBytes = this.refcounts.allocate(1);
    this.l2.willChange(table, 0, this.clusterSizeBytes);
    this.l1.set(table.index, table.offsetBytes, HIGH_COPIED);
    this.frees.dropReadable(oldOffset, this.clusterSizeBytes);
  }

  private load(l1Index: number, offset: number): CachedTable | null {
    const pending = this.loading.get(l1Index);
    if (pending !== undefined) {
      this.wait = pending;
      return null;
    }
    const bytes = new Uint8Array(this.clusterSizeBytes);
    assertStored(this.file, "an L2 table", offset, bytes.length);
    const completion = this.file.read(bytes, 0, bytes.length, offset);
    if (completion === undefined) return this.keepLoaded(l1Index, offset, bytes);
    this.wait = this.finishLoading(completion, l1Index, offset, bytes);
    this.loading.set(l1Index, this.wait);
    return null;
  }

  private keepLoaded(l1Index: number, offset: number, bytes: Uint8Array): CachedTable {
    const table = new CachedTable(l1Index, offset, bytes);
    if (this.decoder.isInDataFile) this.decoder.checkPlaces(table.view, l1Index * this.entriesPerTable);
    else this.guard?.checkTable(table.view, this.decoder.entryBytes, offset);
    this.l2.put(table);
    return table;
  }

  private async finishLoading(
    completion: Promise<void>,
    l1Index: number,
    offset: number,
    bytes: Uint8Array,
  ): Promise<void> {
    try {
      await completion;
      this.keepLoaded(l1Index, offset, bytes);
    } finally {
      this.loading.delete(l1Index);
    }
  }

  /** Moves every changed table that still stands where T0's is. The flush calls this before it takes stock. */
  moveFrozenTables(): void {
    if (this.frozen.size === 0) return;
    for (const table of this.l2.dirtyTables()) {
      for (const { l1, handedOver } of this.frozen) {
        const isT0Place = l1.offsetAt(table.index, L1_HIGH_MASK) === table.offsetBytes;
        if (!isT0Place || handedOver.has(table.index)) continue;
        this.move(table);
        break;
      }
    }
  }

  /** Takes settled frees into account as far as the refcounts' bound allows. @returns whether there were any. */
  applyFrees(): boolean {
    let any = this.unmapper.hasWork;
    while (!this.refcounts.isCrowded) {
      const regions = this.frees.takeReady();
      if (regions === undefined) break;
      any = true;
      let next = 0;
      while (next < regions.length && !this.refcounts.isCrowded) {
        const [offsetBytes = 0, lengthBytes = 0, isUnmapped = 0] = regions.slice(next, next + REGION_NUMBERS);
        const isTaken = isUnmapped !== 0 && this.unmapper.take(offsetBytes, lengthBytes);
        if (!isTaken) this.refcounts.dropRegion(offsetBytes, lengthBytes);
        next += REGION_NUMBERS;
      }
      if (next < regions.length) this.frees.putBackReady(regions.slice(next));
    }
    this.unmapper.resume();
    return any;
  }
}
