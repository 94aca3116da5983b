// drive-backup's arguments: the schema, the way into a BackupRequest (server) and the way out of one (client).
// Names and meanings are those of QEMU's DriveBackup and BackupCommon (qapi/block-core.json); `buffer-size`,
// `on-buffer-full`, `spill-dir`, `spill-limit`, `cbw-timeout-ms` and what starts with x- are cowcatcher's.
// QEMU's arguments that this version cannot honour are known here, so that each is refused by its name.

import { absoluteName } from "../file-names.js";
import { NULL_TARGET_PATH } from "../target/null.js";
import { messageOf } from "../errors.js";
import type { BackupRequest, DiskInfo } from "../backup/host.js";
import { BITMAP_MODES, JOB_DEFAULTS, SYNC_MODES } from "../backup/options.js";
import { ON_BUFFER_FULL, ON_CBW_ERROR } from "../cow/policies.js";
import type { BitmapUse, JobOptions, RepositoryPlace } from "../backup/options.js";
import type { OnIoError } from "../cow/policies.js";
import { IMAGE_FORMATS, isImageFormat } from "../block/format.js";
import type { ImageFormat } from "../block/format.js";
import {
  COMPRESSION_TYPES,
  compressionOf,
  DEFAULT_COMPRESSION_TYPE,
} from "../image/qcow2/format/compression.js";
import type { Compression } from "../image/qcow2/format/compression.js";
import { isNbdUri } from "../nbd/wire/uri.js";
import { isRbdAddress } from "../rbd/address.js";
import { KiB } from "../units.js";
import {
  argumentsFromRepository,
  REPOSITORY_ARGUMENTS,
  repositoryFrom,
  repositoryTargetName,
} from "./repository-arguments.js";
import type { FreezeRequest } from "../qemu/t0-gate.js";
import type { BitmapPlan } from "./bitmap-plan.js";
import { genericError, notSupported } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import {
  boolean,
  fileName,
  integer,
  object,
  oneOf,
  optional,
  positiveUpTo,
  size,
  string,
  upTo,
} from "../qmp/schema.js";
import type { Arguments } from "../qmp/schema.js";

const ON_ERROR = ["report", "ignore", "enospc", "stop", "auto"] as const;

/** The smallest unit of copy-before-write that there ever is, so a smaller minimum is always kept. */
const SMALLEST_COW_CLUSTER_BYTES = 64 * KiB;
/** More would only take memory: the target is saturated long before. */
const WORKER_COUNT_MAX = 64;
const RETRY_COUNT_MAX = 1000;
/** A timer's longest time. */
const TIMEOUT_MS_MAX = 2 ** 31 - 1;

export const BACKUP_COMMON = {
  "job-id": optional(string),
  device: string,
  sync: oneOf(["top", "full", "none", "incremental", "bitmap"]),
  speed: optional(integer),
  bitmap: optional(string),
  "bitmap-mode": optional(oneOf(BITMAP_MODES)),
  compress: optional(boolean),
  "on-source-error": optional(oneOf(ON_ERROR)),
  "on-target-error": optional(oneOf(ON_ERROR)),
  "on-cbw-error": optional(oneOf(ON_CBW_ERROR)),
  "auto-finalize": optional(boolean),
  "auto-dismiss": optional(boolean),
  "filter-node-name": optional(string),
  "discard-source": optional(boolean),
  "x-perf": optional(
    object({
      "use-copy-range": optional(boolean),
      "max-workers": optional(integer),
      "max-chunk": optional(integer),
      "min-cluster-size": optional(size),
    }),
  ),
  "buffer-size": optional(size),
  "on-buffer-full": optional(oneOf(ON_BUFFER_FULL)),
  "spill-dir": optional(fileName),
  "spill-limit": optional(size),
  // QEMU's cbw-timeout of 0 is no limit; here every wait of a guest has one.
  "cbw-timeout-ms": optional(positiveUpTo(TIMEOUT_MS_MAX)),
  "x-force": optional(boolean),
  "x-direct": optional(boolean),
  "x-cluster-size": optional(size),
  "x-verify": optional(boolean),
  "x-target-retries": optional(upTo(RETRY_COUNT_MAX)),
  "x-target-snapshot": optional(string),
  "x-backing-file": optional(fileName),
  "x-backing-format": optional(oneOf(IMAGE_FORMATS)),
  "x-checkpoint": optional(string),
  "x-since": optional(string),
  "x-since-or-full": optional(boolean),
  "x-guest-agent": optional(fileName),
  "x-t0-gate": optional(fileName),
  "x-compression-type": optional(oneOf(COMPRESSION_TYPES)),
  "x-compression-level": optional(integer),
};

