// The table of all commands, and those that ask about the server and its disks.

import { absoluteName } from "../file-names.js";
import { isNbdUri } from "../nbd/wire/uri.js";
import { isRbdAddress } from "../rbd/address.js";
import type { DiskInfo } from "../backup/host.js";
import { BITMAP_COMMANDS, bitmapsOf } from "./bitmap-commands.js";
import { BACKUP_COMMANDS } from "./backup-commands.js";
import { command } from "./command.js";
import type { Command, CommandContext } from "./command.js";
import { CHECKPOINT_COMMANDS, trackingToWire } from "./checkpoint-commands.js";
import { EXPORT_COMMANDS } from "./export-commands.js";
import { JOB_COMMANDS } from "./job-commands.js";
import { DIALECT_VERSION, QmpError } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { boolean, optional, string } from "../qmp/schema.js";

/** VersionInfo: the dialect that is spoken, and who speaks it. */
export function versionInfo(version: string): JsonObject {
  return { qemu: DIALECT_VERSION, package: `cowcatcher ${version}` };
}

/**
 * BlockDeviceInfo, of which QEMU makes nearly all members mandatory. Throttling, encryption and write thresholds do
 * not exist here; `backing_file_depth` is not known on this side and stays 0.
 */
function nodeInfo({ name, path, format, sizeBytes, readOnly, tracking }: DiskInfo): JsonObject {
  return {
    "node-name": name,
    file: absolute(path),
    drv: format,
    ro: readOnly,
    encrypted: false,
    detect_zeroes: "off",
    bps: 0,
    bps_rd: 0,
    bps_wr: 0,
    iops: 0,
    iops_rd: 0,
    iops_wr: 0,
    write_threshold: 0,
    backing_file_depth: 0,
    cache: { writeback: true, direct: false, "no-flush": false },
    image: { filename: absolute(path), format, "virtual-size": sizeBytes },
    "x-cowcatcher": tracking === undefined ? undefined : { tracking: trackingToWire(tracking) },
  };
}

/** `nodeInfo`, and what a client that makes backups wants to know besides. */
async function nodeInfoWithMore(disk: DiskInfo, context: CommandContext): Promise<JsonObject> {
  const allocated = await context.host.allocatedBytes?.(disk.name);
  return {
    ...nodeInfo(disk),
    "dirty-bitmaps": await bitmapsOf(disk, context),
    "x-cowcatcher": {
      path: absolute(disk.path),
      allocated,
      "job-count": disk.jobCount ?? 0,
      ...(disk.tracking && { tracking: trackingToWire(disk.tracking) }),
    },
  };
}

function absolute(path: string): string {
  return isNbdUri(path) || isRbdAddress(path) ? path : absoluteName(path);
}

/** QEMU shows the bitmaps in both places. */
async function blockInfo(disk: DiskInfo, context: CommandContext): Promise<JsonObject> {
  const bitmaps = await bitmapsOf(disk, context);
  return {
    device: disk.name,
    qdev: disk.name,
    type: "unknown",
    removable: false,
    locked: false,
    inserted: { ...nodeInfo(disk), "dirty-bitmaps": bitmaps },
    "dirty-bitmaps": bitmaps,
  };
}

const QUERY_COMMANDS: Record<string, Command> = {
  "query-version": command({}, (_args, { version }) => versionInfo(version)),
  "query-commands": command({}, () => COMMAND_NAMES.map((name) => ({ name }))),
  "query-status": command({}, () => ({ status: "running", running: true })),
  // Without backing chains in the answer, `flat` makes no difference.
  "query-named-block-nodes": command({ flat: optional(boolean) }, (_args, context) =>
    Promise.all(context.host.disks().map((disk) => nodeInfoWithMore(disk, context))),
  ),
  "query-block": command({}, (_args, context) =>
    Promise.all(context.host.disks().map((disk) => blockInfo(disk, context))),
  ),
  // Of the machine, which is not here: as QEMU answers for one without a name, a TPM and acceleration.
  "query-name": command({}, () => ({})),
  "query-uuid": command({}, () => ({ UUID: "00000000-0000-0000-0000-000000000000" })),
  "query-kvm": command({}, () => ({ enabled: false, present: false })),
  "query-tpm": command({}, () => []),
  // Places for blockdev-backup to write to. query-named-block-nodes has the server's disks alone.
  "blockdev-add": {
    execute: async (args, { host, targets }) => {
      await targets.add(
        args,
        host.disks().map(({ name }) => name),
      );
      return {};
    },
  },
  "blockdev-del": command({ "node-name": string }, ({ "node-name": name }, { host, targets, exports }) => {
    targets.remove(name, host.jobs(), exports);
    return {};
  }),
  quit: command({}, (_args, { host, logger }) => {
    logger.info("a client of the control socket asked to quit");
    // The answer goes first.
    setImmediate(() => host.quit());
    return {};
  }),
};

const COMMANDS = new Map<string, Command>(
  Object.entries({
    ...QUERY_COMMANDS,
    ...JOB_COMMANDS,
    ...BACKUP_COMMANDS,
    ...BITMAP_COMMANDS,
    ...CHECKPOINT_COMMANDS,
    ...EXPORT_COMMANDS,
  }),
);

/** Belongs to the connection, which alone knows whether it has negotiated. */
export const NEGOTIATE = "qmp_capabilities";

const COMMAND_NAMES = [NEGOTIATE, ...COMMANDS.keys()];

/** @throws QmpError CommandNotFound; and whatever the command throws. */
export function execute(name: string, args: JsonObject, context: CommandContext): unknown {
  const found = COMMANDS.get(name);
  if (found === undefined) throw new QmpError("CommandNotFound", `The command ${name} has not been found`);
  return found.execute(args, context);
}
