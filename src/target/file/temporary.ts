// Temporary files: what a target is written to until it is complete, and what a job spills to.
//
// A temporary is called `.PREFIX.cowcatcher-PID-RANDOM.tmp` and stands in a folder that the caller names (for a
// target: beside the final path, so that a rename ends it). It must vanish however the process ends:
//  - the caller discards or keeps it;
//  - the process exits: an "exit" handler unlinks what is still registered;
//  - the process is killed: the next one that uses the same folder and prefix finds and removes it.
//
// The last case needs to tell a dead process's file from a live one's. The owner holds an OFD lock on byte 0 for
// as long as it has the file open (QEMU's image locks are at bytes 100 and 200 and do not meet it); the kernel
// drops it with the process, also across containers and hosts that share the folder, where process ids mean
// nothing. Where no lock can be had (no libc, a file system without locks) RANDOM starts with "u" and the process
// id decides. The remover unlinks while it holds the lock itself; an owner that finds its fresh file locked or
// unlinked by a remover that was quicker makes another.
//
// Main thread only. Creating and unlinking are synchronous: a few system calls on the folder, made when a job
// starts or ends; the search for stale files, which may read a large folder, is not.

import * as fs from "node:fs";
import { createHash, randomBytes } from "node:crypto";
import { constants as os } from "node:os";
import { basename, dirname, join } from "node:path";
import { CowcatcherError, errnoOf, ioError } from "../../errors.js";
import { F_WRLCK, libc } from "../../native/libc.js";

export interface Temporary {
  path: string;
  /** Open for reading and writing. */
  fd: number;
}

const LOCK_BYTE = 0;
/** A name that long plus what is put around it still fits into the 255 bytes that file systems take. */
const PREFIX_BYTES_MAX = 200;
/** Each attempt fails only if another process removes our new file within microseconds. */
const CREATE_ATTEMPTS_MAX = 8;
const SUFFIX_PATTERN = /^(\d{1,10})-(u?)[0-9a-f]{12}\.tmp$/;
const HELD_ERRNOS = new Set([-os.errno.EAGAIN, -os.errno.EACCES]);

const live = new Map<string, Temporary>();
let exitHandlerInstalled = false;

/**
 * Creates and opens an empty file in `directory`, with mode 0666 less the umask.
 * @throws CowcatcherError NOT_FOUND, IO or NO_SPACE, naming the folder.
 */
export function createTemporary(directory: string, prefix: string): Temporary {
  installExitHandler();
  let unlocked = libc === null;
  for (let attempt = 0; attempt < CREATE_ATTEMPTS_MAX; attempt++) {
    const temporary = openNew(directory, prefix, unlocked);
    const outcome = unlocked ? "held" : hold(temporary);
    if (outcome === "held") {
      live.set(temporary.path, temporary);
      return temporary;
    }
    if (outcome === "no locks here") unlocked = true;
    closeAndUnlink(temporary);
  }
  throw new CowcatcherError({
    code: "LIMIT",
    object: directory,
    problem: `no temporary file could be kept in ${CREATE_ATTEMPTS_MAX} attempts: another process removes them`,
  });
}

function openNew(directory: string, prefix: string, unlocked: boolean): Temporary {
  const random = (unlocked ? "u" : "") + randomBytes(6).toString("hex");
  const path = join(directory, `${namePrefix(prefix)}${process.pid}-${random}.tmp`);
  try {
    return {
      path,
      fd: fs.openSync(path, fs.constants.O_RDWR | fs.constants.O_CREAT | fs.constants.O_EXCL, 0o666),
    };
  } catch (error) {
    throw ioError("create a file in this folder", directory, error);
  }
}

function hold({ path, fd }: Temporary): "held" | "lost" | "no locks here" {
  const result = libc?.ofdLock(fd, F_WRLCK, LOCK_BYTE, 1) ?? -os.errno.ENOSYS;
  if (HELD_ERRNOS.has(result)) return "lost";
  if (result < 0) return "no locks here";
  const inPlace = fs.statSync(path, { throwIfNoEntry: false });
  return inPlace !== undefined && inPlace.ino === fs.fstatSync(fd).ino ? "held" : "lost";
}

/** Ends the care for a file that has its final name now. Its descriptor stays the caller's to close. */
export function keepTemporary(temporary: Temporary): void {
  live.delete(temporary.path);
}

/** Unlinks the file, if it is there. Never throws. Its descriptor stays the caller's to close. */
export function unlinkTemporary(temporary: Temporary): void {
  live.delete(temporary.path);
  unlinkQuietly(temporary.path);
}

/** Unlinks every temporary of this process. Never throws. */
export function unlinkAllTemporaries(): void {
  for (const temporary of live.values()) unlinkQuietly(temporary.path);
  live.clear();
}

/** As removeStale, for what targets with this final path left. */
export function removeStaleTemporaries(finalPath: string): Promise<string[]> {
  return removeStale(dirname(finalPath), basename(finalPath));
}

/**
 * Removes what dead processes left of createTemporary(directory, prefix). Files of live processes, and what
 * cannot be opened or judged, stay. Never throws: stale files harm nobody but the disk's free space.
 * @returns the paths removed.
 */
export async function removeStale(directory: string, prefix: string): Promise<string[]> {
  const start = namePrefix(prefix);
  const names = await fs.promises.readdir(directory).catch(() => []);
  const removed: string[] = [];
  for (const name of names) {
    if (!name.startsWith(start)) continue;
    const match = SUFFIX_PATTERN.exec(name.slice(start.length));
    if (match === null) continue;
    const path = join(directory, name);
    if (live.has(path)) continue;
    if (removeIfStale(path, Number(match[1]), match[2] === "u")) removed.push(path);
  }
  return removed;
}

function removeIfStale(path: string, pid: number, unlocked: boolean): boolean {
  let fd: number;
  try {
    // Neither a link nor a FIFO that somebody put there may be followed or waited for.
    fd = fs.openSync(path, fs.constants.O_RDWR | fs.constants.O_NOFOLLOW | fs.constants.O_NONBLOCK);
  } catch {
    return false;
  }
  try {
    if (!fs.fstatSync(fd).isFile() || !isStale(fd, pid, unlocked)) return false;
    fs.unlinkSync(path);
    return true;
  } catch {
    return false;
  } finally {
    fs.closeSync(fd);
  }
}

function isStale(fd: number, pid: number, unlocked: boolean): boolean {
  if (unlocked || libc === null) return pid === process.pid || !isAlive(pid);
  return libc.ofdLock(fd, F_WRLCK, LOCK_BYTE, 1) >= 0;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return errnoOf(error) !== "ESRCH";
  }
}

function namePrefix(prefix: string): string {
  const short =
    Buffer.byteLength(prefix) <= PREFIX_BYTES_MAX
      ? prefix
      : createHash("sha256").update(prefix).digest("hex");
  return `.${short}.cowcatcher-`;
}

function installExitHandler(): void {
  if (exitHandlerInstalled) return;
  exitHandlerInstalled = true;
  process.on("exit", unlinkAllTemporaries);
}

function closeAndUnlink({ path, fd }: Temporary): void {
  fs.closeSync(fd);
  unlinkQuietly(path);
}

function unlinkQuietly(path: string): void {
  try {
    fs.unlinkSync(path);
  } catch {
    // Gone already, or the folder is: there is nothing better to do with what remains.
  }
}
