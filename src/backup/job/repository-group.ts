// The disks of one start that become one backup in a repository: main thread's side of its session.
//
//   begin (with the first disk) ─► a disk each: its target ─► T0: the backup has its name ─► all complete: it exists
//                                                                  └─ a disk that fails ends the others ─► there is none
//
// The session lives on a storage thread of its own (storage/sessions.ts): nothing here waits for the store but promises.

import { nowNs } from "../../repository/backup/clock.js";
import type { PatchingDescription } from "../../repository/backup/disk-chunks.js";
import { CNT_NEW_BYTES, CNT_NEW_CHUNKS, CNT_READ_BYTES } from "../../repository/backup/chunk-writer.js";
import type { DiskTracker } from "../../tracking/tracker.js";
import type { Target } from "../../target/target.js";
import type { BackupJob, BackupRequest, RepositoryOutcome } from "../host.js";
import type { RepositoryPlace } from "../options.js";
import { orAborted } from "../storage/or-aborted.js";
import type { BegunSession, SessionPlace, StorageHand, StorageHands } from "../storage/protocol.js";
import { RemoteTarget } from "../storage/remote-target.js";
import type { Basis } from "./basis.js";
import { groupMemberFailed, repositoryBasis } from "./repository-basis.js";

export interface RepositoryDisk {
  target: Target;
  basis: Basis;
  /** What is known of the backup by now. */
  outcome(): RepositoryOutcome;
}

type StartedJob = Pick<BackupJob, "disk" | "error" | "cancel"> & { readonly concluded: Promise<void> };

export class RepositoryGroup {
  readonly #place: SessionPlace;
  readonly #hands: StorageHands;
  #hand: StorageHand | undefined;
  #begun: Promise<BegunSession> | undefined;
  #isStarted = false;
  #name: { time: string; clockBehind?: string } | undefined;
  #ending: Promise<void> | undefined;

  constructor(place: SessionPlace, hands: StorageHands) {
    this.#place = place;
    this.#hands = hands;
  }

  /**
   * Before T0. @throws CowcatcherError what opening the repository throws; NO_BASIS where an incremental backup is asked
   * for and cannot be made; the signal's reason
   */
  async add(
    { disk, level }: Pick<RepositoryPlace, "disk" | "level">,
    { sizeBytes, format }: { sizeBytes: number; format: string },
    tracker: DiskTracker | undefined,
    signal: AbortSignal,
  ): Promise<RepositoryDisk> {
    const begun = await orAborted((this.#begun ??= this.#begin()), signal);
    const hand = this.#usedHand();
    const made = hand.call("addSessionDisk", { session: begun.id, disk, sizeBytes, format });
    const { takeable, ...target } = await orAborted(made, signal);
    const basis = await repositoryBasis(
      {
        disk,
        level,
        group: this.#place.group,
        sizeBytes,
        takeable,
        patching: patchingOf(target.description),
      },
      begun,
      tracker,
    );
    const reason = basis.info.reason ?? "";
    const levelled = hand.call("setSessionLevel", {
      session: begun.id,
      disk,
      level: basis.info.level,
      reason,
    });
    try {
      await orAborted(levelled, signal);
    } catch (error) {
      basis.changes?.end();
      throw error;
    }
    return {
      target: RemoteTarget.adopt(hand, target, () => this.#started(begun.id)),
      basis,
      outcome: () => this.#outcome(disk, target.description),
    };
  }

  async #begin(): Promise<BegunSession> {
    this.#hand = this.#hands.take();
    return this.#hand.call("beginSession", this.#place);
  }

  #usedHand(): StorageHand {
    if (this.#hand === undefined) throw new Error("a session without a hand");
    return this.#hand;
  }

  /** With the first disk that starts; all of them do so in T0's turn. */
  #started(session: number): void {
    if (this.#isStarted) return;
    this.#isStarted = true;
    // A thread that died fails the targets, too.
    this.#usedHand()
      .call("startSession", { session, ns: nowNs() })
      .then(
        (name) => (this.#name = name),
        () => undefined,
      );
  }

  #outcome(disk: string, description: Target["description"]): RepositoryOutcome {
    const words =
      description.format === "repository" ? new BigInt64Array(description.writer.counters) : undefined;
    const { address, group } = this.#place;
    return {
      address,
      group,
      disk,
      time: this.#name?.time,
      clockBehind: this.#name?.clockBehind,
      newChunks: Number(words?.[CNT_NEW_CHUNKS] ?? 0),
      newBytes: Number(words?.[CNT_NEW_BYTES] ?? 0),
      readBytes: Number(words?.[CNT_READ_BYTES] ?? 0),
    };
  }

  /** After T0: one that fails ends the others, and when all are over the session is. */
  watch(jobs: readonly StartedJob[]): void {
    for (const job of jobs) {
      void job.concluded.then(() => {
        if (job.error === undefined) return;
        for (const other of jobs) if (other !== job) other.cancel(groupMemberFailed(other.disk, job.disk));
      });
    }
    void Promise.all(jobs.map(({ concluded }) => concluded)).then(() => this.end());
  }

  /** Gives up what is not complete, once what is on its way has ended. Never rejects; idempotent. */
  end(): Promise<void> {
    return (this.#ending ??= this.#end());
  }

  async #end(): Promise<void> {
    try {
      const begun = await this.#begun;
      if (begun !== undefined) await this.#hand?.call("endSession", begun.id);
    } catch {
      // There is no session, or no thread: what a killed run leaves is found by the next one.
    } finally {
      this.#hand?.release();
    }
  }
}

function patchingOf(description: Target["description"]): PatchingDescription | null {
  return description.format === "repository" ? description.patching : null;
}

/** By disk: the group of each request that goes into a repository. */
export function groupsOf(
  requests: readonly BackupRequest[],
  sizeOf: (disk: string) => number,
  checkpoint: string,
  hands: StorageHands,
): Map<string, RepositoryGroup> {
  const members = new Map<string, { place: RepositoryPlace; disks: string[] }>();
  for (const { disk, options } of requests) {
    const { repository: place } = options;
    if (place === undefined) continue;
    const key = `${place.address}::${place.group}`;
    const member = members.get(key) ?? { place, disks: [] };
    member.disks.push(disk);
    members.set(key, member);
  }
  const groups = new Map<string, RepositoryGroup>();
  for (const { place, disks } of members.values()) {
    const totalBytes = disks.reduce((sum, disk) => sum + sizeOf(disk), 0);
    const group = new RepositoryGroup({ ...place, diskCount: disks.length, totalBytes, checkpoint }, hands);
    for (const disk of disks) groups.set(disk, group);
  }
  return groups;
}
