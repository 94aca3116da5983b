// Watches the engine's jobs for the control socket: turns status changes into QMP events, dismisses jobs that
// dismiss themselves, and keeps the members of a grouped transaction together.
//
// Events of a job, in this order (JOB_STATUS_CHANGE stands for itself at each change):
//   success   running … waiting, pending, (BLOCK_JOB_PENDING, job-finalize,) BLOCK_JOB_COMPLETED, concluded
//   failure   BLOCK_JOB_ERROR, aborting, BLOCK_JOB_COMPLETED with `error`, concluded
//   cancelled aborting, BLOCK_JOB_CANCELLED, concluded
//   stop      BLOCK_JOB_ERROR, paused
// `created` comes before all of them, when the request is accepted. A job that is cancelled before its T0 goes from there to
// aborting as above, one that cannot be started to `null`; both dismiss themselves, as their start is answered by an error.
// Then `null`, when the job is dismissed. The engine calls the listener synchronously, so an event leaves before
// anything that follows it; only dismissing waits for the engine to be done with its own change.
//
// Grouped: the first member that fails or is cancelled cancels the others. The engine holds those that have copied
// everything back until all have (backup/job/completion.ts).
// Main thread only. Bounded by the engine's jobs: an entry goes with its job.

import type { CowcatcherError, ErrorCode } from "../errors.js";
import type { Logger } from "../log.js";
import type { BackupJob, JobHost, JobStatus } from "../backup/host.js";
import { genericError } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { jobToWire } from "./job-wire.js";

export type EmitEvent = (event: string, data: JsonObject) => void;

export interface JobSettings {
  autoDismiss: boolean;
  /** Ids of the jobs that stand and fall together; undefined: the job is on its own. */
  group?: readonly string[] | undefined;
}

interface TrackedJob extends JobSettings {
  pauseRequested: boolean;
}

/** A job that was not started over the control socket is its starter's to dismiss. */
const FOREIGN: JobSettings = { autoDismiss: false };

export class JobMonitor {
  readonly #host: JobHost;
  readonly #emit: EmitEvent;
  readonly #logger: Pick<Logger, "warn">;
  readonly #tracked = new Map<string, TrackedJob>();
  /** Ids whose start is under way: the engine may not list them yet. */
  readonly #starting = new Set<string>();
  readonly #stopListening: () => void;

  constructor(host: JobHost, emit: EmitEvent, logger: Pick<Logger, "warn">) {
    this.#host = host;
    this.#emit = emit;
    this.#logger = logger;
    this.#stopListening = host.onStatus((job, status) => this.#onStatus(job, status));
  }

  /**
   * Before jobs are started: their first change of status may come before the start is known to have worked.
   * @throws QmpError GenericError for an id that is in use. Nothing is expected then.
   */
  expect(jobs: readonly { id: string; settings: JobSettings }[]): void {
    const ids = jobs.map(({ id }) => id);
    const taken = ids.find((id, index) => ids.indexOf(id) !== index || this.#isTaken(id));
    if (taken !== undefined) throw genericError(`Job ID '${taken}' already in use`);
    for (const { id, settings } of jobs) {
      this.#starting.add(id);
      this.#tracked.set(id, { ...settings, pauseRequested: false });
    }
  }

  /** After `expect`, when the start has worked or failed. */
  started(ids: readonly string[], worked: boolean): void {
    for (const id of ids) {
      this.#starting.delete(id);
      if (!worked) this.#tracked.delete(id);
    }
  }

  #isTaken(id: string): boolean {
    return this.#starting.has(id) || this.#host.jobs().some((job) => job.id === id);
  }

  autoDismisses(id: string): boolean {
    return this.#tracked.get(id)?.autoDismiss ?? false;
  }

