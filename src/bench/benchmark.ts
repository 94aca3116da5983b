// The benchmark behind `cowcatcher bench`: what a guest's writes cost with no backup, an unbuffered and a buffered one.
//
//   make the disk ─► for each phase: serve ─► the guest writes ─► T0 ─► the runtime, measured ─► the backup's end ─► it stops
//                                            └──lead──┘                                              └──lead──┘
//
// Each phase has a server of its own, so that none finds what another left in memory, and its own T0. The guest writes
// all the time, so that its timeline shows it before, during and after the backup, which goes on to its end after the
// runtime, at most `backupTimeoutMs`; what is measured is the runtime alone. Guest and server are two processes, as in
// life: the guest (guest.ts) has this one, where nothing else happens while it writes but a
// question for progress now and then.
//
// Everything lies in one new folder, sockets in a second one under the temporary folder (their paths are short by
// law); a target of the user's choice is removed when its phase is over, if a phase made it. `cancel` makes `run`
// reject after all is removed; `abortSync` is for a process that ends at once.

import type { ChildProcess } from "node:child_process";
import { mkdtempSync, rmSync, statSync } from "node:fs";
import { statfs } from "node:fs/promises";
import { tmpdir } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import { join } from "node:path";
import type { OnBufferFull } from "../cow/policies.js";
import type { JobProgress } from "../backup/progress.js";
import { listJobs, startBackup, watchJob } from "../control/jobs-from-qmp.js";
import { CowcatcherError, ioError } from "../errors.js";
import type { ImageFormat } from "../block/format.js";
import { formatBytes } from "../units.js";
import { makeDisk } from "./disk.js";
import { BenchGuest, type GuestFigures } from "./guest.js";
import { BenchServer } from "./server.js";
import type { TimelineFigures } from "./timeline.js";

export interface BenchSettings {
  /** Where disk, target and spill stand. */
  dir: string;
  sizeBytes: number;
  format: ImageFormat;
  /** Undefined: a file beside the disk. */
  target: string | undefined;
  targetFormat: ImageFormat;
  /** The target may be there already: a device or an export. Never true for a file. */
  force: boolean;
  /** Bytes a second to the target; 0: no limit. */
  rateLimitBytes: number;
  /** Of the buffered phase. */
  cowBufferSizeBytes: number;
  onBufferFull: OnBufferFull;
  blockBytes: number;
  ioDepth: number;
  runtimeMs: number;
  backupTimeoutMs: number;
  direct: boolean;
}

export const PHASES = ["no backup", "unbuffered", "buffered"] as const;
export type PhaseName = (typeof PHASES)[number];

export interface BackupFigures {
  bufferBytes: number;
  /** False: it was cancelled, because it took longer than the guest and `backupTimeoutMs`. */
  isComplete: boolean;
  /** It ended while the guest was still writing, which therefore felt it for a part of its time only. */
  endedBeforeGuest: boolean;
  progress: JobProgress;
}

export interface PhaseResult {
  name: PhaseName;
  guest: GuestFigures;
  backup: BackupFigures | undefined;
  timeline: TimelineFigures;
}

const DISK = "disk";
const JOB = "bench";
/** What the timeline shows before T0 and after the backup: this part of the runtime, and no more than so long. */
const LEAD_FRACTION = 0.2;
const LEAD_MS_MAX = 1000;

/**
 * Three phases on a test disk: no backup, an unbuffered one, a buffered one. Removes what it made, whatever
 * ends it. Main thread.
 */
export class Benchmark {
  readonly #settings: BenchSettings;
  readonly #onStep: (step: string) => void;
  #cancelled: CowcatcherError | undefined;
  #onCancel: ((error: CowcatcherError) => void) | undefined;
  readonly #folders: string[] = [];
  #child: ChildProcess | undefined;

  /** @param onStep told what begins, in a few words. */
  constructor(settings: BenchSettings, onStep: (step: string) => void) {
    this.#settings = settings;
    this.#onStep = onStep;
  }

