// Who writes which target: what is taken for a job before its target is made, and given back when the job is over.
//
//   claim ─► the target is no image in use (target-guard.ts) ─► nor another job's target ─► its backing chain is opened
//   release ─► the chain is closed, the target is free
//
// A target that is a file is its final name: the folder, by whatever path, and the name in it. Two jobs would each write
// a temporary file, and the last to end would win. A device is its storage, an export its place; there the two would
// mix. Main thread; between the look and the taking nothing is awaited.

import { dirname, basename, resolve } from "node:path";
import * as fs from "node:fs";
import { CowcatcherError } from "../../errors.js";
import { overlap, type Storage, storageAt } from "../../block/file/storage.js";
import { resolveExport, type ResolvedExport, sameExport } from "../../nbd/wire/place.js";
import { isNbdUri, parseNbdUri } from "../../nbd/wire/uri.js";
import { isRbdAddress, mayBeSameImage, parseRbdAddress, type RbdAddress } from "../../rbd/address.js";
import { NULL_TARGET_PATH } from "../../target/null.js";
import { openBacking } from "./backing-check.js";
import type { BackupRequest } from "../host.js";
import { type InUse, refuseImageAsTarget } from "./target-guard.js";

type TargetPlace =
  | { kind: "export"; address: ResolvedExport }
  | { kind: "rbd"; address: RbdAddress }
  | { kind: "device"; storage: Storage }
  | { kind: "file"; name: string };

export interface TargetClaim {
  /** Idempotent; never rejects. */
  release(): Promise<void>;
}

interface Holder {
  jobId: string;
  target: string;
  place: TargetPlace;
}

export class TargetClaims {
  readonly #holders = new Set<Holder>();

  /**
   * @throws CowcatcherError USAGE for a target that is an image in use, or in its own backing chain; BUSY for another
   *   job's; what opening the backing file throws. Nothing is held then.
   */
  async claim({ id, options }: BackupRequest, inUse: InUse): Promise<TargetClaim> {
    const { target, backingFile, backingFormat } = options;
    if (target === NULL_TARGET_PATH && backingFile === undefined) return { release: () => Promise.resolve() };
    await refuseImageAsTarget(target, inUse);
    const place = await placeOf(target);
    const holder = place === null ? null : this.#take(id, target, place);
    try {
      const backing = await openBacking({ path: target, backingFile, backingFormat }, inUse);
      let isHeld = true;
      const release = async (): Promise<void> => {
        if (!isHeld) return;
        isHeld = false;
        if (holder !== null) this.#holders.delete(holder);
        // Read-only: there is nothing that its closing could lose.
        await backing?.close().catch(() => {});
      };
      return { release };
    } catch (error) {
      if (holder !== null) this.#holders.delete(holder);
      throw error;
    }
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

/** Null for `null:`, and for what cannot be a target: making it says why. */
async function placeOf(target: string): Promise<TargetPlace | null> {
  if (target === NULL_TARGET_PATH) return null;
  if (isNbdUri(target)) return { kind: "export", address: await resolveExport(parseNbdUri(target)) };
  if (isRbdAddress(target)) return { kind: "rbd", address: parseRbdAddress(target) };
  const storage = await storageAt(target);
  if (storage?.isBlockDevice === true) return { kind: "device", storage };
  const path = await fs.promises.realpath(target).catch(() => resolve(target));
  const folder = await storageAt(dirname(path));
  return folder === null ? null : { kind: "file", name: `${folder.id}/${basename(path)}` };
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
