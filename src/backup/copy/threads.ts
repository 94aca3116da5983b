// The threads of a server's backups, kept from job to job. Main thread.
//
// Why they are kept. Whatever a thread held goes with it, but for what native modules forget: koffi (3.3.4) leaves its
// record of the thread (37 KiB) and the stack and heap of its calls (three mappings, 3 MiB of addresses) behind for each
// thread that loaded a library. Four threads a backup took 0.15 MiB of memory and 12 mappings, so that after some 5,000
// backups the process would have reached the kernel's limit of 65,530 mappings. Threads that stay cost that once, and
// a backup that finds them there need not wait for their start.
//
//   take ──► the copy, then the check of --verify, in the same threads ──► giveBack ──► the next job's take
//              └── a thread died, or sits in a call that does not return ──► destroyed by whoever has the pool
//
// A pool serves jobs of fewer workers, too. The threads have a low priority from their first task on, which an
// unprivileged process cannot raise again.

import type { Piscina } from "piscina";
import { createCopyPool, endPool, poolHasBooted, WORKER_HEAP } from "./pool.js";

/** Idle: those of four jobs of four workers and the thread that readies their buffer. One pool is kept whatever its size. */
const KEPT_THREADS_MAX = 20;
/** Garbage is left to lie until this is full, in each thread: with 8 MiB four threads came to hold 20 MiB more. */
const KEPT_HEAP = { ...WORKER_HEAP, maxYoungGenerationSizeMb: 2 };

export class CopyThreads {
  /** Last used first. */
  #idle: Piscina[] = [];
  /** A thread of theirs has failed outside a task; piscina may not have started another one. */
  readonly #broken = new WeakSet<Piscina>();
  #closing = false;

  /** A pool of at least so many threads. The caller gives it back, or destroys it. */
  take(workerCount: number): Piscina {
    const fitting = this.#idle.filter((pool) => pool.maxThreads >= workerCount);
    fitting.sort((a, b) => a.maxThreads - b.maxThreads);
    const [kept] = fitting;
    if (kept !== undefined) {
      this.#forget(kept);
      return kept;
    }
    return this.#create(workerCount);
  }

  /**
   * Boots a thread for a job of so many workers, so that the first need not wait for it. Where there is none to be had
   * the first job says so. Settles when it is up; never rejects.
   */
  async warmUp(workerCount: number): Promise<void> {
    if (this.#closing || this.#idle.some((pool) => pool.maxThreads === workerCount)) return;
    let pool: Piscina;
    try {
      pool = this.#create(workerCount);
    } catch {
      return;
    }
    this.giveBack(pool);
    await poolHasBooted(pool);
  }

  /** Every task that the pool was given has ended, and its threads live. */
  giveBack(pool: Piscina): void {
    if (this.#closing || this.#broken.has(pool)) {
      void endPool(pool);
      return;
    }
    this.#idle.unshift(pool);
    let threadCount = 0;
    for (const [index, kept] of [...this.#idle].entries()) {
      threadCount += kept.maxThreads;
      if (index === 0 || threadCount <= KEPT_THREADS_MAX) continue;
      this.#forget(kept);
      void endPool(kept);
    }
  }

  /** Ends the idle threads; those that are given back later end then. */
  close(): void {
    this.#closing = true;
    for (const pool of this.#idle) void endPool(pool);
    this.#idle = [];
  }

  #create(workerCount: number): Piscina {
    const pool = createCopyPool(workerCount, { heap: KEPT_HEAP, startAtOnce: 1 });
    // Unheard, an idle thread that fails would end the process. A run that has the pool listens besides.
    pool.on("error", () => {
      this.#broken.add(pool);
      if (!this.#idle.includes(pool)) return;
      this.#forget(pool);
      void endPool(pool);
    });
    return pool;
  }

  #forget(pool: Piscina): void {
    this.#idle = this.#idle.filter((other) => other !== pool);
  }
}
