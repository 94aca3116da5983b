// A backup of disks of a running domain, through libvirt: from its name to complete targets. Main thread.
//
//   look at the domain, choose disks ──► targets, workers ──► backup-begin: T0 ──► read libvirt's export ──► domjobabort
//                                                                                       └─► targets get their names
//
// libvirt has QEMU keep the old data in scratch files of ours, one a disk, and serve the disks as of T0 from one NBD server.
// T0 of all disks is one transaction of QEMU's: nothing stands still for it.
//
// There is one job for all disks, so all are read before it is ended, and it is ended before our connections are: an NBD
// client that hangs up first ends QEMU where the disk is in an iothread (qemu/filter.ts).
//
//   run of disk A over ──┐
//   run of disk B over ──┴─► domjobabort ─► threads, connections end ─► each target: tables, sync, its name
//
// A run that fails cancels the others, so that all come to that place.

import { join } from "node:path";
import { runsOfMap } from "../backup/copy/incremental.js";
import { whileFrozen, type FreezeInfo } from "../backup/job/while-frozen.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { dirtyBitmapContext, gatherDirty, gatherZeroes } from "../nbd/client/extent-map.js";
import { NbdClient } from "../nbd/client/client.js";
import { formatNbdUri } from "../nbd/wire/uri.js";
import { NBD_META_BASE_ALLOCATION } from "../nbd/wire/protocol.js";
import type { FoundDisk, MadeDisk, QemuBackup, QemuBackupRequest, QemuDiskBackup } from "../qemu/backup.js";
import { type BitmapChain, chainOfFiles } from "../qemu/bitmaps.js";
import { DiskCopy, groupFailed } from "../qemu/disk-copy.js";
import { RunFolder } from "../qemu/run-folder.js";
import { makeFreezer } from "../qemu/t0-gate.js";
import { createTarget } from "../target/create.js";
import {
  asMissingBasis,
  type CheckpointBasis,
  checkpointName,
  deleteCheckpoint,
  describeOrigin,
  findBasis,
  withoutCheckpoint,
} from "./checkpoints.js";
import { cleanUpDead } from "./cleanup.js";
import { CHANGES } from "./documents.js";
import { chooseDisks, type Domain, readDomain, type SizedDisk, withSize } from "./domain.js";
import { DomainFreeze, THROUGH_LIBVIRT } from "./domain-freeze.js";
import { beginJob, endJob, endOfLastJob, refuseBusy, socketOfJob } from "./job.js";
import { qemuUser } from "./qemu-process.js";
import { refuseMethod } from "./risks.js";
import { checkRoom, ScratchKeeper } from "./scratch-keeper.js";
import { Virsh } from "./virsh.js";

/** How often the scratch files are looked at, and whether the start is given up. */
const LOOK_MS = 50;

const CHOICE = {
  method: "libvirt",
  reason: "libvirt's backup job has QEMU keep the old data in scratch files",
} as const;

/** As of a QEMU, less what libvirt decides. */
export type LibvirtBackupRequest = Pick<
  QemuBackupRequest,
  | "disks"
  | "allDisks"
  | "makeTargets"
  | "onT0"
  | "fleeceDir"
  | "acceptGuestRisk"
  | "guestAgent"
  | "isCancelled"
  | "onStopped"
> & {
  domain: string;
  /** libvirt's URI of the hypervisor; undefined: virsh's own default. */
  connect: string | undefined;
};

/** What tells what has changed: the bitmap of the export, and which backup the disk's target is. */
interface Changes {
  old: string | undefined;
  own: string;
}

type DomainCopy = DiskCopy<SizedDisk, Changes>;

