// `backup`: an offline copy in this process, or a live one in the server that has the disk open, watched from here.

import { randomBytes } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { startOfflineCopy } from "../../backup/job/offline.js";
import { ControlClient } from "../../qmp/client.js";
import { listJobs, startBackup, watchJob, type BackupOrder } from "../../control/jobs-from-qmp.js";
import { isJsonObject } from "../../qmp/protocol.js";
import { CowcatcherError } from "../../errors.js";
import type {
  BackupSettings,
  LiveBackupSettings,
  LiveDiskSettings,
  OfflineBackupSettings,
} from "../options/backup-options.js";
import { type CommandContext, keepStdoutForData, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { STDIO, usageError } from "../options/options.js";
import { createProgressView } from "../progress/create-view.js";
import type { JobInfo, JobResult, ProgressView } from "../progress/view.js";
import { onInterrupt } from "../signals.js";
import { printSummary } from "../progress/summary.js";

const UPDATE_MS = 200;
const CANCEL_RETRY_MS = 50;

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export function runBackup(settings: BackupSettings, context: CommandContext): Promise<number> {
  return settings.mode === "offline" ? runOfflineCopy(settings, context) : runLive(settings, context);
}

/** Also `restore`'s body: a backup and what it builds on, written to an image. */
export async function runOfflineCopy(
  settings: OfflineBackupSettings,
  context: CommandContext,
): Promise<number> {
  if (settings.job.target === STDIO) keepStdoutForData(context);
  const view = await createProgressView(context.output);
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
    onFirst: (signal) => cancel?.(interrupted(signal, context)),
    onSecond: () => abortSync?.(),
  });
  let timer: NodeJS.Timeout | undefined;
  try {
    const copy = await startOfflineCopy({
      source: settings.source,
      sourceFormat: settings.sourceFormat,
      snapshot: settings.snapshot,
      job: { ...settings.job, cowBufferSizeBytes: 0 },
      isCancelled: () => context.interruptedBy !== undefined,
      onStarted: (totalBytes) => view.start({ ...info, totalBytes }),
      onStopped: (error) => copy.cancel(error),
    });
    cancel = (error) => copy.cancel(error);
    abortSync = () => copy.abortSync();
    if (context.interruptedBy !== undefined) copy.cancel(interrupted(context.interruptedBy, context));
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
    printSummary(context.output, { ...info, totalBytes: copy.totalBytes }, progress);
    return progress.ignoredErrorCount > 0 ? EXIT.ignoredErrors : EXIT.done;
  } finally {
    clearInterval(timer);
    view.stop();
    removeHandlers();
  }
}

function interrupted(signal: string, { command }: CommandContext): CowcatcherError {
  return new CowcatcherError({
    code: "CANCELLED",
    object: command,
    problem: `interrupted by ${signal}`,
    hint: "an unfinished file was removed; a device or an export holds a part of the copy",
  });
}

