// The commands that start backups. A transaction checks all its actions before it starts any, so an action that
// is wrong, or `abort`, leaves nothing behind; the engine then starts all at one T0, or none.

import { userInfo } from "node:os";
import { CowcatcherError } from "../errors.js";
import type { GuestFreezer } from "../backup/job/while-frozen.js";
import { makeFreezer } from "../qemu/t0-gate.js";
import { freezeToWire } from "./job-wire.js";
import { BITMAP_ACTIONS, isBitmapAction } from "./bitmap-commands.js";
import { BitmapPlan } from "./bitmap-plan.js";
import type { JobOptions } from "../backup/options.js";
import { compressionOf } from "../image/qcow2/format/compression.js";
import { NULL_TARGET_PATH } from "../target/null.js";
import { existingTarget } from "./existing-target.js";
import { backupFromArguments, BACKUP_COMMON, diskOf, DRIVE_BACKUP } from "./backup-arguments.js";
import type { BackupStart, DriveBackupArguments } from "./backup-arguments.js";
import { command } from "./command.js";
import type { Command, CommandContext } from "./command.js";
import { genericError, notSupported } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { anyObject, checkMembers, list, object, oneOf, optional, string } from "../qmp/schema.js";
import type { Arguments } from "../qmp/schema.js";

/** The disks of one machine, with room; a longer list is somebody's mistake. */
const ACTION_COUNT_MAX = 256;

const BLOCKDEV_BACKUP = { ...BACKUP_COMMON, target: string };
type BlockdevBackupArguments = Arguments<typeof BLOCKDEV_BACKUP>;

const ACTION_TYPES = [
  "abort",
  "drive-backup",
  "blockdev-backup",
  "block-dirty-bitmap-add",
  "block-dirty-bitmap-remove",
  "block-dirty-bitmap-clear",
  "block-dirty-bitmap-enable",
  "block-dirty-bitmap-disable",
  "block-dirty-bitmap-merge",
  "blockdev-snapshot",
  "blockdev-snapshot-internal-sync",
  "blockdev-snapshot-sync",
] as const;

const TRANSACTION = {
  actions: list(object({ type: oneOf(ACTION_TYPES), data: anyObject })),
  properties: optional(object({ "completion-mode": optional(oneOf(["individual", "grouped"])) })),
};

async function prepareDrive(
  args: DriveBackupArguments,
  bitmaps: BitmapPlan,
  context: CommandContext,
): Promise<BackupStart> {
  const tool = `cowcatcher ${context.version}`;
  const start = backupFromArguments(args, context.host.disks(), context.jobDefaults, tool, bitmaps);
  if (args.mode === "existing") return intoExisting(start, args, context);
  return args.sync === "none" ? ontoDisk(start, args, context) : start;
}

/** A new image for old data, laid on the disk as QEMU lays it: the two together show T0. */
function ontoDisk(
  { request, ...start }: BackupStart,
  args: Pick<DriveBackupArguments, "device" | "buffer-size">,
  { host }: CommandContext,
): BackupStart {
  const { options } = request;
  if (options.target === NULL_TARGET_PATH || options.targetFormat !== "qcow2") return { ...start, request };
  const { path: backingFile, format: backingFormat } = diskOf(args.device, host.disks());
  const oldData = oldDataInto(args["buffer-size"]);
  return {
    ...start,
    request: { ...request, options: { backingFile, backingFormat, ...options, ...oldData } },
  };
}

/** The node is a place that exists. Whatever a backup can write to is drive-backup's target, too. */
async function prepareBlockdev(
  args: BlockdevBackupArguments,
  bitmaps: BitmapPlan,
  context: CommandContext,
): Promise<BackupStart> {
  const { host, targets, jobDefaults } = context;
  const disk = diskOf(args.device, host.disks());
  const node = targets.get(args.target);
  if (node === undefined) {
    if (args.target === disk.name) throw genericError("Source and target cannot be the same");
    throw genericError(`Cannot find device='${args.target}' nor node-name='${args.target}'`);
  }
  const drive = { ...args, target: node.path, format: node.format };
  const start = backupFromArguments(drive, host.disks(), jobDefaults, undefined, bitmaps);
  return intoExisting(start, args, context);
}

async function intoExisting(
  { request, ...start }: BackupStart,
  args: Pick<
    DriveBackupArguments,
    "sync" | "device" | "buffer-size" | "x-compression-type" | "x-compression-level"
  >,
  { host }: CommandContext,
): Promise<BackupStart> {
  const { target, targetFormat } = request.options;
  const disk = diskOf(args.device, host.disks());
  const { compressionType, ...existing } = await existingTarget(
    target,
    targetFormat,
    disk,
    args.sync !== "full",
  );
  const options = { ...request.options, ...existing };
  // As the image has it, whoever reads it can read more of it.
  if (
    options.compression !== undefined &&
    compressionType !== undefined &&
    args["x-compression-type"] === undefined
  ) {
    options.compression = compressionOf(compressionType, args["x-compression-level"], "x-compression-level");
  }
  if (args.sync === "none") Object.assign(options, oldDataInto(args["buffer-size"]));
  return { ...start, request: { ...request, options } };
}

