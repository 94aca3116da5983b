// How much memory the system has, and how much of it can be had now: of the machine, or less where a control group
// (a container, a systemd unit with MemoryMax=) allows less. What the kernel would give back if asked, such as the
// page cache, counts as free. proc_meminfo(5); the kernel's Documentation/admin-guide/cgroup-v2.rst.

import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { totalmem } from "node:os";
import { KiB } from "../units.js";

export interface SystemMemory {
  totalBytes: number;
  /** Undefined: the system does not say. */
  availableBytes: number | undefined;
  /** Swap that nothing uses yet: memory of a kind, and far too slow for a buffer. */
  freeSwapBytes: number;
}

const CGROUP_ROOT = "/sys/fs/cgroup";
/** Groups within groups; each may have a limit. */
const MAX_CGROUP_DEPTH = 32;

/** @param root in front of the files' paths; for tests. Never throws. */
export function systemMemory(root = ""): SystemMemory {
  const meminfo = readText(`${root}/proc/meminfo`) ?? "";
  let totalBytes = kibibytes(meminfo, "MemTotal") ?? totalmem();
  let availableBytes = kibibytes(meminfo, "MemAvailable");
  for (const { maxBytes, freeBytes } of cgroupLimits(root)) {
    totalBytes = Math.min(totalBytes, maxBytes);
    availableBytes = Math.min(availableBytes ?? Infinity, freeBytes);
  }
  return { totalBytes, availableBytes, freeSwapBytes: kibibytes(meminfo, "SwapFree") ?? 0 };
}

function kibibytes(meminfo: string, name: string): number | undefined {
  const match = new RegExp(`^${name}:\\s*(\\d+) kB$`, "m").exec(meminfo);
  return match === null ? undefined : Number(match[1]) * KiB;
}

interface CgroupLimit {
  maxBytes: number;
  freeBytes: number;
}

function cgroupLimits(root: string): CgroupLimit[] {
  const own = /^0::(\/.*)$/m.exec(readText(`${root}/proc/self/cgroup`) ?? "")?.[1];
  const limits: CgroupLimit[] = [];
  if (own === undefined) return limits;
  for (let path = own, depth = 0; depth < MAX_CGROUP_DEPTH; depth++) {
    const limit = cgroupLimit(join(`${root}${CGROUP_ROOT}`, path));
    if (limit !== undefined) limits.push(limit);
    if (path === "/") break;
    path = dirname(path);
  }
  return limits;
}

function cgroupLimit(folder: string): CgroupLimit | undefined {
  const maxBytes = number(readText(join(folder, "memory.max")));
  const usedBytes = number(readText(join(folder, "memory.current")));
  if (maxBytes === undefined || usedBytes === undefined) return undefined;
  const stat = readText(join(folder, "memory.stat")) ?? "";
  const cacheBytes = ["inactive_file", "active_file"]
    .map((name) => number(new RegExp(`^${name} (\\d+)$`, "m").exec(stat)?.[1]) ?? 0)
    .reduce((sum, bytes) => sum + bytes, 0);
  return { maxBytes, freeBytes: Math.max(0, maxBytes - usedBytes + cacheBytes) };
}

/** "max", a file that is not there, and whatever else is no number: undefined. */
function number(text: string | undefined): number | undefined {
  return text !== undefined && /^\d+\s*$/.test(text) ? Number(text) : undefined;
}

function readText(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined;
  }
}
