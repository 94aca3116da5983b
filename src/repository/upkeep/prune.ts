// Freeing what no backup refers to: mark and sweep, beside backups that run (work/claims.ts).
//
// Memory is bounded, whatever the repository holds: the chunks are dealt with in ranges of their ids, each of at most
// MARKS_PER_PASS chunks that are there; for each range all indexes are read and the ids in it are kept (100 bytes each), then
// the chunks of the range are listed, and those without a mark go, MAX_LIST_ENTRIES at a time.
//
// What cannot be read is not known to refer to nothing: with a damaged manifest or index nothing is swept.

import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import { type BackupName, CHUNKS_PREFIX, isHole, parseChunkName } from "../format/names.js";
import { ID_BYTES } from "../format/secrets.js";
import type { BackupEntry, Repository } from "../repository.js";
import { isNotFound } from "../store/store.js";
import { deadRuns, deleteUnclaimed, readClaims, readDraft, type Sweep } from "../work/condemned.js";
import { type ListedChunk, MAX_LIST_ENTRIES } from "../work/id-list.js";
import { IdSet } from "../work/id-set.js";
import { inParallel } from "../work/parallel.js";
import { judge, readLocks, Run } from "../work/runs.js";
import { removeBackup } from "./forget.js";

export interface PruneOptions {
  dryRun: boolean;
  onProgress?: ((progress: PruneResult) => void) | undefined;
  /** For tests. */
  marksPerPass?: number | undefined;
  heartbeatMs?: number | undefined;
  judge?: typeof judge | undefined;
}

export interface PruneResult {
  /** Chunks that were looked at. */
  chunks: number;
  /** Chunks that backups refer to. */
  used: number;
  deleted: number;
  deletedBytes: number;
  /** No backup refers to them, but a run at work counts on them. */
  claimed: number;
  /** Folders of backups that were never completed. */
  unfinished: number;
  passes: number;
}

const MARKS_PER_PASS = 2 ** 21;
const PREFIX_COUNT = 256;
/** Indexes in memory at a time, of 8 MiB for each TiB of a disk. */
const INDEX_READERS = 4;

/** @throws CowcatcherError FORMAT, NOT_FOUND for a backup that cannot be read; IO. */
export async function prune(repository: Repository, options: PruneOptions): Promise<PruneResult> {
  const run = await Run.begin(repository.store, "prune", options.heartbeatMs);
  try {
    return await new Prune(repository, run, options).run();
  } finally {
    await run.end();
  }
}

interface Candidate extends ListedChunk {
  sizeBytes: number;
}

function bytesOf(candidates: readonly Candidate[]): number {
  return candidates.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
}