/** Returns after T0. @throws CowcatcherError: the domain is as it was, and nothing is left */
export async function startLibvirtBackup(request: LibvirtBackupRequest): Promise<QemuBackup> {
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
  readonly choice = CHOICE;
  readonly stoppedMs = 0;
  readonly #request: LibvirtBackupRequest;
  readonly #virsh: Virsh;
  readonly #freezer: ReturnType<typeof makeFreezer> | undefined;
  readonly #abort = new AbortController();
  #jobs: QemuBackupRequest["disks"];
  #copies: DomainCopy[] = [];
  #keepers: ScratchKeeper[] = [];
  #folder: RunFolder | undefined;
  #basis: CheckpointBasis | undefined;
  /** Of the checkpoints, where they are not of files. */
  #chain: string | undefined;
  /** The checkpoint of this backup, from the moment on when it may be there; undefined: none, or it is its own now. */
  #checkpoint: string | undefined;
  /** backup-begin was called. */
  #hasBegun = false;
  readonly #left = new Set<DomainCopy>();
  #letAllLeave: () => void = () => undefined;
  readonly #allHaveLeft = new Promise<void>((resolve) => (this.#letAllLeave = resolve));
  #leaving: Promise<void> | undefined;
  /** The job was gone before we ended it. */
  #wasEnded = false;
  readonly #clients: NbdClient[] = [];
  readonly #notUndone: string[] = [];
  #timer: NodeJS.Timeout | undefined;
  disks: readonly QemuDiskBackup[] = [];
  t0Ms = 0;
  freeze: FreezeInfo | undefined;
  over: Promise<void> = Promise.resolve();

  constructor(request: LibvirtBackupRequest) {
    this.#request = request;
    this.#jobs = request.disks;
    this.#virsh = new Virsh(request.connect, request.domain);
    const { guestAgent } = request;
    const isLibvirts = guestAgent?.agent === THROUGH_LIBVIRT;
    this.#freezer =
      guestAgent && makeFreezer(guestAgent, isLibvirts ? new DomainFreeze(this.#virsh) : undefined);
  }

  async start(): Promise<void> {
    const watch = setInterval(() => {
      if (this.#request.isCancelled()) this.#abort.abort(this.#cancelled());
    }, LOOK_MS);
    try {
      await this.#start();
    } finally {
      clearInterval(watch);
    }
  }

  async #start(): Promise<void> {
    const virsh = this.#virsh;
    const domain = await readDomain(virsh);
    if (!domain.isRunning) throw notRunning(domain.name);
    const disks = await this.#chooseDisks(domain);
    await refuseMethod(virsh, disks, { ...this.#request, jobs: this.#jobs });
    const owner = qemuUser(domain);
    await cleanUpDead(virsh);
    await refuseBusy(virsh);
    await this.#freezer?.check();
    checkRoom(this.#request.fleeceDir);
    this.#folder = await RunFolder.createFor(this.#request.fleeceDir, owner);
    await this.#prepareAll(domain, disks, this.#folder);
    this.#throwIfCancelled();
    const folder = this.#folder;
    this.t0Ms = await this.#whileFrozen(() => this.#takeT0(domain, folder));
    this.#request.onT0?.(this.t0Ms);
    this.#throwIfCancelled();
    await Promise.all(this.#copies.map((copy) => this.#begin(copy, folder.socket)));
    this.disks = this.#copies.map((copy) => this.#diskBackup(copy));
    for (const { ended } of this.disks) ended.catch(() => undefined);
    this.over = this.#end();
    this.over.catch(() => undefined);
    this.#timer = setInterval(() => this.#look(), LOOK_MS);
  }

  async #chooseDisks(domain: Domain): Promise<SizedDisk[]> {
    const { allDisks } = this.#request;
    const names = this.#jobs.flatMap(({ name }) => name ?? []);
    const found = chooseDisks(domain, names.length === 0 ? undefined : names, allDisks !== undefined);
    if (allDisks !== undefined) this.#jobs = found.map(({ name }) => ({ name, job: allDisks }));
    const disks: SizedDisk[] = [];
    for (const disk of found) disks.push(await withSize(this.#virsh, disk));
    return disks;
  }

  /** Of all disks together; the chains of those that have any. */
  async #findBasis(
    disks: readonly SizedDisk[],
    made: readonly MadeDisk[] | undefined,
  ): Promise<BitmapChain[]> {
    const chains =
      made?.flatMap(({ chain }) => chain ?? []) ??
      this.#jobs.flatMap(({ bitmaps, job }) =>
        bitmaps === undefined ? [] : chainOfFiles(bitmaps, job.target),
      );
    if (chains.length === 0) return [];
    const raw = disks.find(({ format }) => format !== "qcow2");
    this.#basis =
      raw === undefined
        ? await findBasis(this.#virsh, disks, chains)
        : withoutCheckpoint(chains, noCheckpoints(raw.name));
    for (const { decided } of made ?? []) decided(this.#basis.info);
    return this.#basis.keepsNone === true ? [] : chains;
  }

  async #prepareAll(domain: Domain, disks: readonly SizedDisk[], folder: RunFolder): Promise<void> {
    const made = await this.#request.makeTargets?.(
      disks.map(({ name, format, node }): FoundDisk => ({ name, format, sizeBytes: node.sizeBytes })),
    );
    const chains = await this.#findBasis(disks, made);
    this.#chain = chains[0]?.id;
    const basis = this.#basis;
    // A full one stands by itself.
    const base =
      basis !== undefined && basis.old === undefined
        ? { backingFile: undefined, backingFormat: undefined }
        : {};
    for (const [index, disk] of disks.entries()) {
      const given = this.#jobs[index]?.job;
      if (given === undefined) continue;
      const chain = chains[index];
      const job = { ...given, ...base, targetFormat: given.targetFormat ?? disk.format };
      const path = join(folder.path, `${index}.scratch`);
      const keeper = new ScratchKeeper({ folder: folder.directory, path }, disk, job);
      const copy = await DiskCopy.prepare<SizedDisk, Changes>({
        disk,
        index,
        job,
        target: made?.[index]?.target,
        makeTarget: createTarget,
        makeKeeper: () => keeper,
        basis: basis?.info,
        makeBitmaps:
          chain &&
          ((target) => ({
            old: basis?.old === undefined ? undefined : CHANGES,
            own: chain.ownBitmap(target),
          })),
        dirtyOf: made?.[index]?.dirtyOf,
        filesInUse: domain.files,
        isCancelled: this.#request.isCancelled,
        onStopped: this.#request.onStopped,
        leaveQemu: (left) => this.#leave(left),
      });
      this.#copies.push(copy);
      this.#keepers.push(keeper);
    }
  }

  /** The instant before the call: what was answered by then is in the backup. */
  async #takeT0(domain: Domain, folder: RunFolder): Promise<number> {
    const disks = this.#copies.map(({ disk: { name } }, index) => ({
      name,
      scratch: this.#keepers[index]?.path ?? "",
    }));
    const others = domain.disks
      .map(({ name }) => name)
      .filter((name) => !disks.some((disk) => disk.name === name));
    const backup = { socket: folder.socket, disks, others, incremental: this.#basis?.old };
    const keeps = this.#basis !== undefined && this.#basis.keepsNone !== true;
    const checkpoint = keeps ? { ...this.#newCheckpoint(folder.run), disks, others } : undefined;
    const t0Ms = Date.now();
    this.#hasBegun = true;
    this.#checkpoint = checkpoint?.name;
    await beginJob(this.#virsh, folder, { backup, checkpoint }).catch((error: unknown) => {
      const hint =
        this.#chain === undefined
          ? "make a full backup with --bitmap auto and without -b"
          : "give --level full";
      throw asMissingBasis(error, this.#basis?.old, hint);
    });
    return t0Ms;
  }

  #newCheckpoint(run: string): { name: string; description: string } {
    const files = this.#copies.map(({ disk, bitmaps }) => [disk.name, bitmaps?.own ?? ""] as const);
    const targets = this.#copies.map(({ disk, job }) => ({ disk: disk.name, path: job.target }));
    const origin = this.#chain === undefined ? { run, targets } : { run, targets: [], chain: this.#chain };
    return { name: checkpointName(files), description: describeOrigin(origin) };
  }

  async #whileFrozen<T>(step: () => Promise<T>): Promise<T> {
    try {
      return await whileFrozen(this.#freezer, step, this.#abort.signal);
    } finally {
      this.freeze = this.#freezer?.info;
    }
  }

  async #begin(copy: DomainCopy, socket: string): Promise<void> {
    const uri = formatNbdUri({ path: socket, exportName: copy.disk.name });
    const { bitmap } = copy;
    const contexts = [bitmap === undefined ? NBD_META_BASE_ALLOCATION : dirtyBitmapContext(bitmap)];
    const { isCancelled } = this.#request;
    const client = await NbdClient.connect(uri, { contexts, isCancelled, staysOpen: true });
    this.#clients.push(client);
    if (bitmap === undefined) copy.begin(uri, await gatherZeroes(client));
    else copy.begin(uri, null, { dirty: runsOfMap(await gatherDirty(client, bitmap)) });
  }

  #diskBackup(copy: DomainCopy): QemuDiskBackup {
    return {
      disk: copy.disk.name,
      job: copy.job,
      totalBytes: copy.disk.node.sizeBytes,
      get basis() {
        return copy.basis;
      },
      progress: () => copy.progress(),
      ended: this.#finish(copy),
    };
  }

  #look(): void {
    for (const copy of this.#copies) {
      try {
        copy.look();
      } catch (error) {
        copy.cancel(toCowcatcherError(error, copy.disk.name));
      }
    }
  }

  /** A run is over. Fulfilled when all are, and the job is ended. Never rejects. */
  async #leave(copy: DomainCopy): Promise<void> {
    this.#left.add(copy);
    if (copy.run.failure !== undefined) this.#cancelOthers(copy);
    if (this.#copies.every((other) => this.#left.has(other))) this.#letAllLeave();
    if (!this.#hasBegun) return;
    await this.#allHaveLeft;
    this.#leaving ??= this.#leaveDomain();
    await this.#leaving;
  }

  #cancelOthers(copy: DomainCopy): void {
    for (const other of this.#copies) {
      if (other !== copy) other.cancel(groupFailed(other.disk.name, copy.disk.name));
    }
  }

  /** Never rejects. */
  async #leaveDomain(): Promise<void> {
    const socket = this.#folder?.socket;
    if (!this.#hasBegun || socket === undefined) return;
    try {
      this.#wasEnded = (await socketOfJob(this.#virsh)) !== socket;
      if (!this.#wasEnded) await endJob(this.#virsh, socket);
    } catch (error) {
      this.#notUndone.push(`the backup job: ${toCowcatcherError(error).problem}`);
    }
  }

  async #finish(copy: DomainCopy): Promise<void> {
    try {
      await copy.finish();
    } catch (error) {
      this.#cancelOthers(copy);
      throw await this.#explained(toCowcatcherError(error, copy.disk.name));
    }
  }

  /** A reader only sees that its export is not there any more. */
  async #explained(error: CowcatcherError): Promise<CowcatcherError> {
    const { domain } = this.#request;
    const isOfExport = this.#folder !== undefined && error.object.includes(this.#folder.path);
    if (!isOfExport) return error;
    const now = await readDomain(this.#virsh).catch(() => undefined);
    // libvirt may have called the job its own still when the guest's end had taken the export with it.
    if (!this.#wasEnded && now?.isRunning !== false) return error;
    if (now?.isRunning === true) {
      const words = await endOfLastJob(this.#virsh);
      const problem = `libvirt's backup job ended before the disks were read${words === undefined ? "" : `: ${words}`}`;
      return new CowcatcherError({ code: "SNAPSHOT", object: domain, problem, cause: error });
    }
    const problem = "the guest was shut down while its disks were read";
    const hint = "what is shut off is backed up by its images: cowcatcher backup IMAGE TARGET";
    return new CowcatcherError({ code: "SNAPSHOT", object: domain, problem, hint, cause: error });
  }

  async #end(): Promise<void> {
    const ends = await Promise.allSettled(this.disks.map(({ ended }) => ended));
    clearInterval(this.#timer);
    const isGood = ends.every(({ status }) => status === "fulfilled");
    // What is missing in it would be missing in all that builds on it.
    const isWhole = this.#copies.every(({ run }) => run.progress().ignoredErrorCount === 0);
    if (isGood && isWhole) await this.#handOver();
    await this.#leaveNothing();
    const [first] = this.#notUndone;
    if (first !== undefined) throw notUndone(this.#request, this.#notUndone);
  }

  /** The backup is good: its checkpoint stays, and those that nothing builds on any more go. Never rejects. */
  async #handOver(): Promise<void> {
    this.#checkpoint = undefined;
    if (this.#basis === undefined) return;
    for (const name of this.#basis.ended) await this.#deleteCheckpoint(name);
  }

  /** Never rejects. */
  async #deleteCheckpoint(name: string): Promise<void> {
    await deleteCheckpoint(this.#virsh, name).catch((error: unknown) => {
      this.#notUndone.push(`the checkpoint ${name}: ${toCowcatcherError(error).problem}`);
    });
  }

  /** Never rejects. */
  async #leaveNothing(): Promise<void> {
    this.#letAllLeave();
    this.#leaving ??= this.#leaveDomain();
    await this.#leaving;
    for (const client of this.#clients) client.destroy();
    if (this.#checkpoint !== undefined) await this.#deleteCheckpoint(this.#checkpoint);
    this.#checkpoint = undefined;
    await this.#folder
      ?.remove()
      .catch((error: unknown) => this.#notUndone.push(toCowcatcherError(error).message));
  }

  /** The start has failed. Never rejects. */
  async giveUp(): Promise<void> {
    const { domain: object } = this.#request;
    const error = new CowcatcherError({ code: "CANCELLED", object, problem: "the start failed" });
    for (const copy of this.#copies) copy.cancel(error);
    await Promise.allSettled(this.#copies.map((copy) => copy.finish()));
    await this.#leaveNothing();
  }

  #throwIfCancelled(): void {
    if (this.#request.isCancelled()) throw this.#cancelled();
  }

  #cancelled(): CowcatcherError {
    const { domain: object } = this.#request;
    return new CowcatcherError({ code: "CANCELLED", object, problem: "given up, as asked" });
  }

  cancel(error: CowcatcherError): void {
    for (const copy of this.#copies) copy.cancel(error);
  }

  abortSync(): void {
    for (const copy of this.#copies) copy.abortSync();
  }
}

function notRunning(object: string): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object,
    problem: "is shut off, and --libvirt is for guests that run",
    hint: "back up its images: cowcatcher backup IMAGE TARGET",
  });
}

function noCheckpoints(object: string): CowcatcherError {
  return new CowcatcherError({
    code: "NO_BASIS",
    object,
    problem: "is a raw disk, and libvirt keeps track of qcow2 disks alone",
    hint: "leave out --bitmap, or give --bitmap none with --repo: a full backup needs none",
  });
}

function notUndone(
  { domain, connect }: Pick<LibvirtBackupRequest, "domain" | "connect">,
  steps: readonly string[],
): CowcatcherError {
  const at = connect === undefined ? "" : ` --connect ${connect}`;
  return new CowcatcherError({
    code: "IO",
    object: domain,
    problem: `something is left in libvirt: ${steps.join("; ")}`,
    hint: `run: cowcatcher backup --libvirt ${domain}${at} --cleanup`,
  });
}
