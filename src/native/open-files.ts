// How many descriptors the process may have open: RLIMIT_NOFILE, which Node raises to its hard limit at the start.

import { readFileSync } from "node:fs";

/**
 * Any thread; reads a file of /proc, so not on a hot path. Infinity where the system does not say.
 * @param root in front of the file's path; for tests
 */
export function openFileLimit(root = ""): number {
  try {
    const limits = readFileSync(`${root}/proc/self/limits`, "utf8");
    const soft = /^Max open files\s+(\d+)/m.exec(limits)?.[1];
    return soft === undefined ? Infinity : Number(soft);
  } catch {
    return Infinity;
  }
}
