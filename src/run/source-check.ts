// Whether another backup of the source is under way: one that somebody has begun by hand, or from another machine's job. Runs of
// this machine exclude each other by their locks; of all others the server, the QEMU or libvirt knows. It is asked before
// the hook's backup-start and before the guest is frozen. Between the question and the backup somebody may still be faster: then
// the backup itself is refused.
//
// What a backup that died has left is no backup: the next one removes it.
import { setTimeout as delay } from "node:timers/promises";
import { isOver } from "../backup/host.js";
import { listJobs } from "../control/jobs-from-qmp.js";
import { CowcatcherError } from "../errors.js";
import { refuseBusy, runOfJob } from "../libvirt/job.js";
import { Virsh } from "../libvirt/virsh.js";
import { hasLiveRun } from "../qemu/cleanup.js";
import { QemuMonitor } from "../qemu/monitor.js";
import { isAlive } from "../qemu/names.js";
import { ControlClient } from "../qmp/client.js";
import type { Job, JobSource } from "./job.js";

const POLL_MS = 500;
const HINT = "wait until it is over, or give `lock-wait`";

/** @param disks of a server. @throws CowcatcherError BUSY where another backup of the source is under way; of who has it */
export type SourceCheck = (source: JobSource, disks: readonly string[]) => Promise<void>;

export const refuseBusySource: SourceCheck = async (source, disks) => {
  if (source.kind === "control") return refuseBusyServer(source.socket, disks);
  if (source.kind === "qmp") return refuseBusyGuest(source.socket);
  if (source.kind === "libvirt") return refuseBusyDomain(new Virsh(source.connect, source.domain));
};

/** Waits as long as the job waits for locks. @throws as SourceCheck; CANCELLED */
export async function awaitFreeSource(
  { source, lockWaitMs }: Job,
  disks: readonly string[],
  check: SourceCheck,
  signal: AbortSignal,
): Promise<void> {
  for (const untilMs = performance.now() + lockWaitMs; ;) {
    try {
      return await check(source, disks);
    } catch (error) {
      const isBusy = error instanceof CowcatcherError && error.code === "BUSY";
      const leftMs = untilMs - performance.now();
      if (!isBusy || leftMs <= 0 || signal.aborted) throw error;
      await delay(Math.min(POLL_MS, leftMs), undefined, { signal }).catch(() => undefined);
    }
  }
}

async function refuseBusyServer(socket: string, disks: readonly string[]): Promise<void> {
  const client = await ControlClient.connect(socket);
  try {
    const jobs = await listJobs(client);
    const other = jobs.find(({ disk, status }) => disks.includes(disk) && !isOver(status));
    if (other !== undefined)
      throw busy(other.disk, `another backup of this disk is running, to ${other.target}`);
  } finally {
    client.close();
  }
}

async function refuseBusyGuest(socket: string): Promise<void> {
  if (!(await new QemuMonitor(socket).visit(hasLiveRun))) return;
  throw busy(socket, "another backup of this guest is running");
}

async function refuseBusyDomain(virsh: Virsh): Promise<void> {
  const ours = await runOfJob(virsh);
  if (ours === undefined || isAlive(ours.run)) await refuseBusy(virsh);
}

function busy(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "BUSY", object, problem, hint: HINT });
}
