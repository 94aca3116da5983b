// A new, empty qcow2 image, version 3, laid out as qemu-img create does it:
//
//     cluster 0          header, extensions, backing file name
//     from cluster 1     refcount table, refcount blocks, L1 table, L2 tables of a raw data file's disk
//
// A data file that is to read as the disk by itself has all of its clusters mapped from the start, so that what is put
// into it otherwise than through the image is seen there.
//
// The refcount blocks must also count themselves and the table that points to them, so their number is found by
// repeating until it no longer grows (each round adds at most a small fraction of the last, so it ends). All that
// exists is counted 1; an L1 table that is all zero is left as a hole.

import { ftruncateSync } from "node:fs";
import { CowcatcherError, ioError } from "../../errors.js";
import { TiB, formatBytes, roundUp } from "../../units.js";
import { writeFullySync } from "../fileio.js";
import type { ImageFormat } from "../format.js";
import { ALL_UNITS, HIGH_COPIED, highWord } from "./entry.js";
import { EXTENDED_ENTRY_BYTES, storeBitmap } from "./extended-entry.js";
import {
  AUTOCLEAR_RAW_EXTERNAL_DATA,
  ENTRY_COPIED,
  INCOMPATIBLE_COMPRESSION_TYPE,
  INCOMPATIBLE_EXTENDED_L2,
  INCOMPATIBLE_EXTERNAL_DATA,
  MAX_CLUSTER_BITS,
  MAX_L1_BYTES,
  MAX_REFCOUNT_ORDER,
  MAX_REFCOUNT_TABLE_BYTES,
  MIN_CLUSTER_BITS,
  MIN_CLUSTER_BITS_EXTENDED_L2,
  type CompressionType,
  type Qcow2Header,
  featureNameTable,
  isExtendedL2,
  l1EntriesFor,
  serialiseHeader,
} from "./header.js";

export const MAX_CREATE_SIZE_BYTES = 64 * TiB;
const SECTOR_BYTES = 512;
const ENTRY_BYTES = 8;

export interface CreateOptions {
  /** Rounded up to a multiple of 512, as qcow2 disks are counted in sectors. At most 64 TiB. */
  sizeBytes: number;
  /** A power of two, 512 bytes to 2 MiB. */
  clusterSizeBytes: number;
  /** 1, 2, 4, 8, 16 (default), 32 or 64. */
  refcountBits?: number | undefined;
  backingFile?: string | undefined;
  backingFormat?: ImageFormat | undefined;
  /** zlib by default. */
  compressionType?: CompressionType | undefined;
  lazyRefcounts?: boolean | undefined;
  /** 128-bit L2 entries with subclusters; clusters of 16 KiB at least. */
  extendedL2?: boolean | undefined;
  /** The name of an external data file, as the header is to hold it. The file itself is the caller's business. */
  dataFile?: string | undefined;
  /** It reads as the disk by itself. */
  dataFileRaw?: boolean | undefined;
}

/** Where things stand in the new image; all offsets in bytes, cluster-aligned. */
export interface Qcow2Layout {
  header: Qcow2Header;
  sizeBytes: number;
  clusterBits: number;
  refcountOrder: number;
  refcountTableOffset: number;
  refcountTableClusters: number;
  refcountBlocksOffset: number;
  refcountBlockCount: number;
  l1TableOffset: number;
  /** Entries. */
  l1Size: number;
  /** L2 tables that exist from the start, behind the L1 table. */
  l2TableCount: number;
  /** End of all metadata: the first free byte. */
  endOffset: number;
}

/**
 * Writes an empty image at the start of `fd`, a new file of size 0 open for writing without O_DIRECT. Blocks its
 * thread, for as long as a few small writes take. Does not sync.
 * @throws CowcatcherError USAGE (sizes), LIMIT, IO or NO_SPACE, naming `name`.
 */
export function createQcow2(fd: number, name: string, options: CreateOptions): Qcow2Layout {
  const layout = planQcow2(name, options);
  const { refcountTableOffset, refcountBlocksOffset, l1TableOffset, endOffset } = layout;
  const headerCluster = serialiseHeader(layout.header, name);
  const write = (bytes: Uint8Array, offsetBytes: number): void =>
    writeFullySync(name, fd, bytes, 0, bytes.length, offsetBytes);
  setLength(fd, name, endOffset);
  write(refcountTable(layout), refcountTableOffset);
  write(refcountBlocks(layout), refcountBlocksOffset);
  if (layout.l2TableCount > 0) {
    write(mappedL1Table(layout), l1TableOffset);
    for (let index = 0; index < layout.l2TableCount; index++) {
      write(mappedL2Table(layout, index), l2TablesOffset(layout) + index * 2 ** layout.clusterBits);
    }
  }
  // Last, so that what is half written does not look like an image.
  write(headerCluster, 0);
  return layout;
}

/** Sets the size of a new raw image; all of it is a hole. @throws CowcatcherError IO or NO_SPACE */
export function createRaw(fd: number, name: string, sizeBytes: number): void {
  setLength(fd, name, sizeBytes);
}

