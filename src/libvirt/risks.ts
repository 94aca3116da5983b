// What libvirt's way of keeping old data cannot do, and when it is a risk for the guest.

import type { JobOptions } from "../backup/options.js";
import { CowcatcherError } from "../errors.js";
import { filterRisk } from "../qemu/filter.js";
import type { QemuVersion } from "../qemu/graph.js";
import type { DomainDisk } from "./domain.js";
import type { Virsh } from "./virsh.js";

interface MethodWish {
  acceptGuestRisk: boolean;
  jobs: readonly { job: Pick<JobOptions, "onBufferFull" | "cowBufferSizeBytes"> }[];
}

/** @throws CowcatcherError UNSUPPORTED, naming what cannot be; USAGE where --accept-guest-risk is needed */
export async function refuseMethod(
  virsh: Virsh,
  disks: readonly DomainDisk[],
  { jobs, acceptGuestRisk }: MethodWish,
): Promise<void> {
  if (jobs.some(({ job }) => job.onBufferFull === "wait")) {
    throw cannot(
      "--on-buffer-full",
      "a guest's write cannot be made to wait for room in libvirt's file",
      "give spill or cancel",
    );
  }
  if (jobs.some(({ job }) => job.cowBufferSizeBytes === 0)) {
    throw cannot("--cow-buffer-size", "libvirt keeps old data in a file in any case", "give a size");
  }
  const inIothread = disks.find(({ isInIothread }) => isInIothread);
  if (inIothread === undefined || acceptGuestRisk) return;
  const risk = filterRisk({ version: await runningQemu(virsh) }, { iothread: inIothread.name });
  if (risk === undefined) return;
  throw new CowcatcherError({
    code: "USAGE",
    object: inIothread.name,
    problem: `were this process killed, or libvirt's server to end out of turn, the guest would be harmed: ${risk}`,
    hint: "give --accept-guest-risk, or take the disk out of the iothread",
  });
}

function cannot(object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object, problem, hint });
}

/** The QEMU that libvirt starts. One that it does not tell is taken to be old. @throws CowcatcherError as Virsh.run */
async function runningQemu(virsh: Virsh): Promise<QemuVersion> {
  const answer = await virsh.hypervisor("version");
  const [, major, minor] = /^Running hypervisor: QEMU (\d+)\.(\d+)/m.exec(answer) ?? [];
  return { major: Number(major ?? 0), minor: Number(minor ?? 0) };
}
