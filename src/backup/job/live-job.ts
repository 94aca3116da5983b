// A live backup of one disk: prepare → start at T0 → copy → finish, or an end before that.
//
//   created ─start─► running ⇄ paused ─copied─► waiting ─► pending ─target complete─► concluded ─► null
//                       └──── failure or cancel ────► aborting ─cleaned up─► concluded ─► null
//
// Where it waits, and what for: completion.ts. What becomes of the dirty bitmap that it goes by: bitmap-end.ts.
//
// Whatever ends the copy, the first thing done is to detach the interceptor: from that moment the guest's writes
// go straight to its disk. Then the workers are told, the target is finished or removed, and the status follows.

import { setImmediate as nextTurn, setTimeout as delay } from "node:timers/promises";
import { BLOCK_BYTES, SLOT_BYTES } from "../../cow/geometry.js";
import type { DiskNode } from "../../cow/disk-node.js";
import { Interceptor } from "../../cow/interceptor.js";
import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import type { FrozenSource } from "../../block/device.js";
import type { FrozenEpoch } from "../../tracking/tracker.js";
import type { Target } from "../../target/target.js";
import { roundUp } from "../../units.js";
import { CopyRun } from "../copy/run.js";
import { type Basis, markLate } from "./basis.js";
import { BitmapEnd } from "./bitmap-end.js";
import { Finishing } from "./finishing.js";
import type { BasisInfo, RepositoryOutcome, SnapshotInfo } from "../host.js";
import type { HostedJob, HostedJobParts } from "./hosted-job.js";
import { JobState } from "./job-state.js";
import { type LiveTarget, makeLiveTarget } from "./live-target.js";
import { type JobOptions, SMALLEST_BUFFER_BYTES } from "../options.js";
import type { JobProgress } from "../progress.js";
import type { BufferLease } from "../memory/buffer-store.js";
import { Snapshot } from "./snapshot.js";
import type { TableLease } from "../memory/table-store.js";

/** How long the end of a failed backup may take whose part is to be kept. */
const PART_MS_MAX = 30_000;

export class LiveJob extends JobState implements HostedJob {
  readonly #target: Target;
  readonly #run: CopyRun;
  readonly #lease: BufferLease;
  readonly #tables: TableLease;
  /** The T0 view beside the backup, if the server offers one. */
  readonly #snapshot: Snapshot | null;
  /** Made before T0, as its tables take milliseconds. */
  readonly #interceptor: Interceptor;
  #frozen: FrozenSource | null = null;
  readonly #basis: Basis;
  readonly #outcome: LiveTarget["outcome"];
  /** The name under which T0 is remembered when the backup is good. */
  #checkpoint: string | undefined;
  /** Why it is not, although it could have been. */
  #forgotten: string | undefined;
  /** The epoch that ended at T0, where the job goes by one or makes a checkpoint of it. */
  #epoch: FrozenEpoch | null = null;
  /** Where it has a dirty bitmap, from T0 on. */
  #bitmapEnd: BitmapEnd | null = null;
  /** It was told to end, and only takes what was captured to the target. */
  #isEnding = false;
  /** Once the copy is done: what can still be cancelled. */
  #finishing: Finishing | null = null;

