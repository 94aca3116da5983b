// What tracking costs a guest: fio on one server after another, each with one way to track. A round's ratios are between
// neighbours in time, so what else the machine does falls on all of them. All have one disk in turn, and each
// measurement a server of its own: of three servers that stood side by side, one was a quarter quicker than the next for
// as long as they ran, whatever they tracked, as the page cache held their disks in pages of other sizes.

import { rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { MiB } from "../../src/units.js";
import { removeFolder, runProgram, say, scratchFolder } from "./children.js";
import type { DiskFormat, RunningServer } from "./contestant.js";
import { convertDisk, makeRawDisk } from "./disks.js";
import { type FioPattern, runFio } from "./fio.js";
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
    const disk = await makeDisk(folder, cell, sizeBytes);
    await runProgram("sync", ["-f", folder]);
    for (let round = 0; round < rounds; round++) {
      for (let turn = 0; turn < MODES.length; turn++) {
        const mode = MODES[(turn + round) % MODES.length];
        if (mode === undefined) continue;
        const { iops, cpuMicroseconds } = await measure(cell, mode, disk, seconds);
        result.iops[mode].push(iops);
        result.cpu[mode].push(cpuMicroseconds);
      }
    }
  } finally {
    removeFolder(folder);
  }
  say(
    `  ${cell.name}: ${MODES.map((mode) => `${mode} ${Math.round(median(result.iops[mode]))}`).join(", ")}`,
  );
  return result;
}

async function makeDisk(folder: string, { format }: TrackingCell, sizeBytes: number): Promise<string> {
  const raw = join(folder, "disk.raw");
  makeRawDisk(raw, sizeBytes);
  if (format === "raw") return raw;
  const disk = join(folder, "disk.qcow2");
  await convertDisk(raw, disk, "qcow2");
  rmSync(raw);
  return disk;
}

function startServer(mode: Mode, disk: string, { format }: TrackingCell): Promise<RunningServer> {
  rmSync(`${disk}.cowcatcher`, { recursive: true, force: true });
  // A T0 without a checkpoint would end no epoch.
  const checkpoint = mode === "off" ? [] : ["--checkpoint", "bench"];
  const contestant = cowcatcher(
    mode,
    ["--cow-buffer-size", "1G", "--force", ...checkpoint],
    ["--tracking", mode],
  );
  return contestant.start({ disk, format, folder: dirname(disk), throttle: SLOW_TARGET, direct: false });
}

async function measure(
  cell: TrackingCell,
  mode: Mode,
  disk: string,
  seconds: number,
): Promise<{ iops: number; cpuMicroseconds: number }> {
  const server = await startServer(mode, disk, cell);
  try {
    if (cell.when !== "fresh") await runFio(cell.pattern, server.place, WARM_UP_SECONDS);
    const backup = cell.when === "during a backup" ? await server.startBackup() : undefined;
    backup?.ended.catch(() => undefined);
    const before = server.child.cpuSeconds();
    const { iops } = await runFio(cell.pattern, server.place, seconds);
    const cpuSeconds = server.child.cpuSeconds() - before;
    await backup?.cancel();
    return { iops, cpuMicroseconds: (cpuSeconds * 1e6) / (iops * seconds) };
  } finally {
    await server.stop();
  }
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
