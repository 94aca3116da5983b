// A new, empty qcow2 image, laid out as qemu-img create does it (create/layout.ts).
//
// With preallocation the disk is mapped from the start, and reads as zeroes: `metadata` leaves the clusters that it is
// mapped to as a hole of the file, `falloc` has the file system reserve them, `full` writes them. A data file that is
// to read as the disk by itself has all of its clusters mapped, so that what is put into it otherwise than through the
// image is seen there.
//
// Of the last cluster, what lies behind the disk's end is written as zeroes: nobody else will.

import { ftruncateSync } from "node:fs";
import { nameBytes } from "../../../file-names.js";
import { CowcatcherError, ioError } from "../../../errors.js";
import { TiB, formatBytes, roundUp } from "../../../units.js";
import { writeFullySync } from "../../../block/file/fileio.js";
import type { ImageFormat } from "../../../block/format.js";
import { SECTOR_BYTES } from "../../last-sector.js";
import { preallocate, type Preallocation } from "../../../block/file/preallocate.js";
import { type Layout, Mapped, layOut, subclusterBytes } from "./layout.js";
import { writeMapping, writeRefcounts, type WriteAt } from "./tables.js";
import { EXTENDED_ENTRY_BYTES } from "../format/extended-entry.js";
import {
  AUTOCLEAR_RAW_EXTERNAL_DATA,
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
  isExtendedL2,
  l1EntriesFor,
} from "../format/header.js";
import { featureNameTable, serialiseHeader } from "../format/header-write.js";

export const MAX_CREATE_SIZE_BYTES = 64 * TiB;
const ENTRY_BYTES = 8;
const FIRST_BLOCK_BYTES = 4096;

export interface CreateOptions {
  /** Rounded up to a multiple of 512, as qcow2 disks are counted in sectors. At most 64 TiB. */
  sizeBytes: number;
  /** A power of two, 512 bytes to 2 MiB. */
  clusterSizeBytes: number;
  /** 3 by default. Version 2 has refcounts of 16 bits, zlib, and none of the features below but preallocation. */
  version?: 2 | 3 | undefined;
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
  /** Of the disk; `off` by default. With a backing file only where L2 entries are extended. */
  preallocation?: Preallocation | undefined;
}

/** A new image, before it is written. */
export interface Qcow2Plan {
  header: Qcow2Header;
  layout: Layout;
  preallocation: Preallocation;
}

/**
 * Writes an empty image at the start of `fd`, a new file of size 0 open for writing without O_DIRECT. Blocks its
 * thread, for as long as the metadata and, with preallocation, the data takes to write. Does not sync.
 * @throws CowcatcherError USAGE (sizes), LIMIT, IO or NO_SPACE, naming `name`.
 */
export function createQcow2(fd: number, name: string, options: CreateOptions): Qcow2Plan {
  const plan = planQcow2(name, options);
  const { header, layout } = plan;
  const clusterSizeBytes = 2 ** header.clusterBits;
  const headerCluster = serialiseHeader(header, name);
  const write: WriteAt = (bytes, offsetBytes) =>
    writeFullySync(name, fd, bytes, 0, bytes.length, offsetBytes);
  setLength(fd, name, layout.lengthBytes);
  writeRefcounts(layout, clusterSizeBytes, 2 ** header.refcountOrder, write);
  const form = {
    clusterSizeBytes,
    l1Size: header.l1Size,
    sizeBytes: header.sizeBytes,
    isExtendedL2: isExtendedL2(header),
    isWritten: options.dataFileRaw === true,
  };
  const lastData = writeMapping(layout, form, write);
  if (layout.data !== null) {
    const { first, count } = layout.data;
    preallocate(fd, name, plan.preallocation, first * clusterSizeBytes, count * clusterSizeBytes);
  } else if (lastData !== undefined) {
    write(zeroesBehind(header), lastData + ((header.sizeBytes - 1) % clusterSizeBytes) + 1);
  }
  // Last, so that what is half written does not look like an image.
  write(headerCluster, 0);
  return plan;
}

function zeroesBehind(header: Qcow2Header): Uint8Array {
  const clusterSizeBytes = 2 ** header.clusterBits;
  const unit = subclusterBytes({ clusterSizeBytes, l2EntryBytes: l2EntryBytesOf(isExtendedL2(header)) });
  return new Uint8Array(roundUp(header.sizeBytes, unit) - header.sizeBytes);
}

function l2EntryBytesOf(isExtended: boolean): number {
  return isExtended ? EXTENDED_ENTRY_BYTES : ENTRY_BYTES;
}

/**
 * Sets the size of a new raw image. Without preallocation all of it is a hole but for the first block, which is written,
 * as by QEMU: with it O_DIRECT's alignment can be found out by reading.
 * @throws CowcatcherError IO or NO_SPACE
 */
export function createRaw(
  fd: number,
  name: string,
  sizeBytes: number,
  preallocation: Preallocation = "off",
): void {
  setLength(fd, name, sizeBytes);
  preallocate(fd, name, preallocation, 0, sizeBytes);
  const firstBytes = sizeBytes < FIRST_BLOCK_BYTES ? Math.min(SECTOR_BYTES, sizeBytes) : FIRST_BLOCK_BYTES;
  writeFullySync(name, fd, new Uint8Array(firstBytes), 0, firstBytes, 0);
}

