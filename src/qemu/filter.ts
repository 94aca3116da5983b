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

import type { JobOptions } from "../backup/options.js";
import { CowcatcherError } from "../errors.js";
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
import { removing, type UndoStack } from "./undo.js";

const CBW_TIMEOUT_MAX_S = 4;
/** Of an export that QEMU is told to delete: what is in flight is given up. */
const EXPORT_DELETED_MS = 30_000;

/** One disk under the filter. */
export interface FilteredDisk {
  disk: QemuDisk;
  /** Its number in the run. */
  index: number;
  fleecePath: string;
  /** How QEMU becomes what it was for this disk. */
  undo: UndoStack;
}

/** What the guest's writes put up with. */
export type GuestPolicy = Pick<JobOptions, "guestTimeoutMs" | "onCbwError">;

export interface FilterTimes {
  /** How long the guest was stopped for T0, in ms; 0: not at all. */
  stoppedMs: number;
  /** The instant that the backup shows, in milliseconds since 1970 UTC. */
  t0Ms: number;
}

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
export function filterRisk({ version }: QemuGraph, { iothread }: QemuDisk): string | undefined {
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
): Promise<FilterTimes> {
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
  for (const { index, undo } of disks) {
    const snap = partName(run, index, "snap");
    const id = partName(run, index, "exp");
    undo.pushCommand(`remove node ${snap}`, "blockdev-del", { "node-name": snap });
    await visit.execute("blockdev-add", {
      driver: "snapshot-access",
      "node-name": snap,
      file: partName(run, index, "cbw"),
      discard: "unmap",
    });
    undo.push(`delete export ${id}`, (later) => deleteExport(later, id));
    // Writable for the discards; a snapshot-access node takes no writes.
    await visit.execute("block-export-add", { type: "nbd", id, "node-name": snap, name: id, writable: true });
  }
}

/** Deletes an export whatever its clients do, and waits until it is gone. @throws CowcatcherError */
export async function deleteExport(visit: Visit, id: string): Promise<void> {
  await removing(visit.execute("block-export-del", { id, mode: "hard" }));
  await visit.until(
    `export ${id} is to go`,
    async () => !(await visit.list("query-block-exports")).some((found) => found["id"] === id),
    EXPORT_DELETED_MS,
  );
}

/**
 * Has QEMU serve NBD at `socket`, which only this run uses.
 * @throws CowcatcherError BUSY where its server runs already: QEMU has one, and does not say where it listens
 */
export async function startServer(visit: Visit, socket: string, undo: UndoStack): Promise<void> {
  try {
    await visit.execute("nbd-server-start", { addr: { type: "unix", data: { path: socket } } });
  } catch (error) {
    if (error instanceof CowcatcherError && /already running/.test(error.message))
      throw serverRuns(visit.path, error);
    throw error;
  }
  undo.pushCommand("stop QEMU's NBD server", "nbd-server-stop");
}

function serverRuns(object: string, cause: CowcatcherError): CowcatcherError {
  return new CowcatcherError({
    code: "BUSY",
    object,
    problem: "QEMU's NBD server runs already, and QEMU does not say where it listens",
    hint: "give its address with --nbd, such as --nbd /run/vm1-nbd.sock or --nbd 127.0.0.1:10809",
    cause,
  });
}
