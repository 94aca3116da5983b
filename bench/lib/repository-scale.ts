// Repositories as large as they get: a thousand backups to be listed, a million chunks to be pruned. They are made by hand,
// as it would take days to back up so much: manifests, indexes and chunks in the format, each chunk with a few bytes of content
// instead of 4 MiB. Neither list nor prune reads a chunk; what they do with names, folders and indexes is what they always do.

import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { ChunkEncoder } from "../../src/repository/format/chunk.js";
import { DEFAULT_CHUNK_BYTES } from "../../src/repository/format/config.js";
import { encodeIndex } from "../../src/repository/format/index.js";
import { PatchTable } from "../../src/repository/format/patch-table.js";
import { encodeManifest } from "../../src/repository/format/manifest.js";
import { sealMetadata } from "../../src/repository/format/metadata.js";
import { backupTime, chunkName, indexName, manifestName } from "../../src/repository/format/names.js";
import { ID_BYTES } from "../../src/repository/format/secrets.js";
import { Repository } from "../../src/repository/repository.js";
import { MiB } from "../../src/units.js";
import { say } from "./children.js";
import { formatFigure, markdownTable, median } from "./statistics.js";
import { ours, type Taken, timed } from "./timed-program.js";

const LISTED_GROUPS = 50;
const LISTED_BACKUPS = 20;
const LIST_ROUNDS = 5;
/** Twenty machines with 160 GB each, of which a fortieth changes from backup to backup. */
const PRUNED_GROUPS = 20;
const PRUNED_BACKUPS = 11;
const DISK_CHUNKS = 40_000;
const CHANGED_CHUNKS = 1000;
/** The oldest of each group. */
const FORGOTTEN_BACKUPS = 5;
const FIRST_NS = 1_700_000_000_000_000_000n;
const DAY_NS = 86_400_000_000_000n;

export interface ScaleOptions {
  /** Of the chunks: a hundredth, where it is tried out. */
  quick: boolean;
}

/** @returns a table. @param folder empty; removed */
export async function measureScale(folder: string, { quick }: ScaleOptions): Promise<string> {
  const rows = [
    await measureList(join(folder, "listed")),
    ...(await measurePrune(join(folder, "pruned"), quick)),
  ];
  rmSync(folder, { recursive: true });
  return markdownTable(["", "s", "peak, MiB"], rows);
}

async function measureList(address: string): Promise<string[]> {
  const made = await MadeRepository.init(address);
  const ids = new Uint8Array(1000 * ID_BYTES);
  for (let group = 0; group < LISTED_GROUPS; group++) {
    for (let backup = 0; backup < LISTED_BACKUPS; backup++) await made.add(`vm${group}`, backup, ids);
  }
  const taken: Taken[] = [];
  for (let round = 0; round < LIST_ROUNDS; round++)
    taken.push(await timed(ours("repo", "list", address), {}));
  const row = {
    seconds: median(taken.map(({ seconds }) => seconds)),
    peakBytes: Math.max(...taken.map(({ peakBytes }) => peakBytes)),
  };
  return rowOf(`list of ${LISTED_GROUPS * LISTED_BACKUPS} backups`, row);
}

