// One backup of one or more disks on its way into a repository. Main thread.
//
//   begin: its record under locks/; the backup before it, whose chunks it claims; which of these are there
//   for each disk: the workers fill ids and states (ChunkWriter); then the index is put
//   when the last disk is done: all names stable, manifest, a look whether the run was taken for dead (claims.ts), end
//
// Memory: 32 bytes and one for each chunk of the disks, and 36 to 100 for each that the backup may know.

import { createHash } from "node:crypto";
import { hostname } from "node:os";
import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import { checkDiskSize, chunkCountOf, type ChunkMap, type DiskIndex, encodeIndex } from "../format/index.js";
import { type BackupLevel, encodeManifest, type Manifest, type ManifestDisk } from "../format/manifest.js";
import { sealMetadata } from "../format/metadata.js";
import {
  backupFolder,
  type BackupName,
  backupTime,
  backupTimeNs,
  checkDisk,
  checkGroup,
  CHUNKS_PREFIX,
  indexName,
  isHole,
  manifestName,
} from "../format/names.js";
import { PATCH_RECORD_BYTES, patchOfRecord, PatchTable } from "../format/patch-table.js";
import { ID_BYTES } from "../format/secrets.js";
import type { Repository } from "../repository.js";
import { isRevoked, putDraft } from "../work/condemned.js";
import { SharedIdSet } from "../work/id-set.js";
import { Run } from "../work/runs.js";
import { nowNs } from "./clock.js";
import { dirtyBlocksMemory } from "./dirty-blocks.js";
import { CHUNK_DONE, CHUNK_PENDING, type PatchingDescription } from "./disk-chunks.js";
import { addKnown, addWanted, chunksOf, type Parent, readParent } from "./parent.js";
import {
  type ChunkWriterDescription,
  CNT_NEW_BYTES,
  CNT_NEW_CHUNKS,
  CNT_READ_BYTES,
  COUNTER_WORDS,
} from "./chunk-writer.js";

export interface SessionRequest {
  group: string;
  /** How many disks the backup has: with the last of them it is complete. */
  diskCount: number;
  /** Sizes of the disks, as far as they are known: what the tables of known chunks are made for. */
  totalBytes: number;
  vmConfig?: string | undefined;
  checkpoint?: string | undefined;
  tool: string;
  /** Milliseconds between signs of life; for tests. */
  heartbeatMs?: number | undefined;
}

/** Of a process's sessions: no two backups that it begins within one tick of the clock have the same time. */
let lastTimeNs = 0n;
const SAME_TIME_NS = 1_000_000n;
const MAX_KNOWN = 2 ** 23;
/** With more damage than that the rest is healed by the backups after the next. */
const MAX_WANTED = 2 ** 10;

export class BackupSession {
  readonly repository: Repository;
  readonly parent: Parent | null;
  readonly #request: SessionRequest;
  readonly #run: Run;
  readonly #known: SharedIdSet;
  readonly #wanted: SharedIdSet;
  readonly #disks: SessionDisk[] = [];
  readonly #finished: ManifestDisk[] = [];
  /** What this session has put under groups/, or may have. */
  readonly #own = new Set<string>();
  /** Time of the group's last backup: this one comes after it, whatever the clock says. */
  readonly #lastTime: string | undefined;
  #backup: BackupName | undefined;
  #clock: string | undefined;
  #hasDraft = false;
  #level: { level: BackupLevel; reason: string } | undefined;
  #failure: CowcatcherError | undefined;
  #isOver = false;
  #completing: Promise<void> | undefined;
  #aborting: Promise<void> | undefined;
  #settle: { resolve: () => void; reject: (error: CowcatcherError) => void } = { resolve() {}, reject() {} };
  /** Fulfilled when the backup exists; rejects when there will be none. */
  readonly completed: Promise<void>;

  private constructor(
    repository: Repository,
    request: SessionRequest,
    run: Run,
    lastTime: string | undefined,
    parent: Parent | null,
    known: SharedIdSet,
    wanted: SharedIdSet,
  ) {
    this.#wanted = wanted;
    this.#lastTime = lastTime;
    this.repository = repository;
    this.parent = parent;
    this.#request = request;
    this.#run = run;
    this.#known = known;
    this.completed = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    this.completed.catch(() => {});
  }

