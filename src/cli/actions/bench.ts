// `bench`: the guest's IOPS and latency with no backup, an unbuffered one and a buffered one, on the user's storage.

import { statSync } from "node:fs";
import {
  Benchmark,
  type BackupFigures,
  type BenchSettings,
  type PhaseResult,
} from "../../bench/benchmark.js";
import { CowcatcherError } from "../../errors.js";
import { formatBytes, formatDuration } from "../../units.js";
import { printJsonDocument, printLine, type CommandContext } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { isNbdUri, isRbdAddress, NULL_TARGET, unsupported, usageError } from "../options/options.js";
import { onInterrupt } from "../signals.js";

/** A terminal sends its signal to the server, too, and the server's end may be noticed before the signal. */
const SIGNAL_GRACE_MS = 100;

export async function runBench(settings: BenchSettings, context: CommandContext): Promise<number> {
  checkTarget(settings);
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
    if (output.json) printJsonDocument(output, benchDocument(settings, results));
    else for (const line of benchLines(settings, results)) printLine(output, line);
    return EXIT.done;
  } catch (error) {
    await new Promise((resolve) => setTimeout(resolve, SIGNAL_GRACE_MS));
    throw context.interruptedBy === undefined ? error : interrupted(context.interruptedBy);
  } finally {
    removeHandlers();
  }
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
function phaseDocument({ name, guest, backup }: PhaseResult, base: PhaseResult | undefined): object {
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
  };
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
  return [headline(settings), "", ...alignColumns([HEADING, ...rows]), ...notes(results)];
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
