// A Ceph of its own for a benchmark or the tests: scripts/ceph-cluster.sh, which ends with the process that started it.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { formatRbdAddress } from "../../src/rbd/address.js";
import { runProgram } from "./children.js";
import type { RbdPlace } from "./contestant.js";

const SCRIPT = resolve("scripts/ceph-cluster.sh");

export interface CephCluster {
  /** Its folder, which must not be there before. */
  readonly folder: string;
  readonly conf: string;
  /** Ends the daemons and removes the folder. */
  stop(): Promise<void>;
}

export interface CephOptions {
  /** Of the OSD: a file, sparse unless it is filled. */
  storeBytes?: number;
  /** Written from end to end first, so that none of it is slow for being new: half a minute. */
  isFilled?: boolean;
  /** Of the daemons, 0 to 19. */
  niceness?: number;
}

/** Takes some seconds. */
export async function startCeph(
  folder: string,
  { storeBytes, isFilled = false, niceness = 0 }: CephOptions = {},
): Promise<CephCluster> {
  const child = spawn("nice", ["-n", String(niceness), "bash", SCRIPT, "run", folder], {
    stdio: ["pipe", "pipe", "pipe"],
    env: {
      ...process.env,
      ...(storeBytes !== undefined && { COWCATCHER_CEPH_BYTES: String(storeBytes) }),
      ...(isFilled && { COWCATCHER_CEPH_FILLED: "1" }),
    },
  });
  let stderr = "";
  child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
  const ended = once(child, "close");
  const ready = new Promise<boolean>((settle) => {
    createInterface({ input: child.stdout }).on("line", () => settle(true));
    void ended.then(() => settle(false));
  });
  if (!(await ready)) throw new Error(`no Ceph could be started: ${stderr}`);
  return {
    folder,
    conf: join(folder, "ceph.conf"),
    async stop() {
      child.stdin.end();
      await ended;
    },
  };
}

/** The daemon's process, for signals. */
export function cephDaemon(folder: string, daemon: "mon" | "osd"): number {
  return Number(readFileSync(join(folder, `${daemon}.pid`), "utf8"));
}

/** Starts the OSD again after it was killed. */
export function restartOsd(folder: string): void {
  spawn("bash", [SCRIPT, "osd", folder], { stdio: "ignore", detached: true }).unref();
}

export function rbdAddress({ conf, pool, image }: RbdPlace): string {
  return formatRbdAddress({
    pool,
    namespace: "",
    image,
    snapshot: undefined,
    user: undefined,
    conf,
    settings: [],
  });
}

export async function createRbdImage({ conf, pool, image }: RbdPlace, sizeBytes: number): Promise<void> {
  await runProgram("rbd", ["-c", conf, "create", "--size", `${sizeBytes}B`, `${pool}/${image}`]);
}

const IDLE_LIMIT_MS = 30_000;
const IDLE_WINDOW_MS = 500;
/** Of a processor, in the window: what an OSD with nothing to do takes. */
const IDLE_SHARE_MAX = 0.05;
/** Of /proc's times: 100 a second on every Linux (USER_HZ). */
const TICK_MS = 10;

/**
 * With its data; one that is not there is no error. Waits until the OSD has come to rest: it frees the space of removed objects
 * behind the answer, and whoever is measured next would pay for it.
 */
export async function removeRbdImage({ conf, pool, image }: RbdPlace): Promise<void> {
  const { stdout } = await runProgram("rbd", ["-c", conf, "ls", pool]);
  if (!stdout.split("\n").includes(image)) return;
  await runProgram("rbd", ["-c", conf, "rm", "--no-progress", `${pool}/${image}`]);
  await osdIsIdle(dirname(conf));
}

async function osdIsIdle(folder: string): Promise<void> {
  const pid = cephDaemon(folder, "osd");
  const deadline = performance.now() + IDLE_LIMIT_MS;
  for (let before = processorMs(pid); performance.now() < deadline;) {
    await new Promise((settle) => setTimeout(settle, IDLE_WINDOW_MS));
    const now = processorMs(pid);
    if (now - before < IDLE_WINDOW_MS * IDLE_SHARE_MAX) return;
    before = now;
  }
}

/** Of all its threads, in user and system mode. */
function processorMs(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  // The name before, in parentheses, may hold anything.
  const [user, system] = stat
    .slice(stat.lastIndexOf(")") + 2)
    .split(" ")
    .slice(11, 13);
  return (Number(user) + Number(system)) * TICK_MS;
}
