// Memory of copy-before-write buffers, kept from job to job: it is prefaulted and in the cache, and allocating it
// afresh for each job would leave the old one to the garbage collector while the new one is filled. Main thread.

import { allocatePages } from "../cow/page-memory.js";

export interface BufferLease {
  memory: SharedArrayBuffer;
  release(): void;
}

/** More than one is kept only where jobs run side by side. */
const KEPT_MAX = 4;

export class BufferStore {
  #free: SharedArrayBuffer[] = [];

  /** Memory of at least `bytes`; its content is whatever the last job left. @throws CowcatcherError LIMIT. */
  take(bytes: number): BufferLease {
    const fitting = this.#free.filter((memory) => memory.byteLength >= bytes && bytes > 0);
    fitting.sort((a, b) => a.byteLength - b.byteLength);
    const memory = fitting[0] ?? allocatePages(bytes, "--cow-buffer-size");
    this.#free = this.#free.filter((other) => other !== memory);
    let released = false;
    return {
      memory,
      release: () => {
        if (released) return;
        released = true;
        // A small one that a larger one can replace is not worth keeping.
        this.#free = [...this.#free, memory].sort((a, b) => b.byteLength - a.byteLength).slice(0, KEPT_MAX);
      },
    };
  }
}
