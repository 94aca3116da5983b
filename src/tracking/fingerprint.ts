// Who wrote the image since we last had it? What an image's files looked like when we let go of them, and what the
// system tells of its own start.
//
// A file: device, inode, size, and the times of last change of its content and of its inode in nanoseconds. A program
// that sets the first back (touch, cp -p, tar) moves the second, and there is no call that sets that. It moves too for
// chown, chmod, link and rename: then all counts as changed though nothing has, which is the safe side.
//
// A block device has no such times. It has a count of sectors written, which begins anew with the system: so it is
// trusted within one boot alone, by that count, its number, its size and whatever name it has for itself. Nothing is
// known of an export (NBD) that others may write at any time.
//
// A guest's disk is the image with its backing files, so that all of them count.

import { createHash } from "node:crypto";
import * as fs from "node:fs";
import { uptime } from "node:os";
import { promisify } from "node:util";
import type { ImageLooks } from "./pulse.js";

const S_IFMT = BigInt(fs.constants.S_IFMT);
const S_IFREG = BigInt(fs.constants.S_IFREG);
const statFd: (fd: number, options: { bigint: true }) => Promise<fs.BigIntStats> = promisify(fs.fstat);

/** This start of the system. */
export interface Boot {
  id: string;
  /** When it was, in ms since 1970, as far as the clock is right. */
  startedMs: number;
}

/** @param simulated for tests of power cuts: another start of the system, which begins now */
export async function currentBoot(simulated = process.env["COWCATCHER_BOOT_ID"]): Promise<Boot> {
  if (simulated !== undefined) {
    return { id: simulated, startedMs: Date.now() };
  }
  // Where there is none (no Linux), each process counts as another start of the system: nothing is taken for granted.
  const id = await readLine("/proc/sys/kernel/random/boot_id");
  return { id: id ?? crypto.randomUUID(), startedMs: Date.now() - uptime() * 1000 };
}

/**
 * SHA-256, in hex, of what the files look like now; undefined where they cannot be known again. All that was written to
 * them must be synced: a time may move as late as that.
 */
export async function identityOf(fds: readonly number[], boot: Boot): Promise<string | undefined> {
  const parts: string[] = [];
  for (const fd of fds) {
    const stats = await statFd(fd, { bigint: true });
    const part = stats.isBlockDevice() ? await deviceIdentity(stats, boot) : fileIdentity(stats);
    if (part === undefined) return undefined;
    parts.push(part);
  }
  if (parts.length === 0) return undefined;
  return createHash("sha256").update(parts.join("\n")).digest("hex");
}

function fileIdentity({ dev, ino, size, mtimeNs, ctimeNs }: fs.BigIntStats): string {
  return ["file", dev, ino, size, mtimeNs, ctimeNs].join(" ");
}

async function deviceIdentity({ rdev }: fs.BigIntStats, boot: Boot): Promise<string | undefined> {
  const major = ((rdev >> 8n) & 0xfffn) | ((rdev >> 32n) & 0xfffff000n);
  const minor = (rdev & 0xffn) | ((rdev >> 12n) & 0xffffff00n);
  const folder = `/sys/dev/block/${major}:${minor}`;
  const [sizeSectors, statistics, ...names] = await Promise.all(
    ["size", "stat", "dm/uuid", "wwid", "device/wwid", "loop/backing_file"].map((name) =>
      readLine(`${folder}/${name}`),
    ),
  );
  const sectorsWritten = statistics?.trim().split(/\s+/)[6];
  if (sizeSectors === undefined || sectorsWritten === undefined) return undefined;
  return ["device", boot.id, `${major}:${minor}`, sizeSectors, sectorsWritten, ...names].join(" ");
}

/**
 * What the files of an image that is in use look like: `own` are those that the guest's writes go to, `below` its backing
 * files. Undefined where a file has no times of change (a device).
 */
export async function looksOf(
  own: readonly number[],
  below: readonly number[],
  boot: Boot,
): Promise<ImageLooks | undefined> {
  let changedNs = 0n;
  const places: string[] = [];
  for (const fd of own) {
    const { dev, ino, mtimeNs, ctimeNs, ...stats } = await statFd(fd, { bigint: true });
    if ((stats.mode & S_IFMT) !== S_IFREG) return undefined;
    places.push(`${dev} ${ino}`);
    // A copy that was put in the file's place with its old time has a new time of change of the inode.
    for (const time of [mtimeNs, ctimeNs]) if (time > changedNs) changedNs = time;
  }
  const base = below.length === 0 ? "" : ((await identityOf(below, boot)) ?? "");
  const files = createHash("sha256")
    .update([...places, base].join("\n"))
    .digest("hex");
  return { changedNs, files };
}

async function readLine(path: string): Promise<string | undefined> {
  const text = await fs.promises.readFile(path, "utf8").catch(() => undefined);
  return text?.trimEnd();
}