function setLength(fd: number, name: string, lengthBytes: number): void {
  try {
    ftruncateSync(fd, lengthBytes);
  } catch (error) {
    throw ioError("set the size", name, error);
  }
}

/** The layout alone, without writing. @throws CowcatcherError USAGE or LIMIT */
export function planQcow2(name: string, options: CreateOptions): Qcow2Layout {
  const clusterBits = clusterBitsOf(name, options.clusterSizeBytes);
  const clusterSizeBytes = 2 ** clusterBits;
  const refcountOrder = refcountOrderOf(name, options.refcountBits ?? 16);
  const sizeBytes = roundUp(options.sizeBytes, SECTOR_BYTES);
  assertFeatures(name, options, clusterSizeBytes);
  const l1Size = l1EntriesFor(sizeBytes, clusterBits, options.extendedL2);
  assertLimits(name, sizeBytes, l1Size, clusterSizeBytes);
  const l1Clusters = Math.ceil((l1Size * ENTRY_BYTES) / clusterSizeBytes);
  const l2TableCount = options.dataFileRaw ? l1Size : 0;
  const { blockCount, tableClusters } = planRefcounts(
    clusterSizeBytes,
    refcountOrder,
    l1Clusters + l2TableCount,
  );
  if (tableClusters * clusterSizeBytes > Math.max(MAX_REFCOUNT_TABLE_BYTES, clusterSizeBytes)) {
    throw limitError(name, "the refcount table", formatBytes(MAX_REFCOUNT_TABLE_BYTES));
  }
  const refcountBlocksOffset = (1 + tableClusters) * clusterSizeBytes;
  const l1TableOffset = refcountBlocksOffset + blockCount * clusterSizeBytes;
  const layout = {
    sizeBytes,
    clusterBits,
    refcountOrder,
    refcountTableOffset: clusterSizeBytes,
    refcountTableClusters: tableClusters,
    refcountBlocksOffset,
    refcountBlockCount: blockCount,
    l1TableOffset,
    l1Size,
    l2TableCount,
    endOffset: l1TableOffset + (l1Clusters + l2TableCount) * clusterSizeBytes,
  };
  return { ...layout, header: headerOf(layout, options) };
}

/** How many refcount blocks and table clusters count the header, the L1 and L2 tables and themselves. */
function planRefcounts(
  clusterSizeBytes: number,
  refcountOrder: number,
  mappingClusters: number,
): { blockCount: number; tableClusters: number } {
  const clustersPerBlock = (clusterSizeBytes * 8) / 2 ** refcountOrder;
  let blockCount = 1;
  for (;;) {
    const tableClusters = Math.ceil((blockCount * ENTRY_BYTES) / clusterSizeBytes);
    const needed = Math.ceil((1 + tableClusters + blockCount + mappingClusters) / clustersPerBlock);
    if (needed <= blockCount) return { blockCount, tableClusters };
    blockCount = needed;
  }
}

function headerOf(layout: Omit<Qcow2Layout, "header">, options: CreateOptions): Qcow2Header {
  const compressionType = options.compressionType ?? "zlib";
  const features = featureNameTable();
  const header: Qcow2Header = {
    version: 3,
    clusterBits: layout.clusterBits,
    sizeBytes: layout.sizeBytes,
    cryptMethod: 0,
    l1Size: layout.l1Size,
    l1TableOffset: layout.l1TableOffset,
    refcountTableOffset: layout.refcountTableOffset,
    refcountTableClusters: layout.refcountTableClusters,
    snapshotCount: 0,
    snapshotsOffset: 0,
    incompatibleFeatures: incompatibleFeatures(options),
    compatibleFeatures: options.lazyRefcounts ? 1n : 0n,
    autoclearFeatures: options.dataFileRaw ? AUTOCLEAR_RAW_EXTERNAL_DATA : 0n,
    refcountOrder: layout.refcountOrder,
    headerLengthBytes: 0,
    compressionType,
    extensions: [features],
    backingFile: options.backingFile ?? null,
    backingFormat: options.backingFormat ?? null,
    externalDataFile: options.dataFile ?? null,
    bitmaps: null,
  };
  // The table is a courtesy to other programs; in a cluster of 512 bytes a backing file's name goes first.
  const texts = [options.backingFile, options.backingFormat, options.dataFile];
  const textBytes = texts.reduce((sum, text) => sum + roundUp(Buffer.byteLength(text ?? ""), 8), 0);
  const leastBytes = 112 + 2 * 8 + (8 + features.data.length) + 8 + textBytes + 8;
  if (leastBytes > 2 ** layout.clusterBits) header.extensions = [];
  return header;
}

function incompatibleFeatures({ compressionType, dataFile, extendedL2 }: CreateOptions): bigint {
  return (
    (compressionType === "zstd" ? INCOMPATIBLE_COMPRESSION_TYPE : 0n) |
    (dataFile === undefined ? 0n : INCOMPATIBLE_EXTERNAL_DATA) |
    (extendedL2 ? INCOMPATIBLE_EXTENDED_L2 : 0n)
  );
}

function l2TablesOffset({ l1TableOffset, l1Size, clusterBits }: Qcow2Layout): number {
  return l1TableOffset + roundUp(l1Size * ENTRY_BYTES, 2 ** clusterBits);
}

