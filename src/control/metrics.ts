// `serve --metrics ADDR:PORT`: what the server's disks and backups have come to, in Prometheus' text format.
//
// Nothing is measured for it: the jobs' own counters are read when somebody asks, some microseconds a job, and once when
// a job ends, so that counters go on counting when it is forgotten. Names and units by Prometheus' rules: base units,
// _total for what only grows, and nothing that is unknown. Main thread; few connections, each of bounded life.
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import type { BackupJob, JobHost, JobStatus } from "../backup/host.js";
import type { JobProgress } from "../backup/progress.js";
import { noWaits, WAIT_BOUNDS_SECONDS } from "../cow/wait-histogram.js";
import { ioError } from "../errors.js";

/** Sums of a disk's jobs that have ended. */
interface Totals {
  writtenBytes: number;
  captureCount: number;
  capturedBytes: number;
  spilledBytes: number;
  guestWaitMs: number;
  guestWaitCounts: readonly number[];
  ignoredErrorCount: number;
  done: number;
  failed: number;
  cancelled: number;
}

const MAX_CONNECTIONS = 8;
const TIMEOUT_MS = 10_000;

type Host = Pick<JobHost, "disks" | "jobs" | "onStatus">;

export class Metrics {
  readonly #totals = new Map<string, Totals>();
  readonly #counted = new WeakSet<BackupJob>();
  readonly #stop: () => void;

  constructor(
    private readonly host: Host,
    private readonly version: string,
  ) {
    this.#stop = host.onStatus((job, status) => this.#note(job, status));
  }

  close(): void {
    this.#stop();
  }

  /** All samples. */
  text(): string {
    const page = new Page();
    page.sample("cowcatcher_build_info", "gauge", "The server's version.", { version: this.version }, 1);
    const running = this.host.jobs().filter((job) => !this.#counted.has(job));
    for (const { name: disk, sizeBytes, tracking } of this.host.disks()) {
      const labels = { disk };
      const jobs = running.filter((job) => job.disk === disk);
      const progresses = jobs.map((job) => job.progress());
      page.sample("cowcatcher_disk_size_bytes", "gauge", "Size of the disk.", labels, sizeBytes);
      if (tracking !== undefined) {
        const isGood = Number(tracking.state === "tracking");
        page.sample("cowcatcher_disk_tracked", "gauge", "Whether its changes are tracked.", labels, isGood);
        const { length } = tracking.checkpoints;
        page.sample("cowcatcher_disk_checkpoints", "gauge", "Checkpoints of the disk.", labels, length);
      }
      page.sample("cowcatcher_jobs", "gauge", "Backups that are running.", labels, jobs.length);
      this.#gauges(page, labels, progresses);
      this.#counters(page, labels, this.#totals.get(disk) ?? noTotals(), progresses);
    }
    return page.text();
  }

  #gauges(page: Page, labels: Labels, progresses: readonly JobProgress[]): void {
    const sum = (of: (progress: JobProgress) => number): number =>
      progresses.reduce((total, progress) => total + of(progress), 0);
    const used = sum(({ bufferBytesUsed }) => bufferBytesUsed);
    const size = sum(({ bufferBytesTotal }) => bufferBytesTotal);
    page.sample("cowcatcher_buffer_used_bytes", "gauge", "Copy-before-write buffer in use.", labels, used);
    page.sample("cowcatcher_buffer_size_bytes", "gauge", "Copy-before-write buffer.", labels, size);
    const waits = progresses.map(({ guestWaitMsMax }) => guestWaitMsMax);
    const longest = Math.max(0, ...waits) / 1000;
    const help = "The longest wait of a guest write in backups that are running.";
    page.sample("cowcatcher_guest_wait_max_seconds", "gauge", help, labels, longest);
    if (progresses.length === 0) return;
    const total = sum(({ bytesTotal }) => bytesTotal);
    const ratio = total === 0 ? 1 : sum(({ bytesDone }) => bytesDone) / total;
    page.sample("cowcatcher_job_done_ratio", "gauge", "How far running backups are.", labels, ratio);
  }

  #counters(page: Page, labels: Labels, ended: Totals, progresses: readonly JobProgress[]): void {
    const now = progresses.reduce((totals, progress) => added(totals, progress), { ...ended });
    const counter = (name: string, help: string, value: number, more: Labels = {}): void =>
      page.sample(`cowcatcher_${name}_total`, "counter", help, { ...labels, ...more }, value);
    counter("written_bytes", "Data sent to targets.", now.writtenBytes);
    counter("captures", "Copies made before guest writes.", now.captureCount);
    counter("captured_bytes", "Bytes of those copies.", now.capturedBytes);
    counter("spilled_bytes", "Bytes that went to spill files.", now.spilledBytes);
    const waits = { bounds: WAIT_BOUNDS_SECONDS, counts: now.guestWaitCounts, sum: now.guestWaitMs / 1000 };
    page.histogram("cowcatcher_guest_wait_seconds", "Waits of guest writes for a backup.", labels, waits);
    counter("ignored_errors", "Errors passed over as asked.", now.ignoredErrorCount);
    for (const result of ["done", "failed", "cancelled"] as const) {
      counter("jobs_ended", "Backups that have ended.", now[result], { result });
    }
  }

  #note(job: BackupJob, status: JobStatus): void {
    if ((status !== "concluded" && status !== "null") || this.#counted.has(job)) return;
    this.#counted.add(job);
    const totals = added(this.#totals.get(job.disk) ?? noTotals(), job.progress());
    const { error } = job;
    totals[error === undefined ? "done" : error.code === "CANCELLED" ? "cancelled" : "failed"]++;
    this.#totals.set(job.disk, totals);
  }
}

