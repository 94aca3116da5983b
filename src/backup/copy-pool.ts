// The threads of a copy, which may be started before it is known what they are to copy. Main thread.
//
// A thread takes some 50 ms to boot, about as long as it takes to parse the command line, load what opens images and
// open them. An offline copy that starts its threads first has both at the same time.

import { Piscina } from "piscina";
import { allBootsOver, expectBoots } from "./thread-boots.js";

const WORKER_FILE = new URL("../../workers/copy.js", import.meta.url);
/** A worker's heap holds tables, never data: small limits keep a job's memory at its buffer. */
export const WORKER_HEAP = { maxOldGenerationSizeMb: 128, maxYoungGenerationSizeMb: 8 };

/** Threads that boot while the caller goes on. The caller destroys the pool. */
export function createCopyPool(
  workerCount: number,
  { file = WORKER_FILE, heap = WORKER_HEAP } = {},
): Piscina {
  return new Piscina({
    filename: file.href,
    minThreads: workerCount,
    maxThreads: workerCount,
    concurrentTasksPerWorker: 1,
    // A thread that is kept goes on with its events after a task: sockets and ports are closed in them.
    atomics: "disabled",
    resourceLimits: heap,
    workerData: expectBoots(workerCount),
    recordTiming: false,
  });
}

let early: { pool: Piscina; workerCount: number } | undefined;

/** Starts the threads of the process's first copy. The process may end without ever using them. */
export function startCopyPoolEarly(workerCount: number): void {
  const pool = createCopyPool(workerCount);
  // Whoever takes the pool listens then; unheard, a thread that cannot be started would end the process.
  pool.on("error", () => undefined);
  early = { pool, workerCount };
}

/** The pool that was started early where it has that many threads, else a new one. */
export function takeCopyPool(workerCount: number): Piscina {
  const taken = early;
  early = undefined;
  if (taken?.workerCount === workerCount) return taken.pool;
  if (taken !== undefined) dropCopyPool(taken.pool);
  return createCopyPool(workerCount);
}

/** Ends threads that no one has used, which may still be booting. Returns at once. */
export function dropCopyPool(pool: Piscina): void {
  void allBootsOver()
    .then(() => pool.destroy())
    .catch(() => undefined);
}
