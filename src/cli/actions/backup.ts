// `backup` of an image that no one writes, in this process. A live backup: live-backup.ts.

import { startOfflineCopy } from "../../backup/job/offline.js";
import type { CowcatcherError } from "../../errors.js";
import type { KeySource } from "../../repository/format/keys.js";
import type { OfflineBackupSettings } from "../options/backup-options.js";
import { type CommandContext, keepStdoutForData } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { STDIO } from "../options/options.js";
import { createProgressView } from "../progress/create-view.js";
import type { JobInfo } from "../progress/view.js";
import { onInterrupt } from "../signals.js";
import { bytesOnTarget, printSummary } from "../progress/summary.js";
import { interrupted } from "./causes.js";
import { warnOfEmptySource } from "./empty-source.js";
import { MOUNTED_SOURCE, warnOfMountedSource } from "./source-warnings.js";
import { dataBytesOf, warnOfSpace } from "./target-space.js";

const UPDATE_MS = 200;

/**
 * Resolves to the exit code. Also `restore`'s body: a backup and what it builds on, written to an image.
 * @throws CowcatcherError, which the program reports.
 */
export async function runOfflineCopy(
  settings: OfflineBackupSettings,
  context: CommandContext,
  repositoryKey?: () => Promise<KeySource | undefined>,
): Promise<number> {
  if (settings.job.target === STDIO) keepStdoutForData(context);
  const { output } = context;
  const view = await createProgressView(output);
  const info: JobInfo = {
    jobId: context.command,
    disk: settings.source,
    target: settings.job.target,
    totalBytes: 0,
    live: false,
    verify: settings.job.verify,
  };
  let cancel: ((error: CowcatcherError) => void) | undefined;
  let abortSync: (() => void) | undefined;
  const removeHandlers = onInterrupt(context, {
    onFirst: (signal) => cancel?.(interrupted(signal, context, [settings.job.target])),
    onSecond: () => abortSync?.(),
  });
  let timer: NodeJS.Timeout | undefined;
  try {
    const copy = await startOfflineCopy({
      source: settings.source,
      sourceFormat: settings.sourceFormat,
      snapshot: settings.snapshot,
      job: { ...settings.job, cowBufferSizeBytes: 0 },
      repositoryKey,
      isCancelled: () => context.interruptedBy !== undefined,
      onOpened: async (image, job) => {
        info.t0 = new Date().toISOString();
        info.targetFormat = job.targetFormat;
        info.dataBytes = await dataBytesOf(image);
        warnOfEmptySource(output, settings.source, image.sizeBytes);
        await warnOfMountedSource(output, image, MOUNTED_SOURCE);
        if (job.compression === undefined) {
          await warnOfSpace(output, job.target, info.dataBytes ?? image.sizeBytes);
        }
      },
      onStarted(totalBytes) {
        info.totalBytes = totalBytes;
        view.start(info);
      },
      onStopped: (error) => copy.cancel(error),
    });
    cancel = (error) => copy.cancel(error);
    abortSync = () => copy.abortSync();
    if (context.interruptedBy !== undefined)
      copy.cancel(interrupted(context.interruptedBy, context, [settings.job.target]));
    timer = setInterval(() => view.update(info.jobId, copy.progress()), UPDATE_MS);
    try {
      await copy.ended;
    } catch (error) {
      view.finish(info.jobId, { progress: copy.progress(), error: error as CowcatcherError });
      throw error;
    }
    clearInterval(timer);
    const progress = copy.progress();
    view.update(info.jobId, progress);
    view.finish(info.jobId, { progress, error: undefined });
    view.stop();
    printSummary(output, { ...info, bytesOnTarget: bytesOnTarget(info.target) }, progress);
    return progress.ignoredErrorCount > 0 ? EXIT.ignoredErrors : EXIT.done;
  } finally {
    clearInterval(timer);
    view.stop();
    removeHandlers();
  }
}