  /** @throws CowcatcherError USAGE for a name; IO, NO_SPACE, FORMAT: nothing is left behind then. */
  static async begin(repository: Repository, request: SessionRequest): Promise<BackupSession> {
    checkGroup(request.group);
    const { store, config } = repository;
    const run = await Run.begin(store, "backup", request.heartbeatMs);
    try {
      const last = (await repository.backups(request.group)).at(-1);
      const parent = last === undefined ? null : await readParent(repository, last);
      const parentChunks = parent === null ? 0 : chunksOf(parent);
      const own = chunkCountOf(request.totalBytes, config.chunkBytes);
      const known = SharedIdSet.create(Math.min(MAX_KNOWN, own + parentChunks));
      const wanted = SharedIdSet.create(MAX_WANTED);
      if (parent !== null) {
        await addKnown(known, parent, repository, run.id);
        await addWanted(wanted, repository);
      }
      return new BackupSession(repository, request, run, last?.time, parent, known, wanted);
    } catch (error) {
      await run.end().catch(() => {});
      throw error;
    }
  }

  /** @throws CowcatcherError USAGE for a name, LIMIT for a size. */
  addDisk(name: string, sizeBytes: number, format: string): SessionDisk {
    checkDisk(name);
    if (this.#disks.some((disk) => disk.name === name)) {
      throw new CowcatcherError({
        code: "USAGE",
        object: name,
        problem: "is the name of two disks of one backup",
        hint: "name them with --disk-name",
      });
    }
    const { chunkBytes } = this.repository.config;
    checkDiskSize(name, sizeBytes, chunkBytes);
    const disk = new SessionDisk(this, name, sizeBytes, chunkBytes, format);
    this.#disks.push(disk);
    return disk;
  }

