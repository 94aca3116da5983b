// Who keeps the old data of a domain's disk: QEMU, in a scratch file that libvirt has made in our run's folder. Main thread.
//
// What stands in the file cannot be let go before the end, as libvirt exports it read-only: it grows with each cluster that
// the guest overwrites for the first time, up to the disk's size. And where it cannot grow, QEMU (before 10.1, which libvirt
// does not ask for anything else) fails the guest's own write. So the file is watched: before it passes its limit, or
// its file system is nearly full, the backup ends.

import * as fs from "node:fs";
import { NO_BUFFER } from "../cow/slot-memory.js";
import type { JobOptions } from "../backup/options.js";
import type { JobProgress } from "../backup/progress.js";
import { CowcatcherError, ioError } from "../errors.js";
import type { Keeper } from "../qemu/keeper.js";
import { QEMU_CLUSTER_BYTES } from "../qemu/fleece-keeper.js";
import { formatBytes, MiB } from "../units.js";
import type { SizedDisk } from "./domain.js";

const STAT_BLOCK_BYTES = 512;
/** Left for others in the file system, and for what the guest writes between the last look and the job's end. */
export const FREE_BYTES_MIN = 64 * MiB;

/** What the keeper asks of the system; another one only in tests. */
export interface ScratchStorage {
  /** undefined: there is no such file. */
  usedBytes(path: string): number | undefined;
  freeBytes(folder: string): number;
}

export const SCRATCH_STORAGE: ScratchStorage = {
  usedBytes(path) {
    const found = fs.statSync(path, { throwIfNoEntry: false });
    return found && found.blocks * STAT_BLOCK_BYTES;
  },
  freeBytes(folder) {
    const { bavail, bsize } = fs.statfsSync(folder);
    return bavail * bsize;
  },
};

/** @throws CowcatcherError NO_SPACE where the guest would soon have no room to write to; IO */
export function checkRoom(folder: string, storage = SCRATCH_STORAGE): void {
  let freeBytes: number;
  try {
    freeBytes = storage.freeBytes(folder);
  } catch (error) {
    throw ioError("look for room", folder, error);
  }
  if (freeBytes >= FREE_BYTES_MIN) return;
  throw new CowcatcherError({
    code: "NO_SPACE",
    object: folder,
    problem: `has ${formatBytes(freeBytes)} free, and what the guest overwrites is to be kept there`,
    hint: `at least ${formatBytes(FREE_BYTES_MIN)} are needed; --fleece-dir names another folder`,
  });
}

export class ScratchKeeper implements Keeper {
  readonly parts = {
    slots: NO_BUFFER,
    bufferBytes: 0,
    hasForeignCaptures: true,
  };
  /** With a disk in an iothread QEMU must be the one that hangs up. */
  readonly source = { staysOpen: true };
  readonly path: string;
  readonly #disk: SizedDisk;
  readonly #folder: string;
  readonly #job: JobOptions;
  readonly #storage: ScratchStorage;
  #fail: (error: CowcatcherError) => void = () => undefined;
  #usedBytes = 0;
  /** What libvirt wrote into the new file, as its format wants. */
  #emptyBytes: number | undefined;

  constructor(
    { folder, path }: { folder: string; path: string },
    disk: SizedDisk,
    job: JobOptions,
    storage = SCRATCH_STORAGE,
  ) {
    this.#folder = folder;
    this.path = path;
    this.#disk = disk;
    this.#job = job;
    this.#storage = storage;
  }

  attach(_run: unknown, fail: (error: CowcatcherError) => void): void {
    this.#fail = fail;
  }

  look(): void {
    const usedBytes = this.#storage.usedBytes(this.path);
    // It goes with the job, whose end the readers meet.
    if (usedBytes === undefined) return;
    this.#emptyBytes ??= usedBytes;
    const growthBytes = Math.max(0, usedBytes - Math.max(this.#usedBytes, this.#emptyBytes));
    this.#usedBytes = usedBytes;
    const { cowBufferSizeBytes, onBufferFull, spillLimitBytes = this.#disk.node.sizeBytes } = this.#job;
    const limitBytes = cowBufferSizeBytes + (onBufferFull === "spill" ? spillLimitBytes : 0);
    // Growth until the next look is not seen: it is taken to be what it was since the last one.
    if (this.#keptBytes + growthBytes > limitBytes) this.#fail(this.#overLimit(limitBytes));
    else if (this.#storage.freeBytes(this.#folder) < FREE_BYTES_MIN / 2 + growthBytes)
      this.#fail(this.#noRoom());
  }

  get #keptBytes(): number {
    return Math.max(0, this.#usedBytes - (this.#emptyBytes ?? 0));
  }

  #overLimit(limitBytes: number): CowcatcherError {
    return new CowcatcherError({
      code: "BUFFER_FULL",
      object: this.#disk.name,
      problem: `the guest has overwritten more than the scratch file may hold (${formatBytes(limitBytes)})`,
      hint: "give a larger --cow-buffer-size or --spill-limit, or a faster target",
    });
  }

  #noRoom(): CowcatcherError {
    return new CowcatcherError({
      code: "BUFFER_FULL",
      object: this.#folder,
      problem: "is nearly full, and without room for old data the guest's writes would fail",
      hint: "give another --fleece-dir, or a faster target; the guest goes on",
    });
  }

  progress(): Partial<JobProgress> {
    const { cowBufferSizeBytes } = this.#job;
    const capturedBytes = this.#keptBytes;
    return {
      bufferBytesUsed: Math.min(capturedBytes, cowBufferSizeBytes),
      bufferBytesTotal: cowBufferSizeBytes,
      capturedBytes,
      captureCount: Math.ceil(capturedBytes / QEMU_CLUSTER_BYTES),
      spilledBytes: Math.max(0, capturedBytes - cowBufferSizeBytes),
    };
  }

  letGo(): void {
    // Nothing of the guest ever waits for this process.
  }

  explained(error: CowcatcherError): CowcatcherError {
    return error;
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}
