// The disks that `serve` has open and the jobs on them: the engine's side of JobHost. Main thread.

import { randomUUID } from "node:crypto";
import * as fs from "node:fs";
import { setImmediate as nextTurn, setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";
import type { Image } from "../../block/device.js";
import type { DiskNode } from "../../cow/disk-node.js";
import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import type { NbdPlace } from "../../nbd/wire/place.js";
import { BufferStore } from "../memory/buffer-store.js";
import { PagePreparer } from "../copy/page-preparer.js";
import { ABORT_GRACE_MS } from "../copy/run.js";
import { CopyThreads } from "../copy/threads.js";
import { JOB_DEFAULTS } from "../options.js";
import {
  type BackupJob,
  type BackupRequest,
  type BitmapInfo,
  type DiskInfo,
  isOver,
  type TrackingInfo,
  type JobHost,
  type MarkRequest,
  type JobStatus,
  type JobStatusListener,
} from "../host.js";
import type { HostedJob, HostedJobParts, ListedJob } from "./hosted-job.js";
import { groupsOf } from "./repository-group.js";
import { JobStart } from "./start.js";
import { CheckpointMark, type MarkedDisk } from "./mark.js";
import { Completion } from "./completion.js";
import { LiveJob } from "./live-job.js";
import { disagreement, noBasis } from "./basis.js";
import type { DiskTracker } from "../../tracking/tracker.js";
import type { SnapshotPublisher } from "./snapshot.js";
import { SnapshotJob } from "./snapshot-job.js";
import type { StorageHands } from "../storage/protocol.js";
import { StorageThreads } from "../storage/threads.js";
import type { GuestFreezer } from "./while-frozen.js";
import { TableStore } from "../memory/table-store.js";
import { type TargetClaim, TargetClaims } from "../guard/target-claims.js";
import type { InUse } from "../guard/target-guard.js";
import { withBackingOf } from "./top-layer.js";

/** A machine has a handful of disks; more jobs at once than this is a runaway script. */
const MAX_JOBS = 64;
/** Of st_blocks (stat(2)). */
const STAT_BLOCK_BYTES = 512;
const statFd: (fd: number) => Promise<fs.Stats> = promisify(fs.fstat);
/** What is cancelled gives up its workers after one such time, their threads after another, its target after a third. */
const UNDO_MS_MAX = 3 * ABORT_GRACE_MS + 1_000;

/** Storage threads of a server, from its first job to its end. */
interface KeptHands extends StorageHands {
  warmUp(): Promise<void>;
  close(): void;
}

/** The jobs of a server: starts them at one T0, lists them, ends them with the process. Main thread only. */
export class LiveHost implements JobHost {
  readonly #nodes: ReadonlyMap<string, DiskNode>;
  readonly #jobs = new Map<string, ListedJob>();
  /** Under way, or cancelled and not undone yet. */
  readonly #starts = new Set<JobStart>();
  readonly #jobCounts = new Map<string, number>();
  readonly #listeners = new Set<JobStatusListener>();
  readonly #buffers = new BufferStore();
  readonly #tables = new TableStore();
  readonly #threads = new CopyThreads();
  readonly #hands: KeptHands;
  readonly #targets: TargetClaims;
  #places: readonly NbdPlace[] = [];
  readonly #onQuit: () => void;
  readonly #publisher: SnapshotPublisher | undefined;
  readonly #trackers: ReadonlyMap<string, DiskTracker>;
  #closing = false;

  /**
   * @param publisher who exports T0 views; without one, jobs that offer one are refused.
   * @param trackers by node name, of the disks whose changes are tracked
   * @param hands where storage that is not the guests' is dealt with; replaced in tests
   */
  constructor(
    nodes: ReadonlyMap<string, DiskNode>,
    onQuit: () => void,
    publisher?: SnapshotPublisher,
    trackers: ReadonlyMap<string, DiskTracker> = new Map(),
    hands: KeptHands = new StorageThreads(),
  ) {
    this.#trackers = trackers;
    this.#hands = hands;
    this.#targets = new TargetClaims(hands);
    this.#nodes = nodes;
    this.#onQuit = onQuit;
    this.#publisher = publisher;
    process.on("exit", this.#atExit);
  }

  /** Tells where this process serves its disks: an export of its own is no target. */
  listensAt(places: readonly NbdPlace[]): void {
    this.#places = places;
  }

  /**
   * Makes all pages of a buffer ready now rather than while the first backup runs. For before any guest is served.
   * @throws CowcatcherError LIMIT where there is not so much memory
   */
  async preallocate(bufferBytes: number): Promise<void> {
    const lease = this.#buffers.take(bufferBytes, { mapped: true });
    const preparer = new PagePreparer(this.#threads, lease, { bufferBytes, niceness: 0 });
    await preparer.ended;
    lease.release();
  }

  /**
   * Boots the threads that the first backup needs before its T0: for its target, its spill, the pages of its buffer and
   * its copy. Each takes a tenth of a second of a processor, which the guest would miss then. One after another, so that
   * a guest that is served already has the others. Settles when all are up; never rejects.
   */
  async warmUp(): Promise<void> {
    const boots = [
      () => this.#hands.warmUp(),
      () => this.#threads.warmUp(JOB_DEFAULTS.workerCount),
      () => this.#threads.warmUp(1),
      () => this.#hands.warmUp(),
    ];
    for (const boot of boots) {
      await nextTurn();
      if (this.#closing || this.#jobCounts.size > 0) return;
      await boot();
    }
  }

  disks(): readonly DiskInfo[] {
    return [...this.#nodes.values()].map(({ nodeName, image }) => ({
      name: nodeName,
      path: image.path,
      format: image.format,
      sizeBytes: image.sizeBytes,
      readOnly: image.readOnly,
      jobCount: this.#jobCounts.get(nodeName) ?? 0,
      tracking: trackingInfo(this.#trackers.get(nodeName)),
    }));
  }

  async allocatedBytes(disk: string): Promise<number | undefined> {
    let bytes = 0;
    for (let layer: Image | null = this.#node(disk).image; layer !== null; layer = layer.backing) {
      if (layer.files.length === 0) return undefined;
      for (const { fd } of layer.files) bytes += (await statFd(fd)).blocks * STAT_BLOCK_BYTES;
    }
    return bytes;
  }

  async changedBytes(disk: string, checkpoint: string): Promise<number> {
    const { sizeBytes } = this.#node(disk);
    const tracker = this.#trackers.get(disk);
    if (tracker === undefined) throw noBasis(disk, "the server does not track its changes");
    const bits = await tracker.changesSince(checkpoint);
    return Math.min(sizeBytes, bits.count() * tracker.granularityBytes);
  }

  async bitmaps(disk: string): Promise<readonly BitmapInfo[]> {
    const { sizeBytes } = this.#node(disk);
    const tracker = this.#trackers.get(disk);
    if (tracker === undefined) return [];
    const { checkpoints, loss, granularityBytes } = tracker.state;
    const busy = [...this.#jobs.values()].find(
      (job) => job.disk === disk && job.bitmap !== undefined,
    )?.bitmap;
    const found: BitmapInfo[] = [];
    for (const { name, isStopped } of checkpoints) {
      const isBusy = name === busy?.name;
      const bits = isBusy ? undefined : await orGone(tracker.changesSince(name));
      if (bits === null) continue;
      const dirtyBytes = bits && Math.min(sizeBytes, bits.count() * granularityBytes);
      const isRecording = isBusy ? busy.isRecording : isStopped !== true;
      const isInconsistent = false;
      found.push({
        name,
        dirtyBytes: dirtyBytes ?? busy?.dirtyBytes ?? 0,
        isRecording,
        isBusy,
        isInconsistent,
      });
    }
    const base = { isRecording: false, isBusy: false };
    if (busy !== undefined) {
      const { isRecording } = busy;
      const dirtyBytes = isRecording ? await busy.changedBytes() : 0;
      found.push({ ...base, name: undefined, dirtyBytes, isRecording, isInconsistent: false });
    }
    for (const name of loss?.checkpoints ?? []) {
      if (checkpoints.some((checkpoint) => checkpoint.name === name)) continue;
      found.push({ ...base, name, dirtyBytes: 0, isInconsistent: true });
    }
    return found;
  }

  async deleteCheckpoint(name: string, disk?: string): Promise<void> {
    const names = disk === undefined ? [...this.#trackers.keys()] : [this.#node(disk).nodeName];
    for (const node of names) this.#refuseBusyBitmap(node, name);
    let isFound = false;
    for (const node of names) if (await this.#trackers.get(node)?.remove(name)) isFound = true;
    if (!isFound) throw noBasis(name, "there is no such checkpoint", "cowcatcher checkpoints lists them");
  }

  jobs(): readonly BackupJob[] {
    return [...this.#jobs.values()];
  }

  async startBackups(
    asked: readonly BackupRequest[],
    marks: readonly MarkRequest[] = [],
    freezer?: GuestFreezer,
  ): Promise<readonly BackupJob[]> {
    this.#refuseIfClosing();
    const requests = asked.map((request) => ({
      ...request,
      options: withBackingOf(this.#node(request.disk).image, request.options),
    }));
    const checkpointUuid = randomUUID();
    for (const { disk, name } of marks) this.#refuseBusyBitmap(disk, name);
    const checkpoints = this.#marks(marks, checkpointUuid);
    const completions = completionsOf(requests);
    const sizeOf = (disk: string): number => this.#node(disk).sizeBytes;
    const groups = groupsOf(requests, sizeOf, checkpointUuid, this.#hands);
    const start = new JobStart({
      requests,
      marks: checkpoints,
      freezer,
      nodeOf: (disk) => this.#node(disk),
      claim: (request) => this.#targets.claim(request, this.#inUseBy(request)),
      prepare: (request, ...parts) =>
        this.#prepare(
          request,
          {
            checkpointUuid,
            basisRefusal: this.#refusalOf(request, requests),
            group: groups.get(request.disk),
            completion: completions.get(request),
          },
          ...parts,
        ),
      list: (job) => this.#jobs.set(job.id, job),
      forget: (job) => {
        this.#jobs.delete(job.id);
        job.dismiss();
      },
      dismiss: (id) => this.dismiss(id),
      onStatus: (job, status) => this.#changed(job, status),
    });
    this.#accept(start);
    let jobs: readonly HostedJob[];
    try {
      jobs = await start.run(() => this.#starts.delete(start));
    } catch (error) {
      for (const group of groups.values()) void group.end();
      throw error;
    }
    for (const group of new Set(groups.values())) {
      group.watch(jobs.filter(({ disk }) => groups.get(disk) === group));
    }
    try {
      for (const checkpoint of checkpoints) await checkpoint.commit();
    } catch (error) {
      for (const checkpoint of checkpoints) checkpoint.abandon();
      for (const job of jobs) job.cancel();
      // Where that fails, too, it is for the same reason.
      await Promise.allSettled(checkpoints.map((checkpoint) => checkpoint.undo()));
      throw error;
    }
    for (const checkpoint of checkpoints) await checkpoint.done();
    return jobs;
  }

  /** One for each disk. */
  #marks(marks: readonly MarkRequest[], uuid: string): CheckpointMark[] {
    const trackedDisk = (disk: string): MarkedDisk => {
      const node = this.#node(disk);
      const tracker = this.#trackers.get(disk);
      if (tracker === undefined) throw noBasis(disk, "the server does not track its changes");
      return { node, tracker };
    };
    return [...new Set(marks.map(({ disk }) => disk))].map((disk) => {
      const ofDisk = marks.filter((mark) => mark.disk === disk);
      return new CheckpointMark(trackedDisk(disk), ofDisk, trackedDisk, uuid);
    });
  }

  /** @throws CowcatcherError BUSY, in QEMU's words: it is a job's until that is over. */
  #refuseBusyBitmap(disk: string, name: string): void {
    const isBusy = [...this.#jobs.values()].some(
      (job) => job.disk === disk && !isOver(job.status) && job.options.bitmapUse?.name === name,
    );
    if (!isBusy) return;
    throw new CowcatcherError({
      code: "BUSY",
      object: disk,
      problem: `Bitmap '${name}' is currently in use by another operation and cannot be used`,
    });
  }

  #prepare(
    { id, disk, options }: BackupRequest,
    ofStart: Pick<HostedJobParts, "checkpointUuid" | "basisRefusal" | "group" | "completion">,
    signal: AbortSignal,
    onTarget: HostedJobParts["onTarget"],
    { hand }: TargetClaim,
  ): Promise<HostedJob> {
    const Job = options.sync === "none" && options.oldDataOnly !== true ? SnapshotJob : LiveJob;
    return Job.prepare({
      id,
      node: this.#node(disk),
      options,
      buffers: this.#buffers,
      tables: this.#tables,
      threads: this.#threads,
      hands: this.#hands,
      hand,
      publisher: this.#publisher,
      tracker: this.#trackers.get(disk),
      ...ofStart,
      signal,
      onTarget,
      onStatus: (job, status) => this.#changed(job, status),
    });
  }

  /** Disks that go on from one checkpoint together must have it of one moment. */
  #refusalOf({ options }: BackupRequest, requests: readonly BackupRequest[]): string | undefined {
    const { since } = options;
    if (since === undefined) return undefined;
    const companions = requests.filter((request) => request.options.since === since);
    return disagreement(
      since,
      companions.map(({ disk }) => this.#trackers.get(disk)),
    );
  }

  /** What the target must not be, nor be built on. */
  #inUseBy({ disk }: BackupRequest): InUse {
    const images = [...this.#nodes].map(([name, { image }]) => ({ image, isSource: name === disk }));
    return { images, listeners: this.#places };
  }

  /** Lists its jobs, whose ids and disks are taken from now on. */
  #accept(start: JobStart): void {
    const listed: ListedJob[] = [];
    try {
      for (const job of start.jobs) {
        this.#refuseTaken(job);
        this.#jobs.set(job.id, job);
        listed.push(job);
      }
      this.#refuseTooMany();
    } catch (error) {
      for (const { id } of listed) this.#jobs.delete(id);
      throw error;
    }
    this.#starts.add(start);
    for (const { disk } of start.jobs) this.#jobCounts.set(disk, (this.#jobCounts.get(disk) ?? 0) + 1);
    for (const job of start.jobs) this.#changed(job, "created");
  }

  #refuseTaken({ id, disk }: ListedJob): void {
    const refuse = (object: string, problem: string): never => {
      throw new CowcatcherError({ code: "BUSY", object, problem });
    };
    const isBusy = [...this.#jobs.values()].some((job) => job.disk === disk && !isOver(job.status));
    if (isBusy) refuse(disk, "the disk has a backup running already");
    if (this.#jobs.has(id)) refuse(id, "a job with this id is there already");
  }

  #refuseTooMany(): void {
    let jobCount = this.#jobs.size;
    for (const { leftBehindCount } of this.#starts) jobCount += leftBehindCount;
    if (jobCount <= MAX_JOBS) return;
    const hangs = jobCount > this.#jobs.size;
    throw new CowcatcherError({
      code: "LIMIT",
      object: "jobs",
      problem: `more than ${MAX_JOBS} jobs`,
      hint: hangs
        ? "some were cancelled whose storage does not answer yet: see to it"
        : "dismiss those that have concluded",
    });
  }

  #refuseIfClosing(): void {
    if (this.#closing) {
      throw new CowcatcherError({ code: "BUSY", object: "serve", problem: "the server is ending" });
    }
  }

  #node(disk: string): DiskNode {
    const node = this.#nodes.get(disk);
    if (node !== undefined) return node;
    throw new CowcatcherError({
      code: "NOT_FOUND",
      object: disk,
      problem: "no such disk is served",
      hint: `there are: ${[...this.#nodes.keys()].join(", ")}`,
    });
  }

  #changed(job: BackupJob, status: JobStatus): void {
    for (const listener of this.#listeners) listener(job, status);
  }

  dismiss(id: string): void {
    const job = this.#jobs.get(id);
    if (job === undefined || !isOver(job.status)) return;
    this.#jobs.delete(id);
    job.dismiss();
  }

  onStatus(listener: JobStatusListener): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  quit(): void {
    this.#onQuit();
  }

  /**
   * Cancels what runs and waits until its targets are removed, but no longer than a while where storage does not answer:
   * the process's end sees to those. New jobs are refused from now on.
   */
  async close(): Promise<void> {
    this.#closing = true;
    const jobs = [...this.#jobs.values()];
    for (const job of jobs) job.cancel(serverEnded(job));
    const concluded = jobs.filter((job) => !isOver(job.status)).map((job) => job.concluded);
    const settled = [...this.#starts].map((start) => start.settled);
    const allOver = Promise.all([...concluded, ...settled]).then(() => true);
    const inTime = await Promise.race([allOver, delay(UNDO_MS_MAX, false, { ref: false })]);
    this.#threads.close();
    this.#hands.close();
    if (inTime) process.removeListener("exit", this.#atExit);
  }

  readonly #atExit = (): void => {
    for (const start of this.#starts) start.abortSync();
    for (const job of this.#jobs.values()) if (!isOver(job.status)) job.abortSync();
  };
}

function serverEnded({ options }: BackupJob): CowcatcherError {
  return new CowcatcherError({
    code: "SERVER_ENDED",
    object: options.target,
    problem: "the server was ended while the backup ran",
    hint: "start the server, then the backup again",
  });
}

function trackingInfo(tracker: DiskTracker | undefined): TrackingInfo | undefined {
  if (tracker === undefined) return undefined;
  const { mode, state, granularityBytes, hotExtents, logWaits, loss, checkpoints } = tracker.state;
  return {
    mode,
    state,
    granularityBytes,
    hotExtents,
    logWaits,
    lossReason: loss?.reason ?? null,
    lostCheckpoints: loss?.checkpoints ?? [],
    checkpoints: checkpoints.map(({ name, uuid, createdMs, isStopped }) => ({
      name,
      uuid,
      createdMs,
      isStopped: isStopped === true,
    })),
  };
}

/** By request: how the jobs of a start come to their end. */
function completionsOf(requests: readonly BackupRequest[]): Map<BackupRequest, Completion | undefined> {
  const members = requests.filter(({ isGrouped }) => isGrouped === true);
  const together = Completion.of(members.map(({ options }) => options));
  return new Map(
    requests.map((request) => [
      request,
      request.isGrouped === true ? together : Completion.of([request.options]),
    ]),
  );
}

/** Null for one that was removed meanwhile. */
async function orGone<T>(bits: Promise<T>): Promise<T | null> {
  try {
    return await bits;
  } catch (error) {
    if (toCowcatcherError(error, "").code === "NOT_FOUND") return null;
    throw error;
  }
}
