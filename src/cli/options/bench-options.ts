// The options of `bench`, from commander's loose values to typed settings.
import { tmpdir } from "node:os";
import type { Command } from "commander";
import type { BenchSettings } from "../../bench/benchmark.js";
import { JOB_DEFAULTS } from "../../backup/options.js";
import type { ImageFormat } from "../../block/format.js";
import { targetFormatOf } from "./target-format.js";
import { absoluteName } from "../../file-names.js";
import { GiB, KiB, MiB, formatBytes } from "../../units.js";
import {
  bufferSizeOption,
  choiceOption,
  countOption,
  durationOption,
  formatOption,
  sizeOption,
  pathOption,
  refuseStdio,
  usageError,
} from "./options.js";

/** With what is the command's own. */
export interface BenchCommandSettings extends BenchSettings {
  /** Where the plot goes; undefined: there is none. */
  plot: string | undefined;
}

export interface BenchFlags {
  dir?: string;
  size?: number;
  format?: ImageFormat;
  target?: string;
  targetFormat?: ImageFormat;
  force?: boolean;
  rateLimit?: number;
  cowBufferSize?: number;
  onBufferFull?: "spill" | "wait";
  blockSize?: number;
  iodepth?: number;
  runtime?: number;
  backupTimeout?: number;
  direct?: boolean;
  plot?: string;
}

// The fio job that this project began with, on a disk small enough to be made in seconds, against a target that is
// slower than the guest and still done within half a minute.
const DEFAULTS = {
  sizeBytes: GiB,
  blockBytes: 32 * KiB,
  ioDepth: 8,
  runtimeMs: 5000,
  rateLimitBytes: 50 * MiB,
  backupTimeoutMs: 120_000,
};
const SECTOR_BYTES = 512;
/** NBD's largest request. */
const MAX_BLOCK_BYTES = 32 * MiB;
const MIN_DISK_BYTES = MiB;
const IO_DEPTH_BOUNDS = { min: 1, max: 1024 };
const MIN_RUNTIME_MS = 100;
const MAX_TIME_MS = 24 * 3600 * 1000;
/** The guest's requests, all of them in memory. */
const MAX_IN_FLIGHT_BYTES = GiB;

export function addBenchOptions(command: Command): Command {
  const buffer = formatBytes(JOB_DEFAULTS.cowBufferSizeBytes);
  return command
    .addOption(pathOption("--dir <DIR>", "folder of the test disk and of the spill (the temporary folder)"))
    .addOption(sizeOption("--size <SIZE>", "of the test disk (1G)"))
    .addOption(formatOption("-f, --format <FMT>", "raw or qcow2, of the test disk (raw)"))
    .option(
      "--target <TARGET>",
      "where the backups go: a new file, null:, or with --force a device or an NBD export (a file beside the disk)",
    )
    .addOption(formatOption("-O, --target-format <FMT>", "raw or qcow2 (by TARGET's extension, else raw)"))
    .option("--force", "overwrite a TARGET that is a device or an export; its content is lost")
    .addOption(sizeOption("--rate-limit <SIZE>", "bytes a second to the target, 0 for no limit (50M)"))
    .addOption(bufferSizeOption("--cow-buffer-size <SIZE>", `of the buffered backup (${buffer})`))
    .addOption(choiceOption("--on-buffer-full <WHAT>", "spill or wait (spill)", ["spill", "wait"]))
    .addOption(sizeOption("--block-size <SIZE>", "of the guest's writes (32K)"))
    .addOption(countOption("--iodepth <N>", "writes that the guest has in flight (8)", IO_DEPTH_BOUNDS))
    .addOption(durationOption("--runtime <TIME>", "of the guest in each phase (5s)"))
    .addOption(durationOption("--backup-timeout <TIME>", "for a backup's rest, after the guest (2m)"))
    .option("--direct", "O_DIRECT on disk and target")
    .addOption(
      pathOption("--plot <FILE>", "SVG picture of the guest's writes before, during and after each backup"),
    );
}

/** @throws CowcatcherError USAGE for what cannot mean anything. */
export function parseBenchSettings(flags: BenchFlags): BenchCommandSettings {
  const blockBytes = flags.blockSize ?? DEFAULTS.blockBytes;
  const ioDepth = flags.iodepth ?? DEFAULTS.ioDepth;
  const sizeBytes = flags.size ?? DEFAULTS.sizeBytes;
  checkSizes(blockBytes, ioDepth, sizeBytes);
  const cowBufferSizeBytes = flags.cowBufferSize ?? JOB_DEFAULTS.cowBufferSizeBytes;
  if (cowBufferSizeBytes === 0) {
    throw usageError("--cow-buffer-size", "0 is no buffer", "the unbuffered backup is measured in any case");
  }
  if (flags.target === "") throw usageError("--target", "is empty", "give a path");
  if (flags.target !== undefined) refuseStdio(flags.target);
  return {
    dir: flags.dir ?? tmpdir(),
    sizeBytes,
    format: flags.format ?? "raw",
    target: flags.target,
    targetFormat: targetFormatOf(flags.target ?? "", flags.targetFormat) ?? "raw",
    force: flags.force ?? false,
    rateLimitBytes: flags.rateLimit ?? DEFAULTS.rateLimitBytes,
    cowBufferSizeBytes,
    onBufferFull: flags.onBufferFull ?? "spill",
    blockBytes,
    ioDepth,
    runtimeMs: time("--runtime", flags.runtime ?? DEFAULTS.runtimeMs, MIN_RUNTIME_MS),
    backupTimeoutMs: time("--backup-timeout", flags.backupTimeout ?? DEFAULTS.backupTimeoutMs, 0),
    direct: flags.direct ?? false,
    plot: flags.plot === undefined ? undefined : absoluteName(flags.plot),
  };
}

function checkSizes(blockBytes: number, ioDepth: number, sizeBytes: number): void {
  if (blockBytes % SECTOR_BYTES !== 0 || blockBytes === 0 || blockBytes > MAX_BLOCK_BYTES) {
    throw usageError("--block-size", `${blockBytes} is not a multiple of 512 up to 32M`);
  }
  if (blockBytes * ioDepth > MAX_IN_FLIGHT_BYTES) {
    throw usageError("--iodepth", `${ioDepth} writes of ${blockBytes} bytes are more than 1G in flight`);
  }
  if (sizeBytes < Math.max(MIN_DISK_BYTES, blockBytes) || sizeBytes % SECTOR_BYTES !== 0) {
    throw usageError(
      "--size",
      `${sizeBytes} is no size for the test disk`,
      "give 1M or more, a multiple of 512, and not less than --block-size",
    );
  }
}

function time(option: string, ms: number, minimumMs: number): number {
  if (ms >= minimumMs && ms <= MAX_TIME_MS) return ms;
  throw usageError(option, `${ms} ms is out of bounds`, `give ${minimumMs}ms to 24h`);
}
