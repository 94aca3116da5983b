// Where a connection's requests land.
//
//   slab   | handled (devices may still write from it) | leftover: a request in part | landing |
//                                                      ^start                        ^end
//
// The socket reads straight into the landing, so that a request ends up whole and in one piece, payload included,
// and a device takes the payload from there. The landing is handed to the socket ahead of the read, perhaps while
// the connection is paused; therefore `prepare` alone changes `slab` or moves bytes, and it is called only between
// one read and the handing out of the next landing.
//
// References of a slab: one of this buffer's, and one a request whose device still uses it (`retain`, `release`).
// Main thread only.

import { SLAB_BYTES } from "./limits.js";
import type { Slab, SlabPool } from "./slab.js";

/** Less room than this is not worth a read. */
const MIN_LANDING_BYTES = SLAB_BYTES / 4;
/** From here on a leftover is moved to the slab's start: what is used again soon stays in the processor's cache. */
const MOVE_FROM_BYTES = SLAB_BYTES / 2;
/** A larger slab is kept while it is used for one request after another; beyond this it goes back to the pool. */
const MAX_KEPT_BYTES = 8 * SLAB_BYTES;

export class ReceiveBuffer {
  slab: Slab;
  start = 0;
  end = 0;
  /** Capacity of the slabs that this buffer and its requests hold. */
  heldBytes: number;

  constructor(private readonly pool: SlabPool) {
    this.slab = pool.take(SLAB_BYTES);
    this.slab.references = 1;
    this.heldBytes = this.slab.capacityBytes;
  }

  get landing(): Buffer {
    return this.slab.bytes.subarray(this.end);
  }

  /** Makes a landing with room for the rest of a request that has needBytes in all, counted from `start`. */
  prepare(needBytes: number): void {
    const leftoverBytes = this.end - this.start;
    const { slab } = this;
    const isTooLarge = slab.capacityBytes > MAX_KEPT_BYTES && needBytes <= SLAB_BYTES;
    const isTooSmall = needBytes > slab.capacityBytes;
    if (isTooLarge || isTooSmall) return this.change(needBytes);
    const hasRoom =
      this.start + needBytes <= slab.capacityBytes && slab.capacityBytes - this.end >= MIN_LANDING_BYTES;
    if (slab.references > 1) {
      if (!hasRoom) this.change(needBytes);
    } else if (leftoverBytes === 0) {
      this.start = 0;
      this.end = 0;
    } else if (!hasRoom || this.start >= MOVE_FROM_BYTES) {
      slab.bytes.copyWithin(0, this.start, this.end);
      this.start = 0;
      this.end = leftoverBytes;
      // Whole requests that the connection may not start yet can fill the slab.
      if (slab.capacityBytes - leftoverBytes < MIN_LANDING_BYTES) this.change(needBytes);
    }
  }

  retain(slab: Slab): void {
    slab.references++;
  }

  release(slab: Slab): void {
    slab.references--;
    if (slab.references > 0) return;
    this.heldBytes -= slab.capacityBytes;
    this.pool.give(slab);
  }

  private change(needBytes: number): void {
    const old = this.slab;
    const leftoverBytes = this.end - this.start;
    const slab = this.pool.take(Math.max(needBytes, leftoverBytes + MIN_LANDING_BYTES));
    slab.references = 1;
    this.heldBytes += slab.capacityBytes;
    slab.bytes.set(old.bytes.subarray(this.start, this.end));
    this.slab = slab;
    this.start = 0;
    this.end = leftoverBytes;
    this.release(old);
  }
}
