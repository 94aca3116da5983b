// `backup --repo`: images that no one writes into a repository.
import { RepositoryBackup, type RepositoryBackupResult } from "../../backup/job/repository-backup.js";
import { CowcatcherError } from "../../errors.js";
import { formatBytes, formatDuration } from "../../units.js";
import type { RepositoryBackupSettings } from "../options/repository-backup.js";
import { type CommandContext, printJsonLine, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { now } from "../progress/json.js";
import { warn } from "../output/report.js";
import { createProgressView } from "../progress/create-view.js";
import { onInterrupt } from "../signals.js";
import { MOUNTED_SOURCE, warnOfEmptySource, warnOfMountedSource } from "./source-warnings.js";
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
    onFirst: (signal) => backup.cancel(interrupted(signal, target)),
  });
  try {
    const result = await backup.run();
    view.stop();
    if (result.clockBehind !== undefined) {
      warn(
        context.output,
        `the clock says ${result.clockBehind}, before the group's last backup, which this one is named to follow: ` +
          "see to the clock",
      );
    }
    printResult(result, target, performance.now() - startMs, context);
    const ignored = result.disks.some(({ progress }) => progress.ignoredErrorCount > 0);
    return ignored ? EXIT.ignoredErrors : EXIT.done;
  } finally {
    view.stop();
    removeHandlers();
  }
}

function interrupted(signal: string, target: string): CowcatcherError {
  return new CowcatcherError({
    code: "CANCELLED",
    object: target,
    problem: `interrupted by ${signal}`,
    hint: "there is no such backup; what was stored is used by the next one",
  });
}

function printResult(
  { group, time, level, reason, disks }: RepositoryBackupResult,
  target: string,
  elapsedMs: number,
  { output }: CommandContext,
): void {
  const bytes = disks.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const newBytes = disks.reduce((sum, disk) => sum + disk.newBytes, 0);
  if (output.json) {
    printJsonLine(output, {
      message_type: "summary",
      time: now(),
      version: packageVersion(),
      target: `${target}@${time}`,
      group,
      t0: time,
      level,
      level_reason: reason,
      bytes,
      new_bytes: newBytes,
      seconds: Math.round(elapsedMs) / 1000,
      ignored_errors: disks.reduce((sum, { progress }) => sum + progress.ignoredErrorCount, 0),
      disks: disks.map((disk) => ({
        disk: disk.disk,
        bytes: disk.sizeBytes,
        read_bytes: disk.readBytes,
        new_chunks: disk.newChunks,
        new_bytes: disk.newBytes,
      })),
    });
    return;
  }
  if (output.quiet) return;
  const rate = elapsedMs > 0 ? (bytes * 1000) / elapsedMs : 0;
  printLine(
    output,
    `${target}@${time}: ${disks.map(({ disk }) => disk).join(", ")}, ${formatBytes(bytes)} in ` +
      `${formatDuration(elapsedMs)} (${formatBytes(rate)}/s), ${formatBytes(newBytes)} new`,
  );
  printLine(output, `  ${level}: ${reason}`);
}
