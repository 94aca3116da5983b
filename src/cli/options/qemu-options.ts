// The options of `backup --qmp`: disks of a guest that QEMU runs, and what goes with them.
import { dirname, resolve } from "node:path";
import { Option, type Command } from "commander";
import { JOB_DEFAULTS } from "../../backup/options.js";
import { absoluteName } from "../../file-names.js";
import type { QemuBackupRequest, QemuDiskRequest, ServerAddress } from "../../qemu/backup.js";
import { QEMU_METHODS } from "../../qemu/methods.js";
import { refuseCheckpointFlags } from "./checkpoint-flags.js";
import type { BackupFlags } from "./backup-flags.js";
import type { LiveDiskSettings } from "./job-settings.js";
import { agentOf, freezeRequest } from "./live-flags.js";
import { choiceOption, listWords, repeatedPath, textOption, unsupported, usageError } from "./options.js";

/** A file system on a disk, by the hierarchy standard: /tmp may be memory, which old data would fill. */
const FLEECE_DIR = "/var/tmp";
const MAX_PORT = 65_535;

export type QemuBackupSettings = {
  mode: "qemu";
  disks: (LiveDiskSettings & Pick<QemuDiskRequest, "bitmaps">)[];
} & Pick<QemuBackupRequest, "monitor" | "method" | "fleeceDir" | "server" | "acceptGuestRisk" | "guestAgent">;

export interface QemuCleanupSettings {
  mode: "qemu-cleanup";
  /** Undefined: there is only a guest to be thawed, or a domain. */
  monitor: string | undefined;
  /** Of libvirt. */
  domain?: { domain: string; connect: string | undefined } | undefined;
  /** Backups on which nothing will be built: their bitmaps go. */
  replaced?: readonly string[] | undefined;
  /** Of a guest that is to be thawed. */
  guestAgent: string | undefined;
  fleeceDir: string;
}

export function addQemuOptions(command: Command): Command {
  return command
    .addOption(textOption("--qmp <SOCK>", "QMP socket of the QEMU that runs the guest: a live backup"))
    .addOption(
      choiceOption(
        "--qemu-method <METHOD>",
        `${listWords(QEMU_METHODS)}: how QEMU keeps old data (auto)`,
        QEMU_METHODS,
      ),
    )
    .addOption(
      textOption("--fleece-dir <DIR>", `folder for old data that QEMU keeps, and its socket (${FLEECE_DIR})`),
    )
    .addOption(
      textOption(
        "--nbd <ADDRESS>",
        "where QEMU's NBD server listens, if it runs already: a path or HOST:PORT",
      ),
    )
    .addOption(
      repeatedPath(
        "--bitmap-replaces <FILE>",
        "with --bitmap auto and a full backup: QEMU's bitmap of the backup FILE goes when this one is good; with --cleanup: at once; may be repeated",
      ),
    )
    .option(
      "--bitmap-keeps-base",
      "with --bitmap auto and -b: the bitmap of the backup that this one builds on goes on beside the new one",
    )
    .option("--accept-guest-risk", "also where the guest would be harmed if this process were killed")
    .addOption(
      new Option(
        "--cleanup",
        "with --qmp or --libvirt: remove what an earlier run left there; with --freeze: thaw the guest; and nothing else",
      ),
    );
}

/** What is about a QEMU and means nothing elsewhere. @throws CowcatcherError USAGE */
export function refuseQemuFlags(flags: BackupFlags): void {
  const { qemuMethod, fleeceDir, nbd, acceptGuestRisk, cleanup, bitmapReplaces, bitmapKeepsBase } = flags;
  refuseConnect(flags);
  const ofQemu = {
    "qemu-method": qemuMethod,
    "fleece-dir": fleeceDir,
    nbd,
    "accept-guest-risk": acceptGuestRisk,
    cleanup,
    "bitmap-replaces": bitmapReplaces,
    "bitmap-keeps-base": bitmapKeepsBase,
  };
  const useless = Object.entries(ofQemu).find(([, value]) => value !== undefined);
  if (useless !== undefined) throw usageError(`--${useless[0]}`, "needs --qmp", "give QEMU's QMP socket");
}

/** @throws CowcatcherError USAGE */
function refuseConnect({ connect }: BackupFlags): void {
  if (connect !== undefined) throw usageError("--connect", "needs --libvirt", "name libvirt's domain");
}

/** @throws CowcatcherError USAGE for what cannot mean anything, UNSUPPORTED for what QEMU cannot do */
export function qemuSettings(qmp: string, disks: LiveDiskSettings[], flags: BackupFlags): QemuBackupSettings {
  refuseConnect(flags);
  checkGuestFlags(flags, "--qmp");
  return {
    mode: "qemu",
    ...guestSettings(disks, flags),
    monitor: absoluteName(qmp),
    method: flags.qemuMethod ?? "auto",
    server: flags.nbd === undefined ? undefined : parseServer(flags.nbd),
  };
}

