// An epoch that guest writes go to: its bits, in memory and in active-N.bits. Main thread.
//
// A bit that is seen to be set is in the page cache of the file. Where the folder is on the guest's own storage both
// happen in one turn; else the bits that are asked about stay clear until the file has them.

import { Bits } from "./bits.js";
import { activeName } from "./checkpoint-list.js";
import { ACTIVE_HEADER_BYTES, encodeActive } from "./epoch-file.js";
import type { TrackingFile, TrackingFolder } from "./folder.js";
import type { Head } from "./head.js";

export class ActiveEpoch {
  /** One setting of bits at a time, where that is not done at once. */
  #order: Promise<void> = Promise.resolve();

  private constructor(
    readonly epoch: number,
    readonly bits: Bits,
    private readonly file: TrackingFile,
  ) {}

  /** A new file, or another one under this name, durable when it is fulfilled. @throws CowcatcherError IO, NO_SPACE */
  static write(folder: TrackingFolder, head: Head, epoch: number, bits: Bits): Promise<void> {
    const { generation, granularityBytes, sizeBytes } = head;
    const header = { generation, granularityBytes, sizeBytes, first: epoch, last: epoch };
    return folder.replace(activeName(epoch), encodeActive(header, bits));
  }

  /** @param bits what the file holds. @throws CowcatcherError IO */
  static async open(folder: TrackingFolder, epoch: number, bits: Bits): Promise<ActiveEpoch> {
    return new ActiveEpoch(epoch, bits, await folder.open(activeName(epoch)));
  }

  get isEmpty(): boolean {
    return this.bits.next(0, true) === this.bits.granuleCount;
  }

  /** Sets granules first to last, both included. Blocks its thread for a copy into the page cache. @throws what the file throws */
  set(first: number, last: number): void {
    const firstByte = first >>> 3;
    this.bits.set(first, last);
    this.file.writeNow(this.bits.bytes, firstByte, (last >>> 3) + 1, ACTIVE_HEADER_BYTES + firstByte);
  }

  /**
   * The same for a folder that takes its time. Whoever waits asks again: the bits may be clear when it is fulfilled.
   * @param isAllowed asked when it is its turn, and again when the file has the bits: whether they may be set in this turn
   */
  setSlowly(first: number, last: number, isAllowed: () => boolean): Promise<void> {
    const work = async (): Promise<void> => {
      const { bits } = this;
      if (bits.hasAll(first, last) || !isAllowed()) return;
      const firstByte = first >>> 3;
      const changed = new Bits(bits.sizeBytes, bits.granularityBytes);
      changed.or(bits);
      changed.set(first, last);
      await this.file.write(changed.bytes, firstByte, (last >>> 3) + 1, ACTIVE_HEADER_BYTES + firstByte);
      // The epoch may be over by now.
      if (isAllowed()) bits.set(first, last);
    };
    const done = this.#order.then(work);
    this.#order = done.catch(() => undefined);
    return done;
  }

  /** Every bit that was set before is durable then. @throws CowcatcherError IO */
  sync(): Promise<void> {
    return this.file.sync();
  }

  /** Fulfilled when no bits are being set. */
  async idle(): Promise<void> {
    await this.#order;
  }

  async close(): Promise<void> {
    await this.#order;
    await this.file.close();
  }

  /** @throws CowcatcherError IO */
  static remove(folder: TrackingFolder, epoch: number): Promise<void> {
    return folder.remove(activeName(epoch));
  }
}
