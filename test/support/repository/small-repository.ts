// A repository in a MortalStore, and backups of disks of a few chunks into it, in one thread.
import { ChunkWriter } from "../../../src/repository/backup/chunk-writer.js";
import { BackupSession, CHUNK_DONE } from "../../../src/repository/backup/session.js";
import { ID_BYTES, Secrets } from "../../../src/repository/format/secrets.js";
import { ChunkReader } from "../../../src/repository/read/chunk-reader.js";
import { Repository } from "../../../src/repository/repository.js";
import { type Verdict, runObject } from "../../../src/repository/work/runs.js";
import type { Store } from "../../../src/repository/store/store.js";

export const CHUNK_BYTES = 64;
const ID = "5a".repeat(16);

export function smallRepository(store: Store): Repository {
  const config = {
    id: ID,
    created: "",
    chunkBytes: CHUNK_BYTES,
    compression: null,
    encryption: "none",
  } as const;
  const secrets = new Secrets({ repositoryId: ID, master: null });
  return Repository.assemble({ kind: "folder", name: "memory", path: "" }, store, config, secrets);
}

/** @returns its name */
export async function backUp(
  store: Store,
  chunks: readonly Buffer[],
  { group = "vm", timeNs }: { group?: string; timeNs?: bigint } = {},
): Promise<{ group: string; time: string }> {
  const session = await BackupSession.begin(smallRepository(store), {
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
    await Promise.all(
      chunks.map(async (content, index) => {
        new Uint8Array(disk.ids).set(await writer.write(content), index * ID_BYTES);
        new Uint8Array(disk.states)[index] = CHUNK_DONE;
      }),
    );
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
  const { ids, sizeBytes } = await repository.readIndex(manifest, "disk");
  const content = Buffer.alloc(sizeBytes);
  const reader = new ChunkReader(store, repository.secrets, CHUNK_BYTES);
  for (let at = 0; at < ids.length; at += ID_BYTES) {
    const from = (at / ID_BYTES) * CHUNK_BYTES;
    await reader.read(ids.subarray(at, at + ID_BYTES), content.subarray(from, from + CHUNK_BYTES));
  }
  return content;
}

/** All runs but the judge's own are those of processes that are gone. */
export async function allAreDead(store: Store, run: string): Promise<Verdict> {
  return (await store.head(runObject(run))) === undefined ? "ended" : "dead";
}
