// What a finished backup or restore says: a few lines for people, one object for scripts.
import { statSync } from "node:fs";
import { systemName } from "../../file-names.js";
import type { BasisInfo } from "../../backup/host.js";
import type { FreezeInfo } from "../../backup/job/while-frozen.js";
import type { JobProgress } from "../../backup/progress.js";
import { formatBytes, formatDuration } from "../../units.js";
import { printJsonLine, printLine, type OutputSettings } from "../output/context.js";
import { packageVersion } from "../version.js";
import { now } from "./json.js";
import type { JobInfo, QemuFacts } from "./view.js";

/** Of st_blocks (stat(2)). */
const STAT_BLOCK_BYTES = 512;

export interface SummaryMessage {
  message_type: "summary";
  /** RFC 3339, UTC. */
  time: string;
  version: string;
  job: string;
  disk: string;
  target: string;
  /** Null of a job without a target. */
  target_format: string | null;
  /** The instant that the backup shows; null where the server does not tell. */
  t0: string | null;
  /** Size of the disk. */
  bytes: number;
  /** Bytes of data that were copied: neither zeroes nor holes, and before compression. */
  bytes_written: number;
  /** What the target takes of its storage; null of what is no file. */
  bytes_on_target: number | null;
  seconds: number;
  /** Of `bytes_written`, a second, as in `status`. */
  rate: number;
  /** Of `bytes`, a second: of the disk dealt with, holes included. */
  disk_rate: number;
  captures: number;
  captured_bytes: number;
  spilled_bytes: number;
  guest_waits: number;
  guest_wait_ms_max: number;
  guest_wait_ms_total: number;
  ignored_errors: number;
  /** The target was read back and compared. */
  verified: boolean;
  /** Of a live backup: all of the disk, or what has changed. */
  level?: BasisInfo["level"];
  bitmap_action?: BasisInfo["bitmapAction"];
  /** Why a full one was made although less was asked for, or no checkpoint. */
  bitmap_reason?: string;
  /** Of a guest that QEMU runs. */
  method?: string;
  method_reason?: string;
  guest_stopped_ms?: number;
  /** Of --freeze. */
  guest_frozen_ms?: number;
  guest_frozen_file_systems?: number;
  guest_freeze_held?: boolean;
}

export function summaryMessage(info: JobInfo, progress: JobProgress, basis?: BasisInfo): SummaryMessage {
  return {
    message_type: "summary",
    time: now(),
    version: packageVersion(),
    job: info.jobId,
    disk: info.disk,
    target: info.target,
    target_format: info.targetFormat ?? null,
    t0: info.t0 ?? null,
    bytes: progress.bytesTotal,
    bytes_written: progress.bytesWritten,
    bytes_on_target: info.bytesOnTarget ?? null,
    seconds: Math.round(progress.elapsedMs) / 1000,
    rate: Math.round(rateOf(progress.bytesWritten, progress)),
    disk_rate: Math.round(rateOf(progress.bytesDone, progress)),
    captures: progress.captureCount,
    captured_bytes: progress.capturedBytes,
    spilled_bytes: progress.spilledBytes,
    guest_waits: progress.guestWaitCount,
    guest_wait_ms_max: progress.guestWaitMsMax,
    guest_wait_ms_total: progress.guestWaitMsTotal,
    ignored_errors: progress.ignoredErrorCount,
    verified: info.verify === true,
    ...(basis && { level: basis.level, bitmap_action: basis.bitmapAction }),
    ...(basis?.reason !== undefined && { bitmap_reason: basis.reason }),
    ...(info.qemu === undefined ? {} : qemuMembers(info.qemu)),
    ...(info.freeze === undefined ? {} : freezeMembers(info.freeze)),
  };
}

export function freezeMembers({ frozenMs, fileSystemCount, isHeld }: FreezeInfo) {
  return {
    guest_frozen_ms: Math.round(frozenMs * 10) / 10,
    guest_frozen_file_systems: fileSystemCount,
    guest_freeze_held: isHeld,
  };
}

