// Host space that was let go, on its way to being free.
//
// A cluster that the guest's mapping no longer uses may be overwritten only when nobody can read it any more:
//
//   dropped ──flush writes the L2 tables that dropped it──► settled ──operations that began before are over──► ready
//      │
//      └──while a freeze lasts, for what workers may still read: pinned ──release──► dropped
//
// Only then do the refcounts in memory go down, and the allocator may hand the cluster out. A crash before that
// leaks clusters (refcount too high), never the reverse. Regions are kept as three numbers each (offset, length, and
// whether the guest has unmapped it, so that its storage goes back to the file system first: unmapper.ts);
// each touched cluster loses one reference for each region. Main thread only.

/** Numbers that a region is kept as. */
export const REGION_NUMBERS = 3;

interface Settled {
  regions: number[];
  /** Operations with a lower id may still use the regions. */
  barrier: number;
}

export class FreeQueue {
  private dropped: number[] = [];
  private pinned: number[] = [];
  private readonly settled: Settled[] = [];
  /** Where the last dropped region ends, if whole clusters can be joined to it; else -1. */
  private joinEnd = -1;
  private joinsUnmapped = 0;
  private freezeCount = 0;
  private nextOperation = 1;
  private readonly operations = new Set<number>();

  get hasDropped(): boolean {
    return this.dropped.length > 0;
  }

  get isFrozen(): boolean {
    return this.freezeCount > 0;
  }

  /** Whole clusters whose guest bytes were replaced as a whole. */
  dropClusters(offsetBytes: number, lengthBytes: number, isUnmapped = false): void {
    const flag = isUnmapped ? 1 : 0;
    if (offsetBytes === this.joinEnd && flag === this.joinsUnmapped) {
      const lastLength = this.dropped.length - 2;
      this.dropped[lastLength] = (this.dropped[lastLength] ?? 0) + lengthBytes;
    } else {
      this.dropped.push(offsetBytes, lengthBytes, flag);
    }
    this.joinEnd = offsetBytes + lengthBytes;
    this.joinsUnmapped = flag;
  }

  /** What a reader with the mapping of T0 may need yet: compressed data, L2 tables, copied clusters. */
  dropReadable(offsetBytes: number, lengthBytes: number, isUnmapped = false): void {
    const flag = isUnmapped ? 1 : 0;
    if (this.isFrozen) {
      this.pinned.push(offsetBytes, lengthBytes, flag);
    } else {
      this.dropped.push(offsetBytes, lengthBytes, flag);
      this.joinEnd = -1;
    }
  }

  freeze(): void {
    this.freezeCount++;
  }

  release(): void {
    this.freezeCount--;
    if (this.freezeCount > 0) return;
    for (const value of this.pinned) this.dropped.push(value);
    this.pinned = [];
    this.joinEnd = -1;
  }

  /** What the flush that begins now will settle. */
  takeDropped(): number[] {
    const regions = this.dropped;
    this.dropped = [];
    this.joinEnd = -1;
    return regions;
  }

  /** The flush failed: the regions stay dropped. */
  giveBack(regions: readonly number[]): void {
    for (const value of regions) this.dropped.push(value);
    this.joinEnd = -1;
  }

  settle(regions: number[]): void {
    if (regions.length > 0) this.settled.push({ regions, barrier: this.nextOperation });
  }

  /** The next batch that nobody uses any more, or undefined. */
  takeReady(): number[] | undefined {
    const first = this.settled[0];
    if (first === undefined) return undefined;
    const oldest = this.operations.values().next();
    if (!oldest.done && oldest.value < first.barrier) return undefined;
    this.settled.shift();
    return first.regions;
  }

  /** Puts back what the refcounts could not take yet (their bound of dirty blocks). */
  putBackReady(regions: number[]): void {
    this.settled.unshift({ regions, barrier: 0 });
  }

  /** An operation that goes on past this turn of the event loop and may use host clusters of the present mapping. */
  beginOperation(): number {
    const id = this.nextOperation++;
    this.operations.add(id);
    return id;
  }

  endOperation(id: number): void {
    this.operations.delete(id);
  }

  get operationCount(): number {
    return this.operations.size;
  }
}
