// The commands: arguments, options, help. What a command does is in a module of its own, loaded when it is run,
// so that `--help` and `serve` start without the engines that they do not need.
import { Option, type Command } from "commander";
import { DEFAULT_LOG_LEVEL, LOG_LEVELS, type LogLevel } from "../log-levels.js";
import {
  addBackupOptions,
  addRestoreOptions,
  parseBackupSettings,
  parseRestoreSettings,
  type BackupFlags,
  type CopyFlags,
} from "./backup-options.js";
import { addBenchOptions, parseBenchSettings, type BenchFlags } from "./bench-options.js";
import type { CompareFlags } from "./compare.js";
import type { CommandContext } from "./context.js";
import type { CreateFlags } from "./create.js";
import { exitCodesHelp, type CommandName } from "./exit-codes.js";
import type { InfoFlags } from "./info.js";
import type { MapFlags } from "./map.js";
import type { CheckFlags } from "./check.js";
import {
  choiceOption,
  forceShareOption,
  formatOption,
  parseImage,
  parseLocalImage,
  sizeOption,
  textOption,
} from "./options.js";
import { addServeOptions, parseServeSettings, type Environment, type ServeFlags } from "./serve-options.js";

/** The options that every command takes. */
export interface CommonFlags {
  json?: boolean;
  logFile?: string;
  logLevel?: LogLevel;
  quiet?: boolean;
  progress?: boolean;
}

/** Runs a command's body with its context and keeps its exit code. */
export type RunCommand = (
  command: CommandName,
  flags: CommonFlags,
  body: (context: CommandContext) => Promise<number>,
) => Promise<void>;

interface CommandHelp {
  summary: string;
  usage: string;
  /** Further text, such as what it does not do. */
  notes?: string;
  examples: readonly string[];
}

const ADD_COMMAND: Record<
  CommandName,
  (program: Command, run: RunCommand, environment: Environment) => void
> = {
  backup: addBackup,
  serve: addServe,
  jobs: addJobs,
  restore: addRestore,
  info: addInfo,
  map: addMap,
  check: addCheck,
  compare: addCompare,
  create: addCreate,
  bench: addBench,
};

/** @param only the one that is asked for: to build what all of them take costs a start more than to run it */
export function addCommands(
  program: Command,
  run: RunCommand,
  environment: Environment,
  only?: CommandName,
): void {
  if (only !== undefined) return ADD_COMMAND[only](program, run, environment);
  for (const add of Object.values(ADD_COMMAND)) add(program, run, environment);
}

function define(program: Command, name: CommandName, help: CommandHelp): Command {
  const examples = ["Examples:", ...help.examples.map((line) => `  ${line}`)].join("\n");
  const notes = help.notes === undefined ? "" : `${help.notes}\n\n`;
  return program
    .command(name)
    .summary(help.summary)
    .description(help.summary)
    .usage(help.usage)
    .addHelpText("after", `\n${notes}${exitCodesHelp(name)}\n\n${examples}`);
}

function addCommonOptions(command: Command): Command {
  return command
    .option("--json", "results, progress and errors as JSON on stdout")
    .addOption(new Option("-p, --progress", "report progress, on a terminal or not"))
    .option("--no-progress", "report no progress")
    .option("-q, --quiet", "nothing but errors and what was asked for")
    .addOption(textOption("--log-file <FILE>", "append the log to FILE (stderr)"))
    .addOption(
      choiceOption("--log-level <LEVEL>", `${LOG_LEVELS.join(", ")} (${DEFAULT_LOG_LEVEL})`, LOG_LEVELS),
    );
}

const NBD_NOTES =
  "NBD URIs: nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH; with nbds: for TLS,\n" +
  "and libnbd's tls-certificates=DIR, tls-psk-file=FILE, tls-hostname=NAME, tls-verify-peer=0. An export is raw. As a\n" +
  "TARGET it exists already, at least as large as the disk, and is written in place, as qemu-img convert -n does:\n" +
  "no --force is asked for, what a larger export has behind the disk's end stays, and a backup that fails or is\n" +
  "interrupted leaves a mixture of old and new there. A lost connection is made again: a source's up to 5 times, a\n" +
  "target's up to --target-retries times.\n" +
  "With --bitmap NAME a dirty bitmap of the qcow2 image or of QEMU's export says what is copied, into an overlay of\n" +
  "--backing-file; clearing the bitmap is QEMU's business. Not supported in this version: bitmaps of served disks.";

