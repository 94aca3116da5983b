// Which storage a path or a descriptor leads to, whatever it is called: the question is whether writing to one thing
// on this machine changes another.
//
//   regular file    device and inode of the file
//   block device    its number; below it, as far as /sys/dev/block tells: the disk of a partition, the devices under a
//                   mapped one or an array, the file under a loop device; and so on down
//
// Two overlap where they are one, or one lies on the other. (Two partitions of one disk have the disk below them and do
// not overlap.) What is not seen: one file through two mounts of a network file system, a file below a file system
// of the machine's own making, devices whose driver is a program (nbd, FUSE). Nothing is opened or changed here.

import type { BigIntStats } from "node:fs";
import { namesIn, readBytes, statFile, statPathExactly } from "./calls.js";
import { decodeName } from "../../file-names.js";

export interface Storage {
  /** Equal for two names of one file or device. */
  readonly id: string;
  /** Of the devices and the files that it lies on. */
  readonly below: ReadonlySet<string>;
  readonly isBlockDevice: boolean;
}

/** More than any stack of devices that is in use; sysfs has no cycles, so this is a bound on its surprises. */
const MAX_DEVICES_BELOW = 256;
const DELETED = " (deleted)";

/** Null where nothing stands at the path, or it cannot be looked at. Never rejects. */
export async function storageAt(path: string): Promise<Storage | null> {
  const stats = await statPath(path);
  return stats === null ? null : storageOf(stats);
}

/** What an open file is, also when its name has gone to another. */
export async function storageOfFd(fd: number): Promise<Storage> {
  return storageOf(await statFile(fd));
}

/** Whether writing to one may change the other. */
export function overlap(a: Storage, b: Storage): boolean {
  return a.id === b.id || a.below.has(b.id) || b.below.has(a.id);
}

async function storageOf(stats: BigIntStats): Promise<Storage> {
  const isBlockDevice = stats.isBlockDevice();
  const below = isBlockDevice ? await storageBelow(deviceNumber(stats.rdev)) : new Set<string>();
  return { id: idOf(stats), below, isBlockDevice };
}

function idOf(stats: BigIntStats): string {
  return stats.isBlockDevice() ? deviceId(deviceNumber(stats.rdev)) : `file ${stats.dev}:${stats.ino}`;
}

function deviceId(number: string): string {
  return `device ${number}`;
}

/** "MAJOR:MINOR", as sysfs writes it, of Linux's 64-bit device number. */
function deviceNumber(rdev: bigint): string {
  const major = ((rdev >> 8n) & 0xfffn) | ((rdev >> 32n) & 0xfffff000n);
  const minor = (rdev & 0xffn) | ((rdev >> 12n) & 0xffffff00n);
  return `${major}:${minor}`;
}

/**
 * What a block device lies on, all the way down. Never rejects.
 * @param number "MAJOR:MINOR"
 * @param root where the system describes its devices by number
 */
export async function storageBelow(number: string, root = "/sys/dev/block"): Promise<ReadonlySet<string>> {
  const below = new Set<string>();
  await addBelow(number, root, below);
  return below;
}

async function addBelow(number: string, root: string, below: Set<string>): Promise<void> {
  const folder = `${root}/${number}`;
  const file = await fileUnderLoop(folder);
  if (file !== null) below.add(file);
  for (const lower of [...(await diskOfPartition(folder)), ...(await slavesOf(folder))]) {
    if (below.has(deviceId(lower)) || below.size >= MAX_DEVICES_BELOW) continue;
    below.add(deviceId(lower));
    await addBelow(lower, root, below);
  }
}

/** The path is the one under which the loop device was set up: it may be another file's by now, or nobody's. */
async function fileUnderLoop(folder: string): Promise<string | null> {
  const name = await readLine(`${folder}/loop/backing_file`);
  if (name === null) return null;
  const stats = await statPath(name.endsWith(DELETED) ? name.slice(0, -DELETED.length) : name);
  return stats === null ? null : idOf(stats);
}

async function diskOfPartition(folder: string): Promise<string[]> {
  if ((await readLine(`${folder}/partition`)) === null) return [];
  // The folder is a link into the tree of devices, where the disk stands above its partitions.
  const disk = await readLine(`${folder}/../dev`);
  return disk === null ? [] : [disk];
}

async function slavesOf(folder: string): Promise<string[]> {
  const names = await namesIn(`${folder}/slaves`).catch(() => []);
  const numbers = await Promise.all(names.map((name) => readLine(`${folder}/slaves/${name}/dev`)));
  return numbers.filter((number) => number !== null);
}

async function readLine(path: string): Promise<string | null> {
  const text = await readBytes(path).then(decodeName, () => null);
  return text === null ? null : text.replace(/\n$/, "");
}

function statPath(path: string): Promise<BigIntStats | null> {
  return statPathExactly(path).catch(() => null);
}
