// Which way to keep a disk of a running QEMU as it was at T0, and why.

import { CowcatcherError } from "../errors.js";
import { filterObstacle, filterRisk } from "./filter.js";
import type { QemuMethod } from "./methods.js";
import type { QemuDisk, QemuGraph } from "./graph.js";

export interface MethodChoice {
  method: Exclude<QemuMethod, "auto">;
  /** For people. */
  reason: string;
}

/** @throws CowcatcherError UNSUPPORTED, naming what stands in the way; USAGE where --accept-guest-risk is needed */
export function chooseMethod(
  graph: QemuGraph,
  disks: readonly QemuDisk[],
  { acceptGuestRisk }: { acceptGuestRisk: boolean },
): MethodChoice {
  for (const disk of disks) {
    const obstacle = filterObstacle(graph, disk);
    if (obstacle !== undefined) {
      throw new CowcatcherError({ code: "UNSUPPORTED", object: disk.name, problem: obstacle });
    }
    const risk = filterRisk(graph, disk);
    if (risk !== undefined && !acceptGuestRisk) {
      throw new CowcatcherError({
        code: "USAGE",
        object: disk.name,
        problem: `${risk}: were this process killed, the guest would be, too`,
        hint: "give --accept-guest-risk, or take the disk out of the iothread",
      });
    }
  }
  return {
    method: "filter",
    reason: "QEMU keeps the old data in a file, and our death is nothing to the guest",
  };
}
