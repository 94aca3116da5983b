// The copy-before-write buffer's allocator. Main thread only; workers give blocks back through the freed stack.
//
// A slot is 64 KiB, cut into 16 blocks, with a 16-bit mask of its free ones. A capture takes a run of adjacent
// blocks of one slot: a 4 KiB guest write takes 4 KiB of the buffer, not a slot, so for small writes the buffer is
// 16 times as deep as with whole slots. Slots are kept in 17 doubly linked classes by the length of their longest
// free run. A request takes the smallest class that fits, and within a class the slot that was touched last, whose
// memory is likely still in the cache; slots that were never given out come last, in ascending order. When no slot has a
// run that long, the caller gets the longest there is and splits its capture: nothing is lost to fragmentation.
//
// A buffer has two kinds of slots (slot-memory.ts), each with an allocator of its own. Mapped ones are given out first, as
// soon as their pages are ready (buffer-pages.ts); then those of the file; then mapped ones whose pages are not ready.

import { BLOCKS_PER_SLOT } from "./geometry.js";

const FULL_MASK = 0xffff;
const NONE = -1;

/** For each mask of free blocks: length and start of its longest run, the first of several. */
const longestRun = new Uint8Array(65536);
const longestRunStart = new Uint8Array(65536);
let tablesReady = false;

/** Each mask from a smaller one: its lowest run, or its lowest zero bit, cut off. */
function prepareTables(): void {
  if (tablesReady) return;
  for (let mask = 1; mask < 65536; mask++) {
    const lowestRun = 31 - Math.clz32(~mask & (mask + 1));
    const cut = Math.max(1, lowestRun);
    const rest = mask >> cut;
    const isLongest = lowestRun >= longestRun[rest];
    longestRun[mask] = isLongest ? lowestRun : longestRun[rest];
    longestRunStart[mask] = isLongest ? 0 : longestRunStart[rest] + cut;
  }
  tablesReady = true;
}

/** Of the slots of one kind. */
export class SlotAllocator {
  /** Blocks in the run that `allocate` has just returned. */
  allocatedCount = 0;
  freeBlockCount: number;
  readonly blockCount: number;
  #openCount = 0;
  readonly #freeMask: Uint16Array;
  readonly #next: Int32Array;
  readonly #previous: Int32Array;
  readonly #heads = new Int32Array(BLOCKS_PER_SLOT + 1).fill(NONE);

  /** @param openCount of the slots, from the first on, those that are given out from the start; see `open` */
  constructor(
    private readonly slotCount: number,
    openCount = slotCount,
  ) {
    prepareTables();
    this.blockCount = slotCount * BLOCKS_PER_SLOT;
    this.freeBlockCount = this.blockCount;
    this.#freeMask = new Uint16Array(slotCount).fill(FULL_MASK);
    this.#next = new Int32Array(slotCount);
    this.#previous = new Int32Array(slotCount);
    this.open(openCount);
  }

