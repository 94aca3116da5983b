// Progress for scripts: one JSON object a line on stdout. Names are restic's where it has the thing
// (percent_done, total_bytes, bytes_done, seconds_elapsed, seconds_remaining), snake_case ones of our own
// elsewhere. `summary` and `error` messages are summary.ts's and report.ts's.
import type { JobProgress } from "../../backup/progress.js";
import { packageVersion } from "../version.js";
import { printJsonLine, type OutputSettings } from "../output/context.js";
import { WatchedJobs, type WatchedJob } from "./jobs.js";
import { fractionDone } from "./pace.js";
import type { JobInfo, JobResult, PrintableView } from "./view.js";

export const STATUS_INTERVAL_MS = 1000;

export interface JsonOptions {
  /** No `status` messages of its own: only what SIGUSR1 asks for. */
  onRequestOnly: boolean;
}

export interface StartedMessage {
  message_type: "started";
  /** RFC 3339, UTC. */
  time: string;
  version: string;
  job: string;
  disk: string;
  target: string;
  /** Null of a job without a target. */
  target_format: string | null;
  total_bytes: number;
  /** About what there is to copy; null: unknown. */
  data_bytes: number | null;
  live: boolean;
  /** The instant that the backup shows; null where the server does not tell. */
  t0: string | null;
  /** The export of the disk as it was at T0; left out where there is none. */
  snapshot_export?: string;
}

export interface StatusMessage {
  message_type: "status";
  time: string;
  job: string;
  disk: string;
  /** 0 to 1, as restic's. */
  percent_done: number;
  total_bytes: number;
  bytes_done: number;
  bytes_written: number;
  /** Of `bytes_written`, a second, over the last seconds. */
  rate: number;
  seconds_elapsed: number;
  /** Left out while there is no telling. */
  seconds_remaining?: number;
  captures: number;
  captured_bytes: number;
  spilled_bytes: number;
  buffer_bytes_used: number;
  buffer_bytes_total: number;
  guest_waits: number;
  guest_wait_ms_max: number;
  guest_wait_ms_total: number;
  ignored_errors: number;
}

export class JsonView implements PrintableView {
  private readonly jobs = new WatchedJobs();
  private readonly lastStatusMs = new Map<string, number>();
  private stopped = false;

  constructor(
    private readonly output: OutputSettings,
    private readonly options: JsonOptions = { onRequestOnly: false },
    private readonly now: () => number = () => performance.now(),
  ) {}

  start(info: JobInfo): void {
    this.jobs.add(info);
    this.lastStatusMs.set(info.jobId, this.now());
    if (!this.output.quiet) printJsonLine(this.output, startedMessage(info));
  }

  update(jobId: string, progress: JobProgress): void {
    const job = this.jobs.update(jobId, progress);
    if (job === undefined || this.options.onRequestOnly || this.stopped) return;
    const nowMs = this.now();
    if (nowMs - (this.lastStatusMs.get(jobId) ?? 0) < STATUS_INTERVAL_MS) return;
    this.lastStatusMs.set(jobId, nowMs);
    this.print(job, progress);
  }

  finish(jobId: string, _result: JobResult): void {
    this.jobs.remove(jobId);
    this.lastStatusMs.delete(jobId);
  }

  stop(): void {
    this.stopped = true;
  }

  printNow(): void {
    if (this.stopped) return;
    for (const job of this.jobs.values()) {
      if (job.progress !== undefined) this.print(job, job.progress);
    }
  }

  private print(job: WatchedJob, progress: JobProgress): void {
    const remainingMs = job.info.snapshotOnly === true ? undefined : job.pace.remainingMs(progress);
    printJsonLine(this.output, statusMessage(job.info, progress, remainingMs));
  }
}

export function startedMessage(info: JobInfo): StartedMessage {
  const { jobId, disk, target, targetFormat, totalBytes, dataBytes, live, t0, snapshotExport } = info;
  return {
    message_type: "started",
    time: now(),
    version: packageVersion(),
    job: jobId,
    disk,
    target,
    target_format: targetFormat ?? null,
    total_bytes: totalBytes,
    data_bytes: dataBytes ?? null,
    live,
    t0: t0 ?? null,
    ...(snapshotExport === undefined ? {} : { snapshot_export: snapshotExport }),
  };
}

export function statusMessage(
  { jobId, disk }: JobInfo,
  progress: JobProgress,
  remainingMs: number | undefined,
): StatusMessage {
  return {
    message_type: "status",
    time: now(),
    job: jobId,
    disk,
    percent_done: fractionDone(progress),
    total_bytes: progress.bytesTotal,
    bytes_done: progress.bytesDone,
    bytes_written: progress.bytesWritten,
    rate: Math.round(progress.targetRate),
    seconds_elapsed: toSeconds(progress.elapsedMs),
    ...(remainingMs === undefined ? {} : { seconds_remaining: toSeconds(remainingMs) }),
    captures: progress.captureCount,
    captured_bytes: progress.capturedBytes,
    spilled_bytes: progress.spilledBytes,
    buffer_bytes_used: progress.bufferBytesUsed,
    buffer_bytes_total: progress.bufferBytesTotal,
    guest_waits: progress.guestWaitCount,
    guest_wait_ms_max: progress.guestWaitMsMax,
    guest_wait_ms_total: progress.guestWaitMsTotal,
    ignored_errors: progress.ignoredErrorCount,
  };
}

/** The wall clock, as every message has it. */
export function now(): string {
  return new Date().toISOString();
}

function toSeconds(ms: number): number {
  return Math.round(ms) / 1000;
}
