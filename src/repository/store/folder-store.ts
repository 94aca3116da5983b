// A repository in a folder: of a local file system, or of NFS or SMB.
//
// An object is a file. It is written under REPO/tmp, synced, and renamed; so under its name it is whole or not there,
// whatever happens. A rename is stable once its folder is synced: `flush` does that for all folders that were touched.
// Nothing here needs mmap or file locks. Hard links, where the file system has them, make an exclusive put exclusive;
// where it has none a check comes before the rename, and two that put within the same moment may both believe to be
// first (only `init` and the names of runs, which are random, ask for it).
//
// A client of NFS answers from its caches for a while, which would break what store.ts promises. It asks the server when a
// file is opened (close-to-open consistency, RFC 8881, 10.3.1), so `head` opens. Of a folder it hears when it makes a
// name there: the answer has the folder's change attribute before and after (change_info4; in version 3 wcc_data), and
// where somebody else has changed it the cache is dropped. So each folder gets a name for a moment before it is read,
// unless its file system is known to be this machine's own.
//
// Times are those that the file system gives a file that is written, which over NFS and SMB is the server's clock.

import { randomBytes } from "node:crypto";
import type { Dirent, Stats } from "node:fs";
import { hostname } from "node:os";
import { dirname, join } from "node:path";
import { LOCAL_FILE_SYSTEMS } from "../../block/file/local-file-systems.js";
import { CowcatcherError, errnoOf, ioError } from "../../errors.js";
import { CHUNKS_PREFIX } from "../format/names.js";
import { inParallel } from "../work/parallel.js";
import { BLOCKING_CALLS, type FileCalls, POOLED_CALLS } from "./file-calls.js";
import {
  checkObjectName,
  type FolderStoreDescription,
  type GetOptions,
  type ListedObject,
  type ListOptions,
  notFoundError,
  type ObjectInfo,
  type PutOptions,
  type PutOutcome,
  type Store,
  tooLargeError,
} from "./store.js";

const TEMPORARY_FOLDER = "tmp";
/** Nobody takes that long to write one object. */
const LITTER_AGE_MS = 24 * 3600 * 1000;
const LIST_BATCH = 1000;
/** Folders read at a time, and objects looked at. */
const AHEAD = 16;
const MAX_DEPTH = 8;
/** Folders that cannot be synced say so in these ways (SMB, FUSE); there the server sees to it. */
const NO_FOLDER_SYNC = new Set(["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EISDIR", "EBADF"]);
const READ_ONLY = new Set(["EROFS", "EACCES", "EPERM", "ENOSPC", "EDQUOT"]);
const NO_LINKS = new Set(["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EXDEV"]);

/** A folder that is to be listed. */
interface Level {
  folder: string;
  depth: number;
  /** On their way. */
  entries?: Promise<Dirent[]>;
}

export class FolderStore implements Store {
  readonly name: string;
  readonly #path: string;
  readonly #calls: FileCalls;
  /** By folder of the first level. */
  readonly #coherent = new Map<string, Promise<boolean>>();
  /** Folders in which names have changed that may not be stable yet. */
  readonly #unsynced = new Set<string>();

  /** @param isBlocking for a thread that serves nobody else (file-calls.ts) */
  constructor({ name, path }: FolderStoreDescription, isBlocking: boolean) {
    this.name = name;
    this.#path = path;
    this.#calls = isBlocking ? BLOCKING_CALLS : POOLED_CALLS;
  }

