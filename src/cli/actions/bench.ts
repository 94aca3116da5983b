// `bench`: the guest's IOPS and latency with no backup, an unbuffered one and a buffered one, on the user's storage.

import { accessSync, constants, statSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import {
  Benchmark,
  type BackupFigures,
  type BenchSettings,
  type PhaseResult,
} from "../../bench/benchmark.js";
import { lineChart } from "../../bench/line-chart.js";
import { ratesOf, type TimelineFigures } from "../../bench/timeline.js";
import { CowcatcherError, ioError } from "../../errors.js";
import { hasColours } from "../output/colour.js";
import { formatBytes, formatDuration } from "../../units.js";
import { printJsonDocument, printLine, type CommandContext, type TextOutput } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { timelinePictures } from "../output/timeline-picture.js";
import type { BenchCommandSettings } from "../options/bench-options.js";
import { isNbdUri, isRbdAddress, NULL_TARGET, unsupported, usageError } from "../options/options.js";
import { onInterrupt } from "../signals.js";

/** A terminal sends its signal to the server, too, and the server's end may be noticed before the signal. */
const SIGNAL_GRACE_MS = 100;
const DEFAULT_COLUMNS = 80;
/** Of a line in a plot of 750 pixels. */
const PLOT_POINTS = 200;
const MS = 1000;

export async function runBench(settings: BenchCommandSettings, context: CommandContext): Promise<number> {
  checkTarget(settings);
  if (settings.plot !== undefined) checkPlot(settings.plot);
  const { output } = context;
  const showsSteps = !output.quiet && (output.progress ?? output.stderr.isTTY ?? false);
  const benchmark = new Benchmark(settings, (step) => {
    if (showsSteps) output.stderr.write(`${step}\n`);
  });
  const removeHandlers = onInterrupt(context, {
    onFirst: (signal) => benchmark.cancel(interrupted(signal)),
    onSecond: () => benchmark.abortSync(),
  });
  try {
    const results = await benchmark.run();
    if (settings.plot !== undefined) writePlot(settings.plot, results);
    if (output.json) printJsonDocument(output, benchDocument(settings, results));
    else
      for (const line of [...benchLines(settings, results), ...pictures(results, output.stdout)])
        printLine(output, line);
    return EXIT.done;
  } catch (error) {
    await new Promise((resolve) => setTimeout(resolve, SIGNAL_GRACE_MS));
    throw context.interruptedBy === undefined ? error : interrupted(context.interruptedBy);
  } finally {
    removeHandlers();
  }
}

/** Said now rather than after minutes. @throws CowcatcherError */
function checkPlot(path: string): void {
  const stats = statSync(path, { throwIfNoEntry: false });
  if (stats !== undefined && !stats.isFile()) {
    throw new CowcatcherError({
      code: "EXISTS",
      object: path,
      problem: "is there, and no file",
      hint: "choose another name",
    });
  }
  try {
    accessSync(stats === undefined ? dirname(path) : path, constants.W_OK);
  } catch (error) {
    throw ioError("write the plot", path, error);
  }
}

/** @throws CowcatcherError IO, NO_SPACE */
function writePlot(path: string, results: readonly PhaseResult[]): void {
  const series = results.map(({ name, timeline }) => ({
    name,
    points: ratesOf(timeline, PLOT_POINTS).map((y, part) => ({
      x: (((part + 0.5) / PLOT_POINTS) * timeline.lengthMs) / MS,
      y,
    })),
    marks: [timeline.t0Ms, timeline.endMs].flatMap((ms) => (ms === undefined ? [] : ms / MS)),
  }));
  const title = "A guest's writes before, during and after a backup (dashed: T0, the backup's end)";
  try {
    writeFileSync(path, `${lineChart(title, "seconds", "writes a second", series)}\n`);
  } catch (error) {
    throw ioError("write the plot", path, error);
  }
}

/** For people who look at it, in a terminal that has room. */
function pictures(results: readonly PhaseResult[], stdout: TextOutput): string[] {
  if (stdout.isTTY !== true) return [];
  const isColoured = hasColours(stdout, process.env);
  return ["", ...timelinePictures(results, { columns: stdout.columns || DEFAULT_COLUMNS, isColoured })];
}

function interrupted(signal: string): CowcatcherError {
  return new CowcatcherError({
    code: "CANCELLED",
    object: "bench",
    problem: `interrupted by ${signal}`,
    hint: "the test disk and the backups were removed",
  });
}

/** What is there is overwritten only if it is a device or an export, and only by --force. */
function checkTarget({ target, force }: BenchSettings): void {
  if (target === undefined || target === NULL_TARGET) {
    if (force) throw usageError("--force", "needs a --target that is a device or an export");
    return;
  }
  if (isRbdAddress(target)) {
    throw unsupported(
      target,
      "bench does not write to RBD images",
      "see docs/rbd.md for a benchmark with Ceph",
    );
  }
  if (isNbdUri(target)) {
    if (!force) throw needsForce(target, "is an export, and its content would be lost");
    return;
  }
  const stats = statSync(target, { throwIfNoEntry: false });
  if (stats?.isBlockDevice()) {
    if (!force) throw needsForce(target, "is a device, and its content would be lost");
  } else if (stats !== undefined) {
    throw new CowcatcherError({
      code: "EXISTS",
      object: target,
      problem: "exists already",
      hint: "choose a name that is free",
    });
  } else if (force) {
    throw usageError("--force", "needs a --target that is a device or an export");
  }
}

function needsForce(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "EXISTS", object, problem, hint: "give --force if that is meant" });
}

