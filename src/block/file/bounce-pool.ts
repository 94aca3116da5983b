// Page-aligned memory on loan: what a request that O_DIRECT would refuse is copied through. A pool belongs to one file, so
// that storage which does not answer keeps no other disk's requests waiting. Main thread only.

import { KiB } from "../../units.js";
import { pageAlignedMemory } from "./fileio.js";

/** Of the most that one request has in hand; a longer one goes on piece by piece. */
export const BOUNCE_BYTES = 256 * KiB;
const BOUNCE_COUNT = 16;
/** Most guests' requests fit: they come dozens at a time, and shall be with the device all at once. */
const SMALL_BOUNCE_BYTES = 64 * KiB;
const SMALL_BOUNCE_COUNT = 64;

/** Memory is reserved at the first use, and taken from the system as it is touched. */
export class BouncePool {
  private readonly small = new Shelf(SMALL_BOUNCE_COUNT, SMALL_BOUNCE_BYTES);
  private readonly large = new Shelf(BOUNCE_COUNT, BOUNCE_BYTES);

  /** At least that much, or BOUNCE_BYTES; at once if there is one. In the order in which it was asked for. */
  take(lengthBytes: number): Uint8Array | Promise<Uint8Array> {
    return this.shelf(lengthBytes).take();
  }

  giveBack(bounce: Uint8Array): void {
    this.shelf(bounce.length).giveBack(bounce);
  }

  private shelf(lengthBytes: number): Shelf {
    return lengthBytes <= SMALL_BOUNCE_BYTES ? this.small : this.large;
  }
}

class Shelf {
  private free: Uint8Array[] | null = null;
  private readonly waiting: ((bounce: Uint8Array) => void)[] = [];

  constructor(
    private readonly count: number,
    private readonly eachBytes: number,
  ) {}

  take(): Uint8Array | Promise<Uint8Array> {
    this.free ??= this.carve();
    return this.free.pop() ?? new Promise((resolve) => this.waiting.push(resolve));
  }

  giveBack(bounce: Uint8Array): void {
    const next = this.waiting.shift();
    if (next === undefined) this.free?.push(bounce);
    else next(bounce);
  }

  private carve(): Uint8Array[] {
    const { count, eachBytes } = this;
    const memory = pageAlignedMemory(count * eachBytes);
    return Array.from({ length: count }, (_, index) =>
      memory.subarray(index * eachBytes, (index + 1) * eachBytes),
    );
  }
}
