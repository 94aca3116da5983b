// A backup of an image that no one writes, and `restore`: the same pool without an interceptor. Main thread.

import { CowcatcherError } from "../errors.js";
import { openImage } from "../image/open.js";
import type { ImageFormat } from "../image/format.js";
import { createTarget } from "../target/create.js";
import { sameFile } from "../target/destination.js";
import { CopyRun } from "./copy-run.js";
import { Finishing } from "./finishing.js";
import type { JobOptions } from "./options.js";
import type { JobProgress } from "./progress.js";

export interface OfflineCopyRequest {
  source: string;
  /** Undefined: probed. */
  sourceFormat: ImageFormat | undefined;
  /** targetFormat undefined: the source's. */
  job: Omit<JobOptions, "targetFormat"> & { targetFormat: ImageFormat | undefined };
  onStarted: (totalBytes: number) => void;
  onStopped: (error: CowcatcherError) => void;
}

export interface OfflineCopy {
  readonly totalBytes: number;
  progress(): JobProgress;
  cancel(error: CowcatcherError): void;
  /** The process ends now: removes the unfinished target. */
  abortSync(): void;
  /** Fulfilled when the target is complete and synced. */
  readonly ended: Promise<void>;
}

/** @throws CowcatcherError when source or target cannot be opened; later failures are `ended`'s. */
export async function startOfflineCopy(request: OfflineCopyRequest): Promise<OfflineCopy> {
  const { source, sourceFormat, onStopped } = request;
  const image = await openImage(source, { format: sourceFormat, readOnly: true, direct: request.job.direct });
  try {
    const job: JobOptions = { ...request.job, targetFormat: request.job.targetFormat ?? image.format };
    if (job.target !== "null:" && (await sameFile(source, job.target))) throw sourceIsTarget(job.target);
    const target = await createTarget({
      ...job,
      path: job.target,
      format: job.targetFormat,
      sizeBytes: image.sizeBytes,
    });
    try {
      const run = await CopyRun.prepare({
        job,
        target,
        sizeBytes: image.sizeBytes,
        sourceClusterBytes: image.clusterSizeBytes,
        slots: new SharedArrayBuffer(0),
        bufferBytes: 0,
        live: false,
        onStopped,
      });
      const frozen = image.freeze();
      run.begin(frozen.description);
      request.onStarted(image.sizeBytes);
      const finishing = new Finishing(target, job, run.shared);
      const finish = async (): Promise<void> => {
        try {
          await run.ended;
          await finishing.run();
        } finally {
          await target.abort();
          frozen.release();
          await image.close();
        }
      };
      return {
        totalBytes: image.sizeBytes,
        progress: () => run.progress(),
        cancel(error) {
          run.abort(error);
          finishing.cancel(error);
        },
        abortSync: () => target.abortSync(),
        ended: finish(),
      };
    } catch (error) {
      await target.abort();
      throw error;
    }
  } catch (error) {
    await image.close();
    throw error;
  }
}

function sourceIsTarget(path: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object: path,
    problem: "is source and target at once",
    hint: "choose another target",
  });
}
