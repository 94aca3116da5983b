// Jobs from the moment their request is accepted until their common T0, or until there will be none. Main thread.
//
//   accepted: created, listed ─► targets claimed ─► all prepared ─► T0: each job takes its stand-in's place
//        ├─ failure ──► all is undone ──► null
//        └─ cancel of any one ──► aborting ──► all is undone, or UNDO_GRACE_MS ──► concluded ──► null
//
// Each step of a start may meet storage that does not answer. So a job that is being prepared has a stand-in in the
// list of jobs, which can be seen, paused, and above all cancelled. T0 is one instant for all: without one of them there
// is no start, and the cancel of one cancels all. It stops what can be stopped: gates open, workers leave, a server's
// answer is awaited no longer. A system call that hangs cannot be stopped; the jobs conclude without it, and what it
// yields is undone when it returns. Until then the target stays claimed: undoing (a device's header is wiped) would harm
// whoever writes there next.
//
// Whether a cancel came in time is decided in T0's own turn, synchronously: before it nothing starts, after it the
// stand-ins are out of the list and the cancel is the job's.

import { DiskNode } from "../../cow/disk-node.js";
import { CowcatcherError } from "../../errors.js";
import type { BackupRequest, JobStatus } from "../host.js";
import type { HostedJob, HostedJobParts, ListedJob } from "./hosted-job.js";
import { JOB_DEFAULTS, type JobOptions } from "../options.js";
import { type JobProgress, NO_PROGRESS } from "../progress.js";
import type { TargetClaim } from "../guard/target-claims.js";
import { type GuestFreezer, whileFrozen } from "./while-frozen.js";

/** How long a cancelled start may take to be undone before its jobs conclude without it. */
export const UNDO_GRACE_MS = 1_000;

export interface StartParts {
  requests: readonly BackupRequest[];
  nodeOf: (disk: string) => DiskNode;
  claim: (request: BackupRequest) => Promise<TargetClaim>;
  /** @throws CowcatcherError; nothing is left then. Soon after `signal` is aborted it settles, whichever way. */
  prepare: (
    request: BackupRequest,
    signal: AbortSignal,
    onTarget: HostedJobParts["onTarget"],
    claim: TargetClaim,
  ) => Promise<HostedJob>;
  /** Boundaries of T0 besides those of the jobs. */
  marks: readonly StartMark[];
  /** Has the guest hold still for T0. */
  freezer?: GuestFreezer | undefined;
  /** Puts the job into the list in the place of the one with its id. */
  list: (job: ListedJob) => void;
  /** Takes the stand-in off the list, and dismisses it. */
  forget: (job: ListedJob) => void;
  /** A job that had started, and has concluded. */
  dismiss: (id: string) => void;
  /** Called synchronously at each change of a stand-in's status but `created`. */
  onStatus: (job: ListedJob, status: JobStatus) => void;
}

/** Remembers T0 in one disk's tracking (mark.ts). */
export interface StartMark {
  /** The disks that are to hold still for it. */
  readonly nodes: readonly DiskNode[];
  beforeT0(): Promise<void>;
  /** In T0's turn. @throws CowcatcherError */
  atT0(t0Ms: number): void;
  /** There is no T0, or something else has failed. */
  abandon(): void;
}

