// Threads that are still loading their modules. Node 20 aborts the process, with a native stack and a core, when a
// thread is ended in that moment, be it by terminate() or by the process's exit ("v8::Module::IsGraphAsync must be
// used on an instantiated module", "Error::ThrowAsJavaScriptException napi_throw"). So nobody terminates a thread
// before `bootsOf` it are over, and the process ends by `endProcess`. At its load, no imports but Node's: the
// program's entry has this module.

import { setTimeout as delay } from "node:timers/promises";
import { workerData } from "node:worker_threads";

/** Threads that boot together. */
export interface Boots {
  /** Their workerData. */
  readonly counter: SharedArrayBuffer;
  readonly threadCount: number;
}

/** A thread that takes longer has a problem of its own. */
const LONGEST_BOOT_MS = 30_000;
const POLL_MS = 5;

let underWay: Boots[] = [];
let exitAtOnce: ((code: number) => void) | undefined;

/** Main thread, before it starts so many threads. */
export function expectBoots(threadCount: number): Boots {
  const boots = { counter: new SharedArrayBuffer(4), threadCount };
  underWay = [...underWay.filter(areUnderWay), boots];
  // Later, when the threads are on their way: it takes 10 ms.
  void import("../native/libc.js").then(({ libc }) => {
    if (libc !== null) exitAtOnce = (code) => libc.exitAtOnce(code);
  });
  return boots;
}

/** The thread itself, in its module's body: counts it as booted once whatever imports that module has gone on. */
export function bootIsOver(): void {
  setImmediate(() => {
    if (workerData instanceof SharedArrayBuffer) Atomics.add(new Int32Array(workerData), 0, 1);
  });
}

/** Main thread: each of these threads has loaded its modules, or had time enough. Never rejects. */
export async function bootsOver(boots: Boots, longestMs = LONGEST_BOOT_MS): Promise<void> {
  const deadlineMs = performance.now() + longestMs;
  while (areUnderWay(boots) && performance.now() < deadlineMs) await delay(POLL_MS);
}

/** Main thread, before `endProcess` where there is time: waits for boots where nothing but process.exit is at hand. */
export async function mayEndProcess(): Promise<void> {
  if (exitAtOnce === undefined) await Promise.all(underWay.map((boots) => bootsOver(boots)));
}

/**
 * Main thread: ends the process now, whatever its threads do. Output that was not flushed is lost, as with
 * process.exit; "exit" handlers run.
 */
export function endProcess(code: number): void {
  if (exitAtOnce !== undefined && underWay.some(areUnderWay)) {
    process.emit("exit", code);
    exitAtOnce(code);
  }
  process.exit(code);
}

function areUnderWay({ counter, threadCount }: Boots): boolean {
  return Atomics.load(new Int32Array(counter), 0) < threadCount;
}
