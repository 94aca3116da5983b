// Where a target's final name leads, and whether a target may be put there. Nothing is changed here.

import * as fs from "node:fs";
import { dirname, basename, join } from "node:path";
import { absoluteName } from "../../file-names.js";
import { mountPointsIn } from "../../block/file/mounts.js";
import { CowcatcherError, errnoOf, ioError } from "../../errors.js";
import { readDeviceAttribute, refuseReadOnlyDevice } from "../../block/file/read-only-device.js";
import { closeFile, openFile, readLink, realPath, statPath } from "../../block/file/calls.js";
import { acquireImageLock } from "../../block/file/locks.js";
import type { TargetOptions } from "../target.js";

const DEVICE_FOLDER = "/dev";
const SHARED_MEMORY_FOLDER = "/dev/shm";
const STICKY_BIT = 0o1000;

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
export async function resolveDestination({
  path,
  force,
  inPlace = false,
}: Pick<TargetOptions, "path" | "force" | "inPlace">): Promise<Destination> {
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
  const realName = await realPath(path);
  if (stats.isBlockDevice()) {
    await refuseReadOnlyDevice(path, stats);
    return { kind: "block", path: realName, capacityBytes: await blockDeviceBytes(path, stats.rdev) };
  }
  if (!inPlace) await refuseIrreplaceable(path, realName, stats);
  await refuseIfInUse(path, realName);
  return { kind: "file", path: realName, existing: stats };
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
    return await statPath(path);
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw ioError("look at the target", path, error);
  }
  const link = await readLink(path).catch(() => null);
  if (link === null) return null;
  throw new CowcatcherError({
    code: "NOT_FOUND",
    object: path,
    problem: `is a symbolic link to ${link}, which does not exist`,
    hint: "remove the link, or name the file itself",
  });
}

async function newFile(path: string): Promise<FileDestination> {
  const folder = dirname(absoluteName(path));
  // With a slash, or a dot, at its end it can only be a folder.
  if (/\/\.{0,2}$/.test(path)) throw wrongKind(path, "names a folder that does not exist", "name a file");
  try {
    const realFolder = await realPath(folder);
    await refuseDeviceFolder(path, realFolder);
    return { kind: "file", path: join(realFolder, basename(path)), existing: null };
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw ioError("look at the target's folder", path, error);
    if (await isAmongDevices(await lastThere(folder))) throw noSuchDevice(path, error);
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
  if (await isAmongDevices(folder)) throw noSuchDevice(path, undefined);
}

/** /dev/shm and the like are file systems of their own, or made for files. */
async function isAmongDevices(folder: string): Promise<boolean> {
  if (!isBelow(DEVICE_FOLDER, folder) || isBelow(SHARED_MEMORY_FOLDER, folder)) return false;
  const [there, devices] = await Promise.all([statPath(folder), statPath(DEVICE_FOLDER)]);
  return there.dev === devices.dev;
}

/** The last folder on the way that is there. */
async function lastThere(folder: string): Promise<string> {
  for (let at = folder; ; at = dirname(at)) {
    const real = await realPath(at).catch(() => null);
    if (real !== null) return real;
    if (at === dirname(at)) return at;
  }
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

/**
 * What the rename at the end would meet, said before anything is copied. A file is never written in place: until the
 * copy is complete there would be neither the old backup nor the new one.
 */
async function refuseIrreplaceable(name: string, path: string, stats: fs.Stats): Promise<void> {
  if (stats.nlink > 1) {
    const others = stats.nlink === 2 ? "another name" : `${stats.nlink - 1} other names`;
    const problem = `the file has ${others} (hard links), which would keep the old content`;
    throw irreplaceable(name, problem, "remove the file first, or choose another target");
  }
  if ((await mountPointsIn(dirname(path))).has(path)) {
    const problem = "a file system is mounted on the file (a bind mount), so another cannot take its place";
    throw irreplaceable(name, problem, "mount its folder instead, or write to a new file there");
  }
  if (await isForeignInSticky(dirname(path), stats)) {
    const problem =
      "the file is another user's, in a folder with the sticky bit: only its owner may replace it";
    throw irreplaceable(name, problem, "choose another target");
  }
  const fd = await openFile(path, fs.constants.O_WRONLY | fs.constants.O_NONBLOCK).catch((error: unknown) => {
    // One that may not be written may still be replaced; one that is immutable or append-only may not.
    if (errnoOf(error) !== "EPERM") return null;
    const problem = "the file is immutable or append-only (chattr)";
    throw irreplaceable(name, problem, "chattr -i -a, or choose another target");
  });
  if (fd !== null) await closeFile(fd);
}

function irreplaceable(name: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object: name, problem, hint });
}

async function isForeignInSticky(folder: string, { uid }: fs.Stats): Promise<boolean> {
  const me = process.geteuid?.() ?? 0;
  if (me === 0 || uid === me) return false;
  const stats = await statPath(folder);
  return (stats.mode & STICKY_BIT) !== 0 && stats.uid !== me;
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
