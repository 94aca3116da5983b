// Which way to keep a disk of a running QEMU as it was at T0, and why.
//
//   filter   where it can be used and our death is nothing to the guest; else
//   ring     where that is so of it (QEMU 10.1), or is accepted
//
// What only one of them can do (a guest's write that waits for room, no buffer at all) decides as well.

import type { JobOptions } from "../backup/options.js";
import { CowcatcherError } from "../errors.js";
import { filterObstacle, filterRisk } from "./filter.js";
import type { QemuDisk, QemuGraph } from "./graph.js";
import type { QemuMethod } from "./methods.js";
import { ringObstacle, ringRisk } from "./ring.js";

type Method = Exclude<QemuMethod, "auto">;

export interface MethodChoice {
  method: Method;
  /** For people. */
  reason: string;
}

export interface MethodWish {
  method: QemuMethod;
  acceptGuestRisk: boolean;
  /** Of all disks alike. */
  buffer: Pick<JobOptions, "onBufferFull" | "cowBufferSizeBytes">;
}

/** What stands against a method. */
interface Objection {
  disk: string;
  problem: string;
  hint?: string;
  /** It is a matter of --accept-guest-risk. */
  isRisk?: boolean;
}

const REASONS: Record<Method, string> = {
  filter: "QEMU keeps the old data in a file, and our death is nothing to the guest",
  ring: "QEMU sends the old data to this process, and no device of a guest is needed",
};

/** @throws CowcatcherError UNSUPPORTED, naming what stands in the way; USAGE where --accept-guest-risk is needed */
export function chooseMethod(graph: QemuGraph, disks: readonly QemuDisk[], wish: MethodWish): MethodChoice {
  const objections = (method: Method): Objection | undefined => {
    for (const disk of disks) {
      const found = method === "filter" ? againstFilter(graph, disk, wish) : againstRing(graph, disk, wish);
      if (found !== undefined) return found;
    }
    return undefined;
  };
  const { method } = wish;
  if (method !== "auto") {
    const objection = objections(method);
    if (objection !== undefined) throw refusal(method, objection);
    return { method, reason: "as asked" };
  }
  const against = objections("filter");
  if (against === undefined) return { method: "filter", reason: REASONS.filter };
  const againstOther = objections("ring");
  if (againstOther === undefined)
    return { method: "ring", reason: `${REASONS.ring}; not filter: ${against.problem}` };
  // A risk that can be accepted is nearer to what the user wants than what cannot be.
  throw against.isRisk === true || againstOther.isRisk !== true
    ? refusal("filter", against)
    : refusal("ring", againstOther, `; and not filter, as ${against.problem}`);
}

function againstFilter(graph: QemuGraph, disk: QemuDisk, wish: MethodWish): Objection | undefined {
  const { onBufferFull, cowBufferSizeBytes } = wish.buffer;
  const { name } = disk;
  const obstacle = filterObstacle(graph, disk);
  if (obstacle !== undefined) return { disk: name, problem: obstacle };
  if (onBufferFull === "wait") {
    const problem = "a guest's write cannot be made to wait for room in QEMU's file (--on-buffer-full wait)";
    return { disk: name, problem, hint: "give --on-buffer-full spill or cancel" };
  }
  if (cowBufferSizeBytes === 0) {
    const problem = "QEMU keeps old data in a file in any case (--cow-buffer-size 0)";
    return { disk: name, problem, hint: "give a size" };
  }
  return risky(disk, filterRisk(graph, disk), wish, ", or take the disk out of the iothread");
}

function againstRing(graph: QemuGraph, disk: QemuDisk, wish: MethodWish): Objection | undefined {
  const obstacle = ringObstacle(graph);
  if (obstacle !== undefined) return { disk: disk.name, problem: obstacle };
  return risky(disk, ringRisk(graph, disk), wish, "");
}

function risky(
  { name }: QemuDisk,
  risk: string | undefined,
  { acceptGuestRisk }: MethodWish,
  otherwise: string,
): Objection | undefined {
  if (risk === undefined || acceptGuestRisk) return undefined;
  return {
    disk: name,
    problem: `were this process killed, the guest would be harmed: ${risk}`,
    hint: `give --accept-guest-risk${otherwise}`,
    isRisk: true,
  };
}

function refusal(method: Method, { disk, problem, hint, isRisk }: Objection, besides = ""): CowcatcherError {
  return new CowcatcherError({
    code: isRisk === true ? "USAGE" : "UNSUPPORTED",
    object: disk,
    problem: `method ${method}: ${problem}${besides}`,
    hint,
  });
}
