// The qcow2 header, versions 2 and 3, with its extensions (qcow2 specification: "Header", "Header extensions").
//
// Everything here is pure: bytes in, a Qcow2Header out (and back: header-write.ts). `parseHeader` refuses whatever makes the rest of
// the file impossible to find or unsafe to interpret; `assertSupported` refuses what is legal but not handled by
// this version. An information command may call the first alone.
//
// Numbers. Offsets and counts of 64 bits become JS numbers; those beyond 2^53 are refused by name. Feature masks
// stay bigints, as unknown bits must survive.

import { decodeName } from "../../../file-names.js";
import { CowcatcherError } from "../../../errors.js";
import { KiB, MiB, TiB, formatBytes } from "../../../units.js";

export const QCOW2_MAGIC = 0x514649fb;
export const V2_HEADER_BYTES = 72;
export const V3_HEADER_BYTES = 104;
/** With compression_type and its padding; what QEMU writes too. */
export const V3_HEADER_BYTES_WRITTEN = 112;

export const MIN_CLUSTER_BITS = 9;
/** QEMU's limit, and this project's. */
export const MAX_CLUSTER_BITS = 21;
/** Extended L2 entries need clusters of 16 KiB at least. */
export const MIN_CLUSTER_BITS_EXTENDED_L2 = 14;
export const MAX_L1_BYTES = 32 * MiB;
export const MAX_REFCOUNT_TABLE_BYTES = 8 * MiB;
export const MAX_REFCOUNT_ORDER = 6;
export const MAX_SNAPSHOTS = 65536;
export const MAX_SNAPSHOT_TABLE_BYTES = 64 * MiB;
export const MAX_SNAPSHOT_EXTRA_BYTES = 1 * KiB;
export const MAX_BACKING_NAME_BYTES = 1023;
/** QEMU's limit of a format's name in the header: it keeps 16 bytes, the last of which is zero. */
const MAX_FORMAT_NAME_BYTES = 15;
export const MAX_BITMAPS = 65535;
export const MAX_BITMAP_DIRECTORY_BYTES = 64 * MiB;
/** Stated limit of a virtual disk: 4 PiB (all byte offsets within stay exact as JS numbers). */
export const MAX_SIZE_BYTES = 4096 * TiB;
/** Stated limit of an offset in the image file: 2^53. The format itself stops at 2^56. */
export const MAX_HOST_OFFSET_BYTES = Number.MAX_SAFE_INTEGER;

export const INCOMPATIBLE_DIRTY = 1n << 0n;
export const INCOMPATIBLE_CORRUPT = 1n << 1n;
export const INCOMPATIBLE_EXTERNAL_DATA = 1n << 2n;
export const INCOMPATIBLE_COMPRESSION_TYPE = 1n << 3n;
export const INCOMPATIBLE_EXTENDED_L2 = 1n << 4n;
const INCOMPATIBLE_KNOWN =
  INCOMPATIBLE_DIRTY |
  INCOMPATIBLE_CORRUPT |
  INCOMPATIBLE_EXTERNAL_DATA |
  INCOMPATIBLE_COMPRESSION_TYPE |
  INCOMPATIBLE_EXTENDED_L2;
export const COMPATIBLE_LAZY_REFCOUNTS = 1n << 0n;
export const AUTOCLEAR_BITMAPS = 1n << 0n;
export const AUTOCLEAR_RAW_EXTERNAL_DATA = 1n << 1n;

export const EXTENSION_END = 0x00000000;
export const EXTENSION_BACKING_FORMAT = 0xe2792aca;
export const EXTENSION_FEATURE_NAMES = 0x6803f857;
export const EXTENSION_BITMAPS = 0x23852875;
export const EXTENSION_ENCRYPTION = 0x0537be77;
export const EXTENSION_EXTERNAL_DATA = 0x44415441;

/** Byte offsets of the fields that a running image changes in place. */
export const FIELD_OFFSET = {
  l1Size: 36,
  l1TableOffset: 40,
  refcountTableOffset: 48,
  refcountTableClusters: 56,
  snapshotCount: 60,
  snapshotsOffset: 64,
  incompatibleFeatures: 72,
  compatibleFeatures: 80,
  autoclearFeatures: 88,
} as const;

