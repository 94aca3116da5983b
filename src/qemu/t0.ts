// What both methods have in common at T0: a disk in QEMU's graph, what the guest puts up with, and when it was.

import type { JobOptions } from "../backup/options.js";
import type { QemuDisk } from "./graph.js";
import type { UndoStack } from "./undo.js";

/** One disk in QEMU's graph. */
export interface GraphDisk {
  readonly disk: QemuDisk;
  /** Its number in the run. */
  readonly index: number;
  /** How QEMU becomes what it was for this disk. */
  readonly undo: UndoStack;
  /** Says what readers need: exported with the disk. */
  readonly bitmap: string | undefined;
}

/** What the guest's writes put up with. */
export type GuestPolicy = Pick<JobOptions, "guestTimeoutMs" | "onCbwError">;

export interface T0Times {
  /** How long the guest was stopped for T0, in ms; 0: not at all. */
  stoppedMs: number;
  /** The instant that the backup shows, in milliseconds since 1970 UTC. */
  t0Ms: number;
}
