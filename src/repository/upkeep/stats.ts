// What a repository holds, in numbers.

import { CHUNKS_PREFIX, DAMAGED_PREFIX, GROUPS_PREFIX, parseChunkName } from "../format/names.js";
import type { Repository } from "../repository.js";
import { inParallel, READERS } from "../work/parallel.js";

export interface GroupStats {
  group: string;
  backups: number;
  /** T0 of the last one. */
  last: string;
  /** Sizes of the last one's disks, holes included; 0 where it cannot be read. */
  diskBytes: number;
  /** What its backups brought that was not there. */
  newBytes: number;
}

export interface RepositoryStats {
  groups: number;
  /** By name. */
  byGroup: GroupStats[];
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
    groups: 0,
    byGroup: [],
    backups: entries.length,
    diskBytes: 0,
    chunks: 0,
    chunkBytes: 0,
    metadataBytes: 0,
    damagedChunks: 0,
  };
  const groups = new Map<string, GroupStats>();
  await inParallel(entries, READERS, async (entry) => {
    const { group, time } = entry;
    const manifest = await repository.readManifest(entry).catch(() => undefined);
    const disks = manifest?.disks ?? [];
    const diskBytes = disks.reduce((sum, disk) => sum + disk.size_bytes, 0);
    stats.diskBytes += diskBytes;
    const known = groups.get(group) ?? { group, backups: 0, last: "", diskBytes: 0, newBytes: 0 };
    groups.set(group, {
      group,
      backups: known.backups + 1,
      ...(time > known.last ? { last: time, diskBytes } : { last: known.last, diskBytes: known.diskBytes }),
      newBytes: known.newBytes + disks.reduce((sum, disk) => sum + disk.new_bytes, 0),
    });
  });
  stats.groups = groups.size;
  stats.byGroup = [...groups.values()].sort((a, b) => (a.group < b.group ? -1 : 1));
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
