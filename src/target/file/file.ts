// The file or block device behind a raw or qcow2 target: opened, then either committed or discarded.
//
// A regular file. Its final name is kept for it by a temporary (see temporary.ts), from the start on: a second copy to
// the same name finds it and is refused then, not after its work. The data goes into a file without a name where the
// file system has such (O_TMPFILE), else into the temporary itself. Once it is complete and synced, commit() gives it
// its final name and syncs the folder. Without --force the name is given by link(2), which fails where a file has
// appeared since the check at the start; with it by rename(2), under the image locks of the file that goes: a program
// may have opened that since the start. A block device is written in place: commit() has nothing to do.
//
// The folder may be another user's, who can put anything under any name in it at any time. So nothing is opened by its
// name twice (the second descriptor and the reading back of --verify go through /proc/self/fd), and what gets the final
// name is the open file, or a name that was looked at right before.
//
// On the thread of whoever has the target (backup/storage); offline on the main thread.

import * as fs from "node:fs";
import { basename, dirname } from "node:path";
import { CowcatcherError, errnoOf, ioError } from "../../errors.js";
import {
  changeMode,
  closeFile,
  linkFile,
  openFile,
  renameFile,
  statName,
  statFile,
  syncFileData,
  truncateFile,
  unlinkFile,
} from "../../block/file/calls.js";
import { errnoError } from "../../block/file/fileio.js";
import { acquireImageLock } from "../../block/file/locks.js";
import { libc } from "../../native/libc.js";
import { GiB } from "../../units.js";
import {
  ACL_ACCESS,
  type Attributes,
  attributesOf,
  giveAttributes,
  modeOfNewFile,
  openToReaders,
} from "./attributes.js";
import { existsError, type FileDestination, lockReplaced, resolveDestination } from "./destination.js";
import type { TargetOptions } from "../target.js";
import {
  createTemporary,
  createUnnamed,
  isNameOf,
  keepTemporary,
  sweepFolder,
  type Temporary,
  temporaryPath,
  unlinkTemporary,
  unlinkTemporarySync,
} from "./temporary.js";

const { O_DIRECT, O_EXCL, O_RDWR } = fs.constants;
/** What link(2) answers on file systems without hard links. */
const NO_LINKS_ERRNOS = new Set(["EPERM", "EOPNOTSUPP", "ENOTSUP", "ENOSYS", "EMLINK", "EXDEV"]);
/** Until it is complete it is nobody else's business. */
const OWNER_ONLY = 0o600;
/** Given back at a time: to free all of a large file in one call holds up others' writes to its file system. */
const TRUNCATE_PIECE_BYTES = 1 * GiB;

export interface TargetFile {
  readonly name: string;
  /** Where what is written can be read before commit(), whatever happens to its name. */
  readonly readPath: string;
  /** Names that are to go if the process ends before commit(). */
  readonly temporaryPaths: readonly string[];
  /** Never O_DIRECT. */
  readonly bufferedFd: number;
  /** O_DIRECT if asked for, else the same as bufferedFd. */
  readonly dataFd: number;
  readonly direct: boolean;
  /** It reads as zeroes where nothing was written. */
  readonly startsZeroed: boolean;
  /** Of a block device, in bytes; null for a file, which grows. */
  readonly capacityBytes: number | null;
  /**
   * After a sync: the final name, for a file. `closeDescriptors` is still to be called.
   * @param checkOpen asked right before; throws if the target is given up
   */
  commit(checkOpen: () => void): Promise<void>;
  /** Removes the unfinished file; a device keeps what was written. Never rejects. */
  unlink(): Promise<void>;
  /** The same without a turn of the event loop, as the process ends. */
  unlinkSync(): void;
  /** Closing an unlinked file frees its blocks: seconds for a large one. Never rejects. */
  closeDescriptors(): Promise<void>;
}

/**
 * @throws CowcatcherError as resolveDestination; LOCKED where another copy writes this target; UNSUPPORTED where O_DIRECT
 *   is asked for and not to be had.
 */
