// QEMU's sync mode `top`: the backup has what the image's own layer allocates, and builds on what the image builds on.
// Which clusters those are, a worker asks T0's tables as it comes to them (cow/chunk-copy.ts). Main thread.

import { absoluteName } from "../../file-names.js";
import { CowcatcherError } from "../../errors.js";
import type { Image } from "../../block/device.js";
import { NbdImage } from "../../nbd/client/device.js";
import { NULL_TARGET_PATH } from "../../target/null.js";
import type { JobOptions } from "../options.js";

type TopJob = Pick<
  JobOptions,
  "target" | "targetFormat" | "sync" | "verify" | "backingFile" | "backingFormat"
>;

/**
 * The job with the image's backing file as its target's, by absolute path, unless it has one or needs none.
 * @throws CowcatcherError USAGE where the target could not build on it, or could not be checked against T0.
 */
export function withBackingOf<T extends TopJob>(image: Image, job: T): T {
  if (job.sync !== "top") return job;
  const { backing } = image;
  if (job.verify)
    throw refuse("--verify", "a copy of the top layer alone cannot be read back", "leave it out");
  if (backing === null || job.target === NULL_TARGET_PATH || job.backingFile !== undefined) return job;
  if (job.targetFormat === "raw") {
    throw refuse(job.target, "a raw target cannot build on the source's backing file", "give -O qcow2");
  }
  if (backing instanceof NbdImage) {
    throw refuse("--sync", "top: the source's backing file is an export", "name a local file with -b and -B");
  }
  return { ...job, backingFile: absoluteName(backing.path), backingFormat: backing.format };
}

function refuse(object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object, problem, hint });
}
