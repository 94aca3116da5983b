// A new, empty qcow2 image, version 3, laid out as qemu-img create does it:
//
//     cluster 0          header, extensions, backing file name
//     from cluster 1     refcount table, refcount blocks, L1 table
//
// The refcount blocks must also count themselves and the table that points to them, so their number is found by
// repeating until it no longer grows (each round adds at most a small fraction of the last, so it ends). All that
// exists is counted 1; L1 is all zero, hence a hole.

import { ftruncateSync } from "node:fs";
import { CowcatcherError, ioError } from "../../errors.js";
import { TiB, formatBytes, roundUp } from "../../units.js";
import { writeFullySync } from "../fileio.js";
import type { ImageFormat } from "../format.js";
import {
  INCOMPATIBLE_COMPRESSION_TYPE,
  MAX_CLUSTER_BITS,
  MAX_L1_BYTES,
  MAX_REFCOUNT_ORDER,
  MAX_REFCOUNT_TABLE_BYTES,
  MIN_CLUSTER_BITS,
  type CompressionType,
  type Qcow2Header,
  featureNameTable,
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
  const { refcountTableOffset, refcountBlocksOffset, endOffset } = layout;
  const headerCluster = serialiseHeader(layout.header, name);
  const write = (bytes: Uint8Array, offsetBytes: number): void =>
    writeFullySync(name, fd, bytes, 0, bytes.length, offsetBytes);
  setLength(fd, name, endOffset);
  write(refcountTable(layout), refcountTableOffset);
  write(refcountBlocks(layout), refcountBlocksOffset);
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
  const l1Size = l1EntriesFor(sizeBytes, clusterBits);
  assertLimits(name, sizeBytes, l1Size, clusterSizeBytes);
  const l1Clusters = Math.ceil((l1Size * ENTRY_BYTES) / clusterSizeBytes);
  const { blockCount, tableClusters } = planRefcounts(clusterSizeBytes, refcountOrder, l1Clusters);
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
    endOffset: l1TableOffset + l1Clusters * clusterSizeBytes,
  };
  return { ...layout, header: headerOf(layout, options) };
}

/** How many refcount blocks and table clusters count the header, the L1 table and themselves. */
function planRefcounts(
  clusterSizeBytes: number,
  refcountOrder: number,
  l1Clusters: number,
): { blockCount: number; tableClusters: number } {
  const clustersPerBlock = (clusterSizeBytes * 8) / 2 ** refcountOrder;
  let blockCount = 1;
  for (;;) {
    const tableClusters = Math.ceil((blockCount * ENTRY_BYTES) / clusterSizeBytes);
    const needed = Math.ceil((1 + tableClusters + blockCount + l1Clusters) / clustersPerBlock);
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
    incompatibleFeatures: compressionType === "zlib" ? 0n : INCOMPATIBLE_COMPRESSION_TYPE,
    compatibleFeatures: options.lazyRefcounts ? 1n : 0n,
    autoclearFeatures: 0n,
    refcountOrder: layout.refcountOrder,
    headerLengthBytes: 0,
    compressionType,
    extensions: [features],
    backingFile: options.backingFile ?? null,
    backingFormat: options.backingFormat ?? null,
    externalDataFile: null,
    bitmaps: null,
  };
  // The table is a courtesy to other programs; in a cluster of 512 bytes a backing file's name goes first.
  const textBytes = Buffer.byteLength(`${options.backingFile ?? ""}${options.backingFormat ?? ""}`);
  const leastBytes = 112 + 8 + (8 + features.data.length) + 8 + roundUp(textBytes, 8) + 8;
  if (leastBytes > 2 ** layout.clusterBits) header.extensions = [];
  return header;
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
