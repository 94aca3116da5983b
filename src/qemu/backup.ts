// A backup of disks that a running QEMU has: from its monitor's socket to complete targets. Main thread.
//
//   look at QEMU, choose disks ──► targets, workers, fleecing files ──► T0 (filter.ts) ──► copy ──► QEMU as it was
//                                                                                            └─► targets get their names
//
// Everything that takes time is done before T0, and QEMU is left as soon as a disk is read: what is still to be done
// for its target (tables, sync, --verify) costs the guest nothing.
//
// Disks of one backup are a group: the first failure ends the others, unless they have their names already.

import type { BasisInfo } from "../backup/host.js";
import { type DirtyRuns, runsOfMap } from "../backup/copy/incremental.js";
import type { JobOptions } from "../backup/options.js";
import type { JobProgress } from "../backup/progress.js";
import { type FreezeInfo, whileFrozen } from "../backup/job/while-frozen.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import type { ImageFormat } from "../block/format.js";
import type { Target } from "../target/target.js";
import { dirtyBitmapContext, gatherDirty, gatherZeroes } from "../nbd/client/extent-map.js";
import { NbdClient } from "../nbd/client/client.js";
import { readRange } from "../nbd/client/io.js";
import { endOfMap } from "../block/extent-map.js";
import { roundDown } from "../units.js";
import { openLiveFile, writtenAtT0 } from "./live-file.js";
import { formatNbdUri, type NbdAddress } from "../nbd/wire/uri.js";
import { NBD_META_BASE_ALLOCATION } from "../nbd/wire/protocol.js";
import {
  type BitmapChain,
  BitmapHandover,
  type BitmapWish,
  chainOfFiles,
  findBitmapBasis,
  withoutBitmap,
} from "./bitmaps.js";
import { cleanUpDead } from "./cleanup.js";
import { DiskCopy, groupFailed, type IntactCheck, type LiveDisk } from "./disk-copy.js";
import { startServer } from "./exports.js";
import { type FreezeRequest, makeFreezer } from "./t0-gate.js";
import { diskNames, findDisk, type QemuDisk, type QemuGraph, readGraph } from "./graph.js";
import { chooseMethod, type MethodChoice } from "./method.js";
import type { QemuMethod } from "./methods.js";
import { QemuMonitor, type Visit } from "./monitor.js";
import { partName, runName } from "./names.js";
import { checkRingJob } from "./ring.js";
import { RunFolder } from "./run-folder.js";
import { type MethodSteps, stepsOf } from "./steps.js";
import type { GuestPolicy } from "./t0.js";
import { UndoStack } from "./undo.js";

const SECTOR_BYTES = 512;
/** How often it is looked at who keeps the old data. */
const LOOK_MS = 50;
/** A guest is held up for as long as QEMU does not let go of a ring: its monitor is asked for again so often. */
const LET_GO_TRIES = 20;

export interface QemuDiskRequest {
  /** Node, device or qdev path; undefined: the only disk. */
  name: string | undefined;
  /** targetFormat undefined: the disk's. */
  job: Omit<JobOptions, "targetFormat"> & { targetFormat: ImageFormat | undefined };
  /** Keeps a chain of bitmaps in QEMU; undefined: none. The target is the job's. */
  bitmaps?: BitmapWish | undefined;
}

/** A disk of the guest, before anything is made for it. */
export interface FoundDisk {
  name: string;
  sizeBytes: number;
  format: ImageFormat;
}

/** A disk of the backup that is made, where that is not a file. */
export interface MadeDisk {
  readonly target: Target;
  /** Of the bitmaps that are kept for it; undefined: none. */
  readonly chain: BitmapChain | undefined;
  /** How much of it is copied, and why; the last call counts. Before T0, where there is a chain. */
  readonly decided: (info: BasisInfo) => void;
  /** What is copied of what a bitmap calls dirty. */
  readonly dirtyOf: (runs: DirtyRuns) => DirtyRuns;
}

/** Where a server listens. */
export type ServerAddress = { path: string } | { host: string; port: number };

export interface QemuBackupRequest {
  /** QEMU's QMP socket. */
  monitor: string;
  disks: readonly QemuDiskRequest[];
  /** In the place of `disks`: all that the guest writes, each with this job. */
  allDisks?: QemuDiskRequest["job"] | undefined;
  /** Makes the targets, in order, where they are not those that the jobs name. What it has made is its own to undo. */
  makeTargets?: ((disks: readonly FoundDisk[]) => Promise<readonly MadeDisk[]>) | undefined;
  /** T0 was at this instant, in milliseconds since 1970 UTC: no target has been written to yet. */
  onT0?: ((t0Ms: number) => void) | undefined;
  method: QemuMethod;
  /** Where fleecing files and QEMU's socket for us go. */
  fleeceDir: string;
  /** Of QEMU's NBD server where it runs already; undefined: it is started. */
  server: ServerAddress | undefined;
  acceptGuestRisk: boolean;
  /** Who freezes the guest's file systems for T0. */
  guestAgent: FreezeRequest | undefined;
  isCancelled: () => boolean;
  onStopped: (error: CowcatcherError) => void;
}

