// Overlays in a job's folder that the job does not know: a backup whose manifest is lost, a disk that somebody made on a
// backup to boot it. What they build on must stay, whatever the rules of retention say: without it they are worth nothing.
//
// Only the headers are read, and only of files that have no manifest of the job's. Where one cannot be read, nothing is known of
// what it needs, and that is an error: then nothing is removed.
import { open, realpath } from "node:fs/promises";
import { join } from "node:path";
import { CowcatcherError, ioError } from "../errors.js";
import { resolveBacking } from "../image/backing-name.js";
import {
  hasQcow2Magic,
  MAX_BACKING_NAME_BYTES,
  V2_HEADER_BYTES,
  viewOf,
} from "../image/qcow2/format/header.js";
import { type KnownBackup, MANIFEST_SUFFIX, namesIn } from "./history.js";

/** In the header of both versions. */
const BACKING_OFFSET_AT = 8;
const BACKING_LENGTH_AT = 16;

/**
 * By the file name of each backup that is needed, the name of a file that builds on it.
 * @param history all backups that the job knows in the folder
 * @throws CowcatcherError IO, LIMIT
 */
export async function foreignOverlays(
  folder: string,
  history: readonly KnownBackup[],
): Promise<ReadonlyMap<string, string>> {
  const needed = new Map<string, string>();
  const known = new Set(history.map(({ file }) => file));
  const real = await realpath(folder).catch(() => folder);
  const byPath = new Map(history.map(({ file }) => [join(real, file), file]));
  for (const name of await namesIn(folder)) {
    if (known.has(name) || name.endsWith(MANIFEST_SUFFIX)) continue;
    const base = await baseOf(join(folder, name));
    const path = base === undefined ? undefined : await realpath(base).catch(() => undefined);
    const file = path === undefined ? undefined : byPath.get(path);
    if (file !== undefined) needed.set(file, name);
  }
  return needed;
}

/** The file that it names as its backing file; undefined for what is no qcow2 image, or names none. */
async function baseOf(path: string): Promise<string | undefined> {
  try {
    const handle = await open(path, "r");
    try {
      if (!(await handle.stat()).isFile()) return undefined;
      const header = Buffer.alloc(V2_HEADER_BYTES);
      const { bytesRead } = await handle.read(header, 0, header.length, 0);
      if (bytesRead < header.length || !hasQcow2Magic(header)) return undefined;
      const offsetBytes = Number(viewOf(header).getBigUint64(BACKING_OFFSET_AT));
      const lengthBytes = header.readUInt32BE(BACKING_LENGTH_AT);
      if (offsetBytes === 0 || lengthBytes === 0 || lengthBytes > MAX_BACKING_NAME_BYTES) return undefined;
      const name = Buffer.alloc(lengthBytes);
      const read = await handle.read(name, 0, lengthBytes, offsetBytes);
      return read.bytesRead < lengthBytes ? undefined : fileNamed(path, name.toString("utf8"));
    } finally {
      await handle.close();
    }
  } catch (error) {
    throw ioError("see what it builds on", path, error);
  }
}

/** A name that makes no sense opens no file. */
function fileNamed(overlay: string, name: string): string | undefined {
  try {
    const layer = resolveBacking(overlay, name);
    return layer.kind === "file" ? layer.path : undefined;
  } catch (error) {
    if (error instanceof CowcatcherError) return undefined;
    throw error;
  }
}
