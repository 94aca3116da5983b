import type { Command } from "commander";
import type { BackupFlags } from "../options/backup-flags.js";
import { addBackupOptions, parseBackupSettings } from "../options/backup-options.js";
import {
  addRepositoryBackupOptions,
  isRepositoryBackup,
  parseRepositoryBackup,
} from "../options/repository-backup.js";
import { lazyKey } from "../options/repository-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

const NBD_NOTES =
  "NBD URIs: nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH; with nbds: for TLS,\n" +
  "and libnbd's tls-certificates=DIR, tls-psk-file=FILE, tls-hostname=NAME, tls-verify-peer=0. An export is raw. As a\n" +
  "TARGET it exists already, at least as large as the disk, and is written in place, as qemu-img convert -n does:\n" +
  "no --force is asked for, what a larger export has behind the disk's end stays, and a backup that fails or is\n" +
  "interrupted leaves a mixture of old and new there. A lost connection is made again: a source's up to 5 times, a\n" +
  "target's up to --target-retries times.\n" +
  "With --bitmap NAME a dirty bitmap of the qcow2 image or of QEMU's export says what is copied, into an overlay of\n" +
  "--backing-file; clearing the bitmap is QEMU's business. Not supported in this version: bitmaps of served disks.";

const RBD_NOTES =
  "Ceph RBD: rbd:POOL[/NAMESPACE]/IMAGE[@SNAP][:id=USER][:conf=FILE][:KEY=VALUE], as in QEMU; a backslash before ':',\n" +
  "'@', '=' and '/' within a name. A TARGET that is not there is made, and has its name when it is complete; one that is\n" +
  "there is written in place with --force, and keeps its snapshots. --target-snapshot NAME makes the next one. With\n" +
  "--bitmap the image itself is what the backup builds on. A SOURCE that others may write is read as @SNAP only.";
const QEMU_NOTES =
  "With --qmp the guest runs on QEMU with its own disk files. By the method filter QEMU keeps\n" +
  "the old data, in a file in --fleece-dir of at most --cow-buffer-size and --spill-limit; by the method ring this process does, in\n" +
  "its buffer, and its death harms the guest. QEMU is afterwards as it was before; after a crash, --cleanup. --disk takes a\n" +
  "node's name, a device's id, the name of a -drive or a qdev path. See docs/running-guests.md. Not supported in this\n" +
  "version: --sync top and none. With --bitmap auto QEMU keeps track of what changes from then on, and with -b and -B only that\n" +
  "is copied, since the backup that -b names; with --since-or-full all where QEMU does not know. With --repo it does so by itself\n" +
  "for the next --level auto, unless --bitmap none.\n" +
  "With --libvirt virsh has libvirt begin a backup job of the domain, whose export is read; --disk takes a target, such as vda.\n" +
  "Old data stays in --fleece-dir to the end, in files of at most --cow-buffer-size and --spill-limit; full, that file system\n" +
  "would fail the guest's writes, so the backup ends before. --bitmap auto keeps a checkpoint of libvirt's, of qcow2 disks.\n";

export function addBackup(program: Command, run: RunCommand): void {
  const command = define(program, "backup", {
    summary: "point-in-time copy of an image, or of a disk that a guest is using",
    usage:
      "[options] SOURCE TARGET\n       cowcatcher backup [options] --control SOCK [--disk NAME]... TARGET...\n" +
      "       cowcatcher backup [options] --qmp SOCK [--disk NAME]... TARGET...\n" +
      "       cowcatcher backup [options] --libvirt DOMAIN [--connect URI] [--disk NAME]... TARGET...\n" +
      "       cowcatcher backup [options] SOURCE... --repo REPO --group NAME\n" +
      "       cowcatcher backup [options] (--control SOCK|--qmp SOCK|--libvirt DOMAIN) [--disk NAME]... --repo REPO --group NAME",
    notes:
      "SOURCE and TARGET are paths, NBD URIs or RBD images; TARGET may be null:, which throws the data away, or -, standard output,\n" +
      "which gets the disk in order (raw), and messages go to standard error. SOURCE may be - where standard input is\n" +
      "redirected from a file. Files of this name are ./-. Without --control no one else may write SOURCE. With it, the server that has the disk open makes the backup while the guest runs.\n" +
      "The server writes TARGET and the spill file then, with its own user's rights. With several disks each has its own\n" +
      "buffer, workers and --rate-limit. --dry-run reads the disk's image without a lock.\n" +
      "What is about the guest's writes (the buffer, the spill, --guest-timeout, --on-cbw-error) goes with it alone.\n" +
      "With --sync top the backup holds what SOURCE's own layer does, and builds on what SOURCE builds on (or on -b).\n" +
      "With --sync none nothing is copied: until the command is interrupted (SIGINT, SIGTERM: exit code 0) or the\n" +
      "job cancelled, the disk as it was at the start is a read-only export of the server called NAME-snapshot, for\n" +
      "nbdcopy or qemu-img to read. Old data stays in the buffer, then in the spill; TARGET is null:.\n" +
      "With --repo all SOURCEs become one backup of the group, a disk each, named by --disk or by its file; what the\n" +
      "repository has is not stored again, and each backup is a full one to whoever reads it. With --control, --qmp or\n" +
      "--libvirt there is no TARGET: all disks, or those of --disk, become one backup of one instant. With --control the server writes it,\n" +
      "with its own user's rights, and reads the key's file and the S3 credentials of its own environment; what it has\n" +
      "tracked as changed since the group's last backup is all that is read (--level).\n" +
      QEMU_NOTES +
      NBD_NOTES +
      "\n" +
      RBD_NOTES,
    examples: [
      "cowcatcher backup -c disk.img /backup/disk.qcow2",
      "cowcatcher backup --qmp /run/vm1.qmp --disk vd0 /backup/vm1.qcow2",
      "cowcatcher backup --control /run/vm1.ctl --repo /backup/repo --group vm1",
    ],
  }).argument("[ARGUMENTS...]", "SOURCE and TARGET, or with --control a TARGET for each disk");
  addCommonOptions(addRepositoryBackupOptions(addBackupOptions(command))).action(
    (args: string[], flags: BackupFlags & CommonFlags) =>
      run("backup", flags, async (context) => {
        if (isRepositoryBackup(flags)) {
          const settings = parseRepositoryBackup(args, flags);
          if (settings.mode === "repository-live")
            return (await import("../actions/repository-live.js")).runRepositoryLive(settings, context);
          if (settings.mode === "repository-qemu")
            return (await import("../actions/repository-qemu.js")).runRepositoryQemu(settings, context);
          return (await import("../actions/repository-backup.js")).runRepositoryBackup(settings, context);
        }
        const settings = parseBackupSettings(args, flags);
        if (settings.mode === "qemu" || settings.mode === "libvirt")
          return (await import("../actions/backup-qemu.js")).runQemuBackup(settings, context);
        if (settings.mode === "qemu-cleanup")
          return (await import("../actions/backup-qemu.js")).runQemuCleanup(settings, context);
        if (flags.dryRun === true) {
          return (await import("../actions/dry-run.js")).runDryRun(settings, context);
        }
        if (settings.mode === "live")
          return (await import("../actions/live-backup.js")).runLive(settings, context);
        return (await import("../actions/backup.js")).runOfflineCopy(settings, context, lazyKey(flags));
      }),
  );
}
