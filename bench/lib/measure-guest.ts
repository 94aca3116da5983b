// One measurement: a fresh server, a guest that has been at work for a while, a backup that has just started, and fio
// for some seconds; then the backup's end.
//
// The while before is for both contestants alike: a guest does not begin its work with a backup, and neither the page
// cache nor compiled code is to be made in the seconds that count.

import { mkdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { formatBytes } from "../../src/units.js";
import { sleep, runProgram } from "./children.js";
import { dropCache } from "./disks.js";
import type { Contestant, RunningBackup } from "./contestant.js";
import { runFio, type FioResult } from "./fio.js";
import type { Cell } from "./guest-cells.js";

export interface Measurement extends FioResult {
  /** How long the guest was at work. */
  guestSeconds: number;
  /** Of the server, and of who copies, while the guest was at work. */
  cpuSeconds: number;
  /** From T0 until the target was complete and synced; undefined: no backup, or cancelled. */
  backupSeconds: number | undefined;
  /** The longest that the server's event loop was held up while the guest was at work; undefined: not measured. */
  loopDelayMs?: number | undefined;
  /** The most that the files with old data took up; undefined: there are none. */
  fleeceBytesMax?: number | undefined;
  /** Seconds after the guest's start. Only in a timeline. */
  marks: number[];
}

/** In one line. */
export function describeMeasurement(measurement: Measurement): string {
  const { iops, p99Ms, longestMs, cpuSeconds, backupSeconds, fleeceBytesMax } = measurement;
  const backup = backupSeconds === undefined ? "" : `, backup ${backupSeconds.toFixed(1)} s`;
  const fleece = fleeceBytesMax === undefined ? "" : `, old data ${formatBytes(fleeceBytesMax)}`;
  const latencies = `p99 ${p99Ms.toFixed(2)} ms, longest ${longestMs.toFixed(1)} ms`;
  return `${Math.round(iops)} IOPS, ${latencies}, CPU ${cpuSeconds.toFixed(1)} s${backup}${fleece}`;
}

export const WARM_UP_SECONDS = 2;
/** A file grows by some megabytes in that time. */
const FLEECE_LOOK_MS = 20;

export interface MeasureOptions {
  disk: string;
  /** A folder of its own is made in here for each measurement. */
  folder: string;
  guestSeconds: number;
  /** A backup that takes longer after the guest is cancelled; its duration is then not known. */
  backupTimeoutSeconds: number;
}

export async function measure(
  cell: Cell,
  contestant: Contestant,
  options: MeasureOptions,
): Promise<Measurement> {
  return withServer(cell, contestant, options, async (server) => {
    await runFio(cell.pattern, server.place, WARM_UP_SECONDS);
    // What is to be cold is so again.
    if (cell.direct) await dropCache(options.disk);
    const fleece = new FleecePeak(() => server.fleeceBytes?.());
    const backup = contestant.hasBackup ? await server.startBackup() : undefined;
    const cpuNow = (): number => server.child.cpuSeconds() + (backup?.copier?.cpuSeconds() ?? 0);
    const cpuBefore = cpuNow();
    const startMs = Date.now();
    const result = await runFio(cell.pattern, server.place, options.guestSeconds);
    const endMs = Date.now();
    const cpuSeconds = cpuNow() - cpuBefore;
    const backupSeconds = await backupEnd(backup, options.backupTimeoutSeconds);
    const fleeceBytesMax = fleece.end();
    const loopDelayMs = server.loopDelayMs?.(startMs, endMs);
    const { guestSeconds } = options;
    return { ...result, guestSeconds, cpuSeconds, backupSeconds, loopDelayMs, fleeceBytesMax, marks: [] };
  });
}

/** Looks at the files from its making on. */
class FleecePeak {
  #bytesMax: number | undefined;
  readonly #timer: NodeJS.Timeout;

  constructor(bytes: () => number | undefined) {
    this.#timer = setInterval(() => {
      const now = bytes();
      if (now !== undefined) this.#bytesMax = Math.max(this.#bytesMax ?? 0, now);
    }, FLEECE_LOOK_MS);
  }

  end(): number | undefined {
    clearInterval(this.#timer);
    return this.#bytesMax;
  }
}

/** The guest works all the time; the backup starts after `leadSeconds`. */
export async function measureTimeline(
  cell: Cell,
  contestant: Contestant,
  options: MeasureOptions,
  leadSeconds: number,
): Promise<Measurement> {
  return withServer(cell, contestant, options, async (server) => {
    const startMs = performance.now();
    const secondsNow = (): number => (performance.now() - startMs) / 1000;
    const guest = runFio(cell.pattern, server.place, options.guestSeconds, { withSeries: true });
    // Awaited below; a failure meanwhile must not count as unhandled.
    guest.catch(() => undefined);
    await sleep(leadSeconds * 1000);
    const backup = await server.startBackup();
    const marks = [secondsNow()];
    const ended = backup.ended.then((seconds) => {
      marks.push(secondsNow());
      return seconds;
    });
    ended.catch(() => undefined);
    const result = await guest;
    const cpuSeconds = server.child.cpuSeconds();
    const backupSeconds = await backupEnd({ ...backup, ended }, options.backupTimeoutSeconds);
    const { guestSeconds } = options;
    return {
      ...result,
      guestSeconds,
      cpuSeconds,
      backupSeconds,
      marks: marks.filter((at) => at <= guestSeconds),
    };
  });
}

async function withServer<T>(
  { format, throttle, direct }: Cell,
  contestant: Contestant,
  { disk, folder }: MeasureOptions,
  body: (server: Awaited<ReturnType<Contestant["start"]>>) => Promise<T>,
): Promise<T> {
  const scratch = join(folder, "measurement");
  mkdirSync(scratch);
  try {
    if (direct) await dropCache(disk);
    const server = await contestant.start({ disk, format, folder: scratch, throttle, direct });
    try {
      return await body(server);
    } finally {
      await server.stop();
    }
  } finally {
    rmSync(scratch, { recursive: true, force: true });
    // What this measurement left in the page cache is not the next one's to write back.
    await runProgram("sync", ["-f", folder]);
  }
}

async function backupEnd(
  backup: RunningBackup | undefined,
  timeoutSeconds: number,
): Promise<number | undefined> {
  if (backup === undefined) return undefined;
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<"late">((resolve) => {
    timer = setTimeout(() => resolve("late"), timeoutSeconds * 1000);
  });
  const first = await Promise.race([backup.ended, timeout]);
  clearTimeout(timer);
  if (first !== "late") return first;
  await backup.cancel();
  return undefined;
}
