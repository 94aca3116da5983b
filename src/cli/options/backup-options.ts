// The options of `backup` and `restore`, from commander's loose values to typed settings. Every combination that
// cannot mean anything is a usage error here, before a file or a socket is touched.
import { Option, type Command } from "commander";
import { JOB_DEFAULTS, OFFLINE_WORKER_COUNT } from "../../backup/options.js";
import { ON_BUFFER_FULL, ON_CBW_ERROR, ON_IO_ERROR } from "../../cow/policies.js";
import type { ImageFormat } from "../../block/format.js";
import { DEFAULT_COMPRESSION_TYPE, parseCompression } from "../../image/qcow2/format/compression.js";
import { absoluteName } from "../../file-names.js";
import type { FreezeRequest } from "../../qemu/t0-gate.js";
import { MiB, formatBytes } from "../../units.js";
import { checkCheckpointFlags, refuseCheckpointFlags } from "./checkpoint-flags.js";
import type { JobSettings, LiveDiskSettings } from "./job-settings.js";
import { checkBitmapFlags } from "./bitmap-flags.js";
import {
  addQemuOptions,
  cleanupSettings,
  type QemuBackupSettings,
  type QemuCleanupSettings,
  qemuSettings,
  refuseQemuFlags,
} from "./qemu-options.js";
import { addLibvirtOptions, type LibvirtBackupSettings, libvirtSettings } from "./libvirt-options.js";
import { checkBufferFlags, checkSnapshotFlags, freezeRequest, refuseLiveFlags } from "./live-flags.js";
import {
  NULL_TARGET,
  absoluteImage,
  choiceOption,
  countOption,
  durationOption,
  formatOption,
  isRbdAddress,
  listWords,
  bufferSizeOption,
  parseImage,
  parseText,
  sizeOption,
  pathOption,
  refuseStdio,
  repeatedPath,
  STDIO,
  textOption,
  unsupported,
  usageError,
} from "./options.js";
import type { BackupFlags, CopyFlags } from "./backup-flags.js";
import { standardInput } from "./standard-input.js";
import { targetFormatOf } from "./target-format.js";

export interface OfflineBackupSettings {
  mode: "offline";
  source: string;
  /** Undefined: probe. */
  sourceFormat: ImageFormat | undefined;
  /** Id or name of an internal snapshot of the source. */
  snapshot?: string | undefined;
  job: JobSettings;
}

export interface LiveBackupSettings {
  mode: "live";
  /** Path of the control socket. */
  control: string;
  guestAgent: FreezeRequest | undefined;
  /** At least one; paths are absolute, as the server's folder may be another. */
  disks: LiveDiskSettings[];
}

export type BackupSettings =
  | OfflineBackupSettings
  | LiveBackupSettings
  | QemuBackupSettings
  | LibvirtBackupSettings
  | QemuCleanupSettings;

/** `restore BACKUP TARGET`: an offline copy whose source is the backup. */
export type RestoreSettings = OfflineBackupSettings;

/** Values as commander leaves them; those of sizes and durations are in bytes and milliseconds. */
const WORKER_BOUNDS = { min: 1, max: 64 };
const RETRY_BOUNDS = { min: 0, max: 1000 };
const SYNC_MODES = ["full", "top", "incremental", "none"] as const;
const BITMAP_MODES = ["on-success", "never", "always"];
const MIN_CLUSTER_BYTES = 512;
const MAX_CLUSTER_BYTES = 2 * MiB;

export function addBackupOptions(command: Command): Command {
  const parseOptions = command.parseOptions.bind(command);
  command.parseOptions = (args) => parseOptions(separateCompress(args));
  command
    .addOption(
      pathOption("--control <SOCK>", "control socket of the `serve` that has the disk open: a live backup"),
    )
    .option(
      "--disk <NAME>",
      "disk of a live backup, once for each TARGET (the server's only disk)",
      collectDisks,
    );
  command.addOption(
    pathOption(
      "--freeze <SOCK>",
      "live: have the QEMU guest agent at this socket freeze the guest for T0; with --libvirt also `libvirt`: through its channel",
    ),
  );
  command.addOption(
    pathOption(
      "--t0-gate <SOCK>",
      "with --freeze: ask at this socket while the guest is frozen; T0 is when it says `go`",
    ),
  );
  addQemuOptions(command);
  addLibvirtOptions(command);
  addFormatOptions(command)
    .addOption(compressOption())
    .addOption(syncOption())
    .addOption(bitmapOption())
    .addOption(
      choiceOption(
        "--bitmap-mode <MODE>",
        "what becomes of the bitmap: nothing (never); QEMU's other modes are refused by name",
        BITMAP_MODES,
      ),
    )
    .addOption(
      textOption(
        "--snapshot <NAME>",
        "internal snapshot of SOURCE, by id or name: the disk as of it (offline only)",
      ),
    )
    .option("--dry-run", "write nothing: say how large the target would be, as `qemu-img measure` does")
    .addOption(
      repeatedPath("-b, --backing-file <FILE>", "backing file of the qcow2 target, once for each TARGET"),
    )
    .addOption(formatOption("-B, --backing-format <FMT>", "format of the backing file: raw or qcow2"));
  addCheckpointOptions(command);
  addBufferOptions(command);
  return addCopyOptions(command);
}

