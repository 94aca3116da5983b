// Temporary files: what a target is written to until it is complete, what keeps its name for it, what a job spills to.
//
// A temporary is called `.PREFIX.cowcatcher-PID-RANDOM.tmp` and stands in a folder that the caller names (for a
// target: beside the final path). It is made with mode 0600, and must vanish however the process ends:
//  - the caller discards or keeps it;
//  - the process exits: an "exit" handler unlinks what is still registered;
//  - the process is killed: the next one that makes one in the same folder finds and removes it.
//
// The last case needs to tell a dead process's file from a live one's. The owner holds an OFD lock on byte 0 for
// as long as it has the file open (QEMU's image locks are at bytes 100 and 200 and do not meet it); the kernel
// drops it with the process, also across containers and hosts that share the folder, where process ids mean
// nothing. Where no lock can be had (no libc, a file system without locks) RANDOM starts with "u" and the process
// id decides. The remover unlinks while it holds the lock itself; an owner that finds its fresh file locked or
// unlinked by a remover that was quicker makes another.
//
// Where the file system can (O_TMPFILE), the file is made without a name, locked, and named then: nobody ever sees it
// unlocked, and that a file without a name can be given one is proven before anybody relies on it. `createUnnamed`
// makes such files for targets' data: no name that somebody could put another file under, and nothing to be left behind.
//
// Whose names are looked at. What dead processes left under the same PREFIX is always removed. What they left under
// others (yesterday's target, if targets have dates) only on file systems of this machine: elsewhere a lock may be one
// that this machine does not see, as with NFS's option nolock.
//
// On the thread of whoever has the target (backup/storage); offline on the main thread.

import * as fs from "node:fs";
import { createHash, randomBytes } from "node:crypto";
import { constants as os } from "node:os";
import { basename, dirname, join } from "node:path";
import { systemName } from "../../file-names.js";
import { LOCAL_FILE_SYSTEMS } from "../../block/file/local-file-systems.js";
import { CowcatcherError, errnoOf, ioError } from "../../errors.js";
import {
  closeFile,
  namesIn,
  openFile,
  statFile,
  statFileSystem,
  statName,
  unlinkFile,
} from "../../block/file/calls.js";
import { F_WRLCK, libc } from "../../native/libc.js";

export interface Temporary {
  path: string;
  /** Open for reading and writing. */
  fd: number;
  /** It was made without a name and given one afterwards: so can others in this folder. */
  wasUnnamed: boolean;
}

const { O_CREAT, O_DIRECTORY, O_EXCL, O_NOFOLLOW, O_NONBLOCK, O_RDWR } = fs.constants;
/** Linux's, which Node does not name: an architecture's bit, and O_DIRECTORY. */
const O_TMPFILE = 0o20000000 | O_DIRECTORY;
const OWNER_ONLY = 0o600;
const LOCK_BYTE = 0;
/** A name that long plus what is put around it still fits into the 255 bytes that file systems take. */
const PREFIX_BYTES_MAX = 200;
/** Each attempt fails only if another process removes our new file within microseconds. */
const CREATE_ATTEMPTS_MAX = 8;
const NAME_PATTERN = /^(\..+\.cowcatcher-)(\d{1,10})-(u?)[0-9a-f]{12}\.tmp$/;
const HELD_ERRNOS = new Set([-os.errno.EAGAIN, -os.errno.EACCES]);
const live = new Map<string, Temporary>();
let exitHandlerInstalled = false;

/**
 * Creates and opens an empty file in `directory`, readable for its owner alone.
 * @throws CowcatcherError NOT_FOUND, IO or NO_SPACE, naming the folder.
 */
export async function createTemporary(directory: string, prefix: string): Promise<Temporary> {
  installExitHandler();
  const temporary = (await createNamedLater(directory, prefix)) ?? (await createNamed(directory, prefix));
  live.set(temporary.path, temporary);
  return temporary;
}

/**
 * A locked file without a name, readable for its owner alone; libc.linkFd gives it one.
 * @returns null where the file system has no such files, or no locks.
 */
export async function createUnnamed(directory: string): Promise<number | null> {
  if (libc === null) return null;
  const fd = await openFile(directory, O_TMPFILE | O_RDWR, OWNER_ONLY).catch(() => null);
  if (fd === null || libc.ofdLock(fd, F_WRLCK, LOCK_BYTE, 1) >= 0) return fd;
  await closeFile(fd);
  return null;
}

/** Another free name for a temporary of this process. */
export function temporaryPath(directory: string, prefix: string, unlocked = false): string {
  const random = (unlocked ? "u" : "") + randomBytes(6).toString("hex");
  return join(directory, `${namePrefix(prefix)}${process.pid}-${random}.tmp`);
}

async function createNamedLater(directory: string, prefix: string): Promise<Temporary | null> {
  const fd = await createUnnamed(directory);
  if (fd === null) return null;
  const path = temporaryPath(directory, prefix);
  // What keeps it from having a name (no /proc, a policy) the other way meets too, or it does not matter there.
  if (libc?.linkFd(fd, path) === 0) return { path, fd, wasUnnamed: true };
  await closeFile(fd);
  return null;
}