/** Figures of a phase as `--json` prints them: milliseconds, bytes, seconds. */
function phaseDocument(
  { name, guest, backup, timeline }: PhaseResult,
  base: PhaseResult | undefined,
): object {
  return {
    phase: name,
    writes: guest.writeCount,
    seconds: rounded(guest.seconds, 3),
    iops: rounded(guest.iops, 1),
    iops_ratio: base === undefined ? null : rounded(guest.iops / base.guest.iops, 4),
    latency_ms: {
      average: rounded(guest.averageMs, 3),
      p99: rounded(guest.p99Ms, 3),
      longest: rounded(guest.longestMs, 3),
    },
    backup: backup === undefined ? null : backupDocument(backup),
    timeline: timelineDocument(timeline),
  };
}

function timelineDocument({ slotMs, writes, t0Ms, endMs, lengthMs }: TimelineFigures): object {
  const ms = (value: number | undefined): number | null => (value === undefined ? null : rounded(value, 3));
  return { slot_ms: slotMs, writes, t0_ms: ms(t0Ms), end_ms: ms(endMs), length_ms: ms(lengthMs) };
}

function backupDocument({ bufferBytes, isComplete, endedBeforeGuest, progress }: BackupFigures): object {
  return {
    cow_buffer_size: bufferBytes,
    complete: isComplete,
    ended_before_guest: endedBeforeGuest,
    seconds: rounded(progress.elapsedMs / 1000, 3),
    bytes_done: progress.bytesDone,
    disk_rate: Math.round(rateOf(progress)),
    captures: progress.captureCount,
    captured_bytes: progress.capturedBytes,
    spilled_bytes: progress.spilledBytes,
    guest_waits: progress.guestWaitCount,
    guest_wait_ms_max: rounded(progress.guestWaitMsMax, 3),
  };
}

export function benchDocument(settings: BenchSettings, results: readonly PhaseResult[]): object {
  return {
    dir: settings.dir,
    size: settings.sizeBytes,
    format: settings.format,
    target: settings.target ?? null,
    target_format: settings.targetFormat,
    rate_limit: settings.rateLimitBytes,
    direct: settings.direct,
    block_size: settings.blockBytes,
    iodepth: settings.ioDepth,
    runtime: settings.runtimeMs / 1000,
    phases: results.map((result) => phaseDocument(result, results[0])),
  };
}

