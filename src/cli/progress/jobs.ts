// What every view remembers of its jobs.
import type { JobProgress } from "../../backup/progress.js";
import { Pace } from "./pace.js";
import type { JobInfo } from "./view.js";

export interface WatchedJob {
  readonly info: JobInfo;
  readonly pace: Pace;
  /** Undefined until the first update. */
  progress: JobProgress | undefined;
}

export class WatchedJobs {
  private readonly jobs = new Map<string, WatchedJob>();

  add(info: JobInfo): WatchedJob {
    const job = { info, pace: new Pace(info.dataBytes), progress: undefined };
    this.jobs.set(info.jobId, job);
    return job;
  }

  /** Notes the progress of a job; undefined for one that was not started or has finished. */
  update(jobId: string, progress: JobProgress): WatchedJob | undefined {
    const job = this.jobs.get(jobId);
    if (job === undefined) return undefined;
    job.progress = progress;
    job.pace.add(progress);
    return job;
  }

  remove(jobId: string): WatchedJob | undefined {
    const job = this.jobs.get(jobId);
    this.jobs.delete(jobId);
    return job;
  }

  values(): IterableIterator<WatchedJob> {
    return this.jobs.values();
  }

  get size(): number {
    return this.jobs.size;
  }
}