export function addRestoreOptions(command: Command): Command {
  return addCopyOptions(addFormatOptions(command));
}

function addCheckpointOptions(command: Command): void {
  command
    .addOption(
      textOption("--checkpoint <NAME>", "live: when the backup is good, remember its start under NAME"),
    )
    .addOption(
      textOption(
        "--since <NAME>",
        "live: copy what has changed since checkpoint NAME, into an overlay (-b, -B) or a raw TARGET of that state",
      ),
    )
    .option("--since-or-full", "with --since: copy all where the checkpoint cannot be used");
}

function addFormatOptions(command: Command): Command {
  return command
    .addOption(formatOption("-f, --source-format <FMT>", "raw or qcow2 (probed)"))
    .addOption(
      formatOption(
        "-O, --target-format <FMT>",
        "raw or qcow2 (raw for a device, an NBD URI and -; else by TARGET's extension, else the source's format)",
      ),
    );
}

function addBufferOptions(command: Command): void {
  const buffer = formatBytes(JOB_DEFAULTS.cowBufferSizeBytes);
  command
    .addOption(
      bufferSizeOption(
        "--cow-buffer-size <SIZE>",
        `copy-before-write buffer (the server's default, else ${buffer}; 0: none, the guest waits for the target)`,
      ),
    )
    .addOption(
      choiceOption("--on-buffer-full <ACTION>", `${listWords(ON_BUFFER_FULL)} (spill)`, ON_BUFFER_FULL),
    )
    .addOption(
      pathOption(
        "--spill-dir <DIR>",
        "folder of the spill file (the target's if local, else the temporary one)",
      ),
    )
    .addOption(sizeOption("--spill-limit <SIZE>", "largest size of the spill file (the source's size)"))
    .addOption(
      durationOption(
        "--guest-timeout <SECONDS>",
        "longest wait of one guest write, then the backup fails (45)",
      ),
    )
    .addOption(
      choiceOption("--on-cbw-error <ACTION>", `${listWords(ON_CBW_ERROR)} (break-snapshot)`, ON_CBW_ERROR),
    );
}

function addCopyOptions(command: Command): Command {
  const onError = `${listWords(ON_IO_ERROR)} (report)`;
  return command
    .addOption(
      countOption(
        "-w, --workers <N>",
        `workers (live ${JOB_DEFAULTS.workerCount}, offline ${OFFLINE_WORKER_COUNT})`,
        WORKER_BOUNDS,
      ),
    )
    .addOption(sizeOption("--cluster-size <SIZE>", "of a new qcow2 target (64K)"))
    .addOption(
      sizeOption(
        "--rate-limit <SIZE>",
        "bytes a second to the target, of each disk where there are several (none)",
      ),
    )
    .addOption(choiceOption("--on-source-error <ACTION>", onError, ON_IO_ERROR))
    .addOption(choiceOption("--on-target-error <ACTION>", onError, ON_IO_ERROR))
    .addOption(
      countOption(
        "--target-retries <N>",
        `retries of a transient target error, with back-off (${JOB_DEFAULTS.targetRetries})`,
        RETRY_BOUNDS,
      ),
    )
    .addOption(
      textOption("--target-snapshot <NAME>", "of an rbd: TARGET, made when all is written and flushed"),
    )
    .option("--direct", "O_DIRECT on source and target")
    .option("--verify", "read the target back and compare it with what was read")
    .option("--force", "replace an existing TARGET");
}

function collectDisks(value: string, previous: string[] | undefined): string[] {
  return [...(previous ?? []), parseText(value, "--disk")];
}

