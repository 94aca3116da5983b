// Threads that are still loading their modules. Node 20 aborts the process, with a native stack and a core, when a
// thread is ended in that moment, be it by terminate() or by the process's exit ("v8::Module::IsGraphAsync must be
// used on an instantiated module", "Error::ThrowAsJavaScriptException napi_throw"). So nobody terminates a thread
// before `bootsOf` it are over, and the process ends by `endProcess`. At its load, no imports but Node's: the
// program's entry has this module. So does it end where a thread sits in a call that may not return (`mayHang`).

import { setTimeout as delay } from "node:timers/promises";
import { threadId, workerData } from "node:worker_threads";
import { keeperIsBusy } from "../../rbd/busy.js";

/** Threads of one pool. */
export interface Boots {
  /** Their workerData: how many have booted, then their ids. */
  readonly notes: SharedArrayBuffer;
  /** Those that live now: a pool replaces one that dies, so they may be others than at first. Set by who starts them. */
  threads: () => readonly { readonly threadId: number }[];
}

/** A thread that takes longer has a problem of its own. */
const LONGEST_BOOT_MS = 30_000;
const POLL_MS = 5;
/** A pool of which a thread has died is ended, so few are ever replaced. One without a place is waited for in vain. */
const PLACES_PER_THREAD = 4;

/** Of all pools that were not ended: one whose threads have booted may start another thread. */
let pools: Boots[] = [];
/** Whether threads sit in calls that may not return. */
const hangs = new Set<() => boolean>();
let exitAtOnce: ((code: number) => void) | undefined;

/** Main thread, before it starts so many threads. */
export function expectBoots(threadCount: number): Boots {
  const notes = new SharedArrayBuffer(4 * (1 + PLACES_PER_THREAD * threadCount));
  const boots: Boots = { notes, threads: () => [] };
  pools.push(boots);
  // Later, when the threads are on their way: it takes 10 ms.
  import("../../native/libc.js").then(
    ({ libc }) => {
      if (libc !== null) exitAtOnce = (code) => libc.exitAtOnce(code);
    },
    // It cannot be read for want of descriptors: the process ends as without it.
    () => undefined,
  );
  return boots;
}

/**
 * Main thread: `hang` is asked when the process ends. Node waits at its exit for each thread, also for one that sits in a
 * system call; where one does, the process ends without it.
 * @returns what ends the asking
 */
export function mayHang(hang: () => boolean): () => void {
  hangs.add(hang);
  return () => hangs.delete(hang);
}

/** Main thread: the pool is ended, and starts no thread any more. */
export function noMoreBoots(boots: Boots): void {
  pools = pools.filter((other) => other !== boots);
}

/** The thread itself, in its module's body: notes it as booted once whatever imports that module has gone on. */
export function bootIsOver(): void {
  setImmediate(() => {
    if (!(workerData instanceof SharedArrayBuffer)) return;
    const notes = new Int32Array(workerData);
    const place = 1 + Atomics.add(notes, 0, 1);
    if (place < notes.length) Atomics.store(notes, place, threadId);
  });
}

/** Main thread: each of these threads has loaded its modules, has died, or had time enough. Never rejects. */
export async function bootsOver(boots: Boots, longestMs = LONGEST_BOOT_MS): Promise<void> {
  const deadlineMs = performance.now() + longestMs;
  while (areUnderWay(boots) && performance.now() < deadlineMs) await delay(POLL_MS);
}

/** Main thread, before `endProcess` where there is time: waits for boots where nothing but process.exit is at hand. */
export async function mayEndProcess(): Promise<void> {
  if (exitAtOnce === undefined) await Promise.all(pools.map((boots) => bootsOver(boots)));
}

/**
 * Main thread: ends the process now, whatever its threads do. Output that was not flushed is lost, as with
 * process.exit; "exit" handlers run.
 */
export function endProcess(code: number): void {
  const isHeldUp = isAnyBootUnderWay() || keeperIsBusy() || [...hangs].some((hang) => hang());
  if (exitAtOnce !== undefined && isHeldUp) {
    process.emit("exit", code);
    exitAtOnce(code);
  }
  process.exit(code);
}

/** Main thread. */
export function isAnyBootUnderWay(): boolean {
  return pools.some(areUnderWay);
}

function areUnderWay({ notes, threads }: Boots): boolean {
  const booted = new Int32Array(notes).subarray(1);
  return threads().some(({ threadId: id }) => !booted.includes(id));
}
