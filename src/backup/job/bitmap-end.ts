// The dirty bitmap of a backup, from T0 to the job's end. QEMU's rules (block/backup.c, backup_cleanup_sync_bitmap):
//
//   mode          succeeded                        failed or cancelled
//   on-success    what has changed since T0        what it had, and what has changed since T0
//   never         what it had, and what has changed since T0, both ways
//   always        what has changed since T0        what is not in the target, and what has changed since T0
//
// "What it had, and what has changed since" is what the tracking says of it if nobody does anything. So a job that dies with
// its server, or whose bitmap cannot be written, leaves too much rather than too little.
//
// `always` asks that a part of a backup be kept, so a target that could not be completed takes its name nevertheless; its
// bits are taken out only for clusters that are known to be there. What QEMU calls copied it has handed to the target's
// driver; here it is what no write of was put off or given up. Main thread.

import type { SharedState } from "../../cow/shared.js";
import { Bits } from "../../tracking/bits.js";
import type { DiskTracker, Following, FrozenEpoch } from "../../tracking/tracker.js";
import type { BitmapUse } from "../options.js";

export interface BitmapEndParts {
  use: BitmapUse;
  tracker: DiskTracker;
  epoch: FrozenEpoch;
  /** In T0's turn: what it has then. */
  held: Following;
  t0Ms: number;
}

export class BitmapEnd {
  readonly name: string;
  readonly isRecording: boolean;
  /** What it had at T0. */
  readonly dirtyBytes: number;
  readonly #parts: Omit<BitmapEndParts, "held">;
  /** What is copied, as far as the bitmap says; undefined where the sync mode does. Only for `always`. */
  readonly #copied: Bits | undefined;

  constructor({ held, ...parts }: BitmapEndParts) {
    const { use, tracker } = parts;
    this.name = use.name;
    this.isRecording = use.isRecording;
    const late = held.late();
    const bytes = (held.known.count() + late.count()) * tracker.granularityBytes;
    this.dirtyBytes = Math.min(bytes, tracker.sizeBytes);
    this.#parts = parts;
    if (use.mode !== "always" || !use.isBasis) return;
    this.#copied = held.known.copy();
    this.#copied.or(late);
  }

  get keepsPart(): boolean {
    return this.#parts.use.mode === "always";
  }

  /** What has changed since T0, in bytes. @throws CowcatcherError IO, FORMAT */
  async changedBytes(): Promise<number> {
    const { tracker, epoch } = this.#parts;
    const bits = await tracker.changesSinceT0(epoch);
    return Math.min(bits.count() * tracker.granularityBytes, tracker.sizeBytes);
  }

  /** The backup is good. @throws CowcatcherError IO, NO_SPACE; the tracking's failure */
  async synchronize(): Promise<void> {
    if (this.#parts.use.mode !== "never") await this.#change(undefined);
  }

  /** Under `always`: a part of it has its name. @throws as synchronize */
  async keepRest(shared: SharedState, hasGaps: boolean): Promise<void> {
    await this.#change(this.#restOf(shared, hasGaps));
  }

  #restOf({ written, geometry }: SharedState, hasGaps: boolean): Bits {
    const { sizeBytes, granularityBytes } = this.#parts.tracker;
    const copied = this.#copied ?? new Bits(sizeBytes, granularityBytes);
    if (this.#copied === undefined) copied.setAll();
    const done = new Bits(sizeBytes, granularityBytes);
    for (let cluster = 0; cluster < geometry.clusterCount && !hasGaps; cluster++) {
      if (written?.[cluster] !== 1) continue;
      // A cluster is a whole number of granules, but for the disk's end.
      const start = cluster * geometry.clusterBytes;
      done.setBytes(start, Math.min(geometry.clusterBytes, sizeBytes - start));
    }
    return copied.except(done);
  }

  async #change(kept: Bits | undefined): Promise<void> {
    const { use, tracker, epoch, t0Ms } = this.#parts;
    const to = { name: use.name, uuid: crypto.randomUUID(), epoch: epoch.epoch, createdMs: t0Ms };
    const made = await tracker.change([
      { name: use.name, kept, to: use.isRecording ? to : { ...to, isStopped: true } },
    ]);
    await made.done();
  }
}
