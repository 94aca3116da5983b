// What the guest benchmark compares: a server with a disk, and a backup of it to a slow target.

import type { Child } from "./children.js";
import type { FioPlace } from "./fio.js";

export type DiskFormat = "raw" | "qcow2";

/** What holds the target back. */
export interface Throttle {
  name: string;
  /** Bytes a second; undefined: no limit. */
  bytesPerSecond?: number;
  /** The target is an RBD image, made for each backup and removed after it. */
  rbd?: RbdPlace;
  /** Milliseconds that each write to the target takes longer. */
  writeDelayMs?: number;
}

/** A real image in a real pool. */
export interface RbdPlace {
  conf: string;
  pool: string;
  image: string;
}

export interface Setup {
  disk: string;
  format: DiskFormat;
  /** For sockets, the target and temporary images; the caller removes it. */
  folder: string;
  throttle: Throttle;
  /** O_DIRECT on disk, target and temporary images. */
  direct: boolean;
}

export interface RunningBackup {
  /** The process that copies, where it is not the server. */
  copier?: Child;
  /**
   * When it has ended, synced target included: seconds since T0, or undefined if it did not complete (its policy
   * cancelled it). @throws CowcatherError if it fails otherwise.
   */
  ended: Promise<number | undefined>;
  /** Ends it before its time; `ended` then gives undefined. */
  cancel(): Promise<void>;
}

export interface RunningServer {
  /** The process that does the guest's requests and the copying. */
  child: Pick<Child, "cpuSeconds">;
  /** Where the guest is to work. */
  place: FioPlace;
  /** Resolves after T0. */
  startBackup(): Promise<RunningBackup>;
  stop(): Promise<void>;
  /** What the files that keep old data take up on their file system now, in bytes; where there are any. */
  fleeceBytes?(): number;
  /** The longest time that its event loop was held up between two moments (Date.now()), where it says. */
  loopDelayMs?(fromMs: number, toMs: number): number | undefined;
}

export interface Contestant {
  name: string;
  /** False: it measures the guest without a backup. */
  hasBackup: boolean;
  start(setup: Setup): Promise<RunningServer>;
}
