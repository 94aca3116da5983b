// Opening the file of an image: regular files and block devices, nothing else.

import { constants } from "node:fs";
import type { Stats } from "node:fs";
import { CowcatcherError, errnoOf, ioError } from "../../errors.js";
import { openFile, statPath } from "./fileio.js";
import { refuseReadOnlyDevice } from "./read-only-device.js";

/**
 * Opens a regular file or a block device; nothing else can be an image.
 * @throws CowcatcherError NOT_FOUND, IO or UNSUPPORTED
 */
export async function openImageFile(
  imagePath: string,
  { readOnly, direct }: { readOnly: boolean; direct: boolean },
): Promise<number> {
  try {
    // Before opening: to open a FIFO would wait for its other end.
    const stats = await statPath(imagePath);
    assertImageFile(imagePath, stats);
    if (!readOnly) await refuseReadOnlyDevice(imagePath, stats);
    const access = readOnly ? constants.O_RDONLY : constants.O_RDWR;
    return await openFile(imagePath, access | (direct ? constants.O_DIRECT : 0));
  } catch (error) {
    if (direct && errnoOf(error) === "EINVAL") {
      throw new CowcatcherError({
        code: "UNSUPPORTED",
        object: imagePath,
        problem: "the file system there refuses O_DIRECT",
        hint: "leave --direct out",
      });
    }
    throw ioError("open", imagePath, error);
  }
}

function assertImageFile(imagePath: string, stats: Stats): void {
  if (stats.isFile() || stats.isBlockDevice()) return;
  const kind = stats.isDirectory()
    ? "a directory"
    : stats.isFIFO()
      ? "a FIFO"
      : stats.isSocket()
        ? "a socket"
        : "a character device";
  throw new CowcatcherError({
    code: "IO",
    object: imagePath,
    problem: `is ${kind}, not an image`,
    hint: "name a regular file or a block device",
  });
}
