// The method `ring`: QEMU intercepts the guest's writes, and this process keeps the old data.
//
//   before          guest device, or a daemon's export ──► disk
//   T0              guest device, or a daemon's export ──► cowcatcher-…c ──► disk       (put there by QEMU's backup job)
//                                                               └─ old data ──► cowcatcher-…n   (an NBD export of ours)
//                   NBD export (read-only) ──► disk
//
// The job is a backup of sync mode none: it copies nothing by itself. Each guest write to a cluster that has not been
// sent yet sends it first, and waits for our answer. Workers read the disk as it is now, and lay over what they read
// what QEMU has sent: when a read is back, each cluster that was overwritten in it has been sent before. That is
// what they do for a disk of our own (cow/chunk-copy.ts).
//
// T0 is one transaction, so all disks are one instant and the guest is not stopped. It needs no device: a storage
// daemon has none.
//
// What the guest risks. Before 10.1 an error of the old data's write is one of the guest's, and there is no time limit:
// if this process dies guest writes fail until the job is cancelled, and while it hangs they hang. So
// this method is for those who accept that.

import { CowcatcherError } from "../errors.js";
import { addExport } from "./exports.js";
import { isAtLeast, type QemuDisk, type QemuGraph, readVersion } from "./graph.js";
import type { Visit } from "./monitor.js";
import { partName } from "./names.js";
import type { GraphDisk, GuestPolicy, T0Times } from "./t0.js";
import { removing } from "./undo.js";

/** Our answers are all given by then, and QEMU has nothing else to wait for. */
const JOB_GONE_MS = 30_000;

/** Of a job whose filter is in place (JobStatus). A paused one's is, too. */
const WORKING = new Set(["running", "paused"]);

/** Why the method cannot be used; undefined: it can. */
export function ringObstacle({ version, commands }: QemuGraph): string | undefined {
  if (isAtLeast(version, 5, 2) && commands.has("blockdev-backup")) return undefined;
  return `QEMU ${version.major}.${version.minor} cannot export a disk that a job works on (5.2 can)`;
}

/**
 * The job is there still, when the disk is read: without it QEMU sends no old data, and what was read since may be newer
 * than T0. @throws CowcatcherError SNAPSHOT
 */
export async function checkRingJob(visit: Visit, id: string): Promise<void> {
  const job = (await visit.list("query-jobs")).find((one) => one["id"] === id);
  if (job !== undefined && job["error"] === undefined && WORKING.has(String(job["status"]))) return;
  throw new CowcatcherError({
    code: "SNAPSHOT",
    object: visit.path,
    problem: `QEMU's job ${id} has ended before the disk was read`,
    hint: "make the backup again, and cancel no job of its name meanwhile",
  });
}

/** Why our own death would harm the guest; undefined: it would not. */
export function ringRisk({ version }: QemuGraph, { iothread }: QemuDisk): string | undefined {
  if (isAtLeast(version, 10, 1)) return undefined;
  const { major, minor } = version;
  const abort =
    iothread === undefined || isAtLeast(version, 9, 0)
      ? ""
      : ", or it would abort, its disk being in an iothread";
  return `QEMU ${major}.${minor} would give the guest's writes errors${abort}`;
}

/** Has QEMU connect to where old data goes. In nobody's way. @throws CowcatcherError: undo is the caller's */
export async function addRingNodes(
  visit: Visit,
  run: string,
  disks: readonly GraphDisk[],
  socket: string,
): Promise<void> {
  for (const { index, undo } of disks) {
    const node = partName(run, index, "nbd");
    undo.pushCommand(`remove node ${node}`, "blockdev-del", { "node-name": node });
    const server = { type: "unix", path: socket };
    await visit.execute("blockdev-add", { driver: "nbd", "node-name": node, server, export: node });
  }
}

/** T0: the jobs of all disks start in one transaction, or none. @throws CowcatcherError: undo is the caller's */
export async function startRingJobs(
  visit: Visit,
  run: string,
  disks: readonly GraphDisk[],
  { onCbwError }: GuestPolicy,
): Promise<T0Times> {
  const version = await readVersion(visit);
  const policy = isAtLeast(version, 10, 1) ? { "on-cbw-error": onCbwError } : {};
  const actions = disks.map(({ disk, index, undo }) => {
    const job = partName(run, index, "job");
    undo.push(`cancel job ${job}`, (later) => cancelJob(later, job));
    return {
      type: "blockdev-backup",
      data: {
        "job-id": job,
        device: disk.node.name,
        target: partName(run, index, "nbd"),
        sync: "none",
        "filter-node-name": partName(run, index, "cbw"),
        ...policy,
      },
    };
  });
  await visit.execute("transaction", { actions });
  return { stoppedMs: 0, t0Ms: Date.now() };
}

/** The disks themselves, below the jobs' filters. @throws CowcatcherError: undo is the caller's */
export async function exportDisks(visit: Visit, run: string, disks: readonly GraphDisk[]): Promise<void> {
  for (const { disk, index, undo, bitmap } of disks) {
    const id = partName(run, index, "exp");
    const bitmaps = bitmap === undefined ? undefined : [bitmap];
    await addExport(visit, undo, { id, node: disk.node.name, writable: false, bitmaps });
  }
}

/**
 * Cancels a job and waits until it is gone, its filter with it. No write of its may be unanswered: QEMU's monitor would
 * hang until it is. @throws CowcatcherError
 */
export async function cancelJob(visit: Visit, id: string): Promise<void> {
  await removing(visit.execute("job-cancel", { id }));
  await visit.until(
    `job ${id} is to go`,
    async () => !(await visit.list("query-jobs")).some((job) => job["id"] === id),
    JOB_GONE_MS,
  );
}