export class JobStart {
  /** In the order of the requests. */
  readonly jobs: readonly StandIn[];
  /** Fulfilled, once it runs, when nothing of it goes on any more. */
  settled: Promise<void> = Promise.resolve();
  readonly #parts: StartParts;
  readonly #abort = new AbortController();
  readonly #claims: TargetClaim[] = [];
  readonly #prepared: HostedJob[] = [];
  /** Of the prepared jobs, and of the one that is being prepared. */
  readonly #targets: Parameters<HostedJobParts["onTarget"]>[0][] = [];
  /** What ends the start, from the moment on at which it is known. */
  #cause: unknown;
  #graceTimer: NodeJS.Timeout | undefined;
  #giveUp: () => void = () => {};
  readonly #overdue = new Promise<never>((_resolve, reject) => {
    this.#giveUp = () => reject(this.#abort.signal.reason as CowcatcherError);
  });
  #isConcluded = false;

  constructor(parts: StartParts) {
    this.#parts = parts;
    this.jobs = parts.requests.map(
      (request) => new StandIn(request, parts, (job, cause) => this.#cancel(cause ?? job.cancelledError())),
    );
    this.#overdue.catch(() => {});
  }

  /**
   * Once, when the jobs are listed. Fulfilled after T0.
   * @param onSettled called when nothing of the start goes on any more, which may be long after a cancel.
   * @throws CowcatcherError the first cause; the jobs are off the list then.
   */
  async run(onSettled: () => void): Promise<readonly HostedJob[]> {
    const work = this.#work();
    this.settled = work.then(onSettled, onSettled);
    try {
      return await Promise.race([work, this.#overdue]);
    } catch (error) {
      for (const job of this.jobs) this.#conclude(job);
      throw this.#cause ?? error;
    } finally {
      this.#isConcluded = true;
      clearTimeout(this.#graceTimer);
    }
  }

  /** Jobs that have concluded while something of them still hangs. */
  get leftBehindCount(): number {
    return this.#isConcluded ? this.jobs.length : 0;
  }

  /** The process ends now: what must not stay behind goes. */
  abortSync(): void {
    for (const target of this.#targets) target.abortSync();
  }

  async #work(): Promise<readonly HostedJob[]> {
    const { requests, nodeOf, marks, freezer } = this.#parts;
    try {
      await freezer?.check();
      await this.#prepareAll();
      const nodes = [...requests.map(({ disk }) => nodeOf(disk)), ...marks.flatMap((mark) => mark.nodes)];
      const limits = requests.map(({ options }) => options.guestTimeoutMs);
      const limitMs = Math.min(...(limits.length > 0 ? limits : [JOB_DEFAULTS.guestTimeoutMs]));
      const prepare = async (): Promise<void> => {
        await Promise.all([...this.#prepared, ...marks].map((part) => part.beforeT0()));
      };
      const { signal } = this.#abort;
      const start = (): Promise<void> =>
        DiskNode.quiesceAll(nodes, () => this.#atT0(), limitMs, signal, prepare);
      await whileFrozen(freezer, start, signal);
    } catch (error) {
      this.#cause ??= error;
      await this.#undo();
      throw error;
    }
    for (const [index, job] of this.#prepared.entries()) {
      void job.concluded.then(() => this.#claims[index]?.release());
    }
    return this.#prepared;
  }

  async #prepareAll(): Promise<void> {
    const { requests, claim, prepare } = this.#parts;
    const { signal } = this.#abort;
    // First all claims: a target that cannot be one is a fault of the request, and costs no worker.
    for (const request of requests) {
      signal.throwIfAborted();
      this.#claims.push(await claim(request));
    }
    for (const [index, request] of requests.entries()) {
      signal.throwIfAborted();
      const onTarget: HostedJobParts["onTarget"] = (target) => this.#targets.push(target);
      this.#prepared.push(await prepare(request, signal, onTarget, this.#claims[index]));
    }
  }

  /** Synchronous, with no guest write in flight. */
  #atT0(): void {
    for (const job of this.#prepared) job.checkReady();
    const t0Ms = Date.now();
    for (const mark of this.#parts.marks) mark.atT0(t0Ms);
    for (const [index, standIn] of this.jobs.entries()) {
      const job = this.#prepared[index];
      if (job !== undefined) this.#replace(standIn, job, t0Ms);
    }
    for (const [index, standIn] of this.jobs.entries()) standIn.handOver(this.#prepared[index]);
  }

  #replace(standIn: StandIn, job: HostedJob, t0Ms: number): void {
    this.#parts.list(job);
    try {
      job.start(t0Ms);
    } catch (error) {
      this.#parts.list(standIn);
      throw error;
    }
    standIn.isReplaced = true;
  }

  /** One of the group could not start: the others, started or not, end without a trace. */
  async #undo(): Promise<void> {
    for (const mark of this.#parts.marks) mark.abandon();
    for (const job of this.#prepared) job.cancel();
    await Promise.all(this.#prepared.map((job) => this.#undoOne(job)));
    await Promise.all(this.#claims.map((claim) => claim.release()));
  }

  async #undoOne(job: HostedJob): Promise<void> {
    if (job.status === "created") return job.abandon();
    await job.concluded;
    this.#parts.dismiss(job.id);
  }

  #cancel(error: CowcatcherError): void {
    if (this.#abort.signal.aborted) return;
    this.#cause ??= error;
    this.#graceTimer = setTimeout(this.#giveUp, UNDO_GRACE_MS);
    this.#abort.abort(error);
    // Threads that boot, or hang, are waited for; the unfinished target need not stay for so long.
    for (const target of this.#targets) void target.abort();
    for (const claim of this.#claims) claim.giveUp();
    for (const job of this.jobs) if (!job.isReplaced) job.abort(error);
  }

  #conclude(job: StandIn): void {
    if (job.isReplaced) return;
    job.conclude();
    this.#parts.forget(job);
  }
}

/** What is seen of a job before T0. */
export class StandIn implements ListedJob {
  readonly id: string;
  readonly disk: string;
  readonly options: JobOptions;
  readonly concluded: Promise<void>;
  status: JobStatus = "created";
  error: CowcatcherError | undefined;
  speed: number;
  /** The job itself has started. */
  isReplaced = false;
  #isPaused = false;
  readonly #sizeBytes: number;
  readonly #onStatus: StartParts["onStatus"];
  readonly #onCancel: (job: StandIn, cause: CowcatcherError | undefined) => void;
  #markConcluded: () => void = () => {};

  constructor(
    { id, disk, options }: BackupRequest,
    { nodeOf, onStatus }: Pick<StartParts, "nodeOf" | "onStatus">,
    onCancel: (job: StandIn, cause: CowcatcherError | undefined) => void,
  ) {
    this.id = id;
    this.disk = disk;
    this.options = options;
    this.speed = options.rateLimitBytes;
    this.#sizeBytes = nodeOf(disk).sizeBytes;
    this.#onStatus = onStatus;
    this.#onCancel = onCancel;
    this.concluded = new Promise((resolve) => {
      this.#markConcluded = resolve;
    });
  }

  cancel(cause?: CowcatcherError): void {
    if (this.status === "created" && !this.isReplaced) this.#onCancel(this, cause);
  }

  cancelledError(): CowcatcherError {
    return new CowcatcherError({
      code: "CANCELLED",
      object: this.options.target,
      problem: "the backup was cancelled before it began",
    });
  }

  abort(cause: CowcatcherError): void {
    this.error = cause.code === "CANCELLED" ? this.cancelledError() : cause;
    this.#setStatus("aborting");
  }

  /** No effect on one that was not cancelled: as in QEMU, that goes without an end that anybody is told of. */
  conclude(): void {
    if (this.status === "aborting") this.#setStatus("concluded");
    this.#markConcluded();
  }

  dismiss(): void {
    this.#setStatus("null");
  }

  abortSync(): void {
    // What was made for it is the start's.
  }

  /** What was asked of the stand-in, to the job that has just started. */
  handOver(job: HostedJob | undefined): void {
    if (this.speed !== this.options.rateLimitBytes) job?.setSpeed(this.speed);
    if (this.#isPaused) job?.pause();
  }

  pause(): void {
    this.#isPaused = true;
  }

  resume(): void {
    this.#isPaused = false;
  }

  setSpeed(bytesPerSecond: number): void {
    this.speed = bytesPerSecond;
  }

  progress(): JobProgress {
    return { ...NO_PROGRESS, bytesTotal: this.#sizeBytes };
  }

  #setStatus(status: JobStatus): void {
    this.status = status;
    this.#onStatus(this, status);
  }
}
