// The file or block device behind a raw or qcow2 target: opened, then either committed or discarded.
//
// A regular file is written as a temporary (see temporary.ts). Once it is complete and synced, commit() gives it its
// final name and syncs the folder. Without --force the name is given by link(2), which fails where a file has
// appeared since the check at the start; with it by rename(2), under the image locks of the file that goes: a program
// may have opened that since the start. A block device is written in place: commit() has nothing to do.
//
// Main thread only. What touches the target's data is asynchronous, since this thread serves the guest too.

import * as fs from "node:fs";
import { basename, dirname } from "node:path";
import { CowcatcherError, errnoOf, ioError } from "../../errors.js";
import { closeFile, openFile, syncFileData } from "../../block/file/fileio.js";
import { acquireImageLock } from "../../block/file/locks.js";
import { existsError, type FileDestination, lockReplaced, resolveDestination } from "./destination.js";
import type { TargetOptions } from "../target.js";
import {
  createTemporary,
  keepTemporary,
  removeStaleTemporaries,
  type Temporary,
  unlinkTemporary,
} from "./temporary.js";

const { O_DIRECT, O_EXCL, O_RDWR } = fs.constants;
/** What link(2) answers on file systems without hard links. */
const NO_LINKS_ERRNOS = new Set(["EPERM", "EOPNOTSUPP", "ENOTSUP", "ENOSYS", "EMLINK", "EXDEV"]);

export interface TargetFile {
  readonly name: string;
  /** Where it stands before commit(): the temporary file's path, or the device's. */
  readonly path: string;
  /** Never O_DIRECT. */
  readonly bufferedFd: number;
  /** O_DIRECT if asked for, else the same as bufferedFd. */
  readonly dataFd: number;
  readonly direct: boolean;
  /** It reads as zeroes where nothing was written. */
  readonly startsZeroed: boolean;
  /** Of a block device, in bytes; null for a file, which grows. */
  readonly capacityBytes: number | null;
  /** After a sync: the final name, for a file. `closeDescriptors` is still to be called. */
  commit(): Promise<void>;
  /** Removes the unfinished file; a device keeps what was written. Never throws. */
  unlink(): void;
  /** Asynchronous, as closing an unlinked file frees its blocks: seconds for a large one. Never rejects. */
  closeDescriptors(): Promise<void>;
}

/** @throws CowcatcherError as resolveDestination; UNSUPPORTED where O_DIRECT is asked for and not to be had. */
export async function openTargetFile(options: TargetOptions, direct: boolean): Promise<TargetFile> {
  const destination = await resolveDestination(options.path, options.force);
  if (destination.kind === "file" && options.inPlace === true) {
    return openInPlace(options, destination, direct);
  }
  if (destination.kind === "file") {
    await removeStaleTemporaries(destination.path);
    return createRegular(options.path, destination, direct);
  }
  return openBlockDevice(options.path, destination.path, destination.capacityBytes, direct);
}

async function createRegular(
  name: string,
  destination: FileDestination,
  direct: boolean,
): Promise<TargetFile> {
  const temporary = createTemporary(dirname(destination.path), basename(destination.path));
  try {
    const finalMode = fs.fstatSync(temporary.fd).mode & 0o777;
    // Until it is complete it is nobody else's business.
    fs.fchmodSync(temporary.fd, 0o600);
    const dataFd = direct ? await openDirect(name, temporary.path) : temporary.fd;
    return {
      name,
      path: temporary.path,
      bufferedFd: temporary.fd,
      dataFd,
      direct,
      startsZeroed: true,
      capacityBytes: null,
      commit: () => commitRegular(name, temporary, destination, finalMode),
      unlink: () => unlinkTemporary(temporary),
      closeDescriptors: () => closeAll(temporary.fd, dataFd),
    };
  } catch (error) {
    unlinkTemporary(temporary);
    await closeAll(temporary.fd, temporary.fd);
    throw ioError("create the target", name, error);
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
    const dataFd = direct ? await openDirect(name, path) : bufferedFd;
    return {
      name,
      path,
      bufferedFd,
      dataFd,
      direct,
      startsZeroed: false,
      capacityBytes: sizeBytes,
      commit: () => Promise.resolve(),
      unlink: () => undefined,
      closeDescriptors: () => closeAll(bufferedFd, dataFd),
    };
  } catch (error) {
    await closeAll(bufferedFd, bufferedFd);
    throw error;
  }
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
    const dataFd = direct ? await openDirect(name, path) : bufferedFd;
    return {
      name,
      path,
      bufferedFd,
      dataFd,
      direct,
      startsZeroed: false,
      capacityBytes,
      commit: () => Promise.resolve(),
      unlink: () => undefined,
      closeDescriptors: () => closeAll(bufferedFd, dataFd),
    };
  } catch (error) {
    await closeAll(bufferedFd, bufferedFd);
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

async function commitRegular(
  name: string,
  temporary: Temporary,
  destination: FileDestination,
  finalMode: number,
): Promise<void> {
  await takeOver(temporary.fd, destination.existing, finalMode);
  const replaced = destination.existing === null ? null : await lockStillFree(name, destination.path);
  try {
    if (destination.existing !== null) await fs.promises.rename(temporary.path, destination.path);
    else await giveNewName(temporary, destination.path);
  } catch (error) {
    throw errnoOf(error) === "EEXIST" ? existsError(name) : ioError("give the target its name", name, error);
  } finally {
    if (replaced !== null) await closeFile(replaced);
  }
  keepTemporary(temporary);
  await syncFolder(name, dirname(destination.path));
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

/** A replaced file's successor has its owner and mode, as if it had been written in place. */
function takeOver(fd: number, existing: fs.Stats | null, newMode: number): Promise<void> {
  return new Promise((resolve) => {
    const setMode = (): void =>
      fs.fchmod(fd, existing === null ? newMode : existing.mode & 0o7777, () => resolve());
    // Only root may give a file away; anyone else's new file is their own.
    if (existing === null) setMode();
    else fs.fchown(fd, existing.uid, existing.gid, setMode);
  });
}

async function giveNewName(temporary: Temporary, to: string): Promise<void> {
  const from = temporary.path;
  try {
    await fs.promises.link(from, to);
  } catch (error) {
    if (!NO_LINKS_ERRNOS.has(errnoOf(error) ?? "")) throw error;
    // No hard links here: look, then rename. A file that appears in between is lost; nothing better exists.
    if (await exists(to)) throw Object.assign(new Error("EEXIST"), { code: "EEXIST" });
    await fs.promises.rename(from, to);
    return;
  }
  // An abort in between may have been quicker. A second name that stays is removed by the next backup.
  await fs.promises.rm(from, { force: true }).catch(() => unlinkTemporary(temporary));
}

async function exists(path: string): Promise<boolean> {
  return fs.promises.lstat(path).then(
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

async function closeAll(bufferedFd: number, dataFd: number): Promise<void> {
  // After a sync that succeeded, close has nothing left to report; after an abort, nothing matters.
  await Promise.allSettled([...new Set([bufferedFd, dataFd])].map((fd) => closeFile(fd)));
}
