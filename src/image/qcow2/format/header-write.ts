// The other way: a Qcow2Header becomes the first cluster of an image (qcow2 specification: "Header", "Header
// extensions", "Feature name table"). Pure, as header.ts is.

import { nameBytes } from "../../../file-names.js";
import {
  EXTENSION_BACKING_FORMAT,
  EXTENSION_EXTERNAL_DATA,
  EXTENSION_FEATURE_NAMES,
  type HeaderExtension,
  limitError,
  MAX_BACKING_NAME_BYTES,
  QCOW2_MAGIC,
  type Qcow2Header,
  V2_HEADER_BYTES,
  V3_HEADER_BYTES_WRITTEN,
  viewOf,
} from "./header.js";

/**
 * The first cluster of an image: fields, extensions, end marker, then the backing name. `headerLengthBytes` is
 * ignored (72 for version 2, 112 for version 3); backing format, external data file and bitmaps come from
 * `extensions` if present there, else from the named fields.
 * @throws CowcatcherError LIMIT where it does not fit in a cluster.
 */
export function serialiseHeader(header: Qcow2Header, name: string): Uint8Array {
  const bytes = new Uint8Array(2 ** header.clusterBits);
  const view = viewOf(bytes);
  const isV3 = header.version === 3;
  view.setUint32(0, QCOW2_MAGIC);
  view.setUint32(4, header.version);
  view.setUint32(20, header.clusterBits);
  view.setBigUint64(24, BigInt(header.sizeBytes));
  view.setUint32(32, header.cryptMethod);
  view.setUint32(36, header.l1Size);
  view.setBigUint64(40, BigInt(header.l1TableOffset));
  view.setBigUint64(48, BigInt(header.refcountTableOffset));
  view.setUint32(56, header.refcountTableClusters);
  view.setUint32(60, header.snapshotCount);
  view.setBigUint64(64, BigInt(header.snapshotsOffset));
  if (isV3) {
    view.setBigUint64(72, header.incompatibleFeatures);
    view.setBigUint64(80, header.compatibleFeatures);
    view.setBigUint64(88, header.autoclearFeatures);
    view.setUint32(96, header.refcountOrder);
    view.setUint32(100, V3_HEADER_BYTES_WRITTEN);
    view.setUint8(104, header.compressionType === "zstd" ? 1 : 0);
  }
  let offset = isV3 ? V3_HEADER_BYTES_WRITTEN : V2_HEADER_BYTES;
  for (const { type, data } of extensionsToWrite(header)) {
    const nextOffset = offset + 8 + Math.ceil(data.length / 8) * 8;
    if (nextOffset + 8 > bytes.length)
      throw limitError(name, "the header with its extensions", "one cluster");
    view.setUint32(offset, type);
    view.setUint32(offset + 4, data.length);
    bytes.set(data, offset + 8);
    offset = nextOffset;
  }
  offset += 8; // the end marker: type and length zero
  if (header.backingFile !== null) writeBackingName(bytes, header.backingFile, offset, name);
  return bytes;
}

function writeBackingName(bytes: Uint8Array, backingFile: string, offset: number, name: string): void {
  const encoded = nameBytes(backingFile);
  if (encoded.length > MAX_BACKING_NAME_BYTES || offset + encoded.length > bytes.length) {
    throw limitError(
      name,
      `the backing file name of ${encoded.length} bytes`,
      `${Math.min(MAX_BACKING_NAME_BYTES, bytes.length - offset)} bytes with this cluster size`,
    );
  }
  viewOf(bytes).setBigUint64(8, BigInt(offset));
  viewOf(bytes).setUint32(16, encoded.length);
  bytes.set(encoded, offset);
}

function extensionsToWrite(header: Qcow2Header): HeaderExtension[] {
  const extensions = [...header.extensions];
  const addMissing = (type: number, text: string | null): void => {
    if (text === null || extensions.some((extension) => extension.type === type)) return;
    extensions.unshift({ type, data: nameBytes(text) });
  };
  addMissing(EXTENSION_EXTERNAL_DATA, header.externalDataFile);
  addMissing(EXTENSION_BACKING_FORMAT, header.backingFormat);
  return extensions;
}

/** The feature name table of a new version 3 image; every feature that this version knows. */
export function featureNameTable(): HeaderExtension {
  const names: [kind: number, bit: number, text: string][] = [
    [0, 0, "dirty bit"],
    [0, 1, "corrupt bit"],
    [0, 2, "external data file"],
    [0, 3, "compression type"],
    [0, 4, "extended L2 entries"],
    [1, 0, "lazy refcounts"],
    [2, 0, "bitmaps"],
    [2, 1, "raw external data"],
  ];
  const data = new Uint8Array(names.length * 48);
  names.forEach(([kind, bit, text], index) => {
    data[index * 48] = kind;
    data[index * 48 + 1] = bit;
    data.set(Buffer.from(text, "latin1"), index * 48 + 2);
  });
  return { type: EXTENSION_FEATURE_NAMES, data };
}
