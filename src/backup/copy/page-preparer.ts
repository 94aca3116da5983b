// The thread that makes a buffer's mapped pages ready while a job begins (workers/pages.ts): its start and its end. Main thread.

import type { Piscina } from "piscina";
import { PAGES_READY, PAGES_STOP, type PageTask } from "../../cow/buffer-pages.js";
import { slotCountOf } from "../../cow/shared.js";
import { type BufferMemory, mappedBytesOf } from "../../cow/slot-memory.js";
import { MiB } from "../../units.js";
import { PAGES_WORKER } from "../worker-files.js";
import { endPool } from "./pool.js";
import type { CopyThreads } from "./threads.js";

/** A thousand page faults, spread over as many captures: a thread that boots takes more of the processors. */
const UNPREPARED_BYTES_MAX = 4 * MiB;

export interface PreparerOptions {
  /** Of the buffer, how much the job uses. */
  bufferBytes: number;
  niceness: number;
}

/** At work from its making on; `stop` ends it. A thread that fails costs captures their page faults and nothing else. */
export class PagePreparer {
  readonly #marks: Int32Array;
  readonly #pool: Piscina | null = null;
  /** Fulfilled when all pages are ready, or it was stopped. Never rejects. */
  readonly ended: Promise<void>;

  constructor(
    private readonly threads: CopyThreads,
    buffer: BufferMemory,
    { bufferBytes, niceness }: PreparerOptions,
  ) {
    const { memory, pages } = buffer;
    this.#marks = new Int32Array(pages);
    Atomics.store(this.#marks, PAGES_STOP, 0);
    const mappedBytes = mappedBytesOf(buffer, bufferBytes);
    const slotCount = slotCountOf(mappedBytes);
    const isReady = Atomics.load(this.#marks, PAGES_READY) >= slotCount;
    if (isReady || mappedBytes <= UNPREPARED_BYTES_MAX) {
      if (!isReady) Atomics.store(this.#marks, PAGES_READY, slotCount);
      this.ended = Promise.resolve();
      return;
    }
    this.#pool = threads.take(1);
    const task: PageTask = { memory, words: pages, slotCount, niceness };
    this.ended = this.#run(this.#pool, task);
  }

  /** The memory is the job's no more. Settles when no thread touches it; never rejects. */
  stop(): Promise<void> {
    Atomics.store(this.#marks, PAGES_STOP, 1);
    return this.ended;
  }

  async #run(pool: Piscina, task: PageTask): Promise<void> {
    try {
      await pool.run(task, { filename: PAGES_WORKER.href });
      this.threads.giveBack(pool);
    } catch {
      void endPool(pool);
    }
  }
}
