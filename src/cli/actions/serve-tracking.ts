// `serve --tracking`: a tracker for each disk that is served for writing, in a folder of its own.
//
// By default the folder stands beside the image, on the guest's own storage. A device's would stand in /dev, and an
// export has no place here: these are tracked where --tracking-dir says so. What was not asked for and cannot be had
// keeps no guest from its disk: the server says so and goes on without.

import { closeSync, constants, fstatSync, openSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import type { Image } from "../../block/device.js";
import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import { absoluteName } from "../../file-names.js";
import { NbdImage } from "../../nbd/client/device.js";
import { currentBoot, identityOf, looksOf } from "../../tracking/fingerprint.js";
import { FileFolder } from "../../tracking/folder.js";
import { DiskTracker } from "../../tracking/tracker.js";
import type { ServedImage, TrackingSettings } from "../options/serve-options.js";
import type { CommandContext } from "../output/context.js";
import { warn } from "../output/report.js";

const FOLDER_SUFFIX = ".cowcatcher";

export interface TrackedDisks {
  /** By the name under which the disk is served. */
  readonly byName: ReadonlyMap<string, DiskTracker>;
  /** Before the images are closed. */
  imagesClose(): void;
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
  const fds: number[] = [];
  const close = async (): Promise<void> => {
    const closed = await Promise.allSettled([...byName.values()].map((tracker) => tracker.close()));
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
  const imagesClose = (): void => {
    for (const tracker of byName.values()) tracker.imageCloses();
  };
  return { byName, imagesClose, close };
}

/** Undefined: not tracked. */
function folderOf(served: ServedImage, image: Image, settings: TrackingSettings): string | undefined {
  if (settings.directory !== undefined) return join(settings.directory, served.name + FOLDER_SUFFIX);
  const [file] = image.files;
  const isFile = file !== undefined && fstatSync(file.fd).isFile();
  if (isFile) {
    const path = absoluteName(served.path);
    return join(dirname(path), basename(path) + FOLDER_SUFFIX);
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
        // What a bitmap in the image could tell is not kept there (docs/tracking.md).
        writesOfOthers: () => Promise.resolve(undefined),
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