export async function openTargetFile(options: TargetOptions, direct: boolean): Promise<TargetFile> {
  const destination = await resolveDestination(options);
  if (destination.kind === "block") {
    return openBlockDevice(options.path, destination.path, destination.capacityBytes, direct);
  }
  if (options.inPlace === true) return openInPlace(options, destination, direct);
  const keeper = await createTemporary(dirname(destination.path), basename(destination.path));
  try {
    await refuseSecondCopy(options.path, destination.path, keeper);
    return await createRegular(options, destination, keeper, direct);
  } catch (error) {
    await unlinkTemporary(keeper);
    await closeAll([keeper.fd]);
    throw ioError("create the target", options.path, error);
  }
}

/** Of two that begin at the same moment each sees the other, and neither goes on. */
async function refuseSecondCopy(name: string, finalPath: string, keeper: Temporary): Promise<void> {
  const { owners } = await sweepFolder(dirname(finalPath), basename(finalPath), keeper.path);
  const [owner] = owners;
  if (owner === undefined) return;
  throw new CowcatcherError({
    code: "LOCKED",
    object: name,
    problem: `another copy is writing this target (process ${owner})`,
    hint: "wait until it is over, or choose another target",
  });
}

/** @param keeper stays the caller's if this throws */
async function createRegular(
  { path: name, sourceAccess = [] }: TargetOptions,
  destination: FileDestination,
  keeper: Temporary,
  direct: boolean,
): Promise<TargetFile> {
  const folder = dirname(destination.path);
  const unnamedFd = keeper.wasUnnamed ? await createUnnamed(folder) : null;
  const bufferedFd = unnamedFd ?? keeper.fd;
  try {
    const attributes = await keptAttributes(name, bufferedFd, destination);
    const newMode = await modeOfNewFile(folder, bufferedFd, sourceAccess);
    const dataFd = direct ? await openDirect(name, pathOfFd(bufferedFd)) : bufferedFd;
    const file: RegularFile = { name, keeper, fd: bufferedFd, isNamed: unnamedFd === null, destination };
    return {
      name,
      readPath: pathOfFd(bufferedFd),
      temporaryPaths: [keeper.path],
      bufferedFd,
      dataFd,
      direct,
      startsZeroed: true,
      capacityBytes: null,
      commit: (checkOpen) => commitRegular(file, attributes, newMode, checkOpen),
      unlink: () => unlinkTemporary(keeper),
      unlinkSync: () => unlinkTemporarySync(keeper),
      closeDescriptors: () => closeRegular(bufferedFd, [keeper.fd, dataFd]),
    };
  } catch (error) {
    if (unnamedFd !== null) await closeAll([unnamedFd]);
    throw error;
  }
}

/**
 * The file that stands there, to be brought up to date: of the disk's size, and locked. Whatever ends the backup early
 * leaves a mixture there that the next one from the same checkpoint makes good: it copies at least as much.
 */
async function openInPlace(
  { path: name, sizeBytes }: TargetOptions,
  { path, existing }: FileDestination,
  direct: boolean,
): Promise<TargetFile> {
  if (existing === null || existing.size !== sizeBytes) {
    const problem =
      existing === null
        ? "there is no file that could hold the state of the checkpoint"
        : `the file has ${existing.size} bytes and the disk ${sizeBytes}: it cannot hold the state of the checkpoint`;
    throw new CowcatcherError({
      code: "NO_BASIS",
      object: name,
      problem,
      hint: "make a full backup there first, or an overlay of it with -O qcow2 -b FILE -B FMT",
    });
  }
  const bufferedFd = await openFile(path, O_RDWR).catch((error: unknown) => {
    throw ioError("open the target", name, error);
  });
  try {
    acquireImageLock(bufferedFd, name, { write: true, resize: true });
    const dataFd = direct ? await openDirect(name, pathOfFd(bufferedFd)) : bufferedFd;
    return {
      name,
      readPath: pathOfFd(bufferedFd),
      temporaryPaths: [],
      bufferedFd,
      dataFd,
      direct,
      startsZeroed: false,
      capacityBytes: sizeBytes,
      commit: () => Promise.resolve(),
      unlink: () => Promise.resolve(),
      unlinkSync: () => undefined,
      closeDescriptors: () => closeAll([bufferedFd, dataFd]),
    };
  } catch (error) {
    await closeAll([bufferedFd]);
    throw error;
  }
}

