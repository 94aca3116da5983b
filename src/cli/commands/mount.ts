import type { Command } from "commander";
import { parseImage } from "../options/options.js";
import { addKeyOptions, type KeyFlags } from "../options/repository-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addMount(program: Command, run: RunCommand): void {
  const command = define(program, "mount", {
    summary: "show a backup's disk as a file in a folder, read-only",
    usage: "[options] BACKUP DIR",
    notes:
      "By libnbd's nbdfuse. DIR has one file, DISK.raw, of which only what is read is fetched: for a loop device\n" +
      "(mount -o ro,loop,offset=… DIR/DISK.raw), libguestfs or any other program. Runs until SIGINT, SIGTERM or\n" +
      "`fusermount -u DIR`, and leaves nothing mounted; killed, neither. For the guest's files themselves: ls, cat, cp.",
    examples: [
      "cowcatcher mount /backup/repo::vm1@latest /mnt/vm1",
      "cowcatcher mount /backup/repo::vm1/root@2026-11-28 /mnt/root",
    ],
  })
    .argument("<BACKUP>", "path of the backup, an NBD URI, an RBD image, or REPO::GROUP[/DISK][@TIME]")
    .argument("<DIR>", "an empty folder");
  addCommonOptions(addKeyOptions(command)).action(
    (backup: string, folder: string, flags: KeyFlags & CommonFlags) =>
      run("mount", flags, async (context) => {
        const image = parseImage(backup, "BACKUP");
        return (await import("../actions/mount.js")).runMount(image, folder, flags, context);
      }),
  );
}
