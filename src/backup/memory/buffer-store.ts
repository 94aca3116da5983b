// Memory of copy-before-write buffers (cow/slot-memory.ts). What is mapped of it is kept from job to job with the mark of which
// of its pages are ready: allocating it afresh for each job would cost those pages again, and leave the old memory to the garbage
// collector meanwhile. A file's part ends with the job, and the system has its pages back. Main thread.

import { close } from "node:fs";
import { newPageWords } from "../../cow/buffer-pages.js";
import { allocatePages, type PageMemory } from "../../cow/page-memory.js";
import { type BufferMemory, createSlotFile, MAPPED_BYTES_MAX, NO_BUFFER } from "../../cow/slot-memory.js";
import { CowcatcherError } from "../../errors.js";
import { systemMemory, type SystemMemory } from "../../native/memory.js";
import { formatBytes } from "../../units.js";

export interface BufferLease extends BufferMemory {
  /** No thread may use any of it from then on. */
  release(): void;
}

/** More than one is kept only where jobs run side by side. */
const KEPT_MAX = 4;

export class BufferStore {
  #free: PageMemory[] = [];
  readonly #pagesOf = new WeakMap<PageMemory, SharedArrayBuffer>();
  readonly #memoryNow: () => SystemMemory;

  /** @param memoryNow replaced in tests */
  constructor(memoryNow: () => SystemMemory = systemMemory) {
    this.#memoryNow = memoryNow;
  }

  /**
   * A buffer of at least `bytes`; its content is whatever the last job left.
   * @param mapped all of it, and not as much as a job without haste has use for
   * @throws CowcatcherError LIMIT where there is not so much memory
   */
  take(bytes: number, { mapped = false } = {}): BufferLease {
    if (bytes === 0) return { ...NO_BUFFER, release: () => undefined };
    const kept = this.#largestFor(bytes);
    const hasEnough =
      kept !== undefined && kept.byteLength >= (mapped ? bytes : Math.min(bytes, MAPPED_BYTES_MAX));
    this.#requireMemory(bytes - (hasEnough ? kept.byteLength : 0));
    let fileFd = -1;
    if (!mapped && (hasEnough ? kept.byteLength : MAPPED_BYTES_MAX) < bytes) fileFd = createSlotFile();
    const isEnough = hasEnough && (fileFd >= 0 || kept.byteLength >= bytes);
    const memory = isEnough ? kept : this.#allocate(fileFd < 0 ? bytes : MAPPED_BYTES_MAX, fileFd);
    this.#free = this.#free.filter((other) => other !== memory);
    const pages = this.#pagesOf.get(memory) ?? newPageWords();
    this.#pagesOf.set(memory, pages);
    let released = false;
    return {
      memory,
      pages,
      fileFd,
      release: () => {
        if (released) return;
        released = true;
        // Elsewhere: to free a GiB takes a tenth of a second.
        if (fileFd >= 0) close(fileFd, () => undefined);
        // A small one that a larger one can replace is not worth keeping.
        this.#free = [...this.#free, memory].sort((a, b) => b.byteLength - a.byteLength).slice(0, KEPT_MAX);
      },
    };
  }

  /** Of what is kept, the smallest that has all of it, or else the largest. */
  #largestFor(bytes: number): PageMemory | undefined {
    return this.#free.findLast((memory) => memory.byteLength >= bytes) ?? this.#free[0];
  }

  #allocate(bytes: number, fileFd: number): PageMemory {
    try {
      return allocatePages(bytes, "--cow-buffer-size");
    } catch (error) {
      if (fileFd >= 0) close(fileFd, () => undefined);
      throw error;
    }
  }

  /** The kernel promises more than it has, and ends the process, the guest's disk with it, once pages are touched. */
  #requireMemory(bytes: number): void {
    if (bytes <= 0) return;
    const { availableBytes = Infinity, freeSwapBytes } = this.#memoryNow();
    if (bytes <= availableBytes + freeSwapBytes) return;
    throw new CowcatcherError({
      code: "LIMIT",
      object: "--cow-buffer-size",
      problem: `${formatBytes(bytes)} is more than the memory that is free, ${formatBytes(availableBytes)}`,
      hint: "give less, or free some",
    });
  }
}
