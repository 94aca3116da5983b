// The storage threads of a server, kept from job to job: a thread takes some 40 ms to boot, and native modules forget
// something with each that ends (copy/threads.ts). Main thread.
//
//   take ──► calls ──► release ──► idle, once the last call has ended ──► the next job's take
//
// A thread that was released while its storage does not answer is nobody's until that returns. There may be a bounded
// number of them: more than that, and a new job is refused.

import { CowcatcherError } from "../../errors.js";
import { mayHang } from "../copy/thread-boots.js";
import type { ArgumentOf, ResultOf, StorageCall, StorageHand, StorageHands } from "./protocol.js";
import { StorageThread } from "./thread.js";

/** Idle ones: a job has one for its target and up to two for spills. */
const KEPT_MAX = 4;
/** As many jobs as a server may have (job/live-host.ts) with two threads each. */
const THREADS_MAX = 128;

export class StorageThreads implements StorageHands {
  #idle: StorageThread[] = [];
  /** In use, or left behind in a call. */
  readonly #taken = new Set<StorageThread>();
  #closing = false;

  constructor() {
    mayHang(() => [...this.#taken].some((thread) => thread.isBusy));
  }

  take(): StorageHand {
    if (this.#taken.size >= THREADS_MAX) {
      throw new CowcatcherError({
        code: "LIMIT",
        object: "jobs",
        problem: `more than ${THREADS_MAX} storage threads are in use`,
        hint: "some wait for storage that does not answer: see to it",
      });
    }
    // One may have died while it was idle.
    this.#idle = this.#idle.filter(({ isAlive }) => isAlive);
    const thread = this.#idle.pop() ?? new StorageThread();
    let isReleased = false;
    const keepIfDone = (): void => {
      if (isReleased && !thread.isBusy) this.#keep(thread);
    };
    thread.onIdle = keepIfDone;
    this.#taken.add(thread);
    return {
      get isBusy() {
        return thread.isBusy;
      },
      call<Call extends StorageCall>(call: Call, argument: ArgumentOf<Call>): Promise<ResultOf<Call>> {
        return thread.call(call, argument);
      },
      release() {
        isReleased = true;
        keepIfDone();
      },
    };
  }

  /** Boots a thread ahead of the first job that needs it. Settles when it is up; never rejects. */
  async warmUp(): Promise<void> {
    if (this.#closing || this.#idle.length >= KEPT_MAX) return;
    let thread: StorageThread;
    try {
      thread = new StorageThread();
    } catch {
      // The system has none; the first job says so, if that is still true then.
      return;
    }
    this.#idle.push(thread);
    await thread.booted;
  }

  #keep(thread: StorageThread): void {
    if (!this.#taken.delete(thread) || !thread.isAlive) return;
    if (this.#closing || this.#idle.length >= KEPT_MAX) void thread.end();
    else this.#idle.push(thread);
  }

  /** Ends the idle threads; the others end when they are released and idle. */
  close(): void {
    this.#closing = true;
    for (const thread of this.#idle) void thread.end();
    this.#idle = [];
  }
}