export interface QemuDiskBackup {
  readonly disk: string;
  readonly job: JobOptions;
  readonly totalBytes: number;
  /** Where bitmaps are kept: how much is copied, and why. */
  readonly basis: BasisInfo | undefined;
  progress(): JobProgress;
  /** The target has its name. Rejects with the first cause; of a group, some with CANCELLED. */
  readonly ended: Promise<void>;
}

export interface QemuBackup {
  readonly disks: readonly QemuDiskBackup[];
  readonly choice: { readonly method: string; readonly reason: string };
  /** How long the guest was stopped for T0, in ms. */
  readonly stoppedMs: number;
  /** Where the guest's agent was asked to freeze it. */
  readonly freeze: FreezeInfo | undefined;
  /** The instant that all disks' backups show, in milliseconds since 1970 UTC. */
  readonly t0Ms: number;
  cancel(error: CowcatcherError): void;
  /** The process ends now: removes unfinished targets. What QEMU has of ours stays for the next run to remove. */
  abortSync(): void;
  /** All has ended, well or not, and QEMU is as it was. @throws CowcatcherError naming what is left there */
  readonly over: Promise<void>;
}

/** Returns after T0. @throws CowcatcherError: QEMU is as it was, and nothing is left */
export async function startQemuBackup(request: QemuBackupRequest): Promise<QemuBackup> {
  const backup = new RunningBackup(request);
  try {
    await backup.start();
  } catch (error) {
    await backup.giveUp();
    throw error;
  }
  return backup;
}

class RunningBackup implements QemuBackup {
  readonly #request: QemuBackupRequest;
  readonly #monitor: QemuMonitor;
  #jobs: readonly QemuDiskRequest[];
  readonly #run = runName();
  #made: readonly MadeDisk[] | undefined;
  #copies: DiskCopy[] = [];
  #graph: QemuGraph | undefined;
  #folder: RunFolder | undefined;
  #steps: MethodSteps | undefined;
  readonly #abort = new AbortController();
  /** What the disks have in common: the server. */
  readonly #undo = new UndoStack();
  readonly #freezer: ReturnType<typeof makeFreezer> | undefined;
  /** Our own connections, which stay until the exports are gone. */
  readonly #clients: NbdClient[] = [];
  readonly #notUndone: string[] = [];
  #timer: NodeJS.Timeout | undefined;
  disks: readonly QemuDiskBackup[] = [];
  choice: MethodChoice = { method: "filter", reason: "" };
  stoppedMs = 0;
  t0Ms = 0;
  freeze: FreezeInfo | undefined;
  over: Promise<void> = Promise.resolve();

  constructor(request: QemuBackupRequest) {
    this.#request = request;
    this.#jobs = request.disks;
    this.#monitor = new QemuMonitor(request.monitor);
    const { guestAgent } = request;
    this.#freezer = guestAgent === undefined ? undefined : makeFreezer(guestAgent);
  }

  /** Of all disks alike. */
  get #policy(): QemuDiskRequest["job"] {
    const [first] = this.#jobs;
    if (first === undefined) throw busy(this.#request.monitor, "no disk is named", "name one with --disk");
    return first.job;
  }

  async start(): Promise<void> {
    const { isCancelled } = this.#request;
    const watch = setInterval(() => {
      if (isCancelled()) this.#abort.abort(this.#cancelled());
    }, LOOK_MS);
    try {
      await this.#start();
    } finally {
      clearInterval(watch);
    }
  }

