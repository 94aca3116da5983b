// The engine's one way to say how far it is. It never prints: the command line turns these into bars, lines or
// JSON; the control socket into query-jobs' answer.

/** A job's counters at one moment. Bytes unless the name says otherwise. */
export interface JobProgress {
  /** Disk bytes dealt with, holes included. */
  bytesDone: number;
  bytesTotal: number;
  /** Bytes sent to the target (zeroes and holes are not). */
  bytesWritten: number;
  bufferBytesUsed: number;
  bufferBytesTotal: number;
  /** Captures made: one for each run of blocks copied before a guest write. */
  captureCount: number;
  capturedBytes: number;
  /** Bytes that went to the spill file, in all. */
  spilledBytes: number;
  guestWaitCount: number;
  guestWaitMsMax: number;
  guestWaitMsTotal: number;
  /** Waits by ranges of their length (cow/wait-histogram.ts); empty where they are not known, as at a client. */
  guestWaitCounts: readonly number[];
  /** Bytes a second to the target, over the last seconds. */
  targetRate: number;
  elapsedMs: number;
  /** Errors passed over because the user asked for it (`ignore`). */
  ignoredErrorCount: number;
}

/** Of a job that has done nothing yet. */
export const NO_PROGRESS: JobProgress = {
  bytesDone: 0,
  bytesTotal: 0,
  bytesWritten: 0,
  bufferBytesUsed: 0,
  bufferBytesTotal: 0,
  captureCount: 0,
  capturedBytes: 0,
  spilledBytes: 0,
  guestWaitCount: 0,
  guestWaitMsMax: 0,
  guestWaitMsTotal: 0,
  guestWaitCounts: [],
  targetRate: 0,
  elapsedMs: 0,
  ignoredErrorCount: 0,
};
