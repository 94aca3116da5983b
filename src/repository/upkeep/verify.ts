// Reading back what a repository holds: every manifest, every index, every chunk that they refer to (or a part of them),
// decrypted, decompressed, and compared with its id. A bad chunk is named with the backups that it harms, and set aside,
// so that the next backup that has its content stores it again; a missing one comes back the same way.
//
// Memory: the ids of the chunks, a few hundred bytes for each bad one, and READERS chunks. A second look at the indexes finds
// whom the bad ones harm.

import { randomBytes } from "node:crypto";
import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import { ChunkDecoder, maxChunkObjectBytes } from "../format/chunk.js";
import { sealMetadata } from "../format/metadata.js";
import {
  backupFolder,
  type BackupName,
  chunkName,
  CHUNKS_PREFIX,
  DAMAGED_PREFIX,
  isHole,
  parseChunkName,
  VERIFIED,
} from "../format/names.js";
import { patchOfRecord } from "../format/patch-table.js";
import { ID_BYTES } from "../format/secrets.js";
import { ObjectMemory } from "../read/object-memory.js";
import type { Repository } from "../repository.js";
import { isNotFound } from "../store/store.js";
import { deleteUnclaimed } from "../work/condemned.js";
import { type ListedChunk, MAX_LIST_ENTRIES } from "../work/id-list.js";
import { IdSet } from "../work/id-set.js";
import { inParallel, READERS } from "../work/parallel.js";
import { Run } from "../work/runs.js";

export interface VerifyOptions {
  /** Undefined: all. */
  backups?: readonly BackupName[] | undefined;
  /** Of the chunks, 0 to 100: others each time. */
  samplePercent: number;
  /** Called as chunks are read. */
  onProgress?: ((doneChunks: number, totalChunks: number) => void) | undefined;
  isCancelled?: (() => boolean) | undefined;
  heartbeatMs?: number | undefined;
}

export interface DamagedBackup extends BackupName {
  /** What is wrong, one line each: of its manifest, an index, or chunks. */
  problems: string[];
}

export interface VerifyResult {
  backups: number;
  chunks: number;
  /** Chunks that were read. */
  checked: number;
  checkedBytes: number;
  damaged: DamagedBackup[];
  missingChunks: number;
  badChunks: number;
  /** Of the bad ones those that could be set aside. */
  setAside: number;
}

/** As many as one backup looks for. */
const MAX_NOTED_MISSING = 1000;

/** What is wrong with a chunk, by its id in latin1. */
type Faults = Map<string, string>;

/** @throws CowcatcherError IO where the store cannot be read; damage is in the result. */
export async function verify(repository: Repository, options: VerifyOptions): Promise<VerifyResult> {
  const result: VerifyResult = {
    backups: 0,
    chunks: 0,
    checked: 0,
    checkedBytes: 0,
    damaged: [],
    missingChunks: 0,
    badChunks: 0,
    setAside: 0,
  };
  const wanted = new IdSet();
  const readable: BackupName[] = [];
  for (const backup of options.backups ?? (await repository.backups())) {
    result.backups++;
    const problems = await addIds(repository, backup, wanted);
    if (problems.length > 0) result.damaged.push({ group: backup.group, time: backup.time, problems });
    else readable.push(backup);
  }
  result.chunks = wanted.size;
  const faults = await checkChunks(repository, wanted, options, result);
  const harmed = await harmedBy(repository, readable, faults);
  result.damaged.push(...harmed);
  const harmedTimes = new Set(result.damaged.map(({ group, time }) => `${group}/${time}`));
  if (options.samplePercent >= 100 && options.isCancelled?.() !== true) {
    await noteVerified(
      repository,
      readable.filter(({ group, time }) => !harmedTimes.has(`${group}/${time}`)),
    );
  }
  return result;
}

/** @returns what is wrong with manifest and indexes */
async function addIds(repository: Repository, backup: BackupName, wanted: IdSet): Promise<string[]> {
  const problems: string[] = [];
  try {
    const manifest = await repository.readManifest(backup);
    for (const { name } of manifest.disks) {
      try {
        const { ids, patches } = await repository.readIndex(manifest, name);
        for (const base of patches.bases()) wanted.add(base);
        for (let at = 0; at < ids.length; at += ID_BYTES)
          if (!isHole(ids, at / ID_BYTES)) wanted.add(ids, at);
      } catch (error) {
        problems.push(damageOf(error));
      }
    }
  } catch (error) {
    problems.push(damageOf(error));
  }
  return problems;
}

