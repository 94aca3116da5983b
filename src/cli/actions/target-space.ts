// Whether a target's file system has room for it, said before the copy begins and not after hours of it.
//
// What will be needed is known from above only: a copy leaves out zeroes that it meets in data, and compression makes it
// smaller by nobody knows how much. So it is a warning, and none for a compressed target.
import { stat, statfs } from "node:fs/promises";
import { dirname } from "node:path";
import { systemName, absoluteName } from "../../file-names.js";
import type { Image } from "../../block/device.js";
import { formatBytes } from "../../units.js";
import { isNbdUri, isRbdAddress, NULL_TARGET, STDIO } from "../options/options.js";
import type { OutputSettings } from "../output/context.js";
import { warn } from "../output/report.js";

/** Of st_blocks (stat(2)). */
const STAT_BLOCK_BYTES = 512;

/** What a file at `target` may take, in bytes; undefined for what is no new file, or where that is not told. */
export async function freeBytesFor(target: string): Promise<number | undefined> {
  if (target === NULL_TARGET || target === STDIO || isNbdUri(target) || isRbdAddress(target))
    return undefined;
  try {
    const existing = await stat(systemName(target)).catch(() => undefined);
    if (existing?.isFile() === false) return undefined;
    const { bavail, bsize } = await statfs(systemName(dirname(absoluteName(target))));
    return bavail * bsize;
  } catch {
    // Whoever makes the target says what is wrong with its folder.
    return undefined;
  }
}

/** @param neededBytes the most that may be needed */
export async function warnOfSpace(
  output: OutputSettings,
  target: string,
  neededBytes: number,
): Promise<void> {
  const freeBytes = await freeBytesFor(target);
  if (freeBytes === undefined || freeBytes >= neededBytes) return;
  warn(
    output,
    `${target}: ${formatBytes(freeBytes)} are free there, and up to ${formatBytes(neededBytes)} may be needed`,
  );
}

/**
 * What the image and all that it builds on take of their storage, no more than the disk's size: about what there is to
 * copy. Undefined where that is unknown (an export, a device).
 */
export async function dataBytesOf(image: Image): Promise<number | undefined> {
  let bytes = 0;
  for (let layer: Image | null = image; layer !== null; layer = layer.backing) {
    if (layer.files.length === 0) return undefined;
    for (const { fd } of layer.files) {
      const stats = await stat(`/proc/self/fd/${fd}`).catch(() => undefined);
      if (stats?.isFile() !== true) return undefined;
      bytes += stats.blocks * STAT_BLOCK_BYTES;
    }
  }
  return Math.min(bytes, image.sizeBytes);
}