  /** A pause takes effect when the workers have noticed; until then only the request tells. */
  isPaused(job: BackupJob): boolean {
    return job.status === "paused" || (this.#tracked.get(job.id)?.pauseRequested ?? false);
  }

  /** @throws QmpError GenericError if it is paused already. */
  pause(job: BackupJob): void {
    if (this.isPaused(job)) throw genericError("Job is already paused");
    this.#track(job.id).pauseRequested = true;
    job.pause();
  }

  /** @throws QmpError GenericError if it is not paused. */
  resume(job: BackupJob): void {
    if (!this.isPaused(job)) throw genericError("Can't resume a job that was not paused");
    this.#track(job.id).pauseRequested = false;
    job.resume();
  }

  /** Forgets a concluded job and says so, whether or not the engine reports the change to `null` itself. */
  dismiss(id: string): void {
    const tracked = this.#track(id);
    this.#host.dismiss(id);
    if (this.#tracked.get(id) !== tracked) return;
    this.#tracked.delete(id);
    this.#emit("JOB_STATUS_CHANGE", { id, status: "null" });
  }

  close(): void {
    this.#stopListening();
    this.#tracked.clear();
  }

  #track(id: string): TrackedJob {
    let tracked = this.#tracked.get(id);
    if (tracked === undefined) {
      tracked = { ...FOREIGN, pauseRequested: false };
      this.#tracked.set(id, tracked);
    }
    return tracked;
  }

  #onStatus(job: BackupJob, status: JobStatus): void {
    const tracked = this.#tracked.get(job.id) ?? FOREIGN;
    if (status === "null") this.#tracked.delete(job.id);
    if (status === "aborting" || status === "paused") this.#emitError(job, status);
    if (status === "concluded") this.#emitEnd(job);
    this.#emit("JOB_STATUS_CHANGE", { id: job.id, status });
    if (status === "pending" && job.options.autoFinalize === false) {
      this.#emit("BLOCK_JOB_PENDING", { type: "backup", id: job.id });
    }
    if (status === "aborting" || (status === "concluded" && job.error !== undefined)) {
      this.#cancelOthers(job, tracked);
    }
    if (status === "concluded" && tracked.autoDismiss) queueMicrotask(() => this.#autoDismiss(job, tracked));
  }

  #emitError(job: BackupJob, status: "aborting" | "paused"): void {
    const operation = job.error === undefined ? undefined : failedOperation(job, job.error);
    if (operation === undefined) return;
    const action = status === "paused" ? "stop" : "report";
    this.#emit("BLOCK_JOB_ERROR", { device: job.id, operation, action });
  }

  #emitEnd(job: BackupJob): void {
    const { bytesDone, bytesTotal } = job.progress();
    const data: JsonObject = {
      type: "backup",
      device: job.id,
      len: bytesTotal,
      offset: bytesDone,
      speed: job.speed,
    };
    const wasCancelled = isCancelled(job.error);
    if (job.error !== undefined && !wasCancelled) data.error = job.error.message;
    data["x-cowcatcher"] = jobToWire(job);
    this.#emit(wasCancelled ? "BLOCK_JOB_CANCELLED" : "BLOCK_JOB_COMPLETED", data);
  }

  #cancelOthers(failed: BackupJob, { group }: JobSettings): void {
    if (group === undefined) return;
    for (const job of this.#host.jobs()) {
      if (job.id !== failed.id && group.includes(job.id) && mayCancel(job.status)) job.cancel();
    }
  }

  #autoDismiss(job: BackupJob, tracked: JobSettings): void {
    // A client's job-dismiss, or the end of the server, may have been first.
    if (this.#tracked.get(job.id) !== tracked) return;
    try {
      this.dismiss(job.id);
    } catch (error) {
      this.#logger.warn({ job: job.id, error }, "a concluded job could not be dismissed");
    }
  }
}

/** By somebody, or by the server's end. */
function isCancelled(error: CowcatcherError | undefined): boolean {
  return error?.code === "CANCELLED" || error?.code === "SERVER_ENDED";
}

function mayCancel(status: JobStatus): boolean {
  return status !== "aborting" && status !== "concluded" && status !== "null";
}

const EITHER_SIDE: readonly ErrorCode[] = ["IO", "PROTOCOL", "FORMAT"];
const WRITE_SIDE: readonly ErrorCode[] = ["NO_SPACE", "BUFFER_FULL", "GUEST_TIMEOUT"];

/** Undefined for what is no failed I/O (a cancelled job, a dead worker, …): QEMU sends no BLOCK_JOB_ERROR then. */
function failedOperation(job: BackupJob, error: CowcatcherError): "read" | "write" | undefined {
  if (WRITE_SIDE.includes(error.code)) return "write";
  if (!EITHER_SIDE.includes(error.code)) return undefined;
  return isAboutTarget(job, error.object) ? "write" : "read";
}

/** The unfinished target has a temporary name that contains the final one's last part. */
function isAboutTarget(job: BackupJob, objectName: string): boolean {
  const { target } = job.options;
  const last = target.slice(target.lastIndexOf("/") + 1);
  return objectName === target || (last !== "" && objectName.includes(last));
}

/** QEMU's BlockDeviceIoStatus of a job. */
export function ioStatus(job: BackupJob): "ok" | "failed" | "nospace" {
  if (job.error === undefined || isCancelled(job.error)) return "ok";
  return job.error.code === "NO_SPACE" ? "nospace" : "failed";
}
