// Who may read a target, and what else the file system keeps of a file: mode, owner, extended attributes, ACLs.
//
//   a new file          as the folder's default ACL or the umask has it, but never more readable than the source: a
//                       disk that is its owner's alone has backups that are, too
//   a file replaced     its successor has its owner, mode, ACL and attributes, as if it had been written in place
//
// Until it is complete a target is its owner's alone (0600). So attributes are copied at the start, where a file system
// that refuses them is found out before the copy; the ACL again at the end, as mode 0600 has closed it meanwhile.
//
// An ACL is the attribute system.posix_acl_access: a version (2, 32 bits), then entries of tag and permissions (16 bits
// each) and an id (32 bits), all little-endian (Linux, include/uapi/linux/posix_acl_xattr.h). A folder's default ACL,
// system.posix_acl_default, has the same form. Without libc there are no attributes here: Node cannot read them.

import * as fs from "node:fs";
import { constants as os } from "node:os";
import { changeMode, changeOwner, closeFile, openFile, statFile } from "../../block/file/calls.js";
import { errnoError } from "../../block/file/fileio.js";
import { libc } from "../../native/libc.js";

/** Of each file that a source consists of. */
export interface SourceAccess {
  mode: number;
  gid: number;
}

export const ACL_ACCESS = "system.posix_acl_access";
const ACL_DEFAULT = "system.posix_acl_default";
const ACL_HEADER_BYTES = 4;
const ACL_ENTRY_BYTES = 8;
/** POSIX ACL tags. */
const ACL_USER_OBJ = 0x01;
const ACL_GROUP_OBJ = 0x04;
const ACL_MASK = 0x10;
const ACL_OTHER = 0x20;

/** The kernel's XATTR_LIST_MAX and XATTR_SIZE_MAX. */
const ATTRIBUTE_BYTES_MAX = 65_536;
/** Set by the system's own policy, or by root alone: not ours to insist on. */
const SYSTEM_ATTRIBUTE = /^(security|trusted)\./;
const ALL_MAY = 0o666;
const OWNER_MAY = 0o600;
const GROUP_BITS = 0o070;
/** chown(2): leave the owner as it is. */
const KEEP = 0xffff_ffff;

/** What `open` with mode 0666 would give a new file in the folder. */
async function defaultMode(folder: string): Promise<number> {
  const plain = ALL_MAY & ~process.umask();
  const fd = await openFile(folder, fs.constants.O_RDONLY).catch(() => null);
  if (fd === null) return plain;
  try {
    const acl = attributeOf(fd, ACL_DEFAULT);
    return acl === null ? plain : ALL_MAY & modeOfAcl(acl);
  } finally {
    await closeFile(fd);
  }
}

function modeOfAcl(acl: Buffer): number {
  const permissions = new Map<number, number>();
  for (let at = ACL_HEADER_BYTES; at + ACL_ENTRY_BYTES <= acl.length; at += ACL_ENTRY_BYTES) {
    permissions.set(acl.readUInt16LE(at), acl.readUInt16LE(at + 2));
  }
  const of = (tag: number): number => permissions.get(tag) ?? 0;
  const group = permissions.get(ACL_MASK) ?? of(ACL_GROUP_OBJ);
  return (of(ACL_USER_OBJ) << 6) | (group << 3) | of(ACL_OTHER);
}

/**
 * The final mode of a new file.
 * @param sources whose readers alone may read it; of a source that is no file (an export) there are none
 */
export async function modeOfNewFile(
  folder: string,
  fd: number,
  sources: readonly SourceAccess[],
): Promise<number> {
  const { gid } = await statFile(fd);
  let mode = await defaultMode(folder);
  for (const source of sources) {
    mode &= source.mode | OWNER_MAY;
    // The group's bits are another group's.
    if (source.gid !== Number(gid)) mode &= ~GROUP_BITS;
  }
  return mode;
}

/** The attributes of a file that is to be replaced. */
export type Attributes = ReadonlyMap<string, Buffer>;

/** @throws CowcatcherError IO */
export function attributesOf(fd: number, name: string): Attributes {
  const found = new Map<string, Buffer>();
  if (libc === null) return found;
  const list = Buffer.alloc(ATTRIBUTE_BYTES_MAX);
  const bytes = libc.listAttributes(fd, list);
  if (bytes === -os.errno.EOPNOTSUPP || bytes === -os.errno.ENOSYS) return found;
  if (bytes < 0) throw errnoError("list the attributes of the file to be replaced", name, bytes);
  for (const attribute of list.toString("utf8", 0, bytes).split("\0")) {
    const value = attribute === "" ? null : attributeOf(fd, attribute);
    if (value !== null) found.set(attribute, value);
  }
  return found;
}

function attributeOf(fd: number, attribute: string): Buffer | null {
  if (libc === null) return null;
  const value = Buffer.alloc(ATTRIBUTE_BYTES_MAX);
  const bytes = libc.getAttribute(fd, attribute, value);
  return bytes < 0 ? null : value.subarray(0, bytes);
}

/** @throws CowcatcherError IO or NO_SPACE for an attribute that the new file cannot have. */
export function giveAttributes(fd: number, name: string, attributes: Attributes): void {
  for (const [attribute, value] of attributes) {
    const result = libc?.setAttribute(fd, attribute, value) ?? 0;
    if (result < 0 && !SYSTEM_ATTRIBUTE.test(attribute)) {
      throw errnoError(`keep the attribute '${attribute}' of the file to be replaced`, name, result);
    }
  }
}

/** What makes the complete target readable for whom it should be. A file system may refuse each step. */
export async function openToReaders(
  fd: number,
  name: string,
  replaced: fs.Stats | null,
  attributes: Attributes,
  newMode: number,
): Promise<void> {
  if (replaced === null) {
    await changeMode(fd, newMode).catch(() => undefined);
    return;
  }
  // Only root may give a file away, and others only to groups of theirs; anyone else's new file is their own.
  await changeOwner(fd, replaced.uid, replaced.gid).catch(() =>
    changeOwner(fd, KEEP, replaced.gid).catch(() => undefined),
  );
  const acl = attributes.get(ACL_ACCESS);
  if (acl !== undefined) giveAttributes(fd, name, new Map([[ACL_ACCESS, acl]]));
  const { gid } = await statFile(fd);
  const isOtherGroup = Number(gid) !== replaced.gid;
  const mode = replaced.mode & 0o7777 & (isOtherGroup ? ~GROUP_BITS : ~0);
  await changeMode(fd, mode).catch(() => undefined);
}
