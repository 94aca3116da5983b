// Jobs over the control socket, typed, for the command line.
//
// How a watch ends. A job that dismisses itself is gone soon after its end, so the final counters and the error come
// with its last event; polling is only for progress. The server sends that event before it forgets the job, on the
// same stream, so a poll that misses the job comes after the event. A job may end before anyone watches it:
// `startBackup` therefore listens before it starts, and keeps the last event of each job it started.

import { absoluteName } from "../file-names.js";
import { isRbdAddress } from "../rbd/address.js";
import { CowcatcherError } from "../errors.js";
import type { BasisInfo, JobStatus, RepositoryOutcome } from "../backup/host.js";
import { JOB_DEFAULTS } from "../backup/options.js";
import type { FreezeInfo } from "../backup/job/while-frozen.js";
import type { JobProgress } from "../backup/progress.js";
import { argumentsFromBackup } from "./backup-arguments.js";
import type { BackupOrder } from "./backup-arguments.js";
import { COMMAND_MS, type ControlClient, type ControlEvent } from "../qmp/client.js";
import { errorFromWire, isJsonObject } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { FREEZE_MS_MAX } from "../qemu/guest-freeze.js";
import { T0_GATE_MS } from "../qemu/t0-gate.js";
import { basisFromWire, freezeFromWire, progressFromWire, repositoryFromWire } from "./job-wire.js";

export type { BackupOrder } from "./backup-arguments.js";

const POLL_MS = 200;
/** The longest time of a timer. */
const TIMER_MS_MAX = 2 ** 31 - 1;

export interface JobSummary {
  id: string;
  status: JobStatus;
  disk: string;
  target: string;
  /** Bytes a second; 0: no limit. */
  speed: number;
  progress: JobProgress;
  error?: CowcatcherError | undefined;
  /** Name of the export of the disk's T0 view, where the job has one. */
  snapshotExport?: string | undefined;
  /** The instant that the backup shows, RFC 3339 in UTC; undefined before it. */
  t0?: string | undefined;
}

export interface JobResult {
  progress: JobProgress;
  /** How much was copied, and why. */
  basis?: BasisInfo | undefined;
  /** Of a disk of a backup in a repository. */
  repository?: RepositoryOutcome | undefined;
  /** The first cause; absent when the backup is complete. Code CANCELLED for a cancelled one. */
  error?: CowcatcherError | undefined;
  /** As in JobSummary. */
  t0?: string | undefined;
}

export interface StartOptions {
  /** One failure cancels the others. */
  grouped?: boolean;
}

/** Last events of jobs that were started over a connection and are not watched yet. */
const endedJobs = new WeakMap<ControlClient, Map<string, JobResult>>();

/**
 * Starts backups, several at one T0, or none. Returns after T0. Relative paths are resolved in this process's
 * folder, not the server's. Until it returns the server takes no other command from this client; to cancel what it starts
 * takes another one. Resolves to what became of the freeze, if one was asked for.
 * @throws CowcatcherError as JobHost.startBackups does.
 */
export async function startBackup(
  client: ControlClient,
  orders: readonly BackupOrder[],
  { grouped = false }: StartOptions = {},
): Promise<FreezeInfo | undefined> {
  const forget = keepLastEvents(client, new Set(orders.map(({ id }) => id)));
  const requests = orders.map((order) => argumentsFromBackup(withAbsolutePaths(order)));
  const limits = { timeoutMs: startLimitMs(orders) };
  try {
    const [only] = requests;
    if (requests.length === 1 && only !== undefined) {
      return freezeFromWire(await client.execute("drive-backup", only, limits));
    }
    const actions = requests.map((data) => ({ type: "drive-backup", data }));
    const properties = { "completion-mode": grouped ? "grouped" : "individual" };
    return freezeFromWire(await client.execute("transaction", { actions, properties }, limits));
  } catch (error) {
    forget();
    throw error;
  }
}

/** The server waits for the guests' writes in flight for as long as they may take; who gave up before left it a job. */
function startLimitMs(orders: readonly BackupOrder[]): number {
  const guestMs = orders.map(({ options }) => options.guestTimeoutMs ?? JOB_DEFAULTS.guestTimeoutMs);
  const freezeMs = orders.some(({ guestAgent }) => guestAgent !== undefined) ? FREEZE_MS_MAX + T0_GATE_MS : 0;
  return Math.min(COMMAND_MS + freezeMs + Math.max(0, ...guestMs), TIMER_MS_MAX);
}

/**
 * Follows a job to its end.
 * @param onProgress called at once and then about five times a second, with the counters and the status.
 * @throws CowcatcherError NOT_FOUND if there is no such job, IO if the connection is lost. A backup that fails is
 *   no exception here: it is the result's `error`.
 */
