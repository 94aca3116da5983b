// The file that a raw disk of QEMU's stands on, for the workers to read past QEMU (nbd/client/live-file.ts). Main thread.
//
// QEMU says what it has opened by name alone, and a name may mean another file here (another mount namespace, a file that was
// renamed). So it is looked at what the process that serves the export has open: only if our file is one of those, by
// device and inode, is it QEMU's. Where that cannot be seen, nor read, the export is read as ever.

import { constants, statfsSync } from "node:fs";
import { type FileHandle, open, readdir, stat } from "node:fs/promises";
import type { ExtentMap } from "../block/extent-map.js";
import { writtenExtents } from "../block/file/written-extents.js";
import type { QemuGraph, QemuNode } from "./graph.js";

const TMPFS_MAGIC = 0x01021994;
const PROTOCOL_DRIVERS = new Set(["file", "host_device"]);

export interface OpenLiveFile {
  readonly fd: number;
  /** It is a block device, of which QEMU never asks where its holes are. */
  readonly isDevice: boolean;
  /** When no worker reads it any more. Never rejects. */
  close(): Promise<void>;
}

/**
 * @param serverProcess who serves the disk's export; undefined: it cannot be seen from here
 * @returns undefined where it is not a file or a block device of the disk's own bytes that can be read here. Never rejects.
 */
export async function openLiveFile(
  graph: QemuGraph,
  node: QemuNode,
  serverProcess: number | undefined,
): Promise<OpenLiveFile | undefined> {
  const below = protocolNode(graph, node);
  if (below === undefined || serverProcess === undefined) return undefined;
  // Another way than QEMU's past or through the page cache might show what it had before.
  const flags = constants.O_RDONLY | (below.isDirect ? constants.O_DIRECT : 0);
  let file: FileHandle | undefined;
  try {
    file = await open(below.filename, flags);
    if (await isOpenIn(serverProcess, file, node.sizeBytes)) return await opened(file);
  } catch {
    // It is QEMU's to read, not ours.
  }
  await file?.close().catch(() => undefined);
  return undefined;
}

async function opened(file: FileHandle): Promise<OpenLiveFile> {
  const isDevice = (await file.stat()).isBlockDevice();
  return { fd: file.fd, isDevice, close: () => file.close().catch(() => undefined) };
}

/**
 * Where a file may be read past the snapshot that QEMU keeps of it (nbd/client/live-file.ts). Asked after T0, and before
 * QEMU is asked what reads as zeroes: what is written here and kept as zeroes was kept by then, so QEMU tells of it.
 * @returns undefined: everywhere; null: that cannot be known
 */
export function writtenAtT0({ fd, isDevice }: OpenLiveFile, sizeBytes: number): ExtentMap | null | undefined {
  if (isDevice) return undefined;
  try {
    // Its pages never leave it, so that a hole is one for good.
    if (statfsSync(`/proc/self/fd/${fd}`).type === TMPFS_MAGIC) return undefined;
  } catch {
    return null;
  }
  return writtenExtents(fd, sizeBytes);
}

/** Whose bytes are those of the disk, one for one. */
function protocolNode({ nodes, edges }: QemuGraph, node: QemuNode): QemuNode | undefined {
  let below: QemuNode | undefined = node;
  if (node.driver === "raw") {
    const children = edges.filter(({ parent }) => parent === node.name);
    // With an offset of its own the raw node has another name than its file.
    below = children.length === 1 ? nodes.get(children[0]?.child ?? "") : undefined;
    if (below?.filename !== node.filename || below.sizeBytes !== node.sizeBytes) return undefined;
  }
  return PROTOCOL_DRIVERS.has(below.driver) && below.filename.startsWith("/") ? below : undefined;
}

async function isOpenIn(process: number, file: FileHandle, sizeBytes: number): Promise<boolean> {
  const ours = await file.stat({ bigint: true });
  if (!ours.isBlockDevice() && !(ours.isFile() && ours.size === BigInt(sizeBytes))) return false;
  const folder = `/proc/${process}/fd`;
  for (const name of await readdir(folder)) {
    const theirs = await stat(`${folder}/${name}`, { bigint: true }).catch(() => undefined);
    if (theirs === undefined) continue;
    const isSame = ours.isBlockDevice()
      ? theirs.isBlockDevice() && theirs.rdev === ours.rdev
      : theirs.isFile() && theirs.dev === ours.dev && theirs.ino === ours.ino;
    if (isSame) return true;
  }
  return false;
}