class Prune {
  readonly #repository: Repository;
  readonly #run: Run;
  readonly #options: PruneOptions;
  readonly #result: PruneResult = {
    chunks: 0,
    used: 0,
    deleted: 0,
    deletedBytes: 0,
    claimed: 0,
    unfinished: 0,
    passes: 0,
  };
  #marks = new IdSet();
  #inRange: (firstByte: number) => boolean = () => true;
  /** Backups whose ids in the range are marked, as "group/time". */
  #marked = new Set<string>();

  constructor(repository: Repository, run: Run, options: PruneOptions) {
    this.#repository = repository;
    this.#run = run;
    this.#options = options;
  }

  async run(): Promise<PruneResult> {
    const { store, secrets } = this.#repository;
    // What dead runs have left goes even where there is nothing to sweep.
    if (!this.#options.dryRun) {
      await readClaims({ store, secrets, run: this.#run, judge: this.#options.judge });
    }
    for (const [first, end] of rangesOf(
      await this.#countByPrefix(),
      this.#options.marksPerPass ?? MARKS_PER_PASS,
    )) {
      await this.#pass(first, end);
    }
    await this.#removeUnfinished();
    if (!this.#options.dryRun) await store.removeLitter();
    await store.flush();
    return this.#result;
  }

  async #countByPrefix(): Promise<number[]> {
    const counts = new Array<number>(PREFIX_COUNT).fill(0);
    for await (const batch of this.#repository.store.list(CHUNKS_PREFIX)) {
      for (const { name } of batch) {
        const first = parseChunkName(name)?.id[0];
        if (first !== undefined) counts[first]++;
      }
    }
    return counts;
  }

  /** Chunks whose ids begin with a byte in [first, end). */
  async #pass(first: number, end: number): Promise<void> {
    this.#result.passes++;
    this.#marks = new IdSet();
    this.#marked = new Set();
    this.#inRange = (byte) => byte >= first && byte < end;
    await this.#addNewMarks();
    const candidates: Candidate[] = [];
    const unmarked = { details: (name: string) => !this.#isUsed(name) };
    for (let byte = first; byte < end; byte++) {
      const prefix = `${CHUNKS_PREFIX}${byte.toString(16).padStart(2, "0")}/`;
      for await (const batch of this.#repository.store.list(prefix, unmarked)) {
        for (const { name, sizeBytes } of batch) {
          const chunk = parseChunkName(name);
          if (chunk === undefined) continue;
          this.#result.chunks++;
          if (this.#marks.has(chunk.id)) this.#result.used++;
          else candidates.push({ ...chunk, sizeBytes });
        }
      }
      while (candidates.length >= MAX_LIST_ENTRIES) await this.#sweep(candidates.splice(0, MAX_LIST_ENTRIES));
      this.#options.onProgress?.(this.#result);
    }
    if (candidates.length > 0) await this.#sweep(candidates);
  }

  #isUsed(name: string): boolean {
    const chunk = parseChunkName(name);
    return chunk === undefined || this.#marks.has(chunk.id);
  }

  async #sweep(candidates: readonly Candidate[]): Promise<void> {
    const result = this.#result;
    if (this.#options.dryRun) {
      result.deleted += candidates.length;
      result.deletedBytes += bytesOf(candidates);
      return;
    }
    const swept = await this.#deleteUnclaimed(candidates);
    if (swept === null) {
      // No room for the list of what is to go: a store that is full is freed by short lists.
      const half = candidates.length >> 1;
      await this.#sweep(candidates.slice(0, half));
      await this.#sweep(candidates.slice(half));
      return;
    }
    const { deleted, spared } = swept;
    result.deleted += deleted.length;
    result.deletedBytes += bytesOf(deleted);
    result.claimed += spared;
  }

  /** Null: the store has no room for the list, and a shorter one may find some. */
  async #deleteUnclaimed(candidates: readonly Candidate[]): Promise<Sweep<Candidate> | null> {
    const { store, secrets } = this.#repository;
    try {
      return await deleteUnclaimed(candidates, {
        store,
        secrets,
        run: this.#run,
        addNewMarks: () => this.#addNewMarks(),
        isMarked: (id) => this.#marks.has(id),
        judge: this.#options.judge,
      });
    } catch (error) {
      if (candidates.length > 1 && toCowcatcherError(error).code === "NO_SPACE") return null;
      throw error;
    }
  }

  /** Marks what backups refer to that have not been looked at in this pass. */
  async #addNewMarks(): Promise<void> {
    const repository = this.#repository;
    const isNew = ({ group, time }: BackupName): boolean => !this.#marked.has(`${group}/${time}`);
    await inParallel((await repository.backups()).filter(isNew), INDEX_READERS, async (entry) => {
      await this.#mark(entry);
      this.#marked.add(`${entry.group}/${entry.time}`);
    });
  }

  async #mark(entry: BackupEntry): Promise<void> {
    const repository = this.#repository;
    try {
      const manifest = await repository.readManifest(entry);
      for (const { name } of manifest.disks) {
        const { ids, patches } = await repository.readIndex(manifest, name);
        for (let at = 0; at < ids.length; at += ID_BYTES) {
          if (this.#inRange(ids[at] ?? 0) && !isHole(ids, at / ID_BYTES)) this.#marks.add(ids, at);
        }
        for (const base of patches.bases()) if (this.#inRange(base[0] ?? 0)) this.#marks.add(base);
      }
    } catch (error) {
      // Forgotten since it was listed: then nothing of it counts.
      if (isNotFound(error) && !(await this.#isThere(entry))) return;
      throw unreadableError(repository.name, entry, error);
    }
  }

  async #isThere({ group, time }: BackupName): Promise<boolean> {
    return (await this.#repository.backups(group)).some((entry) => entry.time === time);
  }

  /**
   * Folders without a manifest, or with a void one, that no run at work is filling. They are listed first, then the
   * drafts of those at work, then each is looked at once more: as with chunks.
   */
  async #removeUnfinished(): Promise<void> {
    const repository = this.#repository;
    const { store } = repository;
    const folders = await repository.backupFolders();
    const complete = new Set((await repository.backups()).map(({ group, time }) => `${group}/${time}`));
    const unfinished = folders.filter(({ group, time }) => !complete.has(`${group}/${time}`));
    if (unfinished.length === 0) return;
    const drafts = new Set<string>();
    const locks = await readLocks(store);
    const dead = await deadRuns(store);
    const nowMs = await this.#run.now();
    for (const { run, kind } of locks) {
      if (kind !== "draft" || dead.has(run)) continue;
      if ((await (this.#options.judge ?? judge)(store, run, nowMs)) === "ended") continue;
      const draft = await readDraft(store, run);
      if (draft !== undefined) drafts.add(`${draft.group}/${draft.time}`);
    }
    for (const entry of unfinished) {
      if (drafts.has(`${entry.group}/${entry.time}`) || (await this.#isThere(entry))) continue;
      this.#result.unfinished++;
      if (!this.#options.dryRun) await removeBackup(repository, entry);
    }
  }
}

/** Ranges of first bytes with at most `max` chunks each, but for a single byte that has more. */
export function rangesOf(counts: readonly number[], max: number): [number, number][] {
  const ranges: [number, number][] = [];
  let first = 0;
  let sum = 0;
  counts.forEach((count, byte) => {
    if (sum > 0 && sum + count > max) {
      ranges.push([first, byte]);
      first = byte;
      sum = 0;
    }
    sum += count;
  });
  ranges.push([first, counts.length]);
  return ranges;
}

function unreadableError(storeName: string, { group, time }: BackupName, cause: unknown): CowcatcherError {
  const { code, problem } = toCowcatcherError(cause);
  return new CowcatcherError({
    code,
    object: `${storeName}::${group}@${time}`,
    problem: `cannot be read, so what it refers to is not known, and nothing was freed: ${problem}`,
    hint: "bring the object back, or forget the backup: repo forget REPO::GROUP@TIME",
    cause,
  });
}
