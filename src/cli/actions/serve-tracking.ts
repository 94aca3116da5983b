// `serve --tracking`: a tracker for each disk that is served for writing, in a folder of its own.
//
// In a qcow2 image with checkpoints a bitmap is left at the end, for a QEMU that writes the image before it is served again
// (image/qcow2/left-bitmap.ts). What it tells is asked before the image is made ready to be written.
//
// By default the folder stands beside the image, on the guest's own storage. A device's would stand in /dev, and an
// export has no place here: these are tracked where --tracking-dir says so. What was not asked for and cannot be had
// keeps no guest from its disk: the server says so and goes on without.

import { closeSync, constants, fstatSync, openSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import type { Image } from "../../block/device.js";
import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import { absoluteName } from "../../file-names.js";
import { Qcow2Image } from "../../image/qcow2/image.js";
import { NbdImage } from "../../nbd/client/device.js";
import { bitmapName, isBitmapName } from "../../tracking/bitmap-name.js";
import { Bits } from "../../tracking/bits.js";
import { currentBoot, identityOf, looksOf } from "../../tracking/fingerprint.js";
import { FileFolder, TRACKING_SUFFIX } from "../../tracking/folder.js";
import { GRANULARITY_BYTES } from "../../tracking/opening.js";
import { DiskTracker } from "../../tracking/tracker.js";
import type { ServedImage, TrackingSettings } from "../options/serve-options.js";
import type { CommandContext } from "../output/context.js";
import { warn } from "../output/report.js";

export interface TrackedDisks {
  /** By the name under which the disk is served. */
  readonly byName: ReadonlyMap<string, DiskTracker>;
  /** When no guest's write can come any more, before the images are closed. Never rejects. */
  imagesClose(): Promise<void>;
  /** When the images are closed. */
  close(): Promise<void>;
}

/** @throws CowcatcherError where tracking was asked for and a disk cannot be tracked. */
export async function openTrackers(
  images: readonly { served: ServedImage; image: Image }[],
  settings: TrackingSettings,
  context: CommandContext,
): Promise<TrackedDisks> {
  const byName = new Map<string, DiskTracker>();
  /** UUIDs of those that were left, by disk. */
  const bitmaps = new Map<string, string>();
  const fds: number[] = [];
  const close = async (): Promise<void> => {
    const closed = await Promise.allSettled(
      [...byName].map(([name, tracker]) => tracker.close(bitmaps.get(name) ?? null)),
    );
    for (const fd of fds) closeSync(fd);
    for (const result of closed) {
      if (result.status === "rejected") context.logger.warn({ err: result.reason as unknown }, "tracking");
    }
  };
  try {
    for (const { served, image } of images) {
      if (settings.mode === "off" || image.readOnly) continue;
      const folder = folderOf(served, image, settings);
      if (folder === undefined) continue;
      try {
        byName.set(served.name, await openTracker(image, folder, settings.mode, fds, context));
      } catch (error) {
        if (settings.isAskedFor) throw error;
        warn(context.output, `${toCowcatcherError(error, folder).message}; its changes are not tracked`);
      }
    }
  } catch (error) {
    await close();
    throw error;
  }
  const imagesClose = async (): Promise<void> => {
    for (const { served, image } of images) {
      const tracker = byName.get(served.name);
      tracker?.imageCloses();
      const isOfUse = (tracker?.state.checkpoints.length ?? 0) > 0;
      const uuid = image instanceof Qcow2Image ? await leaveBitmap(image, isOfUse, context) : undefined;
      if (uuid !== undefined) bitmaps.set(served.name, uuid);
    }
  };
  return { byName, imagesClose, close };
}

/** @returns its UUID; undefined where there is none, and whatever writes the image will cost a full backup */
async function leaveBitmap(
  image: Qcow2Image,
  isOfUse: boolean,
  { logger }: CommandContext,
): Promise<string | undefined> {
  const uuid = crypto.randomUUID();
  try {
    if (isOfUse && (await image.leaveBitmap(bitmapName(uuid)))) return uuid;
    // The one of the last run is gone, and its clusters with it. Others' are not ours to free.
    if (image.staleBitmaps.every((name) => isBitmapName(name))) await image.freeOldBitmaps();
  } catch (error) {
    logger.warn({ err: error }, "no bitmap was left in the image for others to write their changes to");
  }
  return undefined;
}

/** What QEMU has written since the bitmap was left. */
function writesOfOthers(image: Image, uuid: string, sizeThen: number): Bits | undefined {
  const bitmap = image instanceof Qcow2Image ? image.writesSince(bitmapName(uuid), sizeThen) : undefined;
  if (bitmap === undefined) return undefined;
  const bits = new Bits(image.sizeBytes, GRANULARITY_BYTES);
  for (let at = 0; at < image.sizeBytes;) {
    const { lengthBytes, dirty } = bitmap.run(at, image.sizeBytes - at);
    if (dirty) bits.setBytes(at, lengthBytes);
    at += lengthBytes;
  }
  return bits;
}

/** Undefined: not tracked. */
function folderOf(served: ServedImage, image: Image, settings: TrackingSettings): string | undefined {
  if (settings.directory !== undefined) return join(settings.directory, served.name + TRACKING_SUFFIX);
  const [file] = image.files;
  const isFile = file !== undefined && fstatSync(file.fd).isFile();
  if (isFile) {
    const path = absoluteName(served.path);
    return join(dirname(path), basename(path) + TRACKING_SUFFIX);
  }
  if (!settings.isAskedFor) return undefined;
  throw new CowcatcherError({
    code: "USAGE",
    object: served.path,
    problem: "beside a device or an export there is no place for its tracking",
    hint: "give --tracking-dir",
  });
}

async function openTracker(
  image: Image,
  path: string,
  mode: "host" | "process",
  fds: number[],
  { logger }: CommandContext,
): Promise<DiskTracker> {
  const files = duplicates(image);
  if (files !== undefined) fds.push(...files);
  const [first] = files ?? [];
  const device = first === undefined ? undefined : fstatSync(first, { bigint: true });
  const folder = await FileFolder.open(path, device?.isFile() === true ? device.dev : undefined);
  try {
    const boot = await currentBoot();
    return await DiskTracker.open({
      folder,
      mode,
      boot,
      logger,
      flushImage: () => image.flush(),
      image: {
        sizeBytes: image.sizeBytes,
        identity: async () => (files === undefined ? undefined : identityOf(files, boot)),
        looks: async () =>
          files === undefined
            ? undefined
            : looksOf(files.slice(0, image.files.length), files.slice(image.files.length), boot),
        writesOfOthers: (uuid, sizeThen) => Promise.resolve(writesOfOthers(image, uuid, sizeThen)),
      },
    });
  } catch (error) {
    await folder.close();
    throw error;
  }
}

/**
 * Descriptors of our own of all the files that make up the disk, which outlive the image: its last write is made as it is
 * closed. Undefined where a part of it is an export, of which nothing can be known.
 */
function duplicates(image: Image): number[] | undefined {
  const files: number[] = [];
  for (let layer: Image | null = image; layer !== null; layer = layer.backing) {
    if (layer instanceof NbdImage) return undefined;
    files.push(...layer.files.map(({ fd }) => fd));
  }
  return files.map((fd) => openSync(`/proc/self/fd/${fd}`, constants.O_RDONLY));
}
