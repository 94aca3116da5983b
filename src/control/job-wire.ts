// The `x-cowcatcher` object of a job: the counters that QMP has no field for. Written and read here and nowhere else.

import { type BackupJob, type BasisInfo, BITMAP_ACTIONS, type RepositoryOutcome } from "../backup/host.js";
import type { FreezeInfo } from "../backup/job/while-frozen.js";
import { type JobProgress, NO_PROGRESS } from "../backup/progress.js";
import { errorToWire, isJsonObject, type JsonObject } from "../qmp/protocol.js";

/** The ranges of waits stay with the server, for its metrics. */
type WiredField = Exclude<keyof JobProgress, "guestWaitCounts">;

const PROGRESS_FIELDS: Record<WiredField, string> = {
  bytesDone: "bytes-done",
  bytesTotal: "bytes-total",
  bytesWritten: "bytes-written",
  bufferBytesUsed: "buffer-bytes-used",
  bufferBytesTotal: "buffer-bytes-total",
  captureCount: "capture-count",
  capturedBytes: "captured-bytes",
  spilledBytes: "spilled-bytes",
  guestWaitCount: "guest-wait-count",
  guestWaitMsMax: "guest-wait-ms-max",
  guestWaitMsTotal: "guest-wait-ms-total",
  targetRate: "target-rate",
  elapsedMs: "elapsed-ms",
  ignoredErrorCount: "ignored-error-count",
};
const PROGRESS_KEYS = Object.keys(PROGRESS_FIELDS) as WiredField[];

/** A job's `x-cowcatcher` object: its counters, what it is about, and its first error. */
export function jobToWire(job: BackupJob): JsonObject {
  const progress = job.progress();
  const wire: JsonObject = { disk: job.disk, target: job.options.target, speed: job.speed };
  if (job.t0Ms !== undefined) wire.t0 = new Date(job.t0Ms).toISOString();
  for (const key of PROGRESS_KEYS) wire[PROGRESS_FIELDS[key]] = progress[key];
  if (job.basis !== undefined) {
    const { level, bitmapAction, reason } = job.basis;
    Object.assign(wire, { level, "bitmap-action": bitmapAction, "bitmap-reason": reason });
  }
  if (job.repository !== undefined) wire["repository"] = repositoryToWire(job.repository);
  if (job.error !== undefined) wire.error = errorToWire(job.error);
  if (job.snapshot !== undefined) {
    wire["snapshot-export"] = job.snapshot.exportName;
    if (job.snapshot.error !== undefined) wire["snapshot-error"] = errorToWire(job.snapshot.error);
  }
  return wire;
}

function repositoryToWire(outcome: RepositoryOutcome): JsonObject {
  const { address, group, disk, time, clockBehind, newChunks, newBytes, readBytes } = outcome;
  return {
    address,
    group,
    disk,
    time,
    "clock-behind": clockBehind,
    "new-chunks": newChunks,
    "new-bytes": newBytes,
    "read-bytes": readBytes,
  };
}

/** Undefined where the job's target is no repository. */
export function repositoryFromWire({ repository: wire }: JsonObject): RepositoryOutcome | undefined {
  if (!isJsonObject(wire)) return undefined;
  const textOf = (name: string): string | undefined => {
    const value = wire[name];
    return typeof value === "string" ? value : undefined;
  };
  const numberOf = (name: string): number => {
    const value = wire[name];
    return typeof value === "number" ? value : 0;
  };
  return {
    address: textOf("address") ?? "",
    group: textOf("group") ?? "",
    disk: textOf("disk") ?? "",
    time: textOf("time"),
    clockBehind: textOf("clock-behind"),
    newChunks: numberOf("new-chunks"),
    newBytes: numberOf("new-bytes"),
    readBytes: numberOf("read-bytes"),
  };
}

/** Undefined where the server says nothing of it. */
export function basisFromWire(wire: JsonObject): BasisInfo | undefined {
  const { level, "bitmap-action": action, "bitmap-reason": reason } = wire;
  const bitmapAction = BITMAP_ACTIONS.find((known) => known === action);
  if ((level !== "full" && level !== "incremental") || bitmapAction === undefined) return undefined;
  return { level, bitmapAction, reason: typeof reason === "string" ? reason : undefined };
}

/** Reads the counters; one that is missing (an older server) is 0. */
export function progressFromWire(wire: JsonObject): JobProgress {
  const entries = PROGRESS_KEYS.map((key) => {
    const value = wire[PROGRESS_FIELDS[key]];
    return [key, typeof value === "number" ? value : 0] as const;
  });
  return { ...NO_PROGRESS, ...(Object.fromEntries(entries) as unknown as Pick<JobProgress, WiredField>) };
}

/** The `x-freeze` object of a start's answer. */
export function freezeToWire({ frozenMs, fileSystemCount, isHeld }: FreezeInfo): JsonObject {
  return { "frozen-ms": frozenMs, "file-systems": fileSystemCount, held: isHeld };
}

/** The inverse, from the answer; undefined: there was no freeze. */
export function freezeFromWire(answer: unknown): FreezeInfo | undefined {
  const wire = isJsonObject(answer) ? answer["x-freeze"] : undefined;
  if (!isJsonObject(wire)) return undefined;
  return {
    frozenMs: Number(wire["frozen-ms"]),
    fileSystemCount: Number(wire["file-systems"]),
    isHeld: wire["held"] === true,
  };
}
