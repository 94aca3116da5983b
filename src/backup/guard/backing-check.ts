// What a target is to build on, looked at before the target is made, and held until it is done. Main thread.
//
// The name goes into the target's header as it is, and whoever opens the target resolves it against the target's
// folder; so is it opened here, with what it builds on itself: a target on a file that is missing or broken would be
// no backup. Its format must be named: probing would let the guest of a raw disk choose what the disk is. Nor may it be,
// by any name, what the target replaces, or a disk that a guest writes (target-guard.ts).
//
// A job keeps it open, and so locked, until it ends: no one else may write it then.
//
// One exception: what holds a disk's old data alone is laid on that very disk, to show both as one (block/replication.c's
// hidden disk, image fleecing). The server has it open already, and locked.

import { CowcatcherError } from "../../errors.js";
import type { Image } from "../../block/device.js";
import { openImage, resolveBackingPath } from "../../image/open.js";
import type { TargetOptions } from "../../target/target.js";
import type { JobOptions } from "../options.js";
import {
  type InUseParts,
  isSourceImage,
  NOTHING_IN_USE,
  refuseBackingAsTarget,
  refuseChangingBacking,
  refuseChangingBackingFile,
} from "./target-guard.js";

type BackedTarget = Pick<TargetOptions, "path" | "backingFile" | "backingFormat"> &
  Pick<JobOptions, "oldDataOnly">;

/** @throws CowcatcherError as openBacking */
export async function checkBacking(target: BackedTarget): Promise<void> {
  const backing = await openBacking(target);
  await backing?.close();
}

/**
 * @returns the chain that the target builds on, to be closed when the job is over; null if it builds on none, and if it
 *   holds the old data of the disk that it builds on
 * @throws CowcatcherError USAGE without a name or a format, for a target that is in its own backing chain, and for a
 *   backing file that a guest may write; what openImage throws.
 */
export async function openBacking(
  target: BackedTarget,
  inUse: InUseParts = NOTHING_IN_USE,
): Promise<Image | null> {
  const { path, backingFile, backingFormat: format } = target;
  if (backingFile === undefined) return null;
  if (backingFile === "") {
    throw new CowcatcherError({ code: "USAGE", object: path, problem: "the backing file's name is empty" });
  }
  if (format === undefined) {
    throw new CowcatcherError({
      code: "USAGE",
      object: backingFile,
      problem: "the backing file's format is missing",
      hint: "name it: raw or qcow2",
    });
  }
  const backingPath = resolveBackingPath(path, backingFile, format);
  if (target.oldDataOnly === true && (await isSourceImage(backingPath, inUse))) return null;
  await refuseChangingBackingFile(path, backingPath, inUse);
  const backing = await openImage(backingPath, { format, readOnly: true });
  try {
    await refuseBackingAsTarget(path, backing);
    await refuseChangingBacking(path, backing, inUse);
    return backing;
  } catch (error) {
    await backing.close();
    throw error;
  }
}
