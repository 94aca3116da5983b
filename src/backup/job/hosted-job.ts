// What LiveHost and JobStart need of a job besides what everybody sees of it: its start with others at one T0, and its
// end.

import type { DiskNode } from "../../cow/disk-node.js";
import type { BitmapEnd } from "./bitmap-end.js";
import type { Completion } from "./completion.js";
import type { BufferStore } from "../memory/buffer-store.js";
import type { Target } from "../../target/target.js";
import type { CopyThreads } from "../copy/threads.js";
import type { StorageHand, StorageHands } from "../storage/protocol.js";
import type { BackupJob, JobStatus } from "../host.js";
import type { JobOptions } from "../options.js";
import type { RepositoryGroup } from "./repository-group.js";
import type { SnapshotPublisher } from "./snapshot.js";
import type { DiskTracker } from "../../tracking/tracker.js";
import type { TableStore } from "../memory/table-store.js";

export interface HostedJobParts {
  id: string;
  node: DiskNode;
  options: JobOptions;
  buffers: BufferStore;
  tables: TableStore;
  threads: CopyThreads;
  /** Undefined where the disk's changes are not tracked. */
  tracker?: DiskTracker | undefined;
  /** Of the checkpoints that this start and its companions make. */
  checkpointUuid?: string | undefined;
  /** Why it cannot go by a checkpoint, for reasons of its companions. */
  basisRefusal?: string | undefined;
  /** Undefined for a job that ends when it has copied everything. */
  completion?: Completion | undefined;
  /** Of the backup in a repository that the disk is one of. */
  group?: RepositoryGroup | undefined;
  /** Where storage that is not the guest's is dealt with; the target's is `hand`'s, null for `null:`. */
  hands: StorageHands;
  hand: StorageHand | null;
  /** Undefined where nothing could offer a T0 view. */
  publisher?: SnapshotPublisher | undefined;
  /** Aborted when the start is cancelled; never after T0. */
  signal: AbortSignal;
  /** Called when there is a target, long before the job is prepared. */
  onTarget(target: Pick<Target, "abort" | "abortSync">): void;
  /** Called synchronously at each change of status. */
  onStatus(job: BackupJob, status: JobStatus): void;
}

/** In the list of jobs: one from its T0 on, or what stands for it before. */
export interface ListedJob extends BackupJob {
  /** Fulfilled when the job is concluded and everything of it is cleaned up, or given up. */
  readonly concluded: Promise<void>;
  /** The dirty bitmap that nobody else may touch, from T0 to the end. */
  readonly bitmap?: BitmapEnd | undefined;
  /** Forgets the job: only JobHost.dismiss. */
  dismiss(): void;
  /** The process ends now: what must not stay behind goes. */
  abortSync(): void;
}

export interface HostedJob extends ListedJob {
  /** Shortly before T0: no other start of the disk comes in between. @throws CowcatcherError */
  beforeT0(): Promise<void>;
  /** @throws CowcatcherError what has failed since the job was prepared. */
  checkReady(): void;
  /**
   * The step at T0: synchronous, with no guest write in flight.
   * @param t0Ms the wall clock's time, the same for all that start together
   */
  start(t0Ms: number): void;
  /** Before T0, or when start() has thrown: the group does not start. */
  abandon(): Promise<void>;
}
