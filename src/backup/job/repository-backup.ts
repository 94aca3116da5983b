// A backup of images that no one writes into a repository: one disk after another, and the manifest after the last.
// Main thread.

import type { Image } from "../../block/device.js";
import type { ImageFormat } from "../../block/format.js";
import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import { DirtyBlocks } from "../../repository/backup/dirty-blocks.js";
import type { PatchingDescription } from "../../repository/backup/disk-chunks.js";
import { BackupSession, type SessionDisk, takeable } from "../../repository/backup/session.js";
import type { BackupLevel } from "../../repository/format/manifest.js";
import type { KeySource } from "../../repository/format/keys.js";
import { Repository } from "../../repository/repository.js";
import { RepositoryTarget } from "../../target/repository/target.js";
import type { DirtyRuns } from "../copy/incremental.js";
import type { JobOptions, LevelChoice } from "../options.js";
import { type JobProgress, NO_PROGRESS } from "../progress.js";
import { type MadeTarget, type OfflineCopy, startOfflineCopy } from "./offline.js";

export interface RepositorySource {
  path: string;
  /** The disk's name in the backup. */
  disk: string;
  format: ImageFormat | undefined;
  snapshot?: string | undefined;
}

export interface RepositoryBackupRequest {
  repository: string;
  key: () => Promise<KeySource | undefined>;
  group: string;
  level: LevelChoice;
  sources: readonly RepositorySource[];
  /** Its target is not looked at. */
  job: Omit<JobOptions, "target" | "targetFormat">;
  vmConfig?: string | undefined;
  tool: string;
  isCancelled: () => boolean;
  /** @param t0 the backup's time */
  onStarted: (disk: string, totalBytes: number, t0: string) => void;
  /** When the source is open, before anything is read of it. */
  onOpened?: ((image: Image) => Promise<void>) | undefined;
  onProgress: (disk: string, progress: JobProgress) => void;
  onEnded: (disk: string, progress: JobProgress, error: CowcatcherError | undefined) => void;
}

export interface DiskResult {
  disk: string;
  sizeBytes: number;
  progress: JobProgress;
  newChunks: number;
  newBytes: number;
  readBytes: number;
}

export interface RepositoryBackupResult {
  group: string;
  time: string;
  level: BackupLevel;
  reason: string;
  /** What the clock said at T0, where that was before the group's last backup. */
  clockBehind: string | undefined;
  disks: DiskResult[];
}

const UPDATE_MS = 200;

export class RepositoryBackup {
  readonly #request: RepositoryBackupRequest;
  #copy: OfflineCopy | undefined;
  #cancelled: CowcatcherError | undefined;
  #level: { level: BackupLevel; reason: string } = { level: "full", reason: "" };

  constructor(request: RepositoryBackupRequest) {
    this.#request = request;
  }

  /** Ends it with this error, if it is not done yet. */
  cancel(error: CowcatcherError): void {
    this.#cancelled ??= error;
    this.#copy?.cancel(error);
  }