/** Those of other tools as well: to refuse them by name is better than to look for a file. */
const COMPRESS_METHOD =
  /^(?:zlib|zstd|gzip|gz|deflate|lzo|lz4|lzma|xz|bzip2|brotli|snappy|none|\d{1,2})(?::.*)?$/;

function compressOption(): Option {
  return new Option(
    "-c, --compress [METHOD]",
    "compressed clusters in a qcow2 target: zlib or zstd, with a level if wanted, such as zlib:9 (zstd:3)",
  )
    .preset(DEFAULT_COMPRESSION_TYPE)
    .argParser((text) => parseCompression(text, "--compress"));
}

/**
 * Arguments of `backup` in which --compress takes no value but a method: commander would give it whatever follows,
 * such as SOURCE. (A SOURCE of that name is written ./zstd.)
 */
function separateCompress(args: readonly string[]): string[] {
  const end = args.indexOf("--");
  return args.flatMap((arg, index) => {
    if (end >= 0 && index > end) return [arg];
    // Also at the end of short options that take no value: -qc.
    if (arg !== "--compress" && !/^-[pq]*c$/.test(arg)) return [arg];
    const next = args[index + 1];
    if (next === undefined || COMPRESS_METHOD.test(next)) return [arg];
    const others = arg.startsWith("--") ? "" : arg.slice(1, -1);
    return [...(others === "" ? [] : [`-${others}`]), `--compress=${DEFAULT_COMPRESSION_TYPE}`];
  });
}

function syncOption(): Option {
  return new Option(
    "--sync <MODE>",
    "full; top: without what SOURCE's backing file provides; incremental, with --bitmap; none: see below (full)",
  ).argParser((text) => {
    const mode = SYNC_MODES.find((known) => known === text);
    if (mode === undefined)
      throw usageError("--sync", `'${text}' is not known`, `give ${listWords(SYNC_MODES)}`);
    return mode;
  });
}

function bitmapOption(): Option {
  return new Option(
    "--bitmap <NAME>",
    "incremental: copy what this dirty bitmap of SOURCE calls dirty; needs -b and -B; --qmp, --libvirt: auto, with --repo or none",
  ).argParser((text) => parseText(text, "--bitmap"));
}

/**
 * The settings of `backup ARGUMENTS…`, each of whose option values is parsed already.
 * @throws CowcatcherError USAGE for a combination that cannot mean anything, UNSUPPORTED for a vsock URI.
 */
export function parseBackupSettings(args: readonly string[], flags: BackupFlags): BackupSettings {
  if (flags.cleanup === true) return cleanupSettings(args, flags);
  if (flags.libvirt !== undefined) return parseLibvirt(args, flags, flags.libvirt);
  if (flags.qmp !== undefined) return parseQemu(args, flags, flags.qmp);
  refuseQemuFlags(flags);
  return flags.control === undefined ? parseOffline(args, flags) : parseLive(args, flags, flags.control);
}

/** @throws as parseBackupSettings. */
export function parseRestoreSettings(args: readonly string[], flags: CopyFlags): RestoreSettings {
  return offlineCopy("BACKUP", args, flags);
}

function parseOffline(args: readonly string[], flags: BackupFlags): OfflineBackupSettings {
  if (flags.disk !== undefined) {
    throw usageError(
      "--disk",
      "needs --control",
      "give the control socket of the server that has the disk open",
    );
  }
  if (flags.sync === "none") {
    throw usageError("--sync", "none needs --control", "an image that no one writes is its own snapshot");
  }
  refuseCheckpointFlags(flags);
  checkBitmapFlags(args, flags);
  const settings = { ...offlineCopy("SOURCE", args, flags), snapshot: flags.snapshot };
  refuseLiveFlags(flags);
  return settings;
}

function offlineCopy(
  sourceName: string,
  [source, target, ...rest]: readonly string[],
  flags: BackupFlags,
): OfflineBackupSettings {
  if (source === undefined) throw usageError(sourceName, "is missing", `give ${sourceName} and TARGET`);
  if (target === undefined) throw usageError("TARGET", "is missing", `give ${sourceName} and TARGET`);
  if (rest[0] !== undefined) {
    const method = flags.compress === undefined ? "" : "; -c takes zlib or zstd, with a level if wanted";
    throw usageError(rest[0], "is one argument too many", `give ${sourceName} and TARGET${method}`);
  }
  if (source !== STDIO && absoluteName(source) === absoluteName(target)) {
    throw usageError(target, "is source and target at once", "choose another target");
  }
  const job = jobSettings(target, flags);
  if ((flags.backingFile?.length ?? 0) > 1) {
    throw usageError("--backing-file", "is given twice", "give one");
  }
  return {
    mode: "offline",
    source: source === STDIO ? standardInput(sourceName) : parseImage(source, sourceName),
    sourceFormat: flags.sourceFormat,
    job: {
      ...job,
      workerCount: flags.workers ?? OFFLINE_WORKER_COUNT,
      cowBufferSizeBytes: job.cowBufferSizeBytes ?? JOB_DEFAULTS.cowBufferSizeBytes,
    },
  };
}

