// QEMU's dirty bitmaps, on top of the tracking: a bitmap is a checkpoint, the name of a moment from which on what changes
// is known. So it always records, always outlives the server, and has the tracking's granularity; what QEMU's can do
// besides (be disabled, be merged, be finer) is refused by name.
//
//   -add, -clear    the moment is the T0 of the transaction, with the backups in it
//   -remove         at once

import type { DiskInfo, MarkRequest } from "../backup/host.js";
import { genericError, notSupported } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { boolean, list, optional, size, string, anyObject } from "../qmp/schema.js";
import type { Arguments } from "../qmp/schema.js";
import { type Command, command, type CommandContext } from "./command.js";

const NAMED = { node: string, name: string };
const ADD = {
  ...NAMED,
  granularity: optional(size),
  persistent: optional(boolean),
  disabled: optional(boolean),
};
const MERGE = { node: string, target: string, bitmaps: list(anyObject) };

/** By type of a transaction's action. */
export const BITMAP_SCHEMAS = {
  "block-dirty-bitmap-add": ADD,
  "block-dirty-bitmap-clear": NAMED,
  "block-dirty-bitmap-remove": NAMED,
  "block-dirty-bitmap-enable": NAMED,
  "block-dirty-bitmap-disable": NAMED,
  "block-dirty-bitmap-merge": MERGE,
} as const;

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;
/** QEMU's limits and its default (block/dirty-bitmap.c). */
const MIN_GRANULARITY_BYTES = 512;

/** @throws QmpError GenericError in QEMU's words for what does not fit. */
export function addMark(args: Arguments<typeof ADD>, context: CommandContext): MarkRequest {
  const disk = trackedDisk(args.node, context);
  const { name, granularity } = args;
  if (name === "") throw genericError("Bitmap name cannot be empty");
  if (!NAME.test(name)) throw genericError(`Invalid bitmap name '${name}'`);
  const { granularityBytes, checkpoints } = disk.tracking;
  if (granularity !== undefined) {
    const isPower = Number.isInteger(Math.log2(granularity));
    if (granularity < MIN_GRANULARITY_BYTES || !isPower) {
      throw genericError(`Granularity must be power of 2 and at least ${MIN_GRANULARITY_BYTES}`);
    }
    if (granularity !== granularityBytes) {
      throw notSupported(`A granularity of ${granularity} (changes are tracked by ${granularityBytes})`);
    }
  }
  if (args.disabled === true) throw notSupported("A disabled bitmap");
  if (checkpoints.some((checkpoint) => checkpoint.name === name)) {
    throw genericError(`Bitmap already exists: ${name}`);
  }
  return { disk: disk.name, name };
}

export function clearMark(args: Arguments<typeof NAMED>, context: CommandContext): MarkRequest {
  return { disk: requireBitmap(args, context).name, name: args.name };
}

export async function removeBitmap(args: Arguments<typeof NAMED>, context: CommandContext): Promise<void> {
  await context.host.deleteCheckpoint(args.name, requireBitmap(args, context).name);
}

/** As QEMU's BlockDirtyInfo. */
export async function bitmapsOf(disk: DiskInfo, { host }: CommandContext): Promise<JsonObject[] | undefined> {
  const { tracking } = disk;
  if (tracking === undefined || tracking.checkpoints.length === 0) return undefined;
  const { granularityBytes, checkpoints } = tracking;
  const bitmaps: JsonObject[] = [];
  for (const { name } of checkpoints) {
    const count = await host.changedBytes(disk.name, name);
    bitmaps.push({
      name,
      count,
      granularity: granularityBytes,
      recording: true,
      busy: false,
      persistent: true,
    });
  }
  return bitmaps;
}

function trackedDisk(
  node: string,
  { host }: CommandContext,
): DiskInfo & { tracking: NonNullable<DiskInfo["tracking"]> } {
  const disk = host.disks().find(({ name }) => name === node);
  if (disk === undefined) throw genericError(`Cannot find device='${node}' nor node-name='${node}'`);
  const { tracking } = disk;
  if (tracking === undefined) throw genericError(`The changes of '${node}' are not tracked`);
  if (tracking.state === "failed") throw genericError(`The changes of '${node}' are not tracked any more`);
  return { ...disk, tracking };
}

/** @throws QmpError GenericError where there is no such node or bitmap. */
export function requireBitmap({ node, name }: Arguments<typeof NAMED>, context: CommandContext): DiskInfo {
  // QEMU finds a bitmap's node by another way than a new one's, and says so.
  if (!context.host.disks().some((disk) => disk.name === node))
    throw genericError(`Node '${node}' not found`);
  const disk = trackedDisk(node, context);
  if (disk.tracking.checkpoints.some((checkpoint) => checkpoint.name === name)) return disk;
  throw genericError(`Dirty bitmap '${name}' not found`);
}

async function mark(request: MarkRequest, { host }: CommandContext): Promise<JsonObject> {
  await host.startBackups([], [request]);
  return {};
}

export const BITMAP_COMMANDS: Record<string, Command> = {
  "block-dirty-bitmap-add": command(ADD, (args, context) => mark(addMark(args, context), context)),
  "block-dirty-bitmap-clear": command(NAMED, (args, context) => mark(clearMark(args, context), context)),
  "block-dirty-bitmap-remove": command(NAMED, async (args, context) => {
    await removeBitmap(args, context);
    return {};
  }),
  "block-dirty-bitmap-enable": command(NAMED, () => refuse("block-dirty-bitmap-enable")),
  "block-dirty-bitmap-disable": command(NAMED, () => refuse("block-dirty-bitmap-disable")),
  "block-dirty-bitmap-merge": command(MERGE, () => refuse("block-dirty-bitmap-merge")),
};

/** @throws QmpError always */
export function refuse(name: string): never {
  throw notSupported(`'${name}'`);
}