/**
 * Sync mode `none` with a target. Who reads the target with the disk behind it must find old data there before the disk has
 * new: so the guest waits for the target, as in QEMU, unless a buffer is asked for.
 */
function oldDataInto(bufferSize: number | undefined): Partial<JobOptions> {
  return {
    oldDataOnly: true,
    snapshotExport: false,
    ...(bufferSize === undefined && { cowBufferSizeBytes: 0 }),
  };
}

async function start(
  starts: readonly BackupStart[],
  bitmaps: BitmapPlan,
  grouped: boolean,
  context: CommandContext,
): Promise<JsonObject> {
  const { host, monitor } = context;
  const freezer = freezerOf(starts);
  const ids = starts.map(({ request }) => request.id);
  const group = grouped ? ids : undefined;
  monitor.expect(
    starts.map(({ request: { id }, autoDismiss }) => ({ id, settings: { autoDismiss, group } })),
  );
  let worked = false;
  try {
    await host.startBackups(
      starts.map(({ request }) => ({ ...request, isGrouped: grouped })),
      bitmaps.marks(),
      freezer,
    );
    worked = true;
    return freezer?.info === undefined ? {} : { "x-freeze": freezeToWire(freezer.info) };
  } catch (error) {
    throw namingUser(error);
  } finally {
    monitor.started(ids, worked);
  }
}

/** Disks that start at one T0 are one guest's. */
function freezerOf(starts: readonly BackupStart[]): GuestFreezer | undefined {
  const requests = starts.flatMap(({ guestAgent = [] }) => guestAgent);
  const [first] = requests;
  for (const key of ["agent", "t0Gate"] as const) {
    if (requests.every((request) => request[key] === first?.[key])) continue;
    throw genericError(`A transaction has one 'x-${key === "agent" ? "guest-agent" : "t0-gate"}' at most`);
  }
  return first === undefined ? undefined : makeFreezer(first);
}

/** Whoever asks is often root, and wonders why a permission is missing. */
function namingUser(error: unknown): unknown {
  if (!(error instanceof CowcatcherError)) return error;
  if (error.errno !== "EACCES" && error.errno !== "EPERM") return error;
  return new CowcatcherError({
    ...error.toDetails(),
    problem: `${error.problem} for the server's user ${userName()}`,
    hint:
      error.hint ?? "the server writes targets and spill files: give it a folder where that user may write",
    cause: error,
  });
}

function userName(): string {
  try {
    return userInfo().username;
  } catch {
    // No entry in passwd, as in many containers.
    return String(process.geteuid?.() ?? "unknown");
  }
}

/** What is left to do of a transaction once all of it is known to be right. */
interface Plan {
  starts: BackupStart[];
  bitmaps: BitmapPlan;
}

async function prepareAction(
  plan: Plan,
  type: string,
  data: JsonObject,
  path: string,
  context: CommandContext,
): Promise<void> {
  const { starts, bitmaps } = plan;
  if (isBitmapAction(type)) {
    BITMAP_ACTIONS[type](bitmaps, data, path);
    return;
  }
  switch (type) {
    case "drive-backup":
      starts.push(await prepareDrive(checkMembers(data, DRIVE_BACKUP, path), bitmaps, context));
      return;
    case "blockdev-backup":
      starts.push(await prepareBlockdev(checkMembers(data, BLOCKDEV_BACKUP, path), bitmaps, context));
      return;
    case "abort":
      checkMembers(data, {}, path);
      throw genericError("Transaction aborted using Abort action");
    default:
      throw notSupported(`Action '${type}'`);
  }
}

export const BACKUP_COMMANDS: Record<string, Command> = {
  "drive-backup": command(DRIVE_BACKUP, async (args, context) => {
    const bitmaps = new BitmapPlan(context);
    return start([await prepareDrive(args, bitmaps, context)], bitmaps, false, context);
  }),
  "blockdev-backup": command(BLOCKDEV_BACKUP, async (args, context) => {
    const bitmaps = new BitmapPlan(context);
    return start([await prepareBlockdev(args, bitmaps, context)], bitmaps, false, context);
  }),
  transaction: command(TRANSACTION, async ({ actions, properties }, context) => {
    if (actions.length > ACTION_COUNT_MAX) {
      throw genericError(`A transaction has at most ${ACTION_COUNT_MAX} actions`);
    }
    const plan: Plan = { starts: [], bitmaps: new BitmapPlan(context) };
    for (const [index, { type, data }] of actions.entries()) {
      await prepareAction(plan, type, data, `actions[${index}].data`, context);
    }
    const grouped = properties?.["completion-mode"] === "grouped";
    const isEmpty = plan.starts.length === 0 && plan.bitmaps.marks().length === 0;
    return isEmpty ? {} : start(plan.starts, plan.bitmaps, grouped, context);
  }),
};
