// What a finished backup or restore says: a few lines for people, one object for scripts.
import type { JobProgress } from "../../backup/progress.js";
import { formatBytes, formatDuration } from "../../units.js";
import { printJsonLine, printLine, type OutputSettings } from "../output/context.js";
import type { JobInfo } from "./view.js";

export interface SummaryMessage {
  message_type: "summary";
  job: string;
  disk: string;
  target: string;
  /** Size of the disk. */
  bytes: number;
  /** Bytes that went to the target: neither zeroes nor holes. */
  bytes_written: number;
  seconds: number;
  /** Bytes of the disk dealt with, a second, holes included. */
  rate: number;
  captures: number;
  captured_bytes: number;
  spilled_bytes: number;
  guest_waits: number;
  guest_wait_ms_max: number;
  guest_wait_ms_total: number;
  ignored_errors: number;
  /** The target was read back and compared. */
  verified: boolean;
}

export function summaryMessage(info: JobInfo, progress: JobProgress): SummaryMessage {
  return {
    message_type: "summary",
    job: info.jobId,
    disk: info.disk,
    target: info.target,
    bytes: progress.bytesTotal,
    bytes_written: progress.bytesWritten,
    seconds: Math.round(progress.elapsedMs) / 1000,
    rate: Math.round(averageRate(progress)),
    captures: progress.captureCount,
    captured_bytes: progress.capturedBytes,
    spilled_bytes: progress.spilledBytes,
    guest_waits: progress.guestWaitCount,
    guest_wait_ms_max: progress.guestWaitMsMax,
    guest_wait_ms_total: progress.guestWaitMsTotal,
    ignored_errors: progress.ignoredErrorCount,
    verified: info.verify === true,
  };
}

export function summaryLines(info: JobInfo, progress: JobProgress): string[] {
  if (info.snapshotOnly === true) {
    return [`${info.disk}: snapshot kept for ${formatDuration(progress.elapsedMs)}`, captureLine(progress)];
  }
  const lines = [
    `${info.disk} -> ${info.target}: ${formatBytes(progress.bytesTotal)} in ` +
      `${formatDuration(progress.elapsedMs)} (${formatBytes(averageRate(progress))}/s), ` +
      `${formatBytes(progress.bytesWritten)} written${info.verify === true ? ", verified" : ""}`,
  ];
  if (info.live) lines.push(captureLine(progress));
  if (progress.ignoredErrorCount > 0) {
    lines.push(`  ${counted(progress.ignoredErrorCount, "error")} ignored as asked: the backup has gaps`);
  }
  return lines;
}

/** On stdout: a JSON line with --json, else text unless --quiet. */
export function printSummary(output: OutputSettings, info: JobInfo, progress: JobProgress): void {
  if (output.json) {
    printJsonLine(output, summaryMessage(info, progress));
    return;
  }
  if (output.quiet) return;
  for (const line of summaryLines(info, progress)) printLine(output, line);
}

function captureLine(progress: JobProgress): string {
  const captures = `${counted(progress.captureCount, "capture")} (${formatBytes(progress.capturedBytes)})`;
  const spilled = `${formatBytes(progress.spilledBytes)} spilled`;
  if (progress.guestWaitCount === 0) return `  ${captures}, ${spilled}, no guest write waited`;
  const waits = `${counted(progress.guestWaitCount, "guest write")} waited`;
  return `  ${captures}, ${spilled}, ${waits}, the longest ${formatDuration(progress.guestWaitMsMax)}`;
}

function averageRate({ bytesDone, elapsedMs }: JobProgress): number {
  return elapsedMs > 0 ? (bytesDone * 1000) / elapsedMs : 0;
}

function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}
