// What runs that died have left in a QEMU, found by its name and by who is still alive, and undone: exports first, then jobs,
// then nodes from the top down. Nothing without a name of ours is touched, and nothing of a run that goes on.

import { toCowcatcherError } from "../errors.js";
import type { QemuGraph } from "./graph.js";
import { readGraph } from "./graph.js";
import { deleteExport } from "./exports.js";
import { QemuMonitor, type Visit } from "./monitor.js";
import { cancelJob } from "./ring.js";
import { endBitmaps, giveBackBitmap } from "./bitmaps.js";
import { isAlive, readBitmapWorkName, runOf } from "./names.js";
import { removeDeadFolders } from "./run-folder.js";
import { removing } from "./undo.js";

export interface Leftovers {
  exports: readonly string[];
  jobs: readonly string[];
  nodes: readonly string[];
}

const isDead = (name: string): boolean => {
  const run = runOf(name);
  return run !== undefined && !isAlive(run);
};

const isLive = (name: string): boolean => {
  const run = runOf(name);
  return run !== undefined && isAlive(run);
};

/** @throws CowcatcherError */
export async function findLeftovers(visit: Visit): Promise<Leftovers> {
  const { exports, jobs, nodes } = await namesIn(visit);
  return { exports: exports.filter(isDead), jobs: jobs.filter(isDead), nodes: nodes.filter(isDead) };
}

/** Whether a backup of ours goes on in this QEMU. @throws CowcatcherError */
export async function hasLiveRun(visit: Visit): Promise<boolean> {
  return Object.values(await namesIn(visit)).some((names) => names.some(isLive));
}

async function namesIn(visit: Visit): Promise<Record<"exports" | "jobs" | "nodes", string[]>> {
  const graph = await readGraph(visit);
  const [exports, jobs] = [await visit.list("query-block-exports"), await visit.list("query-jobs")];
  return {
    exports: exports.map(({ id }) => String(id)),
    jobs: jobs.map(({ id }) => String(id)),
    nodes: [...graph.nodes.keys()],
  };
}

/**
 * Removes what dead runs left; the names of what it removed.
 * @throws CowcatcherError where QEMU refuses: the error names the step
 */
export async function cleanUpDead(visit: Visit): Promise<string[]> {
  const { exports, jobs } = await findLeftovers(visit);
  for (const id of exports) await deleteExport(visit, id);
  // With the job goes its filter. Its writes have failed when our process died, so none is unanswered.
  for (const id of jobs) await cancelJob(visit, id);
  const removed = [...exports, ...jobs];
  const graph = await readGraph(visit);
  const dead = [...graph.nodes.keys()].filter(isDead);
  // What stands above a filter uses it, and a device's disk cannot be written past a filter in use.
  const above = await removeNodes(visit, dead);
  await giveBackDevices(visit, graph, dead);
  const rest = await removeNodes(visit, above.left);
  if (rest.failure !== undefined) throw toCowcatcherError(rest.failure, visit.path);
  removed.push(...above.removed, ...rest.removed, ...(await giveBackDeadBitmaps(visit, graph)));
  if (exports.length > 0 && (await visit.list("query-block-exports")).length === 0) {
    await removing(visit.execute("nbd-server-stop"));
  }
  return removed;
}

/** Bitmaps of dead runs: what they have recorded belongs to the one that they are heirs of. */
async function giveBackDeadBitmaps(visit: Visit, { nodes }: QemuGraph): Promise<string[]> {
  const given: string[] = [];
  for (const { name: node, bitmaps } of nodes.values()) {
    for (const { name } of bitmaps) {
      const work = readBitmapWorkName(name);
      if (work === undefined || isAlive(work.run)) continue;
      await giveBackBitmap(visit, node, name, work.old);
      given.push(name);
    }
  }
  return given;
}

/** A device that stands on a node of ours gets what is below it. */
async function giveBackDevices(visit: Visit, graph: QemuGraph, dead: readonly string[]): Promise<void> {
  for (const { node, qdev } of graph.devices) {
    if (node === undefined || qdev === undefined || !dead.includes(node)) continue;
    const below = graph.edges.find(({ parent, role }) => parent === node && role === "file")?.child;
    if (below === undefined) continue;
    await visit.execute("qom-set", { path: qdev, property: "drive", value: below });
  }
}

interface Removal {
  removed: string[];
  left: string[];
  /** Why the last of those that are left is. */
  failure: unknown;
}

/** Parents go before what they stand on: a node that is in use is tried again after the others. */
async function removeNodes(visit: Visit, names: readonly string[]): Promise<Removal> {
  let left = [...names];
  const removed: string[] = [];
  let failure: unknown;
  for (let before = Infinity; left.length > 0 && left.length < before;) {
    before = left.length;
    const still: string[] = [];
    for (const name of left) {
      try {
        await removing(visit.execute("blockdev-del", { "node-name": name }));
        removed.push(name);
      } catch (error) {
        failure = error;
        still.push(name);
      }
    }
    left = still;
  }
  return { removed, left, failure: left.length === 0 ? undefined : failure };
}

/**
 * Removes what dead runs left in the QEMU at `monitor`, and their folders in `directory`; and the bitmaps of the backups
 * `replaced`, on which nothing will be built. Returns what it removed.
 * @throws CowcatcherError as cleanUpDead, and as QemuMonitor.visit
 */
export async function cleanUp(
  monitor: string,
  directory: string,
  replaced: readonly string[] = [],
): Promise<string[]> {
  const removed = await new QemuMonitor(monitor).visit(async (visit) => {
    const dead = await cleanUpDead(visit);
    if (replaced.length === 0) return dead;
    const { nodes } = await readGraph(visit);
    return [...dead, ...(await endBitmaps(visit, nodes.values(), replaced))];
  });
  await removeDeadFolders(directory);
  return removed;
}
