// What an incremental live backup goes by: the changes since a checkpoint, as known while it is being prepared, and what
// came to them up to T0.
//
//   prepare   clusters without a change are DONE (copy/incremental.ts), as far as is known by then
//   T0        the epoch ends; what has changed since is PENDING again
//
// So T0 costs a walk over bits, not one over the disk. Main thread.

import { CNT_DONE_BYTES, DONE, PENDING, REGION_CHUNKED, type SharedState } from "../../cow/shared.js";
import { CowcatcherError } from "../../errors.js";
import type { Bits } from "../../tracking/bits.js";
import type { DiskTracker, Following } from "../../tracking/tracker.js";
import type { DirtyRuns } from "../copy/incremental.js";
import type { BasisInfo, BitmapAction } from "../host.js";
import type { JobOptions } from "../options.js";

type Wish = Pick<JobOptions, "since" | "sinceOrFull" | "checkpoint" | "bitmapUse">;

export interface Basis {
  readonly info: BasisInfo;
  /** Of an incremental one; to be ended. */
  readonly changes: Following | undefined;
  /** What the job's dirty bitmap has, whether it goes by it or not; `changes` if it does. To be ended. */
  readonly held?: Following | undefined;
  /** What is copied, where that is not just what `changes` knows. */
  readonly dirty?: DirtyRuns | undefined;
  /** Whoever goes by `dirty` is to know what has come to `changes` by T0, too. */
  readonly noteLate?: ((late: Bits) => void) | undefined;
  /** The name under which T0 is remembered though nobody asked for it: without it the backup is as good. */
  readonly checkpoint?: string | undefined;
}

/**
 * @param refusal why an incremental one is out of the question for reasons of its companions
 * @throws CowcatcherError NO_BASIS where the checkpoint cannot be used and a full backup is not allowed, or where a
 *   checkpoint is asked for and nothing keeps track; IO.
 */
export async function findBasis(
  disk: string,
  wish: Wish,
  tracker: DiskTracker | undefined,
  refusal?: string,
): Promise<Basis> {
  const { since, bitmapUse } = wish;
  if (bitmapUse !== undefined) {
    requireTracking(disk, tracker);
    const held = await tracker?.follow(...bitmapUse.holds);
    if (bitmapUse.isBasis) {
      return { info: { level: "incremental", bitmapAction: "used" }, changes: held, held };
    }
    return { ...full({ bitmapAction: "new" }), held };
  }
  if (wish.checkpoint !== undefined) requireTracking(disk, tracker);
  if (since === undefined) {
    return full({ bitmapAction: wish.checkpoint === undefined ? "not-used" : "new" });
  }
  const refused =
    refusal === undefined ? refuse(since, tracker) : { action: "invalid" as const, reason: refusal };
  if (refused !== undefined) {
    if (wish.sinceOrFull === true) return full({ bitmapAction: refused.action, reason: refused.reason });
    throw noBasis(disk, refused.reason, "--since-or-full makes a full backup then");
  }
  const changes = await tracker?.follow(since);
  return { info: { level: "incremental", bitmapAction: "used" }, changes };
}

function full(info: Omit<BasisInfo, "level">): Basis {
  return { info: { level: "full", ...info }, changes: undefined };
}

function refuse(
  since: string,
  tracker: DiskTracker | undefined,
): { action: BitmapAction; reason: string } | undefined {
  if (tracker === undefined) return { action: "not-used", reason: "the server does not track its changes" };
  const checkpoint = tracker.checkpoint(since);
  if (checkpoint?.isStopped === true) {
    return { action: "invalid", reason: `checkpoint '${since}' does not record: it is a disabled bitmap` };
  }
  if (checkpoint !== undefined) return undefined;
  const { loss } = tracker.state;
  if (loss?.checkpoints.includes(since) === true) {
    return { action: "invalid", reason: `checkpoint '${since}' cannot be relied on: ${loss.reason}` };
  }
  return { action: "missing", reason: `there is no checkpoint '${since}'` };
}

function requireTracking(disk: string, tracker: DiskTracker | undefined): void {
  const problem =
    tracker === undefined
      ? "a checkpoint cannot be made: the server does not track its changes"
      : tracker.state.state === "failed"
        ? `a checkpoint cannot be made: keeping track has failed (${tracker.state.loss?.reason ?? ""})`
        : undefined;
  if (problem !== undefined) throw noBasis(disk, problem, "serve it anew, with --tracking host or process");
}

/**
 * Why disks that are to go on from one checkpoint together cannot; undefined where they can.
 */
export function disagreement(
  since: string,
  trackers: readonly (DiskTracker | undefined)[],
): string | undefined {
  const uuids = new Set(trackers.map((tracker) => tracker?.checkpoint(since)?.uuid));
  return uuids.size > 1 ? `checkpoint '${since}' is not of one moment on all of the disks` : undefined;
}

/** At T0, before the workers begin: what has changed since the job was prepared is copied, too. */
export function markLate(shared: SharedState, late: Bits): void {
  const { sizeBytes, clusterBytes, chunkBytes, chunksPerRegion } = shared.geometry;
  const regionBytes = chunkBytes * chunksPerRegion;
  let undoneBytes = 0;
  for (let at = 0; at < sizeBytes;) {
    const { lengthBytes, dirty } = late.run(at, sizeBytes - at);
    const end = at + lengthBytes;
    if (dirty) {
      shared.regionStates.fill(
        REGION_CHUNKED,
        Math.floor(at / regionBytes),
        Math.floor((end - 1) / regionBytes) + 1,
      );
      const last = Math.floor((end - 1) / clusterBytes);
      for (let cluster = Math.floor(at / clusterBytes); cluster <= last; cluster++) {
        if (shared.clusterStates[cluster] !== DONE) continue;
        shared.clusterStates[cluster] = PENDING;
        undoneBytes += Math.min(clusterBytes, sizeBytes - cluster * clusterBytes);
      }
    }
    at = end;
  }
  Atomics.sub(shared.counters, CNT_DONE_BYTES, BigInt(undoneBytes));
}

export function noBasis(object: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "NO_BASIS", object, problem, hint });
}
