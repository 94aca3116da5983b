// QEMU's image locks, as block/file-posix.c has them.
//
// Each permission of the block layer has a number. An opener takes a shared OFD lock on byte 100 + n for each
// permission n that it uses, and on byte 200 + n for each that it does not let others use. Then it tests, as if
// for an exclusive lock, byte 200 + n of what it uses and byte 100 + n of what it forbids: a lock there is another
// opener's objection. (Taking first and testing after means that of two openers in a race at least one sees the
// other.) The locks belong to the open file, so they end with its last descriptor; a test never sees its own.
//
// What is used and forbidden is what QEMU's virtio-blk uses and forbids for a disk without share-rw: reads are
// consistent, no one else writes or resizes. A qcow2 image that is written also grows.
//
// Without libc, or on a file system without such locks, nothing is locked and nothing is refused.

import { CowcatcherError } from "../../errors.js";
import { constants } from "node:os";
import { F_RDLCK, F_UNLCK, F_WRLCK, libc } from "../../native/libc.js";
import { errnoError } from "./fileio.js";

/** BLK_PERM_* of include/block/block-common.h: bit number and the name in QEMU's messages. */
const CONSISTENT_READ = 0;
const WRITE = 1;
const RESIZE = 3;
const PERMISSION_NAMES = ["consistent read", "write", "write unchanged", "resize"] as const;

const USED_BASE = 100;
const UNSHARED_BASE = 200;
const PERMISSION_COUNT = PERMISSION_NAMES.length;

const BUSY_ERRNOS = new Set([-constants.errno.EAGAIN, -constants.errno.EACCES]);
/** What file systems without OFD locks answer. */
const UNSUPPORTED_ERRNOS = new Set(
  [constants.errno.EINVAL, constants.errno.ENOSYS, constants.errno.EOPNOTSUPP, constants.errno.ENOLCK].map(
    (errno) => -errno,
  ),
);

export interface ImageLockOptions {
  write: boolean;
  /** The file may grow or shrink (a qcow2 image that is written). */
  resize?: boolean;
}

/**
 * Takes QEMU's locks for a reader or a writer of the image on `fd`; called again, it takes what is missing.
 * The locks end when the last descriptor of this open file is closed.
 * @throws CowcatcherError LOCKED, naming QEMU's lock and its byte; all locks of this open file are given back then.
 */
export function acquireImageLock(fd: number, name: string, options: ImageLockOptions): void {
  const used = [CONSISTENT_READ];
  if (options.write) used.push(WRITE);
  if (options.resize) used.push(RESIZE);
  const unshared = [WRITE, RESIZE];
  if (!takeLocks(fd, name, used, unshared)) return;
  const refusal = findObjection(fd, used, unshared);
  if (refusal === null) return;
  releaseImageLock(fd);
  throw refusedBy(name, refusal);
}

/** Gives all of QEMU's locks on this open file back. */
export function releaseImageLock(fd: number): void {
  libc?.ofdLock(fd, F_UNLCK, USED_BASE, PERMISSION_COUNT);
  libc?.ofdLock(fd, F_UNLCK, UNSHARED_BASE, PERMISSION_COUNT);
}

/** Whether another opener holds the lock of a writer; false where nobody can say. Takes nothing. */
export function isWrittenBySomebody(fd: number): boolean {
  return libc?.ofdTest(fd, F_WRLCK, USED_BASE + WRITE, 1) === 1;
}

/** @returns false where the file system has no such locks. */
function takeLocks(fd: number, name: string, used: readonly number[], unshared: readonly number[]): boolean {
  if (libc === null) return false;
  const bytes = [...used.map((n) => USED_BASE + n), ...unshared.map((n) => UNSHARED_BASE + n)];
  for (const byte of bytes) {
    const result = libc.ofdLock(fd, F_RDLCK, byte, 1);
    if (result >= 0) continue;
    releaseImageLock(fd);
    if (UNSUPPORTED_ERRNOS.has(result)) return false;
    if (!BUSY_ERRNOS.has(result)) throw errnoError(`lock byte ${byte}`, name, result);
    throw lockedError(name, `cannot lock byte ${byte}: another program holds it`);
  }
  return true;
}

interface Objection {
  permission: number;
  byte: number;
  /** The other opener uses the permission that we forbid; otherwise it forbids what we use. */
  usedByOther: boolean;
}

function findObjection(fd: number, used: readonly number[], unshared: readonly number[]): Objection | null {
  if (libc === null) return null;
  for (const permission of used) {
    const byte = UNSHARED_BASE + permission;
    if (libc.ofdTest(fd, F_WRLCK, byte, 1) === 1) return { permission, byte, usedByOther: false };
  }
  for (const permission of unshared) {
    const byte = USED_BASE + permission;
    if (libc.ofdTest(fd, F_WRLCK, byte, 1) === 1) return { permission, byte, usedByOther: true };
  }
  return null;
}

function refusedBy(name: string, { permission, byte, usedByOther }: Objection): CowcatcherError {
  const permissionName = PERMISSION_NAMES[permission] ?? String(permission);
  const lock = usedByOther ? `shared '${permissionName}' lock` : `'${permissionName}' lock`;
  return lockedError(name, `cannot get the ${lock} (byte ${byte})`);
}

function lockedError(name: string, problem: string): CowcatcherError {
  return new CowcatcherError({
    code: "LOCKED",
    object: name,
    problem,
    hint: "is another process using the image?",
  });
}
