// npm run bench:memory: the server's resident set through minutes of random writes with backups one after another.
// Needs fio.
//
// What is looked for is growth. The set rises and falls with each backup (its workers end with it, its buffer is
// kept), so each backup's peak is one point, and the least-squares line through the peaks of the second half of the
// run says what the next backups would take.
// RSS comes from /proc/PID/statm: with the disk in the page cache the server maps none of it.

import { readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { CowcatcherError } from "../src/errors.js";
import { MiB, parseSize } from "../src/units.js";
import { childError, runMain, say, scratchFolder, sleep, type Child } from "./lib/children.js";
import { startCowcatcher, startServe } from "./lib/cowcatcher.js";
import { makeRawDisk } from "./lib/disks.js";
import { runFio, type FioPattern } from "./lib/fio.js";
import { describeMachine, machineLine, ResultFolder } from "./lib/results.js";
import { formatFigure, markdownTable, median } from "./lib/statistics.js";
import { lineChart } from "../src/bench/line-chart.js";

const HELP = `npm run bench:memory -- [options]
  --minutes N            of random writes (10)
  --size SIZE            of the disk (1G)
  --buffer SIZE          copy-before-write buffer (256M)
  --rate-limit SIZE      of the backups, a second (50M)
  --dir DIR              where disk and target stand (the temporary folder)
  --out DIR              results: memory.md, memory.json, memory.svg (bench/results)`;

const PATTERN: FioPattern = { name: "randwrite 32k qd8", rw: "randwrite", blockSize: "32k", ioDepth: 8 };
const SAMPLE_MS = 1000;
/** Of the series, in the table. */
const PART_COUNT = 10;
/** The aim: the resident set is at most the buffer and that. */
const AIM_BEYOND_BUFFER_BYTES = 150 * MiB;
/** Linux's page size where Node runs; /proc/PID/statm counts in pages. */
const PAGE_BYTES = 4096;

interface Sample {
  seconds: number;
  rssBytes: number;
  /** Backups completed so far. */
  backupCount: number;
}

const { values } = parseArgs({
  options: {
    minutes: { type: "string", default: "10" },
    size: { type: "string", default: "1G" },
    buffer: { type: "string", default: "256M" },
    "rate-limit": { type: "string", default: "50M" },
    dir: { type: "string", default: tmpdir() },
    out: { type: "string", default: "bench/results" },
    help: { type: "boolean", default: false },
  },
});

async function bench(): Promise<number> {
  if (values.help) {
    say(HELP);
    return 0;
  }
  const seconds = Number(values.minutes) * 60;
  if (!(seconds > 0)) {
    throw new CowcatcherError({
      code: "USAGE",
      object: "--minutes",
      problem: `'${values.minutes}' is no time`,
    });
  }
  const results = new ResultFolder(values.out);
  const folder = scratchFolder(values.dir);
  const path = (name: string): string => join(folder, name);
  const disk = path("disk.raw");
  makeRawDisk(disk, parseSize(values.size, "--size"));
  const [socket, control] = [path("nbd.sock"), path("control.sock")];
  const server = await startServe({ image: disk, format: "raw", socket, control });
  const series = await measure(server, { socket, control, folder, seconds });
  await server.stop();
  const machine = await describeMachine();
  const report = reportOf(series);
  results.write("memory.json", { machine, options: values, ...report.figures, series });
  results.write("memory.svg", chart(series));
  const header = `${machineLine(machine)}. Random writes for ${values.minutes} minutes (${PATTERN.name}), disk ${values.size}, buffer ${values.buffer}, backups at ${values["rate-limit"]} a second one after another.`;
  const text = [header, report.table, report.verdict].join("\n\n");
  say(`\n${text}\n\n${results.write("memory.md", `${text}\n`)}`);
  return 0;
}

interface Run {
  socket: string;
  control: string;
  folder: string;
  seconds: number;
}

async function measure(server: Child, { socket, control, folder, seconds }: Run): Promise<Sample[]> {
  const series: Sample[] = [];
  const startMs = performance.now();
  let backupCount = 0;
  const timer = setInterval(() => {
    const rssBytes = residentBytes(server);
    if (rssBytes === undefined) return;
    series.push({ seconds: (performance.now() - startMs) / 1000, rssBytes, backupCount });
    if (series.length % 30 === 0) say(`${series.length} s: ${formatMiB(rssBytes)}, ${backupCount} backups`);
  }, SAMPLE_MS);
  try {
    // A moment of the server alone first, so that the series begins with what it takes without a backup.
    const guest = runFio(PATTERN, socket, seconds);
    let isOver = false;
    const over = guest.finally(() => {
      isOver = true;
    });
    over.catch(() => undefined);
    await sleep(3 * SAMPLE_MS);
    while (!isOver) {
      await backUp(control, join(folder, "backup.raw"), over);
      if (!isOver) backupCount++;
    }
    await over;
    return series;
  } finally {
    clearInterval(timer);
  }
}

/** One backup; ended early when the guest is over. */
async function backUp(control: string, target: string, over: Promise<unknown>): Promise<void> {
  const args = ["backup", "-q", "--force", "--control", control, "--rate-limit", values["rate-limit"]];
  const child = startCowcatcher([...args, "--cow-buffer-size", values.buffer, "-O", "raw", target]);
  let isStopped = false;
  const stop = (): void => {
    isStopped = true;
    child.process.kill("SIGTERM");
  };
  void over.then(stop, stop);
  const { code } = await child.ended;
  if (code !== 0 && !isStopped) throw childError(child, `exit code ${code}`);
}

/** Undefined when it has ended. */
function residentBytes({ process: { pid } }: Child): number | undefined {
  try {
    const pages = Number(readFileSync(`/proc/${pid}/statm`, "utf8").split(" ")[1]);
    return pages * PAGE_BYTES;
  } catch {
    return undefined;
  }
}

function reportOf(series: readonly Sample[]): { figures: object; table: string; verdict: string } {
  const bufferBytes = parseSize(values.buffer, "--buffer");
  const first = series[0]?.rssBytes ?? NaN;
  const maximum = Math.max(...series.map(({ rssBytes }) => rssBytes));
  const beyond = maximum - bufferBytes;
  const growth = growthPerMinute(peaksOf(series.slice(Math.floor(series.length / 2))));
  const backupCount = series.at(-1)?.backupCount ?? 0;
  const isMet = beyond <= AIM_BEYOND_BUFFER_BYTES;
  return {
    figures: {
      backup_count: backupCount,
      first_bytes: first,
      maximum_bytes: maximum,
      maximum_less_buffer_bytes: beyond,
      growth_bytes_per_minute: Math.round(growth),
    },
    table: partsTable(series),
    verdict:
      `${backupCount} backups. At the start ${formatMiB(first)}, at most ${formatMiB(maximum)}: the buffer and ` +
      `${formatMiB(beyond)} (aim: at most ${formatMiB(AIM_BEYOND_BUFFER_BYTES)}, ${isMet ? "met" : "not met"}). ` +
      `Growth of the backups' peaks in the second half: ${formatFigure(growth / MiB)} MiB a minute.`,
  };
}

/** The highest sample of each backup, without the first and the last one, which the series cuts short. */
function peaksOf(series: readonly Sample[]): Sample[] {
  const peaks = new Map<number, Sample>();
  for (const sample of series) {
    const peak = peaks.get(sample.backupCount);
    if (peak === undefined || sample.rssBytes > peak.rssBytes) peaks.set(sample.backupCount, sample);
  }
  return [...peaks.values()].slice(1, -1);
}

/** The slope of the least-squares line in bytes; NaN for fewer than two samples. */
function growthPerMinute(series: readonly Sample[]): number {
  const count = series.length;
  const mean = (pick: (sample: Sample) => number): number =>
    series.reduce((sum, sample) => sum + pick(sample), 0) / count;
  const [meanX, meanY] = [mean(({ seconds }) => seconds), mean(({ rssBytes }) => rssBytes)];
  const covariance = mean(({ seconds, rssBytes }) => (seconds - meanX) * (rssBytes - meanY));
  const variance = mean(({ seconds }) => (seconds - meanX) ** 2);
  return variance === 0 ? NaN : (covariance / variance) * 60;
}

function partsTable(series: readonly Sample[]): string {
  const size = Math.max(1, Math.ceil(series.length / PART_COUNT));
  const rows: string[][] = [];
  for (let from = 0; from < series.length; from += size) {
    const part = series.slice(from, from + size);
    const megabytes = part.map(({ rssBytes }) => rssBytes / MiB);
    const until = part.at(-1);
    rows.push([
      `${Math.round(part[0]?.seconds ?? 0)} to ${Math.round(until?.seconds ?? 0)}`,
      formatFigure(Math.min(...megabytes)),
      formatFigure(median(megabytes)),
      formatFigure(Math.max(...megabytes)),
      String(until?.backupCount ?? 0),
    ]);
  }
  return markdownTable(["seconds", "least MiB", "median MiB", "most MiB", "backups so far"], rows);
}

function chart(series: readonly Sample[]): string {
  const points = series.map(({ seconds, rssBytes }) => ({ x: seconds, y: rssBytes / MiB }));
  const marks = series.filter(
    ({ backupCount }, index) => index > 0 && backupCount > (series[index - 1]?.backupCount ?? 0),
  );
  const line = { name: "cowcatcher serve", points, marks: marks.map(({ seconds }) => seconds) };
  return lineChart("Resident set of the server, backups one after another (dashed: ends)", "seconds", "MiB", [
    line,
  ]);
}

function formatMiB(bytes: number): string {
  return `${formatFigure(bytes / MiB)} MiB`;
}

await runMain("bench:memory", bench);
