// A job as it is carried out: all of its settings, defaults filled in.
import type { Retention } from "../repository/upkeep/retention.js";
import type { Level } from "./file/job-shape.js";
import type { Pattern } from "./pattern.js";
import type { Window } from "./window.js";

/** Where in a job file something stands. */
export interface Place {
  file: string;
  /** From 1 on. */
  line: number;
  column: number;
}

export interface NamedImage {
  /** The disk's name. */
  name: string;
  image: string;
}

export type JobSource =
  | { kind: "images"; disks: readonly NamedImage[] }
  /** Undefined: all disks that the server has; the guest's only one. */
  | { kind: "control"; socket: string; disks: readonly string[] | undefined }
  | { kind: "qmp"; socket: string; disks: readonly string[] | undefined }
  | { kind: "libvirt"; domain: string; connect: string | undefined; disks: readonly string[] | undefined };

/** QEMU keeps track of what changes, by bitmaps that `backup` makes and finds by the last backup's file. */
export function isOfQemu({ kind }: JobSource): boolean {
  return kind === "qmp" || kind === "libvirt";
}

export type JobTarget =
  { kind: "pattern"; pattern: Pattern } | { kind: "repository"; repository: string; prune: boolean };

export interface Pings {
  start: string | undefined;
  success: string | undefined;
  fail: string | undefined;
}

export interface Job {
  name: string;
  place: Place;
  group: string;
  source: JobSource;
  target: JobTarget;
  level: Level;
  fullEveryMs: number;
  retention: Retention | undefined;
  /** Undefined: no verification; a text: a share of a repository's chunks, such as "5%"; true: all. */
  verify: true | string | undefined;
  /** Arguments for `backup`, as they are. */
  options: readonly string[];
  /** Arguments that open an encrypted repository. */
  keyArguments: readonly string[];
  window: Window | undefined;
  requireMount: string | undefined;
  checkSpace: boolean;
  retries: number;
  retryWaitMs: number;
  /** Of one try. */
  timeLimitMs: number | undefined;
  lockWaitMs: number;
  /** Program and arguments. */
  hook: readonly string[] | undefined;
  hookTimeoutMs: number;
  pings: Pings | undefined;
  metricsFolder: string | undefined;
  mail: { addresses: readonly string[]; always: boolean } | undefined;
  isEnabled: boolean;
}

export const JOB_FILE_DEFAULTS = {
  level: "auto",
  fullEveryMs: 7 * 86_400_000,
  retries: 0,
  retryWaitMs: 60_000,
  lockWaitMs: 0,
  hookTimeoutMs: 300_000,
} as const;
