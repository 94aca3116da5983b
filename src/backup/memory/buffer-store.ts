// Memory of copy-before-write buffers, kept from job to job with the marks of which of its pages are ready: allocating it
// afresh for each job would cost those pages again, and leave the old memory to the garbage collector meanwhile.
// Main thread.

import { newPageWords } from "../../cow/buffer-pages.js";
import { allocatePages, type PageMemory } from "../../cow/page-memory.js";
import { CowcatcherError } from "../../errors.js";
import { systemMemory, type SystemMemory } from "../../native/memory.js";
import { formatBytes } from "../../units.js";

export interface BufferLease {
  memory: PageMemory;
  /** Which of its pages are ready (cow/buffer-pages.ts). */
  pages: SharedArrayBuffer;
  release(): void;
}

/** More than one is kept only where jobs run side by side. */
const KEPT_MAX = 4;

/** Of all jobs without a buffer. */
const NO_MEMORY: BufferLease = {
  memory: new Uint8Array(new SharedArrayBuffer(0)),
  pages: newPageWords(),
  release: () => undefined,
};

export class BufferStore {
  #free: PageMemory[] = [];
  readonly #pagesOf = new WeakMap<PageMemory, SharedArrayBuffer>();
  readonly #memoryNow: () => SystemMemory;

  /** @param memoryNow replaced in tests */
  constructor(memoryNow: () => SystemMemory = systemMemory) {
    this.#memoryNow = memoryNow;
  }

  /** Memory of at least `bytes`; its content is whatever the last job left. @throws CowcatcherError LIMIT. */
  take(bytes: number): BufferLease {
    if (bytes === 0) return NO_MEMORY;
    const fitting = this.#free.filter((memory) => memory.byteLength >= bytes);
    fitting.sort((a, b) => a.byteLength - b.byteLength);
    const [kept] = fitting;
    const memory = kept ?? this.#allocate(bytes);
    this.#free = this.#free.filter((other) => other !== memory);
    const pages = this.#pagesOf.get(memory) ?? newPageWords();
    this.#pagesOf.set(memory, pages);
    let released = false;
    return {
      memory,
      pages,
      release: () => {
        if (released) return;
        released = true;
        // A small one that a larger one can replace is not worth keeping.
        this.#free = [...this.#free, memory].sort((a, b) => b.byteLength - a.byteLength).slice(0, KEPT_MAX);
      },
    };
  }

  /** The kernel promises more than it has, and ends the process, the guest's disk with it, once pages are touched. */
  #allocate(bytes: number): PageMemory {
    const { availableBytes = Infinity, freeSwapBytes } = this.#memoryNow();
    if (bytes > availableBytes + freeSwapBytes) {
      throw new CowcatcherError({
        code: "LIMIT",
        object: "--cow-buffer-size",
        problem: `${formatBytes(bytes)} is more than the memory that is free, ${formatBytes(availableBytes)}`,
        hint: "give less, or free some",
      });
    }
    return allocatePages(bytes, "--cow-buffer-size");
  }
}