  async #start(): Promise<void> {
    const { monitor, fleeceDir } = this.#request;
    const { graph, disks } = await this.#monitor.visit((visit) => this.#lookAround(visit));
    this.#graph = graph;
    const buffer = this.#policy;
    this.choice = chooseMethod(graph, disks, { ...this.#request, buffer });
    await this.#freezer?.check();
    this.#folder = await RunFolder.create(fleeceDir, monitor);
    this.#steps = stepsOf(this.choice, this.#folder, this.#abort.signal);
    await this.#steps.open();
    await this.#prepareAll(graph, disks, this.#steps);
    this.#throwIfCancelled();
    const { folder, steps } = { folder: this.#folder, steps: this.#steps };
    await this.#monitor.visit((visit) => this.#takeOver(visit, folder, steps));
    await this.#beginAll();
    this.disks = this.#copies.map((copy) => ({
      disk: copy.disk.name,
      job: copy.job,
      totalBytes: copy.disk.node.sizeBytes,
      get basis() {
        return copy.basis;
      },
      progress: () => copy.progress(),
      ended: this.#finish(copy),
    }));
    for (const { ended } of this.disks) ended.catch(() => undefined);
    this.over = this.#end();
    this.over.catch(() => undefined);
    this.#timer = setInterval(() => this.#look(), LOOK_MS);
  }

  async #lookAround(visit: Visit): Promise<{ graph: QemuGraph; disks: QemuDisk[] }> {
    await cleanUpDead(visit);
    const graph = await readGraph(visit);
    if (this.#freezer !== undefined) refuseSilentGuest(this.#freezer, graph);
    const disks: QemuDisk[] = [];
    const { allDisks } = this.#request;
    if (allDisks !== undefined) {
      this.#jobs = diskNames(graph).map((name) => ({ name, job: allDisks }));
    }
    for (const { name } of this.#jobs) disks.push(await findDisk(visit, graph, name));
    for (const [index, { name, node }] of disks.entries()) {
      const isTwice = disks.findIndex((other) => other.node.name === node.name) !== index;
      if (isTwice) throw busy(name, "is given twice, under two names", "name each disk once");
    }
    return { graph, disks };
  }

  /** One after another: each starts threads, and the guest is to go on meanwhile. */
  async #prepareAll(graph: QemuGraph, disks: readonly QemuDisk[], steps: MethodSteps): Promise<void> {
    const filesInUse = [...graph.nodes.values()].map(({ filename }) => filename);
    const formats = disks.map(({ node }) => (node.driver === "qcow2" ? "qcow2" : "raw"));
    this.#made = await this.#request.makeTargets?.(
      disks.map(({ name, node: { sizeBytes } }, index) => ({
        name,
        sizeBytes,
        format: formats[index] ?? "raw",
      })),
    );
    for (const [index, disk] of disks.entries()) {
      const given = this.#jobs[index]?.job;
      if (given === undefined) continue;
      const made = this.#made?.[index];
      const wish = this.#jobs[index]?.bitmaps;
      const chain = made === undefined ? wish && chainOfFiles(wish, given.target) : made.chain;
      const found = chain && findBitmapBasis(disk.name, disk.node, chain);
      if (found !== undefined) made?.decided(found.info);
      // A full one stands by itself.
      const base =
        found?.old === undefined && chain ? { backingFile: undefined, backingFormat: undefined } : {};
      const job = { ...given, ...base, targetFormat: given.targetFormat ?? formats[index] ?? "raw" };
      this.#copies.push(
        await DiskCopy.prepare({
          disk,
          index,
          job,
          target: made?.target,
          makeTarget: (options) => steps.makeTarget(options),
          makeKeeper: (target) => steps.makeKeeper(disk, index, job, target),
          basis: found?.info,
          makeBitmaps:
            chain === undefined || found === undefined || found.keepsNone === true
              ? undefined
              : (target) => new BitmapHandover(disk.node, found, chain.ownBitmap(target), this.#run, index),
          dirtyOf: made?.dirtyOf,
          filesInUse,
          isCancelled: this.#request.isCancelled,
          onStopped: this.#request.onStopped,
          leaveQemu: (copy) => this.#leave(copy),
        }),
      );
    }
  }

  /** T0. What fails here is undone in the same visit. */
  async #takeOver(visit: Visit, folder: RunFolder, steps: MethodSteps): Promise<void> {
    const { server } = this.#request;
    const policy: GuestPolicy = this.#policy;
    try {
      if (server === undefined) await startServer(visit, folder.socket, this.#undo);
      await steps.prepare(visit, this.#copies);
      for (const copy of this.#copies) await this.#beginBitmap(visit, copy);
      const takeT0 = () => steps.takeT0(visit, this.#copies, policy);
      const times = await this.#whileFrozen(takeT0);
      this.stoppedMs = times.stoppedMs;
      this.t0Ms = times.t0Ms;
      this.#request.onT0?.(times.t0Ms);
      for (const { bitmaps } of this.#copies) await bitmaps?.endOld(visit);
      await steps.publish(visit, this.#copies);
    } catch (error) {
      for (const { keeper } of this.#copies) keeper.letGo();
      for (const { undo } of this.#copies) this.#notUndone.push(...(await undo.run(visit)));
      this.#notUndone.push(...(await this.#undo.run(visit)));
      await this.#giveBackBitmaps(visit);
      throw error;
    }
  }

  /** @throws CowcatherError as BitmapHandover.begin, where the backup is no good without a bitmap */
  async #beginBitmap(visit: Visit, { index, bitmaps, basis }: DiskCopy): Promise<void> {
    try {
      await bitmaps?.begin(visit);
    } catch (error) {
      const made = this.#made?.[index];
      const obstacle = toCowcatcherError(error);
      if (obstacle.code !== "NO_BASIS" || basis === undefined || made?.chain === undefined) throw error;
      made.decided(withoutBitmap({ info: basis }, obstacle, made.chain).info);
    }
  }

  async #whileFrozen<T>(step: () => Promise<T>): Promise<T> {
    try {
      return await whileFrozen(this.#freezer, step, this.#abort.signal);
    } finally {
      this.freeze = this.#freezer?.info;
    }
  }

  async #beginAll(): Promise<void> {
    await Promise.all(
      this.#copies.map(async (copy) => {
        const uri = formatNbdUri(this.#exportOf(copy));
        const { bitmap } = copy;
        // Not both: QEMU 7.2 answers one request twice where a snapshot refuses one of two contexts.
        const contexts = [bitmap === undefined ? NBD_META_BASE_ALLOCATION : dirtyBitmapContext(bitmap)];
        const { isCancelled } = this.#request;
        const client = await NbdClient.connect(uri, { contexts, isCancelled, staysOpen: true });
        this.#clients.push(client);
        if (bitmap !== undefined) {
          const isIntact = this.#checkOf(copy, client, undefined);
          copy.begin(uri, null, { dirty: runsOfMap(await gatherDirty(client, bitmap)), isIntact });
          return;
        }
        let live = await this.#liveFileOf(copy, client);
        try {
          const zeroes = await gatherZeroes(client);
          const isKnown = zeroes !== null && endOfMap(zeroes) >= client.sizeBytes;
          if (live !== undefined && copy.keeper.source.isSnapshot === true && !isKnown) {
            await live.close();
            live = undefined;
          }
          copy.begin(uri, zeroes, { live, isIntact: this.#checkOf(copy, client, live) });
        } catch (error) {
          await live?.close();
          throw error;
        }
      }),
    );
  }

  /** Whether who keeps the old data still does: of a ring that is known when the disk is read, and asked of the monitor. */
  #checkOf(
    { keeper, index }: DiskCopy,
    client: NbdClient,
    live: LiveDisk | undefined,
  ): IntactCheck | undefined {
    // Who reads a snapshot's export hears of it there.
    if (keeper.source.isSnapshot === true) return live && (() => readEnd(client));
    const job = partName(this.#run, index, "job");
    return async (isLast) => {
      if (!isLast) return;
      const answer = this.#monitor.visit((visit) => checkRingJob(visit, job));
      // Where QEMU has gone since, the export was there to the last read.
      await answer.catch((error: unknown) => {
        if (live !== undefined || toCowcatcherError(error).code === "SNAPSHOT") throw error;
      });
    };
  }

  /**
   * What QEMU keeps as zeroes is not to be seen in its file: where it may do so from now on is not read past it, and where
   * it has done so by now it says so when it is asked what reads as zeroes, afterwards.
   */
  async #liveFileOf({ disk, keeper }: DiskCopy, client: NbdClient): Promise<LiveDisk | undefined> {
    if (this.#graph === undefined || keeper.oldData === undefined) return undefined;
    const file = await openLiveFile(this.#graph, disk.node, client.serverProcess);
    if (file === undefined || keeper.oldData.fd === null) return file;
    const written = writtenAtT0(file, disk.node.sizeBytes);
    if (written !== null) return { ...file, written };
    await file.close();
    return undefined;
  }

  #exportOf({ index }: DiskCopy): NbdAddress {
    const place = this.#request.server ?? { path: this.#folder?.socket ?? "" };
    return { ...place, exportName: partName(this.#run, index, "exp") };
  }

  #look(): void {
    for (const copy of this.#copies) copy.look();
  }

  /** QEMU becomes what it was for this disk. Never rejects. */
  async #leave({ undo }: DiskCopy): Promise<void> {
    if (undo.isEmpty) return;
    await this.#undoBy(undo);
  }

  async #undoBy(undo: UndoStack): Promise<void> {
    const tries = this.#steps?.mustLetGo === true ? LET_GO_TRIES : 1;
    for (let left = tries; left > 0; left--) {
      try {
        this.#notUndone.push(...(await this.#monitor.visit((visit) => undo.run(visit))));
        return;
      } catch (error) {
        const { code, problem } = toCowcatcherError(error);
        // Nobody listens there any more: with QEMU all of it is gone.
        if (code === "NOT_FOUND" || /ECONNREFUSED|refused/.test(problem)) return;
        if (left === 1) this.#notUndone.push(problem);
      }
    }
  }

  /** Never rejects. */
  async #giveBackBitmaps(visit: Visit): Promise<void> {
    for (const { bitmaps } of this.#copies) {
      await bitmaps?.giveBack(visit).catch((error: unknown) => {
        this.#notUndone.push(`give the bitmap back: ${toCowcatcherError(error).problem}`);
      });
    }
  }

  /** The target has its name: the bitmap that began at its T0 is its own now. @throws CowcatcherError */
  async #handOver({ disk, bitmaps, run }: DiskCopy): Promise<void> {
    // What is missing in it would be missing in all that builds on it.
    if (bitmaps === undefined || run.progress().ignoredErrorCount > 0) return;
    try {
      await this.#monitor.visit((visit) => bitmaps.succeed(visit));
    } catch (error) {
      const { problem, ...details } = toCowcatcherError(error, disk.name).toDetails();
      throw new CowcatcherError({
        ...details,
        problem: `the backup is complete, but QEMU's bitmap for the next one could not be kept: ${problem}`,
      });
    }
  }

  async #finish(copy: DiskCopy): Promise<void> {
    try {
      await copy.finish();
      await this.#handOver(copy);
    } catch (error) {
      const cause = toCowcatcherError(error, copy.disk.name);
      for (const other of this.#copies) {
        if (other !== copy) other.cancel(groupFailed(other.disk.name, copy.disk.name));
      }
      throw cause;
    }
  }

  async #end(): Promise<void> {
    await Promise.allSettled(this.disks.map(({ ended }) => ended));
    clearInterval(this.#timer);
    await this.#leaveNothing();
    const [first] = this.#notUndone;
    if (first !== undefined) throw notUndone(this.#request.monitor, this.#notUndone);
  }

  async #leaveNothing(): Promise<void> {
    if (this.#copies.some(({ bitmaps }) => bitmaps?.isOpen === true)) {
      await this.#monitor.visit((visit) => this.#giveBackBitmaps(visit)).catch(() => undefined);
    }
    if (!this.#undo.isEmpty) await this.#undoBy(this.#undo);
    for (const client of this.#clients) client.destroy();
    await this.#steps?.close();
    await this.#folder
      ?.remove()
      .catch((error: unknown) => this.#notUndone.push(toCowcatcherError(error).message));
  }

  /** The start has failed. Never rejects. */
  async giveUp(): Promise<void> {
    const error = new CowcatcherError({
      code: "CANCELLED",
      object: this.#request.monitor,
      problem: "the start failed",
    });
    for (const copy of this.#copies) copy.cancel(error);
    for (const copy of this.#copies) await copy.finish().catch(() => undefined);
    await this.#leaveNothing();
  }

  #throwIfCancelled(): void {
    if (this.#request.isCancelled()) throw this.#cancelled();
  }

  #cancelled(): CowcatcherError {
    const { monitor } = this.#request;
    return new CowcatcherError({ code: "CANCELLED", object: monitor, problem: "given up, as asked" });
  }

  cancel(error: CowcatcherError): void {
    for (const copy of this.#copies) copy.cancel(error);
  }

  abortSync(): void {
    for (const copy of this.#copies) copy.abortSync();
  }
}

/** Of the disk's last block, which is never discarded. @throws CowcatcherError as NbdClient.read */
async function readEnd(client: NbdClient): Promise<void> {
  const { sizeBytes, info } = client;
  const block = Math.max(info.minimumBlockBytes, SECTOR_BYTES);
  const start = roundDown(sizeBytes - 1, block);
  await readRange(client, new Uint8Array(sizeBytes - start), 0, sizeBytes - start, start);
}

function refuseSilentGuest({ path }: { path: string }, { status }: QemuGraph): void {
  if (status === undefined || status === "running") return;
  const problem = `the guest is ${status}, so its agent cannot answer`;
  throw busy(path, problem, "leave out --freeze: what does not run writes nothing");
}

function busy(object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object, problem, hint });
}

function notUndone(object: string, steps: readonly string[]): CowcatcherError {
  return new CowcatcherError({
    code: "IO",
    object,
    problem: `something is left in QEMU: ${steps.join("; ")}`,
    hint: `run: cowcatcher backup --qmp ${object} --cleanup`,
  });
}
