// A persistent dirty bitmap of an image: looked for in the image, then in its backing files, as QEMU does. Main thread.

import { CowcatcherError } from "../errors.js";
import type { Image } from "./device.js";
import type { DirtyBitmap } from "./qcow2/bitmap.js";
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
