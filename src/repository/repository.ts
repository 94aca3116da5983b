// An opened repository: its store, its configuration, its keys, and what backups it has. Main thread, or any.

import { createHash, randomBytes } from "node:crypto";
import { CowcatcherError } from "../errors.js";
import type { BackupAddress } from "./address.js";
import { type ChunkCompression, ChunkEncoder } from "./format/chunk.js";
import {
  decodeConfig,
  encodeConfig,
  FORMAT_VERSION,
  MAX_CONFIG_BYTES,
  type RepositoryConfig,
} from "./format/config.js";
import { damagedError, keyError } from "./format/errors.js";
import { decodeIndex, type DiskIndex, MAX_INDEX_BYTES } from "./format/index.js";
import { type KeyInfo, type KeySource, wrapMaster } from "./format/keys.js";
import { addKey, keyComment, openMaster, readKeys, removeKey } from "./keyring.js";
import { decodeManifest, type Manifest, MAX_MANIFEST_BYTES } from "./format/manifest.js";
import { openMetadata } from "./format/metadata.js";
import {
  type BackupName,
  CONFIG_NAME,
  GROUPS_PREFIX,
  indexName,
  MANIFEST,
  manifestName,
  parseBackupObject,
  PROTECTED,
  VERIFIED,
} from "./format/names.js";
import { MASTER_BYTES, Secrets } from "./format/secrets.js";
import { describeStore } from "./store/describe-store.js";
import { openStore } from "./store/open-store.js";
import { isNotFound, listNames, type Store, type StoreDescription } from "./store/store.js";
import { deadRuns } from "./work/condemned.js";
import { inParallel, READERS } from "./work/parallel.js";

export interface InitOptions {
  chunkBytes: number;
  compression: ChunkCompression;
  /** Undefined: not encrypted. */
  key: KeySource | undefined;
}

export interface BackupEntry extends BackupName {
  isProtected: boolean;
  isVerified: boolean;
  /** Names of all its objects, under its folder. */
  objects: readonly string[];
}

/** Backups of a repository; enough for a hundred machines, hourly, for a year. */
const MAX_BACKUP_OBJECTS = 4_000_000;

export class Repository {
  private constructor(
    readonly storeDescription: StoreDescription,
    readonly store: Store,
    readonly config: RepositoryConfig,
    readonly secrets: Secrets,
  ) {}

  get name(): string {
    return this.store.name;
  }

  /**
   * Makes a repository. @param given the store, where it is not the one of the address; for tests
   * @throws CowcatcherError EXISTS where there is one, UNSUPPORTED without zstd where it is asked for,
   * IO, NO_SPACE.
   */
  static async init(
    address: string,
    { chunkBytes, compression, key }: InitOptions,
    given?: Store,
  ): Promise<Repository> {
    const description = describeStore(address);
    // Whether this machine can do it is to be known now.
    new ChunkEncoder(
      new Secrets({ repositoryId: "", master: null }),
      chunkBytes,
      compression,
      address,
    ).close();
    const store = given ?? openStore(description, false);
    if ((await store.head(CONFIG_NAME)) !== undefined) throw existsError(address);
    const id = randomBytes(16).toString("hex");
    const master = key === undefined ? null : randomBytes(MASTER_BYTES);
    const secrets = new Secrets({ repositoryId: id, master });
    const config: RepositoryConfig = {
      version: FORMAT_VERSION,
      id,
      created: new Date().toISOString(),
      chunkBytes,
      compression,
      encryption: secrets.encryption,
    };
    let wrapped: Awaited<ReturnType<typeof wrapMaster>> | undefined;
    if (key !== undefined && master !== null) {
      wrapped = await wrapMaster(master, key, id, keyComment());
      await store.put(wrapped.name, wrapped.object, { durable: true, exclusive: true });
      await store.flush();
    }
    // Last: it is what makes the repository exist.
    const outcome = await store.put(CONFIG_NAME, encodeConfig(config, secrets), {
      durable: true,
      exclusive: true,
    });
    await store.flush();
    if (outcome === "present") {
      if (wrapped !== undefined) await store.delete(wrapped.name);
      throw existsError(address);
    }
    return new Repository(description, store, config, secrets);
  }

