// Backups, prunes and forgets on one store, every call of which is a step that a seed puts in order; some die at any step,
// some are taken for dead while they live. After each step every manifest that counts must have all its chunks.
import { createHash } from "node:crypto";
import { inflateSync } from "node:zlib";
import { BackupSession, type SessionDisk, takeable } from "../../../src/repository/backup/session.js";
import { ChunkWriter } from "../../../src/repository/backup/chunk-writer.js";
import { DirtyBlocks } from "../../../src/repository/backup/dirty-blocks.js";
import { DiskChunks } from "../../../src/repository/backup/disk-chunks.js";
import { decodeIndex } from "../../../src/repository/format/index.js";
import { decodeManifest } from "../../../src/repository/format/manifest.js";
import {
  indexName,
  manifestName,
  parseBackupObject,
  parseChunkName,
} from "../../../src/repository/format/names.js";
import { ID_BYTES, Secrets } from "../../../src/repository/format/secrets.js";
import { Repository } from "../../../src/repository/repository.js";
import { removeBackup } from "../../../src/repository/upkeep/forget.js";
import { prune } from "../../../src/repository/upkeep/prune.js";
import { runObject, type Verdict } from "../../../src/repository/work/runs.js";
import type { Store } from "../../../src/repository/store/store.js";
import { Random } from "../../support/random.js";
import { Scheduler, type SimulatedObject, SimulatedStore } from "../../support/repository/simulated-store.js";

const CHUNK_BYTES = 64;
/** Few in some runs, so that a content that has gone comes back while its name is condemned; more in others, so that some go. */
const CONTENTS = [4, 5, 6, 8];
const ALIKE = 3;
/** Of ten pieces of work, those that are a backup and those that are a prune; the others forget one. */
const WORK = [
  { backups: 5, prunes: 4 },
  { backups: 4, prunes: 3 },
];
const CHUNKS_PER_DISK = 3;
const MAX_STEPS = 40_000;

export interface SimulationResult {
  steps: number;
  completed: number;
  failed: number;
  killed: number;
  deleted: number;
  /** Chunks that were stored under a later generation. */
  laterGenerations: number;
  /** Chunks that backups have as patches. */
  patches: number;
}

export async function simulate(seed: number): Promise<SimulationResult> {
  return new Simulation(seed).run();
}

