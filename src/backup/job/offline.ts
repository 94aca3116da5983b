// A backup of an image that no one writes, and `restore`: the same pool without an interceptor. Main thread.

import type { Piscina } from "piscina";
import type { CowcatcherError } from "../../errors.js";
import type { Image } from "../../block/device.js";
import type { ImageFormat } from "../../block/format.js";
import { NbdImage } from "../../nbd/client/device.js";
import { openAnyImage } from "../../repository/open.js";
import type { KeySource } from "../../repository/format/keys.js";
import type { Target } from "../../target/target.js";
import { createTarget } from "../../target/create.js";
import { openBacking } from "../guard/backing-check.js";
import { mayCopyHere } from "../copy/here.js";
import { endEarlyPool, endPool, takeCopyPool } from "../copy/pool.js";
import { NO_BUFFER } from "../../cow/slot-memory.js";
import { CopyRun } from "../copy/run.js";
import { Finishing } from "./finishing.js";
import { type DirtyRuns, dirtyRuns } from "../copy/incremental.js";
import type { JobOptions } from "../options.js";
import type { JobProgress } from "../progress.js";
import { partsInUse, refuseImageAsTarget } from "../guard/target-guard.js";
import { accessOf } from "./source-access.js";
import { withBackingOf } from "./top-layer.js";

export interface OfflineCopyRequest {
  source: string;
  /** Undefined: probed. */
  sourceFormat: ImageFormat | undefined;
  /** Id or name of an internal snapshot of the source; undefined: the disk as it is. */
  snapshot?: string | undefined;
  /** targetFormat undefined: the source's. */
  job: Omit<JobOptions, "targetFormat"> & { targetFormat: ImageFormat | undefined };
  /** Asked while a server's answer is awaited before the copy begins; true ends it. */
  isCancelled?: (() => boolean) | undefined;
  /** Called when the source is open, with the job as it will be, before anything of the target is made. */
  onOpened?: ((image: Image, job: JobOptions) => Promise<void>) | undefined;
  /** What encrypted repositories are opened with, where the source is a backup. */
  repositoryKey?: (() => Promise<KeySource | undefined>) | undefined;
  /** Makes the target, where it is not the one that `job.target` names; with which parts of the disk it wants. */
  makeTarget?: ((image: Image, dirty: DirtyRuns | undefined) => MadeTarget) | undefined;
  onStarted: (totalBytes: number) => void;
  onStopped: (error: CowcatcherError) => void;
}

export interface MadeTarget {
  target: Target;
  /** Undefined: all of the disk. */
  dirty: DirtyRuns | undefined;
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
  let pool: Piscina | undefined;
  try {
    return await startWithPool(request, () => (pool ??= takeCopyPool(request.job.workerCount)));
  } catch (error) {
    if (pool === undefined) endEarlyPool();
    else void endPool(pool);
    throw error;
  }
}

async function startWithPool(request: OfflineCopyRequest, pool: () => Piscina): Promise<OfflineCopy> {
  const { source, sourceFormat, onStopped } = request;
  const image = await openAnyImage(source, {
    format: sourceFormat,
    readOnly: true,
    direct: request.job.direct,
    bitmap: request.job.bitmap,
    isCancelled: request.isCancelled,
    snapshot: request.snapshot,
    repositoryKey: request.repositoryKey,
  });
  let backing: Image | null = null;
  try {
    const targetFormat = request.job.targetFormat ?? image.format;
    const job = withBackingOf(image, { ...request.job, targetFormat });
    if (request.makeTarget === undefined) {
      const inUse = await partsInUse({ images: [{ image, isSource: true }], listeners: [] });
      await refuseImageAsTarget(job.target, inUse);
    }
    await request.onOpened?.(image, job);
    const bitmapRuns = job.bitmap === undefined ? undefined : await dirtyRuns(image, job.bitmap);
    // Before the workers connect: a server may take one connection at a time.
    const remote = nbdLayerOf(image);
    await remote?.handOver();
    backing = await openBacking({ ...job, path: job.target });
    const { target, dirty } =
      request.makeTarget?.(image, bitmapRuns) ?? (await plainTarget(image, job, request, bitmapRuns));
    try {
      const run = await CopyRun.prepare({
        job,
        pool,
        target,
        sizeBytes: image.sizeBytes,
        sourceClusterBytes: image.clusterSizeBytes,
        slots: NO_BUFFER,
        bufferBytes: 0,
        live: false,
        beginsHere: await mayCopyHere(image, target.description, job.direct),
        workerLimit: remote === null || remote.canMultiConn ? undefined : 1,
        dirty,
        onWorkersIn: remote === null ? undefined : () => void remote.letGo(),
        onStopped,
      });
      const frozen = image.freeze();
      run.begin(frozen.description);
      request.onStarted(image.sizeBytes);
      const finishing = new Finishing(target, job, run.shared);
      const finish = async (): Promise<void> => {
        try {
          await run.ended;
          run.checkSource(frozen);
          await finishing.run();
        } finally {
          await target.abort();
          frozen.release();
          await backing?.close();
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
    await backing?.close();
    await image.close();
    throw error;
  }
}

async function plainTarget(
  image: Image,
  job: JobOptions,
  { isCancelled }: OfflineCopyRequest,
  dirty: DirtyRuns | undefined,
): Promise<MadeTarget> {
  const target = await createTarget({
    ...job,
    path: job.target,
    format: job.targetFormat,
    sizeBytes: image.sizeBytes,
    sourceAccess: await accessOf(image),
    isCancelled,
  });
  return { target, dirty };
}

/** An export has no backing file: it is the source itself, or the last of its chain. */
function nbdLayerOf(image: Image): NbdImage | null {
  let layer = image;
  while (layer.backing !== null) layer = layer.backing;
  return layer instanceof NbdImage ? layer : null;
}
