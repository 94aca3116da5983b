// `mount`: a backup's disk as a file in a folder, read-only, until the command is ended. nbdfuse starts `serve --read-only`
// by socket activation, and ends it.
import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { CowcatcherError } from "../../errors.js";
import { absoluteName, systemName } from "../../file-names.js";
import { openAnyImage } from "../../repository/open.js";
import { isBackupAddress, parseBackupAddress } from "../../repository/address.js";
import { type KeyFlags, lazyKey } from "../options/repository-options.js";
import { usageError } from "../options/options.js";
import { type CommandContext, printJsonLine, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { onInterrupt } from "../signals.js";
import { findProgram, Helper, serveArguments } from "./helper-programs.js";

const LOOK_MS = 50;

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export async function runMount(
  backup: string,
  folder: string,
  flags: KeyFlags,
  context: CommandContext,
): Promise<number> {
  const point = absoluteName(folder);
  if (statSync(systemName(point), { throwIfNoEntry: false })?.isDirectory() !== true)
    throw usageError(folder, "is no folder", "make it first");
  const file = join(point, `${await diskNameOf(backup, flags)}.raw`);
  const nbdfuse = findProgram("nbdfuse");
  if (nbdfuse === undefined) throw notInstalled();
  const server = ["[", process.execPath, ...serveArguments(backup, flags), "]"];
  const program = new Helper(nbdfuse, ["-r", file, ...server]);
  const removeHandlers = onInterrupt(context, { onFirst: () => unmount(point, program) });
  try {
    while (!isMounted(point)) {
      if (program.isOver) throw program.failure();
      await delay(LOOK_MS);
    }
    announce(point, file, context);
    await program.ended;
    return EXIT.done;
  } finally {
    removeHandlers();
    await unmount(point, program);
  }
}

/** That it can be read, and with this key, is to be known before anything is mounted. @throws CowcatcherError */
async function diskNameOf(backup: string, flags: KeyFlags): Promise<string> {
  const image = await openAnyImage(backup, { readOnly: true, repositoryKey: lazyKey(flags) });
  await image.close();
  return isBackupAddress(backup) ? (parseBackupAddress(backup).disk ?? "disk") : "disk";
}

function announce(point: string, file: string, { output }: CommandContext): void {
  if (output.json) printJsonLine(output, { message_type: "mounted", folder: point, path: file });
  else if (!output.quiet)
    printLine(output, `${file}: the disk, read-only, until SIGINT, SIGTERM or fusermount -u ${point}`);
}

/** proc(5), mountinfo: the fifth field, in which blanks are octal. */
function isMounted(point: string): boolean {
  const escaped = point.replace(
    /[ \t\n\\]/g,
    (char) => `\\${char.charCodeAt(0).toString(8).padStart(3, "0")}`,
  );
  return readFileSync("/proc/self/mountinfo", "utf8")
    .split("\n")
    .some((line) => line.split(" ")[4] === escaped);
}

/** Lazily, as somebody may stand in it; then the program ends. Never rejects. */
async function unmount(point: string, program: Helper): Promise<void> {
  const fusermount = ["fusermount3", "fusermount"].map(findProgram).find((path) => path !== undefined);
  if (fusermount !== undefined && isMounted(point)) {
    await new Helper(fusermount, ["-u", "-z", point]).ended.catch(() => undefined);
  }
  await program.end();
}

function notInstalled(): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object: "mount",
    problem: "nbdfuse is not installed",
    hint: "install it (Debian's libnbd-bin or nbdfuse); or serve --read-only the backup, or restore it",
  });
}