  /** The slots before this one are given out from now on, too. */
  open(openCount: number): void {
    const end = Math.min(openCount, this.slotCount);
    for (let slot = end - 1; slot >= this.#openCount; slot--) this.#link(slot, BLOCKS_PER_SLOT);
    this.#openCount = Math.max(this.#openCount, end);
  }

  /** Whether a run of so many blocks is free, of slots that are open. */
  hasRun(count: number): boolean {
    for (let run = count; run <= BLOCKS_PER_SLOT; run++) if (this.#heads[run] !== NONE) return true;
    return false;
  }

  /**
   * Takes a run of at most `wantedCount` blocks (1 to 16): its first block, with `allocatedCount` set; -1 when
   * the buffer is full.
   */
  allocate(wantedCount: number): number {
    const slot = this.#findSlot(wantedCount);
    if (slot === NONE) return NONE;
    const mask = this.#freeMask[slot];
    const run = longestRun[mask];
    const start = longestRunStart[mask];
    const count = Math.min(run, wantedCount);
    this.#setMask(slot, mask & ~(((1 << count) - 1) << start));
    this.allocatedCount = count;
    this.freeBlockCount -= count;
    return slot * BLOCKS_PER_SLOT + start;
  }

  /** Gives a run back that `allocate` returned. @throws RangeError if a block of it was free: a bug. */
  free(firstBlock: number, count: number): void {
    const slot = Math.floor(firstBlock / BLOCKS_PER_SLOT);
    const bits = ((1 << count) - 1) << (firstBlock % BLOCKS_PER_SLOT);
    const mask = this.#freeMask[slot];
    if ((mask & bits) !== 0)
      throw new RangeError(`blocks ${firstBlock}+${count} of the buffer were freed twice`);
    this.#setMask(slot, mask | bits);
    this.freeBlockCount += count;
  }

  #findSlot(wantedCount: number): number {
    for (let run = wantedCount; run <= BLOCKS_PER_SLOT; run++) {
      const slot = this.#heads[run];
      if (slot !== NONE) return slot;
    }
    for (let run = wantedCount - 1; run > 0; run--) {
      const slot = this.#heads[run];
      if (slot !== NONE) return slot;
    }
    return NONE;
  }

  #setMask(slot: number, mask: number): void {
    const before = longestRun[this.#freeMask[slot]];
    const after = longestRun[mask];
    this.#freeMask[slot] = mask;
    if (before === after) return;
    this.#unlink(slot, before);
    this.#link(slot, after);
  }

  #link(slot: number, run: number): void {
    const head = this.#heads[run];
    this.#next[slot] = head;
    this.#previous[slot] = NONE;
    if (head !== NONE) this.#previous[head] = slot;
    this.#heads[run] = slot;
  }

  #unlink(slot: number, run: number): void {
    const next = this.#next[slot];
    const previous = this.#previous[slot];
    if (next !== NONE) this.#previous[next] = previous;
    if (previous !== NONE) this.#next[previous] = next;
    else this.#heads[run] = next;
  }
}

/** Of a whole buffer: `mappedSlotCount` mapped slots, then those of a file. */
export class BufferAllocator {
  /** Blocks in the run that `allocate` has just returned. */
  allocatedCount = 0;
  readonly blockCount: number;
  readonly #mapped: SlotAllocator;
  readonly #file: SlotAllocator;

  /** @param readySlotCount of the mapped slots, from the first on, those whose pages are ready now */
  constructor(
    slotCount: number,
    mappedSlotCount: number,
    private readonly readySlotCount: () => number,
  ) {
    this.blockCount = slotCount * BLOCKS_PER_SLOT;
    this.#mapped = new SlotAllocator(mappedSlotCount, 0);
    this.#file = new SlotAllocator(slotCount - mappedSlotCount);
  }

  get freeBlockCount(): number {
    return this.#mapped.freeBlockCount + this.#file.freeBlockCount;
  }

  /** Half of the mapped slots are in use, or more. */
  get isMappedLow(): boolean {
    return this.#mapped.freeBlockCount < this.#mapped.blockCount / 2;
  }

  /** As SlotAllocator's. */
  allocate(wantedCount: number): number {
    if (!this.#mapped.hasRun(wantedCount)) this.#mapped.open(this.readySlotCount());
    if (this.#mapped.hasRun(wantedCount)) return this.#allocateMapped(wantedCount);
    const block = this.#file.allocate(wantedCount);
    if (block !== NONE) {
      this.allocatedCount = this.#file.allocatedCount;
      return this.#mapped.blockCount + block;
    }
    if (!this.#mapped.hasRun(wantedCount)) this.#mapped.open(this.#mapped.blockCount / BLOCKS_PER_SLOT);
    return this.#allocateMapped(wantedCount);
  }

  #allocateMapped(wantedCount: number): number {
    const block = this.#mapped.allocate(wantedCount);
    this.allocatedCount = this.#mapped.allocatedCount;
    return block;
  }

  /** As SlotAllocator's. */
  free(firstBlock: number, count: number): void {
    const fileBlock = firstBlock - this.#mapped.blockCount;
    if (fileBlock < 0) this.#mapped.free(firstBlock, count);
    else this.#file.free(fileBlock, count);
  }
}
