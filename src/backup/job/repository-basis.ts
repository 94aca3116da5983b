// How much of a disk a live backup into a repository reads. Main thread.
//
// Each such backup of a tracked disk makes a checkpoint, one for each repository and group, of which the next backup
// replaces it. Its id is in the manifest. Only where the tracking has the very checkpoint of the group's last backup does
// "changed since" mean since that one: after a backup that was forgotten, made elsewhere, or ended between its manifest and
// its checkpoint, all is read.

import { CowcatcherError } from "../../errors.js";
import type { DiskTracker } from "../../tracking/tracker.js";
import type { BitmapAction } from "../host.js";
import type { LevelChoice } from "../options.js";
import type { BegunSession } from "../storage/protocol.js";
import { type Basis, noBasis } from "./basis.js";
import { DirtyBlocks } from "../../repository/backup/dirty-blocks.js";
import type { PatchingDescription } from "../../repository/backup/disk-chunks.js";
import { byChunks } from "./repository-backup.js";

export interface BasisRequest {
  disk: string;
  level: LevelChoice;
  group: string;
  sizeBytes: number;
  /** As in MadeSessionDisk. */
  takeable: Uint8Array | null;
  /** Of the target's description. */
  patching: PatchingDescription | null;
}

/** The checkpoint's name in the tracking. */
export function repositoryCheckpoint(repositoryId: string, group: string): string {
  return `${repositoryId.slice(0, 8)}-${group.replaceAll("+", "_")}`;
}

/** @throws CowcatcherError NO_BASIS where an incremental backup is asked for and cannot be made; IO of the tracking. */
export async function repositoryBasis(
  request: BasisRequest,
  { repositoryId, chunkBytes, parent }: BegunSession,
  tracker: DiskTracker | undefined,
): Promise<Basis> {
  const { disk, level, group, sizeBytes, takeable, patching } = request;
  const isTracked = tracker?.state.state === "tracking";
  const checkpoint = isTracked ? repositoryCheckpoint(repositoryId, group) : undefined;
  const full = (bitmapAction: BitmapAction, reason: string): Basis => {
    if (level === "incremental") {
      throw noBasis(
        disk,
        `cannot be backed up incrementally: ${reason}`,
        "--level auto makes a full backup then",
      );
    }
    return { info: { level: "full", bitmapAction, reason }, changes: undefined, checkpoint };
  };
  if (level === "full") return full(isTracked ? "new" : "not-used", "as asked");
  if (tracker === undefined) return full("not-used", "the server does not track the disk's changes");
  if (checkpoint === undefined) return full("invalid", `keeping track has failed (${lossOf(tracker)})`);
  if (parent === null) return full("new", "the group has no backup yet that can be read");
  const known = tracker.checkpoint(checkpoint);
  if (known === undefined || known.uuid !== parent.checkpoint) {
    const isLost = tracker.state.loss?.checkpoints.includes(checkpoint) === true;
    if (known === undefined && isLost) return full("invalid", `the tracking was lost: ${lossOf(tracker)}`);
    return full("missing", `the tracking knows nothing of the group's last backup, ${parent.time}`);
  }
  if (takeable === null) return full("new", "the last backup has no disk of this name and size");
  const changes = await tracker.follow(checkpoint);
  const dirty = byChunks(
    (at, count) => changes.known.run(at, count),
    (chunk) => takeable[chunk] === 1,
    { chunkBytes, sizeBytes, patching },
  );
  const reason = `what has changed since ${parent.time}`;
  const blocks = patching === null ? undefined : new DirtyBlocks(patching.dirty, chunkBytes);
  return {
    info: { level: "incremental", bitmapAction: "used", reason },
    changes,
    dirty,
    checkpoint,
    noteLate: (late) => blocks?.noteRuns((at, count) => late.run(at, count), 0, sizeBytes),
  };
}

function lossOf(tracker: DiskTracker): string {
  return tracker.state.loss?.reason ?? "unknown";
}

/** Why a disk's job ends whose backup cannot come about any more. */
export function groupMemberFailed(disk: string, cause: string): CowcatcherError {
  return new CowcatcherError({
    code: "CANCELLED",
    object: disk,
    problem: `ended, as the backup of ${cause}, with which it is one, has failed`,
  });
}
