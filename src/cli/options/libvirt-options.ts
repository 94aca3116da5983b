// The options of `backup --libvirt`: disks of a domain that libvirt manages, and what goes with them.
import type { Command } from "commander";
import { isAbsolute } from "node:path";
import type { LibvirtBackupRequest } from "../../libvirt/backup.js";
import type { BackupFlags } from "./backup-flags.js";
import type { LiveDiskSettings } from "./job-settings.js";
import { isNbdUri, isRbdAddress, NULL_TARGET, textOption, unsupported, usageError } from "./options.js";
import { checkGuestFlags, guestSettings, type QemuBackupSettings } from "./qemu-options.js";

export type LibvirtBackupSettings = {
  mode: "libvirt";
  disks: QemuBackupSettings["disks"];
} & Pick<LibvirtBackupRequest, "domain" | "connect" | "fleeceDir" | "acceptGuestRisk" | "guestAgent">;

export function addLibvirtOptions(command: Command): Command {
  return command
    .addOption(textOption("--libvirt <DOMAIN>", "domain of libvirt that runs the guest: a live backup"))
    .addOption(
      textOption("--connect <URI>", "with --libvirt: libvirt's URI of the hypervisor (virsh's own default)"),
    );
}

/** @throws CowcatcherError USAGE for what cannot mean anything, UNSUPPORTED for what libvirt cannot do */
export function libvirtSettings(
  domain: string,
  disks: LiveDiskSettings[],
  flags: BackupFlags,
): LibvirtBackupSettings {
  checkGuestFlags(flags, "--libvirt");
  if (flags.qmp !== undefined) throw usageError("--libvirt", "does not go with --qmp", "give one of them");
  refuseForeignFlags(flags);
  if (flags.bitmap !== undefined) disks.forEach(({ job }) => refuseNoFile(job.target));
  return { mode: "libvirt", ...guestSettings(disks, flags), domain, connect: flags.connect };
}

/** What libvirt decides by itself. */
function refuseForeignFlags({ qemuMethod, nbd, guestTimeout, onCbwError }: BackupFlags): void {
  const decided = {
    "qemu-method": qemuMethod,
    nbd,
    "guest-timeout": guestTimeout,
    "on-cbw-error": onCbwError,
  };
  const given = Object.entries(decided).find(([, value]) => value !== undefined);
  if (given === undefined) return;
  throw unsupported(
    `--${given[0]}`,
    "does not go with --libvirt, which decides it by itself",
    "leave it out",
  );
}

/** A checkpoint is found again by the files of its backup. */
function refuseNoFile(target: string): void {
  if (target !== NULL_TARGET && !isNbdUri(target) && !isRbdAddress(target) && isAbsolute(target)) return;
  throw unsupported("--bitmap", `auto needs a TARGET that is a file, and ${target} is none`, "leave it out");
}