export function qemuMembers({ method, reason, stoppedMs }: QemuFacts) {
  return { method, method_reason: reason, guest_stopped_ms: Math.round(stoppedMs * 10) / 10 };
}

export function summaryLines(info: JobInfo, progress: JobProgress, basis?: BasisInfo): string[] {
  if (info.snapshotOnly === true) {
    return [`${info.disk}: snapshot kept for ${formatDuration(progress.elapsedMs)}`, captureLine(progress)];
  }
  const lines = [
    `${info.disk} -> ${info.target}: ${formatBytes(progress.bytesTotal)} in ` +
      `${formatDuration(progress.elapsedMs)} (${formatBytes(rateOf(progress.bytesDone, progress))}/s), ` +
      `${formatBytes(progress.bytesWritten)} written${onTarget(info)}${info.verify === true ? ", verified" : ""}`,
  ];
  if (basis?.level === "incremental") lines.push("  incremental: what has changed since the checkpoint");
  if (basis?.reason !== undefined) lines.push(`  ${basis.level}: ${basis.reason}`);
  if (info.live) lines.push(captureLine(progress));
  if (info.qemu !== undefined) lines.push(qemuLine(info.qemu));
  if (info.freeze !== undefined) lines.push(freezeLine(info.freeze));
  if (progress.ignoredErrorCount > 0) {
    lines.push(`  ${counted(progress.ignoredErrorCount, "error")} ignored as asked: the backup has gaps`);
  }
  return lines;
}

/** On stdout: a JSON line with --json, else text unless --quiet. */
export function printSummary(
  output: OutputSettings,
  info: JobInfo,
  progress: JobProgress,
  basis?: BasisInfo,
): void {
  if (output.json) {
    printJsonLine(output, summaryMessage(info, progress, basis));
    return;
  }
  if (output.quiet) return;
  for (const line of summaryLines(info, progress, basis)) printLine(output, line);
}

export function qemuLine({ method, reason, stoppedMs }: QemuFacts): string {
  const stopped = stoppedMs === 0 ? "" : `; the guest stood still for ${formatDuration(stoppedMs)}`;
  return `  method ${method}: ${reason}${stopped}`;
}

export function freezeLine({ frozenMs, fileSystemCount, isHeld }: FreezeInfo): string {
  const frozen = `  ${counted(fileSystemCount, "file system")} of the guest frozen for ${formatDuration(frozenMs)}`;
  return isHeld ? frozen : `${frozen}; some thawed before, so the guest may have written at T0`;
}

export function captureLine(progress: JobProgress): string {
  const captures = `${counted(progress.captureCount, "capture")} (${formatBytes(progress.capturedBytes)})`;
  const spilled = `${formatBytes(progress.spilledBytes)} spilled`;
  if (progress.guestWaitCount === 0) return `  ${captures}, ${spilled}, no guest write waited`;
  const waits = `${counted(progress.guestWaitCount, "guest write")} waited`;
  return `  ${captures}, ${spilled}, ${waits}, the longest ${formatDuration(progress.guestWaitMsMax)}`;
}

function onTarget({ bytesOnTarget: bytes }: JobInfo): string {
  return bytes === undefined ? "" : `, ${formatBytes(bytes)} on disk`;
}

/** What a finished target takes of its storage; undefined for what is no file, or may not be looked at. */
export function bytesOnTarget(target: string): number | undefined {
  try {
    const stats = statSync(systemName(target));
    return stats.isFile() ? stats.blocks * STAT_BLOCK_BYTES : undefined;
  } catch {
    return undefined;
  }
}

function rateOf(bytes: number, { elapsedMs }: JobProgress): number {
  return elapsedMs > 0 ? (bytes * 1000) / elapsedMs : 0;
}

function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}