export async function watchJob(
  client: ControlClient,
  id: string,
  onProgress: (progress: JobProgress, status: JobStatus) => void,
  { pollMs = POLL_MS } = {},
): Promise<JobResult> {
  const bell = new Bell();
  const stopEvents = client.onEvent((event) => {
    const result = lastEventOf(event, id);
    if (result !== undefined) bell.ring(result);
  });
  const stopLoss = client.onLoss(() => bell.ring(undefined));
  try {
    for (;;) {
      const result = bell.result ?? endedJob(client, id);
      if (result !== undefined) return result;
      const job = await findJob(client, id).catch((error: unknown) => {
        // A server that ends says how the job ended, and then nothing more.
        if (bell.result === undefined) throw error;
        return undefined;
      });
      if (bell.result !== undefined) continue;
      if (job?.status === "concluded") return { progress: job.progress, error: job.error, t0: job.t0 };
      if (job === undefined) throw noSuchJob(id);
      onProgress(job.progress, job.status);
      await bell.wait(pollMs);
    }
  } finally {
    stopEvents();
    stopLoss();
    endedJobs.get(client)?.delete(id);
  }
}

async function findJob(client: ControlClient, id: string): Promise<JobSummary | undefined> {
  return (await listJobs(client)).find((candidate) => candidate.id === id);
}

/** The server's jobs, oldest first. @throws CowcatcherError */
export async function listJobs(client: ControlClient): Promise<JobSummary[]> {
  const answer = await client.execute("query-jobs");
  if (!Array.isArray(answer)) {
    throw new CowcatcherError({
      code: "PROTOCOL",
      object: client.path,
      problem: "query-jobs answered no list",
    });
  }
  return answer.filter(isJsonObject).map(readJob);
}

function readJob({ id, status, error, "x-cowcatcher": extra }: JsonObject): JobSummary {
  const wire = isJsonObject(extra) ? extra : {};
  return {
    id: text(id),
    status: text(status) as JobStatus,
    disk: text(wire.disk),
    target: text(wire.target),
    speed: typeof wire.speed === "number" ? wire.speed : 0,
    progress: progressFromWire(wire),
    error: readError(wire.error, error, text(id)),
    t0: typeof wire.t0 === "string" ? wire.t0 : undefined,
    snapshotExport: typeof wire["snapshot-export"] === "string" ? wire["snapshot-export"] : undefined,
  };
}

function lastEventOf({ event, data }: ControlEvent, id: string): JobResult | undefined {
  if (event !== "BLOCK_JOB_COMPLETED" && event !== "BLOCK_JOB_CANCELLED") return undefined;
  if (data.device !== id) return undefined;
  const wire = isJsonObject(data["x-cowcatcher"]) ? data["x-cowcatcher"] : {};
  const fallback = event === "BLOCK_JOB_CANCELLED" ? "cancelled" : data.error;
  return {
    progress: progressFromWire(wire),
    basis: basisFromWire(wire),
    repository: repositoryFromWire(wire),
    error: readError(wire.error, fallback, id),
    t0: typeof wire.t0 === "string" ? wire.t0 : undefined,
  };
}

function readError(details: unknown, description: unknown, id: string): CowcatcherError | undefined {
  const error = errorFromWire(details);
  if (error !== undefined || typeof description !== "string") return error;
  return new CowcatcherError({ code: "IO", object: `job ${id}`, problem: description });
}

function text(value: unknown): string {
  return typeof value === "string" ? value : "";
}

/** Returns the function that ends it. */
function keepLastEvents(client: ControlClient, ids: Set<string>): () => void {
  const ended = endedJobs.get(client) ?? new Map<string, JobResult>();
  endedJobs.set(client, ended);
  for (const id of ids) ended.delete(id);
  const stop = client.onEvent((event) => {
    for (const id of ids) {
      const result = lastEventOf(event, id);
      if (result === undefined) continue;
      ended.set(id, result);
      ids.delete(id);
    }
    if (ids.size === 0) stop();
  });
  return stop;
}

/** The result of a job that this client has started, if it has ended and is not watched yet. */
export function endedJob(client: ControlClient, id: string): JobResult | undefined {
  return endedJobs.get(client)?.get(id);
}

function withAbsolutePaths(order: BackupOrder): BackupOrder {
  const { target, spillDir } = order.options;
  const options = { ...order.options };
  // "null:" and URIs (nbd://…) are no paths; a repository's address is absolute.
  const isPath = options.repository === undefined;
  if (isPath && !/^(null:$|[a-z+]+:\/\/)/.test(target) && !isRbdAddress(target))
    options.target = absoluteName(target);
  if (spillDir !== undefined) options.spillDir = absoluteName(spillDir);
  return { ...order, options };
}

function noSuchJob(id: string): CowcatcherError {
  return new CowcatcherError({ code: "NOT_FOUND", object: `job ${id}`, problem: "no such job" });
}

/** Lets a wait end early, once. */
class Bell {
  result: JobResult | undefined;
  #wake: (() => void) | undefined;

  /** @param result undefined: only wake, the next command says why. */
  ring(result: JobResult | undefined): void {
    this.result ??= result;
    this.#wake?.();
  }

  wait(ms: number): Promise<void> {
    if (this.result !== undefined) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
