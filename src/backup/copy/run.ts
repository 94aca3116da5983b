// The copy itself, live or offline: a target, the memory that threads share, and the pool that drains into it.
// Main thread.
//
//   prepare ──(a worker ready)──► begin, at T0 ──► ended: every chunk is in the target, or the first failure
//
// The run ends by itself when the sweep is over, or by `abort`: the workers see it at their next step; one that
// sits in a write to a target that does not answer is left behind after ABORT_GRACE_MS. Either way `ended`
// settles, once, with the first cause.

import { join } from "node:path";
import { setImmediate as nextTurn, setTimeout as delay } from "node:timers/promises";
import { MessageChannel, type MessagePort } from "node:worker_threads";
import type { Piscina } from "piscina";
import {
  BLOCK_BYTES,
  chunkedGeometryOf,
  type Cut,
  FINE_CUT,
  FINE_CUT_MAX_DISK_BYTES,
  type Geometry,
  SLOT_BYTES,
  LONG_CUT,
  USUAL_CUT,
} from "../../cow/geometry.js";
import {
  type AllocateTable,
  CNT_DONE_BYTES,
  CNT_WRITTEN_BYTES,
  createSharedState,
  CTL_AHEAD_CHUNKS,
  CTL_IGNORED_ERRORS,
  CTL_READING,
  CTL_RUN,
  CTL_SWEEP,
  CTL_USED_BLOCKS,
  RUN_ABORTING,
  RUN_PAUSED,
  RUN_PREPARING,
  RUN_RUNNING,
  type SharedState,
} from "../../cow/shared.js";
import { changeLimit } from "../../cow/throttle.js";
import {
  CowcatcherError,
  messageOf,
  threadStartError,
  toCowcatcherError,
  workingFolderError,
} from "../../errors.js";
import type { FrozenSource, SourceDescription } from "../../block/device.js";
import { describeStore } from "../../repository/store/describe-store.js";
import { NULL_TARGET_PATH } from "../../target/null.js";
import type { Target } from "../../target/target.js";
import { type DirtyRuns, markClean } from "./incremental.js";
import { PagePreparer } from "./page-preparer.js";
import { type BufferMemory, MAPPED_BYTES_MAX } from "../../cow/slot-memory.js";
import { copyHere } from "./here.js";
import { allTakersAreDone, relieve, type ReliefParts } from "./relief.js";
import { createCopyPool, endPool, poolFailure, poolHasBooted } from "./pool.js";
import type { CopyThreads } from "./threads.js";
import type { CopyResult, CopyTask, WorkerCommand, WorkerMessage } from "./task.js";
import type { JobOptions } from "../options.js";
import { type JobProgress, NO_PROGRESS } from "../progress.js";
import { RateMeter } from "./rate-meter.js";
import { openReadAhead, type ReadAheadFile } from "../memory/read-ahead-file.js";
import { spillBitmapBytes } from "../../cow/spill.js";
import type { StorageHands } from "../storage/protocol.js";
import { RemoteSpill } from "../storage/remote-spill.js";
import { roundUp } from "../../units.js";
import { mayHang } from "./thread-boots.js";

