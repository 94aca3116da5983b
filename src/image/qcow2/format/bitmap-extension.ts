// The header's bitmaps extension, written into an image that is in use: nothing else in the header may suffer, whatever
// the moment at which the power goes. (QEMU writes the whole header cluster anew, in one write that may be torn.)
//
// All of it happens while the autoclear bit is off, so that nobody looks at what the extension says until it is whole:
//
//   it is there already   its 24 bytes are written over
//   else                  it takes the place of the end marker. First the backing name that stands there moves behind it
//                         (a copy ─► sync ─► its offset, within a sector ─► sync), then come the data and a new end
//                         marker ─► sync ─► the 8 bytes of type and length, within a sector ─► sync
//
// Specification: docs/interop/qcow2.rst of qemu/qemu, "Header extensions", "Bitmaps extension". Main thread.

import type { QcowFile } from "./file.js";
import {
  AUTOCLEAR_BITMAPS,
  type BitmapsExtension,
  EXTENSION_BITMAPS,
  FIELD_OFFSET,
  type Qcow2Header,
  viewOf,
} from "./header.js";

const HEAD_BYTES = 8;
const DATA_BYTES = 24;
const BACKING_OFFSET_AT = 8;
const BACKING_SIZE_AT = 16;

/**
 * Durable when it is fulfilled; the header in memory follows.
 * @returns false where the header's cluster has no room for it: nothing has changed then
 * @throws CowcatcherError IO
 */
export async function writeBitmapsExtension(
  header: Qcow2Header,
  file: QcowFile,
  bitmaps: BitmapsExtension,
): Promise<boolean> {
  const data = encode(bitmaps);
  const { dataAt, endAt } = places(header);
  if (dataAt !== undefined) {
    await writeAt(file, data, dataAt);
  } else {
    if (!(await makeRoom(header, file, endAt))) return false;
    const tail = new Uint8Array(DATA_BYTES + HEAD_BYTES);
    tail.set(data);
    await writeAt(file, tail, endAt + HEAD_BYTES);
    const head = new Uint8Array(HEAD_BYTES);
    viewOf(head).setUint32(0, EXTENSION_BITMAPS);
    viewOf(head).setUint32(4, DATA_BYTES);
    await writeAt(file, head, endAt);
  }
  const others = header.extensions.filter(({ type }) => type !== EXTENSION_BITMAPS);
  if (dataAt === undefined) header.extensions = [...others, { type: EXTENSION_BITMAPS, data }];
  else header.extensions.forEach((each) => each.type === EXTENSION_BITMAPS && each.data.set(data));
  header.bitmaps = bitmaps;
  return true;
}

/** Whether the bitmaps of the image can be relied on. Durable when it is fulfilled. @throws CowcatcherError IO */
export async function setBitmapsValid(header: Qcow2Header, file: QcowFile, isValid: boolean): Promise<void> {
  const { autoclearFeatures } = header;
  const features = isValid ? autoclearFeatures | AUTOCLEAR_BITMAPS : autoclearFeatures & ~AUTOCLEAR_BITMAPS;
  const field = new Uint8Array(8);
  viewOf(field).setBigUint64(0, features);
  await writeAt(file, field, FIELD_OFFSET.autoclearFeatures);
  header.autoclearFeatures = features;
}

function encode({ bitmapCount, directoryBytes, directoryOffset }: BitmapsExtension): Uint8Array {
  const data = new Uint8Array(DATA_BYTES);
  const view = viewOf(data);
  view.setUint32(0, bitmapCount);
  view.setBigUint64(8, BigInt(directoryBytes));
  view.setBigUint64(16, BigInt(directoryOffset));
  return data;
}

/** Where the extension's data stands, if there is one, and where the end marker does. */
function places({ headerLengthBytes, extensions }: Qcow2Header): {
  dataAt: number | undefined;
  endAt: number;
} {
  let dataAt: number | undefined;
  let endAt = headerLengthBytes;
  for (const { type, data } of extensions) {
    if (type === EXTENSION_BITMAPS) dataAt = endAt + HEAD_BYTES;
    endAt += HEAD_BYTES + Math.ceil(data.length / 8) * 8;
  }
  return { dataAt, endAt };
}

/** Nothing but an end marker is needed any more from endAt on, as far as the extension and a new marker go. */
async function makeRoom({ clusterBits }: Qcow2Header, file: QcowFile, endAt: number): Promise<boolean> {
  const cluster = new Uint8Array(Math.min(2 ** clusterBits, file.endOffset));
  file.readSync(cluster, 0, cluster.length, 0);
  const view = viewOf(cluster);
  const newEnd = endAt + HEAD_BYTES + DATA_BYTES + HEAD_BYTES;
  const hasMarker = endAt + HEAD_BYTES <= cluster.length && view.getBigUint64(endAt) === 0n;
  if (!hasMarker || newEnd > cluster.length) return false;
  const nameAt = Number(view.getBigUint64(BACKING_OFFSET_AT));
  const nameBytes = nameAt === 0 ? 0 : view.getUint32(BACKING_SIZE_AT);
  if (nameBytes === 0 || nameAt >= newEnd) return true;
  const newNameAt = Math.ceil(Math.max(newEnd, nameAt + nameBytes) / 8) * 8;
  if (newNameAt + nameBytes > cluster.length) return false;
  await writeAt(file, cluster.slice(nameAt, nameAt + nameBytes), newNameAt);
  const field = new Uint8Array(8);
  viewOf(field).setBigUint64(0, BigInt(newNameAt));
  await writeAt(file, field, BACKING_OFFSET_AT);
  return true;
}

async function writeAt(file: QcowFile, bytes: Uint8Array, offsetBytes: number): Promise<void> {
  await file.write(bytes, 0, bytes.length, offsetBytes);
  await file.sync();
}