async function runLive(settings: LiveBackupSettings, context: CommandContext): Promise<number> {
  const client = await ControlClient.connect(settings.control);
  const view = await createProgressView(context.output);
  const orders: BackupOrder[] = [];
  let isStarting = false;
  const cancelAll = async (): Promise<void> => {
    const [first] = orders;
    if (isStarting && first !== undefined) await cancelStart(settings.control, first.id, () => isStarting);
    else for (const { id } of orders) await client.execute("job-cancel", { id }).catch(() => undefined);
  };
  const removeHandlers = onInterrupt(context, { onFirst: cancelAll });
  try {
    const names = await diskNames(client);
    orders.push(...settings.disks.map((disk) => orderOf(disk, names)));
    if (context.interruptedBy !== undefined) throw interrupted(context.interruptedBy, context);
    try {
      isStarting = true;
      await startBackup(client, orders, { grouped: true });
    } catch (error) {
      const isOurs = error instanceof CowcatcherError && error.code === "CANCELLED";
      throw isOurs && context.interruptedBy !== undefined
        ? interrupted(context.interruptedBy, context)
        : error;
    } finally {
      isStarting = false;
    }
    if (context.interruptedBy !== undefined) await cancelAll();
    const snapshots = await snapshotExports(client);
    const infos = orders.map((order) => infoOf(order, names, snapshots.get(order.id)));
    for (const info of infos) announceSnapshot(context, info);
    const ends = await Promise.all(infos.map((info) => follow(client, info, view)));
    view.stop();
    const failed = firstCause(ends.filter((end) => !isOrderlyEnd(end)).map(({ result }) => result.error));
    if (failed !== undefined)
      throw context.interruptedBy === undefined ? failed : interrupted(context.interruptedBy, context);
    for (const { info, result } of ends) printSummary(context.output, info, result.progress);
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

/** Names of the disks that the server has, with their sizes. */
async function diskNames(client: ControlClient): Promise<Map<string, number>> {
  const answer = await client.execute("query-named-block-nodes");
  const disks = new Map<string, number>();
  for (const node of Array.isArray(answer) ? answer.filter(isJsonObject) : []) {
    const name = node["node-name"];
    const image = node["image"];
    const size = isJsonObject(image) ? image["virtual-size"] : undefined;
    if (typeof name === "string") disks.set(name, typeof size === "number" ? size : 0);
  }
  return disks;
}

function orderOf({ disk, job }: LiveDiskSettings, names: ReadonlyMap<string, number>): BackupOrder {
  const [only, ...others] = names.keys();
  if (disk === undefined && others.length > 0) {
    throw usageError("--disk", "is missing", `the server has several: ${[...names.keys()].join(", ")}`);
  }
  if (disk !== undefined && !names.has(disk)) {
    throw new CowcatcherError({
      code: "NOT_FOUND",
      object: disk,
      problem: "the server has no disk of this name",
      hint: `it has ${[...names.keys()].join(", ")}`,
    });
  }
  const name = disk ?? only ?? "disk";
  return { id: `${name}-${randomBytes(4).toString("hex")}`, disk: name, options: job };
}

function infoOf(
  { id, disk, options }: BackupOrder,
  names: ReadonlyMap<string, number>,
  snapshotExport: string | undefined,
): JobInfo {
  return {
    jobId: id,
    disk,
    target: options.target,
    totalBytes: names.get(disk) ?? 0,
    live: true,
    verify: options.verify ?? false,
    snapshotOnly: options.sync === "none",
    snapshotExport,
  };
}

/** By job: the name under which the server exports its disk as of T0. A job that has ended already has none. */
async function snapshotExports(client: ControlClient): Promise<Map<string, string>> {
  const jobs = await listJobs(client);
  return new Map(
    jobs.flatMap(({ id, snapshotExport }) => (snapshotExport === undefined ? [] : [[id, snapshotExport]])),
  );
}

/** Scripts wait for this line, or with --json for `started`, before they read the snapshot. */
function announceSnapshot({ output }: CommandContext, { disk, snapshotExport }: JobInfo): void {
  if (snapshotExport === undefined || output.json || output.quiet) return;
  printLine(output, `${disk}: snapshot exported as ${snapshotExport}`);
}

interface JobEnd {
  info: JobInfo;
  result: JobResult;
}

async function follow(client: ControlClient, info: JobInfo, view: ProgressView): Promise<JobEnd> {
  const id = info.jobId;
  view.start(info);
  const { progress, error } = await watchJob(client, id, (now) => view.update(id, now));
  view.update(id, progress);
  const result = { progress, error };
  view.finish(id, result);
  return { info, result };
}

/** A job of sync none ends by being cancelled, by this command's signal or by somebody else. */
function isOrderlyEnd({ info, result }: JobEnd): boolean {
  return info.snapshotOnly === true && result.error?.code === "CANCELLED";
}

/** Of a group, the failure that cancelled the others, not their cancellation. */
function firstCause(errors: readonly (CowcatcherError | undefined)[]): CowcatcherError | undefined {
  const present = errors.filter((error) => error !== undefined);
  return present.find(({ code }) => code !== "CANCELLED") ?? present[0];
}