export const DRIVE_BACKUP = {
  ...BACKUP_COMMON,
  ...REPOSITORY_ARGUMENTS,
  target: fileName,
  format: optional(string),
  mode: optional(oneOf(["existing", "absolute-paths"])),
};

export type DriveBackupArguments = Arguments<typeof DRIVE_BACKUP>;

export interface BackupStart {
  request: BackupRequest;
  autoDismiss: boolean;
  /** Who freezes the guest for T0. */
  guestAgent: FreezeRequest | undefined;
}

/**
 * @param bitmaps who gives the job its dirty bitmap
 * @throws QmpError GenericError for a disk or job id that does not fit, and for what is not supported.
 */
export function backupFromArguments(
  args: DriveBackupArguments,
  disks: readonly DiskInfo[],
  defaults: Partial<JobOptions>,
  tool = "cowcatcher",
  bitmaps?: Pick<BitmapPlan, "use">,
): BackupStart {
  refuseUnsupported(args);
  const disk = diskOf(args.device, disks);
  const bitmapUse = bitmapFrom(args, disk, bitmaps);
  const id = args["job-id"] ?? disk.name;
  // QEMU's rule for ids (util/id.c): a letter, then letters, digits, '-', '.' and '_'.
  if (!/^[A-Za-z][A-Za-z0-9._-]*$/.test(id)) throw genericError(`Invalid job ID '${id}'`);
  return {
    request: {
      id,
      disk: disk.name,
      options: {
        ...optionsFrom(args, disk, defaults, repositoryFrom(args, disk.name, tool)),
        bitmapUse,
      },
    },
    autoDismiss: args["auto-dismiss"] ?? true,
    guestAgent: freezeFrom(args),
  };
}

function freezeFrom(args: DriveBackupArguments): FreezeRequest | undefined {
  const { "x-guest-agent": agent, "x-t0-gate": t0Gate } = args;
  if (agent !== undefined) {
    return { agent: absoluteName(agent), t0Gate: t0Gate === undefined ? undefined : absoluteName(t0Gate) };
  }
  if (t0Gate !== undefined) throw genericError("Parameter 'x-t0-gate' needs 'x-guest-agent'");
  return undefined;
}

/** @throws QmpError GenericError where there is none. */
export function diskOf(device: string, disks: readonly DiskInfo[]): DiskInfo {
  const disk = disks.find(({ name }) => name === device);
  if (disk === undefined) throw genericError(`Cannot find device='${device}' nor node-name='${device}'`);
  return disk;
}

export function isByBitmap({ sync }: { sync: string }): boolean {
  return sync === "incremental" || sync === "bitmap";
}

/** The rules of QEMU's do_backup_common (blockdev.c), in its words; the others are the plan's. */
function bitmapFrom(
  args: DriveBackupArguments,
  disk: DiskInfo,
  bitmaps?: Pick<BitmapPlan, "use">,
): BitmapUse | undefined {
  const { sync, bitmap, "bitmap-mode": mode } = args;
  if (isByBitmap(args) && bitmap === undefined) {
    throw genericError(`must provide a valid bitmap name for '${sync}' sync mode`);
  }
  if (sync === "incremental" && mode !== undefined && mode !== "on-success") {
    throw genericError(`Bitmap sync mode must be 'on-success' when using sync mode 'incremental'`);
  }
  if (bitmap === undefined) {
    if (mode !== undefined) throw genericError("Cannot specify bitmap sync mode without a bitmap");
    return undefined;
  }
  const use = bitmaps?.use(disk, { name: bitmap, mode, sync });
  if (args["x-since"] !== undefined || args["x-checkpoint"] !== undefined) {
    throw genericError("'x-since' and 'x-checkpoint' do not go with 'bitmap'");
  }
  if (args["x-verify"] === true && use?.isBasis === true) {
    throw notSupported(`'x-verify' with sync mode '${sync}'`);
  }
  return use;
}

