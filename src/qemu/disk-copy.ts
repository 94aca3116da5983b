// One disk of a backup of a running guest: its target, its workers, who keeps its old data, and how QEMU becomes what it
// was. Main thread.

import { CopyRun } from "../backup/copy/run.js";
import { openBacking } from "../backup/guard/backing-check.js";
import { refuseFileAsTarget } from "../backup/guard/target-guard.js";
import { Finishing } from "../backup/job/finishing.js";
import type { BasisInfo } from "../backup/host.js";
import { type DirtyRuns, markClean } from "../backup/copy/incremental.js";
import type { JobOptions } from "../backup/options.js";
import type { JobProgress } from "../backup/progress.js";
import type { Image, NbdSourceDescription } from "../block/device.js";
import type { ExtentMap } from "../block/extent-map.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import type { Target, TargetOptions } from "../target/target.js";
import type { BitmapHandover } from "./bitmaps.js";
import { QEMU_CLUSTER_BYTES } from "./fleece-keeper.js";
import type { QemuDisk } from "./graph.js";
import type { Keeper } from "./keeper.js";
import type { OpenLiveFile } from "./live-file.js";
import { roundDown } from "../units.js";
import { UndoStack } from "./undo.js";

/** A reader of the export tries to connect again so often: on one machine it is there or it is gone. */
const SOURCE_RETRIES = 2;

/** A second. */
const LOOKS_PER_CHECK = 20;

/** @throws CowcatcherError: what was read is not of T0. `isLast`: all of it is read */
export type IntactCheck = (isLast: boolean) => Promise<void>;

/** To be read past QEMU; `written`: where (LiveFileDescription). */
export type LiveDisk = Pick<OpenLiveFile, "fd" | "close"> & { readonly written?: ExtentMap | undefined };

/** A disk, whoever manages the QEMU that has it. */
export interface CopiedDisk {
  readonly name: string;
  readonly node: { readonly sizeBytes: number };
}

/** What tells what has changed since the backup that this one builds on. */
export interface ChangeRecord {
  /** The bitmap that is exported with the disk; undefined: all is copied. */
  readonly old: string | undefined;
}

export interface DiskCopyRequest<Disk extends CopiedDisk, Changes extends ChangeRecord> {
  disk: Disk;
  index: number;
  job: JobOptions;
  /** Made already; undefined: the one that the job names. */
  target?: Target | undefined;
  makeTarget: (options: TargetOptions) => Promise<Target>;
  makeKeeper: (target: Target) => Keeper;
  /** How much is copied, and why; undefined: no bitmaps are kept. */
  basis?: BasisInfo | undefined;
  makeBitmaps?: ((target: Target) => Changes) | undefined;
  /** What is copied of what the bitmap calls dirty, where that is not just it. */
  dirtyOf?: ((runs: DirtyRuns) => DirtyRuns) | undefined;
  /** Files that QEMU has open: none is a target. */
  filesInUse: readonly string[];
  isCancelled: () => boolean;
  onStopped: (error: CowcatcherError) => void;
  /** The disk is read, or never will be: QEMU is to be as it was before the readers' connections end. Never rejects. */
  leaveQemu: (copy: DiskCopy<Disk, Changes>) => Promise<void>;
}

interface Prepared {
  target: Target;
  backing: Image | null;
  keeper: Keeper;
  run: CopyRun;
}

export class DiskCopy<Disk extends CopiedDisk = QemuDisk, Changes extends ChangeRecord = BitmapHandover> {
  readonly disk: Disk;
  readonly index: number;
  readonly job: JobOptions;
  readonly undo = new UndoStack();
  readonly keeper: Keeper;
  readonly run: CopyRun;
  /** Undefined: no bitmaps are kept. */
  readonly bitmaps: Changes | undefined;
  readonly #basis: BasisInfo | undefined;
  readonly #dirtyOf: (runs: DirtyRuns) => DirtyRuns;
  readonly #target: Target;
  readonly #backing: Image | null;
  readonly #finishing: Finishing;
  readonly #leaveQemu: () => Promise<void>;
  #leaving: Promise<void> | undefined;
  #live: LiveDisk | undefined;
  #isIntact: IntactCheck | undefined;
  #checking = Promise.resolve();
  #broken: CowcatcherError | undefined;
  #looks = 0;
  #uri = "";
  #isOver = false;

  private constructor(
    { disk, index, job, basis, makeBitmaps, dirtyOf, leaveQemu }: DiskCopyRequest<Disk, Changes>,
    { target, backing, keeper, run }: Prepared,
  ) {
    this.disk = disk;
    this.index = index;
    this.job = job;
    this.keeper = keeper;
    this.run = run;
    this.bitmaps = makeBitmaps?.(target);
    this.#basis = basis;
    this.#dirtyOf = dirtyOf ?? ((runs) => runs);
    this.#target = target;
    this.#backing = backing;
    this.#finishing = new Finishing(target, job, run.shared);
    this.#leaveQemu = () => leaveQemu(this);
    keeper.attach(run, (error) => this.cancel(error));
  }