function addBackup(program: Command, run: RunCommand): void {
  const command = define(program, "backup", {
    summary: "point-in-time copy of an image, or of a disk that a guest is using",
    usage:
      "[options] SOURCE TARGET\n       cowcatcher backup [options] --control SOCK [--disk NAME]... TARGET...",
    notes:
      "SOURCE and TARGET are paths or NBD URIs; TARGET may be null:, which throws the data away. Without --control no one\n" +
      "else may write SOURCE. With it, the server that has the disk open makes the backup while the guest runs.\n" +
      "What is about the guest's writes (the buffer, the spill, --guest-timeout, --on-cbw-error) goes with it alone.\n" +
      "With --sync top the backup holds what SOURCE's own layer does, and builds on what SOURCE builds on (or on -b).\n" +
      "With --sync none nothing is copied: until the command is interrupted (SIGINT, SIGTERM: exit code 0) or the\n" +
      "job cancelled, the disk as it was at the start is a read-only export of the server called NAME-snapshot, for\n" +
      "nbdcopy or qemu-img to read. Old data stays in the buffer, then in the spill; TARGET is null:.\n" +
      NBD_NOTES,
    examples: [
      "cowcatcher backup -c disk.img /backup/disk.qcow2",
      "cowcatcher backup --control /run/vm1.ctl /backup/vm1.qcow2",
      "cowcatcher backup --control /run/vm1.ctl --disk root --disk data /backup/root.img /backup/data.img",
    ],
  }).argument("[ARGUMENTS...]", "SOURCE and TARGET, or with --control a TARGET for each disk");
  addCommonOptions(addBackupOptions(command)).action((args: string[], flags: BackupFlags & CommonFlags) =>
    run("backup", flags, async (context) => {
      const settings = parseBackupSettings(args, flags);
      if (flags.dryRun === true && settings.mode === "offline") {
        return (await import("./dry-run.js")).runDryRun(settings, context);
      }
      return (await import("./backup.js")).runBackup(settings, context);
    }),
  );
}

function addServe(program: Command, run: RunCommand, environment: Environment): void {
  const command = define(program, "serve", {
    summary: "serve images to a guest over NBD, ready for backups",
    usage: "[options] IMAGE[=NAME]...",
    notes:
      "Prints one line with `listening` when it is ready. SIGINT and SIGTERM finish what is in flight, flush and\n" +
      "exit; a second one exits at once. Without --socket and --port the sockets of systemd's LISTEN_FDS are used.\n" +
      "With --snapshot-export each running backup of NAME comes with a read-only export NAME-snapshot, the disk as\n" +
      "the backup sees it. It has a buffer and a spill of its own, of the job's sizes; when they do not suffice,\n" +
      "reading it fails, and the backup goes on.\n" +
      "With TLS, which is required of every client or off, a folder of certificates is laid out as for qemu-nbd.\n" +
      "--bitmap looks in the backing files, too; what cowcatcher itself opens for writing it marks as out of date.\n" +
      "IMAGE may be an NBD URI; a live backup of it needs a server that is fit for several connections.",
    examples: [
      "cowcatcher serve --socket /run/vm1.nbd --control /run/vm1.ctl disk.qcow2",
      "cowcatcher serve --port 10809 --control /run/vm1.ctl root.qcow2=root data.img=data",
      "cowcatcher serve --port 10809 --bind 0.0.0.0 --tls-certificates /etc/pki/vm1 --tls-verify-peer disk.qcow2",
    ],
  }).argument("<IMAGE...>", "image, and the name of its export: IMAGE=NAME");
  addCommonOptions(addServeOptions(command)).action((images: string[], flags: ServeFlags & CommonFlags) =>
    run("serve", flags, async (context) => {
      const settings = parseServeSettings(images, flags, environment, process.pid);
      return (await import("./serve.js")).runServe(settings, context);
    }),
  );
}

