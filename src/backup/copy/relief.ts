// When threads help a main thread that copies first (here.ts), and when the last of them is done. Main thread.

import { setTimeout as delay } from "node:timers/promises";
import { CTL_SWEEP, CTL_TAKERS } from "../../cow/shared.js";

/**
 * Another thread is worth its boot, 60 ms of both processors, where this one would need so much longer: two write one file
 * little faster than one, as the kernel lets them do it in turn.
 */
const WORTH_A_THREAD_MS = 500;
/** Until then this thread is alone in any case, as what it has done says little. */
const ALONE_MS = 500;
/**
 * Until then it is one of those that copy. It is to hear of signals even where a file system stops answering; holes, that
 * take it microseconds each, need no other one until then either.
 */
const HERE_MS = 1_000;
const HERE_POLL_MS = 100;

export interface ReliefParts {
  /** Fulfilled when this thread copies no more. */
  here: Promise<unknown>;
  workerCount: number;
  /** Fulfilled when the thread is ready to copy; called once for each index below `workerCount` at most. */
  startWorker: (index: number) => Promise<void>;
  /** How far the copy is. leftMs: at the pace so far; NaN or infinite where nothing is done. */
  pace: () => { elapsedMs: number; leftMs: number; hasWritten: boolean };
  hasFailed: () => boolean;
  /** Between two looks at all that. */
  poll?: () => Promise<unknown>;
}

/**
 * Starts other threads where the copy is not soon done, and after a while one for this thread's place.
 * @returns whether that one is there, so that this thread is to end with the chunk in hand
 * @throws what `startWorker` rejects with
 */
export async function relieve({
  here,
  workerCount,
  startWorker,
  pace,
  hasFailed,
  poll = () => delay(HERE_POLL_MS, undefined, { ref: false }),
}: ReliefParts): Promise<boolean> {
  const ended = here.then(() => true);
  const isOver = async (): Promise<boolean> =>
    (await Promise.race([ended, poll().then(() => false)])) || hasFailed();
  const isWorthMore = (afterMs: number): boolean => {
    const { elapsedMs, leftMs } = pace();
    return elapsedMs >= afterMs && !(leftMs < WORTH_A_THREAD_MS);
  };
  while (!isWorthMore(pace().hasWritten ? ALONE_MS : HERE_MS)) if (await isOver()) return false;
  for (let index = 1; index < workerCount; index++) void startWorker(index);
  while (!isWorthMore(HERE_MS)) if (await isOver()) return false;
  await Promise.race([here, startWorker(0)]);
  return true;
}

/**
 * Fulfilled when this thread has done its part, and all chunks are copied or all threads gone. A thread that has taken no
 * chunk by the sweep's end is not waited for: it finds nothing to do whenever it comes.
 * @param here never rejects, nor does one of `threads`, each of which is fulfilled when that thread is gone
 */
export async function allTakersAreDone(
  here: Promise<unknown> | undefined,
  threads: readonly Promise<unknown>[],
  { control, chunkCount }: { control: Int32Array; chunkCount: number },
  hasFailed: () => boolean,
): Promise<void> {
  await here;
  let goneCount = 0;
  const present = new Set<Promise<void>>();
  for (const thread of threads) {
    const isGone = thread.then(() => {
      goneCount++;
      present.delete(isGone);
    });
    present.add(isGone);
  }
  // In this order: who counts itself in after the second look finds the sweep at its end.
  const areAllDone = (): boolean =>
    !hasFailed() &&
    Atomics.load(control, CTL_SWEEP) >= chunkCount &&
    Atomics.load(control, CTL_TAKERS) <= goneCount;
  while (present.size > 0 && !areAllDone()) await Promise.race(present);
}
