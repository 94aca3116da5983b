// A worker's view of a qcow2 image at T0.
//
// It reads with T0's L1 table, T0's changed L2 tables (handed over in memory) and, for all others, the tables in the
// file, which the image leaves as they are until the freeze is released (image.ts, invariant 4). Guest clusters that
// have changed since T0 were captured before; their bytes here are of no interest, and the caller does not ask for
// them. So there is no lock, and all but large reads of the main thread is synchronous: a worker has nothing else to do.
//
// L2 tables are kept in a small cache with clock eviction. One thread; the descriptor is the main thread's.

import { toCowcatcherError } from "../../errors.js";
import { MiB } from "../../units.js";
import { POOL_READ_MIN_BYTES } from "../../block/file/fileio.js";
import type { Completion, Qcow2SourceDescription, SourceReader } from "../../block/device.js";
import { CachedTable, TableCache } from "./format/cached-table.js";
import { Decompressor } from "./format/decompress.js";
import { ClusterKind, ClusterRun, type EntryDecoder } from "./format/entry.js";
import { EntryTable } from "./format/entry-table.js";
import { decoderFor } from "./format/extended-entry.js";
import { formatError } from "./format/header.js";
import { DirectQcowFile } from "./format/direct-file.js";
import { BufferedFile, type QcowFile } from "./format/file.js";
import { assertClustersStored, assertStored, compressedBytesStored } from "./format/stored.js";

const L2_CACHE_BYTES = 2 * MiB;
const L2_CACHE_MIN_TABLES = 4;
const L2_CACHE_MAX_TABLES = 1024;
const L1_HIGH_MASK = 0x00ffffff;

export class Qcow2SourceReader implements SourceReader {
  readonly sizeBytes: number;
  private readonly decoder: EntryDecoder;
  private readonly l1: EntryTable;
  private readonly tables: TableCache;
  private readonly handedOver = new Map<number, number>();
  private readonly file: QcowFile;
  private readonly dataFile: QcowFile;
  private readonly run = new ClusterRun();
  private readonly decompressor: Decompressor;
  private decompressed: Uint8Array | undefined;
  private decompressedFrom = -1;
  private input: Uint8Array | undefined;