/** Entries of L1, L2 and refcount tables: bits 9..55 (9..63 of the refcount table's) are a host offset. */
export const OFFSET_MASK = 0x00fffffffffffe00n;
export const ENTRY_COPIED = 1n << 63n;
export const ENTRY_COMPRESSED = 1n << 62n;
export const ENTRY_ZERO = 1n;

export const CRYPT_NONE = 0;
export const CRYPT_AES = 1;
export const CRYPT_LUKS = 2;

export type CompressionType = "zlib" | "zstd";

export interface HeaderExtension {
  type: number;
  data: Uint8Array;
}

export interface BitmapsExtension {
  bitmapCount: number;
  directoryBytes: number;
  directoryOffset: number;
}

export interface Qcow2Header {
  version: 2 | 3;
  clusterBits: number;
  sizeBytes: number;
  cryptMethod: number;
  /** Number of entries of the active L1 table. */
  l1Size: number;
  l1TableOffset: number;
  refcountTableOffset: number;
  refcountTableClusters: number;
  snapshotCount: number;
  snapshotsOffset: number;
  incompatibleFeatures: bigint;
  compatibleFeatures: bigint;
  autoclearFeatures: bigint;
  /** Width of a refcount is 1 << refcountOrder bits. */
  refcountOrder: number;
  headerLengthBytes: number;
  compressionType: CompressionType;
  /** In the order of the file, without the end marker. */
  extensions: HeaderExtension[];
  backingFile: string | null;
  backingFormat: string | null;
  externalDataFile: string | null;
  bitmaps: BitmapsExtension | null;
}

/**
 * Reads as many bytes at offsetBytes as there are, at most the buffer's length; returns the count.
 * @throws CowcatcherError IO
 */
export type HeaderRead = (buffer: Uint8Array, offsetBytes: number) => number;

export interface HeaderOptions {
  /** A check can do without one, and a repair makes it. */
  allowNoRefcountTable?: boolean;
}

/**
 * Reads and parses the header: 4 KiB first, then the rest of the first cluster, to which backing name and
 * extensions are confined.
 * @throws CowcatcherError FORMAT, UNSUPPORTED or LIMIT, naming `name`.
 */
export function readHeader(read: HeaderRead, name: string, options: HeaderOptions = {}): Qcow2Header {
  const prefix = new Uint8Array(4 * KiB);
  const prefixLength = read(prefix, 0);
  const clusterBits = checkPrefix(prefix.subarray(0, prefixLength), name);
  const clusterSizeBytes = 2 ** clusterBits;
  if (clusterSizeBytes <= prefixLength) {
    return parseHeader(prefix.subarray(0, clusterSizeBytes), name, options);
  }
  const cluster = new Uint8Array(clusterSizeBytes);
  return parseHeader(cluster.subarray(0, read(cluster, 0)), name, options);
}

/** True where the bytes start a qcow2 file (any version). */
export function hasQcow2Magic(bytes: Uint8Array): boolean {
  return bytes.length >= 4 && viewOf(bytes).getUint32(0) === QCOW2_MAGIC;
}

/**
 * Parses the header from the first cluster's bytes (fewer where the file ends sooner).
 * @throws CowcatcherError FORMAT, UNSUPPORTED (version, unknown incompatible feature) or LIMIT.
 */
