// `backup --qmp` and `--libvirt`: disks of a guest that QEMU runs, copied in this process.
import {
  startQemuBackup,
  type QemuBackup,
  type QemuBackupRequest,
  type QemuDiskBackup,
} from "../../qemu/backup.js";
import type { BasisInfo } from "../../backup/host.js";
import type { JobProgress } from "../../backup/progress.js";
import { thawGuest } from "../../qemu/guest-freeze.js";
import { cleanUp } from "../../qemu/cleanup.js";
import { startLibvirtBackup } from "../../libvirt/backup.js";
import { cleanUpDomain } from "../../libvirt/cleanup.js";
import { thawDomain, THROUGH_LIBVIRT } from "../../libvirt/domain-freeze.js";
import { Virsh } from "../../libvirt/virsh.js";
import { type CowcatcherError, toCowcatcherError } from "../../errors.js";
import type { LibvirtBackupSettings } from "../options/libvirt-options.js";
import type { QemuBackupSettings, QemuCleanupSettings } from "../options/qemu-options.js";
import { type CommandContext, printJsonDocument, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { createProgressView } from "../progress/create-view.js";
import { bytesOnTarget, printSummary } from "../progress/summary.js";
import type { JobInfo, ProgressView } from "../progress/view.js";
import { onInterrupt } from "../signals.js";
import { firstCause, interrupted } from "./causes.js";
import { JOB_DEFAULTS } from "../../backup/options.js";

const UPDATE_MS = 200;

/** What differs where the disks are one backup in a repository. */
export interface QemuForm extends Pick<QemuBackupRequest, "allDisks" | "makeTargets" | "onT0"> {
  /** Of the disk, for people. */
  targetName?: (disk: string) => string;
  print(ends: readonly QemuEnd[]): void;
  /** What is left when the command is interrupted. */
  remains?: string | undefined;
}

export interface QemuEnd {
  info: JobInfo;
  progress: JobProgress;
  basis?: BasisInfo | undefined;
}

/** A guest, as it is managed. */
export type GuestSettings = QemuBackupSettings | LibvirtBackupSettings;

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export function runQemuBackup(settings: GuestSettings, context: CommandContext): Promise<number> {
  return runQemuJobs(settings, context, {
    print(ends) {
      for (const { info, progress, basis } of ends) {
        printSummary(context.output, { ...info, bytesOnTarget: bytesOnTarget(info.target) }, progress, basis);
      }
    },
  });
}

/** As runQemuBackup. */
export async function runQemuJobs(
  settings: GuestSettings,
  context: CommandContext,
  form: QemuForm,
): Promise<number> {
  const view = await createProgressView(context.output);
  let backup: QemuBackup | undefined;
  const targets = settings.disks.map(({ job }) => job.target);
  const interruption = (): CowcatcherError =>
    interrupted(context.interruptedBy ?? "a signal", context, targets, form.remains);
  const removeHandlers = onInterrupt(context, {
    onFirst: () => backup?.cancel(interruption()),
    onSecond: () => backup?.abortSync(),
  });
  try {
    try {
      backup = await start(settings, {
        allDisks: form.allDisks,
        makeTargets: form.makeTargets,
        onT0: form.onT0,
        disks: settings.disks.map(({ disk, job, bitmaps }) => ({
          name: disk,
          bitmaps,
          job: { ...job, cowBufferSizeBytes: job.cowBufferSizeBytes ?? JOB_DEFAULTS.cowBufferSizeBytes },
        })),
        isCancelled: () => context.interruptedBy !== undefined,
        onStopped: (error) => backup?.cancel(error),
      });
    } catch (error) {
      throw context.interruptedBy === undefined ? error : interruption();
    }
    if (context.interruptedBy !== undefined) backup.cancel(interruption());
    const running = backup;
    const infos = running.disks.map((disk) => infoOf(disk, running, form.targetName));
    const errors = await Promise.all(running.disks.map((disk, i) => follow(disk, infos[i], view)));
    view.stop();
    const failed = firstCause(errors);
    await running.over.catch((error: unknown) => {
      if (failed === undefined) throw error;
      context.logger.error({ err: error }, "something is left");
    });
    if (failed !== undefined) throw context.interruptedBy === undefined ? failed : interruption();
    const results = running.disks.map((disk) => disk.progress());
    form.print(results.map((progress, i) => ({ info: infos[i], progress, basis: running.disks[i].basis })));
    return results.some(({ ignoredErrorCount }) => ignoredErrorCount > 0) ? EXIT.ignoredErrors : EXIT.done;
  } finally {
    view.stop();
    removeHandlers();
  }
}

type BackupParts = Pick<
  QemuBackupRequest,
  "disks" | "allDisks" | "makeTargets" | "onT0" | "isCancelled" | "onStopped"
>;

function start(settings: GuestSettings, parts: BackupParts): Promise<QemuBackup> {
  return settings.mode === "qemu"
    ? startQemuBackup({ ...settings, ...parts })
    : startLibvirtBackup({ ...settings, ...parts });
}

function infoOf(
  { disk, job, totalBytes }: QemuDiskBackup,
  { choice, stoppedMs, t0Ms, freeze }: QemuBackup,
  targetName: QemuForm["targetName"],
): JobInfo {
  return {
    jobId: `backup-${disk}`,
    disk,
    target: targetName?.(disk) ?? job.target,
    totalBytes,
    live: true,
    t0: new Date(t0Ms).toISOString(),
    targetFormat: job.targetFormat,
    verify: job.verify,
    freeze,
    qemu: { method: choice.method, reason: choice.reason, stoppedMs },
  };
}

async function follow(
  disk: QemuDiskBackup,
  info: JobInfo,
  view: ProgressView,
): Promise<CowcatcherError | undefined> {
  view.start(info);
  const timer = setInterval(() => view.update(info.jobId, disk.progress()), UPDATE_MS);
  let error: CowcatcherError | undefined;
  try {
    await disk.ended;
  } catch (cause) {
    error = toCowcatcherError(cause, disk.disk);
  }
  clearInterval(timer);
  const progress = disk.progress();
  view.update(info.jobId, progress);
  view.finish(info.jobId, { progress, error });
  return error;
}

/** `backup --cleanup` with --qmp SOCK or --libvirt DOMAIN, with --freeze SOCK, or both: the guest first. */
export async function runQemuCleanup(
  { monitor, domain, guestAgent, fleeceDir, replaced }: QemuCleanupSettings,
  { output }: CommandContext,
): Promise<number> {
  const isLibvirts = guestAgent === THROUGH_LIBVIRT && domain !== undefined;
  const frozen = isLibvirts ? domain.domain : guestAgent;
  const thawedCount = isLibvirts
    ? await thawDomain(new Virsh(domain.connect, domain.domain))
    : guestAgent && (await thawGuest(guestAgent));
  const removed: string[] = [];
  if (monitor !== undefined) removed.push(...(await cleanUp(monitor, fleeceDir, replaced)));
  if (domain !== undefined) removed.push(...(await cleanUpDomain(domain, fleeceDir, replaced)));
  const place = monitor ?? domain?.domain;
  if (output.json) {
    const thawed = thawedCount === undefined ? {} : { thawed_file_systems: thawedCount };
    printJsonDocument(output, { removed, ...thawed });
  } else if (!output.quiet) {
    if (frozen !== undefined) printLine(output, `${frozen}: ${thawedCount} file systems thawed`);
    if (place !== undefined && removed.length === 0) printLine(output, `${place}: nothing was left`);
    for (const name of removed) printLine(output, `${place}: removed ${name}`);
  }
  return EXIT.done;
}