function parseLibvirt(targets: readonly string[], flags: BackupFlags, domain: string): LibvirtBackupSettings {
  refuseDryRun(flags, "--libvirt");
  return libvirtSettings(domain, diskSettings(targets, flags, "--libvirt"), flags);
}

function refuseDryRun({ dryRun }: BackupFlags, option: string): void {
  if (dryRun !== true) return;
  throw usageError("--dry-run", `does not go with ${option}`, "give the disk's image as SOURCE");
}

function parseQemu(targets: readonly string[], flags: BackupFlags, qmp: string): QemuBackupSettings {
  refuseDryRun(flags, "--qmp");
  return qemuSettings(qmp, diskSettings(targets, flags, "--qmp"), flags);
}

function parseLive(targets: readonly string[], flags: BackupFlags, control: string): LiveBackupSettings {
  if (flags.bitmap !== undefined || flags.bitmapMode !== undefined || flags.sync === "incremental") {
    throw unsupported("--bitmap", "dirty bitmaps do not go with --control", "leave it out");
  }
  if (flags.sync === "none") checkSnapshotFlags(targets, flags);
  for (const target of targets) checkCheckpointFlags(target, flags);
  return {
    mode: "live",
    control: absoluteName(control),
    guestAgent: freezeRequest(flags),
    disks: diskSettings(targets, flags, "--control"),
  };
}

/** A disk for each target, of whoever has them open: that which `option` names. */
function diskSettings(targets: readonly string[], flags: BackupFlags, option: string): LiveDiskSettings[] {
  const names = flags.disk ?? [];
  if (flags.sourceFormat !== undefined) {
    throw usageError("--source-format", `does not go with ${option}`, "the server has opened the source");
  }
  if (flags.snapshot !== undefined) {
    throw usageError("--snapshot", `does not go with ${option}`, "give the disk's image as SOURCE");
  }
  if (targets.length === 0) throw usageError("TARGET", "is missing", "give one for each --disk");
  if (names.length === 0 && targets.length > 1) {
    throw usageError("--disk", `is missing for ${targets.length} targets`, "give one for each TARGET");
  }
  if (names.length > 0 && names.length !== targets.length) {
    throw usageError(
      "TARGET",
      `${counted(names.length, "disk")} and ${counted(targets.length, "target")}`,
      "give a TARGET for each --disk, in the same order",
    );
  }
  refuseRepeated("--disk", names);
  const paths = targets.map((target) => localPath(target));
  refuseRepeated(
    "TARGET",
    paths.filter((path) => path !== NULL_TARGET),
  );
  const { backingFile } = flags;
  if (backingFile !== undefined && backingFile.length !== targets.length) {
    throw usageError(
      "--backing-file",
      `${counted(backingFile.length, "backing file")} and ${counted(targets.length, "target")}`,
      "give one for each TARGET, in the same order",
    );
  }
  return paths.map((target, index) => ({ disk: names[index], job: jobSettings(target, flags, index) }));
}

function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function refuseRepeated(object: string, values: readonly string[]): void {
  const repeated = values.find((value, index) => values.indexOf(value) !== index);
  if (repeated !== undefined) throw usageError(object, `'${repeated}' is given twice`);
}

function localPath(target: string): string {
  refuseStdio(target, "is this command's standard output, and the server writes the target");
  return target === NULL_TARGET ? target : absoluteImage(parseImage(target, "TARGET"));
}

