// Where a target's final name leads, and whether a target may be put there. Nothing is changed here.

import * as fs from "node:fs";
import { dirname, basename, join, resolve } from "node:path";
import { CowcatcherError, errnoOf, ioError } from "../../errors.js";
import { readDeviceAttribute, refuseReadOnlyDevice } from "../../block/file/read-only-device.js";
import { closeFile, openFile } from "../../block/file/fileio.js";
import { acquireImageLock } from "../../block/file/locks.js";

const DEVICE_FOLDER = "/dev";
const SHARED_MEMORY_FOLDER = "/dev/shm";

export interface FileDestination {
  kind: "file";
  /** Absolute, symbolic links of an existing file resolved: the temporary goes beside what the link points to. */
  path: string;
  /** The file that stands there and is to be replaced. */
  existing: fs.Stats | null;
}

export interface BlockDestination {
  kind: "block";
  path: string;
  capacityBytes: number;
}

export type Destination = FileDestination | BlockDestination;

/**
 * @throws CowcatcherError EXISTS (without force), NOT_FOUND (no folder, a dangling link, a new name among the devices),
 * IO (EROFS: a device that is set read-only), UNSUPPORTED (neither a
 * file nor a block device), LOCKED (a file to be replaced that another program uses), IO.
 */
export async function resolveDestination(path: string, force: boolean): Promise<Destination> {
  if (path === "") throw new CowcatcherError({ code: "USAGE", object: "TARGET", problem: "an empty path" });
  const stats = await statTarget(path);
  if (stats === null) return newFile(path);
  if (stats.isDirectory()) throw wrongKind(path, "is a directory", "name a file in it");
  if (stats.isCharacterDevice()) {
    throw wrongKind(path, "is a character device", "to throw the data away, the target is null:");
  }
  if (!stats.isFile() && !stats.isBlockDevice()) {
    const isPipe = stats.isFIFO() || stats.isSocket();
    const hint = isPipe ? "for a stream the target is -, standard output" : undefined;
    throw wrongKind(path, "is neither a file nor a block device", hint);
  }
  if (!force) throw existsError(path);
  const realPath = await fs.promises.realpath(path);
  if (stats.isBlockDevice()) {
    await refuseReadOnlyDevice(path, stats);
    return { kind: "block", path: realPath, capacityBytes: await blockDeviceBytes(path, stats.rdev) };
  }
  await refuseIfInUse(path, realPath);
  return { kind: "file", path: realPath, existing: stats };
}

export function existsError(path: string): CowcatcherError {
  return new CowcatcherError({
    code: "EXISTS",
    object: path,
    problem: "exists already",
    hint: "--force overwrites it",
  });
}

async function statTarget(path: string): Promise<fs.Stats | null> {
  try {
    return await fs.promises.stat(path);
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw ioError("look at the target", path, error);
  }
  const link = await fs.promises.readlink(path).catch(() => null);
  if (link === null) return null;
  throw new CowcatcherError({
    code: "NOT_FOUND",
    object: path,
    problem: `is a symbolic link to ${link}, which does not exist`,
    hint: "remove the link, or name the file itself",
  });
}

async function newFile(path: string): Promise<FileDestination> {
  const folder = dirname(resolve(path));
  if (/[/\\]$/.test(path)) throw wrongKind(path, "names a folder that does not exist", "name a file");
  try {
    const realFolder = await fs.promises.realpath(folder);
    await refuseDeviceFolder(path, realFolder);
    return { kind: "file", path: join(realFolder, basename(path)), existing: null };
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw ioError("look at the target's folder", path, error);
    if (isBelow(DEVICE_FOLDER, folder)) throw noSuchDevice(path, error);
    throw new CowcatcherError({
      code: "NOT_FOUND",
      object: path,
      problem: `the folder ${folder} does not exist`,
      hint: "create it first",
      cause: error,
    });
  }
}

/**
 * A file there would be taken for the device that was meant, fill the machine's memory, and go with the next start.
 * @param folder absolute, without links
 * @throws CowcatcherError NOT_FOUND, naming `path`
 */
export async function refuseDeviceFolder(path: string, folder: string): Promise<void> {
  if (!isBelow(DEVICE_FOLDER, folder)) return;
  // /dev/shm and the like are file systems of their own.
  const [there, devices] = await Promise.all([fs.promises.stat(folder), fs.promises.stat(DEVICE_FOLDER)]);
  if (there.dev === devices.dev && !isBelow(SHARED_MEMORY_FOLDER, folder))
    throw noSuchDevice(path, undefined);
}

function isBelow(folder: string, path: string): boolean {
  return path === folder || path.startsWith(`${folder}/`);
}

function noSuchDevice(path: string, cause: unknown): CowcatcherError {
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: path,
    problem: "no such device",
    hint: "is it activated, and spelled so? No file is made among the devices",
    cause,
  });
}

function wrongKind(path: string, problem: string, hint: string | undefined): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object: path, problem, hint });
}

/** A rename would leave a running machine on a file without a name. */
async function refuseIfInUse(name: string, path: string): Promise<void> {
  const fd = await lockReplaced(name, path);
  if (fd !== null) await closeFile(fd);
}

/**
 * Keeps others from opening the file at `path` as an image while it is replaced.
 * @returns a descriptor that holds the locks until it is closed; null where the file is gone, or may not be opened.
 * @throws CowcatcherError LOCKED for a file that another program uses, IO.
 */
export async function lockReplaced(name: string, path: string): Promise<number | null> {
  let fd: number;
  try {
    fd = await openFile(path, fs.constants.O_RDONLY);
  } catch (error) {
    if (["EACCES", "ENOENT"].includes(errnoOf(error) ?? "")) return null;
    throw ioError("open the file to be replaced", name, error);
  }
  try {
    acquireImageLock(fd, name, { write: true, resize: true });
    return fd;
  } catch (error) {
    await closeFile(fd);
    throw error;
  }
}

/** stat() has no size for a block device; sysfs has it, in units of 512 bytes whatever its sectors are. */
async function blockDeviceBytes(path: string, rdev: number): Promise<number> {
  try {
    return Number(await readDeviceAttribute(rdev, "size")) * 512;
  } catch (error) {
    throw ioError("find the device's size", path, error);
  }
}
