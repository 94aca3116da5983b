// Who is at work in a repository: a record for each run, its sign of life, and the judgement who is dead.
//
//   locks/RUN.run           the record; touched every HEARTBEAT_MS
//   locks/RUN.condemned-…   what it is about to delete (condemned.ts)
//   locks/RUN.draft         which backup it is about to complete
//   locks/RUN.revoked-BY    the run BY has begun to declare it dead
//   locks/RUN.dead          it is dead: a manifest of it is void
//   claims/RUN/…            what it counts on (claims.ts)
//
// A judgement may be wrong, as when a machine was suspended for a day. It harms nobody: what follows from it is
// settled by `revoked` and `dead`, whichever way (claims.ts has the argument). So nothing that is true depends on clocks
// or on process ids; how soon the space of a killed run comes free does.

import { randomBytes } from "node:crypto";
import { readFileSync, readlinkSync } from "node:fs";
import { hostname } from "node:os";
import { parseTextWithSum, textWithSum } from "../format/metadata.js";
import { CLAIMS_PREFIX, LOCKS_PREFIX } from "../format/names.js";
import { isNotFound, listNames, type Store } from "../store/store.js";
import { DELETERS, inParallel } from "./parallel.js";

export type RunKind = "backup" | "prune" | "verify";

export const HEARTBEAT_MS = 60_000;
/** Silence of a run on another machine after which it is taken for dead. */
export const SILENCE_MS = 60 * 60_000;
export const MAX_RUN_OBJECT_BYTES = 64 * 1024;
/** A handful for each run at work, and one for each that was ever killed. */
export const MAX_LOCK_OBJECTS = 1_000_000;
/** Of all runs at work together; a run has one for each few chunks that it stores. */
const MAX_CLAIMS = 2 ** 24;

export interface RunRecord {
  run: string;
  kind: RunKind;
  started: string;
  host: string;
  pid: number;
  /** Where the pid means something: one boot of one kernel, and one space of process ids. */
  boot: string;
  pid_space: string;
  /** Of the process, in the kernel's ticks since boot: a pid comes again. */
  pid_started: string;
}

export function newRunId(): string {
  return randomBytes(16).toString("hex");
}

export function ownRecord(run: string, kind: RunKind): RunRecord {
  return {
    run,
    kind,
    started: new Date().toISOString(),
    host: hostname(),
    pid: process.pid,
    boot: bootId(),
    pid_space: pidSpace(),
    pid_started: startOf(process.pid) ?? "",
  };
}

export const runObject = (run: string): string => `${LOCKS_PREFIX}${run}.run`;
export const draftObject = (run: string): string => `${LOCKS_PREFIX}${run}.draft`;
export const revokedObject = (run: string, by: string): string => `${LOCKS_PREFIX}${run}.revoked-${by}`;
export const deadObject = (run: string): string => `${LOCKS_PREFIX}${run}.dead`;

const LOCK_OBJECT = /^locks\/([0-9a-f]{32})\.(run|draft|revoked|dead|condemned)(?:-([0-9a-f-]+))?$/;

export interface LockObject {
  name: string;
  run: string;
  kind: "run" | "draft" | "revoked" | "dead" | "condemned";
}

/** Everything under locks/, by what it is. What no program of ours has put there is passed over. */
export async function readLocks(store: Store): Promise<LockObject[]> {
  const names = await listNames(store, LOCKS_PREFIX, MAX_LOCK_OBJECTS);
  return names.flatMap((name) => {
    const match = LOCK_OBJECT.exec(name);
    if (match?.[1] === undefined) return [];
    return [{ name, run: match[1], kind: match[2] as LockObject["kind"] }];
  });
}

/** The objects that hold claims, by run. */
export async function listClaims(store: Store, run?: string): Promise<Map<string, string[]>> {
  const claims = new Map<string, string[]>();
  for (const name of await listNames(store, run === undefined ? CLAIMS_PREFIX : claimsOf(run), MAX_CLAIMS)) {
    const owner = name.split("/")[1] ?? "";
    const names = claims.get(owner);
    if (names === undefined) claims.set(owner, [name]);
    else names.push(name);
  }
  return claims;
}

