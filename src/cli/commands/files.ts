import type { Command } from "commander";
import type { GuestFileFlags } from "../actions/guest-files.js";
import { parseImage } from "../options/options.js";
import { addKeyOptions } from "../options/repository-options.js";
import type { CommandName } from "../output/exit-codes.js";
import {
  addCommonOptions,
  type CommandHelp,
  type CommonFlags,
  define,
  type RunCommand,
} from "./definition.js";

const BACKUP = "path of the backup, an NBD URI, an RBD image, or REPO::GROUP[/DISK][@TIME]";
const NOTES =
  "By libguestfs (guestfish), which reads the disk in a small virtual machine, never by this machine's kernel; its start takes\n" +
  "seconds with KVM, and minutes without. The guest's file systems are found where it mounts them; of a disk without a\n" +
  "system the only file system is taken, or the one that --filesystem names.";

type Flags = GuestFileFlags & CommonFlags;

export function addLs(program: Command, run: RunCommand): void {
  const help = {
    summary: "list files of the guest's in a backup",
    usage: "[options] BACKUP [PATH]",
    notes: NOTES,
    examples: [
      "cowcatcher ls /backup/repo::vm1@latest /etc",
      "cowcatcher ls -l --filesystem /dev/sda2 vm1.qcow2",
    ],
  };
  const command = defineForFiles(program, "ls", help)
    .argument("[PATH]", "a folder or file of the guest's", "/")
    .option("-l, --long", "with type, mode, owner, size and time");
  command.action((backup: string, path: string, flags: Flags & { long?: boolean }) =>
    run("ls", flags, async (context) => {
      const image = parseImage(backup, "BACKUP");
      return (await import("../actions/guest-files.js")).runLs(image, path, flags, context);
    }),
  );
}

export function addCat(program: Command, run: RunCommand): void {
  const help = {
    summary: "print files of the guest's in a backup",
    usage: "[options] BACKUP PATH…",
    notes: NOTES,
    examples: ["cowcatcher cat /backup/repo::vm1@2026-11-28 /etc/fstab"],
  };
  const command = defineForFiles(program, "cat", help).argument("<PATH...>", "files of the guest's");
  command.action((backup: string, paths: string[], flags: Flags) =>
    run("cat", flags, async (context) => {
      const image = parseImage(backup, "BACKUP");
      return (await import("../actions/guest-files.js")).runCat(image, paths, flags, context);
    }),
  );
}

export function addCp(program: Command, run: RunCommand): void {
  const help = {
    summary: "copy files and folders of the guest's out of a backup",
    usage: "[options] BACKUP PATH… DIR",
    notes: `Folders with all that is in them. One file may get a name of its own in place of DIR.\n\n${NOTES}`,
    examples: [
      "cowcatcher cp /backup/repo::vm1@latest /etc /home/ann .",
      "cowcatcher cp vm1.qcow2 /etc/passwd passwd.yesterday",
    ],
  };
  const command = defineForFiles(program, "cp", help)
    .argument("<PATH>", "files and folders of the guest's")
    .argument("<DIR...>", "where they go: a folder that is there");
  command.action((backup: string, first: string, others: string[], flags: Flags) =>
    run("cp", flags, async (context) => {
      const image = parseImage(backup, "BACKUP");
      return (await import("../actions/guest-files.js")).runCp(image, [first, ...others], flags, context);
    }),
  );
}

function defineForFiles(program: Command, name: CommandName, help: CommandHelp): Command {
  const command = define(program, name, help)
    .argument("<BACKUP>", BACKUP)
    .option("--filesystem <DEVICE>", "libguestfs's name of the file system to look into, as /dev/sda1");
  return addCommonOptions(addKeyOptions(command));
}