function mappedL1Table(layout: Qcow2Layout): Uint8Array {
  const bytes = new Uint8Array(layout.l1Size * ENTRY_BYTES);
  const view = new DataView(bytes.buffer);
  for (let index = 0; index < layout.l1Size; index++) {
    const offset = l2TablesOffset(layout) + index * 2 ** layout.clusterBits;
    view.setBigUint64(index * ENTRY_BYTES, ENTRY_COPIED | BigInt(offset));
  }
  return bytes;
}

/** Every cluster of the disk stands at its own place of the data file, with all of its subclusters. */
function mappedL2Table({ header, sizeBytes, clusterBits }: Qcow2Layout, l1Index: number): Uint8Array {
  const entryBytes = isExtendedL2(header) ? EXTENDED_ENTRY_BYTES : ENTRY_BYTES;
  const clusterSizeBytes = 2 ** clusterBits;
  const bytes = new Uint8Array(clusterSizeBytes);
  const view = new DataView(bytes.buffer);
  const entries = clusterSizeBytes / entryBytes;
  for (let index = 0; index < entries; index++) {
    const offset = (l1Index * entries + index) * clusterSizeBytes;
    if (offset >= sizeBytes) break;
    view.setUint32(index * entryBytes, (highWord(offset) | HIGH_COPIED) >>> 0);
    view.setUint32(index * entryBytes + 4, offset % 2 ** 32);
    if (isExtendedL2(header)) storeBitmap(view, index, ALL_UNITS, 0);
  }
  return bytes;
}

function refcountTable(layout: Qcow2Layout): Uint8Array {
  const { clusterBits, refcountTableClusters, refcountBlocksOffset, refcountBlockCount } = layout;
  const bytes = new Uint8Array(refcountTableClusters * 2 ** clusterBits);
  const view = new DataView(bytes.buffer);
  for (let index = 0; index < refcountBlockCount; index++) {
    view.setBigUint64(index * ENTRY_BYTES, BigInt(refcountBlocksOffset + index * 2 ** clusterBits));
  }
  return bytes;
}

/** Refcount 1 for each cluster up to the end; big-endian, and from the lowest bit on where narrower than a byte. */
function refcountBlocks({
  clusterBits,
  refcountOrder,
  refcountBlockCount,
  endOffset,
}: Qcow2Layout): Uint8Array {
  const bytes = new Uint8Array(refcountBlockCount * 2 ** clusterBits);
  const usedClusters = endOffset / 2 ** clusterBits;
  const refcountBits = 2 ** refcountOrder;
  for (let cluster = 0; cluster < usedClusters; cluster++) {
    const firstBit = cluster * refcountBits;
    const byteIndex = Math.floor(firstBit / 8);
    if (refcountBits >= 8) bytes[byteIndex + refcountBits / 8 - 1] = 1;
    else bytes[byteIndex] = (bytes[byteIndex] ?? 0) | (1 << (firstBit % 8));
  }
  return bytes;
}

function clusterBitsOf(name: string, clusterSizeBytes: number): number {
  const bits = Math.log2(clusterSizeBytes);
  if (Number.isInteger(bits) && bits >= MIN_CLUSTER_BITS && bits <= MAX_CLUSTER_BITS) return bits;
  throw usageError(name, `the cluster size ${clusterSizeBytes} is not a power of two from 512 to 2M`);
}

function refcountOrderOf(name: string, refcountBits: number): number {
  const order = Math.log2(refcountBits);
  if (Number.isInteger(order) && order >= 0 && order <= MAX_REFCOUNT_ORDER) return order;
  throw usageError(name, `the refcount width ${refcountBits} is not a power of two from 1 to 64 bits`);
}

function assertFeatures(name: string, options: CreateOptions, clusterSizeBytes: number): void {
  if (options.extendedL2 && clusterSizeBytes < 2 ** MIN_CLUSTER_BITS_EXTENDED_L2) {
    throw usageError(name, "extended L2 entries need clusters of at least 16K");
  }
  if (options.dataFileRaw && options.dataFile === undefined) {
    throw usageError(name, "data_file_raw needs a data_file");
  }
  if (options.dataFileRaw && options.backingFile !== undefined) {
    throw usageError(name, "a raw data file and a backing file exclude each other");
  }
}

function assertLimits(name: string, sizeBytes: number, l1Size: number, clusterSizeBytes: number): void {
  if (sizeBytes > MAX_CREATE_SIZE_BYTES) {
    throw limitError(name, `the disk size ${sizeBytes}`, formatBytes(MAX_CREATE_SIZE_BYTES));
  }
  if (l1Size * ENTRY_BYTES > MAX_L1_BYTES) {
    const what = `the L1 table for a disk of ${formatBytes(sizeBytes)} with clusters of ${clusterSizeBytes} bytes`;
    throw limitError(name, what, formatBytes(MAX_L1_BYTES), "choose larger clusters");
  }
}

function usageError(name: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object: name, problem });
}

function limitError(name: string, what: string, limit: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "LIMIT", object: name, problem: `${what} exceeds ${limit}`, hint });
}
