// cowcatcher in the guest benchmark.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { Readable } from "node:stream";
import { LOOP_DELAY_MESSAGE } from "../../src/cli/actions/loop-delay.js";
import { GiB } from "../../src/units.js";
import { type Child, childError, waitForChild } from "./children.js";
import type { Contestant, RunningBackup, RunningServer, Setup } from "./contestant.js";
import { makeRawDisk } from "./disks.js";
import { rbdAddress, removeRbdImage } from "./ceph.js";
import { startCowcatcher, startServe } from "./cowcatcher.js";

/** As large as the disk is by default. */
const PLAIN_FILE_BYTES = GiB;

/**
 * @param backupArguments of `backup`, beside target and rate; undefined: no backup.
 * @param moreOfServe arguments of `serve`
 * @param environment of `serve`, beside the program's own
 */
export function cowcatcher(
  name: string,
  backupArguments: readonly string[] | undefined,
  moreOfServe: readonly string[] = [],
  environment: Readonly<Record<string, string>> = {},
): Contestant {
  return {
    name: `cowcatcher, ${name}`,
    hasBackup: backupArguments !== undefined,
    start: (setup) => start(setup, backupArguments ?? [], moreOfServe, environment),
  };
}

/**
 * The machine's own noise: the guest's writes go to a file by plain pwrite, while a server that has nothing to do
 * stands beside it.
 */
export function plainWrites(): Contestant {
  return {
    name: "plain pwrite, server idle",
    hasBackup: false,
    start: async (setup) => {
      const file = join(setup.folder, "plain.raw");
      makeRawDisk(file, PLAIN_FILE_BYTES);
      return { ...(await start(setup, [], [], {})), place: { file, by: "pwrite" } };
    },
  };
}

/** Of the messages of `backup --json` (docs/json.md). */
export interface BackupStatus {
  spilled_bytes: number;
  buffer_bytes_used: number;
}

async function start(
  setup: Setup,
  backupArguments: readonly string[],
  moreOfServe: readonly string[],
  environment: Readonly<Record<string, string>>,
): Promise<RunningServer> {
  const { disk, format, folder, throttle, direct } = setup;
  const log = join(folder, "serve.log");
  const [socket, control] = [join(folder, "nbd.sock"), join(folder, "control.sock")];
  const delayMs = throttle.writeDelayMs;
  const env: Record<string, string> = {
    ...environment,
    ...(delayMs !== undefined && { COWCATCHER_FAULTS: `target-write:delay=${delayMs}ms` }),
  };
  // The watch over the event loop costs a timer a millisecond, so it is set only where it is asked for.
  const serveArguments = [
    ...(direct ? ["--direct", "--log-level", "debug", "--log-file", log] : []),
    ...moreOfServe,
  ];
  const child = await startServe({ image: disk, format, socket, control, env, args: serveArguments });
  const { rbd } = throttle;
  const target = rbd === undefined ? join(folder, "target.raw") : rbdAddress(rbd);
  const args = ["--control", control, target, "-O", "raw"];
  if (direct) args.push("--direct");
  if (throttle.bytesPerSecond !== undefined) args.push("--rate-limit", String(throttle.bytesPerSecond));
  return {
    child,
    place: socket,
    startBackup: () => startBackup([...args, ...backupArguments]),
    stop: async () => {
      await child.stop();
      if (rbd !== undefined) await removeRbdImage(rbd);
    },
    ...(direct && { loopDelayMs: (fromMs, toMs) => longestDelay(log, fromMs, toMs) }),
  };
}

/** The log has a line a second, of the second before it. */
function longestDelay(log: string, fromMs: number, toMs: number): number | undefined {
  let longestMs: number | undefined;
  for (const line of readFileSync(log, "utf8").split("\n")) {
    if (!line.includes(LOOP_DELAY_MESSAGE)) continue;
    const { time, max_ms } = JSON.parse(line) as { time: number; max_ms: number };
    if (time - 1000 >= fromMs && time <= toMs) longestMs = Math.max(longestMs ?? 0, max_ms);
  }
  return longestMs;
}

/** @param onStatus gets what the backup tells of itself, as it goes on */
export async function startBackup(
  args: readonly string[],
  onStatus?: (status: BackupStatus) => void,
): Promise<RunningBackup & { process: Child }> {
  const child = startCowcatcher(["backup", "--json", ...args]);
  // `started` comes after T0.
  await waitForChild(child, "start", () => /"message_type":\s*"started"/.test(child.stdout) || undefined);
  const startMs = performance.now();
  let isCancelled = false;
  if (onStatus !== undefined) {
    const lines = createInterface({ input: child.process.stdout ?? Readable.from([]) });
    lines.on("line", (line) => {
      const message = JSON.parse(line) as BackupStatus & { message_type: string };
      if (message.message_type === "status") onStatus(message);
    });
  }
  const ended = child.ended.then(({ code, stdout, stderr }) => {
    if (code === 0) return (performance.now() - startMs) / 1000;
    // The policy `cancel` is a failure of the backup, and what that cell measures.
    if (isCancelled || /buffer is full|BUFFER_FULL/i.test(stdout + stderr)) return undefined;
    throw childError(child, `exit code ${code}`);
  });
  return {
    process: child,
    ended,
    cancel: async () => {
      isCancelled = true;
      await child.stop();
    },
  };
}