  /**
   * @param key what to open an encrypted one with; asked for only if it is one
   * @param isBlocking see openStore
   * @param given as of init
   * @throws CowcatcherError NOT_FOUND where there is no repository, KEY without the right key, FORMAT, UNSUPPORTED, IO.
   */
  static async open(
    address: string,
    key: () => Promise<KeySource | undefined>,
    isBlocking = false,
    given?: Store,
  ): Promise<Repository> {
    const description = describeStore(address);
    const store = given ?? openStore(description, isBlocking);
    const { config, isOf } = await readConfig(store);
    const source = await key();
    if (config.encryption === "none") {
      // Else a store that lost its encryption would be written in the clear.
      if (source !== undefined) {
        throw keyError(address, "the repository is not encrypted, and a key was given", "leave the key out");
      }
      return new Repository(
        description,
        store,
        config,
        new Secrets({ repositoryId: config.id, master: null }),
      );
    }
    if (source === undefined) {
      throw keyError(
        address,
        "the repository is encrypted, and no key was given",
        "give --key-file FILE or --passphrase-file FILE, or set COWCATCHER_KEY_FILE or COWCATCHER_PASSPHRASE",
      );
    }
    const { secrets } = await openMaster(store, config, source);
    if (!isOf(secrets))
      throw damagedError(address, CONFIG_NAME, "it was not written with this repository's key");
    return new Repository(description, store, config, secrets);
  }

  /** For a worker or a test that has all at hand. */
  static assemble(
    description: StoreDescription,
    store: Store,
    config: RepositoryConfig,
    secrets: Secrets,
  ): Repository {
    return new Repository(description, store, config, secrets);
  }

  async keys(): Promise<KeyInfo[]> {
    return readKeys(this.store, this.config.id);
  }

  /** Another key that opens the repository. @returns its id. @throws CowcatcherError USAGE without encryption; LIMIT */
  addKey(source: KeySource): Promise<string> {
    return addKey(this.store, this.config.id, this.secrets, source);
  }

  /** @throws CowcatcherError NOT_FOUND; USAGE for the last one. */
  removeKey(id: string): Promise<void> {
    return removeKey(this.store, this.config.id, id);
  }

  /** The key that `source` is. @throws CowcatcherError KEY */
  async findKey(source: KeySource): Promise<string> {
    return (await openMaster(this.store, this.config, source)).id;
  }

  /** What is complete, by group and time; void ones (of runs that are dead) are left out. */
  async backups(group?: string): Promise<BackupEntry[]> {
    const prefix = group === undefined ? GROUPS_PREFIX : `${GROUPS_PREFIX}${group}/`;
    const folders = foldersOf(await listNames(this.store, prefix, MAX_BACKUP_OBJECTS));
    const entries = [...folders.values()].filter(({ objects }) => objects.includes(MANIFEST));
    const dead = await deadRuns(this.store);
    if (dead.size === 0) return entries.sort(byTime);
    const valid: BackupEntry[] = [];
    await inParallel(entries, READERS, async (entry) => {
      if (await this.#isValid(entry, dead)) valid.push(entry);
    });
    return valid.sort(byTime);
  }

  /** One whose manifest cannot be read counts as there: what is done about it is its reader's to decide. */
  async #isValid(entry: BackupEntry, dead: ReadonlySet<string>): Promise<boolean> {
    try {
      return !dead.has((await this.readManifest(entry)).run);
    } catch (error) {
      return !isNotFound(error);
    }
  }

  /** Every folder under groups/, complete or not. */
  async backupFolders(): Promise<BackupEntry[]> {
    return [...foldersOf(await listNames(this.store, GROUPS_PREFIX, MAX_BACKUP_OBJECTS)).values()];
  }

  /** @throws CowcatcherError NOT_FOUND, FORMAT. */
  async readManifest(backup: BackupName): Promise<Manifest> {
    const name = manifestName(backup);
    const content = await this.#readMetadata(name, MAX_MANIFEST_BYTES);
    return decodeManifest(this.name, name, content, backup);
  }

  /** @throws CowcatcherError NOT_FOUND, FORMAT: also for an index that is not the one of this manifest. */
  async readIndex(manifest: Manifest, disk: string): Promise<DiskIndex> {
    const name = indexName(manifest, disk);
    const expected = manifest.disks.find((candidate) => candidate.name === disk);
    if (expected === undefined) throw noDiskError(this.name, manifest, disk);
    const content = await this.#readMetadata(name, MAX_INDEX_BYTES);
    const sum = createHash("sha256").update(content).digest("hex");
    if (sum !== expected.index_sha256)
      throw damagedError(this.name, name, "it is not the index of its manifest");
    const index = decodeIndex(this.name, name, content);
    if (index.sizeBytes !== expected.size_bytes || index.chunkBytes !== this.config.chunkBytes) {
      throw damagedError(this.name, name, "its sizes are not those of its manifest and repository");
    }
    return index;
  }

