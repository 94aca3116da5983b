// What crosses between the main thread and a worker that reads the target back.

import type { Geometry } from "../../cow/geometry.js";
import type { ErrorDetails } from "../../errors.js";
import type { SourceDescription } from "../../block/device.js";
import type { ImageFormat } from "../../block/format.js";
import { MiB } from "../../units.js";

/** Unit in which the disk is shared out: few enough for a huge empty disk, small enough to keep all workers busy. */
export const STRETCH_BYTES = 16 * MiB;

/** Control words, after CTL_RUN (cow/shared.ts), which main sets to RUN_ABORTING to end the check early. */
export const CTL_NEXT_STRETCH = 1; // [workers] the next stretch that nobody has taken
export const CONTROL_WORDS = 2;

/** The argument of workers/verify.ts. */
export interface VerifyTask {
  geometry: Geometry;
  /** See cow/digests.ts. */
  digests: SharedArrayBuffer;
  control: SharedArrayBuffer;
  workerIndex: number;
  /** Leads to the target until it has its final name: to the open file, or an export. */
  path: string;
  /** What errors call it. */
  name: string;
  format: ImageFormat;
  /** Instead of path and format, where the target is open already for all threads. */
  source?: SourceDescription | undefined;
  /** O_DIRECT, as it was written. */
  direct: boolean;
}

export interface VerifyResult {
  differingClusterCount: number;
  /** Guest offset of the first cluster that differs; Infinity without one. */
  firstDifferenceBytes: number;
  /** Errors cross as plain data: a class does not survive the port. */
  error?: ErrorDetails;
  stack?: string | undefined;
}
