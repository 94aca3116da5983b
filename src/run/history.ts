// What a job has left in a folder: a manifest beside each backup file, FILE.json, written when the backup is complete.
//
// A backup without a manifest is none of this job's, or not finished: it is never built upon, and never removed. A manifest
// tells its own file by its own name, not by what stands in it, so that a changed one cannot lead elsewhere.
//
//   chain   a full backup and the incremental ones on it, each an overlay of the one before
//   whole   a backup whose file is there, and all that it builds on
import { lstat, open, readdir, rename, unlink } from "node:fs/promises";
import { dirname, join } from "node:path";
import { CowcatcherError, errnoOf, ioError } from "../errors.js";

export const MANIFEST_SUFFIX = ".json";
export const MANIFEST_FORMAT = "cowcatcher-backup/1";
const MAX_MANIFEST_BYTES = 1024 * 1024;
const MAX_ENTRIES = 100_000;

export interface BackupManifest {
  format: typeof MANIFEST_FORMAT;
  job: string;
  group: string;
  disk: string;
  /** Address of what was backed up. */
  source: string;
  /** The instant that it shows: RFC 3339, UTC. */
  t0: string;
  level: "full" | "incremental";
  level_reason: string;
  /** File name, in the same folder, of the backup that this one builds on; null of a full one. */
  parent: string | null;
  /** The server's checkpoint of its T0; null where it has none. */
  checkpoint: string | null;
  /** QEMU keeps a bitmap of what has changed since its T0, and finds it by the backup's file. */
  qemu_bitmap?: boolean | undefined;
  target_format: string | null;
  /** Of the disk. */
  bytes: number;
  bytes_on_target: number | null;
  seconds: number;
  /** The backup was read back and compared, or checked. */
  verified: boolean;
  ignored_errors: number;
  version: string;
}

export interface KnownBackup extends BackupManifest {
  /** Absolute path of the backup's file. */
  path: string;
  /** Its name in the folder. */
  file: string;
}

/**
 * The job's backups of a disk in a folder, the oldest first; files that are gone are left out.
 * @throws CowcatcherError IO, LIMIT. A folder that is not there is empty.
 */
export async function readHistory(folder: string, job: string, disk: string): Promise<KnownBackup[]> {
  const found: KnownBackup[] = [];
  for (const name of await namesIn(folder)) {
    if (!name.endsWith(MANIFEST_SUFFIX)) continue;
    const file = name.slice(0, -MANIFEST_SUFFIX.length);
    const path = join(folder, file);
    const manifest = await readManifest(path + MANIFEST_SUFFIX);
    if (manifest?.job !== job || manifest.disk !== disk) continue;
    if (await isFile(path)) found.push({ ...manifest, path, file });
  }
  return found.sort((a, b) => (a.t0 < b.t0 ? -1 : a.t0 > b.t0 ? 1 : a.file < b.file ? -1 : 1));
}

/** A folder that is not there is empty. @throws CowcatcherError IO, LIMIT */
export async function namesIn(folder: string): Promise<string[]> {
  try {
    const names = await readdir(folder);
    if (names.length <= MAX_ENTRIES) return names;
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return [];
    throw ioError("read the folder", folder, error);
  }
  throw new CowcatcherError({
    code: "LIMIT",
    object: folder,
    problem: `has more than ${MAX_ENTRIES} entries`,
    hint: "give the job a folder of its own, or keep fewer backups",
  });
}

async function isFile(path: string): Promise<boolean> {
  return lstat(path).then(
    (stats) => stats.isFile(),
    () => false,
  );
}

/** Undefined for what is no manifest of ours, whatever it is. */
async function readManifest(path: string): Promise<BackupManifest | undefined> {
  try {
    const handle = await open(path, "r");
    try {
      const stats = await handle.stat();
      if (!stats.isFile() || stats.size > MAX_MANIFEST_BYTES) return undefined;
      const value = JSON.parse(await handle.readFile("utf8")) as unknown;
      return isManifest(value) ? value : undefined;
    } finally {
      await handle.close();
    }
  } catch {
    return undefined;
  }
}

function isManifest(value: unknown): value is BackupManifest {
  if (typeof value !== "object" || value === null) return false;
  const { format, job, disk, t0, parent, level, checkpoint } = value as Record<string, unknown>;
  return (
    format === MANIFEST_FORMAT &&
    typeof job === "string" &&
    typeof disk === "string" &&
    typeof t0 === "string" &&
    !Number.isNaN(Date.parse(t0)) &&
    (level === "full" || level === "incremental") &&
    (parent === null || (typeof parent === "string" && !parent.includes("/"))) &&
    (checkpoint === null || typeof checkpoint === "string")
  );
}

/** Durable when it returns, and whole whatever happens meanwhile. */
export async function writeManifest(backupPath: string, manifest: BackupManifest): Promise<void> {
  const path = backupPath + MANIFEST_SUFFIX;
  const temporary = `${path}.tmp`;
  try {
    const handle = await open(temporary, "w", 0o600);
    try {
      await handle.writeFile(`${JSON.stringify(manifest, null, 2)}\n`);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(temporary, path);
    await syncFolder(dirname(path));
  } catch (error) {
    throw ioError("write the manifest", path, error);
  }
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** The file and its manifest: the file first, as a manifest without a file is passed over. */
export async function removeBackup({ path }: KnownBackup): Promise<void> {
  for (const name of [path, path + MANIFEST_SUFFIX]) {
    try {
      await unlink(name);
    } catch (error) {
      if (errnoOf(error) !== "ENOENT") throw ioError("remove", name, error);
    }
  }
  await syncFolder(dirname(path)).catch(() => undefined);
}

/** From the full backup to this one. Undefined where a part of it is gone. */
export function chainOf(backup: KnownBackup, all: readonly KnownBackup[]): KnownBackup[] | undefined {
  const byFile = new Map(all.map((one) => [one.file, one]));
  const chain = [backup];
  for (let at = backup; at.parent !== null;) {
    const parent = byFile.get(at.parent);
    // A circle would never end; a chain is no longer than all there is.
    if (parent === undefined || chain.length > all.length) return undefined;
    chain.unshift(parent);
    at = parent;
  }
  return chain;
}
