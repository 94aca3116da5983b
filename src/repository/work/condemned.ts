// Deleting chunks beside backups that run: prune's side of the claims (claims.ts, which has the argument).
//
// The lists of a run that died stay where they are until no deletion of it can still be under way: an hour if its
// process is known to be gone, LATE_DELETION_MS if it has only been silent. A run keeps to that, too: it deletes nothing
// that it condemned more than CONDEMNED_MAX_MS ago, as after a day of suspension.

import { CowcatcherError } from "../../errors.js";
import { decodeManifest, MAX_MANIFEST_BYTES } from "../format/manifest.js";
import { openMetadata, parseTextWithSum, textWithSum } from "../format/metadata.js";
import { type BackupName, chunkName, LOCKS_PREFIX, manifestName } from "../format/names.js";
import type { Secrets } from "../format/secrets.js";
import { isNotFound, type Store } from "../store/store.js";
import { decodeIdList, encodeIdList, type ListedChunk, MAX_LIST_BYTES } from "./id-list.js";
import { IdSet } from "./id-set.js";
import { DELETERS, inParallel, READERS } from "./parallel.js";
import {
  deadObject,
  draftObject,
  judge,
  listClaims,
  type LockObject,
  MAX_RUN_OBJECT_BYTES,
  readLocks,
  revokedObject,
  type Run,
  runObject,
  type Verdict,
} from "./runs.js";

const LATE_DELETION_MS = 7 * 24 * 3600 * 1000;
const LATE_DELETION_OF_DEAD_MS = 3600 * 1000;
const CONDEMNED_MAX_MS = 24 * 3600 * 1000;

export interface JudgeOptions {
  store: Store;
  secrets: Secrets;
  /** Who judges. */
  run: Run;
  /** Another judge, for tests. */
  judge?: typeof judge | undefined;
}

export interface CondemnedOptions extends JudgeOptions {
  /** p3: adds what backups refer to that have come since the last call. */
  addNewMarks: () => Promise<void>;
  isMarked: (id: Uint8Array) => boolean;
}

export interface Sweep<T extends ListedChunk> {
  deleted: T[];
  /** Condemned, and then found to be claimed or referred to. */
  spared: number;
}

let listCount = 0;

/** p1 to p5 for some chunks that no manifest refers to. At most MAX_LIST_ENTRIES. @throws CowcatcherError */
export async function deleteUnclaimed<T extends ListedChunk>(
  candidates: readonly T[],
  options: CondemnedOptions,
): Promise<Sweep<T>> {
  const { store, run, addNewMarks, isMarked } = options;
  const list = `${LOCKS_PREFIX}${run.id}.condemned-${listCount++}`;
  const condemnedAtMs = Date.now();
  await store.put(list, encodeIdList(candidates), { durable: true });
  const claimed = await readClaims(options);
  await addNewMarks();
  const doomed = candidates.filter(({ id }) => !claimed.has(id) && !isMarked(id));
  // If one of them fails, its outcome is not known, and the list stays.
  await inParallel(doomed, DELETERS, async ({ id, generation }) => {
    if (Date.now() - condemnedAtMs > CONDEMNED_MAX_MS) throw tooLateError(store.name);
    await store.delete(chunkName(id, generation));
  });
  await store.delete(list);
  return { deleted: doomed, spared: candidates.length - doomed.length };
}

function tooLateError(storeName: string): CowcatcherError {
  return new CowcatcherError({
    code: "CANCELLED",
    object: storeName,
    problem: "the deletion of chunks was held up for a day, and others may count on them by now",
    hint: "prune again",
  });
}

/** p2: what the runs claim that are not dead. Those that are get declared so, and what they left goes. */
export async function readClaims(options: JudgeOptions): Promise<IdSet> {
  const { store, run } = options;
  const claimed = new IdSet();
  const nowMs = await run.now();
  const locks = byRun(await readLocks(store));
  const claims = await listClaims(store);
  for (const other of new Set([...locks.keys(), ...claims.keys()])) {
    if (other === run.id) continue;
    const left = { locks: locks.get(other) ?? [], claims: claims.get(other) ?? [] };
    if (!(await isDead(other, left, nowMs, options))) await addClaims(claimed, left.claims, store);
  }
  return claimed;
}

/** What a run has in the store. */
interface RunObjects {
  locks: readonly LockObject[];
  claims: readonly string[];
}

function byRun(locks: readonly LockObject[]): Map<string, LockObject[]> {
  const runs = new Map<string, LockObject[]>();
  for (const lock of locks) runs.set(lock.run, [...(runs.get(lock.run) ?? []), lock]);
  return runs;
}

