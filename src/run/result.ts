// What a job's run has come to, in the words of `run --json` (docs/json.md).
import type { CowcatcherError } from "../errors.js";

export type LineLevel = "error" | "warning" | "info";

export interface ErrorMember {
  code: string;
  object: string;
  problem: string;
  hint: string | null;
  message: string;
}

export interface DiskResult {
  disk: string;
  target: string;
  t0: string | null;
  /** Of the disk. */
  bytes: number;
  /** Of data that were copied; of a repository what was new there. */
  bytes_written: number;
  /** What the file takes of its storage; null of what is none. */
  bytes_on_target: number | null;
  captured_bytes: number;
  spilled_bytes: number;
  guest_waits: number;
  guest_wait_ms_max: number;
  guest_wait_ms_total: number;
  ignored_errors: number;
}

export interface JobResult {
  job: string;
  group: string;
  result: "done" | "failed" | "skipped";
  exit_code: number;
  /** RFC 3339, UTC. */
  started: string;
  ended: string;
  seconds: number;
  /** Null where none was begun. */
  level: "full" | "incremental" | null;
  level_reason: string | null;
  /** Tries of the backup. */
  tries: number;
  verified: boolean;
  disks: DiskResult[];
  /** Backups that retention has removed: files, or REPO::GROUP@TIME. */
  removed: string[];
  warnings: string[];
  error: ErrorMember | null;
}

export function errorMember({ code, object, problem, hint, message }: CowcatcherError): ErrorMember {
  return { code, object, problem, hint: hint ?? null, message };
}

/** Exit codes from the worst: interrupted, damaged, failed, and so on to what was done with errors passed over. */
const WORST_FIRST = [143, 130, 129, 4, 1, 13, 12, 11, 10, 2, 3, 0];

/** A code that is not known counts as a failure. */
export function worstExitCode(codes: readonly number[]): number {
  const known = codes.map((code) => (WORST_FIRST.includes(code) ? code : 1));
  return WORST_FIRST.find((code) => known.includes(code)) ?? 0;
}