export const claimsOf = (run: string): string => `${CLAIMS_PREFIX}${run}/`;

export type Verdict = "at work" | "ended" | "dead" | "silent";

/**
 * `ended`: its record is gone, which is the first of its objects to come and, but for the draft, the last to go. `dead`
 * by proof: the process is not there any more, seen from where it was. `silent`: it has given no sign of life
 * for so long that it is taken for dead. @param nowMs by the store's clock
 */
export async function judge(store: Store, run: string, nowMs: number): Promise<Verdict> {
  const name = runObject(run);
  const info = await store.head(name);
  if (info === undefined) return "ended";
  const silent = nowMs - info.changedMs > SILENCE_MS;
  try {
    const { json } = parseTextWithSum(store.name, name, await store.get(name, MAX_RUN_OBJECT_BYTES));
    const record = json as Partial<RunRecord>;
    if (record.boot !== bootId() || record.pid_space !== pidSpace() || bootId() === "") {
      return silent ? "silent" : "at work";
    }
    const isThere = typeof record.pid === "number" && startOf(record.pid) === record.pid_started;
    return isThere ? "at work" : "dead";
  } catch (error) {
    if (isNotFound(error)) return "ended";
    // A record that cannot be read says nothing but when it was written.
    return silent ? "silent" : "at work";
  }
}

/** A run's record, and its sign of life while it is kept. */
export class Run {
  readonly id: string;
  readonly #store: Store;
  readonly #content: Buffer;
  #timer: NodeJS.Timeout | undefined;
  #beating: Promise<void> = Promise.resolve();

  private constructor(store: Store, record: RunRecord) {
    this.id = record.run;
    this.#store = store;
    this.#content = Buffer.from(textWithSum(record));
  }

  /** @param heartbeatMs 0: none, as in tests */
  static async begin(store: Store, kind: RunKind, heartbeatMs = HEARTBEAT_MS): Promise<Run> {
    const run = new Run(store, ownRecord(newRunId(), kind));
    await store.put(runObject(run.id), run.#content, { durable: true });
    if (heartbeatMs > 0) run.#timer = setInterval(() => run.#beat(), heartbeatMs).unref();
    return run;
  }

  /** One that fails is made up for by the next; a store that stays away ends the run by itself. */
  #beat(): void {
    this.#beating = this.#store.touch(runObject(this.id), this.#content).catch(() => {});
  }

  /** The store's clock. */
  async now(): Promise<number> {
    await this.#store.touch(runObject(this.id), this.#content);
    return (await this.#store.head(runObject(this.id)))?.changedMs ?? 0;
  }

  /**
   * What it claimed goes first, then the record, then the draft: a judge that finds a record and no draft knows that
   * the run has not written its manifest.
   */
  async end(): Promise<void> {
    clearInterval(this.#timer);
    await this.#beating;
    const claims = (await listClaims(this.#store, this.id)).get(this.id) ?? [];
    await inParallel(claims, DELETERS, (name) => this.#store.delete(name));
    await this.#store.delete(runObject(this.id));
    await this.#store.delete(draftObject(this.id));
  }
}

let boot: string | undefined;
function bootId(): string {
  boot ??= readText("/proc/sys/kernel/random/boot_id");
  return boot;
}

function pidSpace(): string {
  try {
    return readlinkSync("/proc/self/ns/pid");
  } catch {
    return "";
  }
}

/** Field 22 of proc_pid_stat(5); the second field is the command in brackets, which may hold anything. */
function startOf(pid: number): string | undefined {
  const stat = readText(`/proc/${pid}/stat`);
  return stat.slice(stat.lastIndexOf(")") + 2).split(" ")[19];
}

function readText(path: string): string {
  try {
    return readFileSync(path, "utf8").trim();
  } catch {
    return "";
  }
}