  async put(name: string, content: Uint8Array, options: PutOptions): Promise<PutOutcome> {
    const path = this.#pathOf(name);
    try {
      if ((await this.#statsOf(path)) !== undefined) return "present";
      const temporary = await this.#writeTemporary(content, options.durable);
      try {
        return await this.#giveName(temporary, path, options);
      } catch (error) {
        await this.#unlinkQuietly(temporary);
        throw error;
      }
    } catch (error) {
      throw this.#error(`write the object ${name}`, error);
    }
  }

  async #giveName(temporary: string, path: string, { durable, exclusive }: PutOptions): Promise<PutOutcome> {
    await this.#makeFolder(dirname(path));
    if (exclusive === true && !(await this.#linkExclusively(temporary, path))) {
      await this.#unlinkQuietly(temporary);
      return "present";
    }
    await this.#rename(temporary, path);
    // rename(2) of two names of one file does nothing at all.
    if (exclusive === true) await this.#unlinkQuietly(temporary);
    if (durable) this.#unsynced.add(dirname(path));
    return "stored";
  }

  /** A folder that has become empty may go before our name is in it. */
  async #rename(temporary: string, path: string): Promise<void> {
    try {
      await this.#calls.rename(temporary, path);
    } catch (error) {
      if (errnoOf(error) !== "ENOENT") throw error;
      await this.#makeFolder(dirname(path));
      await this.#calls.rename(temporary, path);
    }
  }

  /** False: the name is taken. */
  async #linkExclusively(temporary: string, path: string): Promise<boolean> {
    try {
      await this.#calls.link(temporary, path);
      return true;
    } catch (error) {
      const errno = errnoOf(error) ?? "";
      if (errno === "EEXIST") return false;
      if (!NO_LINKS.has(errno)) throw error;
      return (await this.#statsOf(path)) === undefined;
    }
  }

  async #makeFolder(folder: string): Promise<void> {
    if ((await this.#calls.stat(folder)) !== undefined) return;
    const uppermost = await this.#calls.mkdir(folder);
    if (uppermost === undefined) return;
    // Each new folder's name stands in the one above it.
    for (let made = folder; made.length >= uppermost.length; made = dirname(made)) {
      this.#unsynced.add(dirname(made));
    }
  }

  /** The file's bytes are stable afterwards if they are to be; nobody knows its name. */
  async #writeTemporary(content: Uint8Array, durable: boolean): Promise<string> {
    const folder = join(this.#path, TEMPORARY_FOLDER);
    const path = join(folder, `${hostname()}-${process.pid}-${randomBytes(8).toString("hex")}`);
    const fd = await this.#openNew(path, folder);
    try {
      try {
        for (let done = 0; done < content.length;) {
          done += await this.#calls.write(fd, content, done, content.length - done);
        }
        if (durable) await this.#calls.fdatasync(fd);
      } finally {
        await this.#calls.close(fd);
      }
    } catch (error) {
      await this.#unlinkQuietly(path);
      throw error;
    }
    return path;
  }

  async #openNew(path: string, folder: string): Promise<number> {
    try {
      return await this.#calls.open(path, "wx");
    } catch (error) {
      if (errnoOf(error) !== "ENOENT") throw error;
      await this.#calls.mkdir(folder);
      return this.#calls.open(path, "wx");
    }
  }

  async get(name: string, maxBytes: number, { range, memory }: GetOptions = {}): Promise<Buffer> {
    let fd: number | undefined;
    try {
      fd = await this.#calls.open(this.#pathOf(name), "r");
      const { size } = await this.#calls.fstat(fd);
      const start = Math.min(range?.offsetBytes ?? 0, size);
      const length = Math.min(range?.lengthBytes ?? Infinity, size - start);
      if (length > maxBytes) throw tooLargeError(this.name, name, maxBytes);
      const content = memory ?? Buffer.allocUnsafeSlow(length);
      let done = 0;
      while (done < length) {
        const count = await this.#calls.read(fd, content, done, length - done, start + done);
        if (count === 0) break;
        done += count;
      }
      return content.subarray(0, done);
    } catch (error) {
      if (errnoOf(error) === "ENOENT") throw notFoundError(this.name, name, error);
      throw this.#error(`read the object ${name}`, error);
    } finally {
      if (fd !== undefined) await this.#calls.close(fd);
    }
  }

  async head(name: string): Promise<ObjectInfo | undefined> {
    try {
      const stats = await this.#statsOf(this.#pathOf(name));
      return stats === undefined ? undefined : { sizeBytes: stats.size, changedMs: stats.mtimeMs };
    } catch (error) {
      if (errnoOf(error) === "ENOTDIR") return undefined;
      throw this.#error(`examine the object ${name}`, error);
    }
  }

  /** By opening it, for which a client of NFS asks the server. */
  async #statsOf(path: string): Promise<Stats | undefined> {
    let fd: number | undefined;
    try {
      fd = await this.#calls.open(path, "r");
      return await this.#calls.fstat(fd);
    } catch (error) {
      if (errnoOf(error) === "ENOENT") return undefined;
      throw error;
    } finally {
      if (fd !== undefined) await this.#calls.close(fd);
    }
  }