/** Of the file that is to be replaced: given to the new one now, so that what cannot be kept is known now. */
async function keptAttributes(
  name: string,
  newFd: number,
  { path, existing }: FileDestination,
): Promise<Attributes> {
  if (existing === null) return new Map();
  const fd = await openFile(path, fs.constants.O_RDONLY).catch(() => null);
  if (fd === null) return new Map();
  try {
    const attributes = attributesOf(fd, name);
    giveAttributes(newFd, name, attributes);
    // An ACL has changed the mode. A file system whose modes are fixed (SMB, WebDAV) refuses, and has no ACLs either.
    await changeMode(newFd, OWNER_ONLY).catch((error: unknown) => {
      if (attributes.has(ACL_ACCESS)) throw error;
    });
    return attributes;
  } finally {
    await closeFile(fd);
  }
}

/** Leads to the open file itself, whatever its name leads to by now. */
function pathOfFd(fd: number): string {
  return `/proc/self/fd/${fd}`;
}

async function openBlockDevice(
  name: string,
  path: string,
  capacityBytes: number,
  direct: boolean,
): Promise<TargetFile> {
  // O_EXCL without O_CREAT: the kernel refuses a device that is mounted or part of an array.
  const bufferedFd = await openFile(path, O_RDWR | O_EXCL).catch((error: unknown) => {
    throw errnoOf(error) === "EBUSY" ? deviceBusy(name, error) : ioError("open the device", name, error);
  });
  try {
    acquireImageLock(bufferedFd, name, { write: true, resize: true });
    const dataFd = direct ? await openDirect(name, pathOfFd(bufferedFd)) : bufferedFd;
    return {
      name,
      readPath: pathOfFd(bufferedFd),
      temporaryPaths: [],
      bufferedFd,
      dataFd,
      direct,
      startsZeroed: false,
      capacityBytes,
      commit: () => Promise.resolve(),
      unlink: () => Promise.resolve(),
      unlinkSync: () => undefined,
      closeDescriptors: () => closeAll([bufferedFd, dataFd]),
    };
  } catch (error) {
    await closeAll([bufferedFd]);
    throw error;
  }
}

function deviceBusy(name: string, cause: unknown): CowcatcherError {
  return new CowcatcherError({
    code: "LOCKED",
    object: name,
    problem: "the device is in use",
    hint: "unmount it first",
    cause,
  });
}

async function openDirect(name: string, path: string): Promise<number> {
  try {
    return await openFile(path, O_RDWR | O_DIRECT);
  } catch (error) {
    if (errnoOf(error) !== "EINVAL") throw ioError("open the target", name, error);
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: name,
      problem: "the file system has no O_DIRECT",
      hint: "leave out --direct",
      cause: error,
    });
  }
}

export async function syncData(name: string, fd: number): Promise<void> {
  try {
    await syncFileData(fd);
  } catch (error) {
    throw ioError("sync", name, error);
  }
}

interface RegularFile {
  name: string;
  keeper: Temporary;
  fd: number;
  /** `fd` is the temporary itself. */
  isNamed: boolean;
  destination: FileDestination;
}

async function commitRegular(
  file: RegularFile,
  attributes: Attributes,
  newMode: number,
  checkOpen: () => void,
): Promise<void> {
  const { name, keeper, fd, destination } = file;
  const { path, existing } = destination;
  await openToReaders(fd, name, existing, attributes, newMode);
  const replaced = existing === null ? null : await lockStillFree(name, path);
  try {
    checkOpen();
    if (existing === null) await giveNewName(file);
    else await replaceOldName(file);
  } catch (error) {
    throw errnoOf(error) === "EEXIST" ? existsError(name) : ioError("give the target its name", name, error);
  } finally {
    if (replaced !== null) await closeFile(replaced);
  }
  keepTemporary(keeper);
  await syncFolder(name, dirname(path));
}

async function lockStillFree(name: string, path: string): Promise<number | null> {
  try {
    return await lockReplaced(name, path);
  } catch (error) {
    if (!(error instanceof CowcatcherError) || error.code !== "LOCKED") throw error;
    throw new CowcatcherError({
      code: "LOCKED",
      object: name,
      problem: `another program has opened this file since the backup began, so it was not replaced: ${error.problem}`,
      hint: "end that program and make the backup again, or choose another target",
      cause: error,
    });
  }
}