  async #readMetadata(name: string, maxBytes: number): Promise<Buffer> {
    const object = await this.store.get(name, maxBytes + 64 * 1024);
    return openMetadata(this.secrets, this.name, name, object, maxBytes);
  }

  /** The backup that an address means. @throws CowcatcherError NOT_FOUND; USAGE where several fit */
  async find({ group, time }: Pick<BackupAddress, "group" | "time">): Promise<Manifest> {
    const backups = await this.backups(group);
    const fits =
      time === "latest"
        ? backups.slice(-1)
        : backups.filter((entry) => entry.time.startsWith(time.replace(/Z$/, "")));
    const exact = fits.find((entry) => entry.time === time);
    const [found, other] = exact === undefined ? fits : [exact];
    if (found === undefined) throw noBackupError(this.name, group, time, backups);
    if (other !== undefined) {
      throw new CowcatcherError({
        code: "USAGE",
        object: `${this.name}::${group}@${time}`,
        problem: `fits ${fits.length} backups`,
        hint: `give more of the time, such as ${found.time}`,
      });
    }
    return this.readManifest(found);
  }

  close(): void {
    this.store.close();
  }
}

function byTime(a: BackupName, b: BackupName): number {
  if (a.group !== b.group) return a.group < b.group ? -1 : 1;
  return a.time < b.time ? -1 : 1;
}

function foldersOf(names: readonly string[]): Map<string, BackupEntry> {
  const folders = new Map<string, BackupEntry & { objects: string[] }>();
  for (const name of names) {
    const parsed = parseBackupObject(name);
    if (parsed === undefined) continue;
    const { group, time, object } = parsed;
    const key = `${group}/${time}`;
    let folder = folders.get(key);
    if (folder === undefined) {
      folder = { group, time, isProtected: false, isVerified: false, objects: [] };
      folders.set(key, folder);
    }
    folder.objects.push(object);
    if (object === PROTECTED) folder.isProtected = true;
    if (object === VERIFIED) folder.isVerified = true;
  }
  return folders;
}

async function readConfig(store: Store): Promise<ReturnType<typeof decodeConfig>> {
  try {
    return decodeConfig(store.name, await store.get(CONFIG_NAME, MAX_CONFIG_BYTES));
  } catch (error) {
    if (!isNotFound(error)) throw error;
    throw new CowcatcherError({
      code: "NOT_FOUND",
      object: store.name,
      problem: "there is no repository",
      hint: `make one with: cowcatcher repo init ${store.name}`,
      cause: error,
    });
  }
}

function existsError(address: string): CowcatcherError {
  return new CowcatcherError({
    code: "EXISTS",
    object: address,
    problem: "there is a repository already",
    hint: "choose another place",
  });
}

function noDiskError(storeName: string, { group, time, disks }: Manifest, disk: string): CowcatcherError {
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: `${storeName}::${group}@${time}`,
    problem: `has no disk ${disk}`,
    hint: `it has ${disks.map(({ name }) => name).join(", ")}`,
  });
}

function noBackupError(
  storeName: string,
  group: string,
  time: string,
  backups: readonly BackupName[],
): CowcatcherError {
  const last = backups.at(-1);
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: `${storeName}::${group}${time === "latest" ? "" : `@${time}`}`,
    problem: last === undefined ? "the group has no backup" : "there is no such backup",
    hint: last === undefined ? "see repo list" : `the latest is of ${last.time}`,
  });
}

/** The disk that an address means. @throws CowcatcherError USAGE where it must be named */
export function diskOf(storeName: string, manifest: Manifest, disk: string | undefined): string {
  const [only, other] = manifest.disks;
  if (disk !== undefined) {
    if (manifest.disks.some(({ name }) => name === disk)) return disk;
    throw noDiskError(storeName, manifest, disk);
  }
  if (only !== undefined && other === undefined) return only.name;
  throw new CowcatcherError({
    code: "USAGE",
    object: `${storeName}::${manifest.group}`,
    problem: "has several disks",
    hint: `give one: ${manifest.disks.map(({ name }) => `${manifest.group}/${name}`).join(", ")}`,
  });
}
