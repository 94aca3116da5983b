// `serve --bitmap NAME`: persistent bitmaps of a served qcow2 image as metadata contexts, as `qemu-nbd -B` has it.
//
// The rule: only of images that are served read-only. cowcatcher does not record guest writes in bitmaps, and marks
// them as out of date when it opens an image for writing, so a bitmap of a disk that a guest writes would soon lie.

import { hasBitmap, noBitmap, readImageBitmap } from "../../image/bitmaps.js";
import type { Image } from "../../block/device.js";
import { Qcow2Image } from "../../image/qcow2/image.js";
import { NBD_META_DIRTY_BITMAP_PREFIX, NBD_STATE_DIRTY } from "../../nbd/wire/protocol.js";
import type { OutputSettings } from "../output/context.js";
import { isBitmapName } from "../../tracking/bitmap-name.js";
import { warn } from "../output/report.js";
import type { StatusContext } from "../../nbd/server/export.js";

/**
 * The contexts of each image: those of the named bitmaps that it has.
 * @throws CowcatcherError NOT_FOUND for a bitmap that no image has; FORMAT, UNSUPPORTED, LIMIT for one that is there
 *   but cannot be used; IO.
 */
export function bitmapContexts(images: readonly Image[], names: readonly string[]): StatusContext[][] {
  for (const name of names) {
    if (!images.some((image) => hasBitmap(image, name))) throw noBitmap(images, name);
  }
  return images.map((image) =>
    names.filter((name) => hasBitmap(image, name)).map((name) => contextOf(image, name)),
  );
}

/** To open an image for writing makes its persistent bitmaps out of date: that is not to be done in silence. */
export function warnOfBitmaps(image: Image, output: OutputSettings): void {
  if (!(image instanceof Qcow2Image)) return;
  const stale = image.staleBitmaps.filter((name) => !isBitmapName(name));
  if (stale.length === 0) return;
  const names = stale.map((name) => `'${name}'`).join(", ");
  warn(
    output,
    `${image.name}: its persistent bitmap${stale.length > 1 ? "s" : ""} ${names} will be out of date, as ` +
      "the guest's writes are not recorded there (backups with --bitmap need QEMU; --read-only leaves them valid)",
  );
}

function contextOf(image: Image, name: string): StatusContext {
  const bitmap = readImageBitmap(image, name);
  return {
    name: `${NBD_META_DIRTY_BITMAP_PREFIX}${name}`,
    status(offsetBytes, lengthBytes) {
      const run = bitmap.run(offsetBytes, lengthBytes);
      return { lengthBytes: run.lengthBytes, flags: run.dirty ? NBD_STATE_DIRTY : 0 };
    },
  };
}