function addJobs(program: Command, run: RunCommand): void {
  const command = define(program, "jobs", {
    summary: "list the jobs of a server, or cancel, pause, resume, slow down one",
    usage:
      "--control SOCK\n       cowcatcher jobs cancel|pause|resume ID --control SOCK\n       cowcatcher jobs set-speed ID SIZE --control SOCK",
    examples: [
      "cowcatcher jobs --control /run/vm1.ctl",
      "cowcatcher jobs cancel backup-root --control /run/vm1.ctl",
      "cowcatcher jobs set-speed backup-root 50M --control /run/vm1.ctl",
    ],
  })
    .argument("[ACTION]", "cancel, pause, resume or set-speed (list the jobs)")
    .argument("[ID]", "the job")
    .argument("[SIZE]", "for set-speed: bytes a second, 0 for no limit")
    .addOption(textOption("--control <SOCK>", "control socket of the server").makeOptionMandatory());
  addCommonOptions(command).action(
    (
      action: string | undefined,
      id: string | undefined,
      speed: string | undefined,
      flags: { control: string } & CommonFlags,
    ) =>
      run("jobs", flags, async (context) => {
        const jobs = await import("./jobs.js");
        return jobs.runJobs(jobs.parseJobsRequest(action, id, speed), flags.control, context);
      }),
  );
}

function addRestore(program: Command, run: RunCommand): void {
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
        return (await import("./restore.js")).runRestore(settings, context);
      }),
  );
}

function addInfo(program: Command, run: RunCommand): void {
  const command = define(program, "info", {
    summary: "what an image is, as qemu-img info",
    usage: "[options] IMAGE",
    examples: ["cowcatcher info disk.qcow2", "cowcatcher info --json --backing-chain -U disk.qcow2"],
  })
    .argument("<IMAGE>", "path of the image, or an NBD URI")
    .addOption(formatOption("-f, --format <FMT>", "raw or qcow2 (probed)"))
    .addOption(forceShareOption())
    .option("--backing-chain", "describe the backing files as well");
  addCommonOptions(command).action((image: string, flags: InfoFlags & CommonFlags) =>
    run("info", flags, async (context) => {
      const path = parseImage(image);
      return (await import("./info.js")).runInfo(path, flags, context);
    }),
  );
}

function addMap(program: Command, run: RunCommand): void {
  const command = define(program, "map", {
    summary: "which ranges of an image hold data, and where, as qemu-img map",
    usage: "[options] IMAGE",
    examples: [
      "cowcatcher map disk.qcow2",
      "cowcatcher map --json --start-offset 1G --max-length 64M disk.qcow2",
    ],
  })
    .argument("<IMAGE>", "path of the image, or an NBD URI")
    .addOption(formatOption("-f, --format <FMT>", "raw or qcow2 (probed)"))
    .addOption(forceShareOption())
    .addOption(sizeOption("-s, --start-offset <SIZE>", "where to begin (0)"))
    .addOption(sizeOption("-l, --max-length <SIZE>", "how much to show (the rest of the disk)"))
    .addOption(textOption("--snapshot <NAME>", "internal snapshot, by id or name: the disk as of it"));
  addCommonOptions(command).action((image: string, flags: MapFlags & CommonFlags) =>
    run("map", flags, async (context) => {
      const path = parseImage(image);
      return (await import("./map.js")).runMap(path, flags, context);
    }),
  );
}

function addCheck(program: Command, run: RunCommand): void {
  const command = define(program, "check", {
    summary: "check a qcow2 image's metadata and repair it, as qemu-img check",
    usage: "[options] IMAGE",
    notes:
      "Without --repair it never writes. The codes are for what is left after a repair. Internal snapshots are never\n" +
      "discarded, and references that lead nowhere are left as they are.",
    examples: [
      "cowcatcher check disk.qcow2",
      "cowcatcher check --repair disk.qcow2",
      "cowcatcher check --repair leaks --json -f qcow2 disk.qcow2",
    ],
  })
    .argument("[IMAGE]", "path of the image")
    .addOption(formatOption("-f, --format <FMT>", "qcow2 (probed)"))
    .addOption(forceShareOption())
    .option("-r, --repair [WHAT]", "repair leaks only, or all that can be (all)");
  addCommonOptions(command).action((image: string | undefined, flags: CheckFlags & CommonFlags) =>
    run("check", flags, async (context) => {
      const { parseCheckRequest, runCheck } = await import("./check.js");
      return runCheck(parseCheckRequest(image, flags), flags, context);
    }),
  );
}

