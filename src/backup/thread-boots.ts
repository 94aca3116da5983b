// Threads that are still loading their modules. Node 20 aborts the process, with a native stack and a core, when a
// thread is ended in that moment, be it by terminate() or by the process's exit ("v8::Module::IsGraphAsync must be
// used on an instantiated module", "Error::ThrowAsJavaScriptException napi_throw"). So whoever may end threads early
// waits for them here. No imports but Node's: the program's entry has this module.

import { setTimeout as delay } from "node:timers/promises";
import { workerData } from "node:worker_threads";

interface Boot {
  booted: Int32Array;
  threadCount: number;
}

/** A thread that takes longer has a problem of its own. */
const LONGEST_BOOT_MS = 2_000;
const POLL_MS = 5;

let boots: Boot[] = [];

/** Main thread, before it starts so many threads; what it returns is their workerData. */
export function expectBoots(threadCount: number): SharedArrayBuffer {
  const counter = new SharedArrayBuffer(4);
  boots = [...boots.filter(isUnderWay), { booted: new Int32Array(counter), threadCount }];
  return counter;
}

/** The thread itself, once its modules are loaded. */
export function bootIsOver(): void {
  if (workerData instanceof SharedArrayBuffer) Atomics.add(new Int32Array(workerData), 0, 1);
}

/** Main thread: every thread that was started has loaded its modules, or had time enough. Never rejects. */
export async function allBootsOver(): Promise<void> {
  const deadlineMs = performance.now() + LONGEST_BOOT_MS;
  while (boots.some(isUnderWay) && performance.now() < deadlineMs) await delay(POLL_MS);
}

function isUnderWay({ booted, threadCount }: Boot): boolean {
  return Atomics.load(booted, 0) < threadCount;
}