async function measurePrune(address: string, quick: boolean): Promise<string[][]> {
  const share = quick ? 100 : 1;
  const [diskChunks, changedChunks] = [DISK_CHUNKS / share, CHANGED_CHUNKS / share];
  const made = await MadeRepository.init(address);
  const startMs = performance.now();
  for (let group = 0; group < PRUNED_GROUPS; group++) {
    const ids = new Uint8Array(diskChunks * ID_BYTES);
    for (let chunk = 0; chunk < diskChunks; chunk++) ids.set(made.addChunk(), chunk * ID_BYTES);
    for (let backup = 0; backup < PRUNED_BACKUPS; backup++) {
      for (let change = 0; backup > 0 && change < changedChunks; change++) {
        // Each backup changes others.
        const chunk = change * Math.floor(diskChunks / changedChunks) + backup;
        ids.set(made.addChunk(), chunk * ID_BYTES);
      }
      await made.add(`vm${group}`, backup, ids);
    }
  }
  say(`  ${made.chunkCount} chunks made in ${Math.round((performance.now() - startMs) / 1000)} s`);
  const keep = String(PRUNED_BACKUPS - FORGOTTEN_BACKUPS);
  for (let group = 0; group < PRUNED_GROUPS; group++) {
    await timed(ours("repo", "forget", "-q", `${address}::vm${group}`, "--keep-last", keep), {});
  }
  const freed = FORGOTTEN_BACKUPS * changedChunks * PRUNED_GROUPS;
  const first = await timed(ours("repo", "prune", "-q", address), {});
  const left = countChunks(address);
  if (left !== made.chunkCount - freed) {
    throw new Error(`prune left ${left} of ${made.chunkCount} chunks, and should have freed ${freed}`);
  }
  const again = await timed(ours("repo", "prune", "-q", address), {});
  return [
    rowOf(`prune of ${made.chunkCount} chunks, ${freed} of them unused`, first),
    rowOf(`prune of ${left} chunks, nothing to free`, again),
  ];
}

function rowOf(what: string, { seconds, peakBytes }: Taken): string[] {
  say(`  ${what}: ${seconds.toFixed(2)} s, ${Math.round(peakBytes / MiB)} MiB of memory`);
  return [what, formatFigure(seconds), formatFigure(peakBytes / MiB)];
}

function countChunks(address: string): number {
  const chunks = join(address, "chunks");
  return readdirSync(chunks).reduce((sum, folder) => sum + readdirSync(join(chunks, folder)).length, 0);
}

/** A repository in a folder, not encrypted, that is written without a store's care: nobody else is there. */
class MadeRepository {
  chunkCount = 0;
  readonly #encoder: ChunkEncoder;
  readonly #content = Buffer.alloc(8);

  private constructor(
    readonly address: string,
    readonly repository: Repository,
  ) {
    this.#encoder = new ChunkEncoder(repository.secrets, MiB, null, address);
    for (let first = 0; first < 256; first++) {
      mkdirSync(join(address, "chunks", first.toString(16).padStart(2, "0")), { recursive: true });
    }
  }

  static async init(address: string): Promise<MadeRepository> {
    const options = { chunkBytes: DEFAULT_CHUNK_BYTES, compression: null, key: undefined };
    return new MadeRepository(address, await Repository.init(address, options));
  }

  /** @returns its id; each is another */
  addChunk(): Uint8Array {
    this.#content.writeDoubleLE(++this.chunkCount);
    const id = this.repository.secrets.chunkId(this.#content);
    writeFileSync(join(this.address, chunkName(id)), this.#encoder.encode(id, this.#content));
    return id;
  }

  async add(group: string, number: number, ids: Uint8Array): Promise<void> {
    const { secrets, config } = this.repository;
    const backup = { group, time: backupTime(FIRST_NS + BigInt(number) * DAY_NS) };
    const chunkCount = ids.length / ID_BYTES;
    const sizeBytes = chunkCount * config.chunkBytes;
    const content = encodeIndex({ sizeBytes, chunkBytes: config.chunkBytes, ids, patches: PatchTable.EMPTY });
    const disk = {
      name: "disk",
      size_bytes: sizeBytes,
      index_sha256: createHash("sha256").update(content).digest("hex"),
      chunk_count: chunkCount,
      data_chunk_count: chunkCount,
      new_chunk_count: 0,
      new_bytes: 0,
      read_bytes: sizeBytes,
      format: "raw",
    };
    const manifest = encodeManifest({
      version: 1,
      ...backup,
      run: "0".repeat(32),
      finished: backup.time,
      level: "full",
      level_reason: "made by hand",
      parent: null,
      checkpoint: null,
      clock: null,
      disks: [disk],
      vm_config: null,
      host: "bench",
      tool: "bench:repo",
    });
    await this.#put(indexName(backup, "disk"), content, secrets);
    await this.#put(manifestName(backup), manifest, secrets);
  }

  async #put(name: string, content: Uint8Array, secrets: Repository["secrets"]): Promise<void> {
    const path = join(this.address, name);
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(path, await sealMetadata(secrets, name, content));
  }
}
