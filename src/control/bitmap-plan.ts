// What a command, or all actions of a transaction one after another, does to dirty bitmaps: checked here, done at one T0.
//
// QEMU carries out each action as it prepares it, and undoes them if a later one fails. So an action sees what those before
// it did: a bitmap that was added can be merged into, one that a backup has got is busy. Here nothing is done before all
// is known to be right, so the actions work on what would be: which bitmaps there are, whether each records, and which
// bitmaps' bits of T0 it has. The engine then makes it so for all of them at once, or for none.

import { type BackupJob, type BitmapName, type DiskInfo, isOver, type MarkRequest } from "../backup/host.js";
import type { BitmapMode, BitmapUse } from "../backup/options.js";
import { genericError, notSupported } from "../qmp/protocol.js";
import type { CommandContext } from "./command.js";

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;
/** QEMU's limits (block/dirty-bitmap.c). */
const MIN_GRANULARITY_BYTES = 512;

interface Bitmap extends MarkRequest {
  isBusy: boolean;
  isInconsistent: boolean;
  isChanged: boolean;
  isRemoved: boolean;
}

type TrackedDisk = DiskInfo & { tracking: NonNullable<DiskInfo["tracking"]> };

export class BitmapPlan {
  readonly #disks: readonly DiskInfo[];
  readonly #jobs: readonly BackupJob[];
  readonly #bitmaps = new Map<string, Bitmap>();

  constructor({ host }: CommandContext) {
    this.#disks = host.disks();
    this.#jobs = host.jobs();
  }

  /** What is to be done at T0. */
  marks(): MarkRequest[] {
    return [...this.#bitmaps.values()]
      .filter(({ isChanged }) => isChanged)
      .map(({ disk, name, holds, isRecording, isRemoved }) => ({
        disk,
        name,
        holds,
        isRecording,
        isRemoved,
      }));
  }

  add(args: {
    node: string;
    name: string;
    granularity?: number | undefined;
    disabled?: boolean | undefined;
  }): void {
    const { node, name, granularity } = args;
    if (name === "") throw genericError("Bitmap name cannot be empty");
    const disk = this.#trackedDisk(node);
    if (granularity !== undefined) checkGranularity(granularity, disk.tracking.granularityBytes);
    if (this.#find(disk, name) !== undefined) throw genericError(`Bitmap already exists: ${name}`);
    if (!NAME.test(name)) throw genericError(`Invalid bitmap name '${name}'`);
    this.#bitmaps.set(keyOf({ disk: disk.name, name }), {
      disk: disk.name,
      name,
      holds: [],
      isRecording: args.disabled !== true,
      isBusy: false,
      isInconsistent: false,
      isChanged: true,
      isRemoved: false,
    });
  }

