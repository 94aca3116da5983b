// The one interface through which a command shows how far its jobs are. Its forms: bars on a terminal, plain lines
// elsewhere, JSON lines for scripts, or nothing (create-view.ts makes them).
//
// The caller may call `update` as often as it likes: each view limits its own rate. A view prints nothing after
// `stop`. All on the main thread.
import type { BasisInfo } from "../../backup/host.js";
import type { FreezeInfo } from "../../backup/job/while-frozen.js";
import type { JobProgress } from "../../backup/progress.js";
import type { CowcatcherError } from "../../errors.js";

export interface JobInfo {
  jobId: string;
  /** Node name of the disk, or the source's path. */
  disk: string;
  target: string;
  totalBytes: number;
  /** About what there is to copy, holes not counted; undefined: unknown. */
  dataBytes?: number | undefined;
  /** The instant that the backup shows, RFC 3339 in UTC. */
  t0?: string | undefined;
  targetFormat?: string | undefined;
  /** What a finished target takes of its storage; undefined: unknown, or no file. */
  bytesOnTarget?: number | undefined;
  /** A guest uses the disk: buffer and guest waits are shown. */
  live: boolean;
  /** Without an error at the end, the target was read back and is what was written. */
  verify?: boolean;
  /** Nothing is copied (sync none): no time left, no rate, and cancelling is the orderly end. */
  snapshotOnly?: boolean;
  /** Of a backup of a guest that QEMU runs. */
  qemu?: QemuFacts | undefined;
  /** Where the guest's agent was asked to freeze it. */
  freeze?: FreezeInfo | undefined;
  /** Name of the export of the disk's T0 view, where there is one. */
  snapshotExport?: string | undefined;
}

/** How QEMU was had to keep the disk as it was. */
export interface QemuFacts {
  method: string;
  reason: string;
  /** How long the guest stood still for T0, in ms. */
  stoppedMs: number;
}

export interface JobResult {
  progress: JobProgress;
  /** Of a live backup: how much was copied, and why. */
  basis?: BasisInfo | undefined;
  /** The first cause, if the job failed. */
  error: CowcatcherError | undefined;
}

export interface ProgressView {
  /** After T0, once for each job. */
  start(info: JobInfo): void;
  update(jobId: string, progress: JobProgress): void;
  finish(jobId: string, result: JobResult): void;
  /** Ends all output and timers, and gives the terminal back. May be called more than once. */
  stop(): void;
}

/** A view that can say at once where its jobs are. */
export interface PrintableView extends ProgressView {
  printNow(): void;
}
