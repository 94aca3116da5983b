// A checkpoint without a backup: what QEMU calls adding or clearing a dirty bitmap. Main thread.

import type { DiskNode } from "../../cow/disk-node.js";
import type { DiskTracker, FrozenEpoch } from "../../tracking/tracker.js";
import type { StartMark } from "./start.js";

export class CheckpointMark implements StartMark {
  #epoch: FrozenEpoch | null = null;
  #t0Ms = 0;

  constructor(
    readonly node: DiskNode,
    private readonly tracker: DiskTracker,
    private readonly name: string,
    private readonly uuid: string,
  ) {}

  beforeT0(): Promise<void> {
    return this.tracker.prepareFreeze();
  }

  atT0(t0Ms: number): void {
    this.#epoch = this.tracker.freeze();
    this.#t0Ms = t0Ms;
  }

  abandon(): void {
    this.#epoch?.release();
    this.#epoch = null;
  }

  /** After T0: durable once it is fulfilled. @throws CowcatherError LIMIT, IO, NO_SPACE; the tracking's failure. */
  async commit(): Promise<void> {
    try {
      if (this.#epoch !== null) await this.tracker.commit(this.#epoch, this.name, this.uuid, this.#t0Ms);
    } finally {
      this.abandon();
    }
  }
}
