// The backup before this one: which chunks its disks have, and which of them are there and may be relied on.

import { toCowcatcherError } from "../../errors.js";
import type { DiskIndex } from "../format/index.js";
import type { Manifest } from "../format/manifest.js";
import {
  type BackupName,
  chunkName,
  CHUNKS_PREFIX,
  DAMAGED_PREFIX,
  isHole,
  parseChunkName,
} from "../format/names.js";
import { ID_BYTES } from "../format/secrets.js";
import type { Repository } from "../repository.js";
import { Claimer, type Condemned } from "../work/claims.js";
import { IdSet, type SharedIdSet } from "../work/id-set.js";

/** A backup that was taken before, of the same group, as far as it can be used. */
export interface Parent {
  manifest: Manifest;
  indexes: ReadonlyMap<string, DiskIndex>;
}

/** The last backup of the group, if it can be read; a damaged one only costs the dedupe by it. */
export async function readParent(repository: Repository, last: BackupName): Promise<Parent | null> {
  try {
    const manifest = await repository.readManifest(last);
    const indexes = new Map<string, DiskIndex>();
    for (const { name } of manifest.disks) indexes.set(name, await repository.readIndex(manifest, name));
    return { manifest, indexes };
  } catch (error) {
    const { code } = toCowcatcherError(error);
    if (code === "NOT_FOUND" || code === "FORMAT") return null;
    throw error;
  }
}

export function chunksOf({ indexes }: Parent): number {
  let count = 0;
  for (const { ids, patches } of indexes.values()) count += ids.length / ID_BYTES + patches.count;
  return count;
}

/** Claims all chunks of the parent at once, and then looks which of them are there. */
export async function addKnown(
  known: SharedIdSet,
  parent: Parent,
  { store }: Repository,
  run: string,
): Promise<void> {
  const wanted = new IdSet();
  for (const { ids, patches } of parent.indexes.values()) {
    for (const base of patches.bases()) wanted.add(base);
    for (let chunk = 0; chunk * ID_BYTES < ids.length; chunk++)
      if (!isHole(ids, chunk)) wanted.add(ids, chunk * ID_BYTES);
  }
  if (wanted.size === 0) return;
  const condemned: Condemned = await new Claimer(store, run, "0").claimAll(wanted.values());
  for await (const batch of store.list(CHUNKS_PREFIX)) {
    for (const { name } of batch) {
      const chunk = parseChunkName(name);
      if (chunk === undefined || !wanted.has(chunk.id)) continue;
      if (!condemned.isCondemned(chunk.id, chunk.generation)) known.add(chunk.id);
    }
  }
}

/**
 * Chunks that verify has found to be missing or bad, and that are not there again: whoever has the content of one stores it
 * whole, which heals the backups that refer to it.
 */
export async function addWanted(wanted: SharedIdSet, { store }: Repository): Promise<void> {
  for await (const batch of store.list(DAMAGED_PREFIX)) {
    for (const { name } of batch) {
      const chunk = parseChunkName(name.replace(DAMAGED_PREFIX, CHUNKS_PREFIX));
      if (chunk !== undefined && (await store.head(chunkName(chunk.id))) === undefined) wanted.add(chunk.id);
    }
  }
}
