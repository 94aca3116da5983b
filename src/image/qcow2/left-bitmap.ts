// A bitmap that is left in an image which is closed, for a QEMU to write its changes to until the image is opened here
// again: enabled, not in use, and with one bit set, that of the disk's end.
//
// Who opens the image for writing and knows bitmaps marks it as in use, records what it writes, and stores it anew when
// it closes the image; who does not know them clears the autoclear bit. So all that was written is in it, if
//
//   the autoclear bit is set        every program since has known bitmaps, or obeyed the specification
//   it is enabled, and not in use   nobody switched it off, or died
//   the bit of the end is set       the disk was never cut below that in between: what grows again reads as zeroes, and
//                                   QEMU sets no bit for it
//   it was stored by somebody else  the file was changed, or nobody would ask; so one that stands where it was put says
//                                   that the change was made by a program that obeys nothing
//
// For the last one QEMU's order is used: it allocates a bitmap's data before its table, upwards (store_bitmap in
// block/qcow2-bitmap.c of qemu/qemu); here the data is put behind the table. Whoever stores in another order is taken for
// a program that does not know bitmaps: the safe side.
//
// Specification: docs/interop/qcow2.rst of qemu/qemu, "Bitmaps". Main thread.

import { CowcatcherError } from "../../errors.js";
import { setBitmapsValid, writeBitmapsExtension } from "./format/bitmap-extension.js";
import {
  type DirtyBitmap,
  encodeBitmapDirectory,
  MAX_GRANULARITY_BITS,
  readBitmapDirectory,
  readBitmapTable,
  readDirtyBitmap,
} from "./format/bitmap.js";
import type { QcowFile } from "./format/file.js";
import { hasExternalDataFile, type Qcow2Header } from "./format/header.js";
import type { Refcounts } from "./guest/refcounts.js";

/** QEMU's own choice. */
const GRANULARITY_BITS = 16;

export interface HostRange {
  offsetBytes: number;
  lengthBytes: number;
}

/**
 * What others have written since the bitmap was left.
 * @param sizeThen of the disk, in bytes, when it was left
 * @returns undefined where it does not tell. @throws CowcatcherError IO
 */
export function readLeftBitmap(
  header: Qcow2Header,
  file: QcowFile,
  name: string,
  sizeThen: number,
): DirtyBitmap | undefined {
  try {
    const entry = readBitmapDirectory(header, file).find((each) => each.name === name);
    if (entry?.isAuto !== true || sizeThen === 0 || sizeThen > header.sizeBytes) return undefined;
    const bitmap = readDirtyBitmap(header, file, name);
    const { dirty } = bitmap.run(sizeThen - 1, 1);
    const granule = Math.floor((sizeThen - 1) / bitmap.granularityBytes);
    const bitsPerCluster = 2 ** header.clusterBits * 8;
    const dataAt = readBitmapTable(header, file, entry)[Math.floor(granule / bitsPerCluster)] ?? 0;
    const isAsItWasPut = dataAt > entry.tableOffset;
    return dirty && !isAsItWasPut ? bitmap : undefined;
  } catch (error) {
    if (error instanceof CowcatcherError && error.code !== "IO") return undefined;
    throw error;
  }
}

/** The clusters of all bitmaps of the image, with their directory. Nothing where they cannot be found for certain. */
export function rangesOfBitmaps(header: Qcow2Header, file: QcowFile): HostRange[] {
  if (header.bitmaps === null) return [];
  const clusterSizeBytes = 2 ** header.clusterBits;
  const { directoryOffset, directoryBytes } = header.bitmaps;
  const ranges = [{ offsetBytes: directoryOffset, lengthBytes: directoryBytes }];
  try {
    for (const entry of readBitmapDirectory(header, file)) {
      ranges.push({ offsetBytes: entry.tableOffset, lengthBytes: entry.tableEntries * 8 });
      for (const dataAt of readBitmapTable(header, file, entry)) {
        if (dataAt !== 0) ranges.push({ offsetBytes: dataAt, lengthBytes: clusterSizeBytes });
      }
    }
  } catch {
    return [];
  }
  const isSound = ranges.every(({ offsetBytes }) => offsetBytes > 0 && offsetBytes % clusterSizeBytes === 0);
  return isSound ? ranges : [];
}

/**
 * Leaves the bitmap, whose name is not to be longer than a UUID and a few words; all others are gone. The image must be
 * flushed, and nothing is to be written to it any more.
 * @param flush makes refcounts durable
 * @returns false where the image cannot have one, or has no room for it: it is as it was
 * @throws CowcatcherError IO, NO_SPACE: what was taken for the bitmap is a leak at worst.
 */
export async function leaveBitmap(
  header: Qcow2Header,
  file: QcowFile,
  refcounts: Refcounts,
  flush: () => Promise<void>,
  name: string,
): Promise<boolean> {
  if (header.version < 3 || hasExternalDataFile(header) || header.sizeBytes === 0) return false;
  const clusterSizeBytes = 2 ** header.clusterBits;
  const shape = shapeOf(header);
  if (shape === undefined) return false;
  const taken = [0, 0, 0].map(() => refcounts.allocate(1)).sort((a, b) => a - b);
  const [directoryAt = 0, tableAt = 0, dataAt = 0] = taken;
  const directory = encodeBitmapDirectory({ name, tableOffset: tableAt, ...shape });
  const data = new Uint8Array(clusterSizeBytes);
  const lastBit = Math.floor((header.sizeBytes - 1) / 2 ** shape.granularityBits) % (clusterSizeBytes * 8);
  data[lastBit >>> 3] = 1 << (lastBit & 7);
  const table = new Uint8Array(clusterSizeBytes);
  new DataView(table.buffer).setBigUint64((shape.tableEntries - 1) * 8, BigInt(dataAt));
  await file.write(data, 0, data.length, dataAt);
  await file.write(table, 0, table.length, tableAt);
  await file.write(directory, 0, directory.length, directoryAt);
  await flush();
  const extension = { bitmapCount: 1, directoryBytes: directory.length, directoryOffset: directoryAt };
  if (!(await writeBitmapsExtension(header, file, extension))) {
    for (const offsetBytes of taken) refcounts.unallocate(offsetBytes, 1);
    await flush();
    return false;
  }
  await setBitmapsValid(header, file, true);
  return true;
}

/** As fine as a table of one cluster allows. */
function shapeOf({
  sizeBytes,
  clusterBits,
}: Qcow2Header): { granularityBits: number; tableEntries: number } | undefined {
  const clusterSizeBytes = 2 ** clusterBits;
  for (let granularityBits = GRANULARITY_BITS; granularityBits <= MAX_GRANULARITY_BITS; granularityBits++) {
    const bitCount = Math.ceil(sizeBytes / 2 ** granularityBits);
    const tableEntries = Math.ceil(bitCount / (clusterSizeBytes * 8));
    if (tableEntries * 8 <= clusterSizeBytes) return { granularityBits, tableEntries };
  }
  return undefined;
}