/** A text for damage; an error of the store itself is thrown. */
function damageOf(error: unknown): string {
  const typed: CowcatcherError = toCowcatcherError(error);
  if (typed.code === "FORMAT" || typed.code === "NOT_FOUND" || typed.code === "LIMIT") return typed.problem;
  throw typed;
}

async function checkChunks(
  repository: Repository,
  wanted: IdSet,
  options: VerifyOptions,
  result: VerifyResult,
): Promise<Faults> {
  const faults: Faults = new Map();
  const found = new IdSet(wanted.size);
  const isSampled = sampler(options.samplePercent);
  const bad: ListedChunk[] = [];
  const { store, secrets, config } = repository;
  const decoder = new ChunkDecoder(secrets, config.chunkBytes, repository.name);
  const maxBytes = maxChunkObjectBytes(config.chunkBytes);
  const objects = new ObjectMemory(maxBytes);
  for await (const batch of store.list(CHUNKS_PREFIX)) {
    await inParallel(batch, READERS, async ({ name }) => {
      const chunk = parseChunkName(name);
      if (chunk === undefined || !wanted.has(chunk.id) || options.isCancelled?.() === true) return;
      if (!isSampled(chunk.id)) {
        found.add(chunk.id);
        return;
      }
      try {
        await objects.with(async (memory) => {
          const object = await store.get(name, maxBytes, { memory });
          decoder.check(name, chunk.id, object);
          result.checkedBytes += object.length;
        });
        found.add(chunk.id);
      } catch (error) {
        if (isNotFound(error)) return;
        faults.set(keyOf(chunk.id), damageOf(error));
        bad.push(chunk);
      }
      result.checked++;
      options.onProgress?.(result.checked, wanted.size);
    });
  }
  decoder.close();
  if (options.isCancelled?.() === true) return new Map();
  // A chunk of which another object is whole harms nobody, but the bad object goes.
  for (const { id } of bad) if (found.has(id)) faults.delete(keyOf(id));
  const missing: Uint8Array[] = [];
  for (const id of wanted.values()) {
    if (found.has(id) || faults.has(keyOf(id))) continue;
    faults.set(keyOf(id), `the chunk ${chunkName(id)} is missing`);
    result.missingChunks++;
    if (missing.length < MAX_NOTED_MISSING) missing.push(Uint8Array.from(id));
  }
  result.badChunks = bad.length;
  if (bad.length > 0) result.setAside = await setAside(repository, bad, options);
  await noteMissing(repository, missing);
  return faults;
}

/** So that a backup that has the content of one stores it whole, and not as a patch (backup/parent.ts). */
async function noteMissing({ store }: Repository, missing: readonly Uint8Array[]): Promise<void> {
  try {
    for (const id of missing) {
      const name = chunkName(id).replace(CHUNKS_PREFIX, DAMAGED_PREFIX);
      await store.put(name, new Uint8Array(0), { durable: true });
    }
    if (missing.length > 0) await store.flush();
  } catch {
    // A store that may only be read, or is full.
  }
}

/**
 * Which chunks this run looks at, by the first bytes of their ids and a starting point of its own: with 5 % twenty
 * runs see most of them, whatever order the store lists them in.
 */
function sampler(percent: number): (id: Uint8Array) => boolean {
  if (percent >= 100) return () => true;
  const span = Math.round((percent / 100) * 0x1000000);
  const start = randomBytes(4).readUInt32LE() % 0x1000000;
  return (id) => (((id[0] << 16) | (id[1] << 8) | id[2]) - start + 0x1000000) % 0x1000000 < span;
}

/**
 * Bad chunks go as unused ones do, by the claims' rules: a run at work that counts on the object keeps it, and is told
 * of by the next verify. What is deleted is kept under damaged/ first.
 */
