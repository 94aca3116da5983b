// A job's progress in words, for the plain lines and beside the bars.
import type { JobProgress } from "../../backup/progress.js";
import { formatBytes, formatDuration } from "../../units.js";
import { bufferFraction, fractionDone } from "./pace.js";

export interface ProgressTextOptions {
  live: boolean;
  /** Undefined: unknown. */
  remainingMs: number | undefined;
  /** Nothing is copied: there is nothing to be done with. */
  snapshotOnly?: boolean | undefined;
}

export function formatPercent(fraction: number): string {
  // Rounded down: 100 % means done.
  return `${Math.floor(fraction * 100)}%`;
}

/** The parts of a progress text, the most important first, so that a narrow terminal can leave out the last. */
export function progressParts(
  progress: JobProgress,
  { live, remainingMs, snapshotOnly }: ProgressTextOptions,
): string[] {
  const parts = snapshotOnly === true ? snapshotParts(progress) : copyParts(progress, remainingMs);
  if (live && progress.bufferBytesTotal > 0) parts.push(bufferPart(progress));
  if (live) parts.push(guestWaitPart(progress));
  if (progress.spilledBytes > 0) parts.push(`${formatBytes(progress.spilledBytes)} spilled`);
  return parts;
}

function copyParts(progress: JobProgress, remainingMs: number | undefined): string[] {
  return [
    formatPercent(fractionDone(progress)),
    `${formatBytes(progress.bytesDone)} of ${formatBytes(progress.bytesTotal)}`,
    `${formatBytes(progress.targetRate)}/s`,
    remainingMs === undefined ? "time left unknown" : `${formatDuration(remainingMs)} left`,
  ];
}

function snapshotParts(progress: JobProgress): string[] {
  return [`${formatBytes(progress.capturedBytes)} captured`, `for ${formatDuration(progress.elapsedMs)}`];
}

export function bufferPart(progress: JobProgress): string {
  return `buffer ${formatPercent(bufferFraction(progress))}`;
}

export function guestWaitPart({ guestWaitMsMax }: JobProgress): string {
  return guestWaitMsMax > 0 ? `longest guest wait ${formatDuration(guestWaitMsMax)}` : "no guest wait";
}
