// Several jobs, some at a time, none in another's way: a job that fails is one result among others.
import { setImmediate } from "node:timers/promises";
import type { Job } from "./job.js";
import { runJob, type RunSettings } from "./run-job.js";
import type { JobResult } from "./result.js";

export interface FinishedJob {
  job: Job;
  result: JobResult;
  log: readonly string[];
}

export interface RunJobsSettings extends RunSettings {
  /** Jobs at a time. */
  parallel: number;
  onStarted?: ((job: Job) => Promise<void>) | undefined;
  /** Its notices: after its hooks, before the next job takes its place. Must not reject. */
  onFinished?: ((finished: FinishedJob) => Promise<void>) | undefined;
}

/** The results in the order of `jobs`. After an interruption the jobs that were not begun fail at once. Never rejects. */
export async function runJobs(jobs: readonly Job[], settings: RunJobsSettings): Promise<FinishedJob[]> {
  const finished = new Map<Job, FinishedJob>();
  const waiting = [...jobs];
  const work = async (): Promise<void> => {
    for (let job = waiting.shift(); job !== undefined; job = waiting.shift()) {
      if (!settings.signal.aborted) await settings.onStarted?.(job);
      const one = { job, ...(await runJob(job, settings)) };
      finished.set(job, one);
      await settings.onFinished?.(one);
      await setImmediate();
    }
  };
  await Promise.all(Array.from({ length: Math.max(1, settings.parallel) }, work));
  return jobs.flatMap((job) => finished.get(job) ?? []);
}