/** @param index of the target, where there are several. @throws CowcatcherError USAGE */
export function jobSettings(target: string, flags: BackupFlags, index = 0): JobSettings {
  // What is dirty alone can only be told apart in a format that has backing files, or written in place.
  const isOverlay = flags.since !== undefined && flags.backingFile !== undefined;
  // QEMU's own chain begins with a full one.
  const isOfQemu = flags.qmp !== undefined || flags.libvirt !== undefined;
  const isByBitmap = flags.bitmap !== undefined && (!isOfQemu || flags.backingFile !== undefined);
  const isPart = isByBitmap || isOverlay;
  const byBitmap = !isPart || isRbdAddress(target) ? undefined : "qcow2";
  const targetFormat = targetFormatOf(target, flags.targetFormat ?? byBitmap);
  checkTargetSnapshot(target, flags.targetSnapshot);
  checkTargetFlags(targetFormat, flags);
  checkBufferFlags(flags);
  if (flags.verify === true && (target === NULL_TARGET || target === STDIO)) {
    throw usageError("--verify", `${target} cannot be read back`, "leave it out");
  }
  return {
    target: target === NULL_TARGET || target === STDIO ? target : parseImage(target, "TARGET"),
    targetFormat,
    force: flags.force ?? JOB_DEFAULTS.force,
    clusterSizeBytes: flags.clusterSize ?? JOB_DEFAULTS.clusterSizeBytes,
    backingFile: flags.backingFile?.[index],
    backingFormat: flags.backingFormat,
    compression: flags.compress,
    workerCount: flags.workers ?? JOB_DEFAULTS.workerCount,
    cowBufferSizeBytes: flags.cowBufferSize,
    onBufferFull: flags.onBufferFull ?? JOB_DEFAULTS.onBufferFull,
    spillDir: flags.spillDir === undefined ? undefined : absoluteName(flags.spillDir),
    spillLimitBytes: flags.spillLimit,
    guestTimeoutMs: flags.guestTimeout ?? JOB_DEFAULTS.guestTimeoutMs,
    rateLimitBytes: flags.rateLimit ?? JOB_DEFAULTS.rateLimitBytes,
    onCbwError: flags.onCbwError ?? JOB_DEFAULTS.onCbwError,
    onSourceError: flags.onSourceError ?? JOB_DEFAULTS.onSourceError,
    onTargetError: flags.onTargetError ?? JOB_DEFAULTS.onTargetError,
    // Who has ended does not read on.
    targetRetries: target === STDIO ? 0 : (flags.targetRetries ?? JOB_DEFAULTS.targetRetries),
    targetSnapshot: flags.targetSnapshot,
    direct: flags.direct ?? JOB_DEFAULTS.direct,
    verify: flags.verify ?? JOB_DEFAULTS.verify,
    bitmap: flags.bitmap,
    checkpoint: flags.checkpoint,
    since: flags.since,
    sinceOrFull: flags.sinceOrFull,
    sync: flags.sync === "incremental" ? "full" : (flags.sync ?? JOB_DEFAULTS.sync),
    snapshotExport: JOB_DEFAULTS.snapshotExport,
  };
}

/** Names that Ceph takes, and that can be named again behind '@'. */
function checkTargetSnapshot(target: string, snapshot: string | undefined): void {
  if (snapshot === undefined) return;
  if (!isRbdAddress(target)) {
    throw usageError("--target-snapshot", "needs an rbd: TARGET", "leave it out, or write to an RBD image");
  }
  if (/[/@]/.test(snapshot)) throw usageError("--target-snapshot", `'${snapshot}' has a '/' or '@' in it`);
}

function checkTargetFlags(targetFormat: ImageFormat | undefined, flags: BackupFlags): void {
  const { clusterSize, backingFile, backingFormat, compress } = flags;
  if (clusterSize !== undefined) checkClusterSize(clusterSize, "--cluster-size");
  if (backingFormat !== undefined && backingFile === undefined) {
    throw usageError("--backing-format", "needs --backing-file");
  }
  if (backingFile !== undefined && backingFormat === undefined && targetFormat !== "raw") {
    throw usageError("--backing-format", "is missing", "name the backing file's format: raw or qcow2");
  }
  if (targetFormat !== "raw") return;
  const hint = "choose a qcow2 target with -O qcow2";
  if (clusterSize !== undefined) throw usageError("--cluster-size", "a raw target has no clusters", hint);
  if (compress !== undefined) throw usageError("--compress", "a raw target cannot be compressed", hint);
  if (backingFile !== undefined) throw usageError("--backing-file", "a raw target has no backing file", hint);
}

/** @throws CowcatcherError USAGE unless it is a power of two from 512 bytes to 2 MiB (qcow2's own bounds). */
export function checkClusterSize(bytes: number, object: string): void {
  const powerOfTwo = Number.isInteger(Math.log2(bytes));
  if (!powerOfTwo || bytes < MIN_CLUSTER_BYTES || bytes > MAX_CLUSTER_BYTES) {
    throw usageError(object, `${bytes} is not a cluster size`, "give a power of two from 512 to 2M");
  }
}
