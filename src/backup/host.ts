// Jobs as the control socket and the command line see them. The engine implements JobHost; neither side knows
// more of the other than this.

import type { CowcatcherError } from "../errors.js";
import type { ImageFormat } from "../block/format.js";
import type { JobOptions } from "./options.js";
import type { GuestFreezer } from "./job/while-frozen.js";
import type { JobProgress } from "./progress.js";

/** QEMU's JobStatus (qapi/job.json). */
export type JobStatus =
  "created" | "running" | "paused" | "waiting" | "pending" | "aborting" | "concluded" | "null";

/** The T0 view of a job's disk, as an export. */
export interface SnapshotInfo {
  exportName: string;
  /** Set once it is lost: reading it fails from then on. A backup that has one besides goes on. */
  error: CowcatcherError | undefined;
}

/** Proxmox's words, but for the last two: what became of the changed-block tracking. */
export const BITMAP_ACTIONS = ["used", "new", "not-used", "invalid", "missing"] as const;
export type BitmapAction = (typeof BITMAP_ACTIONS)[number];

export interface BasisInfo {
  level: "full" | "incremental";
  bitmapAction: BitmapAction;
  /** Why it is a full one although less was asked for, or made no checkpoint. */
  reason?: string | undefined;
}

/** What a server remembers of a disk's changes. */
export interface TrackingInfo {
  mode: "host" | "process";
  state: "tracking" | "failed";
  granularityBytes: number;
  /** Extents that a host's crash would make count as changed. */
  hotExtents: number;
  /** How often a guest's write has waited for the activity log. */
  logWaits: number;
  /** Why earlier checkpoints are gone; null where none was lost. */
  lossReason: string | null;
  lostCheckpoints: readonly string[];
  checkpoints: readonly CheckpointInfo[];
}

export interface CheckpointInfo {
  name: string;
  /** The same for all disks of one backup. */
  uuid: string;
  createdMs: number;
  /** Its bits are those that it has: a disabled bitmap of QEMU's. */
  isStopped: boolean;
}

/** A dirty bitmap as QEMU shows one (BlockDirtyInfo). */
export interface BitmapInfo {
  /** Undefined for what a busy one will get besides when its job is over. */
  name: string | undefined;
  dirtyBytes: number;
  isRecording: boolean;
  isBusy: boolean;
  /** It was lost, and can only be removed. */
  isInconsistent: boolean;
}

/** Of a job whose disk is one of a backup in a repository. */
export interface RepositoryOutcome {
  address: string;
  group: string;
  /** The disk's name there. */
  disk: string;
  /** T0, which is the backup's name; undefined before it. */
  time: string | undefined;
  /** What the clock said at T0, where that was before the group's last backup. */
  clockBehind?: string | undefined;
  newChunks: number;
  newBytes: number;
  readBytes: number;
}

export interface BackupJob {
  readonly id: string;
  /** The node name of the disk. */
  readonly disk: string;
  readonly options: JobOptions;
  readonly status: JobStatus;
  /** Set once the job has failed or was cancelled (code CANCELLED); the first cause. */
  readonly error: CowcatcherError | undefined;
  /** Current limit in bytes a second; 0 is none. */
  readonly speed: number;
  /** The instant that the backup shows, in milliseconds since 1970 UTC; undefined before it. */
  readonly t0Ms?: number | undefined;
  /** How much is copied, and why; undefined before that is known. */
  readonly basis?: BasisInfo | undefined;
  readonly repository?: RepositoryOutcome | undefined;
  /** While the job offers one. */
  readonly snapshot?: SnapshotInfo | undefined;
  progress(): JobProgress;
  /**
   * Returns at once; the guest's writes go through from this moment on. No effect on a job that has ended.
   * @param cause why, where nobody asked for it
   */
  cancel(cause?: CowcatcherError): void;
  /** Lets one that is pending, and those that are to complete with it, come to its end. */
  finalize?(): void;
  pause(): void;
  resume(): void;
  setSpeed(bytesPerSecond: number): void;
}

export interface BackupRequest {
  id: string;
  disk: string;
  options: JobOptions;
  /** It completes with all others of its start that say so, or not at all. */
  isGrouped?: boolean | undefined;
}

export interface DiskInfo {
  /** Node name, which is also the export's name. */
  name: string;
  path: string;
  format: ImageFormat;
  sizeBytes: number;
  readOnly: boolean;
  /** Backups of it that were asked for since the server began. */
  jobCount?: number | undefined;
  /** Undefined where the disk's changes are not tracked. */
  tracking?: TrackingInfo | undefined;
}

export interface BitmapName {
  disk: string;
  name: string;
}

/** What becomes of a dirty bitmap at the T0 of a start, without a backup. */
export interface MarkRequest extends BitmapName {
  /** It has what these bitmaps have at T0; none: nothing, as a new or cleared one. */
  holds: readonly BitmapName[];
  isRecording: boolean;
  isRemoved?: boolean | undefined;
}

/** It has ended, one way or the other. */
export function isOver(status: JobStatus): boolean {
  return status === "concluded" || status === "null";
}

export type JobStatusListener = (job: BackupJob, status: JobStatus) => void;

export interface JobHost {
  disks(): readonly DiskInfo[];
  /** What the disk's image and what it builds on take of their storage, in bytes; undefined where that is unknown. */
  allocatedBytes?(disk: string): Promise<number | undefined>;
  /** Jobs that have not been dismissed, oldest first. */
  jobs(): readonly BackupJob[];
  /**
   * Starts all at one T0, or none. Resolves after T0; a job that fails later says so by its status. Before T0 the jobs
   * are listed as `created`; when one of them is cancelled then, all are. A freezer has the guest hold still for T0.
   * @throws CowcatcherError: NOT_FOUND (disk), BUSY (disk or id in use), EXISTS, IO, CANCELLED, … Nothing is left behind
   *   then, but for what a hanging system call has yet to yield: that goes when it returns.
   */
  startBackups(
    requests: readonly BackupRequest[],
    marks?: readonly MarkRequest[],
    freezer?: GuestFreezer,
  ): Promise<readonly BackupJob[]>;
  /** Forgets a concluded job. */
  dismiss(id: string): void;
  /** How much has changed since the disk's checkpoint, in bytes. @throws CowcatcherError NOT_FOUND, IO */
  changedBytes(disk: string, checkpoint: string): Promise<number>;
  /** The disk's dirty bitmaps; none where its changes are not tracked. @throws CowcatcherError IO */
  bitmaps(disk: string): Promise<readonly BitmapInfo[]>;
  /** Of one disk, or of all that have it. @throws CowcatcherError NO_BASIS where none has it; NOT_FOUND (disk), IO */
  deleteCheckpoint(name: string, disk?: string): Promise<void>;
  /** Calls `listener` at each change, synchronously. Returns the function that ends it. */
  onStatus(listener: JobStatusListener): () => void;
  /** Ends the process in good order, as SIGTERM does. */
  quit(): void;
}
