import type { Command } from "commander";
import { addServeOptions, parseServeSettings, type ServeFlags } from "../options/serve-options.js";
import type { Environment } from "../output/context.js";
import { addKeyOptions, type KeyFlags, lazyKey } from "../options/repository-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addServe(program: Command, run: RunCommand, environment: Environment): void {
  const command = define(program, "serve", {
    summary: "serve images to a guest over NBD, ready for backups",
    usage: "[options] IMAGE[=NAME]...",
    notes:
      "Prints one line with `listening` when it is ready. SIGINT and SIGTERM finish what is in flight, flush and\n" +
      "exit; a second one exits at once. SIGHUP opens --log-file anew; no other signal ends a server in good order.\n" +
      "Without --socket and --port the sockets of systemd's LISTEN_FDS are used.\n" +
      "The server writes the targets and the spill files of its backups, with its own user's rights; whoever reaches the\n" +
      "control socket (--control-mode, --control-group; else the server's user and root) makes it do so.\n" +
      "With --snapshot-export each running backup of NAME comes with a read-only export NAME-snapshot, the disk as\n" +
      "the backup sees it. It has a buffer and a spill of its own, of the job's sizes; when they do not suffice,\n" +
      "reading it fails, and the backup goes on.\n" +
      "With TLS, which is required of every client or off, a folder of certificates is laid out as for qemu-nbd.\n" +
      "--bitmap looks in the backing files, too; what cowcatcher itself opens for writing it marks as out of date.\n" +
      "IMAGE may be an NBD URI; a live backup of it needs a server that is fit for several connections.\n" +
      "With --read-only it may be a backup, REPO::GROUP[/DISK][@TIME]: with an overlay on such an export a machine starts\n" +
      "at once, and the backup stays as it is.",
    examples: [
      "cowcatcher serve --socket /run/vm1.nbd --control /run/vm1.ctl disk.qcow2",
      "cowcatcher serve --port 10809 --control /run/vm1.ctl root.qcow2=root data.img=data",
      "cowcatcher serve --port 10809 --bind 0.0.0.0 --tls-certificates /etc/pki/vm1 --tls-verify-peer disk.qcow2",
    ],
  }).argument("<IMAGE...>", "image, and the name of its export: IMAGE=NAME");
  addCommonOptions(addKeyOptions(addServeOptions(command))).action(
    (images: string[], flags: ServeFlags & KeyFlags & CommonFlags) =>
      run("serve", flags, async (context) => {
        const settings = parseServeSettings(images, flags, environment, process.pid);
        return (await import("../actions/serve.js")).runServe(settings, context, lazyKey(flags));
      }),
  );
}