export function parseHeader(
  firstCluster: Uint8Array,
  name: string,
  options: HeaderOptions = {},
): Qcow2Header {
  const clusterBits = checkPrefix(firstCluster, name);
  const view = viewOf(firstCluster);
  const version = view.getUint32(4) as 2 | 3;
  const isV3 = version === 3;
  const headerLengthBytes = isV3 ? view.getUint32(100) : V2_HEADER_BYTES;
  const clusterSizeBytes = 2 ** clusterBits;
  if (isV3 && (headerLengthBytes < V3_HEADER_BYTES || headerLengthBytes % 8 !== 0)) {
    throw formatError(name, `the header length ${headerLengthBytes} is not a multiple of 8 from 104 on`, 100);
  }
  if (headerLengthBytes > firstCluster.length || headerLengthBytes > clusterSizeBytes) {
    throw formatError(name, `the header length ${headerLengthBytes} exceeds the first cluster`, 100);
  }
  const header: Qcow2Header = {
    version,
    clusterBits,
    sizeBytes: readNumber(view, 24, "size", name),
    cryptMethod: view.getUint32(32),
    l1Size: view.getUint32(36),
    l1TableOffset: readNumber(view, 40, "l1_table_offset", name),
    refcountTableOffset: readNumber(view, 48, "refcount_table_offset", name),
    refcountTableClusters: view.getUint32(56),
    snapshotCount: view.getUint32(60),
    snapshotsOffset: readNumber(view, 64, "snapshots_offset", name),
    incompatibleFeatures: isV3 ? view.getBigUint64(72) : 0n,
    compatibleFeatures: isV3 ? view.getBigUint64(80) : 0n,
    autoclearFeatures: isV3 ? view.getBigUint64(88) : 0n,
    refcountOrder: isV3 ? view.getUint32(96) : 4,
    headerLengthBytes,
    compressionType: "zlib",
    extensions: [],
    backingFile: null,
    backingFormat: null,
    externalDataFile: null,
    bitmaps: null,
  };
  const backingOffset = readNumber(view, 8, "backing_file_offset", name);
  parseExtensions(header, firstCluster, backingOffset, name);
  checkFeatures(header, name);
  header.compressionType = parseCompressionType(header, firstCluster, name);
  checkGeometry(header, name, options);
  if (backingOffset !== 0) header.backingFile = parseBackingName(firstCluster, backingOffset, name) || null;
  return header;
}

function parseBackingName(firstCluster: Uint8Array, offsetBytes: number, name: string): string {
  const lengthBytes = viewOf(firstCluster).getUint32(16);
  if (lengthBytes > MAX_BACKING_NAME_BYTES) {
    throw limitError(
      name,
      `the backing file name of ${lengthBytes} bytes`,
      `${MAX_BACKING_NAME_BYTES} bytes`,
    );
  }
  if (offsetBytes + lengthBytes > firstCluster.length) {
    throw formatError(name, "the backing file name leaves the first cluster", 8);
  }
  return textOf(firstCluster.subarray(offsetBytes, offsetBytes + lengthBytes));
}

/** Magic, version and cluster_bits: what must hold before anything else can be read. */
function checkPrefix(bytes: Uint8Array, name: string): number {
  const view = viewOf(bytes);
  if (bytes.length < V2_HEADER_BYTES || view.getUint32(0) !== QCOW2_MAGIC) {
    throw new CowcatcherError({
      code: "FORMAT",
      object: name,
      problem: "not a qcow2 image",
      hint: "name its format, for example -f raw",
    });
  }
  const version = view.getUint32(4);
  if (version !== 2 && version !== 3) throw unsupported(name, `qcow2 version ${version}`);
  if (version === 3 && bytes.length < V3_HEADER_BYTES) throw formatError(name, "the header is cut short", 0);
  const clusterBits = view.getUint32(20);
  if (clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    throw limitError(
      name,
      `cluster_bits ${clusterBits}`,
      `${MIN_CLUSTER_BITS} to ${MAX_CLUSTER_BITS} (512 bytes to 2 MiB)`,
    );
  }
  return clusterBits;
}

function parseExtensions(header: Qcow2Header, bytes: Uint8Array, backingOffset: number, name: string): void {
  const view = viewOf(bytes);
  const end = backingOffset !== 0 && backingOffset < bytes.length ? backingOffset : bytes.length;
  let offset = header.headerLengthBytes;
  while (offset < end) {
    if (offset + 8 > bytes.length) throw formatError(name, "the header extensions are cut short", offset);
    const type = view.getUint32(offset);
    const lengthBytes = view.getUint32(offset + 4);
    // The end of the area may be inside an extension's own head, and even the end marker's is to fit.
    if (offset + 8 + lengthBytes > end) {
      throw formatError(name, `header extension 0x${type.toString(16)} leaves the header's area`, offset);
    }
    if (type === EXTENSION_END) return;
    const data = bytes.slice(offset + 8, offset + 8 + lengthBytes);
    applyExtension(header, type, data, name, offset);
    header.extensions.push({ type, data });
    offset += 8 + Math.ceil(lengthBytes / 8) * 8;
  }
}