  /** @throws CowcatcherError the first cause; the repository has no such backup then. */
  async run(): Promise<RepositoryBackupResult> {
    const { repository: address, key, group, sources, vmConfig, tool } = this.#request;
    const repository = await Repository.open(address, key);
    try {
      const session = await BackupSession.begin(repository, {
        group,
        diskCount: sources.length,
        totalBytes: 0,
        vmConfig,
        tool,
      });
      const disks: DiskResult[] = [];
      try {
        // T0 is before the first byte is read, and the same for all disks.
        session.started();
        for (const source of sources) disks.push(await this.#copyDisk(session, source));
      } catch (error) {
        await session.abort(toCowcatcherError(error, group));
        throw error;
      }
      return { ...session.backup, ...this.#level, clockBehind: session.clockBehind, disks };
    } finally {
      repository.close();
    }
  }

  async #copyDisk(session: BackupSession, source: RepositorySource): Promise<DiskResult> {
    const { job, key, isCancelled, onStarted, onOpened, onProgress, onEnded } = this.#request;
    if (this.#cancelled !== undefined) throw this.#cancelled;
    let disk: SessionDisk | undefined;
    const copy = await startOfflineCopy({
      source: source.path,
      sourceFormat: source.format,
      snapshot: source.snapshot,
      job: { ...job, target: session.repository.name, targetFormat: "raw" },
      isCancelled,
      repositoryKey: key,
      makeTarget: (image, runs) => {
        disk = session.addDisk(source.disk, image.sizeBytes, image.format);
        return this.#target(session, disk, image, runs);
      },
      onStarted: (totalBytes) => onStarted(source.disk, totalBytes, session.backup.time),
      onOpened,
      onStopped: (error) => this.cancel(error),
    });
    this.#copy = copy;
    if (this.#cancelled !== undefined) copy.cancel(this.#cancelled);
    const timer = setInterval(() => onProgress(source.disk, copy.progress()), UPDATE_MS);
    let failure: CowcatcherError | undefined;
    try {
      await copy.ended;
    } catch (error) {
      failure = toCowcatcherError(error, source.disk);
      throw failure;
    } finally {
      clearInterval(timer);
      onProgress(source.disk, copy.progress());
      onEnded(source.disk, copy.progress(), failure);
    }
    const counts = disk?.counts ?? { newChunks: 0, newBytes: 0, readBytes: 0 };
    const progress = { ...NO_PROGRESS, ...copy.progress() };
    return { disk: source.disk, sizeBytes: copy.totalBytes, progress, ...counts };
  }

  #target(session: BackupSession, disk: SessionDisk, image: Image, runs: DirtyRuns | undefined): MadeTarget {
    const target = new RepositoryTarget(disk);
    const decided = decideLevel(this.#request.level, session, disk, image, runs);
    session.setLevel(decided.level, decided.reason);
    if (this.#level.reason === "" || decided.level === "full") this.#level = decided;
    return { target, dirty: decided.dirty };
  }
}

interface Decision {
  level: BackupLevel;
  reason: string;
  dirty: DirtyRuns | undefined;
}

/** @throws CowcatcherError BASIS where an incremental backup is asked for and cannot be made. */
export function decideLevel(
  choice: LevelChoice,
  session: BackupSession,
  disk: SessionDisk,
  { sizeBytes }: Pick<Image, "sizeBytes">,
  runs: DirtyRuns | undefined,
): Decision {
  const full = (reason: string): Decision => {
    if (choice === "incremental") throw notIncremental(disk.name, reason);
    return { level: "full", reason, dirty: undefined };
  };
  if (choice === "full") return full("as asked");
  if (runs === undefined) return full("nothing says what has changed on the disk");
  const basis = basisOf(session, disk);
  if ("why" in basis) return full(basis.why);
  disk.takeOver(basis.index);
  return {
    level: "incremental",
    reason: `what has changed since ${basis.time}`,
    dirty: byChunks(runs, basis.isThere, { ...disk, sizeBytes }),
  };
}

/** What the disk can take over of the group's last backup, of that time; or why nothing. */
export function basisOf(
  session: BackupSession,
  disk: SessionDisk,
): (NonNullable<ReturnType<typeof takeable>> & { time: string }) | { why: string } {
  if (session.parent === null) return { why: "the group has no backup yet that can be read" };
  const found = takeable(session, disk);
  if (found === undefined) return { why: "the last backup has no disk of this name and size" };
  return { ...found, time: session.parent.manifest.time };
}

export const AUTO_HINT = "give --level auto for a full backup, which stores only what is new";

export function notIncremental(object: string, reason: string): CowcatcherError {
  const problem = `cannot be backed up incrementally: ${reason}`;
  return new CowcatcherError({ code: "NO_BASIS", object, problem, hint: AUTO_HINT });
}

export interface ChunkedDisk {
  chunkBytes: number;
  sizeBytes: number;
  patching: Pick<PatchingDescription, "dirty"> | null;
}

/**
 * A chunk is dirty if a byte of it is, or if the store has lost it: then the disk heals it. Which of a chunk's blocks are
 * dirty is noted for those who store it.
 */
export function byChunks(
  runs: DirtyRuns,
  isThere: (chunk: number) => boolean,
  { chunkBytes, sizeBytes, patching }: ChunkedDisk,
): DirtyRuns {
  const blocks = patching === null ? undefined : new DirtyBlocks(patching.dirty, chunkBytes);
  blocks?.setKnown();
  const isDirty = (chunk: number): boolean => {
    const start = chunk * chunkBytes;
    const end = Math.min(start + chunkBytes, sizeBytes);
    if (!isThere(chunk)) {
      // All of it is stored anew.
      blocks?.note(start, end - start);
      return true;
    }
    let dirty = false;
    for (let at = start; at < end;) {
      const run = runs(at, end - at);
      if (run.dirty) {
        dirty = true;
        if (blocks === undefined) break;
        blocks.note(at, run.lengthBytes);
      }
      at += run.lengthBytes;
    }
    return dirty;
  };
  return (offsetBytes, lengthBytes) => {
    const end = offsetBytes + lengthBytes;
    let chunk = Math.floor(offsetBytes / chunkBytes);
    const dirty = isDirty(chunk);
    do chunk++;
    while (chunk * chunkBytes < end && isDirty(chunk) === dirty);
    return { lengthBytes: Math.min(chunk * chunkBytes, end) - offsetBytes, dirty };
  };
}
