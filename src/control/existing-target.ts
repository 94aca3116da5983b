// A target that is there already: `mode` existing of drive-backup, and blockdev-backup's nodes. QEMU writes into the image
// as it stands. Here a new file of its form takes its place when the backup is complete, so that a failed one leaves it as
// it was; only a raw one that is brought up to date is written in place.

import { statSync } from "node:fs";
import type { DiskInfo } from "../backup/host.js";
import type { JobOptions } from "../backup/options.js";
import type { ImageFormat } from "../block/format.js";
import type { BlockStatus } from "../block/device.js";
import { openImage } from "../image/open.js";
import type { CompressionType } from "../image/qcow2/format/header.js";
import { Qcow2Image } from "../image/qcow2/image.js";
import { isNbdUri } from "../nbd/wire/uri.js";
import { isRbdAddress } from "../rbd/address.js";
import { genericError } from "../qmp/protocol.js";
import { requireFile } from "./target-nodes.js";

type Existing = Pick<JobOptions, "force"> &
  Partial<Pick<JobOptions, "backingFile" | "backingFormat" | "clusterSizeBytes">> & {
    /** How the image's compressed clusters are compressed, if it has any. */
    compressionType?: CompressionType;
  };

/**
 * What a backup into the image at `path` goes by.
 * @throws QmpError GenericError for an image of another size, and for one with data to which a part of the disk would be
 *   added; CowcatcherError NOT_FOUND, FORMAT, LOCKED, IO.
 */
export async function existingTarget(
  path: string,
  format: ImageFormat,
  { sizeBytes }: DiskInfo,
  isPart: boolean,
): Promise<Existing> {
  if (isNbdUri(path) || isRbdAddress(path)) return { force: true };
  await requireFile(path);
  if (format === "raw") {
    const stats = statSync(path);
    if (stats.isFile() && stats.size !== sizeBytes) throw sizesDiffer();
    return { force: true };
  }
  const image = await openImage(path, { format, readOnly: true, backing: false });
  try {
    if (image.sizeBytes !== sizeBytes) throw sizesDiffer();
    if (isPart && !(await isEmpty(image))) {
      throw genericError(`'${path}' has data already: only an empty image can take a part of the disk`);
    }
    if (!(image instanceof Qcow2Image)) return { force: true };
    const { backingFile, backingFormat, compressionType } = image.header;
    return {
      force: true,
      compressionType,
      clusterSizeBytes: image.clusterSizeBytes,
      ...(backingFile !== null && { backingFile }),
      ...((backingFormat === "raw" || backingFormat === "qcow2") && { backingFormat }),
    };
  } finally {
    await image.close();
  }
}

function sizesDiffer(): Error {
  return genericError("Source and target image have different sizes");
}

interface Mapped {
  sizeBytes: number;
  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus>;
}

async function isEmpty(image: Mapped): Promise<boolean> {
  for (let at = 0; at < image.sizeBytes;) {
    const { present, lengthBytes } = await image.blockStatus(at, image.sizeBytes - at);
    if (present) return false;
    at += lengthBytes;
  }
  return true;
}