  /**
   * @param backing the reader of the description's backing image; it is closed with this one
   * @param fromPool as openSource's
   */
  constructor(
    private readonly description: Qcow2SourceDescription,
    private readonly backing: SourceReader | null,
    private readonly fromPool = false,
  ) {
    const {
      name,
      fd,
      dataFd,
      endOffset,
      dataEndOffset,
      direct,
      version,
      clusterBits,
      isExtendedL2,
      sizeBytes,
    } = description;
    this.sizeBytes = sizeBytes;
    const isInDataFile = dataFd !== fd;
    this.decoder = decoderFor({ clusterBits, version, isExtendedL2, isInDataFile }, name);
    this.l1 = new EntryTable(new Uint32Array(description.l1Table), 0);
    const tables = Math.floor(L2_CACHE_BYTES / this.decoder.clusterSizeBytes);
    this.tables = new TableCache(Math.min(L2_CACHE_MAX_TABLES, Math.max(L2_CACHE_MIN_TABLES, tables)));
    description.dirtyL2Index.forEach((l1Index, position) => this.handedOver.set(l1Index, position));
    this.file = openFile(fd, name, direct, endOffset);
    this.dataFile = isInDataFile ? openFile(dataFd, description.dataName, direct, dataEndOffset) : this.file;
    this.decompressor = new Decompressor(description.compressionType, name);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    let done = 0;
    try {
      while (done < lengthBytes) {
        const at = bufferOffset + done;
        const count = this.mapRun(offsetBytes + done, lengthBytes - done);
        const completion = this.readRun(buffer, at, count, offsetBytes + done);
        done += count;
        if (completion !== undefined) {
          return this.readOn(completion, buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
        }
      }
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, this.description.name));
    }
  }

  private async readOn(
    completion: Promise<void>,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    await completion;
    if (lengthBytes > 0) await this.read(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  extent(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean } {
    let count = 0;
    let isZero = true;
    while (count < lengthBytes) {
      const next = this.extentAt(offsetBytes + count, lengthBytes - count);
      if (count > 0 && next.zero !== isZero) break;
      isZero = next.zero;
      count += next.lengthBytes;
    }
    return { lengthBytes: count, zero: isZero };
  }

  allocation(offsetBytes: number, lengthBytes: number): { lengthBytes: number; allocated: boolean } {
    let count = 0;
    let allocated = true;
    while (count < lengthBytes) {
      const runBytes = this.mapRun(offsetBytes + count, lengthBytes - count);
      const { kind } = this.run;
      const isAllocated = kind !== ClusterKind.Unallocated && kind !== ClusterKind.UnallocatedHosted;
      if (count > 0 && isAllocated !== allocated) break;
      allocated = isAllocated;
      count += runBytes;
    }
    return { lengthBytes: count, allocated };
  }

  close(): void {
    this.decompressor.close();
    this.backing?.close();
  }

  /** The first piece of an extent: one run of one table, or empty L1 entries in a row. */
  private extentAt(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean } {
    const count = this.mapRun(offsetBytes, lengthBytes);
    switch (this.run.kind) {
      case ClusterKind.ZeroPlain:
      case ClusterKind.ZeroAllocated:
        return { lengthBytes: count, zero: true };
      case ClusterKind.Unallocated:
      case ClusterKind.UnallocatedHosted: {
        const stored = this.backing === null ? 0 : this.backing.sizeBytes - offsetBytes;
        if (this.backing === null || stored <= 0) return { lengthBytes: count, zero: true };
        return this.backing.extent(offsetBytes, Math.min(count, stored));
      }
      case ClusterKind.Normal:
      case ClusterKind.Compressed:
        return { lengthBytes: count, zero: false };
    }
  }

  /** Sets `run` for offsetBytes; returns the bytes of [offsetBytes, +lengthBytes) that belong to it. */
  private mapRun(offsetBytes: number, lengthBytes: number): number {
    const { run, decoder } = this;
    const { unitSizeBytes, unitsPerTable } = decoder;
    const unit = Math.floor(offsetBytes / unitSizeBytes);
    const l1Index = Math.floor(unit / unitsPerTable);
    const table = this.tableFor(l1Index);
    if (table === null) {
      run.kind = ClusterKind.Unallocated;
      const bytesPerTable = unitSizeBytes * unitsPerTable;
      const wantedEnd = Math.ceil((offsetBytes + lengthBytes) / bytesPerTable);
      let end = l1Index + 1;
      while (end < wantedEnd && this.l1.offsetAt(end, L1_HIGH_MASK) === 0) end++;
      return Math.min(lengthBytes, end * bytesPerTable - offsetBytes);
    }
    const inUnit = offsetBytes - unit * unitSizeBytes;
    const maxUnits = Math.ceil((inUnit + lengthBytes) / unitSizeBytes);
    decoder.scan(table.view, unit - l1Index * unitsPerTable, maxUnits, run);
    return Math.min(lengthBytes, run.unitCount * unitSizeBytes - inUnit);
  }

  private readRun(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Completion {
    const { run } = this;
    const { unitSizeBytes, clusterSizeBytes } = this.decoder;
    switch (run.kind) {
      case ClusterKind.Normal: {
        const hostOffset = run.hostOffset + (offsetBytes % unitSizeBytes);
        assertClustersStored(this.dataFile, clusterSizeBytes, hostOffset, lengthBytes);
        if (this.fromPool && lengthBytes >= POOL_READ_MIN_BYTES && this.dataFile.readInPool !== undefined)
          return this.dataFile.readInPool(buffer, bufferOffset, lengthBytes, hostOffset);
        this.dataFile.readSync(buffer, bufferOffset, lengthBytes, hostOffset);
        return undefined;
      }
      case ClusterKind.ZeroPlain:
      case ClusterKind.ZeroAllocated:
        buffer.fill(0, bufferOffset, bufferOffset + lengthBytes);
        return undefined;
      case ClusterKind.Compressed:
        this.readCompressed(buffer, bufferOffset, lengthBytes, offsetBytes % clusterSizeBytes);
        return undefined;
      case ClusterKind.Unallocated:
      case ClusterKind.UnallocatedHosted: {
        const { backing } = this;
        const stored =
          backing === null ? 0 : Math.min(lengthBytes, Math.max(0, backing.sizeBytes - offsetBytes));
        buffer.fill(0, bufferOffset + stored, bufferOffset + lengthBytes);
        return stored > 0 ? backing?.read(buffer, bufferOffset, stored, offsetBytes) : undefined;
      }
    }
  }

  private readCompressed(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    inCluster: number,
  ): void {
    const { hostOffset, compressedBytes } = this.run;
    const { clusterSizeBytes } = this.decoder;
    this.decompressed ??= new Uint8Array(clusterSizeBytes);
    this.input ??= new Uint8Array(2 * clusterSizeBytes + 512);
    if (this.decompressedFrom !== hostOffset) {
      this.decompressedFrom = -1;
      // What the file's end cuts off is not made up for: zeroes might be taken for data.
      const storedBytes = compressedBytesStored(this.file, hostOffset, compressedBytes);
      this.file.readSync(this.input, 0, storedBytes, hostOffset);
      this.decompressor.run(this.input.subarray(0, storedBytes), this.decompressed, hostOffset);
      this.decompressedFrom = hostOffset;
    }
    buffer.set(this.decompressed.subarray(inCluster, inCluster + lengthBytes), bufferOffset);
  }

  private tableFor(l1Index: number): CachedTable | null {
    const cached = this.tables.get(l1Index);
    if (cached !== undefined) return cached;
    const { clusterSizeBytes } = this.decoder;
    const position = this.handedOver.get(l1Index);
    if (position !== undefined) {
      const bytes = new Uint8Array(
        this.description.dirtyL2Tables,
        position * clusterSizeBytes,
        clusterSizeBytes,
      );
      return this.keep(new CachedTable(l1Index, 0, bytes));
    }
    if (l1Index >= this.l1.length) {
      throw formatError(this.description.name, `the L1 table has no entry ${l1Index}`);
    }
    const offset = this.l1.offsetAt(l1Index, L1_HIGH_MASK);
    if (offset === 0) return null;
    const bytes = new Uint8Array(clusterSizeBytes);
    assertStored(this.file, "an L2 table", offset, clusterSizeBytes);
    this.file.readSync(bytes, 0, clusterSizeBytes, offset);
    return this.keep(new CachedTable(l1Index, offset, bytes));
  }

  private keep(table: CachedTable): CachedTable {
    const { decoder } = this;
    if (decoder.isInDataFile) decoder.checkPlaces(table.view, table.index * decoder.entriesPerTable);
    this.tables.put(table);
    return table;
  }
}

function openFile(fd: number, name: string, direct: boolean, endOffset: number): QcowFile {
  return direct ? new DirectQcowFile(fd, name, endOffset) : new BufferedFile(fd, name, endOffset);
}