function optionsFrom(
  args: DriveBackupArguments,
  disk: DiskInfo,
  defaults: Partial<JobOptions>,
  repository: RepositoryPlace | undefined,
): JobOptions {
  const given: { [K in keyof JobOptions]?: JobOptions[K] | undefined } = {
    workerCount: args["x-perf"]?.["max-workers"],
    rateLimitBytes: args.speed,
    cowBufferSizeBytes: args["buffer-size"],
    onBufferFull: args["on-buffer-full"],
    spillDir: args["spill-dir"] === undefined ? undefined : absoluteName(args["spill-dir"]),
    spillLimitBytes: args["spill-limit"],
    guestTimeoutMs: args["cbw-timeout-ms"],
    onCbwError: args["on-cbw-error"],
    onSourceError: ioPolicy(args["on-source-error"]),
    onTargetError: ioPolicy(args["on-target-error"]),
    targetRetries: args["x-target-retries"],
    targetSnapshot: args["x-target-snapshot"],
    force: args["x-force"],
    direct: args["x-direct"],
    verify: args["x-verify"],
    clusterSizeBytes: args["x-cluster-size"],
    backingFile: args["x-backing-file"],
    backingFormat: args["x-backing-format"],
    compression: compressionFrom(args),
    checkpoint: args["x-checkpoint"],
    since: args["x-since"],
    sinceOrFull: args["x-since-or-full"],
    autoFinalize: args["auto-finalize"],
    sync: isByBitmap(args) ? "full" : SYNC_MODES.find((mode) => mode === args.sync),
  };
  const present = Object.entries(given).filter(([, value]) => value !== undefined);
  refuseIncremental(args, disk);
  return {
    ...JOB_DEFAULTS,
    ...defaults,
    ...(Object.fromEntries(present) as Partial<JobOptions>),
    repository,
    target: repository === undefined ? targetName(args.target) : repositoryTargetName(repository),
    targetFormat: repository === undefined ? formatFrom(args, disk) : "raw",
  };
}

function formatFrom(args: DriveBackupArguments, disk: DiskInfo): ImageFormat {
  const isRaw = isNbdUri(args.target) || isRbdAddress(args.target);
  // QEMU looks for a driver where there is an image, and for one that makes images where there is none.
  if (args.mode === "existing" && args.format !== undefined && !isImageFormat(args.format)) {
    throw genericError(`Unknown driver '${args.format}'`);
  }
  return targetFormat(args.format ?? (isRaw ? "raw" : undefined), disk);
}

/** What an incremental backup needs, and what it cannot do: without a basis it would be a heap of clusters. */
function refuseIncremental(args: DriveBackupArguments, disk: DiskInfo): void {
  const { "x-since": since, "x-since-or-full": orFull, "x-checkpoint": checkpoint } = args;
  for (const name of [since, checkpoint]) {
    if (name !== undefined && !/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/.test(name)) {
      throw genericError(`Invalid checkpoint name '${name}'`);
    }
  }
  if (since === undefined) {
    if (orFull === true) throw genericError("'x-since-or-full' needs 'x-since'");
    return;
  }
  if (args.sync !== "full") throw notSupported(`'x-since' with sync mode '${args.sync}'`);
  if (args["x-verify"] === true) throw notSupported("'x-since' with 'x-verify'");
  const format = targetFormat(args.format ?? (isNbdUri(args.target) ? "raw" : undefined), disk);
  if (format === "qcow2" && args["x-backing-file"] === undefined) {
    throw genericError("'x-since' needs 'x-backing-file' for a qcow2 target");
  }
  if (format === "raw" && args["x-backing-file"] !== undefined) {
    throw genericError("A raw target has no backing file");
  }
}

function targetName(target: string): string {
  if (target === "") throw genericError("The 'file' block driver requires a file name");
  if (target === NULL_TARGET_PATH || isNbdUri(target) || isRbdAddress(target)) return target;
  // A path, as in QEMU: never this server's standard output. It is said of the folder that the server was started in.
  return absoluteName(target);
}

function targetFormat(format: string | undefined, disk: DiskInfo): ImageFormat {
  if (format === undefined) return disk.format;
  if (!isImageFormat(format)) throw genericError(`Unknown file format '${format}'`);
  return format;
}

