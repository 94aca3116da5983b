// The benchmark's disk: full of random data, which no storage can compress and no backup can skip.

import { randomFillSync } from "node:crypto";
import { closeSync, openSync } from "node:fs";
import { ioError } from "../errors.js";
import type { Image } from "../block/device.js";
import type { ImageFormat } from "../block/format.js";
import { openImage } from "../image/open.js";
import { createQcow2, createRaw } from "../image/qcow2/create/create.js";
import { KiB, MiB } from "../units.js";

const PIECE_BYTES = 4 * MiB;
const CLUSTER_BYTES = 64 * KiB;

export interface DiskOptions {
  path: string;
  sizeBytes: number;
  format: ImageFormat;
  /** Called before each piece; what it throws ends the making. */
  check: () => void;
}

/** Makes the disk and syncs it, so that its writing back falls into no measurement. @throws CowcatcherError */
export async function makeDisk({ path, sizeBytes, format, check }: DiskOptions): Promise<void> {
  create(path, sizeBytes, format);
  const image = await openImage(path, { format, readOnly: false });
  try {
    await fill(image, check);
    await image.flush();
  } finally {
    await image.close();
  }
}

function create(path: string, sizeBytes: number, format: ImageFormat): void {
  let fd: number;
  try {
    fd = openSync(path, "wx+", 0o600);
  } catch (cause) {
    throw ioError("create", path, cause);
  }
  try {
    if (format === "qcow2") createQcow2(fd, path, { sizeBytes, clusterSizeBytes: CLUSTER_BYTES });
    else createRaw(fd, path, sizeBytes);
  } finally {
    closeSync(fd);
  }
}

async function fill(image: Image, check: () => void): Promise<void> {
  const piece = Buffer.alloc(PIECE_BYTES);
  for (let offset = 0; offset < image.sizeBytes; offset += PIECE_BYTES) {
    check();
    const lengthBytes = Math.min(PIECE_BYTES, image.sizeBytes - offset);
    await image.write(randomFillSync(piece), 0, lengthBytes, offset);
    // Signals are heard between two pieces, also where a write is done at once.
    await new Promise((resolve) => setImmediate(resolve));
  }
}