  async *list(prefix: string, options?: ListOptions): AsyncGenerator<ListedObject[]> {
    const folder = prefix.slice(0, prefix.lastIndexOf("/") + 1);
    let batch: ListedObject[] = [];
    for await (const names of this.#walk(folder, prefix)) {
      for (const name of names) batch.push({ name, sizeBytes: -1 });
      if (batch.length < LIST_BATCH) continue;
      yield await this.#withDetails(batch, options);
      batch = [];
    }
    if (batch.length > 0) yield this.#withDetails(batch, options);
  }

  async #withDetails(batch: ListedObject[], options: ListOptions | undefined): Promise<ListedObject[]> {
    const wanted = options?.details;
    if (wanted === undefined) return batch;
    await inParallel(batch, AHEAD, async (object) => {
      if (wanted(object.name)) object.sizeBytes = await this.#sizeOf(object.name);
    });
    return batch.filter(({ name, sizeBytes }) => sizeBytes >= 0 || !wanted(name));
  }

  /** As the client of NFS remembers it, which does here. @returns -1 for what has gone */
  async #sizeOf(name: string): Promise<number> {
    try {
      return (await this.#calls.stat(this.#pathOf(name)))?.size ?? -1;
    } catch (error) {
      throw this.#error(`examine the object ${name}`, error);
    }
  }

  /**
   * Names by the folders that they stand in. A server's answer takes its time, and so does the pool's, so several
   * folders are read at a time: the next AHEAD of those that are to come.
   * @param folder "" or with a slash at its end
   */
  async *#walk(folder: string, prefix: string): AsyncGenerator<string[]> {
    const waiting: Level[] = [{ folder, depth: 0 }];
    for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) {
      const { depth } = next;
      const entries = await (next.entries ?? this.#entriesOf(next.folder));
      const names: string[] = [];
      const below: Level[] = [];
      for (const entry of entries) {
        const name = next.folder + entry.name;
        if (entry.isDirectory()) {
          const isInside = name.startsWith(prefix) || prefix.startsWith(`${name}/`);
          if (isInside && depth < MAX_DEPTH && name !== TEMPORARY_FOLDER) {
            below.push({ folder: `${name}/`, depth: depth + 1 });
          }
        } else if (name.startsWith(prefix) && !entry.name.startsWith(".")) names.push(name);
      }
      waiting.push(...below.reverse());
      for (const level of waiting.slice(-AHEAD)) {
        if (level.entries !== undefined) continue;
        level.entries = this.#entriesOf(level.folder);
        // Whoever comes to it hears of a failure; a list that nobody reads to its end has none.
        level.entries.catch(() => undefined);
      }
      if (names.length > 0) yield names;
    }
  }

  async #entriesOf(folder: string): Promise<Dirent[]> {
    const path = join(this.#path, folder);
    try {
      if (!(await this.#isCoherent(folder))) await this.#refresh(path);
      return await this.#calls.readdir(path);
    } catch (error) {
      // Not made yet, or gone since its name was read.
      if (errnoOf(error) === "ENOENT" && folder !== "") return [];
      throw this.#error(folder === "" ? "list" : `list ${folder}`, error);
    }
  }

  /**
   * Nobody changes the folder but through this machine's kernel, which has no caches to be dropped then. Each folder of
   * the first level may be another mount.
   */
  #isCoherent(folder: string): Promise<boolean> {
    const top = folder.slice(0, folder.indexOf("/") + 1);
    let known = this.#coherent.get(top);
    if (known === undefined) {
      known = this.#look(join(this.#path, top));
      this.#coherent.set(top, known);
    }
    return known;
  }

  async #look(path: string): Promise<boolean> {
    try {
      return LOCAL_FILE_SYSTEMS.has(await this.#calls.fileSystemType(path));
    } catch {
      return false;
    }
  }

  async #refresh(folder: string): Promise<void> {
    const path = join(folder, `.fresh-${randomBytes(8).toString("hex")}`);
    try {
      await this.#calls.close(await this.#calls.open(path, "wx"));
      await this.#calls.unlink(path);
    } catch (error) {
      // Who may only read does not delete, and nobody counts on what he sees.
      if (!READ_ONLY.has(errnoOf(error) ?? "")) throw error;
    }
  }

  async delete(name: string): Promise<void> {
    const path = this.#pathOf(name);
    try {
      await this.#calls.unlink(path);
      this.#unsynced.add(dirname(path));
    } catch (error) {
      if (errnoOf(error) === "ENOENT") return;
      throw this.#error(`delete the object ${name}`, error);
    }
    // Those of chunks stay: there are 256 of them, and looking at one costs as much as the deletion.
    if (!name.startsWith(CHUNKS_PREFIX)) await this.#removeEmptyFolders(dirname(name));
  }

  /** Those below the first level: a group without backups, a run without claims. */
  async #removeEmptyFolders(folder: string): Promise<void> {
    for (let next = folder; next.includes("/"); next = dirname(next)) {
      try {
        await this.#calls.rmdir(join(this.#path, next));
        this.#unsynced.add(dirname(join(this.#path, next)));
      } catch {
        return;
      }
    }
  }

  async touch(name: string, content: Uint8Array): Promise<void> {
    const path = this.#pathOf(name);
    try {
      const temporary = await this.#writeTemporary(content, false);
      try {
        await this.#makeFolder(dirname(path));
        await this.#rename(temporary, path);
      } catch (error) {
        await this.#unlinkQuietly(temporary);
        throw error;
      }
    } catch (error) {
      throw this.#error(`write the object ${name}`, error);
    }
  }

  async flush(prefix?: string): Promise<void> {
    if (prefix !== undefined) {
      for (const entry of await this.#entriesOf(prefix)) {
        if (entry.isDirectory()) this.#unsynced.add(join(this.#path, prefix, entry.name));
      }
      this.#unsynced.add(join(this.#path, prefix));
    }
    for (const folder of [...this.#unsynced]) {
      this.#unsynced.delete(folder);
      try {
        await this.#syncFolder(folder);
      } catch (error) {
        this.#unsynced.add(folder);
        throw this.#error("sync the folder", error);
      }
    }
  }

  async #syncFolder(folder: string): Promise<void> {
    let fd: number | undefined;
    try {
      fd = await this.#calls.open(folder, "r");
      await this.#calls.fsync(fd);
    } catch (error) {
      const errno = errnoOf(error) ?? "";
      // A folder that is gone has no names that could be lost.
      if (errno !== "ENOENT" && !NO_FOLDER_SYNC.has(errno)) throw error;
    } finally {
      if (fd !== undefined) await this.#calls.close(fd);
    }
  }

  async removeLitter(): Promise<number> {
    const folder = join(this.#path, TEMPORARY_FOLDER);
    let removed = 0;
    const probe = await this.#writeTemporary(new Uint8Array(0), false);
    const now = (await this.#calls.stat(probe))?.mtimeMs ?? 0;
    await this.#unlinkQuietly(probe);
    for (const entry of await this.#entriesOf(`${TEMPORARY_FOLDER}/`)) {
      const path = join(folder, entry.name);
      const stats = await this.#calls.stat(path);
      if (stats === undefined || !entry.isFile() || now - stats.mtimeMs < LITTER_AGE_MS) continue;
      await this.#unlinkQuietly(path);
      removed++;
    }
    return removed;
  }

  close(): void {
    // No descriptor stays open between calls.
  }

  #pathOf(name: string): string {
    checkObjectName(name);
    return join(this.#path, name);
  }

  async #unlinkQuietly(path: string): Promise<void> {
    try {
      await this.#calls.unlink(path);
    } catch {
      // Gone already, or removed as litter one day.
    }
  }

  #error(action: string, error: unknown): CowcatcherError {
    return ioError(action, this.name, error);
  }
}
