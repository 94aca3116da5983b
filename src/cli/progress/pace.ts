// How fast a job goes and when it will be done, from its last samples: a full buffer slows everything, so the average
// since the start would mislead. Holes are passed in no time, so where it is known about how much data there is, what
// is left of it and the pace of the data tell the time; else the disk's size has to.
import type { JobProgress } from "../../backup/progress.js";

interface Sample {
  elapsedMs: number;
  bytesDone: number;
  bytesWritten: number;
}

const WINDOW_MS = 20_000;
const SAMPLE_INTERVAL_MS = 500;

export class Pace {
  // At most WINDOW_MS / SAMPLE_INTERVAL_MS samples, and the one that begins the window.
  private readonly samples: Sample[] = [{ elapsedMs: 0, bytesDone: 0, bytesWritten: 0 }];
  readonly #dataBytes: number | undefined;

  /** @param dataBytes about what there is to copy; undefined: unknown */
  constructor(dataBytes?: number) {
    this.#dataBytes = dataBytes;
  }

  add({ elapsedMs, bytesDone, bytesWritten }: Sample): void {
    const last = this.samples.at(-1);
    if (last !== undefined && elapsedMs - last.elapsedMs < SAMPLE_INTERVAL_MS) return;
    this.samples.push({ elapsedMs, bytesDone, bytesWritten });
    while (this.samples.length > 2 && elapsedMs - (this.samples[1]?.elapsedMs ?? elapsedMs) >= WINDOW_MS) {
      this.samples.shift();
    }
  }

  /** Milliseconds until all is done at the pace of the last seconds; undefined: no telling. */
  remainingMs({ elapsedMs, bytesDone, bytesTotal, bytesWritten }: JobProgress): number | undefined {
    if (bytesDone >= bytesTotal) return 0;
    const first = this.samples[0];
    if (first === undefined) return undefined;
    const windowMs = elapsedMs - first.elapsedMs;
    const windowBytes = bytesDone - first.bytesDone;
    if (windowMs <= 0 || windowBytes <= 0) return undefined;
    const writtenBytes = bytesWritten - first.bytesWritten;
    const dataLeft = (this.#dataBytes ?? 0) - bytesWritten;
    // More data than was thought (a compressed source), or none of late: the estimate is of no use.
    if (dataLeft > 0 && writtenBytes > 0) {
      return (Math.min(dataLeft, bytesTotal - bytesDone) * windowMs) / writtenBytes;
    }
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
