// Whether this process may write to its terminal: a shell's job in the background would draw over the prompt.
import { readFileSync } from "node:fs";

/** True without a controlling terminal, or where the system does not tell. */
export function isInForeground(): boolean {
  try {
    return isForegroundStat(readFileSync("/proc/self/stat", "utf8"));
  } catch {
    return true;
  }
}

/** By proc(5)'s stat: the process group and the terminal's foreground group. The name before them may hold anything. */
export function isForegroundStat(stat: string): boolean {
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  const processGroup = Number(fields[2]);
  const foregroundGroup = Number(fields[5]);
  return !(foregroundGroup > 0) || foregroundGroup === processGroup;
}
