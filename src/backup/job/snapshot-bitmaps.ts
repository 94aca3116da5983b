// The checkpoints of a T0 view's disk, as metadata contexts of its export: what had changed since each of them by T0, for
// whoever pulls an incremental backup from there (qemu:dirty-bitmap: of docs/interop/nbd.rst in QEMU).
//
// Which bits those are is known at T0 only. So they are followed up to it, and stand still from then on: what is written
// later is in none of them, as it is not in the view. Main thread.

import type { StatusContext } from "../../nbd/server/export.js";
import { NBD_META_DIRTY_BITMAP_PREFIX, NBD_STATE_DIRTY } from "../../nbd/wire/protocol.js";
import type { DiskTracker, Following } from "../../tracking/tracker.js";

/** Each takes 4 MiB for 1 TiB of disk; the newest ones are offered. */
const BITMAP_COUNT_MAX = 16;

export class SnapshotBitmaps {
  readonly #tracker: DiskTracker;
  readonly #followed: { name: string; bits: Following }[] = [];

  constructor(tracker: DiskTracker) {
    this.#tracker = tracker;
  }

  /** Shortly before T0: no other start of the disk comes in between. @throws CowcatcherError IO, FORMAT, NO_SPACE */
  async beforeT0(): Promise<void> {
    const names = this.#tracker.state.checkpoints.slice(-BITMAP_COUNT_MAX).map(({ name }) => name);
    if (names.length === 0) return;
    await this.#tracker.prepareFreeze();
    for (const name of names) this.#followed.push({ name, bits: await this.#tracker.follow(name) });
  }

  /** The step at T0: synchronous, with no guest write in flight. @throws CowcatcherError the tracking's failure */
  atT0(): StatusContext[] {
    // Whatever was written since the last T0 is in the bits then.
    if (this.#followed.length > 0) this.#tracker.freeze().release();
    const contexts = this.#followed.map(({ name, bits }): StatusContext => {
      const atT0 = bits.all();
      return {
        name: NBD_META_DIRTY_BITMAP_PREFIX + name,
        status(offsetBytes, lengthBytes) {
          const run = atT0.run(offsetBytes, lengthBytes);
          return { lengthBytes: run.lengthBytes, flags: run.dirty ? NBD_STATE_DIRTY : 0 };
        },
      };
    });
    this.end();
    return contexts;
  }

  /** Nothing is followed any more. */
  end(): void {
    for (const { bits } of this.#followed.splice(0)) bits.end();
  }
}
