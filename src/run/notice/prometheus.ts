// Metrics of jobs for node_exporter's textfile collector: FOLDER/cowcatcher-JOB.prom, replaced as a whole, so that the
// collector never reads half of it. One file a job: a run of one job leaves the others' values. Names and units are by
// Prometheus' rules (base units, no timestamps, a line feed at the end); each value is of the last run, hence a gauge.
import { rename, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { ioError } from "../../errors.js";
import type { DiskResult, JobResult } from "../result.js";

interface Metric {
  name: string;
  help: string;
  ofJob?: (result: JobResult, lastSuccess: number | undefined) => number | undefined;
  ofDisk?: (disk: DiskResult) => number | undefined;
}

const LAST_SUCCESS = "cowcatcher_backup_last_success_timestamp_seconds";

const METRICS: readonly Metric[] = [
  {
    name: LAST_SUCCESS,
    help: "When the last good backup began.",
    ofJob: (result, lastSuccess) => (isGood(result) ? seconds(result.started) : lastSuccess),
  },
  {
    name: "cowcatcher_backup_last_run_timestamp_seconds",
    help: "When the last run began.",
    ofJob: ({ started }) => seconds(started),
  },
  {
    name: "cowcatcher_backup_last_exit_code",
    help: "Exit code of the last run, 0 for a good one.",
    ofJob: ({ exit_code }) => exit_code,
  },
  {
    name: "cowcatcher_backup_duration_seconds",
    help: "How long the last run took.",
    ofJob: (result) => result.seconds,
  },
  { name: "cowcatcher_backup_tries", help: "Tries of the last run.", ofJob: ({ tries }) => tries },
  {
    name: "cowcatcher_backup_incremental",
    help: "Whether the last run made an incremental backup.",
    ofJob: ({ level }) => (level === null ? undefined : Number(level === "incremental")),
  },
  {
    name: "cowcatcher_backup_removed",
    help: "Old backups that the last run removed.",
    ofJob: ({ removed }) => removed.length,
  },
  { name: "cowcatcher_backup_disk_bytes", help: "Size of the disk.", ofDisk: ({ bytes }) => bytes },
  {
    name: "cowcatcher_backup_written_bytes",
    help: "Data that the last backup copied; into a repository what was new there.",
    ofDisk: ({ bytes_written }) => bytes_written,
  },
  {
    name: "cowcatcher_backup_target_bytes",
    help: "What the last backup takes of its storage.",
    ofDisk: ({ bytes_on_target }) => bytes_on_target ?? undefined,
  },
  {
    name: "cowcatcher_backup_captured_bytes",
    help: "Data kept from before guest writes.",
    ofDisk: ({ captured_bytes }) => captured_bytes,
  },
  {
    name: "cowcatcher_backup_spilled_bytes",
    help: "Data that went to the spill file.",
    ofDisk: ({ spilled_bytes }) => spilled_bytes,
  },
  {
    name: "cowcatcher_backup_guest_waits",
    help: "Guest writes that waited for the backup.",
    ofDisk: ({ guest_waits }) => guest_waits,
  },
  {
    name: "cowcatcher_backup_guest_wait_seconds",
    help: "All of their waits together.",
    ofDisk: ({ guest_wait_ms_total }) => guest_wait_ms_total / 1000,
  },
  {
    name: "cowcatcher_backup_guest_wait_max_seconds",
    help: "The longest wait of a guest write.",
    ofDisk: ({ guest_wait_ms_max }) => guest_wait_ms_max / 1000,
  },
];

/** @param lastSuccess of an earlier run, in seconds since 1970 */
export function metricsText(result: JobResult, lastSuccess: number | undefined): string {
  const lines: string[] = [];
  const labels = { backup_job: result.job, group: result.group };
  for (const { name, help, ofJob, ofDisk } of METRICS) {
    const values: string[] = [];
    const value = ofJob?.(result, lastSuccess);
    if (value !== undefined) values.push(sample(name, labels, value));
    for (const disk of ofDisk === undefined ? [] : result.disks) {
      const one = ofDisk?.(disk);
      if (one !== undefined) values.push(sample(name, { ...labels, disk: disk.disk }, one));
    }
    if (values.length > 0) lines.push(`# HELP ${name} ${help}`, `# TYPE ${name} gauge`, ...values);
  }
  return `${lines.join("\n")}\n`;
}

/** @throws CowcatcherError IO, NO_SPACE, NOT_FOUND */
export async function writeMetrics(folder: string, result: JobResult): Promise<void> {
  if (result.result === "skipped") return;
  const path = join(folder, `cowcatcher-${result.job}.prom`);
  // The collector reads *.prom alone.
  const temporary = `${path}.${process.pid}`;
  try {
    const earlier = await readFile(path, "utf8").catch(() => "");
    await writeFile(temporary, metricsText(result, lastSuccessIn(earlier)), { mode: 0o644 });
    await rename(temporary, path);
  } catch (error) {
    throw ioError("write the metrics", path, error);
  }
}

export function lastSuccessIn(text: string): number | undefined {
  const found = new RegExp(`^${LAST_SUCCESS}\\{[^\\n]*\\} (\\S+)$`, "m").exec(text)?.[1];
  const value = Number(found ?? NaN);
  return Number.isFinite(value) ? value : undefined;
}

function isGood({ result, exit_code }: JobResult): boolean {
  return result === "done" && exit_code === 0;
}

function seconds(time: string): number {
  return Date.parse(time) / 1000;
}

function sample(name: string, labels: Record<string, string>, value: number): string {
  const pairs = Object.entries(labels).map(([label, text]) => `${label}="${escaped(text)}"`);
  return `${name}{${pairs.join(",")}} ${value}`;
}

/** Of label values (Prometheus' exposition format): backslash, quote and line feed. */
function escaped(text: string): string {
  return text.replace(/\\/g, "\\\\").replace(/"/g, '\\"').replace(/\n/g, "\\n");
}
