// Write-back of metadata, in the order that keeps the file consistent whatever the moment of a crash:
//
//   refcount blocks ─► [sync ─► refcount table ─► [sync ─► header]] ─► sync ─► L2 tables ─► [sync ─► L1] ─► sync
//
// (in brackets: only if changed). The first sync before the L2 tables also makes the guest data durable that they
// point to; an external data file is synced just before it. A flush writes the state of the instant at which it began;
// what changes meanwhile is the next flush's.
//
// One flush runs at a time. Callers that come while one runs share the next: theirs must begin after their writes.
// If any step fails, everything that the flush took is dirty again, and the error goes to its callers.

import { setImmediate as nextTurn } from "node:timers/promises";
import { MiB } from "../../../units.js";
import type { Completion } from "../../../block/device.js";
import type { LentTable } from "../format/cached-table.js";
import type { TablePiece } from "../format/entry-table.js";
import type { QcowFile } from "../format/file.js";
import { FIELD_OFFSET } from "../format/header.js";
import type { Mapping } from "./mapping.js";

/** Bytes written synchronously before other work gets its turn. */
const YIELD_BYTES = 1 * MiB;

interface Stock {
  blocks: LentTable[];
  refcountPieces: TablePiece[];
  outgrown: { offsetBytes: number; lengthBytes: number }[];
  refcountTable: { offsetBytes: number; clusters: number };
  l2: LentTable[];
  l1Pieces: TablePiece[];
  dropped: number[];
}

export class Flusher {
  /** Guest data was written since the last sync began. */
  hasUnsyncedData = false;
  private running: Promise<void> | undefined;
  private next: Promise<void> | undefined;

  constructor(
    private readonly mapping: Mapping,
    private readonly file: QcowFile,
    private readonly onFreed: () => void,
    /** Holds the guest's clusters; the same file, or an external data file. */
    private readonly dataFile: QcowFile = file,
  ) {
    mapping.whenFreed = onFreed;
  }

  flush(): Completion {
    if (this.running === undefined) return this.isDirty ? this.start() : undefined;
    this.next ??= this.running.catch(() => undefined).then(() => this.startNext());
    return this.next;
  }

  /** Starts a flush in the background unless one runs; returns it if the caller has to wait for room. */
  relieve(mustWait: boolean): Completion {
    if (mustWait) return this.flush();
    if (this.running === undefined) this.flush()?.catch(() => undefined); // the tables stay dirty: reported later
    return undefined;
  }

  get isDirty(): boolean {
    return this.hasUnsyncedData || this.isMetadataDirty;
  }

  private get isMetadataDirty(): boolean {
    const { l2, l1, refcounts, frees } = this.mapping;
    return l2.dirtyCount > 0 || l1.isDirty || refcounts.isDirty || frees.hasDropped;
  }

  private startNext(): Completion {
    this.next = undefined;
    return this.flush();
  }

  private start(): Promise<void> {
    this.running = this.run().finally(() => {
      this.running = undefined;
    });
    return this.running;
  }

  private async run(): Promise<void> {
    if (!this.isMetadataDirty) {
      this.hasUnsyncedData = false;
      try {
        await this.dataFile.sync();
      } catch (error) {
        this.hasUnsyncedData = true;
        throw error;
      }
      return;
    }
    const { failure } = this.mapping.refcounts;
    if (failure !== undefined) throw failure;
    this.mapping.moveFrozenTables();
    const stock = this.takeStock();
    this.hasUnsyncedData = false;
    try {
      await this.writeRefcounts(stock);
      if (this.dataFile !== this.file) await this.dataFile.sync();
      await this.file.sync();
      await this.writeMapping(stock);
    } catch (error) {
      this.hasUnsyncedData = true;
      this.giveBack(stock);
      throw error;
    }
    this.settle(stock);
  }

  private takeStock(): Stock {
    const { l2, l1, refcounts, frees, clusterSizeBytes } = this.mapping;
    const { outgrown, table } = refcounts;
    refcounts.outgrown = [];
    return {
      blocks: refcounts.blocks.lendDirty(),
      refcountPieces: table.takeDirty(),
      outgrown,
      refcountTable: { offsetBytes: table.offsetBytes, clusters: table.lengthBytes / clusterSizeBytes },
      l2: l2.lendDirty(),
      l1Pieces: l1.takeDirty(),
      dropped: frees.takeDropped(),
    };
  }

  private async writeRefcounts(stock: Stock): Promise<void> {
    await this.writeTables(stock.blocks);
    if (stock.refcountPieces.length === 0) return;
    await this.file.sync();
    await this.writePieces(stock.refcountPieces);
    if (stock.outgrown.length === 0) return;
    await this.file.sync();
    const fields = new Uint8Array(12);
    const view = new DataView(fields.buffer);
    view.setBigUint64(0, BigInt(stock.refcountTable.offsetBytes));
    view.setUint32(8, stock.refcountTable.clusters);
    await this.file.write(fields, 0, fields.length, FIELD_OFFSET.refcountTableOffset);
  }

  private async writeMapping({ l2, l1Pieces }: Stock): Promise<void> {
    if (l2.length === 0 && l1Pieces.length === 0) return;
    await this.writeTables(l2);
    if (l1Pieces.length > 0) {
      await this.file.sync();
      await this.writePieces(l1Pieces);
    }
    await this.file.sync();
  }

  private async writeTables(lent: readonly LentTable[]): Promise<void> {
    let bytesSinceYield = 0;
    for (const { bytes, first, end, offsetBytes } of lent) {
      await this.file.write(bytes, first, end - first, offsetBytes + first);
      bytesSinceYield += end - first;
      if (bytesSinceYield < YIELD_BYTES) continue;
      bytesSinceYield = 0;
      await nextTurn();
    }
  }

  private async writePieces(pieces: readonly TablePiece[]): Promise<void> {
    for (const { bytes, offsetBytes } of pieces) {
      await this.file.write(bytes, 0, bytes.length, offsetBytes);
    }
  }

  private settle(stock: Stock): void {
    const { l2, refcounts, frees } = this.mapping;
    refcounts.blocks.takeBack(stock.blocks, true);
    l2.takeBack(stock.l2, true);
    frees.settle(stock.dropped);
    for (const { offsetBytes, lengthBytes } of stock.outgrown) frees.settle([offsetBytes, lengthBytes, 0]);
    if (this.mapping.applyFrees()) this.onFreed();
  }

  private giveBack(stock: Stock): void {
    const { l2, l1, refcounts, frees } = this.mapping;
    refcounts.blocks.takeBack(stock.blocks, false);
    if (refcounts.table.offsetBytes === stock.refcountTable.offsetBytes) {
      refcounts.table.giveBack(stock.refcountPieces);
    } // else it was outgrown meanwhile, and its successor is written whole
    refcounts.outgrown = [...stock.outgrown, ...refcounts.outgrown];
    l2.takeBack(stock.l2, false);
    l1.giveBack(stock.l1Pieces);
    frees.giveBack(stock.dropped);
  }
}
