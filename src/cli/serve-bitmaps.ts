// `serve --bitmap NAME`: persistent bitmaps of a served qcow2 image as metadata contexts, as `qemu-nbd -B` has it.
//
// The rule: only of images that are served read-only. cowcatcher does not record guest writes in bitmaps, and marks
// them as out of date when it opens an image for writing, so a bitmap of a disk that a guest writes would soon lie.
// A bitmap is looked for in the image, then in its backing files, as QEMU does.

import type { Image } from "../image/device.js";
import { Qcow2Image } from "../image/qcow2/image.js";
import { NBD_META_DIRTY_BITMAP_PREFIX, NBD_STATE_DIRTY } from "../nbd/protocol.js";
import type { StatusContext } from "../nbd/export.js";
import { CowcatcherError } from "../errors.js";

/**
 * The contexts of each image: those of the named bitmaps that it has.
 * @throws CowcatcherError NOT_FOUND for a bitmap that no image has; FORMAT, UNSUPPORTED, LIMIT for one that is there
 *   but cannot be used; IO.
 */
export function bitmapContexts(images: readonly Image[], names: readonly string[]): StatusContext[][] {
  for (const name of names) {
    if (images.some((image) => ownerOf(image, name) !== undefined)) continue;
    throw new CowcatcherError({
      code: "NOT_FOUND",
      object: images.map((image) => image.name).join(", "),
      problem: `has no bitmap '${name}'`,
      hint: "cowcatcher info lists an image's bitmaps",
    });
  }
  return images.map((image) =>
    names.flatMap((name) => {
      const owner = ownerOf(image, name);
      return owner === undefined ? [] : [contextOf(image, owner, name)];
    }),
  );
}

function ownerOf(image: Image, name: string): Qcow2Image | undefined {
  for (let layer: Image | null = image; layer !== null; layer = layer.backing) {
    if (layer instanceof Qcow2Image && layer.bitmapNames().includes(name)) return layer;
  }
  return undefined;
}

function contextOf(image: Image, owner: Qcow2Image, name: string): StatusContext {
  if (owner.sizeBytes !== image.sizeBytes) {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: owner.name,
      problem: `bitmap '${name}' is of a disk of another size than ${image.name}`,
    });
  }
  const bitmap = owner.readBitmap(name);
  return {
    name: `${NBD_META_DIRTY_BITMAP_PREFIX}${name}`,
    status(offsetBytes, lengthBytes) {
      const run = bitmap.run(offsetBytes, lengthBytes);
      return { lengthBytes: run.lengthBytes, flags: run.dirty ? NBD_STATE_DIRTY : 0 };
    },
  };
}