async function giveNewName({ name, keeper, fd, isNamed, destination }: RegularFile): Promise<void> {
  const to = destination.path;
  try {
    // By the descriptor where that can be, so that no other file can come between the look and the link.
    const result = libc?.linkFd(fd, to);
    if (result !== undefined && result < 0 && !isNamed) throw errnoError("give it its name", name, result);
    if (result !== 0) {
      await refuseForeign(name, keeper.path, fd);
      await linkFile(keeper.path, to);
    }
  } catch (error) {
    if (!isNamed || !NO_LINKS_ERRNOS.has(errnoOf(error) ?? "")) throw error;
    // No hard links here: look, then rename. A file that appears in between is lost; nothing better exists.
    if (await exists(to)) throw Object.assign(new Error("EEXIST"), { code: "EEXIST" });
    await refuseForeign(name, keeper.path, fd);
    await renameFile(keeper.path, to);
    return;
  }
  // An abort in between may have been quicker. A second name that stays is removed by the next backup.
  await unlinkFile(keeper.path).catch(() => unlinkTemporary(keeper));
}

async function replaceOldName({ name, keeper, fd, isNamed, destination }: RegularFile): Promise<void> {
  const to = destination.path;
  if (isNamed) {
    await refuseForeign(name, keeper.path, fd);
    await renameFile(keeper.path, to);
  } else {
    const between = temporaryPath(dirname(to), basename(to));
    const result = libc?.linkFd(fd, between) ?? 0;
    if (result < 0) throw errnoError("give it a name", name, result);
    try {
      await refuseForeign(name, between, fd);
      await renameFile(between, to);
    } catch (error) {
      await unlinkFile(between).catch(() => undefined);
      throw error;
    }
    await unlinkFile(keeper.path).catch(() => unlinkTemporary(keeper));
  }
  // The name may have been given to another file between the look and the rename.
  await refuseForeign(name, to, fd);
}

/** Who may write to the folder can put another file, or a link to one, where ours stands. */
async function refuseForeign(name: string, path: string, fd: number): Promise<void> {
  if (await isNameOf(path, fd)) return;
  throw new CowcatcherError({
    code: "IO",
    object: name,
    problem:
      "another file was put in the place of the unfinished target, which therefore does not get its name",
    hint: "write to a folder that nobody else may write to",
  });
}

async function exists(path: string): Promise<boolean> {
  return statName(path).then(
    () => true,
    () => false,
  );
}

async function syncFolder(name: string, folder: string): Promise<void> {
  let fd: number | undefined;
  try {
    fd = await openFile(folder, fs.constants.O_RDONLY);
    await syncFileData(fd);
  } catch (error) {
    // Some file systems cannot sync a folder (EINVAL), and one that cannot be read (EACCES) may be written.
    if (!["EINVAL", "EACCES", "ENOSYS"].includes(errnoOf(error) ?? "")) throw nameNotSafe(name, error);
  } finally {
    if (fd !== undefined) await closeFile(fd);
  }
}

/** The file that stood there before is gone, so that taking the name away again would leave neither. */
function nameNotSafe(name: string, cause: unknown): CowcatcherError {
  const { problem, ...details } = ioError("sync its folder", name, cause).toDetails();
  return new CowcatcherError({
    ...details,
    problem: `the backup is complete and has its name, which may not survive a crash of this machine: ${problem}`,
    hint: "run sync, and look whether it is there before you rely on it",
    cause,
  });
}

async function closeAll(fds: readonly number[]): Promise<void> {
  // After a sync that succeeded, close has nothing left to report; after an abort, nothing matters.
  await Promise.allSettled([...new Set(fds)].map((fd) => closeFile(fd)));
}

async function closeRegular(fd: number, others: readonly number[]): Promise<void> {
  await freeInPieces(fd).catch(() => undefined);
  await closeAll([fd, ...others]);
}

/** Of a file without a name: frees its blocks before its last descriptor is closed, which would do it in one call. */
export async function freeInPieces(fd: number): Promise<void> {
  const { nlink, size } = await statFile(fd);
  if (nlink > 0n) return;
  for (let bytes = Number(size) - TRUNCATE_PIECE_BYTES; bytes > 0; bytes -= TRUNCATE_PIECE_BYTES) {
    await truncateFile(fd, bytes);
  }
}
