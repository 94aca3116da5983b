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

/** A part of a progress text, and its place among those that a narrow terminal keeps: the smallest stays longest. */
export interface ProgressPart {
  text: string;
  rank: number;
}

/** The parts of a progress text, in the order in which they stand. */
export function rankedParts(
  progress: JobProgress,
  { live, remainingMs, snapshotOnly }: ProgressTextOptions,
): ProgressPart[] {
  const parts = snapshotOnly === true ? snapshotParts(progress) : copyParts(progress, remainingMs);
  if (live && progress.bufferBytesTotal > 0) parts.push({ text: bufferPart(progress), rank: 4 });
  // What the whole tool is about goes last.
  if (live) parts.push({ text: guestWaitPart(progress), rank: 1 });
  if (progress.spilledBytes > 0) {
    parts.push({ text: `${formatBytes(progress.spilledBytes)} spilled`, rank: 6 });
  }
  return parts;
}

/** The texts of all parts. */
export function progressParts(progress: JobProgress, options: ProgressTextOptions): string[] {
  return rankedParts(progress, options).map(({ text }) => text);
}

function copyParts(progress: JobProgress, remainingMs: number | undefined): ProgressPart[] {
  const left = remainingMs === undefined ? "time left unknown" : `${formatDuration(remainingMs)} left`;
  return [
    { text: formatPercent(fractionDone(progress)), rank: 0 },
    { text: `${formatBytes(progress.bytesDone)} of ${formatBytes(progress.bytesTotal)}`, rank: 5 },
    { text: `${formatBytes(progress.targetRate)}/s`, rank: 3 },
    { text: left, rank: 2 },
  ];
}

function snapshotParts(progress: JobProgress): ProgressPart[] {
  return [
    { text: `${formatBytes(progress.capturedBytes)} captured`, rank: 0 },
    { text: `for ${formatDuration(progress.elapsedMs)}`, rank: 2 },
  ];
}

export function bufferPart(progress: JobProgress): string {
  return `buffer ${formatPercent(bufferFraction(progress))}`;
}

export function guestWaitPart({ guestWaitMsMax }: JobProgress): string {
  return guestWaitMsMax > 0 ? `longest guest wait ${formatDuration(guestWaitMsMax)}` : "no guest wait";
}