  /** Once. @throws CowcatcherError; whatever happens, nothing that it made is left. */
  async run(): Promise<PhaseResult[]> {
    const { dir, sizeBytes, format } = this.#settings;
    const results: PhaseResult[] = [];
    try {
      await this.#checkSpace();
      const folder = this.#makeFolder(dir);
      const sockets = this.#makeFolder(tmpdir());
      const disk = join(folder, `disk.${format}`);
      this.#onStep(`making a ${format} disk of ${formatBytes(sizeBytes)}`);
      await makeDisk({ path: disk, sizeBytes, format, check: () => this.#check() });
      for (const name of PHASES) {
        this.#check();
        this.#onStep(name);
        results.push(await this.#phase(name, disk, folder, sockets));
      }
      return results;
    } finally {
      this.#removeFolders();
    }
  }

  /** Makes `run` reject with `error`, once everything is removed. */
  cancel(error: CowcatcherError): void {
    this.#cancelled ??= error;
    this.#onCancel?.(error);
  }

  /** For a process that ends at once. The server removes its unfinished target, at its second SIGTERM at once. */
  abortSync(): void {
    this.#child?.kill("SIGTERM");
    this.#removeFolders();
  }

  #check(): void {
    if (this.#cancelled !== undefined) throw this.#cancelled;
  }

  #makeFolder(parent: string): string {
    try {
      const folder = mkdtempSync(join(parent, "cowcatcher-bench-"));
      this.#folders.push(folder);
      return folder;
    } catch (cause) {
      throw ioError("make a folder", parent, cause);
    }
  }

  #removeFolders(): void {
    for (const folder of this.#folders.splice(0)) rmSync(folder, { recursive: true, force: true });
  }

  /** Better said now than after a minute of writing. What the spill takes is not foreseen. */
  async #checkSpace(): Promise<void> {
    const { dir, sizeBytes, target } = this.#settings;
    const neededBytes = sizeBytes * (target === undefined ? 2 : 1);
    let freeBytes: number;
    try {
      const { bavail, bsize } = await statfs(dir);
      freeBytes = bavail * bsize;
    } catch (cause) {
      throw ioError("look for free space", dir, cause);
    }
    if (freeBytes >= neededBytes) return;
    throw new CowcatcherError({
      code: "NO_SPACE",
      object: dir,
      problem: `${formatBytes(freeBytes)} are free, and ${formatBytes(neededBytes)} are needed`,
      hint: "choose a smaller --size, or another place with --dir",
    });
  }

  async #phase(name: PhaseName, disk: string, folder: string, sockets: string): Promise<PhaseResult> {
    const { format, direct, blockBytes, ioDepth, runtimeMs } = this.#settings;
    const socketPath = join(sockets, "nbd");
    const args = [
      disk,
      "--name",
      DISK,
      "-f",
      format,
      "--socket",
      socketPath,
      // What it measures is a backup's cost; and a folder beside the disk would stay behind.
      "--tracking",
      "off",
      ...(direct ? ["--direct"] : []),
    ];
    const server = await BenchServer.start({ args, control: join(sockets, "control") }, (child) => {
      this.#child = child;
    });
    let guest: BenchGuest | undefined;
    const cancelled = new Promise<never>((_, reject) => {
      this.#onCancel = reject;
    });
    cancelled.catch(() => undefined);
    try {
      this.#check();
      guest = await BenchGuest.connect({ socketPath, exportName: DISK, blockBytes, ioDepth });
      const leadMs = Math.min(runtimeMs * LEAD_FRACTION, LEAD_MS_MAX);
      const timeline = guest.start();
      await Promise.race([delay(leadMs), cancelled]);
      const backup = name === "no backup" ? undefined : await this.#startBackup(name, server, folder);
      if (backup !== undefined) timeline.markT0(performance.now());
      void backup?.over.then(() => timeline.markEnd(performance.now()));
      const measuring = guest.measure(runtimeMs);
      measuring.catch(() => undefined);
      const figures = await Promise.race([measuring, cancelled, ...(backup ? [backup.failed] : [])]);
      const backupFigures = await Promise.race([backup?.end(), cancelled]);
      await Promise.race([delay(leadMs), cancelled]);
      await Promise.race([guest.stop(), cancelled]);
      return { name, guest: figures, backup: backupFigures, timeline: timeline.figures(performance.now()) };
    } finally {
      this.#onCancel = undefined;
      guest?.close();
      await server.stop();
      this.#child = undefined;
      this.#removeTarget(folder);
    }
  }

  /** Resolves after T0. */
  async #startBackup(
    name: PhaseName,
    server: BenchServer,
    folder: string,
  ): Promise<{ failed: Promise<never>; over: Promise<void>; end(): Promise<BackupFigures> }> {
    const { control } = server;
    const { targetFormat, force, rateLimitBytes, onBufferFull, direct, backupTimeoutMs } = this.#settings;
    const bufferBytes = name === "buffered" ? this.#settings.cowBufferSizeBytes : 0;
    const options = {
      ...{ target: this.#target(folder), targetFormat, force, rateLimitBytes, direct, onBufferFull },
      cowBufferSizeBytes: bufferBytes,
      ...(bufferBytes > 0 && onBufferFull === "spill" && { spillDir: folder }),
    };
    await startBackup(control, [{ id: JOB, disk: DISK, options }]);
    let hasEnded = false;
    const watched = watchJob(control, JOB, () => undefined).then((result) => {
      hasEnded = true;
      if (result.error !== undefined) throw result.error;
      return result.progress;
    });
    // A backup that fails while the guest writes ends the phase; one that succeeds says so in `end`.
    const failed = new Promise<never>((_, reject) => {
      watched.catch(reject);
    });
    failed.catch(() => undefined);
    const over = watched.then(
      () => undefined,
      () => undefined,
    );
    const end = async (): Promise<BackupFigures> => {
      const endedBeforeGuest = hasEnded;
      const progress = await withinTime(watched, backupTimeoutMs);
      if (progress !== undefined) return { bufferBytes, isComplete: true, endedBeforeGuest, progress };
      const [job] = await listJobs(control);
      // It may end, or fail, just now.
      await control.execute("job-cancel", { id: JOB }).catch(() => undefined);
      const last = await watched.catch((error: unknown) => {
        if (job !== undefined && error instanceof CowcatcherError && error.code === "CANCELLED")
          return undefined;
        throw error;
      });
      const final = last ?? job?.progress;
      if (final === undefined)
        throw new CowcatcherError({ code: "INTERNAL", object: JOB, problem: "is lost" });
      return { bufferBytes, isComplete: last !== undefined, endedBeforeGuest, progress: final };
    };
    return { failed, over, end };
  }

  #target(folder: string): string {
    return this.#settings.target ?? join(folder, `target.${this.#settings.targetFormat}`);
  }

  /** So that the next phase may make it again. `force` is for what was there before, and stays. */
  #removeTarget(folder: string): void {
    const target = this.#target(folder);
    if (this.#settings.force || statSync(target, { throwIfNoEntry: false })?.isFile() !== true) return;
    rmSync(target, { force: true });
  }
}

/** Undefined if `promise` takes longer. */
async function withinTime<T>(promise: Promise<T>, ms: number): Promise<T | undefined> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => resolve(undefined), ms);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
