// Jobs as the control socket and the command line see them. The engine implements JobHost; neither side knows
// more of the other than this.

import type { CowcatcherError } from "../errors.js";
import type { ImageFormat } from "../block/format.js";
import type { JobOptions } from "./options.js";
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
  /** While the job offers one. */
  readonly snapshot?: SnapshotInfo | undefined;
  progress(): JobProgress;
  /**
   * Returns at once; the guest's writes go through from this moment on. No effect on a job that has ended.
   * @param cause why, where nobody asked for it
   */
  cancel(cause?: CowcatcherError): void;
  pause(): void;
  resume(): void;
  setSpeed(bytesPerSecond: number): void;
}

export interface BackupRequest {
  id: string;
  disk: string;
  options: JobOptions;
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
   * are listed as `created`; when one of them is cancelled then, all are.
   * @throws CowcatcherError: NOT_FOUND (disk), BUSY (disk or id in use), EXISTS, IO, CANCELLED, … Nothing is left behind
   *   then, but for what a hanging system call has yet to yield: that goes when it returns.
   */
  startBackups(requests: readonly BackupRequest[]): Promise<readonly BackupJob[]>;
  /** Forgets a concluded job. */
  dismiss(id: string): void;
  /** Calls `listener` at each change, synchronously. Returns the function that ends it. */
  onStatus(listener: JobStatusListener): () => void;
  /** Ends the process in good order, as SIGTERM does. */
  quit(): void;
}
