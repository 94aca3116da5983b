// Who writes which target: what is taken for a job before its target is made, and given back when the job is over.
//
//   claim ─► the target is no image in use (target-guard.ts) ─► nor another job's target ─► its backing chain is opened
//   release ─► the chain is closed, the target is free
//
// A target that is a file is its final name: the folder, by whatever path, and the name in it. Two jobs would each write
// a temporary file, and the last to end would win. A device is its storage, an export its place; there the two would
// mix. Main thread; between the look and the taking nothing is awaited. The target's storage is looked at, and all else
// that the job does there is done, by the storage thread that the claim has. While a call to it hangs, the target stays
// claimed: what undoes it stands behind that call, and would harm whoever writes there next. A job that is over but not
// undone yet is waited for, as no user can see it any more; not for long, as its storage may be what hangs.

import { setTimeout as delay } from "node:timers/promises";
import { CowcatcherError } from "../../errors.js";
import { overlap } from "../../block/file/storage.js";
import { sameExport } from "../../nbd/wire/place.js";
import { mayBeSameImage } from "../../rbd/address.js";
import { NULL_TARGET_PATH } from "../../target/null.js";
import type { BackupRequest } from "../host.js";
import type { StorageHand, StorageHands } from "../storage/protocol.js";
import { type InUse, partsInUse, type TargetPlace } from "./target-guard.js";

/** No chain has this number: a call that does nothing. */
const NO_BACKING = 0;

export interface TargetClaim {
  /** Where the target's storage is dealt with; null for `null:`, which has none. */
  readonly hand: StorageHand | null;
  /** The job will not come about: from now on who wants the target waits for its release. */
  giveUp(): void;
  /** Idempotent; never rejects. Fulfilled when the target is free, which may be long after. */
  release(): Promise<void>;
}

interface Holder {
  readonly jobId: string;
  readonly target: string;
  readonly place: TargetPlace;
  /** The job is over, and only its traces are still removed. */
  isEnding: boolean;
  /** Fulfilled when the target is free. */
  readonly freed: Promise<void>;
  readonly free: () => void;
}

/** For a job that is over: a thread that boots, and a worker that has two seconds to leave (copy/run.ts). */
const UNDO_WAIT_MS = 3_000;

export class TargetClaims {
  readonly #holders = new Set<Holder>();
  readonly #hands: StorageHands;

  constructor(hands: StorageHands) {
    this.#hands = hands;
  }

  /**
   * @throws CowcatcherError USAGE for a target that is an image in use, or in its own backing chain; BUSY for another
   *   job's; what opening the backing file throws; LIMIT. Nothing is held then.
   */
  async claim({ id, options }: BackupRequest, inUse: InUse): Promise<TargetClaim> {
    const { target, backingFile, backingFormat, oldDataOnly } = options;
    // A repository is any number of backups' at a time (repository/work/claims.ts).
    if (options.repository !== undefined || (target === NULL_TARGET_PATH && backingFile === undefined)) {
      return { hand: null, giveUp: () => {}, release: () => Promise.resolve() };
    }
    const parts = await partsInUse(inUse);
    const hand = this.#hands.take();
    let holder: Holder | null = null;
    let backing: number | null;
    try {
      const place = await hand.call("lookAtTarget", { target, inUse: parts });
      holder = place === null ? null : await this.#take(id, target, place);
      const backed = { path: target, backingFile, backingFormat, oldDataOnly };
      backing =
        backingFile === undefined ? null : await hand.call("openBacking", { target: backed, inUse: parts });
    } catch (error) {
      if (holder !== null) this.#free(holder);
      hand.release();
      throw error;
    }
    const giveUp = (): void => {
      if (holder !== null) holder.isEnding = true;
    };
    let releasing: Promise<void> | undefined;
    const release = async (): Promise<void> => {
      giveUp();
      if (holder !== null && !hand.isBusy) this.#free(holder);
      // Read-only: there is nothing that its closing could lose. It stands behind whatever hangs.
      if (backing !== null) await hand.call("closeBacking", backing).catch(() => undefined);
      else if (hand.isBusy) await hand.call("closeBacking", NO_BACKING).catch(() => undefined);
      if (holder !== null) this.#free(holder);
      hand.release();
    };
    return { hand, giveUp, release: () => (releasing ??= release()) };
  }

  async #take(jobId: string, target: string, place: TargetPlace): Promise<Holder> {
    const deadlineMs = performance.now() + UNDO_WAIT_MS;
    for (;;) {
      const other = [...this.#holders].find((holder) => isSamePlace(holder.place, place));
      if (other === undefined) break;
      const leftMs = deadlineMs - performance.now();
      if (leftMs <= 0 || !other.isEnding) throw targetInUse(target, other);
      await Promise.race([other.freed, delay(leftMs, undefined, { ref: false })]);
    }
    let free: () => void = () => {};
    const freed = new Promise<void>((resolve) => (free = resolve));
    const holder = { jobId, target, place, isEnding: false, freed, free };
    this.#holders.add(holder);
    return holder;
  }

  #free(holder: Holder): void {
    this.#holders.delete(holder);
    holder.free();
  }
}

function isSamePlace(a: TargetPlace, b: TargetPlace): boolean {
  if (a.kind === "export" && b.kind === "export") return sameExport(a.address, b.address) !== "no";
  if (a.kind === "rbd" && b.kind === "rbd") return mayBeSameImage(a.address, b.address);
  if (a.kind === "device" && b.kind === "device") return overlap(a.storage, b.storage);
  return a.kind === "file" && b.kind === "file" && a.name === b.name;
}

function targetInUse(target: string, { jobId, target: other }: Holder): CowcatcherError {
  return new CowcatcherError({
    code: "BUSY",
    object: target,
    problem: `the job ${jobId} writes there${other === target ? "" : ` already, as '${other}'`}`,
    hint: "give each job a target of its own, or wait until that one is over",
  });
}