/** A live backup's workers leave the processors to the guest and to the thread that serves it: see docs/measurements/tried.md. */
export const LIVE_WORKER_NICENESS = 10;
export const ABORT_GRACE_MS = 2_000;
export interface CopyRunOptions {
  job: JobOptions;
  /**
   * Gives the same pool each time, of `job.workerCount` threads; it becomes the run's, which ends it. Made by the run
   * where undefined.
   */
  pool?: (() => Piscina) | undefined;
  /** Where the run has its pool from instead, and gives it back to if all threads are fit for another job. */
  threads?: CopyThreads | undefined;
  /** Gives the tables; see table-store.ts. Plain memory where undefined. */
  allocateTable?: AllocateTable | undefined;
  target: Target;
  sizeBytes: number;
  sourceClusterBytes: number;
  /** Memory of the copy-before-write buffer, and how much of it this job uses; 0 for none. */
  slots: BufferMemory;
  bufferBytes: number;
  live: boolean;
  /** Not of a live run: this thread copies first, and others are started where there is more to do (here.ts). */
  beginsHere?: boolean | undefined;
  /** Where a live run has its spill; undefined: nothing is captured here. */
  hands?: StorageHands | undefined;
  /** Ends the run when it is aborted before T0. */
  signal?: AbortSignal | undefined;
  /**
   * Another program has the source, behind connections that the threads hold (src/qemu): called when the copy is
   * over, well or not, and awaited before the threads end and with them their connections. Never rejects.
   */
  beforeThreadsEnd?: (() => Promise<void>) | undefined;
  /** Their captures are in nobody's ring here: what is told by `hurry` is a hint of them. */
  hasForeignCaptures?: boolean | undefined;
  /** So much of the source may be read sooner than the target takes it; see cow/read-ahead.ts. Undefined: nothing is. */
  readAheadBytes?: number | undefined;
  /** Before `ended` settles: a worker may still touch the shared tables and, if it was not ready yet, the buffer. */
  onLeftBehind?: (() => void) | undefined;
  /** Most workers that the source is fit for; undefined: any number. */
  workerLimit?: number | undefined;
  /** A worker has read and written for the first time; or the run has ended without that. */
  onWorkersIn?: (() => void) | undefined;
  /** Incremental: what changed since the backup that the target builds on. Nothing else is copied. */
  dirty?: DirtyRuns | undefined;
  /** It is noted which clusters the target has (SharedState.written). */
  notesWritten?: boolean | undefined;
  /** A worker has paused the job for an error under the policy `stop`. */
  onStopped?: ((error: CowcatcherError) => void) | undefined;
  /** The run has failed after T0: called once, at the first cause, which may be long before `ended` settles. */
  onFailed?: ((error: CowcatcherError) => void) | undefined;
}

/** A server that takes only so many clients has the last worker wait as long. */
const FIRST_WRITE_POLL_MS = 50;
/** So long only the first worker of a job that reads ahead is there. */
const READS_ALONE_MS = 1_000;
const READS_ALONE_POLL_MS = 50;

export class CopyRun {
  /** Fulfilled when everything is in the target; rejects with the first cause. */
  readonly ended: Promise<void>;
  readonly shared: SharedState;
  readonly geometry: Geometry;
  readonly spill: RemoteSpill | null;
  readonly #readAhead: ReadAheadFile | null;
  readonly #options: CopyRunOptions;
  /** Undefined: no thread was needed yet. */
  #pool: Piscina | undefined;
  readonly #ports: MessagePort[] = [];
  readonly #rate = new RateMeter();
  #preparer: PagePreparer | undefined;
  #firstError: CowcatcherError | undefined;
  /** What a worker gave up with because another one had failed, whose own error may arrive later. */
  #consequence: CowcatcherError | undefined;
  /** Of each worker that was started: see #seeToEnd. */
  readonly #workers: Promise<boolean>[] = [];
  /** A worker has found nothing left to do. */
  #isDrained = false;
  #startMs = 0;
  #endMs: number | undefined;
  /** Set at T0. */
  #source: SourceDescription | undefined;
  /** Fulfilled at T0, or when the run is over before. */
  readonly #hasBegun = withResolvers();
  #leftBehind = false;
  #settle: { resolve: () => void; reject: (error: CowcatcherError) => void };

  private constructor(
    options: CopyRunOptions,
    shared: SharedState,
    spill: RemoteSpill | null,
    readAhead: ReadAheadFile | null,
  ) {
    this.#options = options;
    this.shared = shared;
    this.geometry = shared.geometry;
    this.spill = spill;
    this.#readAhead = readAhead;
    const { promise, resolve, reject } = withResolvers();
    this.ended = promise;
    this.#settle = { resolve, reject };
    // Whoever started the run looks at `ended`; until then a failure is not an unhandled one.
    promise.catch(() => {});
    if (options.beginsHere !== true) this.#poolNow();
  }

