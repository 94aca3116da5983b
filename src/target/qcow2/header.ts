// The header cluster of a qcow2 version 3 image, as QEMU's docs/interop/qcow2.txt has it: 112 bytes of fields, the
// extensions, the backing file's name.

import { nameBytes } from "../../file-names.js";
import { CowcatcherError } from "../../errors.js";
import type { ImageFormat } from "../../block/format.js";
import type { CompressionType } from "../../image/qcow2/format/header.js";
import { HEADER_CLUSTER_COUNT, type Qcow2Geometry, type RefcountPlan } from "./layout.js";

const MAGIC = 0x514649fb;
const VERSION = 3;
/** Bit 3 of the incompatible features, in the low byte: the compression type is not 0. */
const COMPRESSION_TYPE_BIT = 0x08;
const ZSTD = 1;
/** With the compression type (0: zlib), which QEMU writes even where it is the default. */
const HEADER_BYTES = 112;
/** Refcounts of 1 << 4 bits. */
const REFCOUNT_ORDER = 4;
const EXTENSION_BACKING_FORMAT = 0xe2792aca;
const EXTENSION_FEATURE_NAMES = 0x6803f857;
const EXTENSION_HEADER_BYTES = 8;
const BACKING_NAME_BYTES_MAX = 1023;
/** QEMU leaves the names out of smaller header clusters, to have room for the rest. */
const FEATURE_NAMES_CLUSTER_BYTES_MIN = 16384;

const INCOMPATIBLE = 0;
const COMPATIBLE = 1;
const AUTOCLEAR = 2;
const FEATURE_NAME_ENTRY_BYTES = 48;
const FEATURE_NAMES: readonly (readonly [type: number, bit: number, name: string])[] = [
  [INCOMPATIBLE, 0, "dirty bit"],
  [INCOMPATIBLE, 1, "corrupt bit"],
  [INCOMPATIBLE, 2, "external data file"],
  [INCOMPATIBLE, 3, "compression type"],
  [INCOMPATIBLE, 4, "extended L2 entries"],
  [COMPATIBLE, 0, "lazy refcounts"],
  [AUTOCLEAR, 0, "bitmaps"],
  [AUTOCLEAR, 1, "raw external data"],
];

export interface Backing {
  file: string;
  format: ImageFormat | undefined;
}

/**
 * The whole first cluster.
 * @throws CowcatcherError LIMIT for a backing file's name that is too long for the format or the cluster.
 */
export function encodeHeaderCluster(
  name: string,
  geometry: Qcow2Geometry,
  refcounts: RefcountPlan,
  backing: Backing | null,
  compressionType: CompressionType = "zlib",
): Buffer {
  const { clusterBytes, clusterBits, sizeBytes, l1EntryCount } = geometry;
  const cluster = Buffer.alloc(clusterBytes);
  cluster.writeUInt32BE(MAGIC, 0);
  cluster.writeUInt32BE(VERSION, 4);
  cluster.writeUInt32BE(clusterBits, 20);
  cluster.writeBigUInt64BE(BigInt(sizeBytes), 24);
  cluster.writeUInt32BE(l1EntryCount, 36);
  const l1Cluster = l1EntryCount === 0 ? 0 : HEADER_CLUSTER_COUNT;
  cluster.writeBigUInt64BE(BigInt(l1Cluster * clusterBytes), 40);
  cluster.writeBigUInt64BE(BigInt(refcounts.tableFirstCluster * clusterBytes), 48);
  cluster.writeUInt32BE(refcounts.tableClusterCount, 56);
  cluster.writeUInt32BE(REFCOUNT_ORDER, 96);
  cluster.writeUInt32BE(HEADER_BYTES, 100);
  if (compressionType === "zstd") {
    cluster.writeUInt8(COMPRESSION_TYPE_BIT, 79);
    cluster.writeUInt8(ZSTD, 104);
  }
  const extensionsEnd = writeExtensions(cluster, backing);
  if (backing !== null) writeBackingName(name, cluster, extensionsEnd, backing.file);
  return cluster;
}

/** @returns the offset after the extension that ends the list, which is eight zero bytes. */
function writeExtensions(cluster: Buffer, backing: Backing | null): number {
  let at = HEADER_BYTES;
  if (backing?.format !== undefined) {
    at = writeExtension(cluster, at, EXTENSION_BACKING_FORMAT, Buffer.from(backing.format));
  }
  if (cluster.length >= FEATURE_NAMES_CLUSTER_BYTES_MIN) {
    at = writeExtension(cluster, at, EXTENSION_FEATURE_NAMES, featureNameTable());
  }
  return at + EXTENSION_HEADER_BYTES;
}

function writeExtension(cluster: Buffer, at: number, type: number, data: Buffer): number {
  cluster.writeUInt32BE(type, at);
  cluster.writeUInt32BE(data.length, at + 4);
  data.copy(cluster, at + EXTENSION_HEADER_BYTES);
  return at + EXTENSION_HEADER_BYTES + Math.ceil(data.length / 8) * 8;
}

function featureNameTable(): Buffer {
  const table = Buffer.alloc(FEATURE_NAMES.length * FEATURE_NAME_ENTRY_BYTES);
  FEATURE_NAMES.forEach(([type, bit, name], index) => {
    const at = index * FEATURE_NAME_ENTRY_BYTES;
    table.writeUInt8(type, at);
    table.writeUInt8(bit, at + 1);
    table.write(name, at + 2, "latin1");
  });
  return table;
}

function writeBackingName(name: string, cluster: Buffer, at: number, file: string): void {
  const bytes = nameBytes(file);
  const most = Math.min(BACKING_NAME_BYTES_MAX, cluster.length - at);
  if (bytes.length > most) {
    throw new CowcatcherError({
      code: "LIMIT",
      object: name,
      problem: `the backing file's name has ${bytes.length} bytes; at most ${most} fit into the header`,
      hint: "use a shorter, relative name, or larger clusters",
    });
  }
  bytes.copy(cluster, at);
  cluster.writeBigUInt64BE(BigInt(at), 8);
  cluster.writeUInt32BE(bytes.length, 16);
}
