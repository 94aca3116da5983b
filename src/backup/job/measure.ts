// How large a target would become: `qemu-img measure`, with its names and its results. Main thread.
//
// It goes by what metadata and the file system say of the source. So a copy may turn out smaller, as it leaves out
// zeroes that it meets in data, and a compressed one will be. For a target with a backing file QEMU assumes that
// nothing is left out.

import { geometryOf } from "../../cow/geometry.js";
import type { BlockStatus, Image } from "../../block/device.js";
import type { ImageFormat } from "../../block/format.js";
import { planFullImage, planGeometry, SECTOR_BYTES } from "../../target/qcow2/layout.js";
import { roundUp } from "../../units.js";

export interface MeasuredTarget {
  /** For errors. */
  path: string;
  format: ImageFormat;
  /** Of a qcow2 target, in bytes. */
  clusterSizeBytes: number;
  hasBacking: boolean;
  /** Only what the image's own layer allocates is copied (sync mode `top`). */
  topOnly: boolean;
}

export interface Measure {
  /** What the file takes for what the source holds now, in bytes, tables for the whole disk included. */
  requiredBytes: number;
  /** What it takes when a guest has written all of the disk. */
  fullyAllocatedBytes: number;
}

/** @throws CowcatcherError as the image's blockStatus, and as planGeometry. */
export async function measureTarget(image: Image, target: MeasuredTarget): Promise<Measure> {
  const sizeBytes = roundUp(image.sizeBytes, SECTOR_BYTES);
  // Holes count towards a raw file's size.
  if (target.format === "raw") return { requiredBytes: sizeBytes, fullyAllocatedBytes: sizeBytes };
  const { clusterBytes } = planGeometry(target.path, sizeBytes, target.clusterSizeBytes);
  const diskBytes = roundUp(sizeBytes, clusterBytes);
  const fullyAllocatedBytes = planFullImage(diskBytes, clusterBytes);
  const isWhole = target.hasBacking && !target.topOnly;
  const dataBytes = isWhole
    ? diskBytes
    : target.topOnly
      ? await topClusterBytes(image, clusterBytes)
      : await dataClusterBytes(image, clusterBytes, 0, image.sizeBytes);
  return { requiredBytes: fullyAllocatedBytes - diskBytes + dataBytes, fullyAllocatedBytes };
}

/** As dataClusterBytes, of the clusters of the copy (cow/chunk-copy.ts) of which the image's own layer allocates a part. */
async function topClusterBytes(image: Image, clusterBytes: number): Promise<number> {
  const { sizeBytes } = image;
  const copied = geometryOf(sizeBytes, image.clusterSizeBytes, clusterBytes).clusterBytes;
  let bytes = 0;
  for (let offset = 0; offset < sizeBytes;) {
    const status = await statusAt(image, offset, sizeBytes);
    const end = offset + status.lengthBytes;
    const isOwn = status.present && status.depth === 0;
    if (isOwn) {
      const from = offset - (offset % copied);
      offset = Math.min(roundUp(end, copied), sizeBytes);
      bytes += await dataClusterBytes(image, clusterBytes, from, offset);
    } else {
      offset = end;
    }
  }
  return bytes;
}

/** Bytes of the target's clusters in which the source has data in [from, to); `from` is at the start of one. */
async function dataClusterBytes(
  image: Image,
  clusterBytes: number,
  from: number,
  to: number,
): Promise<number> {
  let bytes = 0;
  for (let offset = from; offset < to;) {
    const status = await statusAt(image, offset, to);
    let end = offset + status.lengthBytes;
    if (status.data && status.present && !status.zero) {
      end = roundUp(end, clusterBytes);
      bytes += end - offset + (offset % clusterBytes);
    }
    offset = end;
  }
  return bytes;
}

async function statusAt(image: Image, offset: number, to: number): Promise<BlockStatus> {
  const pending = image.blockStatus(offset, to - offset);
  return pending instanceof Promise ? await pending : pending;
}