  /** How the backup was made, for its manifest; the first disk that is not incremental makes it a full one. */
  setLevel(level: BackupLevel, reason: string): void {
    if (this.#level === undefined || level === "full") this.#level = { level, reason };
  }

  /**
   * T0, of which the first call decides. Synchronous. A clock that was set back does not make an older backup of the newest:
   * `latest` and the rules of forget go by the times, so it is called a nanosecond later than the group's last one.
   */
  started(ns = nowNs()): void {
    if (this.#backup !== undefined) return;
    const isTaken = ns <= lastTimeNs && ns > lastTimeNs - SAME_TIME_NS;
    lastTimeNs = isTaken ? lastTimeNs + 1n : ns;
    const afterLastNs = this.#lastTime === undefined ? 0n : backupTimeNs(this.#lastTime) + 1n;
    if (lastTimeNs < afterLastNs) this.#clock = backupTime(lastTimeNs);
    const timeNs = lastTimeNs < afterLastNs ? afterLastNs : lastTimeNs;
    this.#backup = { group: this.#request.group, time: backupTime(timeNs) };
  }

  /** What the clock said at T0, where that was before the group's last backup. */
  get clockBehind(): string | undefined {
    return this.#clock;
  }

  get backup(): BackupName {
    this.started();
    if (this.#backup === undefined) throw new Error("a backup has no time");
    return this.#backup;
  }

  writerDescription(counters: SharedArrayBuffer): ChunkWriterDescription {
    const { storeDescription, secrets, config } = this.repository;
    return {
      store: storeDescription,
      secrets: secrets.description,
      chunkBytes: config.chunkBytes,
      compression: config.compression,
      run: this.#run.id,
      known: this.#known.buffers,
      wanted: this.#wanted.buffers,
      counters,
    };
  }

  /** All chunks of the disk are stored: puts its index. @throws CowcatcherError */
  async putIndex(disk: SessionDisk): Promise<void> {
    this.#throwIfFailed();
    const { store, secrets } = this.repository;
    const { sizeBytes, chunkBytes } = disk;
    const content = encodeIndex({ sizeBytes, chunkBytes, ...disk.takeMap() });
    const { backup } = this;
    if (!this.#hasDraft) {
      this.#hasDraft = true;
      await putDraft(store, this.#run.id, backup);
    }
    const name = indexName(backup, disk.name);
    await this.#putOwn(name, await sealMetadata(secrets, name, content));
    this.#finished.push(disk.manifestEntry(createHash("sha256").update(content).digest("hex")));
  }

  /** Another run's object of the same name stays; the one that came second fails. */
  async #putOwn(name: string, object: Uint8Array): Promise<void> {
    this.#own.add(name);
    const { store } = this.repository;
    if ((await store.put(name, object, { durable: true, exclusive: true })) === "stored") return;
    this.#own.delete(name);
    throw new CowcatcherError({
      code: "EXISTS",
      object: `${store.name}::${this.backup.group}`,
      problem: `another backup of the group has the same time, ${this.backup.time}`,
      hint: "run it again",
    });
  }

  /** The index of one more disk is there; with the last one the backup is made to exist. @throws CowcatcherError */
  async diskDone(): Promise<void> {
    this.#throwIfFailed();
    if (this.#finished.length < this.#request.diskCount || this.#isOver) return;
    this.#completing = this.#complete();
    try {
      await this.#completing;
    } catch (error) {
      const typed = toCowcatcherError(error, this.repository.name);
      await this.abort(typed);
      throw typed;
    }
  }

  async #complete(): Promise<void> {
    const { store, secrets } = this.repository;
    const { backup } = this;
    // The names of chunks that other runs have stored, too, and of our own indexes.
    await store.flush(CHUNKS_PREFIX);
    await store.flush(backupFolder(backup));
    this.#throwIfFailed();
    const name = manifestName(backup);
    const content = encodeManifest(this.#manifest(backup));
    await this.#putOwn(name, await sealMetadata(secrets, name, content));
    if (await isRevoked(store, this.#run.id)) {
      await store.delete(name);
      throw revokedError(this.repository.name);
    }
    await store.flush();
    // Until here abort() undoes it; from here on it is too late.
    this.#throwIfFailed();
    this.#isOver = true;
    // The backup exists. Claims that cannot be taken back are those of a run that was killed: prune finds them.
    await this.#run.end().catch(() => {});
    this.#settle.resolve();
  }

  #manifest(backup: BackupName): Manifest {
    const { vmConfig, checkpoint, tool } = this.#request;
    return {
      version: 1,
      ...backup,
      run: this.#run.id,
      finished: new Date().toISOString(),
      level: this.#level?.level ?? "full",
      level_reason: this.#level?.reason ?? "all of the disk was read",
      parent: this.parent?.manifest.time ?? null,
      checkpoint: checkpoint ?? null,
      clock: this.#clock ?? null,
      disks: this.#finished,
      vm_config: vmConfig ?? null,
      host: hostname(),
      tool,
    };
  }

  #throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  /**
   * There will be no backup, unless it exists already. Its chunks stay for the next one, or for prune. Never throws;
   * idempotent: the first error counts.
   */
  abort(error: CowcatcherError): Promise<void> {
    return (this.#aborting ??= this.#abort(error));
  }

  async #abort(error: CowcatcherError): Promise<void> {
    if (this.#isOver) return;
    this.#failure = error;
    this.#settle.reject(error);
    // A manifest that is on its way is awaited: one that came after it was deleted would be a backup without claims.
    await this.#completing?.catch(() => {});
    this.#isOver = true;
    try {
      // The manifest, which came last, first.
      for (const name of [...this.#own].reverse()) await this.repository.store.delete(name);
      await this.#run.end();
    } catch {
      // What stays is what a killed run leaves: prune finds it.
    }
  }
}

/** One disk of a session. */
export class SessionDisk {
  readonly ids: SharedArrayBuffer;
  /** One byte a chunk: CHUNK_PENDING, CHUNK_DONE or CHUNK_PATCHED. */
  readonly states: SharedArrayBuffer;
  readonly counters = new SharedArrayBuffer(COUNTER_WORDS * 8);
  readonly chunkCount: number;
  /** Null where chunks are stored whole: nothing to build on, or a repository of version 1. */
  readonly patching: PatchingDescription | null;
  #parentIndex: DiskIndex | undefined;

  constructor(
    readonly session: BackupSession,
    readonly name: string,
    readonly sizeBytes: number,
    readonly chunkBytes: number,
    readonly format: string,
  ) {
    this.chunkCount = chunkCountOf(sizeBytes, chunkBytes);
    this.ids = new SharedArrayBuffer(Math.max(1, this.chunkCount * ID_BYTES));
    this.states = new SharedArrayBuffer(Math.max(1, this.chunkCount));
    this.patching = this.#describePatching();
  }

  #describePatching(): PatchingDescription | null {
    const { repository } = this.session;
    const index = takeable(this.session, this)?.index;
    if (index === undefined || repository.config.version === 1) return null;
    return {
      parentIds: sharedCopy(index.ids),
      parentPatches: sharedCopy(index.patches.bytes),
      records: new SharedArrayBuffer(this.chunkCount * PATCH_RECORD_BYTES),
      dirty: dirtyBlocksMemory(this.chunkCount),
      comparesBases: repository.storeDescription.kind === "folder",
    };
  }

  /** Chunks that nobody has written are those of the parent's disk: only what changed is read. */
  takeOver(index: DiskIndex): void {
    this.#parentIndex = index;
  }

  get counts(): { newChunks: number; newBytes: number; readBytes: number } {
    const words = new BigInt64Array(this.counters);
    return {
      newChunks: Number(words[CNT_NEW_CHUNKS]),
      newBytes: Number(words[CNT_NEW_BYTES]),
      readBytes: Number(words[CNT_READ_BYTES]),
    };
  }

  /** The finished lists. @throws CowcatcherError INTERNAL where a chunk was passed over. */
  takeMap(): ChunkMap {
    const ids = new Uint8Array(this.ids, 0, this.chunkCount * ID_BYTES);
    const states = new Uint8Array(this.states, 0, this.chunkCount);
    const records = this.patching === null ? undefined : new Uint8Array(this.patching.records);
    const patches: { chunk: number; record: Uint8Array }[] = [];
    for (let chunk = 0; chunk < this.chunkCount; chunk++) {
      if (states[chunk] === CHUNK_DONE) continue;
      let record: Uint8Array | undefined = records?.subarray(
        chunk * PATCH_RECORD_BYTES,
        (chunk + 1) * PATCH_RECORD_BYTES,
      );
      if (states[chunk] === CHUNK_PENDING) {
        const old = this.#parentIndex?.ids.subarray(chunk * ID_BYTES, (chunk + 1) * ID_BYTES);
        if (old === undefined) throw gapError(this.name, chunk * this.chunkBytes);
        ids.set(old, chunk * ID_BYTES);
        record = this.#parentIndex?.patches.find(chunk);
      }
      if (record !== undefined) patches.push({ chunk, record });
    }
    return { ids, patches: PatchTable.from(patches) };
  }

  manifestEntry(indexSum: string): ManifestDisk {
    const ids = new Uint8Array(this.ids);
    let dataChunks = 0;
    for (let chunk = 0; chunk < this.chunkCount; chunk++) if (!isHole(ids, chunk)) dataChunks++;
    const { newChunks, newBytes, readBytes } = this.counts;
    return {
      name: this.name,
      size_bytes: this.sizeBytes,
      index_sha256: indexSum,
      chunk_count: this.chunkCount,
      data_chunk_count: dataChunks,
      new_chunk_count: newChunks,
      new_bytes: newBytes,
      read_bytes: readBytes,
      format: this.format,
    };
  }
}

/** The disk's chunks of the parent that are known to be there: undefined where it cannot be taken over at all. */
export function takeable(
  session: BackupSession,
  disk: SessionDisk,
): { index: DiskIndex; isThere: (chunk: number) => boolean } | undefined {
  const index = session.parent?.indexes.get(disk.name);
  if (index === undefined || index.sizeBytes !== disk.sizeBytes || index.chunkBytes !== disk.chunkBytes)
    return undefined;
  const known = new SharedIdSet(session.writerDescription(disk.counters).known);
  const isThere = (chunk: number): boolean => {
    if (isHole(index.ids, chunk)) return true;
    const record = index.patches.find(chunk);
    const isBaseThere = record === undefined || known.has(patchOfRecord(record).base);
    return isBaseThere && known.has(index.ids, chunk * ID_BYTES);
  };
  return { index, isThere };
}

function sharedCopy(bytes: Uint8Array): SharedArrayBuffer {
  const memory = new SharedArrayBuffer(bytes.length);
  new Uint8Array(memory).set(bytes);
  return memory;
}

function gapError(disk: string, offsetBytes: number): CowcatcherError {
  return new CowcatcherError({
    code: "INTERNAL",
    object: disk,
    problem: "a part of the disk was neither stored nor taken over",
    offsetBytes,
  });
}

function revokedError(storeName: string): CowcatcherError {
  return new CowcatcherError({
    code: "CANCELLED",
    object: storeName,
    problem: "this backup gave no sign of life for so long that a prune has taken it for dead",
    hint: "run it again; what it has stored is used if it is still there",
  });
}