/** `compress` alone is the command line's -c; a type or a level without it would be a mistake to pass over. */
function compressionFrom(args: DriveBackupArguments): Compression | undefined {
  const { compress, "x-compression-type": type, "x-compression-level": level } = args;
  if (compress !== true) {
    if (type === undefined && level === undefined) return undefined;
    throw genericError("'x-compression-type' and 'x-compression-level' need 'compress' true");
  }
  try {
    return compressionOf(type ?? DEFAULT_COMPRESSION_TYPE, level, "x-compression-level");
  } catch (error) {
    throw genericError(`Parameter ${messageOf(error)}`);
  }
}

/** For a job, `auto` is QEMU's other name of `enospc`. */
function ioPolicy(policy: (typeof ON_ERROR)[number] | undefined): OnIoError | undefined {
  return policy === "auto" ? "enospc" : policy;
}

function refuseUnsupported(args: DriveBackupArguments): void {
  if (args["discard-source"] === true) throw notSupported("'discard-source'");
  // An RBD image may exist or not: x-force says that it is to be written.
  if (args.mode === "existing" && isRbdAddress(args.target)) throw notSupported("Mode 'existing'");
  if (args["x-target-snapshot"] !== undefined && !isRbdAddress(args.target)) {
    throw notSupported("'x-target-snapshot' of a target that is no RBD image");
  }
  if (args.speed !== undefined && args.speed < 0) {
    throw genericError("Parameter 'speed' expects a non-negative value");
  }
  refusePerformance(args);
}

function refusePerformance(args: DriveBackupArguments): void {
  const perf = args["x-perf"] ?? {};
  if (perf["max-chunk"] !== undefined) throw notSupported("Parameter 'x-perf.max-chunk'");
  const workerCount = perf["max-workers"] ?? 1;
  if (workerCount < 1 || workerCount > WORKER_COUNT_MAX) {
    throw genericError(`max-workers must be between 1 and ${WORKER_COUNT_MAX}`);
  }
  const minimum = perf["min-cluster-size"] ?? 0;
  if (minimum !== 0 && !Number.isInteger(Math.log2(minimum))) {
    throw genericError("min-cluster-size needs to be a power of 2");
  }
  if (minimum > Math.max(SMALLEST_COW_CLUSTER_BYTES, args["x-cluster-size"] ?? 0)) {
    throw notSupported(`A min-cluster-size above 64 KiB without an 'x-cluster-size' as large`);
  }
}

/** A backup to ask for: options that are left out are the server's defaults. */
export interface BackupOrder {
  id: string;
  disk: string;
  options: Partial<JobOptions> & { target: string };
  /** As in BackupStart. */
  guestAgent?: FreezeRequest | undefined;
}

/** drive-backup's arguments for an order. Paths go as they are: the server resolves them in its own folder. */
export function argumentsFromBackup({ id, disk, options, guestAgent }: BackupOrder): JsonObject {
  return {
    "job-id": id,
    device: disk,
    target: options.target,
    format: options.targetFormat,
    sync: options.sync ?? "full",
    speed: options.rateLimitBytes,
    "on-source-error": options.onSourceError,
    "on-target-error": options.onTargetError,
    "on-cbw-error": options.onCbwError,
    "x-perf": options.workerCount === undefined ? undefined : { "max-workers": options.workerCount },
    "buffer-size": options.cowBufferSizeBytes,
    "on-buffer-full": options.onBufferFull,
    "spill-dir": options.spillDir,
    "spill-limit": options.spillLimitBytes,
    "cbw-timeout-ms": options.guestTimeoutMs,
    "x-force": options.force,
    "x-direct": options.direct,
    "x-cluster-size": options.clusterSizeBytes,
    "x-verify": options.verify,
    "x-target-retries": options.targetRetries,
    "x-target-snapshot": options.targetSnapshot,
    "x-backing-file": options.backingFile,
    "x-backing-format": options.backingFormat,
    "x-checkpoint": options.checkpoint,
    "x-since": options.since,
    "x-since-or-full": options.sinceOrFull,
    "x-guest-agent": guestAgent?.agent,
    "x-t0-gate": guestAgent?.t0Gate,
    compress: options.compression === undefined ? undefined : true,
    "x-compression-type": options.compression?.type,
    "x-compression-level": options.compression?.level,
    ...argumentsFromRepository(options.repository),
  };
}
