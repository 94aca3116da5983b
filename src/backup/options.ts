// What a backup job is asked to do, with the defaults and their reasons, in one place for the command line,
// the control socket and the engine.

import { availableParallelism } from "node:os";
import type { ImageFormat } from "../block/format.js";
import type { Compression } from "../image/qcow2/format/compression.js";
import { KiB, MiB } from "../units.js";
import type { OnBufferFull, OnCbwError, OnIoError } from "../cow/policies.js";

/**
 * `top`: without what the image's backing chain provides (top-layer.ts). `none`: nothing is copied; the job only keeps
 * the disk's T0 view readable (snapshot-job.ts).
 */
export const SYNC_MODES = ["full", "top", "none"] as const;
export type SyncMode = (typeof SYNC_MODES)[number];

/** Of a backup into a repository: how much of the disk is read (repository/backup/). */
export const BACKUP_LEVELS = ["auto", "full", "incremental"] as const;
export type LevelChoice = (typeof BACKUP_LEVELS)[number];

/** QEMU's BitmapSyncMode (qapi/block-core.json): when a backup by a dirty bitmap takes what it copied out of it. */
export const BITMAP_MODES = ["on-success", "never", "always"] as const;
export type BitmapMode = (typeof BITMAP_MODES)[number];

/** A dirty bitmap of the tracking that a live backup goes by, or keeps up to date; it is nobody else's meanwhile. */
export interface BitmapUse {
  name: string;
  mode: BitmapMode;
  /** The bitmaps whose bits it has at T0: itself, but for what the same start does to it. */
  holds: readonly string[];
  /** Just what it has is copied; else what the sync mode says. */
  isBasis: boolean;
  /** It is not disabled, and records from T0 on, too. */
  isRecording: boolean;
}

/** Which disk of which backup in a repository, and how it is opened. */
export interface RepositoryPlace {
  /** An absolute path, or s3:… */
  address: string;
  group: string;
  /** The disk's name in the backup. */
  disk: string;
  level: LevelChoice;
  /** Absolute paths of what opens an encrypted one; without either, the environment of the process that writes. */
  keyFile?: string | undefined;
  passphraseFile?: string | undefined;
  vmConfig?: string | undefined;
  /** Name and version of what made the backup. */
  tool: string;
}

export interface JobOptions {
  /** Final path of the target, or "null:"; of a repository its name for people. */
  target: string;
  /** Live: the target is a disk of a backup there. All that have this place's group and start together are one backup. */
  repository?: RepositoryPlace | undefined;
  targetFormat: ImageFormat;
  force: boolean;
  clusterSizeBytes: number;
  backingFile?: string | undefined;
  backingFormat?: ImageFormat | undefined;
  /** Of a qcow2 target's clusters; undefined: none. */
  compression?: Compression | undefined;
  workerCount: number;
  /** Incremental: only what this dirty bitmap, of the image or of QEMU's export, calls dirty is copied. */
  bitmap?: string | undefined;
  /** Live: when the backup is good, its T0 is remembered under this name. */
  checkpoint?: string | undefined;
  /** Live: only what changed since the checkpoint of this name is copied. */
  since?: string | undefined;
  /** Where there is no such checkpoint, or it cannot be relied on, all is copied. */
  sinceOrFull?: boolean | undefined;
  /** Live: by QEMU's rules rather than those of `since` and `checkpoint`. */
  bitmapUse?: BitmapUse | undefined;
  /** Live: false has the copied job wait, pending, until it is told to finalize. */
  autoFinalize?: boolean | undefined;
  /** 0: no buffer; a guest write waits until the target has the old data. */
  cowBufferSizeBytes: number;
  onBufferFull: OnBufferFull;
  spillDir?: string | undefined;
  /** Undefined: no more than the source's size. */
  spillLimitBytes?: number | undefined;
  guestTimeoutMs: number;
  /** Bytes a second to the target; 0: no limit. */
  rateLimitBytes: number;
  onCbwError: OnCbwError;
  onSourceError: OnIoError;
  onTargetError: OnIoError;
  targetRetries: number;
  /** Of an RBD target: a snapshot to be made when all is written and flushed. */
  targetSnapshot?: string | undefined;
  direct: boolean;
  verify: boolean;
  sync: SyncMode;
  /** Live, by sync `none`: what the guest overwrites goes to the target before, and nothing else, until the job is cancelled. */
  oldDataOnly?: boolean | undefined;
  /** The disk's T0 view is an export while the job runs; always so with sync `none`. */
  snapshotExport: boolean;
}

/** A buffer has at least room for the captures of two chunks, so that no single guest write needs more than there is. */
export const SMALLEST_BUFFER_BYTES = 2 * MiB;

/**
 * Workers of an offline copy. It is bound by the processor, not by a limit or a guest: with two cores a third and
 * fourth worker made a copy of 1 GiB 30 % slower, by their start and by taking turns.
 */
export const OFFLINE_WORKER_COUNT = Math.min(4, Math.max(2, availableParallelism()));

export const JOB_DEFAULTS: Omit<JobOptions, "target" | "targetFormat"> = {
  force: false,
  clusterSizeBytes: 64 * KiB,
  // Of a live backup: four hide a target's latency and still cost little memory.
  workerCount: 4,
  cowBufferSizeBytes: 256 * MiB,
  onBufferFull: "spill",
  guestTimeoutMs: 45_000,
  rateLimitBytes: 0,
  onCbwError: "break-snapshot",
  onSourceError: "report",
  onTargetError: "report",
  targetRetries: 5,
  direct: false,
  verify: false,
  sync: "full",
  snapshotExport: false,
};