  private constructor(
    parts: HostedJobParts,
    { target, basis, outcome }: LiveTarget,
    run: CopyRun,
    lease: BufferLease,
    tables: TableLease,
    snapshot: Snapshot | null,
  ) {
    super(parts);
    this.#basis = basis;
    this.#outcome = outcome;
    this.#checkpoint = parts.options.checkpoint ?? basis.checkpoint;
    this.#target = target;
    this.#run = run;
    this.#lease = lease;
    this.#tables = tables;
    this.#snapshot = snapshot;
    const { node, options } = parts;
    const { shared, spill } = run;
    this.#interceptor = new Interceptor({
      shared,
      image: node.image,
      openSpill: spill === null ? undefined : () => spill,
      spillLimitBytes: options.spillLimitBytes ?? roundUp(node.sizeBytes, BLOCK_BYTES),
      policy: options,
      onBroken: (error) => this.#fail(error),
    });
  }

  /** All that takes time before T0: target, buffer, workers. @throws CowcatcherError; nothing is left then. */
  static async prepare(parts: HostedJobParts): Promise<LiveJob> {
    const { options, node, buffers, publisher, threads, hands, signal } = parts;
    const { target, basis, outcome } = await makeLiveTarget(parts);
    const known = basis.changes?.known;
    parts.onTarget(target);
    let lease: BufferLease | undefined;
    const tables = parts.tables.lease();
    let snapshot: Snapshot | null = null;
    let isLeftBehind = false;
    try {
      signal.throwIfAborted();
      const bufferBytes = bufferSizeOf(options, node, target);
      lease = buffers.take(bufferBytes);
      // Its loss is its readers' business: the backup goes on.
      const viewParts = {
        node,
        options,
        buffers,
        tables: parts.tables,
        threads,
        publisher,
        tracker: parts.tracker,
        hands,
        signal,
        onBroken: () => {},
      };
      if (options.snapshotExport) snapshot = await Snapshot.prepare(viewParts);
      const run = await CopyRun.prepare({
        job: options,
        target,
        sizeBytes: node.sizeBytes,
        sourceClusterBytes: node.clusterSizeBytes,
        slots: lease,
        bufferBytes,
        allocateTable: tables.allocate,
        threads,
        live: true,
        dirty: basis.dirty ?? (known === undefined ? undefined : (at, count) => known.run(at, count)),
        hands,
        signal,
        notesWritten: options.bitmapUse?.mode === "always",
        onLeftBehind: () => (isLeftBehind = true),
        onStopped: (error) => job.#stopped(error),
        onFailed: (error) => job.#fail(error),
      });
      const job: LiveJob = new LiveJob(parts, { target, basis, outcome }, run, lease, tables, snapshot);
      // What the guest has sent meanwhile is not to wait for T0 as well.
      await nextTurn();
      return job;
    } catch (error) {
      basis.changes?.end();
      basis.held?.end();
      await snapshot?.end();
      if (!isLeftBehind) {
        lease?.release();
        tables.release();
      }
      await target.abort();
      throw error;
    }
  }

  get basis(): BasisInfo {
    const { info } = this.#basis;
    const forgotten = this.#hasGaps
      ? "errors were ignored, so no checkpoint was made of it"
      : this.#forgotten;
    if (forgotten === undefined) return info;
    // In a repository the reason is what the level comes from.
    return {
      ...info,
      reason: this.#outcome === undefined ? forgotten : `${info.reason ?? ""}; ${forgotten}`,
    };
  }

  get repository(): RepositoryOutcome | undefined {
    return this.#outcome?.();
  }

  /** What is missing in it would be missing in all that builds on it, and nobody would be told again. */
  get #hasGaps(): boolean {
    const isRelied = this.#checkpoint !== undefined || this.options.bitmapUse !== undefined;
    return isRelied && this.#run.progress().ignoredErrorCount > 0;
  }

  get #needsEpoch(): boolean {
    const { changes, held } = this.#basis;
    return this.#checkpoint !== undefined || changes !== undefined || held !== undefined;
  }

  /** While it has one. */
  get bitmap(): BitmapEnd | undefined {
    return this.isOver ? undefined : (this.#bitmapEnd ?? undefined);
  }

  get snapshot(): SnapshotInfo | undefined {
    return this.isOver ? undefined : this.#snapshot?.info;
  }

  async beforeT0(): Promise<void> {
    await this.#snapshot?.beforeT0();
    if (!this.#needsEpoch) return;
    try {
      await this.parts.tracker?.prepareFreeze();
    } catch (error) {
      const { changes, held } = this.#basis;
      if (this.options.checkpoint !== undefined || changes !== undefined || held !== undefined) throw error;
      this.#doWithoutCheckpoint(error);
    }
  }

  /** @throws CowcatcherError what the workers have failed with since they were ready. */
  checkReady(): void {
    if (this.#run.failure !== undefined) throw this.#run.failure;
  }

  /** The step at T0: synchronous, with no guest write in flight. */
  start(t0Ms: number): void {
    const { node, tracker } = this.parts;
    if (tracker !== undefined && this.#needsEpoch) this.#epoch = tracker.freeze();
    const { changes, held } = this.#basis;
    if (changes !== undefined) {
      const late = changes.late();
      markLate(this.#run.shared, late);
      this.#basis.noteLate?.(late);
    }
    const { bitmapUse } = this.options;
    if (bitmapUse !== undefined && held !== undefined && tracker !== undefined && this.#epoch !== null) {
      this.#bitmapEnd = new BitmapEnd({ use: bitmapUse, tracker, epoch: this.#epoch, held, t0Ms });
    }
    changes?.end();
    held?.end();
    this.t0Ms = t0Ms;
    this.#frozen = node.image.freeze();
    this.#snapshot?.start();
    node.addInterceptor(this.#interceptor);
    this.#run.begin(this.#frozen.description);
    this.setStatus("running");
    void this.#watch();
  }

  /** Before T0, or when start() has thrown: the group does not start. */
  async abandon(): Promise<void> {
    this.#detach();
    this.#run.abort(this.#cancelled());
    await this.#run.ended.catch(() => {});
    await this.#snapshot?.end();
    this.#frozen?.release();
    this.#basis.changes?.end();
    this.#basis.held?.end();
    this.#epoch?.release();
    // A worker that was left behind may still be at its share of the buffer, and would write zeroes into what another
    // job captures there.
    if (!this.#run.leftBehind) this.#releaseMemory();
    await this.#target.abort();
  }

  #releaseMemory(): void {
    this.#lease.release();
    if (!this.#run.leftBehind) this.#tables.release();
  }

  async #watch(): Promise<void> {
    try {
      await this.#run.ended;
      if (this.#frozen !== null) this.#run.checkSource(this.#frozen);
      // Cancelled when the last chunk was written and the threads were on their way out.
      if (this.status === "aborting") throw this.error ?? this.#cancelled();
      this.#detach();
      this.#finishing = new Finishing(this.#target, this.options, this.#run.shared, this.parts.threads);
      const { completion } = this.parts;
      this.setStatus("waiting");
      if (completion !== undefined) await this.#finishing.after(completion.arrive());
      this.setStatus("pending");
      if (completion !== undefined) await this.#finishing.after(completion.finalized);
      await this.#finishing.run();
      await this.#remember();
    } catch (error) {
      this.#fail(toCowcatcherError(error, this.options.target));
      await this.#run.ended.catch(() => {});
      await this.#endTarget();
    }
    // A capture from a slow disk may still be on its way into the buffer.
    await this.#interceptor.idle();
    await this.#snapshot?.end();
    this.#frozen?.release();
    this.#epoch?.release();
    this.#releaseMemory();
    this.conclude();
  }

  /** After a failure: the target goes, or as much of it as there is gets its name. */
  async #endTarget(): Promise<void> {
    const bitmap = this.#bitmapEnd;
    // What the workers left is whole only before the finishing has begun to change it.
    const isAsLeft = !this.#run.leftBehind && this.#finishing?.isUnderWay !== true;
    if (this.#isEnding) {
      const problem = this.#run.failure ?? (await completePart(this.#target));
      if (problem === undefined) return;
      this.error = problem;
    }
    if (bitmap?.keepsPart !== true || !isAsLeft || (await completePart(this.#target)) !== undefined) {
      await this.#target.abort();
      return;
    }
    try {
      await bitmap.keepRest(this.#run.shared, this.#hasGaps);
    } catch {
      // The bitmap has all that it had, and what changed since.
    }
  }

  /** After the target has its name: a checkpoint of a backup that is not there would be worse than none. */
  async #remember(): Promise<void> {
    const { tracker, checkpointUuid } = this.parts;
    const checkpoint = this.#checkpoint;
    if (this.#bitmapEnd !== null && !this.#hasGaps) await this.#rememberBitmap(this.#bitmapEnd);
    if (checkpoint === undefined || this.#epoch === null || checkpointUuid === undefined) return;
    if (this.#hasGaps) return;
    try {
      await tracker?.commit(this.#epoch, checkpoint, checkpointUuid, this.t0Ms ?? 0);
    } catch (error) {
      if (this.options.checkpoint === undefined) {
        this.#doWithoutCheckpoint(error);
        return;
      }
      throw completeBut("checkpoint", toCowcatcherError(error, this.disk));
    }
  }

  async #rememberBitmap(bitmap: BitmapEnd): Promise<void> {
    try {
      await bitmap.synchronize();
    } catch (error) {
      throw completeBut("bitmap", toCowcatcherError(error, this.disk));
    }
  }

  /** Nobody asked for it: the next backup reads all of the disk. */
  #doWithoutCheckpoint(error: unknown): void {
    this.#checkpoint = undefined;
    this.#forgotten = `no checkpoint could be made: ${toCowcatcherError(error, this.disk).problem}`;
  }

  /** The first cause stays; the guest is free at once. */
  #fail(error: CowcatcherError): void {
    this.error ??= error;
    this.#detach();
    this.#snapshot?.detach();
    if (!this.#isEnding) this.#run.abort(this.error);
    if (this.status !== "aborting" && !this.isOver) {
      this.setStatus("aborting");
    }
  }

  #detach(): void {
    this.#interceptor.detach();
    this.parts.node.removeInterceptor(this.#interceptor);
  }

  /** A worker has paused the job for an error under the policy `stop`. */
  #stopped(error: CowcatcherError): void {
    // Of two workers that stop at once, the second one's message may come after the job was resumed.
    if (this.status !== "running" || !this.#run.paused) return;
    this.error = error;
    this.setStatus("paused");
  }

  cancel(cause?: CowcatcherError): void {
    // Paused for an error: the error is what ended the backup, not the user who gave up.
    const error = this.error ?? cause ?? this.#cancelled();
    if (this.#endsByCancel(error)) return;
    const isCopying = this.status === "running" || this.status === "paused";
    const isFinishing = this.status === "waiting" || this.status === "pending";
    if (isCopying || (isFinishing && this.#finishing?.cancel(error) === true)) this.#fail(error);
  }

  /** Of a job without a sweep: its orderly end, unless that lasts too long for whoever asks again. */
  #endsByCancel(error: CowcatcherError): boolean {
    const isCopying = this.status === "running" || this.status === "paused";
    if (this.options.oldDataOnly !== true || !isCopying || this.error !== undefined) {
      if (this.#isEnding && this.status === "aborting") this.#run.abort(error);
      return false;
    }
    this.#isEnding = true;
    this.error = error;
    this.#interceptor.endCaptures();
    this.#run.resume();
    this.#run.endCaptures();
    this.setStatus("aborting");
    return true;
  }

  #cancelled(): CowcatcherError {
    return new CowcatcherError({
      code: "CANCELLED",
      object: this.options.target,
      problem: "the backup was cancelled",
    });
  }

  finalize(): void {
    if (this.status === "pending") this.parts.completion?.finalize();
  }

  pause(): void {
    if (this.status !== "running") return;
    this.#run.pause();
    this.setStatus("paused");
  }

  resume(): void {
    if (this.status !== "paused") return;
    // Set if it was an error that paused the job; the operation is tried again.
    this.error = undefined;
    this.setStatus("running");
    this.#run.resume();
  }

  setSpeed(bytesPerSecond: number): void {
    this.speed = bytesPerSecond;
    this.#run.setSpeed(bytesPerSecond);
  }

  progress(): JobProgress {
    return { ...this.#run.progress(), ...this.#interceptor.counters };
  }

  /** The process ends now: what must not stay behind goes. */
  abortSync(): void {
    this.#target.abortSync();
  }
}

/** What there is of it gets its name; why it does not, else. Storage that does not answer is not waited for. */
async function completePart(target: Target): Promise<CowcatcherError | undefined> {
  const problem = target.finish().then(
    () => undefined,
    (error: unknown) => toCowcatcherError(error, target.name),
  );
  const late = new CowcatcherError({
    code: "IO",
    object: target.name,
    problem: `could not be completed within ${PART_MS_MAX / 1000} s`,
  });
  return Promise.race([problem, delay(PART_MS_MAX, late, { ref: false })]);
}

function completeBut(what: string, error: CowcatcherError): CowcatcherError {
  const { problem, ...details } = error.toDetails();
  return new CowcatcherError({
    ...details,
    problem: `the backup is complete, but its ${what} could not be remembered: ${problem}`,
  });
}

/**
 * The buffer that the job really gets: whole slots, and room for the captures of a few chunks, so that no single
 * guest write can need more than there is. 0 stays 0.
 */
function bufferSizeOf(options: JobOptions, node: DiskNode, target: Target): number {
  if (options.cowBufferSizeBytes === 0) return 0;
  const largestChunk = Math.max(
    SMALLEST_BUFFER_BYTES / 2,
    node.clusterSizeBytes,
    target.granularityBytes,
    target.chunkBytes ?? 0,
  );
  return roundUp(Math.max(options.cowBufferSizeBytes, 2 * largestChunk), SLOT_BYTES);
}
