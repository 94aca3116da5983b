// What we call things in somebody else's QEMU. Each name says whose it is, so that a run that died can be told from one
// that goes on, and everything else stays untouched.
//
//   cowcatcher-PID.START             a run: our process's id, and its start time in nine hexadecimal digits
//   cowcatcher-PID.STARTrN           its thing of role r (a letter) for the disk number N
//
// A process id alone comes again; with the time at which the kernel started the process it does not. The form is strict,
// as what has it and belongs to no process is removed. QEMU takes node names of 31 characters
// (include/block/block.h), and of letters, digits, "-", "." and "_" (util/id.c).

import { readFileSync } from "node:fs";

/** Clock ticks of 20 years. */
const START_DIGITS = 9;
const RUN_PATTERN = /^cowcatcher-([1-9]\d{0,6})\.([0-9a-f]{9})(?=$|[a-z]\d{1,2}$)/;
/** Field 22 of /proc/PID/stat, counted after the command's name, which may hold blanks. */
const START_TIME_FIELD = 19;

/** What a bitmap of a run is the heir of: another bitmap, or none. */
const BITMAP_PATTERN =
  /^(cowcatcher-[1-9]\d{0,6}\.[0-9a-f]{9})b\d{1,2}\.(new|cowcatcher-bitmap-[0-9a-f]{16}(?:-[0-9a-f]{16})?)$/;
const NO_HEIR = "new";

/** What a node, an export or a job of ours is for. */
export type Role = "fleece" | "cbw" | "snap" | "exp" | "nbd" | "job";

const SHORT: Record<Role, string> = { fleece: "f", cbw: "c", snap: "s", exp: "e", nbd: "n", job: "j" };

/** The name of this process's runs, also of the folder that holds their files. */
export function runName(): string {
  return nameOfProcess(process.pid, startTimeOf(process.pid) ?? 0);
}

function nameOfProcess(pid: number, startTime: number): string {
  return `cowcatcher-${pid}.${startTime.toString(16).padStart(START_DIGITS, "0")}`;
}

export function partName(run: string, disk: number, role: Role): string {
  return `${run}${SHORT[role]}${disk}`;
}

/** Of the bitmap that records while a run makes a backup; it says which one it is the heir of. (QEMU takes 1023 bytes.) */
export function bitmapWorkName(run: string, disk: number, old: string | undefined): string {
  return `${run}b${disk}.${old ?? NO_HEIR}`;
}

/** The run and the older bitmap of such a name; undefined: it is none. */
export function readBitmapWorkName(name: string): { run: string; old: string | undefined } | undefined {
  const [, run, old] = BITMAP_PATTERN.exec(name) ?? [];
  if (run === undefined) return undefined;
  return { run, old: old === NO_HEIR ? undefined : old };
}

/** The run that something belongs to by its name; undefined: it is nothing that a run leaves. */
export function runOf(name: string): string | undefined {
  return RUN_PATTERN.exec(name)?.[0];
}

/** Whether the process that gave the name still runs. On another machine, or in another container, it does not. */
export function isAlive(run: string): boolean {
  const [, pid, startTime] = RUN_PATTERN.exec(run) ?? [];
  if (pid === undefined || startTime === undefined) return false;
  return startTimeOf(Number(pid)) === Number.parseInt(startTime, 16);
}

/** In clock ticks since the machine started; undefined where no such process is. */
function startTimeOf(pid: number): number | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "latin1");
    return Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[START_TIME_FIELD]);
  } catch {
    return undefined;
  }
}
