// The method `filter`: QEMU keeps the disk as it was at T0, for workers of ours to read over NBD.
//
//   before          guest device ──► disk
//   T0              guest device ──► cowcatcher-…c ──► disk            (copy-before-write)
//                                         └─ old data ──► cowcatcher-…f   (a sparse file of ours)
//                   NBD export ──► cowcatcher-…s ──► cowcatcher-…c       (snapshot-access)
//
// Each guest write to a cluster that is not in the file yet copies it there first. Workers read the export, captured
// clusters first, and discard what they have read: QEMU punches it out of the file and copies there no more. So the
// file holds what the guest has overwritten and nobody has read yet. If our process dies the guest goes on; the
// file grows up to the disk's size until the nodes are removed (cleanup.ts).
//
// T0 of a disk is the moment of qom-set. Several disks are one instant only if the guest stands still: it is stopped
// for it. So it is for a disk in an iothread, as QEMU 7.2 may abort when such nodes are put above one that runs.
//
// All nodes have discard=unmap: with 7.2 the file is not punched out otherwise. cbw-timeout above 4 s overflows before
// QEMU 9.1 and breaks each snapshot at once.

import { addExport } from "./exports.js";
import {
  isAtLeast,
  type QemuDisk,
  type QemuGraph,
  type QemuVersion,
  readStatus,
  readVersion,
} from "./graph.js";
import type { Visit } from "./monitor.js";
import { partName } from "./names.js";
import type { GraphDisk, GuestPolicy, T0Times } from "./t0.js";

const CBW_TIMEOUT_MAX_S = 4;

/** One disk under the filter. */
export type FilteredDisk = GraphDisk & { readonly fleecePath: string };

/** Why the method cannot be used with this disk; undefined: it can. */
export function filterObstacle(
  { version, commands }: QemuGraph,
  { qdev, name }: QemuDisk,
): string | undefined {
  if (!isAtLeast(version, 7, 1)) {
    return `QEMU ${version.major}.${version.minor} has no copy-before-write node for a running guest (7.1 has)`;
  }
  if (!commands.has("qom-set") || qdev === undefined) {
    return `no device of a guest is attached to ${name}, so nothing can be put between`;
  }
  return undefined;
}

/**
 * Why our own death would harm the guest; undefined: it would not. Before 9.0 an NBD client's end in an iothread is a
 * failed assertion (nbd_blockdev_client_closed: qemu_in_main_thread()), and that is QEMU's end.
 */
export function filterRisk(
  { version }: Pick<QemuGraph, "version">,
  { iothread }: Pick<QemuDisk, "iothread">,
): string | undefined {
  if (iothread === undefined || isAtLeast(version, 9, 0)) return undefined;
  return `the disk is in an iothread, and QEMU ${version.major}.${version.minor} aborts there when an NBD client goes without goodbye`;
}

/** Adds the nodes of the fleecing files. They are in nobody's way. @throws CowcatcherError: undo is the caller's */
export async function addFleeceNodes(
  visit: Visit,
  run: string,
  disks: readonly FilteredDisk[],
): Promise<void> {
  for (const { index, fleecePath, undo } of disks) {
    const node = partName(run, index, "fleece");
    undo.pushCommand(`remove node ${node}`, "blockdev-del", { "node-name": node });
    await visit.execute("blockdev-add", {
      driver: "file",
      "node-name": node,
      filename: fleecePath,
      discard: "unmap",
    });
  }
}

/**
 * T0: puts the filters between the guest and its disks.
 * @throws CowcatcherError: the guest runs again, and undo is the caller's
 */
export async function insertFilters(
  visit: Visit,
  run: string,
  disks: readonly FilteredDisk[],
  policy: GuestPolicy,
): Promise<T0Times> {
  const version = await readVersion(visit);
  const needsStop = disks.length > 1 || disks.some(({ disk }) => disk.iothread !== undefined);
  if (!needsStop || (await readStatus(visit)) !== "running") {
    for (const one of disks) await insertFilter(visit, run, version, one, policy);
    return { stoppedMs: 0, t0Ms: Date.now() };
  }
  const startMs = performance.now();
  let t0Ms: number;
  try {
    await visit.execute("stop");
    t0Ms = Date.now();
    for (const one of disks) await insertFilter(visit, run, version, one, policy);
  } finally {
    await visit.execute("cont");
  }
  return { stoppedMs: performance.now() - startMs, t0Ms };
}

async function insertFilter(
  visit: Visit,
  run: string,
  version: QemuVersion,
  { disk, index, undo }: FilteredDisk,
  { guestTimeoutMs, onCbwError }: GuestPolicy,
): Promise<void> {
  const cbw = partName(run, index, "cbw");
  undo.pushCommand(`remove node ${cbw}`, "blockdev-del", { "node-name": cbw });
  await visit.execute("blockdev-add", {
    driver: "copy-before-write",
    "node-name": cbw,
    file: disk.node.name,
    target: partName(run, index, "fleece"),
    discard: "unmap",
    "on-cbw-error": onCbwError,
    "cbw-timeout": cbwTimeoutSeconds(version, guestTimeoutMs),
  });
  const drive = { path: disk.qdev, property: "drive" };
  const what = `give ${disk.name} its node ${disk.node.name} back`;
  undo.pushCommand(what, "qom-set", { ...drive, value: disk.node.name });
  await visit.execute("qom-set", { ...drive, value: cbw });
}

/** QEMU takes whole seconds, of which 0 is no limit. */
function cbwTimeoutSeconds(version: QemuVersion, guestTimeoutMs: number): number {
  const seconds = Math.max(1, Math.ceil(guestTimeoutMs / 1000));
  return isAtLeast(version, 9, 1) ? seconds : Math.min(seconds, CBW_TIMEOUT_MAX_S);
}

/** After T0: the snapshots as exports of the server at hand. @throws CowcatcherError: undo is the caller's */
export async function exportSnapshots(
  visit: Visit,
  run: string,
  disks: readonly FilteredDisk[],
): Promise<void> {
  for (const { disk, index, undo, bitmap } of disks) {
    const bitmaps = bitmap === undefined ? undefined : [{ node: disk.node.name, name: bitmap }];
    const snap = partName(run, index, "snap");
    const id = partName(run, index, "exp");
    undo.pushCommand(`remove node ${snap}`, "blockdev-del", { "node-name": snap });
    await visit.execute("blockdev-add", {
      driver: "snapshot-access",
      "node-name": snap,
      file: partName(run, index, "cbw"),
      discard: "unmap",
    });
    // Writable for the discards; a snapshot-access node takes no writes.
    await addExport(visit, undo, { id, node: snap, writable: true, bitmaps });
  }
}
