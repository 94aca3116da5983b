// The commands that start backups. A transaction checks all its actions before it starts any, so an action that
// is wrong, or `abort`, leaves nothing behind; the engine then starts all at one T0, or none.

import { userInfo } from "node:os";
import { CowcatcherError } from "../errors.js";
import { backupFromArguments, BACKUP_COMMON, DRIVE_BACKUP } from "./backup-arguments.js";
import type { BackupStart, DriveBackupArguments } from "./backup-arguments.js";
import { command } from "./command.js";
import type { Command, CommandContext } from "./command.js";
import { QmpError, genericError, notSupported } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { anyObject, checkMembers, fileName, list, object, oneOf, optional } from "../qmp/schema.js";

/** The disks of one machine, with room; a longer list is somebody's mistake. */
const ACTION_COUNT_MAX = 256;

const BLOCKDEV_BACKUP = { ...BACKUP_COMMON, target: fileName };

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

function refuseBlockdevBackup(): QmpError {
  return new QmpError(
    "GenericError",
    "blockdev-backup is not supported by this version: name the target's file with drive-backup",
    { code: "UNSUPPORTED" },
  );
}

function prepare(args: DriveBackupArguments, { host, jobDefaults }: CommandContext): BackupStart {
  return backupFromArguments(args, host.disks(), jobDefaults);
}

async function start(
  starts: readonly BackupStart[],
  grouped: boolean,
  context: CommandContext,
): Promise<void> {
  const { host, monitor } = context;
  const ids = starts.map(({ request }) => request.id);
  const group = grouped ? ids : undefined;
  monitor.expect(
    starts.map(({ request: { id }, autoDismiss }) => ({ id, settings: { autoDismiss, group } })),
  );
  let worked = false;
  try {
    await host.startBackups(starts.map(({ request }) => request));
    worked = true;
  } catch (error) {
    throw namingUser(error);
  } finally {
    monitor.started(ids, worked);
  }
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

function prepareAction(type: string, data: JsonObject, path: string, context: CommandContext): BackupStart {
  switch (type) {
    case "drive-backup":
      return prepare(checkMembers(data, DRIVE_BACKUP, path), context);
    case "blockdev-backup":
      checkMembers(data, BLOCKDEV_BACKUP, path);
      throw refuseBlockdevBackup();
    case "abort":
      checkMembers(data, {}, path);
      throw genericError("Transaction aborted using Abort action");
    default:
      throw notSupported(`Action '${type}'`);
  }
}

export const BACKUP_COMMANDS: Record<string, Command> = {
  "drive-backup": command(DRIVE_BACKUP, async (args, context) => {
    await start([prepare(args, context)], false, context);
    return {};
  }),
  "blockdev-backup": command(BLOCKDEV_BACKUP, () => {
    throw refuseBlockdevBackup();
  }),
  transaction: command(TRANSACTION, async ({ actions, properties }, context) => {
    if (actions.length > ACTION_COUNT_MAX) {
      throw genericError(`A transaction has at most ${ACTION_COUNT_MAX} actions`);
    }
    const starts = actions.map(({ type, data }, index) =>
      prepareAction(type, data, `actions[${index}].data`, context),
    );
    if (starts.length > 0) await start(starts, properties?.["completion-mode"] === "grouped", context);
    return {};
  }),
};