async function addClaims(claimed: IdSet, names: readonly string[], store: Store): Promise<void> {
  await inParallel(names, READERS, async (name) => {
    try {
      for (const { id } of decodeIdList(store.name, name, await store.get(name, MAX_LIST_BYTES)))
        claimed.add(id);
    } catch (error) {
      // The run has ended; its manifest, if it has one, is read next.
      if (!isNotFound(error)) throw error;
    }
  });
}

/** Whether what the run claims does not count any more. */
async function isDead(
  run: string,
  { locks, claims }: RunObjects,
  nowMs: number,
  options: JudgeOptions,
): Promise<boolean> {
  const isDeclared = locks.some(({ kind }) => kind === "dead");
  if (isDeclared && locks.length + claims.length === 1) return true;
  let verdict = await (options.judge ?? judge)(options.store, run, nowMs);
  if (isDeclared && verdict === "at work") verdict = "silent";
  if (verdict === "at work") return false;
  if (verdict !== "ended" && !isDeclared) await declareDead(run, options);
  await clearAway(run, { locks, claims }, verdict, nowMs, options);
  return true;
}

/** j1 and j2. A run whose manifest is there has only not got round to clearing up. */
async function declareDead(run: string, options: JudgeOptions): Promise<void> {
  const { store } = options;
  const revoked = revokedObject(run, options.run.id);
  await store.put(revoked, Buffer.from(textWithSum({ by: options.run.id })), { durable: true });
  if (!(await mayBeGood(run, options))) {
    await store.put(deadObject(run), Buffer.from(textWithSum({ by: options.run.id })), { durable: true });
    await store.flush();
  }
  await store.delete(revoked);
}

/** Whether the run has its manifest in place, or has ended. */
async function mayBeGood(run: string, options: JudgeOptions): Promise<boolean> {
  const { store, secrets } = options;
  const draft = await readDraft(store, run);
  // In this order: the record goes before the draft.
  if (draft === undefined) return (await store.head(runObject(run))) === undefined;
  const name = manifestName(draft);
  try {
    const object = await store.get(name, MAX_MANIFEST_BYTES);
    const content = await openMetadata(secrets, store.name, name, object, MAX_MANIFEST_BYTES);
    return decodeManifest(store.name, name, content, draft).run === run;
  } catch (error) {
    if (isNotFound(error)) return false;
    throw error;
  }
}

/** r1 */
export async function putDraft(store: Store, run: string, backup: BackupName): Promise<void> {
  await store.put(draftObject(run), Buffer.from(textWithSum(backup)), { durable: true });
}

export async function readDraft(store: Store, run: string): Promise<BackupName | undefined> {
  const name = draftObject(run);
  try {
    const { json } = parseTextWithSum(store.name, name, await store.get(name, MAX_RUN_OBJECT_BYTES));
    return { group: String(json["group"]), time: String(json["time"]) };
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

/** j3, and whatever else it has left; its own lists of what it condemned for a while longer. */
async function clearAway(
  run: string,
  { locks, claims }: RunObjects,
  verdict: Verdict,
  nowMs: number,
  { store }: JudgeOptions,
): Promise<void> {
  const ageMs = verdict === "dead" ? LATE_DELETION_OF_DEAD_MS : LATE_DELETION_MS;
  await inParallel(claims, DELETERS, (name) => store.delete(name));
  let isCleared = true;
  for (const { name, kind } of locks) {
    if (kind !== "condemned") continue;
    const info = await store.head(name);
    if (info !== undefined && nowMs - info.changedMs < ageMs) isCleared = false;
    else await store.delete(name);
  }
  // Its record says whether its process is gone.
  if (!isCleared) return;
  await store.delete(runObject(run));
  for (const { name, kind } of locks) {
    if (kind === "draft" || kind === "revoked") await store.delete(name);
  }
}

/**
 * r3: whether somebody has taken the run for dead. A listing may miss both objects of a judge, if it passes the one before
 * it is put and the other after it is deleted; R.dead is there then, and stays.
 */
export async function isRevoked(store: Store, run: string): Promise<boolean> {
  const isListed = (await readLocks(store)).some(
    (lock) => lock.run === run && (lock.kind === "revoked" || lock.kind === "dead"),
  );
  return isListed || (await store.head(deadObject(run))) !== undefined;
}

/** Runs whose manifests are void. */
export async function deadRuns(store: Store): Promise<Set<string>> {
  return new Set((await readLocks(store)).filter(({ kind }) => kind === "dead").map(({ run }) => run));
}
