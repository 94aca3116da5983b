// What a repository holds, in numbers.

import { CHUNKS_PREFIX, DAMAGED_PREFIX, GROUPS_PREFIX, parseChunkName } from "../format/names.js";
import type { Repository } from "../repository.js";
import { inParallel, READERS } from "../work/parallel.js";

export interface RepositoryStats {
  groups: number;
  backups: number;
  /** Sizes of all disks of all backups, holes included. */
  diskBytes: number;
  chunks: number;
  chunkBytes: number;
  metadataBytes: number;
  damagedChunks: number;
}

const ALL = { details: (): boolean => true };

/** Backups that cannot be read count without their size. @throws CowcatcherError IO */
export async function readStats(repository: Repository): Promise<RepositoryStats> {
  const { store } = repository;
  const entries = await repository.backups();
  const stats: RepositoryStats = {
    groups: new Set(entries.map(({ group }) => group)).size,
    backups: entries.length,
    diskBytes: 0,
    chunks: 0,
    chunkBytes: 0,
    metadataBytes: 0,
    damagedChunks: 0,
  };
  await inParallel(entries, READERS, async (entry) => {
    const manifest = await repository.readManifest(entry).catch(() => undefined);
    for (const { size_bytes: bytes } of manifest?.disks ?? []) stats.diskBytes += bytes;
  });
  for await (const batch of store.list(CHUNKS_PREFIX, ALL)) {
    for (const { name, sizeBytes } of batch) {
      if (parseChunkName(name) === undefined) continue;
      stats.chunks++;
      stats.chunkBytes += sizeBytes;
    }
  }
  for await (const batch of store.list(GROUPS_PREFIX, ALL)) {
    for (const { sizeBytes } of batch) stats.metadataBytes += sizeBytes;
  }
  for await (const batch of store.list(DAMAGED_PREFIX)) stats.damagedChunks += batch.length;
  return stats;
}
