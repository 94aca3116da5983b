// Block devices that are set read-only (`blockdev --setro`, a write-protected medium, an LVM volume with permission r).
//
// A kernel may let such a device be opened for writing and refuse the first write, when a guest is at work on it
// already. sysfs tells at once, and what it tells is what BLKROGET answers. Where it is not mounted nothing is told.

import { promises as fs, type Stats } from "node:fs";
import { CowcatcherError } from "../../errors.js";

/**
 * An attribute of the block device in sysfs, without its newline.
 * @throws Error of the system call
 */
export async function readDeviceAttribute(rdev: number, attribute: string): Promise<string> {
  // Linux's dev_t: 12 bits of major from bit 8 on, minor in the low 8 and from bit 20 on.
  const major = Math.floor(rdev / 2 ** 8) & 0xfff;
  const minor = (rdev & 0xff) | (Math.floor(rdev / 2 ** 12) & 0xfff00);
  return (await fs.readFile(`/sys/dev/block/${major}:${minor}/${attribute}`, "utf8")).trim();
}

/** @throws CowcatcherError IO (EROFS) for a block device to which nothing can be written. */
export async function refuseReadOnlyDevice(name: string, stats: Stats): Promise<void> {
  if (!stats.isBlockDevice()) return;
  const isReadOnly = await readDeviceAttribute(stats.rdev, "ro").catch(() => "0");
  if (isReadOnly !== "1") return;
  throw new CowcatcherError({
    code: "IO",
    object: name,
    problem: "the device is set read-only",
    hint: `blockdev --setrw ${name} makes it writable, where nothing below it is read-only`,
    errno: "EROFS",
  });
}