const HEADING = ["BACKUP", "IOPS", "RATIO", "AVERAGE", "P99", "LONGEST", "BACKUP TOOK", "RATE"];

export function benchLines(settings: BenchSettings, results: readonly PhaseResult[]): string[] {
  const base = results[0];
  const rows = results.map(({ name, guest, backup }) => [
    backup === undefined || backup.bufferBytes === 0 ? name : `${name}, ${formatBytes(backup.bufferBytes)}`,
    Math.round(guest.iops).toLocaleString("en-US"),
    base === undefined ? "" : (guest.iops / base.guest.iops).toFixed(2),
    formatLatency(guest.averageMs),
    formatLatency(guest.p99Ms),
    formatLatency(guest.longestMs),
    ...backupCells(backup),
  ]);
  return [
    headline(settings),
    "",
    ...alignColumns([HEADING, ...rows]),
    "",
    verdict(results),
    ...notes(results),
  ];
}

/** What it comes to, in a line. */
function verdict([base, unbuffered, buffered]: readonly PhaseResult[]): string {
  const kept = (phase: PhaseResult | undefined): string =>
    base === undefined || phase === undefined || !Number.isFinite(phase.guest.iops / base.guest.iops)
      ? "-"
      : `${Math.round((phase.guest.iops / base.guest.iops) * 100)} %`;
  return `Of its writes the guest kept ${kept(buffered)} with the buffered backup, ${kept(unbuffered)} with the unbuffered one.`;
}

function headline(settings: BenchSettings): string {
  const { sizeBytes, format, dir, target, rateLimitBytes, direct, blockBytes, ioDepth, runtimeMs } = settings;
  const limit = rateLimitBytes === 0 ? "" : ` at ${formatBytes(rateLimitBytes)}/s`;
  return (
    `${formatBytes(sizeBytes)} ${format} in ${dir}${direct ? ", O_DIRECT" : ""}, backup to ${target ?? "the same folder"}${limit}; ` +
    `random writes of ${formatBytes(blockBytes)}, ${ioDepth} at a time, ${formatDuration(runtimeMs)}`
  );
}

function backupCells(backup: BackupFigures | undefined): string[] {
  if (backup === undefined) return ["", ""];
  const { isComplete, progress } = backup;
  const time = formatDuration(progress.elapsedMs);
  return [isComplete ? time : `more than ${time}`, `${formatBytes(rateOf(progress))}/s`];
}

function notes(results: readonly PhaseResult[]): string[] {
  const early = results.filter(({ backup }) => backup?.endedBeforeGuest === true);
  if (early.length === 0) return [];
  const names = early.map(({ name }) => name).join(" and the ");
  return [
    "",
    `The ${names} backup ended before the guest did, which felt it for a part of its time only: give a larger`,
    "--size, a smaller --rate-limit or a shorter --runtime.",
  ];
}

function rateOf({ bytesDone, elapsedMs }: { bytesDone: number; elapsedMs: number }): number {
  return elapsedMs > 0 ? (bytesDone * 1000) / elapsedMs : 0;
}

function formatLatency(ms: number): string {
  if (!Number.isFinite(ms)) return "-";
  return ms < 10 ? `${ms.toFixed(2)} ms` : ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

/** The first column is text, the others are figures. */
function alignColumns(rows: readonly string[][]): string[] {
  const widths = HEADING.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)));
  return rows.map((row) =>
    row
      .map((cell, column) => {
        const width = widths[column] ?? 0;
        return column === 0 ? cell.padEnd(width) : cell.padStart(width);
      })
      .join("  ")
      .trimEnd(),
  );
}

/** NaN, of a phase without a single reply, becomes null in JSON. */
function rounded(value: number, digits: number): number {
  return Math.round(value * 10 ** digits) / 10 ** digits;
}