/** What goes for a guest's disks, whoever manages its QEMU. */
export function guestSettings(
  disks: LiveDiskSettings[],
  flags: BackupFlags,
): Pick<QemuBackupSettings, "disks" | "fleeceDir" | "acceptGuestRisk" | "guestAgent"> {
  const orFull = flags.sinceOrFull ?? false;
  return {
    disks: disks.map(({ disk, job }) => ({
      disk,
      job: { ...job, bitmap: undefined },
      bitmaps:
        flags.bitmap === undefined
          ? undefined
          : {
              base: baseOf(job),
              orFull,
              replaced: flags.bitmapReplaces?.map(absoluteName),
              keepsBase: flags.bitmapKeepsBase,
            },
    })),
    fleeceDir: absoluteName(flags.fleeceDir ?? FLEECE_DIR),
    acceptGuestRisk: flags.acceptGuestRisk ?? false,
    guestAgent: freezeRequest(flags),
  };
}

/** The file that an overlay names: a relative name is relative to the overlay's folder. */
function baseOf({ target, backingFile }: LiveDiskSettings["job"]): string | undefined {
  return backingFile === undefined ? undefined : resolve(dirname(target), backingFile);
}

/** @throws CowcatcherError USAGE for anything besides */
export function cleanupSettings(
  args: readonly string[],
  { qmp, libvirt, connect, fleeceDir, disk, control, freeze, bitmapReplaces }: BackupFlags,
): QemuCleanupSettings {
  if ((qmp ?? libvirt ?? freeze) === undefined || control !== undefined) {
    const hint = "give QEMU's QMP socket, libvirt's domain, or the guest agent's socket";
    throw usageError("--cleanup", "needs --qmp, --libvirt or --freeze", hint);
  }
  if (qmp !== undefined && libvirt !== undefined)
    throw usageError("--libvirt", "does not go with --qmp", "give one of them");
  if (libvirt === undefined) refuseConnect({ connect });
  if (bitmapReplaces !== undefined && (qmp ?? libvirt) === undefined)
    throw usageError("--bitmap-replaces", "needs --qmp or --libvirt", "name who has the bitmap");
  if (args[0] !== undefined) throw usageError(args[0], "does not go with --cleanup", "leave it out");
  if (disk !== undefined) throw usageError("--disk", "does not go with --cleanup", "leave it out");
  return {
    mode: "qemu-cleanup",
    monitor: qmp === undefined ? undefined : absoluteName(qmp),
    domain: libvirt === undefined ? undefined : { domain: libvirt, connect },
    guestAgent: freeze === undefined ? undefined : agentOf(freeze, libvirt !== undefined),
    replaced: bitmapReplaces?.map(absoluteName),
    fleeceDir: absoluteName(fleeceDir ?? FLEECE_DIR),
  };
}

/** @param option that names the guest. @throws CowcatcherError USAGE, UNSUPPORTED */
export function checkGuestFlags(flags: BackupFlags, option: "--qmp" | "--libvirt"): void {
  const { spillDir, sync, bitmap, bitmapMode } = flags;
  const stranger = `does not go with ${option}`;
  if (flags.control !== undefined) throw usageError(option, "does not go with --control", "give one of them");
  refuseCheckpointFlags(flags.bitmap === undefined ? flags : { ...flags, sinceOrFull: undefined });
  if (spillDir !== undefined) throw usageError("--spill-dir", stranger, "give --fleece-dir");
  if (sync !== undefined && sync !== JOB_DEFAULTS.sync) {
    throw unsupported("--sync", `${sync} ${stranger}`, "leave it out");
  }
  if (bitmapMode !== undefined) throw unsupported("--bitmap-mode", stranger, "leave it out");
  if (bitmap !== undefined && bitmap !== "auto") {
    const hint = "give --bitmap auto, whose bitmaps are cowcatcher's own";
    throw unsupported(
      "--bitmap",
      `'${bitmap}' is somebody else's bitmap, which ${option} does not change`,
      hint,
    );
  }
  checkBitmapBase(flags);
}

/** What an incremental backup by QEMU's bitmaps needs. */
function checkBitmapBase(flags: BackupFlags): void {
  const { bitmap, bitmapReplaces, bitmapKeepsBase, backingFile, verify, sinceOrFull } = flags;
  if (bitmapKeepsBase === true && (bitmap === undefined || backingFile === undefined)) {
    const hint = "give --bitmap auto and --backing-file";
    throw usageError("--bitmap-keeps-base", "goes with an incremental backup", hint);
  }
  if (bitmapReplaces !== undefined && (bitmap === undefined || backingFile !== undefined)) {
    const hint = "give --bitmap auto and no --backing-file";
    throw usageError("--bitmap-replaces", "goes with a full backup that begins a chain", hint);
  }
  if (bitmap === undefined || backingFile === undefined) {
    if (bitmap !== undefined && sinceOrFull === true) {
      throw usageError("--since-or-full", "needs --backing-file", "without one the backup is a full one");
    }
    return;
  }
  if (verify === true) {
    throw unsupported("--verify", "an incremental backup cannot be read back", "use `compare` afterwards");
  }
}

/** @throws CowcatcherError USAGE */
function parseServer(text: string): ServerAddress {
  if (text.includes("/")) return { path: absoluteName(text) };
  const [, host, port] = /^(.+):(\d+)$/.exec(text) ?? [];
  if (host === undefined || port === undefined || Number(port) < 1 || Number(port) > MAX_PORT) {
    throw usageError("--nbd", `'${text}' is no address`, "give a path with a slash in it, or HOST:PORT");
  }
  return { host: host.replace(/^\[(.*)\]$/, "$1"), port: Number(port) };
}