  #poolNow(): Piscina {
    if (this.#pool !== undefined) return this.#pool;
    const { pool, threads, job } = this.#options;
    const taken = pool?.() ?? threads?.take(job.workerCount) ?? createCopyPool(job.workerCount);
    // A thread that fails while it has no task, as one that cannot be started. Unheard, it would end the process.
    taken.on("error", this.#onPoolError);
    this.#pool = taken;
    const failure = pool && poolFailure(taken);
    if (failure !== undefined) throw workerError(failure.error);
    return taken;
  }

  /**
   * Starts the workers; for a live backup the first, and waits until it is ready: that a thread can be had is known
   * before T0. The buffer's mapped pages are made ready from now on. An offline copy has no T0 to be ready
   * for, and the first worker there begins.
   * @throws CowcatcherError; nothing is left behind but the target, which is the caller's.
   */
  static async prepare(given: CopyRunOptions): Promise<CopyRun> {
    const options = withinLimits(given);
    const { job, target, sizeBytes, sourceClusterBytes, slots, bufferBytes, allocateTable } = options;
    if (job.verify) checkReadable(target);
    const geometry = chunkedGeometryOf(
      sizeBytes,
      cutFor(options),
      target.chunkBytes ?? 0,
      sourceClusterBytes,
      target.granularityBytes,
    );
    const shared = createSharedState(geometry, slots, bufferBytes, job.verify, allocateTable, {
      notesWritten: options.notesWritten,
      capturedOnly: job.oldDataOnly,
    });
    const spill = await openSpill(options, geometry);
    if (options.dirty) markClean(shared, options.dirty);
    if (options.signal?.aborted) {
      spill?.close();
      options.signal.throwIfAborted();
    }
    const readAhead = openReadAhead(options.readAheadBytes ?? 0, geometry.chunkBytes, bufferBytes);
    const run = new CopyRun(options, shared, spill, readAhead);
    run.setSpeed(job.rateLimitBytes);
    const cancel = (): void => run.abort(workerError(options.signal?.reason));
    options.signal?.addEventListener("abort", cancel, { once: true });
    try {
      await run.#startWorkers();
    } catch (error) {
      run.abort(workerError(error));
      await run.ended.catch(() => {});
      throw run.#firstError ?? error;
    }
    return run;
  }

  /**
   * A live backup starts its other workers from T0 on, in turn, and none where the first has done everything by then:
   * T0 need not wait for them, as what they would drain lies in the buffer.
   */
  async #startWorkers(): Promise<void> {
    const { live, job, beginsHere } = this.#options;
    const ready: Promise<void>[] = [];
    let others = Promise.resolve();
    try {
      if (live) await this.#prepareBuffer();
      const firstCount = live ? 1 : beginsHere ? 0 : job.workerCount;
      for (let index = 0; index < firstCount; index++) ready.push(this.#startWorker(index));
      if (live) others = this.#startOthers();
      else if (beginsHere) others = this.#beginHere();
    } finally {
      // Also where the system has no thread for the next one: those that are there are seen to their end.
      void this.#watch(others);
    }
    const allReady = Promise.all(ready);
    // One that is left behind says nothing any more.
    if (live) await Promise.race([allReady, this.ended]);
    // A worker that fails before it is ready fails its task, and with it the run.
    else allReady.catch(() => {});
  }

  /** Settles when no other one is to be started. Never rejects. */
  async #startOthers(): Promise<void> {
    await this.#hasBegun.promise;
    try {
      if (this.#readAhead !== null) await this.#letFirstReadAlone();
      for (let index = 1; index < this.#options.job.workerCount && !this.isAllRead; index++) {
        await this.#letGuestGoFirst();
        // One that began after an abort would not hear of it, and wait for T0 until it is given up.
        if (this.#firstError !== undefined || this.#isDrained) return;
        void this.#startWorker(index);
      }
    } catch (error) {
      this.abort(workerError(error));
    }
  }

  /**
   * This thread copies, and the others while it does, where it is not soon done; after a while one takes its place.
   * Settles when no other one is to be started. Never rejects.
   */
  async #beginHere(): Promise<void> {
    await this.#hasBegun.promise;
    if (this.#source === undefined) return;
    let isRelieved = false;
    const here = this.#copyHere(this.#source, () => isRelieved);
    this.#workers.push(here);
    try {
      isRelieved = await relieve({
        here,
        workerCount: this.#options.job.workerCount,
        startWorker: (index) => this.#startWorker(index),
        pace: () => this.#pace(),
        hasFailed: () => this.#firstError !== undefined,
      });
    } catch (error) {
      this.abort(workerError(error));
    }
  }

  #pace(): ReturnType<ReliefParts["pace"]> {
    const elapsedMs = performance.now() - this.#startMs;
    const doneBytes = Number(Atomics.load(this.shared.counters, CNT_DONE_BYTES));
    const leftMs = (elapsedMs * (this.geometry.sizeBytes - doneBytes)) / doneBytes;
    return { elapsedMs, leftMs, hasWritten: this.#hasWritten };
  }

  /** True: as #seeToEnd. Never rejects. */
  async #copyHere(source: SourceDescription, isRelieved: () => boolean): Promise<boolean> {
    const { job, target, onStopped } = this.#options;
    try {
      await copyHere(source, target.description, {
        shared: this.shared,
        zeroUnitBytes: Math.max(BLOCK_BYTES, target.granularityBytes),
        topOnly: job.sync === "top",
        onSourceError: job.onSourceError,
        onTargetError: job.onTargetError,
        targetRetries: job.targetRetries,
        isRelieved,
        onStop: (error) => {
          this.pause();
          onStopped?.(error);
        },
      });
    } catch (error) {
      this.#workerFailed(toCowcatcherError(error, target.name));
    }
    return true;
  }

  /** What one reads at a time is as much as the guest's processors have to spare; the others are for the target. */
  async #letFirstReadAlone(): Promise<void> {
    for (let waitedMs = 0; waitedMs < READS_ALONE_MS; waitedMs += READS_ALONE_POLL_MS) {
      if (this.isAllRead || this.#isDrained || this.#firstError !== undefined) return;
      await delay(READS_ALONE_POLL_MS, undefined, { ref: false });
    }
  }

  /** Fulfilled when it is ready. @throws what keeps the pool from starting a thread */
  #startWorker(index: number): Promise<void> {
    const { port1, port2 } = new MessageChannel();
    this.#ports.push(port1);
    const task = this.#poolNow().run(this.#task(index, port2), {
      transferList: [port2],
    }) as Promise<CopyResult>;
    this.#workers.push(this.#seeToEnd(task));
    const isReady = this.#listen(port1, task);
    // Whoever awaits it hears of it; until then a failure is not an unhandled one.
    isReady.catch(() => {});
    if (this.#source !== undefined) command(port1, { kind: "begin", source: this.#source });
    return isReady;
  }

  /** Whether the thread is fit for another task. Never rejects. */
  async #seeToEnd(task: Promise<CopyResult>): Promise<boolean> {
    try {
      const { error, stack } = await task;
      if (error) this.#workerFailed(new CowcatcherError({ ...error, cause: stack }));
      else this.#isDrained = true;
      return true;
    } catch (error) {
      this.abort(workerError(error));
      return false;
    }
  }

  async #prepareBuffer(): Promise<void> {
    const { threads, slots, bufferBytes, sizeBytes } = this.#options;
    if (threads === undefined || bufferBytes === 0) return;
    this.#preparer = new PagePreparer(threads, slots, {
      // Captures are of each block at most once.
      bufferBytes: Math.min(bufferBytes, MAPPED_BYTES_MAX, roundUp(sizeBytes, SLOT_BYTES)),
      niceness: LIVE_WORKER_NICENESS,
    });
    await this.#letGuestGoFirst();
  }

  /** One thread boots at a time, as four at once took the guest's processors for 40 ms. */
  async #letGuestGoFirst(): Promise<void> {
    await poolHasBooted(this.#poolNow());
    await nextTurn();
  }

  #task(workerIndex: number, port: MessagePort): CopyTask {
    const { job, target, live } = this.#options;
    return {
      shared: this.shared.buffers,
      target: target.description,
      spill: this.spill?.description ?? null,
      readAhead: this.#readAhead?.description ?? null,
      topOnly: job.sync === "top",
      hasForeignCaptures: this.#options.hasForeignCaptures ?? false,
      zeroUnitBytes: Math.max(BLOCK_BYTES, target.granularityBytes),
      onSourceError: job.onSourceError,
      onTargetError: job.onTargetError,
      targetRetries: job.targetRetries,
      workerIndex,
      workerCount: job.workerCount,
      niceness: live ? LIVE_WORKER_NICENESS : 0,
      port,
    };
  }

  /** Fulfilled when the worker says that it is ready; a task that ends before has failed. */
  #listen(port: MessagePort, task: Promise<CopyResult>): Promise<void> {
    return new Promise((resolve, reject) => {
      port.on("message", (message: WorkerMessage) => {
        if (message.kind === "ready") resolve();
        else this.#options.onStopped?.(new CowcatcherError(message.error));
      });
      task.then((result) => {
        if (result.error) reject(new CowcatcherError(result.error));
        resolve();
      }, reject);
    });
  }

  /** Sees every worker to its end, whatever it is, then settles `ended`. */
  async #watch(others: Promise<void>): Promise<void> {
    const all = others.then(() =>
      this.#options.beginsHere ? this.#allTakers() : Promise.all(this.#workers),
    );
    const areAlive = await Promise.race([all, this.#abandoned]);
    this.#leftBehind = areAlive === undefined;
    if (this.#leftBehind) {
      this.#options.onLeftBehind?.();
      const haveCome = mayHang(() => true);
      void all.then(haveCome);
    }
    if (this.#consequence !== undefined) this.abort(this.#consequence);
    this.#endMs = performance.now();
    for (const port of this.#ports) port.close();
    await this.#options.beforeThreadsEnd?.();
    await Promise.all([this.#endThreads(areAlive?.every(Boolean) ?? false), this.#preparer?.stop()]);
    void all.then(() => {
      this.spill?.close();
      this.#readAhead?.close();
    });
    if (this.#firstError) this.#settle.reject(this.#firstError);
    else this.#settle.resolve();
  }

  async #allTakers(): Promise<boolean[]> {
    const [here, ...threads] = this.#workers;
    const { control } = this.shared;
    const sweep = { control, chunkCount: this.geometry.chunkCount };
    await allTakersAreDone(here, threads, sweep, () => this.#firstError !== undefined);
    return [];
  }

  async #endThreads(areFit: boolean): Promise<void> {
    const { threads, live } = this.#options;
    if (this.#pool === undefined) return;
    if (areFit && threads !== undefined) {
      this.#pool.off("error", this.#onPoolError);
      threads.giveBack(this.#pool);
      return;
    }
    // After an offline copy that went well nothing of the threads is used again, and the process need not wait for them.
    const ended = endPool(this.#pool);
    if (live || this.#firstError)
      await Promise.race([ended, delay(ABORT_GRACE_MS, undefined, { ref: false })]);
  }

  readonly #onPoolError = (error: unknown): void => this.abort(workerError(error));

  /** After `ended`: a worker may still touch the shared tables, some time later. */
  get leftBehind(): boolean {
    return this.#leftBehind;
  }

  /** A worker that fails ends the others' waits by itself; they may be here before it, and are not the cause. */
  #workerFailed(error: CowcatcherError): void {
    if (error.code !== "CANCELLED") {
      this.abort(error);
      return;
    }
    if (this.#firstError !== undefined || this.#consequence !== undefined) return;
    this.#consequence = error;
    setTimeout(this.#giveUp, ABORT_GRACE_MS).unref();
  }

  #giveUp: () => void = () => {};
  /** Fulfilled some time after `abort`. */
  readonly #abandoned = new Promise<void>((resolve) => {
    this.#giveUp = resolve;
  });

  /** T0: the workers start. Synchronous; `source` describes the disk as it is now. */
  begin(source: SourceDescription): void {
    this.#source = source;
    this.#options.target.started?.();
    this.#startMs = performance.now();
    // An abort may have come since the workers were ready.
    Atomics.compareExchange(this.shared.control, CTL_RUN, RUN_PREPARING, RUN_RUNNING);
    this.#commandAll({ kind: "begin", source });
    this.#hasBegun.resolve();
    this.#watchForFirstWrite();
  }

  /** Whoever has written has its connections, to source and target. */
  #watchForFirstWrite(): void {
    const { target, onWorkersIn } = this.#options;
    if (target.workersAreIn === undefined && onWorkersIn === undefined) return;
    const timer = setInterval(() => {
      if (!this.#hasWritten && this.#endMs === undefined) return;
      clearInterval(timer);
      void target.workersAreIn?.();
      onWorkersIn?.();
    }, FIRST_WRITE_POLL_MS).unref();
  }

  get #hasWritten(): boolean {
    return Atomics.load(this.shared.counters, CNT_WRITTEN_BYTES) > 0n;
  }

  #commandAll(given: WorkerCommand): void {
    for (const port of this.#ports) command(port, given);
  }

  /** Ends the run with this error, unless it has failed already. Returns at once; idempotent. */
  abort(error: CowcatcherError): void {
    if (this.#firstError !== undefined || this.#endMs !== undefined) return;
    this.#firstError = error;
    this.#setRunState(RUN_ABORTING);
    if (this.#source !== undefined) this.#options.onFailed?.(error);
    else this.#commandAll({ kind: "leave" });
    this.#hasBegun.resolve();
    setTimeout(this.#giveUp, ABORT_GRACE_MS).unref();
  }

  /**
   * After `ended`: the source's files are as long as they were at T0. Who has cut one may have done so where a worker
   * had been, or was to find a hole.
   * @throws CowcatcherError IO, unless source errors are to be passed over: it is counted with them then.
   */
  checkSource(source: FrozenSource): void {
    try {
      source.assertNotCut?.();
    } catch (error) {
      if (this.#options.job.onSourceError !== "ignore") throw error;
      Atomics.add(this.shared.control, CTL_IGNORED_ERRORS, 1);
    }
  }

  /** Of a job without a sweep: it ends well when what is captured by now is in the target. */
  endCaptures(): void {
    this.shared.endCaptures();
  }

  /** What the run has failed with, from the moment on at which it is known. */
  get failure(): CowcatcherError | undefined {
    return this.#firstError;
  }

  /** Of a job that reads ahead: all of the disk is read, and nothing of the source is needed any more. */
  get isAllRead(): boolean {
    const { control } = this.shared;
    if (this.#readAhead === null || this.#source === undefined || this.#firstError !== undefined)
      return false;
    const isSwept = Atomics.load(control, CTL_SWEEP) >= this.geometry.chunkCount;
    return isSwept && Atomics.load(control, CTL_READING) === 0;
  }

  /** Read, and not yet taken by the target. */
  get bytesReadAhead(): number {
    return Atomics.load(this.shared.control, CTL_AHEAD_CHUNKS) * this.geometry.chunkBytes;
  }

  get paused(): boolean {
    return Atomics.load(this.shared.control, CTL_RUN) === RUN_PAUSED;
  }

  pause(): void {
    this.#changeRunState(RUN_RUNNING, RUN_PAUSED);
  }

  resume(): void {
    this.#changeRunState(RUN_PAUSED, RUN_RUNNING);
  }

  /** Bytes a second to the target from now on; 0: no limit. */
  setSpeed(bytesPerSecond: number): void {
    changeLimit(this.shared.counters, bytesPerSecond);
    Atomics.notify(this.shared.control, CTL_RUN);
  }

  /** Chunk numbers, each at most once in a run: what another program has captured from, to be copied next. */
  hurry(chunk: number): void {
    this.shared.pushUrgent(chunk);
  }

  #setRunState(state: number): void {
    Atomics.store(this.shared.control, CTL_RUN, state);
    Atomics.notify(this.shared.control, CTL_RUN);
  }

  #changeRunState(from: number, to: number): void {
    Atomics.compareExchange(this.shared.control, CTL_RUN, from, to);
    Atomics.notify(this.shared.control, CTL_RUN);
  }

  /** The counters of the copy; those of the guest's path are the interceptor's. */
  progress(): JobProgress {
    const { control, counters, bufferBlockCount } = this.shared;
    const nowMs = this.#endMs ?? performance.now();
    const bytesWritten = Number(Atomics.load(counters, CNT_WRITTEN_BYTES));
    return {
      ...NO_PROGRESS,
      bytesDone: Number(Atomics.load(counters, CNT_DONE_BYTES)),
      bytesTotal: this.geometry.sizeBytes,
      bytesWritten,
      bufferBytesUsed: Atomics.load(control, CTL_USED_BLOCKS) * BLOCK_BYTES,
      bufferBytesTotal: bufferBlockCount * BLOCK_BYTES,
      targetRate: this.#rate.sample(nowMs, bytesWritten),
      elapsedMs: this.#source !== undefined ? nowMs - this.#startMs : 0,
      ignoredErrorCount: Atomics.load(control, CTL_IGNORED_ERRORS),
    };
  }
}

async function openSpill(
  { job, hands, bufferBytes, allocateTable, signal }: CopyRunOptions,
  geometry: Geometry,
): Promise<RemoteSpill | null> {
  if (hands === undefined || bufferBytes === 0 || job.onBufferFull !== "spill") return null;
  const bytes = spillBitmapBytes(geometry);
  const bitmaps = allocateTable?.(bytes) ?? new SharedArrayBuffer(bytes);
  const target = job.repository === undefined ? job.target : neighbourOf(job.repository.address);
  return RemoteSpill.open(hands, { spillDir: job.spillDir, target }, geometry, bitmaps, signal);
}

/** A repository's folder is as good a place for a spill as a target's. */
function neighbourOf(repository: string): string {
  const store = describeStore(repository);
  return store.kind === "folder" ? join(store.path, "spill") : NULL_TARGET_PATH;
}

/** A digest for each small cluster would take four times the memory of the usual ones: half a GiB a TiB. */
function cutFor(options: CopyRunOptions): Cut {
  const { job, live, beginsHere, bufferBytes, sizeBytes, hasForeignCaptures } = options;
  if (beginsHere === true) return LONG_CUT;
  const waits = live && bufferBytes === 0 && hasForeignCaptures !== true;
  const isFine = waits && !job.verify && sizeBytes <= FINE_CUT_MAX_DISK_BYTES;
  return isFine ? FINE_CUT : USUAL_CUT;
}

/** A server that takes one connection at a time makes it one worker. */
function withinLimits(options: CopyRunOptions): CopyRunOptions {
  const { job, target, workerLimit } = options;
  const workerCount = Math.min(job.workerCount, workerLimit ?? Infinity, target.workerLimit ?? Infinity);
  return { ...options, job: { ...job, workerCount } };
}

function command(port: MessagePort, given: WorkerCommand): void {
  port.postMessage(given);
}

function withResolvers(): {
  promise: Promise<void>;
  resolve: () => void;
  reject: (error: CowcatcherError) => void;
} {
  let resolve: () => void = () => {};
  let reject: (error: CowcatcherError) => void = () => {};
  const promise = new Promise<void>((onResolve, onReject) => {
    resolve = onResolve;
    reject = onReject;
  });
  return { promise, resolve, reject };
}

function checkReadable({ name, unfinishedPath }: Target): void {
  if (unfinishedPath !== null) return;
  throw new CowcatcherError({
    code: "USAGE",
    object: "--verify",
    problem: `${name} cannot be read back`,
    hint: "leave --verify out",
  });
}

/** A task that rejected: the thread threw outside our own code, ran out of memory, or was ended from outside. */
export function workerError(error: unknown): CowcatcherError {
  if (error instanceof CowcatcherError) return error;
  const atStart = threadStartError("backup", error) ?? workingFolderError(error);
  if (atStart !== undefined) return atStart;
  return new CowcatcherError({
    code: "WORKER",
    object: "backup",
    problem: `a worker thread died: ${messageOf(error)}`,
    hint: "start the backup again; with --log-level debug the log has the stack",
    cause: error,
  });
}
