// The threads of a copy, which may be started before it is known what they are to copy. Main thread.
//
// A thread takes some 50 ms to boot, about as long as it takes to parse the command line, load what opens images and
// open them. An offline copy that starts its threads first has both at the same time, where it needs them from its start
// on (see here.ts).

import type { Worker } from "node:worker_threads";
import type { Piscina } from "piscina";
import { loadPiscina } from "./piscina.js";
import { type Boots, bootsOver, expectBoots, noMoreBoots } from "./thread-boots.js";
import { COPY_WORKER } from "../worker-files.js";

/** A worker's heap holds tables, never data: small limits keep a job's memory at its buffer. */
export const WORKER_HEAP = { maxOldGenerationSizeMb: 128, maxYoungGenerationSizeMb: 8 };

const bootsOf = new WeakMap<Piscina, Boots>();
/** The first error of a thread that had no task. */
const failureOf = new WeakMap<Piscina, { readonly error: unknown }>();

/**
 * Threads that boot while the caller goes on: `startAtOnce` of them now, the others when there is a task for each. The
 * caller ends the pool by `endPool`.
 */
export function createCopyPool(
  workerCount: number,
  { file = COPY_WORKER, heap = WORKER_HEAP, startAtOnce = workerCount } = {},
): Piscina {
  const piscina = loadPiscina();
  const boots = expectBoots(workerCount);
  // The constructor throws where it cannot start all of them; those that it did start are booting nevertheless.
  const begun = threadsBegunNow();
  boots.threads = () => begun.filter(({ threadId }) => threadId > 0);
  const pool = new piscina.Piscina({
    filename: file.href,
    minThreads: startAtOnce,
    maxThreads: workerCount,
    idleTimeout: Infinity,
    concurrentTasksPerWorker: 1,
    // A thread that is kept goes on with its events after a task: sockets and ports are closed in them.
    atomics: "disabled",
    resourceLimits: heap,
    workerData: boots.notes,
    recordTiming: false,
  });
  boots.threads = () => pool.threads;
  // Unheard, a thread that cannot be started would end the process, before the pool's job listens and after.
  pool.on("error", (error: unknown) => {
    if (!failureOf.has(pool)) failureOf.set(pool, { error });
  });
  bootsOf.set(pool, boots);
  return pool;
}

/** Fills with the threads that are started in this turn of the event loop, once it is over. */
function threadsBegunNow(): Worker[] {
  const begun: Worker[] = [];
  const note = (worker: Worker): void => {
    begun.push(worker);
  };
  process.on("worker", note);
  setImmediate(() => process.off("worker", note));
  return begun;
}

/** What a thread of the pool has failed with while it had no task; undefined: none has. */
export function poolFailure(pool: Piscina): { readonly error: unknown } | undefined {
  return failureOf.get(pool);
}

/** Settles when each thread that the pool has now is up. Never rejects. */
export async function poolHasBooted(pool: Piscina): Promise<void> {
  const boots = bootsOf.get(pool);
  if (boots !== undefined) await bootsOver(boots);
}

/**
 * Ends the pool's threads, those that boot once they have. Settles when they are gone, which for one that sits in a
 * system call may be never. Never rejects.
 */
export async function endPool(pool: Piscina): Promise<void> {
  await poolHasBooted(pool);
  await pool.destroy().catch(() => undefined);
  const boots = bootsOf.get(pool);
  if (boots !== undefined) noMoreBoots(boots);
}

let early: { pool: Piscina; workerCount: number } | undefined;

/** Starts the threads of the process's first copy. The process may end without ever using them. */
export function startCopyPoolEarly(workerCount: number): void {
  let pool: Piscina;
  try {
    pool = createCopyPool(workerCount);
  } catch {
    // Whoever needs the threads tries again, and says why there are none.
    return;
  }
  early = { pool, workerCount };
}

/** The pool that was started early where it has that many threads, else a new one. */
export function takeCopyPool(workerCount: number): Piscina {
  const taken = early;
  early = undefined;
  if (taken?.workerCount === workerCount) return taken.pool;
  if (taken !== undefined) void endPool(taken.pool);
  return createCopyPool(workerCount);
}

/** Ends the threads that were started early, where nobody has taken them. */
export function endEarlyPool(): void {
  if (early !== undefined) void endPool(early.pool);
  early = undefined;
}