async function setAside(
  repository: Repository,
  bad: readonly ListedChunk[],
  { heartbeatMs }: VerifyOptions,
): Promise<number> {
  const { store, secrets, config } = repository;
  let run: Run;
  try {
    run = await Run.begin(store, "verify", heartbeatMs);
  } catch {
    // A store that may only be read is verified all the same.
    return 0;
  }
  const decoder = new ChunkDecoder(secrets, config.chunkBytes, repository.name);
  try {
    let setAsideCount = 0;
    for (let first = 0; first < bad.length; first += MAX_LIST_ENTRIES) {
      // That backups refer to a bad chunk is the reason, not an obstacle; one that was healed since it was read stays.
      // Looked at once they are condemned: from then on nobody puts anything under these names who has not claimed them.
      const keep = new IdSet();
      const { deleted } = await deleteUnclaimed(bad.slice(first, first + MAX_LIST_ENTRIES), {
        store,
        secrets,
        run,
        addNewMarks: async () => {
          for (const chunk of bad.slice(first, first + MAX_LIST_ENTRIES))
            if (!(await isCopiedAside(repository, decoder, chunk))) keep.add(chunk.id);
        },
        isMarked: (id) => keep.has(id),
      });
      setAsideCount += deleted.length;
    }
    await store.flush();
    return setAsideCount;
  } finally {
    decoder.close();
    await run.end();
  }
}

/** Whether the object is bad, and a copy of it under damaged/; one that is gone, or finds no room there, stays as it is. */
async function isCopiedAside(
  { store, config }: Repository,
  decoder: ChunkDecoder,
  { id, generation }: ListedChunk,
): Promise<boolean> {
  const name = chunkName(id, generation);
  try {
    const object = await store.get(name, maxChunkObjectBytes(config.chunkBytes) * 2);
    try {
      decoder.check(name, id, Buffer.from(object));
      return false;
    } catch {
      await store.put(name.replace(CHUNKS_PREFIX, DAMAGED_PREFIX), object, { durable: true });
      return true;
    }
  } catch (error) {
    // Larger than any chunk: not to be kept, and bad for certain.
    return error instanceof CowcatcherError && error.code === "LIMIT";
  }
}

async function harmedBy(
  repository: Repository,
  backups: readonly BackupName[],
  faults: Faults,
): Promise<DamagedBackup[]> {
  if (faults.size === 0) return [];
  const harmed: DamagedBackup[] = [];
  for (const backup of backups) {
    try {
      const problems = await faultsOf(repository, backup, faults);
      if (problems.length > 0) harmed.push({ group: backup.group, time: backup.time, problems });
    } catch (error) {
      // Forgotten meanwhile.
      if (!isNotFound(error)) throw error;
    }
  }
  return harmed;
}

async function faultsOf(repository: Repository, backup: BackupName, faults: Faults): Promise<string[]> {
  const problems: string[] = [];
  const manifest = await repository.readManifest(backup);
  for (const { name } of manifest.disks) {
    const { ids, patches, chunkBytes } = await repository.readIndex(manifest, name);
    const note = (chunk: number, id: Uint8Array): void => {
      const fault = faults.get(keyOf(id));
      if (fault !== undefined) problems.push(`${name} at offset ${chunk * chunkBytes}: ${fault}`);
    };
    for (let chunk = 0; chunk * ID_BYTES < ids.length; chunk++) {
      note(chunk, ids.subarray(chunk * ID_BYTES, (chunk + 1) * ID_BYTES));
      const record = patches.find(chunk);
      if (record !== undefined) note(chunk, patchOfRecord(record).base);
    }
  }
  return problems;
}

function keyOf(id: Uint8Array): string {
  return Buffer.from(id.buffer, id.byteOffset, id.length).toString("latin1");
}

/** Beside the manifest, which is written once: when the backup was found to be whole. */
async function noteVerified(repository: Repository, backups: readonly BackupName[]): Promise<void> {
  const { store, secrets } = repository;
  for (const backup of backups) {
    const name = backupFolder(backup) + VERIFIED;
    const content = Buffer.from(JSON.stringify({ verified: new Date().toISOString() }));
    try {
      await store.touch(name, await sealMetadata(secrets, name, content));
    } catch {
      // A store that may only be read.
      return;
    }
  }
}
