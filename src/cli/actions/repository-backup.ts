// `backup --repo`: images that no one writes into a repository.
import { RepositoryBackup } from "../../backup/job/repository-backup.js";
import type { RepositoryBackupSettings } from "../options/repository-backup.js";
import type { CommandContext } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { createProgressView } from "../progress/create-view.js";
import { NO_BACKUP, printRepositoryResult } from "../progress/repository-summary.js";
import { onInterrupt } from "../signals.js";
import { interrupted } from "./causes.js";
import { warnOfEmptySource } from "./empty-source.js";
import { MOUNTED_SOURCE, warnOfMountedSource } from "./source-warnings.js";
import { packageVersion } from "../version.js";

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export async function runRepositoryBackup(
  settings: RepositoryBackupSettings,
  context: CommandContext,
): Promise<number> {
  const view = await createProgressView(context.output);
  const target = `${settings.repository}::${settings.group}`;
  const startMs = performance.now();
  const backup = new RepositoryBackup({
    ...settings,
    tool: `cowcatcher ${packageVersion()}`,
    isCancelled: () => context.interruptedBy !== undefined,
    onStarted: (disk, totalBytes, t0) =>
      view.start({ jobId: disk, disk, target, totalBytes, t0, live: false }),
    onOpened: async (image) => {
      warnOfEmptySource(context.output, image.path, image.sizeBytes);
      await warnOfMountedSource(context.output, image, MOUNTED_SOURCE);
    },
    onProgress: (disk, progress) => view.update(disk, progress),
    onEnded: (disk, progress, error) => view.finish(disk, { progress, error }),
  });
  const removeHandlers = onInterrupt(context, {
    onFirst: (signal) => backup.cancel(interrupted(signal, context, [], NO_BACKUP)),
  });
  try {
    const result = await backup.run();
    view.stop();
    const { disks } = result;
    printRepositoryResult(
      {
        ...result,
        disks: disks.map(({ progress, ...disk }) => ({ ...disk, ignoredErrors: progress.ignoredErrorCount })),
      },
      target,
      performance.now() - startMs,
      context,
    );
    const ignored = disks.some(({ progress }) => progress.ignoredErrorCount > 0);
    return ignored ? EXIT.ignoredErrors : EXIT.done;
  } finally {
    view.stop();
    removeHandlers();
  }
}