function setLength(fd: number, name: string, lengthBytes: number): void {
  try {
    ftruncateSync(fd, lengthBytes);
  } catch (error) {
    throw ioError("set the size", name, error);
  }
}

/** What would be written. @throws CowcatcherError USAGE or LIMIT */
export function planQcow2(name: string, options: CreateOptions): Qcow2Plan {
  const clusterBits = clusterBitsOf(name, options.clusterSizeBytes);
  const clusterSizeBytes = 2 ** clusterBits;
  const refcountOrder = refcountOrderOf(name, options.refcountBits ?? 16);
  const sizeBytes = roundUp(options.sizeBytes, SECTOR_BYTES);
  assertFeatures(name, options, clusterSizeBytes);
  const l1Size = l1EntriesFor(sizeBytes, clusterBits, options.extendedL2);
  assertLimits(name, sizeBytes, l1Size, clusterSizeBytes);
  const l2EntryBytes = l2EntryBytesOf(options.extendedL2 === true);
  const mapped = mappedBy(options);
  const refcountBits = 2 ** refcountOrder;
  const layout = layOut({ clusterSizeBytes, refcountBits, l1Size, l2EntryBytes, sizeBytes, mapped });
  if (layout.refcountTable.count * clusterSizeBytes > Math.max(MAX_REFCOUNT_TABLE_BYTES, clusterSizeBytes)) {
    throw limitError(name, "the refcount table", formatBytes(MAX_REFCOUNT_TABLE_BYTES));
  }
  const header = headerOf({ sizeBytes, clusterBits, refcountOrder, l1Size, layout }, options);
  return { header, layout, preallocation: options.preallocation ?? "off" };
}

function mappedBy({ dataFile, dataFileRaw, preallocation = "off" }: CreateOptions): Mapped {
  if (dataFileRaw) return Mapped.Tables;
  if (preallocation === "off") return Mapped.Nothing;
  if (dataFile !== undefined) return Mapped.Tables;
  return preallocation === "metadata" ? Mapped.Data : Mapped.DataFirst;
}

function headerOf(
  {
    layout,
    ...known
  }: Pick<Qcow2Header, "sizeBytes" | "clusterBits" | "refcountOrder" | "l1Size"> & {
    layout: Layout;
  },
  options: CreateOptions,
): Qcow2Header {
  const compressionType = options.compressionType ?? "zlib";
  const { version = 3 } = options;
  const clusterSizeBytes = 2 ** known.clusterBits;
  const header: Qcow2Header = {
    ...known,
    version,
    cryptMethod: 0,
    l1TableOffset: layout.l1.first * clusterSizeBytes,
    refcountTableOffset: layout.refcountTable.first * clusterSizeBytes,
    refcountTableClusters: layout.refcountTable.count,
    snapshotCount: 0,
    snapshotsOffset: 0,
    incompatibleFeatures: incompatibleFeatures(options),
    compatibleFeatures: options.lazyRefcounts ? 1n : 0n,
    autoclearFeatures: options.dataFileRaw ? AUTOCLEAR_RAW_EXTERNAL_DATA : 0n,
    headerLengthBytes: 0,
    compressionType,
    extensions: [],
    backingFile: options.backingFile ?? null,
    backingFormat: options.backingFormat ?? null,
    externalDataFile: options.dataFile ?? null,
    bitmaps: null,
  };
  if (version === 2) return header;
  // The table is a courtesy to other programs; in a cluster of 512 bytes a backing file's name goes first.
  const texts = [options.backingFile, options.backingFormat, options.dataFile];
  const textBytes = texts.reduce((sum, text) => sum + roundUp(nameBytes(text ?? "").length, 8), 0);
  const features = featureNameTable();
  const leastBytes = 112 + 2 * 8 + (8 + features.data.length) + 8 + textBytes + 8;
  if (leastBytes <= clusterSizeBytes) header.extensions.push(features);
  return header;
}

function incompatibleFeatures({ compressionType, dataFile, extendedL2 }: CreateOptions): bigint {
  return (
    (compressionType === "zstd" ? INCOMPATIBLE_COMPRESSION_TYPE : 0n) |
    (dataFile === undefined ? 0n : INCOMPATIBLE_EXTERNAL_DATA) |
    (extendedL2 ? INCOMPATIBLE_EXTENDED_L2 : 0n)
  );
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
  if (options.version === 2) assertOfVersion2(name, options);
  const isPreallocated = (options.preallocation ?? "off") !== "off";
  if (isPreallocated && options.backingFile !== undefined && !options.extendedL2) {
    throw usageError(name, "preallocation would hide the backing file, but for extended_l2=on");
  }
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

function assertOfVersion2(name: string, options: CreateOptions): void {
  const newer: [isChosen: boolean | undefined, what: string][] = [
    [options.lazyRefcounts, "lazy_refcounts=on"],
    [(options.refcountBits ?? 16) !== 16, `refcount_bits=${options.refcountBits}`],
    [options.extendedL2, "extended_l2=on"],
    [options.dataFile !== undefined, "data_file"],
    [options.compressionType === "zstd", "compression_type=zstd"],
  ];
  for (const [isChosen, what] of newer) {
    if (isChosen) throw usageError(name, `${what} needs version 3 of the format`, "give compat=1.1");
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

function usageError(name: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object: name, problem, hint });
}

function limitError(name: string, what: string, limit: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "LIMIT", object: name, problem: `${what} exceeds ${limit}`, hint });
}
