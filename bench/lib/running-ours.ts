// cowcatcher beside a QEMU that runs the guest: `backup --qmp`, by each of its methods.
//
// The guest is fio at an export of a storage daemon's; for the method `filter` the daemon's monitor looks as if there were a
// device (device-monitor.ts).

import { mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import type { Contestant, RunningServer, Setup } from "./contestant.js";
import { DEVICE, DeviceMonitor } from "./device-monitor.js";
import { type BackupStatus, startBackup } from "./ours.js";
import { diskUsage, startDaemon } from "./qemu.js";

export type Method = "ring" | "filter";

export interface Tuning {
  /** For the table. */
  name: string;
  args: readonly string[];
}

export function ours(method: Method, tuning: Tuning): Contestant {
  const name = `cowcatcher, ${method}${tuning.name === "" ? "" : `, ${tuning.name}`}`;
  return { name, hasBackup: true, start: (setup) => start(setup, method, tuning) };
}

async function start(setup: Setup, method: Method, tuning: Tuning): Promise<RunningServer> {
  const isFilter = method === "filter";
  const daemon = await startDaemon(setup, isFilter);
  const { child, socket, monitor } = daemon;
  const path = join(setup.folder, "device.sock");
  const device = isFilter
    ? await DeviceMonitor.listen(path, monitor, { top: "top", disk: "disk" })
    : undefined;
  const fleeceFolder = join(setup.folder, "fleece");
  mkdirSync(fleeceFolder);
  const { bytesPerSecond } = setup.throttle;
  const args = [
    ...["--qmp", isFilter ? path : monitor, "--disk", isFilter ? DEVICE : "disk", "--nbd", socket],
    ...tuning.args,
    ...["--qemu-method", method, "--fleece-dir", fleeceFolder, "--accept-guest-risk", "--progress"],
    ...(bytesPerSecond === undefined ? [] : ["--rate-limit", String(bytesPerSecond)]),
    ...[join(setup.folder, "target.raw"), "-O", "raw"],
  ];
  let status: BackupStatus | undefined;
  return {
    child,
    place: socket,
    startBackup: async () => {
      const backup = await startBackup(args, (latest) => (status = latest));
      return { ...backup, copier: backup.process };
    },
    stop: async () => {
      device?.close();
      await daemon.stop();
    },
    // The spill file has no name: what was ever written to it is at least what it is.
    fleeceBytes: () =>
      isFilter ? filesIn(fleeceFolder) : (status?.buffer_bytes_used ?? 0) + (status?.spilled_bytes ?? 0),
  };
}

function filesIn(folder: string): number {
  const names = readdirSync(folder, { recursive: true, encoding: "utf8" });
  return names.reduce((sum, name) => sum + diskUsage(join(folder, name)), 0);
}