  clear(args: { node: string; name: string }): void {
    const bitmap = usable(this.#require(args));
    bitmap.holds = [];
    bitmap.isChanged = true;
  }

  setRecording(args: { node: string; name: string }, isRecording: boolean): void {
    const bitmap = usable(this.#require(args));
    if (bitmap.isRecording === isRecording) return;
    bitmap.isRecording = isRecording;
    bitmap.isChanged = true;
  }

  merge(args: {
    node: string;
    target: string;
    bitmaps: readonly (string | { node: string; name: string })[];
  }): void {
    const { node } = args;
    const target = this.#require({ node, name: args.target });
    const holds = new Map(target.holds.map((held) => [keyOf(held), held]));
    for (const source of args.bitmaps) {
      const found = usable(this.#require(typeof source === "string" ? { node, name: source } : source));
      const sizeBytes = this.#sizeOf(target);
      if (this.#sizeOf(found) !== sizeBytes) {
        throw genericError(
          `Bitmaps are of different sizes (destination size is ${sizeBytes}) and can't be merged`,
        );
      }
      for (const held of found.holds) holds.set(keyOf(held), held);
    }
    usable(target);
    if (holds.size === target.holds.length) return;
    target.holds = [...holds.values()];
    target.isChanged = true;
  }

  remove(args: { node: string; name: string }): void {
    const bitmap = this.#require(args);
    refuseBusy(bitmap);
    // Until the transaction is over it is there, as in QEMU, and nobody's.
    bitmap.isBusy = true;
    bitmap.isRemoved = true;
    bitmap.isChanged = true;
  }

  /** A backup gets it, by the rules of QEMU's do_backup_common (blockdev.c). */
  use(
    disk: DiskInfo,
    { name, mode, sync }: { name: string; mode: BitmapMode | undefined; sync: string },
  ): BitmapUse {
    const bitmap = disk.tracking === undefined ? undefined : this.#find(disk, name);
    if (bitmap === undefined) throw genericError(`Bitmap '${name}' could not be found`);
    const isBasis = sync === "incremental" || sync === "bitmap";
    const use = sync === "incremental" ? "on-success" : mode;
    if (use === undefined) throw genericError("Bitmap sync mode must be given when providing a bitmap");
    usable(bitmap);
    if (sync === "none") {
      throw genericError(`sync mode '${sync}' does not produce meaningful bitmap outputs`);
    }
    if (use === "never" && !isBasis) {
      throw genericError(
        `Bitmap sync mode '${use}' has no meaningful effect when combined with sync mode '${sync}'`,
      );
    }
    if (bitmap.holds.some((held) => held.disk !== disk.name)) {
      throw notSupported("A backup by a bitmap of another node that is merged in the same transaction");
    }
    bitmap.isBusy = true;
    const holds = bitmap.holds.map((held) => held.name);
    return { name, mode: use, holds, isBasis, isRecording: bitmap.isRecording };
  }

  /** @throws QmpError GenericError in QEMU's words where there is no such node or bitmap. */
  #require({ node, name }: { node: string; name: string }): Bitmap {
    // QEMU finds a bitmap's node by another way than a new one's, and says so.
    const disk = this.#disks.find((candidate) => candidate.name === node);
    if (disk === undefined) throw genericError(`Node '${node}' not found`);
    const bitmap = this.#find(disk, name);
    if (bitmap === undefined) throw genericError(`Dirty bitmap '${name}' not found`);
    return bitmap;
  }

  #find(disk: DiskInfo, name: string): Bitmap | undefined {
    const key = keyOf({ disk: disk.name, name });
    const known = this.#bitmaps.get(key) ?? this.#existing(disk, name);
    if (known !== undefined) this.#bitmaps.set(key, known);
    return known;
  }

  #existing({ name: disk, tracking }: DiskInfo, name: string): Bitmap | undefined {
    const checkpoint = tracking?.checkpoints.find((candidate) => candidate.name === name);
    const isInconsistent = checkpoint === undefined && tracking?.lostCheckpoints.includes(name) === true;
    if (checkpoint === undefined && !isInconsistent) return undefined;
    const isBusy = this.#jobs.some(
      (job) => job.disk === disk && !isOver(job.status) && job.options.bitmapUse?.name === name,
    );
    return {
      disk,
      name,
      holds: [{ disk, name }],
      isRecording: checkpoint?.isStopped === false,
      isBusy,
      isInconsistent,
      isChanged: false,
      isRemoved: false,
    };
  }

  #sizeOf({ disk }: Bitmap): number | undefined {
    return this.#disks.find(({ name }) => name === disk)?.sizeBytes;
  }

  #trackedDisk(node: string): TrackedDisk {
    const disk = this.#disks.find(({ name }) => name === node);
    if (disk === undefined) throw genericError(`Cannot find device='${node}' nor node-name='${node}'`);
    const { tracking } = disk;
    if (tracking === undefined) throw genericError(`The changes of '${node}' are not tracked`);
    if (tracking.state === "failed") throw genericError(`The changes of '${node}' are not tracked any more`);
    return { ...disk, tracking };
  }
}

function keyOf({ disk, name }: BitmapName): string {
  return `${disk}\0${name}`;
}

/** QEMU's bdrv_dirty_bitmap_check, as far as there is something to check here. */
function usable(bitmap: Bitmap): Bitmap {
  refuseBusy(bitmap);
  if (bitmap.isInconsistent) throw genericError(`Bitmap '${bitmap.name}' is inconsistent and cannot be used`);
  return bitmap;
}

function refuseBusy({ name, isBusy }: Bitmap): void {
  if (isBusy) {
    throw genericError(`Bitmap '${name}' is currently in use by another operation and cannot be used`);
  }
}

function checkGranularity(granularity: number, granularityBytes: number): void {
  const isPower = Number.isInteger(Math.log2(granularity));
  if (granularity < MIN_GRANULARITY_BYTES || !isPower) {
    throw genericError(`Granularity must be power of 2 and at least ${MIN_GRANULARITY_BYTES}`);
  }
  if (granularity !== granularityBytes) {
    throw notSupported(`A granularity of ${granularity} (changes are tracked by ${granularityBytes})`);
  }
}
