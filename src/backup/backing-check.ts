// What a target is to build on, looked at before the target is made. Main thread.
//
// The name goes into the target's header as it is, and whoever opens the target resolves it against the target's
// folder; so is it opened here, with what it builds on itself: a target on a file that is missing or broken would be
// no backup. Its format must be named: probing would let the guest of a raw disk choose what the disk is.

import { CowcatcherError } from "../errors.js";
import { openImage, resolveBackingPath } from "../image/open.js";
import type { TargetOptions } from "../target/target.js";

/** @throws CowcatcherError USAGE without a name or a format; what openImage throws. */
export async function checkBacking({
  path,
  backingFile,
  backingFormat,
}: Pick<TargetOptions, "path" | "backingFile" | "backingFormat">): Promise<void> {
  if (backingFile === undefined) return;
  if (backingFile === "") {
    throw new CowcatcherError({ code: "USAGE", object: path, problem: "the backing file's name is empty" });
  }
  if (backingFormat === undefined) {
    throw new CowcatcherError({
      code: "USAGE",
      object: backingFile,
      problem: "the backing file's format is missing",
      hint: "name it: raw or qcow2",
    });
  }
  const backing = await openImage(resolveBackingPath(path, backingFile, backingFormat), {
    format: backingFormat,
    readOnly: true,
  });
  await backing.close();
}