function applyExtension(
  header: Qcow2Header,
  type: number,
  data: Uint8Array,
  name: string,
  offset: number,
): void {
  if (type === EXTENSION_BACKING_FORMAT) {
    if (data.length > MAX_FORMAT_NAME_BYTES) {
      throw formatError(name, `the backing format's name has ${data.length} bytes`, offset);
    }
    header.backingFormat = textOf(data);
  } else if (type === EXTENSION_EXTERNAL_DATA) header.externalDataFile = textOf(data);
  else if (type === EXTENSION_BITMAPS) {
    if (data.length !== 24) throw formatError(name, "the bitmaps extension is not 24 bytes long", offset);
    const view = viewOf(data);
    header.bitmaps = {
      bitmapCount: view.getUint32(0),
      directoryBytes: readNumber(view, 8, "bitmap_directory_size", name),
      directoryOffset: readNumber(view, 16, "bitmap_directory_offset", name),
    };
  }
}

function parseCompressionType(header: Qcow2Header, bytes: Uint8Array, name: string): CompressionType {
  const value =
    header.headerLengthBytes > V3_HEADER_BYTES && header.version === 3 ? (bytes[V3_HEADER_BYTES] ?? 0) : 0;
  const isFlagged = (header.incompatibleFeatures & INCOMPATIBLE_COMPRESSION_TYPE) !== 0n;
  if (isFlagged !== (value !== 0)) {
    throw formatError(
      name,
      "the compression type and its incompatible feature bit contradict each other",
      104,
    );
  }
  if (value === 0) return "zlib";
  if (value === 1) return "zstd";
  throw unsupported(name, `compression type ${value}`);
}

function checkFeatures(header: Qcow2Header, name: string): void {
  const unknown = header.incompatibleFeatures & ~INCOMPATIBLE_KNOWN;
  if (unknown === 0n) return;
  const names: string[] = [];
  for (let bit = 0; bit < 64; bit++) {
    if ((unknown >> BigInt(bit)) & 1n) names.push(featureName(header, 0, bit) ?? `bit ${bit}`);
  }
  throw unsupported(name, `incompatible feature${names.length > 1 ? "s" : ""}: ${names.join(", ")}`);
}

/** The name that the image's feature name table gives; `kind` 0 incompatible, 1 compatible, 2 autoclear. */
export function featureName(header: Qcow2Header, kind: number, bit: number): string | undefined {
  const table = header.extensions.find(({ type }) => type === EXTENSION_FEATURE_NAMES)?.data;
  if (table === undefined) return undefined;
  for (let offset = 0; offset + 48 <= table.length; offset += 48) {
    if (table[offset] !== kind || table[offset + 1] !== bit) continue;
    return textOf(table.subarray(offset + 2, offset + 48)).replace(/[^\x20-\x7e]/g, "?");
  }
  return undefined;
}

function checkGeometry(header: Qcow2Header, name: string, options: HeaderOptions): void {
  const { clusterBits, sizeBytes, l1Size, refcountTableClusters } = header;
  const clusterSizeBytes = 2 ** clusterBits;
  if (sizeBytes > MAX_SIZE_BYTES) {
    throw limitError(name, `the disk size ${sizeBytes}`, formatBytes(MAX_SIZE_BYTES));
  }
  if (header.refcountOrder > MAX_REFCOUNT_ORDER) {
    throw limitError(name, `refcount_order ${header.refcountOrder}`, `${MAX_REFCOUNT_ORDER} (64 bits)`);
  }
  if (isExtendedL2(header) && clusterBits < MIN_CLUSTER_BITS_EXTENDED_L2) {
    throw formatError(name, "extended L2 entries need clusters of at least 16 KiB", 20);
  }
  if (l1Size * 8 > MAX_L1_BYTES) {
    throw limitError(name, `the L1 table of ${l1Size} entries`, formatBytes(MAX_L1_BYTES));
  }
  if (l1Size < l1EntriesFor(sizeBytes, clusterBits, isExtendedL2(header))) {
    throw formatError(name, "the L1 table is too small for the disk's size", FIELD_OFFSET.l1Size);
  }
  if (refcountTableClusters === 0 && options.allowNoRefcountTable !== true) {
    throw formatError(name, "there is no refcount table", 56);
  }
  if (refcountTableClusters * clusterSizeBytes > Math.max(MAX_REFCOUNT_TABLE_BYTES, clusterSizeBytes)) {
    throw limitError(
      name,
      `the refcount table of ${refcountTableClusters} clusters`,
      formatBytes(MAX_REFCOUNT_TABLE_BYTES),
    );
  }
  if (header.snapshotCount > MAX_SNAPSHOTS) {
    throw limitError(name, `the count of ${header.snapshotCount} snapshots`, `${MAX_SNAPSHOTS}`);
  }
  checkAligned(header.l1TableOffset, "L1 table", FIELD_OFFSET.l1TableOffset, clusterSizeBytes, name);
  checkAligned(header.refcountTableOffset, "refcount table", 48, clusterSizeBytes, name);
  if (header.snapshotCount > 0) {
    checkAligned(header.snapshotsOffset, "snapshot table", 64, clusterSizeBytes, name);
  }
}

