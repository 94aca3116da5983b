// What is said of a source that can be copied, and whose copy may not be what was meant. One line each, on stderr.
import { readFile } from "node:fs/promises";
import type { Image } from "../../block/device.js";
import { overlap, storageAt, storageOfFd, type Storage } from "../../block/file/storage.js";
import { warn } from "../output/report.js";
import type { OutputSettings } from "../output/context.js";

/** Of a machine with thousands of mounts (containers) not more are looked at. */
const MAX_MOUNTS = 4096;

export const MOUNTED_SOURCE =
  "what is copied is not of one instant (unmount it, copy a snapshot of the volume, or back it up inside)";
export const MOUNTED_SERVED =
  "a guest that writes to it and this machine destroy each other's file system (unmount it)";

export interface Mount {
  /** Device or file that is mounted. */
  source: string;
  mountPoint: string;
}

/**
 * Warns of an image on a device, or in a file, whose file system this machine has mounted for writing: it is written
 * while it is read.
 * @param deed what comes of it
 */
export async function warnOfMountedSource(output: OutputSettings, image: Image, deed: string): Promise<void> {
  const mounts = await writableMounts().catch(() => []);
  if (mounts.length === 0) return;
  for (const { name, fd } of image.files) {
    const mount = await mountOf(await storageOfFd(fd), mounts);
    if (mount === undefined) continue;
    const what = mount.source === name ? "" : ` as ${mount.source}`;
    warn(output, `${name}: is mounted${what} at ${mount.mountPoint}: ${deed}`);
  }
}

async function mountOf(storage: Storage, mounts: readonly Mount[]): Promise<Mount | undefined> {
  for (const mount of mounts) {
    const mounted = await storageAt(mount.source);
    if (mounted?.isBlockDevice === true && overlap(storage, mounted)) return mount;
  }
  return undefined;
}

async function writableMounts(): Promise<Mount[]> {
  return parseMounts(await readFile("/proc/self/mountinfo", "utf8"));
}

/** The file systems on devices that are mounted for writing, of proc(5)'s mountinfo. */
export function parseMounts(text: string): Mount[] {
  const mounts = new Map<string, Mount>();
  for (const line of text.split("\n").slice(0, MAX_MOUNTS)) {
    const [before = "", after = ""] = line.split(" - ");
    const mountPoint = before.split(" ")[4];
    const [, source, superOptions = ""] = after.split(" ");
    if (mountPoint === undefined || source === undefined || !source.startsWith("/")) continue;
    if (superOptions.split(",").includes("ro") || mounts.has(source)) continue;
    mounts.set(source, { source: unescape(source), mountPoint: unescape(mountPoint) });
  }
  return [...mounts.values()];
}

/** A space is \040 there. */
function unescape(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
}
