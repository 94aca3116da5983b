// What the command line knows of a job before its source is opened.
import type { JobOptions } from "../../backup/options.js";
import type { ImageFormat } from "../../block/format.js";

/** Job options as far as the command line can know them. */
export type JobSettings = Omit<JobOptions, "targetFormat" | "cowBufferSizeBytes"> & {
  /** Undefined: the source's format. */
  targetFormat: ImageFormat | undefined;
  /** Undefined: the default of the server that has the disk open. */
  cowBufferSizeBytes: number | undefined;
};

export interface LiveDiskSettings {
  /** Undefined: the only disk of the server, or of QEMU. */
  disk: string | undefined;
  job: JobSettings;
}
