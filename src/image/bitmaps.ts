// A persistent dirty bitmap of an image: looked for in the image, then in its backing files, as QEMU does. Main thread.

import { CowcatcherError } from "../errors.js";
import type { Image } from "../block/device.js";
import type { DirtyBitmap } from "./qcow2/format/bitmap.js";
import { Qcow2Image } from "./qcow2/image.js";

/** Whether the image or one of its backing files has a bitmap of this name, of use or not. */
export function hasBitmap(image: Image, name: string): boolean {
  return ownerOf(image, name) !== undefined;
}

/**
 * @throws CowcatcherError NOT_FOUND; UNSUPPORTED for the bitmap of a disk of another size; FORMAT, UNSUPPORTED, LIMIT
 *   for one that cannot be relied on (qcow2/bitmap.ts); IO.
 */
export function readImageBitmap(image: Image, name: string): DirtyBitmap {
  const owner = ownerOf(image, name);
  if (owner === undefined) throw noBitmap([image], name);
  if (owner.sizeBytes === image.sizeBytes) return owner.readBitmap(name);
  throw new CowcatcherError({
    code: "UNSUPPORTED",
    object: owner.name,
    problem: `bitmap '${name}' is of a disk of another size than ${image.name}`,
  });
}

/**
 * What changed on the disk since the bitmap was cleared. One of a backing file knows nothing of the layers above it:
 * what these provide has changed, too. (QEMU exports such a bitmap as it stands, and refuses a backup that goes by it.)
 * @throws CowcatcherError as readImageBitmap; what blockStatus throws.
 */
export async function readChanges(image: Image, name: string): Promise<DirtyBitmap> {
  const bitmap = readImageBitmap(image, name);
  const owner = ownerOf(image, name);
  let depth = 0;
  let isSameSize = true;
  for (let layer: Image | null = image; layer !== null && layer !== owner; layer = layer.backing) {
    depth++;
    isSameSize &&= layer.sizeBytes === image.sizeBytes;
  }
  for (let at = 0; depth > 0 && at < image.sizeBytes;) {
    const pending = image.blockStatus(at, image.sizeBytes - at);
    const status = pending instanceof Promise ? await pending : pending;
    // Beyond the end of a shorter layer the disk reads as zeroes, whatever lies below.
    const isBelow = status.present ? status.depth >= depth : isSameSize;
    if (!isBelow) bitmap.markDirty(at, status.lengthBytes);
    at += status.lengthBytes;
  }
  return bitmap;
}

/** The error NOT_FOUND for a bitmap that none of the images has; names those that they have. */
export function noBitmap(images: readonly Image[], name: string): CowcatcherError {
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: images.map((image) => image.name).join(", "),
    problem: `has no bitmap '${name}'`,
    hint: "cowcatcher info lists an image's bitmaps",
  });
}

function ownerOf(image: Image, name: string): Qcow2Image | undefined {
  for (let layer: Image | null = image; layer !== null; layer = layer.backing) {
    if (layer instanceof Qcow2Image && layer.bitmapNames().includes(name)) return layer;
  }
  return undefined;
}
