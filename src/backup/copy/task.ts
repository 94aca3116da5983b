// What crosses between the main thread and a worker of a backup: once at the start, and when something happens.

import type { MessagePort } from "node:worker_threads";
import type { ReadAheadDescription } from "../../cow/read-ahead.js";
import type { SharedBuffers } from "../../cow/shared.js";
import type { SpillDescription } from "../../cow/spill.js";
import type { ErrorDetails } from "../../errors.js";
import type { SourceDescription } from "../../block/device.js";
import type { TargetDescription } from "../../target/target.js";
import type { OnIoError } from "../../cow/policies.js";

/** The argument of workers/copy.ts. */
export interface CopyTask {
  shared: SharedBuffers;
  target: TargetDescription;
  spill: SpillDescription | null;
  topOnly: boolean;
  hasForeignCaptures: boolean;
  zeroUnitBytes: number;
  /** What is read sooner than the target takes it is kept there; null: nothing is. */
  readAhead: ReadAheadDescription | null;
  onSourceError: OnIoError;
  onTargetError: OnIoError;
  targetRetries: number;
  workerIndex: number;
  workerCount: number;
  /** Of the worker's thread: 0 to 19. */
  niceness: number;
  port: MessagePort;
}

/** Errors cross as plain data: a class does not survive the port. */
export interface CopyResult {
  error?: ErrorDetails;
  stack?: string | undefined;
}

export type WorkerMessage =
  | { kind: "ready" }
  /** The job has paused for an error under the policy `stop`. */
  | { kind: "stopped"; error: ErrorDetails };

export type WorkerCommand = { kind: "begin"; source: SourceDescription } | { kind: "leave" };