function checkAligned(
  value: number,
  what: string,
  fieldOffset: number,
  clusterSizeBytes: number,
  name: string,
): void {
  if (value % clusterSizeBytes !== 0) {
    throw formatError(name, `the ${what} is not aligned to a cluster (offset ${value})`, fieldOffset);
  }
}

/** Refuses what the format allows but this version cannot do. @throws CowcatcherError UNSUPPORTED */
export function assertSupported(header: Qcow2Header, name: string): void {
  if (header.cryptMethod !== CRYPT_NONE) {
    const method = header.cryptMethod === CRYPT_AES ? "AES" : header.cryptMethod === CRYPT_LUKS ? "LUKS" : "";
    throw unsupported(name, `encryption (${method || `method ${header.cryptMethod}`})`);
  }
}

/** The guest's clusters stand in a file of their own. */
export function hasExternalDataFile(header: Qcow2Header): boolean {
  return (header.incompatibleFeatures & INCOMPATIBLE_EXTERNAL_DATA) !== 0n;
}

/** That file is promised to read as the guest's disk by itself. Without a data file the bit means nothing. */
export function isDataFileRaw(header: Qcow2Header): boolean {
  return hasExternalDataFile(header) && (header.autoclearFeatures & AUTOCLEAR_RAW_EXTERNAL_DATA) !== 0n;
}

export function isExtendedL2(header: Qcow2Header): boolean {
  return (header.incompatibleFeatures & INCOMPATIBLE_EXTENDED_L2) !== 0n;
}

/** Number of L1 entries that a disk of this size needs. */
export function l1EntriesFor(sizeBytes: number, clusterBits: number, extendedL2 = false): number {
  const bytesPerL2 = 2 ** (2 * clusterBits - (extendedL2 ? 4 : 3));
  return Math.ceil(sizeBytes / bytesPerL2);
}

export function formatError(name: string, problem: string, offsetBytes?: number): CowcatcherError {
  return new CowcatcherError({ code: "FORMAT", object: name, problem, offsetBytes });
}

function unsupported(name: string, feature: string): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object: name,
    problem: `the image uses ${feature}, which is not supported`,
    hint: "qemu-img convert makes a copy without it",
  });
}

export function limitError(name: string, what: string, limit: string): CowcatcherError {
  return new CowcatcherError({
    code: "LIMIT",
    object: name,
    problem: `${what} is outside the limit: ${limit}`,
  });
}

/** A 64-bit field as an exact JS number. @throws CowcatcherError LIMIT beyond 2^53 */
export function readNumber(view: DataView, offsetBytes: number, field: string, name: string): number {
  const value = view.getUint32(offsetBytes) * 2 ** 32 + view.getUint32(offsetBytes + 4);
  if (!Number.isSafeInteger(value)) throw limitError(name, `the field ${field}`, "2^53");
  return value;
}

export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** A name as QEMU takes it: up to the first zero byte, if there is one. */
function textOf(bytes: Uint8Array): string {
  const end = bytes.indexOf(0);
  return decodeName(Buffer.from(bytes.buffer, bytes.byteOffset, end < 0 ? bytes.byteLength : end));
}
