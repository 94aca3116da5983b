// `backup --control`: a backup that the server makes which has the disk open, started and watched from here.

import { setTimeout as delay } from "node:timers/promises";
import { endedJob, listJobs, startBackup, watchJob, type BackupOrder } from "../../control/jobs-from-qmp.js";
import { CowcatcherError } from "../../errors.js";
import type { FreezeRequest } from "../../qemu/t0-gate.js";
import { ControlClient } from "../../qmp/client.js";
import type { RepositoryOutcome } from "../../backup/host.js";
import type { LiveBackupSettings } from "../options/backup-options.js";
import type { LiveDiskSettings } from "../options/job-settings.js";
import { type CommandContext, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { warn } from "../output/report.js";
import { createProgressView } from "../progress/create-view.js";
import { bytesOnTarget, printSummary } from "../progress/summary.js";
import type { JobInfo, JobResult, ProgressView } from "../progress/view.js";
import { onInterrupt } from "../signals.js";
import { formatBytes } from "../../units.js";
import { firstCause, interrupted } from "./causes.js";
import { chooseDisk, jobIdOf, servedDisks, type ServedDisk } from "./served-disks.js";
import { warnOfEmptySource } from "./empty-source.js";
import { warnOfSpace } from "./target-space.js";

const CANCEL_RETRY_MS = 50;

export interface JobEnd {
  info: JobInfo;
  result: JobResult;
  /** Of a disk of a backup in a repository. */
  repository?: RepositoryOutcome | undefined;
}

/** What differs between backups to targets of their own and one backup in a repository. */
export interface LiveForm {
  disks(served: ReadonlyMap<string, ServedDisk>): readonly LiveDiskSettings[];
  print(ends: readonly JobEnd[]): void;
  /** Who freezes the guest for T0. */
  guestAgent: FreezeRequest | undefined;
  /** What is left when the command is interrupted, where the targets do not tell. */
  remains?: string | undefined;
}

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export function runLive(settings: LiveBackupSettings, context: CommandContext): Promise<number> {
  const { control, disks, guestAgent } = settings;
  return runLiveJobs(control, context, {
    guestAgent,
    disks: () => disks,
    print(ends) {
      for (const { info, result } of ends) {
        const summary = { ...info, bytesOnTarget: bytesOnTarget(info.target) };
        printSummary(context.output, summary, result.progress, result.basis);
      }
    },
  });
}

/** As runLive. */
export async function runLiveJobs(control: string, context: CommandContext, form: LiveForm): Promise<number> {
  const client = await ControlClient.connect(control);
  const view = await createProgressView(context.output);
  const orders: BackupOrder[] = [];
  const interruption = (): CowcatcherError =>
    interrupted(
      context.interruptedBy ?? "a signal",
      context,
      orders.map(({ options }) => options.target),
      form.remains,
    );
  let isStarting = false;
  const cancelAll = async (): Promise<void> => {
    const [first] = orders;
    if (isStarting && first !== undefined) await cancelStart(control, first.id, () => isStarting);
    else for (const { id } of orders) await client.execute("job-cancel", { id }).catch(() => undefined);
  };
  const removeHandlers = onInterrupt(context, { onFirst: cancelAll });
  try {
    const disks = await servedDisks(client);
    const infos = planJobs(form, disks, orders);
    await warnOfAll(context, infos, orders);
    if (context.interruptedBy !== undefined) throw interruption();
    try {
      isStarting = true;
      const freeze = await startBackup(client, orders, { grouped: true });
      for (const info of infos) info.freeze = freeze;
    } catch (error) {
      const isOurs = error instanceof CowcatcherError && error.code === "CANCELLED";
      throw isOurs && context.interruptedBy !== undefined ? interruption() : error;
    } finally {
      isStarting = false;
    }
    if (context.interruptedBy !== undefined) await cancelAll();
    await noteWhatStarted(client, infos, orders, context);
    for (const info of infos) announceSnapshot(context, info);
    const ends = await Promise.all(infos.map((info) => follow(client, info, view)));
    view.stop();
    const failed = firstCause(ends.filter((end) => !isOrderlyEnd(end)).map(({ result }) => result.error));
    if (failed !== undefined) throw context.interruptedBy === undefined ? failed : interruption();
    form.print(ends);
    return ends.some(({ result }) => result.progress.ignoredErrorCount > 0) ? EXIT.ignoredErrors : EXIT.done;
  } finally {
    view.stop();
    removeHandlers();
    client.close();
  }
}

/**
 * Cancels jobs that wait for their T0, all by one. The connection that started them has no part in it: until the start is
 * answered the server takes nothing else from there. Nor does this one come after it for certain, so a job that is not
 * there yet is asked for again.
 */
async function cancelStart(control: string, id: string, isStarting: () => boolean): Promise<void> {
  const client = await ControlClient.connect(control);
  try {
    while (isStarting()) {
      const isCancelled = await client.execute("job-cancel", { id }).then(
        () => true,
        () => false,
      );
      if (isCancelled) return;
      await delay(CANCEL_RETRY_MS);
    }
  } finally {
    client.close();
  }
}

/** Fills `orders`, one for each job, in order. @throws CowcatcherError as chooseDisk. */
function planJobs(form: LiveForm, disks: ReadonlyMap<string, ServedDisk>, orders: BackupOrder[]): JobInfo[] {
  const ids = new Set<string>();
  return form.disks(disks).map(({ disk: asked, job }) => {
    const disk = chooseDisk(asked, disks);
    const id = jobIdOf(disk, ids);
    ids.add(id);
    orders.push({ id, disk: disk.name, options: job, guestAgent: form.guestAgent });
    const isCopy = job.sync !== "none";
    return {
      jobId: id,
      disk: disk.name,
      target: job.target,
      targetFormat: isCopy ? (job.targetFormat ?? disk.format) : undefined,
      totalBytes: disk.sizeBytes,
      dataBytes: isCopy ? disk.dataBytes : undefined,
      live: true,
      verify: job.verify,
      snapshotOnly: !isCopy,
    };
  });
}

async function warnOfAll(
  { output }: CommandContext,
  infos: readonly JobInfo[],
  orders: readonly BackupOrder[],
): Promise<void> {
  for (const [index, { disk, target, totalBytes, dataBytes }] of infos.entries()) {
    warnOfEmptySource(output, disk, totalBytes);
    const { compression, repository } = orders[index]?.options ?? {};
    if (compression !== undefined || repository !== undefined) continue;
    await warnOfSpace(output, target, dataBytes ?? totalBytes);
  }
}

/** What is known from T0 on. A job that has ended already has told its T0 with its last event. */
async function noteWhatStarted(
  client: ControlClient,
  infos: readonly JobInfo[],
  orders: readonly BackupOrder[],
  { output }: CommandContext,
): Promise<void> {
  const jobs = new Map((await listJobs(client)).map((job) => [job.id, job]));
  for (const [index, info] of infos.entries()) {
    const job = jobs.get(info.jobId);
    const askedBytes = orders[index]?.options.cowBufferSizeBytes ?? 0;
    const bufferBytes = job?.progress.bufferBytesTotal ?? 0;
    if (askedBytes > 0 && bufferBytes > askedBytes) {
      warn(output, `--cow-buffer-size: raised to ${formatBytes(bufferBytes)}, the least that works here`);
    }
    info.t0 = job?.t0 ?? endedJob(client, info.jobId)?.t0;
    info.snapshotExport = job?.snapshotExport;
  }
}

/** Scripts wait for this line, or with --json for `started`, before they read the snapshot. */
function announceSnapshot({ output }: CommandContext, { disk, snapshotExport }: JobInfo): void {
  if (snapshotExport === undefined || output.json || output.quiet) return;
  printLine(output, `${disk}: snapshot exported as ${snapshotExport}`);
}

async function follow(client: ControlClient, info: JobInfo, view: ProgressView): Promise<JobEnd> {
  const id = info.jobId;
  view.start(info);
  const { progress, error, basis, repository } = await watchJob(client, id, (now) => view.update(id, now));
  view.update(id, progress);
  const result = { progress, error, basis };
  view.finish(id, result);
  return { info, result, repository };
}

/** A job of sync none ends by being cancelled, by this command's signal or by somebody else. */
function isOrderlyEnd({ info, result }: JobEnd): boolean {
  return info.snapshotOnly === true && result.error?.code === "CANCELLED";
}
