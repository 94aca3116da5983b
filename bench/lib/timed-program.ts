// A program, how long it took, and its peak of memory: the largest resident set (VmHWM, looked at every few milliseconds).

import { readFileSync } from "node:fs";
import { Child, childError, runProgram } from "./children.js";
import { COWCATCHER_BIN } from "./cowcatcher.js";

const LOOK_MS = 5;

export interface Run {
  program: string;
  args: readonly string[];
  cwd?: string;
}

export interface Taken {
  seconds: number;
  peakBytes: number;
}

export function ours(...args: string[]): Run {
  return { program: process.execPath, args: [COWCATCHER_BIN, ...args] };
}

/** @param sync a file that is synced within the time. @throws Error unless it ends with 0 */
export async function timed(
  { program, args, cwd }: Run,
  env: Record<string, string>,
  sync?: string,
): Promise<Taken> {
  const startMs = performance.now();
  const child = new Child(program, program, args, { env: { ...process.env, ...env }, cwd });
  let peakBytes = 0;
  const timer = setInterval(() => (peakBytes = Math.max(peakBytes, peakOf(child.process.pid))), LOOK_MS);
  const { code } = await child.ended;
  clearInterval(timer);
  if (code !== 0) throw childError(child, `exit code ${code}`);
  if (sync !== undefined) await runProgram("sync", ["-d", sync]);
  return { seconds: (performance.now() - startMs) / 1000, peakBytes };
}

export function peakOf(pid: number | undefined): number {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "utf8");
    return Number(/VmHWM:\s*(\d+) kB/.exec(status)?.[1] ?? 0) * 1024;
  } catch {
    return 0;
  }
}
