// How fast a job goes and when it will be done, from its last samples: holes are passed in no time and a full
// buffer slows everything, so the average since the start would mislead.
import type { JobProgress } from "../../backup/progress.js";

interface Sample {
  elapsedMs: number;
  bytesDone: number;
}

const WINDOW_MS = 20_000;
const SAMPLE_INTERVAL_MS = 500;

export class Pace {
  // At most WINDOW_MS / SAMPLE_INTERVAL_MS samples, and the one that begins the window.
  private readonly samples: Sample[] = [{ elapsedMs: 0, bytesDone: 0 }];

  add({ elapsedMs, bytesDone }: Pick<JobProgress, "elapsedMs" | "bytesDone">): void {
    const last = this.samples.at(-1);
    if (last !== undefined && elapsedMs - last.elapsedMs < SAMPLE_INTERVAL_MS) return;
    this.samples.push({ elapsedMs, bytesDone });
    while (this.samples.length > 2 && elapsedMs - (this.samples[1]?.elapsedMs ?? elapsedMs) >= WINDOW_MS) {
      this.samples.shift();
    }
  }

  /** Milliseconds until all is done at the pace of the last seconds; undefined: no telling. */
  remainingMs({ elapsedMs, bytesDone, bytesTotal }: JobProgress): number | undefined {
    if (bytesDone >= bytesTotal) return 0;
    const first = this.samples[0];
    if (first === undefined) return undefined;
    const windowMs = elapsedMs - first.elapsedMs;
    const windowBytes = bytesDone - first.bytesDone;
    if (windowMs <= 0 || windowBytes <= 0) return undefined;
    return ((bytesTotal - bytesDone) * windowMs) / windowBytes;
  }
}

/** 0 to 1; an empty disk is done from the start. */
export function fractionDone({ bytesDone, bytesTotal }: JobProgress): number {
  return bytesTotal === 0 ? 1 : Math.min(1, bytesDone / bytesTotal);
}

/** 0 to 1; 0 where the job has no buffer. */
export function bufferFraction({ bufferBytesUsed, bufferBytesTotal }: JobProgress): number {
  return bufferBytesTotal === 0 ? 0 : Math.min(1, bufferBytesUsed / bufferBytesTotal);
}