function noTotals(): Totals {
  return {
    ...{ writtenBytes: 0, captureCount: 0, capturedBytes: 0, spilledBytes: 0, guestWaitMs: 0 },
    guestWaitCounts: noWaits(),
    ...{ ignoredErrorCount: 0, done: 0, failed: 0, cancelled: 0 },
  };
}

function added(totals: Totals, progress: JobProgress): Totals {
  return {
    ...totals,
    writtenBytes: totals.writtenBytes + progress.bytesWritten,
    captureCount: totals.captureCount + progress.captureCount,
    capturedBytes: totals.capturedBytes + progress.capturedBytes,
    spilledBytes: totals.spilledBytes + progress.spilledBytes,
    guestWaitMs: totals.guestWaitMs + progress.guestWaitMsTotal,
    guestWaitCounts: totals.guestWaitCounts.map(
      (count, range) => count + (progress.guestWaitCounts[range] ?? 0),
    ),
    ignoredErrorCount: totals.ignoredErrorCount + progress.ignoredErrorCount,
  };
}

type Labels = Record<string, string>;

interface Histogram {
  /** Upper ends of the ranges, ascending; a last range has what is beyond them. */
  bounds: readonly number[];
  /** Of each range by itself. */
  counts: readonly number[];
  sum: number;
}

/** Samples by their metric: all of one stand together, behind its help and type. */
class Page {
  readonly #metrics = new Map<string, string[]>();

  sample(name: string, type: "gauge" | "counter", help: string, labels: Labels, value: number): void {
    this.#lines(name, type, help).push(line(name, labels, value));
  }

  /** The text format wants each bucket to hold those before it, too, and one of +Inf for all. */
  histogram(name: string, help: string, labels: Labels, { bounds, counts, sum }: Histogram): void {
    const lines = this.#lines(name, "histogram", help);
    let count = 0;
    for (const [range, bound] of [...bounds, Infinity].entries()) {
      count += counts[range] ?? 0;
      const le = bound === Infinity ? "+Inf" : String(bound);
      lines.push(line(`${name}_bucket`, { ...labels, le }, count));
    }
    lines.push(line(`${name}_sum`, labels, sum), line(`${name}_count`, labels, count));
  }

  #lines(name: string, type: string, help: string): string[] {
    const lines = this.#metrics.get(name) ?? [`# HELP ${name} ${help}`, `# TYPE ${name} ${type}`];
    this.#metrics.set(name, lines);
    return lines;
  }

  text(): string {
    return `${[...this.#metrics.values()].flat().join("\n")}\n`;
  }
}

function line(name: string, labels: Labels, value: number): string {
  const pairs = Object.entries(labels).map(([label, text]) => `${label}="${escaped(text)}"`);
  return `${name}{${pairs.join(",")}} ${value}`;
}

/** Of label values: backslash, quote and line feed. */
function escaped(text: string): string {
  return text.replace(/\\/g, "\\\\").replace(/"/g, '\\"').replace(/\n/g, "\\n");
}

export interface MetricsServer {
  /** As bound. */
  readonly port: number;
  close(): void;
}

/** @throws CowcatcherError IO where it cannot listen there. */
export async function serveMetrics(
  host: Host,
  version: string,
  place: { host: string; port: number },
): Promise<MetricsServer> {
  const metrics = new Metrics(host, version);
  const server = createServer(
    { requestTimeout: TIMEOUT_MS, headersTimeout: TIMEOUT_MS },
    (request, response) => {
      const isAsked = request.url?.split("?")[0] === "/metrics";
      const isRead = request.method === "GET" || request.method === "HEAD";
      const status = !isAsked ? 404 : isRead ? 200 : 405;
      const type = "text/plain; version=0.0.4; charset=utf-8";
      response.writeHead(status, { "content-type": type, connection: "close" });
      response.end(status === 200 && request.method === "GET" ? metrics.text() : "");
    },
  );
  server.maxConnections = MAX_CONNECTIONS;
  await listen(server, place);
  return {
    port: (server.address() as AddressInfo).port,
    close: () => {
      metrics.close();
      server.close();
      server.closeAllConnections();
    },
  };
}

async function listen(server: Server, { host, port }: { host: string; port: number }): Promise<void> {
  try {
    await new Promise<void>((settle, reject) => {
      server.once("error", reject);
      server.listen({ host, port }, settle);
    });
  } catch (error) {
    throw ioError("listen on", `${host}:${port}`, error);
  }
  // Running out of descriptors fails one question; no guest's disk may go by it.
  server.removeAllListeners("error");
  server.on("error", () => undefined);
}