  /** @throws CowcatcherError; nothing is left behind. */
  static async prepare<Disk extends CopiedDisk, Changes extends ChangeRecord>(
    request: DiskCopyRequest<Disk, Changes>,
  ): Promise<DiskCopy<Disk, Changes>> {
    const { disk, job, makeTarget, makeKeeper, filesInUse, isCancelled, onStopped } = request;
    const { sizeBytes } = disk.node;
    let { target } = request;
    if (target === undefined) await refuseFileAsTarget(job.target, filesInUse);
    const backing = target === undefined ? await openBacking({ ...job, path: job.target }) : null;
    let keeper: Keeper | undefined;
    try {
      const { target: path, targetFormat: format } = job;
      target ??= await makeTarget({
        ...job,
        path,
        format,
        sizeBytes,
        isCancelled,
        isPart: request.basis?.level === "incremental",
      });
      keeper = makeKeeper(target);
      const keeps = keeper;
      const letGo = (): void => keeps.letGo();
      const made: { copy?: DiskCopy<Disk, Changes> } = {};
      const run = await CopyRun.prepare({
        job,
        target,
        sizeBytes,
        sourceClusterBytes: QEMU_CLUSTER_BYTES,
        ...keeper.parts,
        live: true,
        onStopped,
        onFailed: letGo,
        beforeThreadsEnd: async () => {
          letGo();
          await made.copy?.leave();
        },
      });
      made.copy = new DiskCopy(request, { target, backing, keeper, run });
      return made.copy;
    } catch (error) {
      await target?.abort();
      await backing?.close();
      await keeper?.close(false);
      throw error;
    }
  }

  get basis(): BasisInfo | undefined {
    if (this.#basis === undefined || this.run.progress().ignoredErrorCount === 0) return this.#basis;
    return { ...this.#basis, reason: "errors were ignored, so nothing can build on it" };
  }

  get bitmap(): string | undefined {
    return this.bitmaps?.old;
  }

  /** After T0. `zeroes`: what the export says reads as zeroes. `dirty`: what the bitmap has. */
  begin(
    uri: string,
    zeroes: NbdSourceDescription["zeroes"],
    {
      dirty,
      live,
      isIntact,
    }: { dirty?: DirtyRuns; live?: LiveDisk | undefined; isIntact?: IntactCheck | undefined } = {},
  ): void {
    this.#uri = uri;
    this.#isIntact = isIntact;
    if (dirty !== undefined) markClean(this.run.shared, this.#dirtyOf(dirty));
    const { name, node } = this.disk;
    const { sizeBytes } = node;
    const retries = SOURCE_RETRIES;
    const { oldData, source } = this.keeper;
    const description = { format: "nbd" as const, name, uri, sizeBytes, retries, zeroes, ...source };
    if (live === undefined || oldData === undefined) {
      void live?.close();
      this.run.begin(description);
      return;
    }
    this.#live = live;
    // The last cluster stays: that it can be read says that all of the snapshot is whole.
    const keptFromBytes = roundDown(sizeBytes - 1, QEMU_CLUSTER_BYTES);
    const { fd, written } = live;
    this.run.begin({ ...description, live: { fd, oldDataFd: oldData.fd, written }, keptFromBytes });
  }

  /**
   * A snapshot that broke refuses to be read, and whoever reads past it does not hear of that. It stays broken: so it is
   * asked now and then, and when everything is read. Never rejects.
   */
  async #checkIntact(isLast: boolean): Promise<void> {
    if (this.#isIntact === undefined || this.run.failure !== undefined) return;
    try {
      await this.#isIntact(isLast);
    } catch (error) {
      this.#broken ??= toCowcatcherError(error, this.disk.name);
      this.cancel(this.#broken);
    }
  }

  look(): void {
    if (this.#isOver || this.run.failure !== undefined || this.#leaving !== undefined) return;
    this.keeper.look();
    // Not of one that is read by the export: its readers hear of it.
    const isDue = ++this.#looks % LOOKS_PER_CHECK === 0 && this.#live !== undefined;
    if (isDue) this.#checking = this.#checking.then(() => this.#checkIntact(false));
    // What the target has not taken yet stands in our memory.
    if (this.run.isAllRead) void this.leave();
  }

  /** Nothing of the disk is needed any more. Never rejects. */
  leave(): Promise<void> {
    this.keeper.letGo();
    this.#leaving ??= this.#leave();
    return this.#leaving;
  }

  async #leave(): Promise<void> {
    // What is still being asked would be refused when the export is gone.
    if (this.run.failure === undefined) await this.#checking;
    await this.#checkIntact(true);
    await this.#leaveQemu();
    this.keeper.left?.();
  }

  progress(): JobProgress {
    return { ...this.run.progress(), ...this.keeper.progress() };
  }

  cancel(error: CowcatcherError): void {
    this.keeper.letGo();
    this.run.abort(error);
    this.#finishing.cancel(error);
  }

  /** The target gets its name, or goes. @throws CowcatcherError: the first cause */
  async finish(): Promise<void> {
    try {
      await this.run.ended;
      if (this.#broken !== undefined) throw this.#broken;
      await this.#finishing.run();
    } catch (error) {
      throw error instanceof CowcatcherError ? this.keeper.explained(error, this.#uri) : error;
    } finally {
      await this.dispose();
    }
  }

  /** Gives up what `prepare` made; a target that has its name stays. Never rejects. */
  async dispose(): Promise<void> {
    this.#isOver = true;
    await this.keeper.close(this.run.leftBehind);
    // A worker that was left behind may still read it.
    if (!this.run.leftBehind) await this.#live?.close();
    await this.#target.abort();
    await this.#backing?.close();
  }

  abortSync(): void {
    this.#target.abortSync();
  }
}

/** What the others of a group end with. */
export function groupFailed(disk: string, cause: string): CowcatcherError {
  return new CowcatcherError({
    code: "CANCELLED",
    object: disk,
    problem: `ended, as the backup of ${cause} has failed`,
  });
}
