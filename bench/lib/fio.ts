// fio as the guest: one job over NBD; or on a file, with O_DIRECT, as the measure of what the storage gives.

import { readFileSync } from "node:fs";
import { Child, childError, scratchFolder } from "./children.js";

export interface FioPattern {
  name: string;
  /** fio's rw=. */
  rw: "randwrite" | "write" | "randrw";
  /** fio's bs=. */
  blockSize: string;
  ioDepth: number;
  /** Percent, for randrw. */
  readShare?: number;
  /** Requests a second that the guest asks for; as fast as it can without. */
  ratePerSecond?: number;
}

/** Where it works: path of an NBD socket, whose export is "disk", or a file. */
export type FioPlace = string | { file: string; by: keyof typeof ENGINE_ARGUMENTS };

const ENGINE_ARGUMENTS = {
  /** One at a time, through the page cache. */
  pwrite: ["--ioengine=psync"],
  direct: ["--ioengine=io_uring", "--direct=1"],
};

export interface FioResult {
  /** Reads and writes together. */
  iops: number;
  /** Of the writes, from submission to completion. */
  meanMs: number;
  p99Ms: number;
  longestMs: number;
  /** IOPS over time, where a log was asked for. */
  series: { seconds: number; iops: number }[];
}

interface FioDirection {
  iops: number;
  lat_ns: { mean: number; max: number };
  clat_ns: { percentile?: Record<string, number> };
}

/** What fio needs for its own start and end. */
const FIO_GRACE_MS = 60_000;

export function fioArguments(
  pattern: FioPattern,
  place: FioPlace,
  seconds: number,
  logPrefix?: string,
): string[] {
  const engine =
    typeof place === "string"
      ? ["--ioengine=nbd", `--uri=nbd+unix:///disk?socket=${place}`]
      : [...ENGINE_ARGUMENTS[place.by], `--filename=${place.file}`];
  const args = [
    "--name=guest",
    ...engine,
    `--rw=${pattern.rw}`,
    `--bs=${pattern.blockSize}`,
    `--iodepth=${pattern.ioDepth}`,
    "--time_based",
    `--runtime=${seconds}`,
    "--randrepeat=0",
    "--output-format=json",
  ];
  if (pattern.readShare !== undefined) args.push(`--rwmixread=${pattern.readShare}`);
  if (pattern.ratePerSecond !== undefined) args.push(`--rate_iops=${pattern.ratePerSecond}`);
  if (logPrefix !== undefined) args.push(`--write_iops_log=${logPrefix}`, "--log_avg_msec=1000");
  return args;
}

/** Runs fio to its end. @throws CowcatcherError IO if it fails or hangs. */
export async function runFio(
  pattern: FioPattern,
  place: FioPlace,
  seconds: number,
  { withSeries = false } = {},
): Promise<FioResult> {
  // fio writes its log, and a state file, into its folder.
  const folder = scratchFolder();
  const logPrefix = withSeries ? "guest" : undefined;
  const child = new Child("fio", "fio", fioArguments(pattern, place, seconds, logPrefix), { cwd: folder });
  const timer = setTimeout(() => child.process.kill("SIGKILL"), seconds * 1000 + FIO_GRACE_MS);
  const { code, stdout } = await child.ended;
  clearTimeout(timer);
  if (code !== 0) throw childError(child, `exit code ${code}`);
  const series = withSeries ? readSeries(`${folder}/guest_iops.1.log`) : [];
  return { ...readResult(stdout), series };
}

function readResult(stdout: string): Omit<FioResult, "series"> {
  // fio may print a note before its document.
  const document = JSON.parse(stdout.slice(stdout.indexOf("{"))) as {
    jobs: { read: FioDirection; write: FioDirection }[];
  };
  const job = document.jobs[0];
  if (job === undefined) return { iops: 0, meanMs: NaN, p99Ms: NaN, longestMs: NaN };
  const { read, write } = job;
  return {
    iops: read.iops + write.iops,
    meanMs: write.lat_ns.mean / 1e6,
    p99Ms: (write.clat_ns.percentile?.["99.000000"] ?? NaN) / 1e6,
    longestMs: write.lat_ns.max / 1e6,
  };
}

/** A line is: end of the second in ms, IOPS, direction (0 read, 1 write), block size. Directions are added up. */
function readSeries(path: string): { seconds: number; iops: number }[] {
  const bySecond = new Map<number, number>();
  for (const line of readFileSync(path, "utf8").trim().split("\n")) {
    const [ms, iops] = line.split(",").map(Number);
    const second = Math.round((ms ?? 0) / 1000);
    bySecond.set(second, (bySecond.get(second) ?? 0) + (iops ?? 0));
  }
  return [...bySecond].map(([seconds, iops]) => ({ seconds, iops })).sort((a, b) => a.seconds - b.seconds);
}
