// A repository in a MortalStore, and backups of disks of a few chunks into it, in one thread.
import { ChunkWriter } from "../../../src/repository/backup/chunk-writer.js";
import { DirtyBlocks } from "../../../src/repository/backup/dirty-blocks.js";
import { DiskChunks } from "../../../src/repository/backup/disk-chunks.js";
import { BackupSession } from "../../../src/repository/backup/session.js";
import type { FormatVersion } from "../../../src/repository/format/config.js";
import { isHole } from "../../../src/repository/format/names.js";
import { ID_BYTES, Secrets } from "../../../src/repository/format/secrets.js";
import { ChunkReader } from "../../../src/repository/read/chunk-reader.js";
import { Repository } from "../../../src/repository/repository.js";
import { type Verdict, runObject } from "../../../src/repository/work/runs.js";
import type { Store } from "../../../src/repository/store/store.js";

export const CHUNK_BYTES = 64;
const ID = "5a".repeat(16);

export function smallRepository(store: Store, version: FormatVersion = 2): Repository {
  const config = {
    version,
    id: ID,
    created: "",
    chunkBytes: CHUNK_BYTES,
    compression: null,
    encryption: "none",
  } as const;
  const secrets = new Secrets({ repositoryId: ID, master: null });
  return Repository.assemble({ kind: "folder", name: "memory", path: "" }, store, config, secrets);
}

export interface BackUpOptions {
  group?: string;
  timeNs?: bigint;
  /** [offset, length] of what has changed since the last backup, where something keeps track; nothing else is looked at. */
  changes?: readonly (readonly [number, number])[];
  version?: FormatVersion;
}

/** @returns its name */
export async function backUp(
  store: Store,
  chunks: readonly Buffer[],
  { group = "vm", timeNs, changes, version }: BackUpOptions = {},
): Promise<{ group: string; time: string }> {
  const session = await BackupSession.begin(smallRepository(store, version), {
    group,
    diskCount: 1,
    totalBytes: chunks.length * CHUNK_BYTES,
    tool: "test",
    heartbeatMs: 0,
  });
  try {
    session.started(timeNs);
    const disk = session.addDisk("disk", chunks.length * CHUNK_BYTES, "raw");
    const writer = new ChunkWriter(session.writerDescription(disk.counters), "1", store);
    const diskChunks = new DiskChunks(writer, disk);
    if (changes !== undefined && disk.patching !== null) {
      const dirty = new DirtyBlocks(disk.patching.dirty, CHUNK_BYTES);
      for (const [offset, length] of changes) dirty.note(offset, length);
      dirty.setKnown();
    }
    await Promise.all(chunks.map((content, index) => diskChunks.store(index, content)));
    await session.putIndex(disk);
    await session.diskDone();
  } catch (error) {
    await session.abort(error as never);
    throw error;
  }
  return session.backup;
}

/** Every byte of a backup's disk. @throws where one cannot be had */
export async function readBack(store: Store, name: { group: string; time: string }): Promise<Buffer> {
  const repository = smallRepository(store);
  const manifest = await repository.readManifest(name);
  const index = await repository.readIndex(manifest, "disk");
  const { ids, sizeBytes } = index;
  const content = Buffer.alloc(sizeBytes);
  const reader = new ChunkReader(store, repository.secrets, CHUNK_BYTES);
  for (let at = 0; at < ids.length; at += ID_BYTES) {
    const chunk = at / ID_BYTES;
    if (isHole(ids, chunk)) continue;
    const from = chunk * CHUNK_BYTES;
    await reader.readChunk(index, chunk, content.subarray(from, from + CHUNK_BYTES));
  }
  return content;
}

/** All runs but the judge's own are those of processes that are gone. */
export async function allAreDead(store: Store, run: string): Promise<Verdict> {
  return (await store.head(runObject(run))) === undefined ? "ended" : "dead";
}
