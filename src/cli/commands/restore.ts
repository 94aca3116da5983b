import type { Command } from "commander";
import type { CopyFlags } from "../options/backup-flags.js";
import { addRestoreOptions, parseRestoreSettings } from "../options/backup-options.js";
import { addKeyOptions, type KeyFlags, lazyKey } from "../options/repository-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addRestore(program: Command, run: RunCommand): void {
  const command = define(program, "restore", {
    summary: "write a backup, and what it builds on, to an image or a device",
    usage: "[options] BACKUP TARGET",
    notes:
      "A device and - (standard output) get the disk itself (raw), a file what its extension says, else BACKUP's format.\n" +
      "With - the disk goes to standard output in order, and messages to standard error. BACKUP may be - where standard\n" +
      "input is redirected from a file. Files of this name are ./-.",
    examples: [
      "cowcatcher restore --force --verify /backup/vm1.qcow2 /dev/vg/vm1",
      "cowcatcher restore /backup/vm1.qcow2 - | ssh host 'dd of=/dev/vg/vm1 bs=1M'",
      "cowcatcher restore /backup::vm1/root@2026-11-28 disk.img",
    ],
  })
    .argument("<BACKUP>", "path of the backup, an NBD URI, an RBD image, or REPO::GROUP[/DISK][@TIME]")
    .argument(
      "<TARGET>",
      "path of the image or device to write, an NBD URI or an RBD image (see backup --help)",
    );
  addCommonOptions(addKeyOptions(addRestoreOptions(command))).action(
    (backup: string, target: string, flags: CopyFlags & KeyFlags & CommonFlags) =>
      run("restore", flags, async (context) => {
        const settings = parseRestoreSettings([backup, target], flags);
        return (await import("../actions/restore.js")).runRestore(settings, lazyKey(flags), context);
      }),
  );
}