function addCompare(program: Command, run: RunCommand): void {
  const command = define(program, "compare", {
    summary: "whether two images have the same content, as qemu-img compare",
    usage: "[options] A B",
    examples: [
      "cowcatcher compare disk.qcow2 /backup/disk.qcow2",
      "cowcatcher compare -f raw -F qcow2 a.img b.qcow2",
    ],
  })
    .argument("<A>", "path of the first image, or an NBD URI")
    .argument("<B>", "path of the second image, or an NBD URI")
    .addOption(formatOption("-f, --format <FMT>", "of A: raw or qcow2 (probed)"))
    .addOption(formatOption("-F, --format2 <FMT>", "of B: raw or qcow2 (probed)"))
    .addOption(forceShareOption())
    .option("-s, --strict", "different sizes and allocation are differences, too")
    .addOption(textOption("--snapshot <NAME>", "internal snapshot of A, by id or name: the disk as of it"));
  addCommonOptions(command).action((a: string, b: string, flags: CompareFlags & CommonFlags) =>
    run("compare", flags, async (context) => {
      const paths = [parseImage(a, "A"), parseImage(b, "B")] as const;
      return (await import("./compare.js")).runCompare(...paths, flags, context);
    }),
  );
}

function addCreate(program: Command, run: RunCommand): void {
  const command = define(program, "create", {
    summary: "create an empty image, as qemu-img create",
    usage: "[options] IMAGE SIZE",
    notes: "SIZE may be left out with a backing file: it is the backing file's then.",
    examples: [
      "cowcatcher create -f qcow2 disk.qcow2 20G",
      "cowcatcher create -f qcow2 -o cluster_size=128K,extended_l2=on disk.qcow2 20G",
      "cowcatcher create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
    ],
  })
    .argument("<IMAGE>", "path of the image")
    .argument("[SIZE]", "size of the disk")
    .addOption(formatOption("-f, --format <FMT>", "raw or qcow2 (by IMAGE's extension, else raw)"))
    .addOption(textOption("-b, --backing-file <FILE>", "backing file"))
    .addOption(formatOption("-F, --backing-format <FMT>", "format of the backing file: raw or qcow2"))
    .option("-o, --options <NAME=VALUE,...>", "options of the format", (text: string, earlier?: string) =>
      earlier === undefined ? text : `${earlier},${text}`,
    );
  addCommonOptions(command).action(
    (image: string, size: string | undefined, flags: CreateFlags & CommonFlags) =>
      run("create", flags, async (context) => {
        const path = parseLocalImage(image);
        return (await import("./create.js")).runCreate(path, size, flags, context);
      }),
  );
}

function addBench(program: Command, run: RunCommand): void {
  const command = define(program, "bench", {
    summary: "measure a guest's writes with no backup, an unbuffered and a buffered one",
    usage: "[options]",
    notes:
      "Makes a test disk, serves it to a guest of its own that writes at random places, and backs it up meanwhile.\n" +
      "Everything that it makes is removed. The figures are of one run: for a fair comparison, run it several times.",
    examples: [
      "cowcatcher bench --dir /var/lib/vm",
      "cowcatcher bench --dir /var/lib/vm --target /mnt/backup/test.qcow2 --rate-limit 0",
      "cowcatcher bench --json --size 4G -f qcow2 --block-size 4K --iodepth 32 --runtime 10s",
    ],
  });
  addCommonOptions(addBenchOptions(command)).action((flags: BenchFlags & CommonFlags) =>
    run("bench", flags, async (context) => {
      const settings = parseBenchSettings(flags);
      return (await import("./bench.js")).runBench(settings, context);
    }),
  );
}
