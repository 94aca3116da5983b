import type { Command } from "commander";
import type { CopyFlags } from "../options/backup-flags.js";
import { addRestoreOptions, parseRestoreSettings } from "../options/backup-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addRestore(program: Command, run: RunCommand): void {
  const command = define(program, "restore", {
    summary: "write a backup, and what it builds on, to an image or a device",
    usage: "[options] BACKUP TARGET",
    notes:
      "A TARGET without an extension, such as a device, gets BACKUP's format: give -O raw to restore a disk to a device.",
    examples: [
      "cowcatcher restore /backup/vm1.qcow2 disk.qcow2",
      "cowcatcher restore --force --verify /backup/vm1.qcow2 disk.img",
      "cowcatcher restore /backup/vm1.qcow2 nbds://host/disk",
    ],
  })
    .argument("<BACKUP>", "path of the backup, or an NBD URI")
    .argument("<TARGET>", "path of the image or device to write, or an NBD URI (see backup --help)");
  addCommonOptions(addRestoreOptions(command)).action(
    (backup: string, target: string, flags: CopyFlags & CommonFlags) =>
      run("restore", flags, async (context) => {
        const settings = parseRestoreSettings([backup, target], flags);
        return (await import("../actions/restore.js")).runRestore(settings, context);
      }),
  );
}
