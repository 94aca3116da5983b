// The limits of this process (setrlimit(2)), which errors name. To read them takes a descriptor, so they are read when
// this module is loaded (20 µs): when there are no descriptors left it is too late. Any thread.

import { readFileSync } from "node:fs";

let known = readLimits() ?? "";

/** The line of /proc/self/limits begins with it. */
export type LimitName = "Max open files" | "Max file size" | "Max processes";

/** Its soft limit, which the kernel holds the process to; undefined: none, or the system does not say. */
export function processLimit(name: LimitName): number | undefined {
  // Whoever has the right to may have changed it since.
  known = readLimits() ?? known;
  const line = known.split("\n").find((text) => text.startsWith(name));
  const soft = /^\s+(\d+)\s/.exec(line?.slice(name.length) ?? "")?.[1];
  return soft === undefined ? undefined : Number(soft);
}

function readLimits(): string | undefined {
  try {
    return readFileSync("/proc/self/limits", "utf8");
  } catch {
    return undefined;
  }
}
