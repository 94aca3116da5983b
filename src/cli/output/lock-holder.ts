// Who holds the lock that a command met: the process, and what to do about it.
//
// QEMU's image locks belong to open files, so the kernel names no process for them in /proc/locks; but each process that
// has the file open shows the lock among that descriptor's (proc(5), fdinfo). What other users' processes have open only
// root may look at; then nothing is added. Bounded, as a machine may have many processes. In the command's own process
// alone: a server has a guest to serve.
import { readdirSync, readFileSync, statSync, type Stats } from "node:fs";
import { systemName } from "../../file-names.js";
import { CowcatcherError } from "../../errors.js";
import type { CommandName } from "./exit-codes.js";

const SEARCH_MS_MAX = 2_000;
/** The commands that take -U. */
const READING: readonly (CommandName | undefined)[] = ["info", "map", "check", "compare"];

export interface Holder {
  pid: number;
  /** Its command line. */
  words: readonly string[];
}

/** The error with its holder named, where it is about a lock and the holder can be found. */
export function withLockHolder(error: CowcatcherError, command: CommandName | undefined): CowcatcherError {
  if (error.code !== "LOCKED") return error;
  const stats = statSync(systemName(error.object), { throwIfNoEntry: false });
  const holder = stats === undefined ? undefined : findHolder(stats);
  const hint = hintFor(holder, command);
  if (holder === undefined && hint === undefined) return error;
  const who = holder === undefined ? "" : `${programOf(holder)}, process ${holder.pid}, uses it: `;
  return new CowcatcherError({
    ...error.toDetails(),
    problem: `${who}${error.problem}`,
    hint: hint ?? error.hint,
    cause: error,
  });
}

function hintFor(holder: Holder | undefined, command: CommandName | undefined): string | undefined {
  const control = holder === undefined ? undefined : controlSocketOf(holder);
  if (command === "backup" && control !== undefined)
    return `back it up while it is used: --control ${control}`;
  if (READING.includes(command)) return "-U opens it all the same: it may change meanwhile";
  return holder === undefined ? undefined : "end that program first, or choose another image";
}

/** "cowcatcher serve", "qemu-system-x86_64". */
function programOf({ words }: Holder): string {
  const base = (words[0] ?? "").replace(/^.*\//, "");
  const isOurs = words.some((word) => /(^|\/)cowcatcher$|cli\/main\.js$/.test(word));
  return isOurs && words.includes("serve") ? "cowcatcher serve" : base || "a program";
}

function controlSocketOf({ words }: Holder): string | undefined {
  if (!words.includes("serve")) return undefined;
  const at = words.indexOf("--control");
  return at < 0
    ? words.find((word) => word.startsWith("--control="))?.slice("--control=".length)
    : words[at + 1];
}

/** The first process but this one that has a lock on the file. */
export function findHolder({ dev, ino }: Pick<Stats, "dev" | "ino">): Holder | undefined {
  const endMs = performance.now() + SEARCH_MS_MAX;
  for (const pid of numbersIn("/proc")) {
    if (pid === process.pid) continue;
    for (const fd of numbersIn(`/proc/${pid}/fdinfo`)) {
      if (performance.now() > endMs) return undefined;
      if (holdsLock(pid, fd, ino) && isFile(`/proc/${pid}/fd/${fd}`, dev, ino)) {
        return { pid, words: commandLineOf(pid) };
      }
    }
  }
  return undefined;
}

/** lock: 1: OFDLCK ADVISORY READ -1 08:01:1234 100 100 */
function holdsLock(pid: number, fd: number, ino: number): boolean {
  try {
    return new RegExp(`^lock:.*:${ino} `, "m").test(readFileSync(`/proc/${pid}/fdinfo/${fd}`, "utf8"));
  } catch {
    return false;
  }
}

function isFile(path: string, dev: number, ino: number): boolean {
  try {
    const stats = statSync(path);
    return stats.dev === dev && stats.ino === ino;
  } catch {
    return false;
  }
}

function commandLineOf(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0").slice(0, -1);
  } catch {
    return [];
  }
}

function numbersIn(folder: string): number[] {
  try {
    return readdirSync(folder).map(Number).filter(Number.isInteger);
  } catch {
    return [];
  }
}
