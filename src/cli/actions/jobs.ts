// `jobs`: what a server is backing up, and the commands to a job, over the control socket.
import { ControlClient } from "../../qmp/client.js";
import { listJobs, type JobSummary } from "../../control/jobs-from-qmp.js";
import { QmpError } from "../../qmp/protocol.js";
import { CowcatcherError } from "../../errors.js";
import { formatBytes, formatDuration, parseSize } from "../../units.js";
import { printJsonDocument, printLine, type CommandContext, type OutputSettings } from "../output/context.js";
import { alignColumns } from "../output/columns.js";
import { EXIT } from "../output/exit-codes.js";
import { parseChoice, usageError } from "../options/options.js";
import { statusMessage, type StatusMessage } from "../progress/json.js";
import { fractionDone } from "../progress/pace.js";
import { formatPercent } from "../progress/text.js";
import { errorMessage, type ErrorMessage } from "../output/report.js";

const ACTIONS = ["cancel", "pause", "resume", "set-speed"] as const;

export type JobsRequest =
  | { action: "list" }
  | { action: "cancel" | "pause" | "resume"; id: string }
  /** Bytes a second; 0: no limit. */
  | { action: "set-speed"; id: string; speed: number };

/** A job in the document that `jobs --json` prints. */
export interface JobDocument extends Omit<StatusMessage, "message_type"> {
  target: string;
  status: string;
  /** Limit in bytes a second; 0: none. */
  rate_limit: number;
  /** The instant that the backup shows; null before it. */
  t0: string | null;
  /** Name of the export of the disk as of T0; left out where the job has none. */
  snapshot_export?: string;
  error: ErrorMessage["error"] | null;
}

/** @throws CowcatcherError USAGE */
export function parseJobsRequest(
  action: string | undefined,
  id: string | undefined,
  speed: string | undefined,
): JobsRequest {
  if (action === undefined) return { action: "list" };
  const known = parseChoice(action, "jobs", ACTIONS);
  if (id === undefined) throw usageError("ID", "is missing", "cowcatcher jobs lists the jobs");
  if (known !== "set-speed") {
    if (speed !== undefined)
      throw usageError(speed, "is one argument too many", `${known} takes an ID alone`);
    return { action: known, id };
  }
  if (speed === undefined) throw usageError("SIZE", "is missing", "give bytes a second, or 0 for no limit");
  return { action: known, id, speed: parseSize(speed, "SIZE") };
}

export async function runJobs(
  request: JobsRequest,
  control: string,
  { output }: CommandContext,
): Promise<number> {
  const client = await ControlClient.connect(control);
  try {
    if (request.action !== "list") await command(client, request, await jobIdFor(client, request.id));
    if (request.action === "list" || output.json) printJobs(output, await listJobs(client));
  } finally {
    client.close();
  }
  return EXIT.done;
}

/** A job's id as it is; or the name of a disk that has one job, for that job's. @throws CowcatcherError USAGE */
async function jobIdFor(client: ControlClient, text: string): Promise<string> {
  const jobs = await listJobs(client);
  if (jobs.some(({ id }) => id === text)) return text;
  const ofDisk = jobs.filter(({ disk }) => disk === text);
  if (ofDisk.length > 1) {
    const ids = ofDisk.map(({ id }) => id).join(", ");
    throw usageError(text, "is a disk with several jobs", `name one of ${ids}`);
  }
  return ofDisk[0]?.id ?? text;
}

/** What the server refuses is about the job, not about its socket. */
async function command(
  client: ControlClient,
  request: Exclude<JobsRequest, { action: "list" }>,
  id: string,
): Promise<void> {
  try {
    if (request.action === "set-speed") {
      await client.execute("block-job-set-speed", { device: id, speed: request.speed });
    } else {
      await client.execute(`job-${request.action}`, { id });
    }
  } catch (error) {
    if (!(error instanceof QmpError) || error.object !== client.path) throw error;
    throw new CowcatcherError({
      ...error.toDetails(),
      object: `job ${id}`,
      hint: "cowcatcher jobs lists the jobs",
    });
  }
}

function printJobs(output: OutputSettings, jobs: readonly JobSummary[]): void {
  if (output.json) {
    printJsonDocument(output, jobs.map(jobDocument));
    return;
  }
  for (const line of jobLines(jobs)) printLine(output, line);
}

export function jobDocument(job: JobSummary): JobDocument {
  const info = {
    jobId: job.id,
    disk: job.disk,
    target: job.target,
    totalBytes: job.progress.bytesTotal,
    live: true,
  };
  const { message_type: _, ...status } = statusMessage(info, job.progress, undefined);
  return {
    ...status,
    target: job.target,
    status: job.status,
    rate_limit: job.speed,
    t0: job.t0 ?? null,
    ...(job.snapshotExport === undefined ? {} : { snapshot_export: job.snapshotExport }),
    error: job.error === undefined ? null : errorMessage(job.error).error,
  };
}

/** A table; only its heading where there are no jobs. */
export function jobLines(jobs: readonly JobSummary[]): string[] {
  const heading = ["ID", "DISK", "STATUS", "DONE", "RATE", "LIMIT", "TIME", "BUFFER", "TARGET"];
  const rows = jobs.map(({ id, disk, status, progress, speed, target }) => [
    id,
    disk,
    status,
    formatPercent(fractionDone(progress)),
    `${formatBytes(progress.targetRate)}/s`,
    speed === 0 ? "-" : `${formatBytes(speed)}/s`,
    formatDuration(progress.elapsedMs),
    `${formatBytes(progress.bufferBytesUsed)} of ${formatBytes(progress.bufferBytesTotal)}`,
    target,
  ]);
  return alignColumns([heading, ...rows]);
}