async function createNamed(directory: string, prefix: string): Promise<Temporary> {
  let unlocked = libc === null;
  for (let attempt = 0; attempt < CREATE_ATTEMPTS_MAX; attempt++) {
    const temporary = await openNew(directory, prefix, unlocked);
    const outcome = unlocked ? "held" : await hold(temporary);
    if (outcome === "held") return temporary;
    if (outcome === "no locks here") unlocked = true;
    await closeFile(temporary.fd);
    await unlinkQuietly(temporary.path);
  }
  throw new CowcatcherError({
    code: "LIMIT",
    object: directory,
    problem: `no temporary file could be kept in ${CREATE_ATTEMPTS_MAX} attempts: another process removes them`,
  });
}

async function openNew(directory: string, prefix: string, unlocked: boolean): Promise<Temporary> {
  const path = temporaryPath(directory, prefix, unlocked);
  try {
    return { path, fd: await openFile(path, O_RDWR | O_CREAT | O_EXCL, OWNER_ONLY), wasUnnamed: false };
  } catch (error) {
    throw ioError("create a file in this folder", directory, error);
  }
}

async function hold({ path, fd }: Temporary): Promise<"held" | "lost" | "no locks here"> {
  const result = libc?.ofdLock(fd, F_WRLCK, LOCK_BYTE, 1) ?? -os.errno.ENOSYS;
  if (HELD_ERRNOS.has(result)) return "lost";
  if (result < 0) return "no locks here";
  return (await isNameOf(path, fd)) ? "held" : "lost";
}

/** Whether the name, which is no symbolic link, leads to the open file. */
export async function isNameOf(path: string, fd: number): Promise<boolean> {
  const named = await statName(path).catch(() => null);
  const { dev, ino } = await statFile(fd);
  return named !== null && named.dev === dev && named.ino === ino;
}

/** Ends the care for a file that has its final name now. Its descriptor stays the caller's to close. */
export function keepTemporary(temporary: Pick<Temporary, "path">): void {
  live.delete(temporary.path);
}

/** Unlinks the file, if it is there. Never rejects. Its descriptor stays the caller's to close. */
export async function unlinkTemporary(temporary: Pick<Temporary, "path">): Promise<void> {
  live.delete(temporary.path);
  await unlinkQuietly(temporary.path);
}

/** The process ends now: the same without a turn of the event loop. Never throws. */
export function unlinkTemporarySync({ path }: Pick<Temporary, "path">): void {
  live.delete(path);
  try {
    fs.unlinkSync(systemName(path));
  } catch {
    // Gone already, or the folder is.
  }
}

/** Unlinks every temporary that this thread has made, as the process ends now. Never throws. */
export function unlinkAllTemporaries(): void {
  for (const temporary of live.values()) unlinkTemporarySync(temporary);
}

/** As sweepFolder, for what targets with this final path left. @returns the paths removed. */
export async function removeStaleTemporaries(finalPath: string): Promise<string[]> {
  return removeStale(dirname(finalPath), basename(finalPath));
}

/** As sweepFolder. @returns the paths removed. */
export async function removeStale(directory: string, prefix: string): Promise<string[]> {
  const { removed } = await sweepFolder(directory, prefix);
  return removed;
}

export interface Sweep {
  removed: string[];
  /** Process ids in the names of those of the same prefix whose owners live. */
  owners: number[];
}

/**
 * Removes what dead processes left in the folder. Files of live processes, and what cannot be opened or judged, stay.
 * Never rejects: stale files harm nobody but the disk's free space.
 * @param own one that is the caller's, and not to be looked at
 */
export async function sweepFolder(directory: string, prefix: string, own?: string): Promise<Sweep> {
  const start = namePrefix(prefix);
  const isLocal = await hasLocalLocks(directory);
  const sweep: Sweep = { removed: [], owners: [] };
  for (const name of await namesIn(directory).catch(() => [])) {
    const [, ownStart, pidText, mark] = NAME_PATTERN.exec(name) ?? [];
    const isSame = ownStart === start;
    const path = join(directory, name);
    if (ownStart === undefined || path === own || !(isSame || (isLocal && mark === ""))) continue;
    const pid = Number(pidText);
    const verdict = live.has(path) ? "alive" : await judge(path, pid, mark === "u");
    if (verdict === "removed") sweep.removed.push(path);
    if (verdict === "alive" && isSame) sweep.owners.push(pid);
  }
  return sweep;
}

async function hasLocalLocks(directory: string): Promise<boolean> {
  if (libc === null) return false;
  const type = await statFileSystem(directory).then(
    (found) => found.type,
    () => 0,
  );
  return LOCAL_FILE_SYSTEMS.has(type);
}

async function judge(path: string, pid: number, unlocked: boolean): Promise<"removed" | "alive" | "unknown"> {
  // Neither a link nor a FIFO that somebody put there may be followed or waited for.
  const fd = await openFile(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK).catch(() => null);
  if (fd === null) return "unknown";
  try {
    if (!(await statFile(fd)).isFile()) return "unknown";
    if (!isStale(fd, pid, unlocked)) return "alive";
    await unlinkFile(path);
    return "removed";
  } catch {
    return "unknown";
  } finally {
    await closeFile(fd);
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

async function unlinkQuietly(path: string): Promise<void> {
  // Gone already, or the folder is: there is nothing better to do with what remains.
  await unlinkFile(path).catch(() => undefined);
}
