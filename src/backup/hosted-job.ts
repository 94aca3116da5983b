// What LiveHost needs of a job besides what everybody sees of it: its start with others at one T0, and its end.

import type { DiskNode } from "../cow/disk-node.js";
import type { BufferStore } from "./buffer-store.js";
import type { CopyThreads } from "./copy-threads.js";
import type { BackupJob, JobStatus } from "./host.js";
import type { JobOptions } from "./options.js";
import type { SnapshotPublisher } from "./snapshot.js";
import type { TableStore } from "./table-store.js";

export interface HostedJobParts {
  id: string;
  node: DiskNode;
  options: JobOptions;
  buffers: BufferStore;
  tables: TableStore;
  threads: CopyThreads;
  /** Undefined where nothing could offer a T0 view. */
  publisher?: SnapshotPublisher | undefined;
  /** Called synchronously at each change of status. */
  onStatus(job: BackupJob, status: JobStatus): void;
}

export interface HostedJob extends BackupJob {
  /** Fulfilled when the job is concluded and everything of it is cleaned up. */
  readonly concluded: Promise<void>;
  /** @throws CowcatcherError what has failed since the job was prepared. */
  checkReady(): void;
  /** The step at T0: synchronous, with no guest write in flight. */
  start(): void;
  /** Before T0, or when start() has thrown: the group does not start. */
  abandon(): Promise<void>;
  /** Forgets the job: only JobHost.dismiss. */
  dismiss(): void;
  /** The process ends now: what must not stay behind goes. */
  abortSync(): void;
}
