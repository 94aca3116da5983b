// What tracking costs a guest: three servers at a time, each with a disk of its own and one way to track, and fio on one
// after another. A round's ratios are between neighbours in time, so what else the machine does falls on all of them.

import { mkdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { MiB } from "../../src/units.js";
import { removeFolder, runProgram, say, scratchFolder } from "./children.js";
import type { DiskFormat, RunningServer } from "./contestant.js";
import { convertDisk, makeRawDisk } from "./disks.js";
import { type FioPattern, runFio, type FioPlace } from "./fio.js";
import { cowcatcher } from "./ours.js";
import { formatFigure, markdownTable, median } from "./statistics.js";

export const MODES = ["off", "process", "host"] as const;
export type Mode = (typeof MODES)[number];
/** Of the writes that a guest makes without tracking, what it is to make with it. */
const AIMS: Record<Mode, number> = { off: 1, process: 0.97, host: 0.93 };

export interface TrackingCell {
  name: string;
  pattern: FioPattern;
  format: DiskFormat;
  /** `fresh`: no bit is set and no extent is hot at the guest's first write. */
  when: "no backup" | "during a backup" | "fresh";
}

export interface TrackingResult {
  cell: string;
  /** By mode, a figure a round. */
  iops: Record<Mode, number[]>;
  /** Of the server's processor time, µs for each of the guest's writes: what a busy machine distorts less. */
  cpu: Record<Mode, number[]>;
}

const PATTERNS: FioPattern[] = [
  { name: "randwrite 32k qd8", rw: "randwrite", blockSize: "32k", ioDepth: 8 },
  { name: "randwrite 4k qd32", rw: "randwrite", blockSize: "4k", ioDepth: 32 },
];
const SLOW_TARGET = { name: "50 MB/s", bytesPerSecond: 50 * MiB };
const WARM_UP_SECONDS = 2;

export const TRACKING_CELLS: TrackingCell[] = PATTERNS.flatMap((pattern) =>
  (["raw", "qcow2"] as const).flatMap((format) =>
    (["no backup", "during a backup", "fresh"] as const).map((when) => ({
      name: `${pattern.name}, ${format}, ${when}`,
      pattern,
      format,
      when,
    })),
  ),
);

interface Rival {
  mode: Mode;
  folder: string;
  disk: string;
  server: RunningServer | undefined;
}

export interface GuestOptions {
  rounds: number;
  seconds: number;
  sizeBytes: number;
  /** Where the disks stand. */
  parent: string;
}

export async function measureTrackingCell(
  cell: TrackingCell,
  { rounds, seconds, sizeBytes, parent }: GuestOptions,
): Promise<TrackingResult> {
  const folder = scratchFolder(parent);
  const perMode = (): Record<Mode, number[]> => ({ off: [], process: [], host: [] });
  const result: TrackingResult = { cell: cell.name, iops: perMode(), cpu: perMode() };
  try {
    const rivals: Rival[] = [];
    for (const mode of MODES) rivals.push(await makeRival(folder, mode, cell, sizeBytes));
    await runProgram("sync", ["-f", folder]);
    if (cell.when !== "fresh") {
      for (const rival of rivals) await runFio(cell.pattern, await placeOf(rival, cell), WARM_UP_SECONDS);
    }
    for (let round = 0; round < rounds; round++) {
      for (let turn = 0; turn < rivals.length; turn++) {
        const rival = rivals[(turn + round) % rivals.length];
        if (rival === undefined) continue;
        const { iops, cpuMicroseconds } = await measure(rival, cell, seconds);
        result.iops[rival.mode].push(iops);
        result.cpu[rival.mode].push(cpuMicroseconds);
      }
    }
    for (const { server } of rivals) await server?.stop();
  } finally {
    removeFolder(folder);
  }
  say(
    `  ${cell.name}: ${MODES.map((mode) => `${mode} ${Math.round(median(result.iops[mode]))}`).join(", ")}`,
  );
  return result;
}

async function makeRival(
  parent: string,
  mode: Mode,
  { format }: TrackingCell,
  sizeBytes: number,
): Promise<Rival> {
  const folder = join(parent, mode);
  mkdirSync(folder);
  const raw = join(folder, "disk.raw");
  makeRawDisk(raw, sizeBytes);
  if (format === "raw") return { mode, folder, disk: raw, server: undefined };
  const disk = join(folder, "disk.qcow2");
  await convertDisk(raw, disk, "qcow2");
  rmSync(raw);
  return { mode, folder, disk, server: undefined };
}

/** Of the rival's server, started if need be. */
async function placeOf(rival: Rival, { format }: TrackingCell): Promise<FioPlace> {
  if (rival.server === undefined) {
    const { mode, disk, folder } = rival;
    // A T0 without a checkpoint would end no epoch.
    const checkpoint = mode === "off" ? [] : ["--checkpoint", "bench"];
    const contestant = cowcatcher(
      mode,
      ["--cow-buffer-size", "1G", "--force", ...checkpoint],
      ["--tracking", mode],
    );
    rival.server = await contestant.start({ disk, format, folder, throttle: SLOW_TARGET, direct: false });
  }
  return rival.server.place;
}

async function measure(
  rival: Rival,
  cell: TrackingCell,
  seconds: number,
): Promise<{ iops: number; cpuMicroseconds: number }> {
  if (cell.when === "fresh") {
    await rival.server?.stop();
    rival.server = undefined;
    rmSync(`${rival.disk}.cowcatcher`, { recursive: true, force: true });
  }
  const place = await placeOf(rival, cell);
  const backup = cell.when === "during a backup" ? await rival.server?.startBackup() : undefined;
  backup?.ended.catch(() => undefined);
  const before = rival.server?.child.cpuSeconds() ?? 0;
  const { iops } = await runFio(cell.pattern, place, seconds);
  const cpuSeconds = (rival.server?.child.cpuSeconds() ?? 0) - before;
  await backup?.cancel();
  return { iops, cpuMicroseconds: (cpuSeconds * 1e6) / (iops * seconds) };
}

/** The median of the rounds' own ratios. */
export function ratio({ iops }: TrackingResult, mode: Mode): number {
  return median(iops[mode].map((value, round) => value / (iops.off[round] ?? NaN)));
}

export function trackingTable(results: readonly TrackingResult[]): string {
  const header = [
    "guest",
    "off, IOPS",
    "process",
    "host",
    `aims (${AIMS.process}, ${AIMS.host})`,
    "server's CPU, µs a write: off, process, host",
  ];
  const rows = results.map((result) => {
    const [process, host] = [ratio(result, "process"), ratio(result, "host")];
    const isMet = process >= AIMS.process && host >= AIMS.host;
    return [
      result.cell,
      formatFigure(median(result.iops.off)),
      process.toFixed(3),
      host.toFixed(3),
      isMet ? "met" : "missed",
      MODES.map((mode) => median(result.cpu[mode]).toFixed(1)).join(", "),
    ];
  });
  return markdownTable(header, rows);
}
