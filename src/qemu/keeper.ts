// Who keeps the old data of one disk while it is copied: QEMU, in a file (fleece-keeper.ts), or this process, in its
// own buffer (ring-keeper.ts). Main thread.

import type { CopyRun, CopyRunOptions } from "../backup/copy/run.js";
import type { JobProgress } from "../backup/progress.js";
import type { NbdSourceDescription } from "../block/device.js";
import type { CowcatcherError } from "../errors.js";

export interface Keeper {
  /** What the run gets: its buffer, its spill, its threads. */
  readonly parts: Pick<
    CopyRunOptions,
    "slots" | "bufferBytes" | "hands" | "threads" | "allocateTable" | "hasForeignCaptures" | "readAheadBytes"
  >;
  /** Where the disk's live file can be read: with what, to be T0's. Undefined: it cannot be known so. */
  readonly oldData?: { readonly fd: number | null } | undefined;
  /** What readers are to know of the export that they read. */
  readonly source: Pick<NbdSourceDescription, "isSnapshot" | "staysOpen">;
  /** Before T0. `fail` ends the run: the old data cannot be kept any more. */
  attach(run: CopyRun, fail: (error: CowcatcherError) => void): void;
  /** Every LOOK_MS from T0 on. */
  look(): void;
  progress(): Partial<JobProgress>;
  /** The old data is not needed any more: nothing of the guest waits for us from now on. Synchronous, idempotent. */
  letGo(): void;
  /** QEMU uses nothing of it any more: what it has taken up is given back. Synchronous. */
  left?(): void;
  /** What a reader's error means. `uri` is of the export that it reads. */
  explained(error: CowcatcherError, uri: string): CowcatcherError;
  /** After the run has ended. Never rejects. */
  close(leftBehind: boolean): Promise<void>;
}