class Simulation {
  readonly #random: Random;
  readonly #scheduler: Scheduler;
  readonly #objects = new Map<string, SimulatedObject>();
  readonly #secrets = new Secrets({ repositoryId: "00".repeat(16), master: null });
  /** By manifest's name: the ids that it refers to, and its run. */
  readonly #references = new Map<string, { run: string; ids: string[] }>();
  /** Who runs under which run id. */
  readonly #actorOfRun = new Map<string, string>();
  /** By chunk's id, of whatever kind: what a disk has there. */
  readonly #contents = new Map<string, Buffer>();
  readonly #reported = new Map<string, string>();
  readonly #forgotten = new Set<string>();
  readonly #result: SimulationResult = {
    steps: 0,
    completed: 0,
    failed: 0,
    killed: 0,
    deleted: 0,
    laterGenerations: 0,
    patches: 0,
  };
  #violation: Error | undefined;
  #actorCount = 0;
  readonly #contentCount: number;
  readonly #work: (typeof WORK)[number];
  /** How often a process that lives is taken for silent. */
  readonly #wrong: number;
  readonly #killChance: number;

  constructor(readonly seed: number) {
    this.#random = new Random(seed);
    this.#contentCount = this.#random.pick(CONTENTS);
    this.#work = this.#random.pick(WORK);
    this.#wrong = this.#random.pick([0.02, 0.1, 0.4]);
    this.#killChance = this.#random.pick([0, 0.001, 0.004]);
    this.#scheduler = new Scheduler(this.#random);
  }

  async run(): Promise<SimulationResult> {
    const actors: Promise<void>[] = [];
    const rounds = 2 + this.#random.below(3);
    for (let round = 0; round < rounds; round++) {
      if (this.#random.chance(0.6)) this.#forgetAll();
      const count = 2 + this.#random.below(5);
      for (let i = 0; i < count; i++) actors.push(this.#start());
      await this.#scheduler.run(() => this.#afterStep(), MAX_STEPS);
      if (this.#violation !== undefined) throw this.#violation;
    }
    await this.#finalPrune();
    this.#result.steps = this.#scheduler.steps;
    return this.#result;
  }

  #start(): Promise<void> {
    const actor = `actor-${++this.#actorCount}`;
    const work = this.#random.below(10);
    const { backups, prunes } = this.#work;
    const body =
      work < backups
        ? this.#backup(actor)
        : work < backups + prunes
          ? this.#prune(actor)
          : this.#forget(actor);
    return body.catch((error: unknown) => this.#note(error));
  }

  /** Nobody is at work: all chunks are unused from now on, until a backup comes to rely on them before they are freed. */
  #forgetAll(): void {
    for (const name of [...this.#objects.keys()]) {
      const backup = parseBackupObject(name);
      if (backup === undefined) continue;
      this.#forgotten.add(manifestName(backup));
      this.#objects.delete(name);
    }
  }

  #note(error: unknown): void {
    this.#violation ??= error instanceof Error ? error : new Error(String(error));
  }

  #repository(actor: string): Repository {
    const store = new SimulatedStore(this.#objects, this.#scheduler, actor, this.#random);
    const config = {
      version: 2 as const,
      id: "00".repeat(16),
      created: "",
      chunkBytes: CHUNK_BYTES,
      compression: null,
      encryption: "none" as const,
    };
    return Repository.assemble({ kind: "folder", name: "simulated", path: "" }, store, config, this.#secrets);
  }

  async #backup(actor: string): Promise<void> {
    const repository = this.#repository(actor);
    try {
      const session = await BackupSession.begin(repository, {
        group: this.#random.pick(["a", "b"]),
        diskCount: 1,
        totalBytes: CHUNKS_PER_DISK * CHUNK_BYTES,
        tool: "model",
        heartbeatMs: 0,
      });
      const disk = session.addDisk("disk", CHUNKS_PER_DISK * CHUNK_BYTES, "raw");
      const description = session.writerDescription(disk.counters);
      this.#actorOfRun.set(description.run, actor);
      const writer = new ChunkWriter(description, "1", repository.store);
      const contents = Array.from({ length: CHUNKS_PER_DISK }, () =>
        contentOf(this.#random.below(this.#contentCount)),
      );
      if (this.#random.chance(0.5)) this.#track(session, disk, contents);
      const chunks = new DiskChunks(writer, disk);
      const store = async (chunk: number): Promise<void> => {
        const content = contents[chunk] ?? Buffer.alloc(0);
        await chunks.store(chunk, content);
        this.#contents.set(hexAt(new Uint8Array(disk.ids), chunk), content);
      };
      await Promise.all([store(0), store(1)]);
      await store(2);
      await session.putIndex(disk);
      await session.diskDone();
      this.#result.completed++;
      this.#reported.set(manifestName(session.backup), description.run);
    } catch (error) {
      // Taken for dead: the only failure that there may be.
      if (!(error instanceof Error) || !error.message.includes("taken it for dead")) throw error;
      this.#result.failed++;
    }
  }

  /** As if something had kept track of what the disk has over the last backup's. */
  #track(session: BackupSession, disk: SessionDisk, contents: readonly Buffer[]): void {
    const index = takeable(session, disk)?.index;
    if (index === undefined || disk.patching === null) return;
    const dirty = new DirtyBlocks(disk.patching.dirty, CHUNK_BYTES);
    contents.forEach((content, chunk) => {
      const before = this.#contents.get(hexAt(index.ids, chunk));
      if (before === undefined) throw new Error(`seed ${this.seed}: a chunk that nobody has stored`);
      content.forEach((byte, at) => {
        if (byte !== before[at]) dirty.note(chunk * CHUNK_BYTES + at, 1);
      });
    });
    dirty.setKnown();
  }

  async #prune(actor: string): Promise<void> {
    const { deleted } = await prune(this.#repository(actor), {
      dryRun: false,
      heartbeatMs: 0,
      judge: (store, run) => this.#judge(store, run, this.#wrong),
    });
    this.#result.deleted += deleted;
  }

  async #forget(actor: string): Promise<void> {
    const manifests = [...this.#objects.keys()].filter((name) => name.endsWith("/manifest"));
    if (manifests.length === 0) return;
    const name = this.#random.pick(manifests);
    const backup = parseBackupObject(name);
    if (backup === undefined) return;
    this.#forgotten.add(name);
    await removeBackup(this.#repository(actor), backup);
    // As people do, while a backup may be about to build on what was forgotten.
    if (this.#random.chance(0.7)) await this.#prune(actor);
  }

  /** As runs.ts has it, with processes that are actors; wrong in some cases. */
  async #judge(store: Store, run: string, wrong: number): Promise<Verdict> {
    if ((await store.head(runObject(run))) === undefined) return "ended";
    const actor = this.#actorOfRun.get(run);
    if (actor !== undefined && this.#scheduler.isKilled(actor)) return "dead";
    return this.#random.chance(wrong) ? "silent" : "at work";
  }

  #afterStep(): void {
    this.#check();
    if (!this.#random.chance(this.#killChance)) return;
    const actor = `actor-${1 + this.#random.below(this.#actorCount)}`;
    if (!this.#scheduler.isKilled(actor)) this.#result.killed++;
    this.#scheduler.kill(actor);
  }

  #check(): void {
    const chunks = new Set<string>();
    for (const name of this.#objects.keys()) {
      const chunk = parseChunkName(name);
      if (chunk === undefined) continue;
      chunks.add(chunk.id.toString("hex"));
      if (chunk.generation > 0) this.#result.laterGenerations++;
    }
    for (const name of this.#objects.keys()) {
      if (!name.endsWith("/manifest")) continue;
      const { run, ids } = this.#referencesOf(name);
      const isDead = this.#objects.has(`locks/${run}.dead`);
      if (isDead && this.#reported.has(name))
        this.#note(new Error(`seed ${this.seed}: a good backup is void`));
      const missing = ids.find((id) => !chunks.has(id));
      if (missing !== undefined && !isDead) {
        this.#note(new Error(`seed ${this.seed}: ${name} has lost a chunk`));
      }
    }
    for (const name of this.#reported.keys()) {
      if (!this.#objects.has(name) && !this.#forgotten.has(name)) {
        this.#note(new Error(`seed ${this.seed}: a good backup is gone`));
      }
    }
  }

  #referencesOf(name: string): { run: string; ids: string[] } {
    const known = this.#references.get(name);
    if (known !== undefined) return known;
    const backup = parseBackupObject(name);
    if (backup === undefined) throw new Error(name);
    const manifest = decodeManifest("", name, this.#open(name), backup);
    const index = indexName(backup, "disk");
    // Void: prune may have taken its index before it had its manifest.
    const isVoid = this.#objects.has(`locks/${manifest.run}.dead`);
    if (isVoid && !this.#objects.has(index)) return { run: manifest.run, ids: [] };
    const { ids, patches } = decodeIndex("", "", this.#open(index));
    const hex = [...patches.bases()].map((base) => Buffer.from(base).toString("hex"));
    this.#result.patches += patches.count;
    for (let chunk = 0; chunk * ID_BYTES < ids.length; chunk++) hex.push(hexAt(ids, chunk));
    const found = { run: manifest.run, ids: hex };
    this.#references.set(name, found);
    return found;
  }

  /** The content of what is sealed without encryption, at once. */
  #open(name: string): Buffer {
    const object = this.#objects.get(name)?.content;
    if (object === undefined) throw new Error(`seed ${this.seed}: ${name} is missing beside its manifest`);
    return openNow(object);
  }

  /** With everybody gone and judged rightly: what is left is what backups refer to. */
  async #finalPrune(): Promise<void> {
    for (let i = 1; i <= this.#actorCount; i++) this.#scheduler.kill(`actor-${i}`);
    const repository = this.#repository("final");
    const done = prune(repository, {
      dryRun: false,
      heartbeatMs: 0,
      judge: async (store, run) => ((await store.head(runObject(run))) === undefined ? "ended" : "dead"),
    });
    await this.#scheduler.run(() => this.#check(), MAX_STEPS * 2);
    await done;
    if (this.#violation !== undefined) throw this.#violation;
    const used = new Set<string>();
    for (const name of this.#objects.keys()) {
      if (name.endsWith("/manifest")) for (const id of this.#referencesOf(name).ids) used.add(id);
    }
    for (const name of this.#objects.keys()) {
      const chunk = parseChunkName(name);
      if (chunk !== undefined && !used.has(chunk.id.toString("hex"))) {
        throw new Error(`seed ${this.seed}: ${name} is used by nobody and was not freed`);
      }
    }
    const claims = [...this.#objects.keys()].filter((name) => name.startsWith("claims/"));
    if (claims.length > 0) throw new Error(`seed ${this.seed}: claims of the dead were left`);
  }
}

/** Of some the second half is the same, so that one can be stored as a patch of another. */
function contentOf(index: number): Buffer {
  const content = createHash("sha512").update(`content ${index}`).digest();
  if (index >= ALIKE) return content;
  return Buffer.concat([content.subarray(0, 4), contentOf(ALIKE).subarray(4)]);
}

function hexAt(ids: Uint8Array, chunk: number): string {
  return Buffer.from(ids.subarray(chunk * ID_BYTES, (chunk + 1) * ID_BYTES)).toString("hex");
}

function openNow(object: Buffer): Buffer {
  return inflateSync(object.subarray(32, object.length - 32));
}
