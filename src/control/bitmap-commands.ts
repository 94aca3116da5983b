// QEMU's dirty bitmaps, on top of the tracking: a bitmap is a checkpoint, the name of a moment from which on what changes
// is known, which may be stopped (disabled) and hold bits of others (merged). It always outlives the server, and has the
// tracking's granularity; another one is refused by name.
//
// Each command is a transaction of one action: bitmap-plan.ts says what is right, and its moment is a T0.

import type { DiskInfo } from "../backup/host.js";
import { genericError } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { boolean, checkMembers, list, object, optional, size, string, type Type } from "../qmp/schema.js";
import { BitmapPlan } from "./bitmap-plan.js";
import type { Command, CommandContext } from "./command.js";

const NAMED = { node: string, name: string };
const ADD = {
  ...NAMED,
  granularity: optional(size),
  persistent: optional(boolean),
  disabled: optional(boolean),
};
const EXTERNAL = object(NAMED);
/** BlockDirtyBitmapOrStr. */
export const BITMAP_OR_NAME: Type<string | { node: string; name: string }> = {
  check(value, path) {
    if (typeof value === "string") return value;
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      // QEMU does not name the member of an array where it may be one of two types.
      throw genericError("Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr");
    }
    return EXTERNAL.check(value, path);
  },
};
const MERGE = { node: string, target: string, bitmaps: list(BITMAP_OR_NAME) };

type BitmapAction =
  | "block-dirty-bitmap-add"
  | "block-dirty-bitmap-clear"
  | "block-dirty-bitmap-remove"
  | "block-dirty-bitmap-enable"
  | "block-dirty-bitmap-disable"
  | "block-dirty-bitmap-merge";

/** By type of action: its part in a plan. @throws QmpError GenericError in QEMU's words for what does not fit. */
export const BITMAP_ACTIONS: Record<
  BitmapAction,
  (plan: BitmapPlan, data: JsonObject, path: string) => void
> = {
  "block-dirty-bitmap-add": (plan, data, path) => plan.add(checkMembers(data, ADD, path)),
  "block-dirty-bitmap-clear": (plan, data, path) => plan.clear(checkMembers(data, NAMED, path)),
  "block-dirty-bitmap-remove": (plan, data, path) => plan.remove(checkMembers(data, NAMED, path)),
  "block-dirty-bitmap-enable": (plan, data, path) => plan.setRecording(checkMembers(data, NAMED, path), true),
  "block-dirty-bitmap-disable": (plan, data, path) =>
    plan.setRecording(checkMembers(data, NAMED, path), false),
  "block-dirty-bitmap-merge": (plan, data, path) => plan.merge(checkMembers(data, MERGE, path)),
};

export function isBitmapAction(type: string): type is BitmapAction {
  return Object.hasOwn(BITMAP_ACTIONS, type);
}

/** As QEMU's BlockDirtyInfo. */
export async function bitmapsOf(disk: DiskInfo, { host }: CommandContext): Promise<JsonObject[] | undefined> {
  const bitmaps = await host.bitmaps(disk.name);
  if (bitmaps.length === 0) return undefined;
  return bitmaps.map(({ name, dirtyBytes, isRecording, isBusy, isInconsistent }) => ({
    name,
    count: dirtyBytes,
    granularity: disk.tracking?.granularityBytes,
    recording: isRecording,
    busy: isBusy,
    // The successor of a busy bitmap has no name to be kept under.
    persistent: name !== undefined,
    ...(isInconsistent && { inconsistent: true }),
  }));
}

async function changeBitmap(
  type: BitmapAction,
  args: JsonObject,
  context: CommandContext,
): Promise<JsonObject> {
  const plan = new BitmapPlan(context);
  BITMAP_ACTIONS[type](plan, args, "");
  const marks = plan.marks();
  // What goes need not go at a moment that has to be waited for.
  const [mark] = marks;
  if (mark?.isRemoved === true) {
    await context.host.deleteCheckpoint(mark.name, mark.disk);
    return {};
  }
  if (marks.length > 0) await context.host.startBackups([], marks);
  return {};
}

export const BITMAP_COMMANDS: Record<string, Command> = Object.fromEntries(
  Object.keys(BITMAP_ACTIONS)
    .filter(isBitmapAction)
    .map((type): [string, Command] => [
      type,
      { execute: (args, context) => changeBitmap(type, args, context) },
    ]),
);
