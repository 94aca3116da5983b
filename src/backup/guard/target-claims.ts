// Who writes which target: what is taken for a job before its target is made, and given back when the job is over.
//
//   claim ─► the target is no image in use (target-guard.ts) ─► nor another job's target ─► its backing chain is opened
//   release ─► the chain is closed, the target is free
//
// A target that is a file is its final name: the folder, by whatever path, and the name in it. Two jobs would each write
// a temporary file, and the last to end would win. A device is its storage, an export its place; there the two would
// mix. Main thread; between the look and the taking nothing is awaited. The target's storage is looked at, and all else
// that the job does there is done, by the storage thread that the claim has. While a call to it hangs, the target stays
// claimed: what undoes it stands behind that call, and would harm whoever writes there next.

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
  /** Idempotent; never rejects. Fulfilled when the target is free, which may be long after. */
  release(): Promise<void>;
}

interface Holder {
  jobId: string;
  target: string;
  place: TargetPlace;
}

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
    const { target, backingFile, backingFormat } = options;
    // A repository is any number of backups' at a time (repository/work/claims.ts).
    if (options.repository !== undefined || (target === NULL_TARGET_PATH && backingFile === undefined)) {
      return { hand: null, release: () => Promise.resolve() };
    }
    const parts = await partsInUse(inUse);
    const hand = this.#hands.take();
    let holder: Holder | null = null;
    let backing: number | null;
    try {
      const place = await hand.call("lookAtTarget", { target, inUse: parts });
      holder = place === null ? null : this.#take(id, target, place);
      const backed = { path: target, backingFile, backingFormat };
      backing =
        backingFile === undefined ? null : await hand.call("openBacking", { target: backed, inUse: parts });
    } catch (error) {
      if (holder !== null) this.#holders.delete(holder);
      hand.release();
      throw error;
    }
    let releasing: Promise<void> | undefined;
    const release = async (): Promise<void> => {
      if (holder !== null && !hand.isBusy) this.#holders.delete(holder);
      // Read-only: there is nothing that its closing could lose. It stands behind whatever hangs.
      if (backing !== null) await hand.call("closeBacking", backing).catch(() => undefined);
      else if (hand.isBusy) await hand.call("closeBacking", NO_BACKING).catch(() => undefined);
      if (holder !== null) this.#holders.delete(holder);
      hand.release();
    };
    return { hand, release: () => (releasing ??= release()) };
  }

  #take(jobId: string, target: string, place: TargetPlace): Holder {
    for (const other of this.#holders) {
      if (isSamePlace(other.place, place)) throw targetInUse(target, other);
    }
    const holder = { jobId, target, place };
    this.#holders.add(holder);
    return holder;
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
