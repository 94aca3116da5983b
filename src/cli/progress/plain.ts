// Progress where no terminal is: one line a job every few seconds, on stderr.
import type { JobProgress } from "../../backup/progress.js";
import type { TextOutput } from "../output/context.js";
import { WatchedJobs, type WatchedJob } from "./jobs.js";
import { progressParts } from "./text.js";
import type { JobInfo, JobResult, PrintableView } from "./view.js";

/** A log that someone reads later should not drown in them. */
export const LINE_INTERVAL_MS = 5000;

export interface PlainOptions {
  /** No lines of its own: only what SIGUSR1 asks for. */
  onRequestOnly: boolean;
}

export class PlainView implements PrintableView {
  private readonly jobs = new WatchedJobs();
  private readonly lastLineMs = new Map<string, number>();
  private stopped = false;

  constructor(
    private readonly output: TextOutput,
    private readonly options: PlainOptions,
    private readonly now: () => number = () => performance.now(),
  ) {}

  start(info: JobInfo): void {
    this.jobs.add(info);
    this.lastLineMs.set(info.jobId, this.now());
  }

  update(jobId: string, progress: JobProgress): void {
    const job = this.jobs.update(jobId, progress);
    if (job === undefined || this.options.onRequestOnly || this.stopped) return;
    const nowMs = this.now();
    if (nowMs - (this.lastLineMs.get(jobId) ?? 0) < LINE_INTERVAL_MS) return;
    this.lastLineMs.set(jobId, nowMs);
    this.print(job);
  }

  finish(jobId: string, _result: JobResult): void {
    this.jobs.remove(jobId);
    this.lastLineMs.delete(jobId);
  }

  stop(): void {
    this.stopped = true;
  }

  printNow(): void {
    if (this.stopped) return;
    for (const job of this.jobs.values()) this.print(job);
  }

  private print(job: WatchedJob): void {
    this.output.write(`${progressLine(job)}\n`);
  }
}

/** One line that stands for itself: "root: 42%, 4.2 GiB of 10.0 GiB, …". */
export function progressLine({ info, pace, progress }: WatchedJob): string {
  if (progress === undefined) return `${info.disk}: started`;
  const remainingMs = pace.remainingMs(progress);
  const { live, snapshotOnly } = info;
  return `${info.disk}: ${progressParts(progress, { live, remainingMs, snapshotOnly }).join(", ")}`;
}
