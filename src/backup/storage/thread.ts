// A storage thread, as the main thread has it. Everything that a server does with storage which is not its guests' own
// (the target's folder, the spill's, a backing file beside the target) is a call to one: the main thread serves the
// guests and may wait for nobody else's storage, and libuv's pool is the guests', too (block/file/calls.ts).
//
//   main thread                                   storage thread (workers/storage.ts)
//     call ──message──►                             carries the calls out, each to its end, in the order in which
//     promise ◄──message──                          they came; sits in one for as long as its storage takes
//
// A call that does not return cannot be ended. Whoever waits for one has a way to stop waiting, and leaves the thread:
// what still stands in its queue (the aborting of the target, the closing of the spill) is done when the call returns.

import { Worker } from "node:worker_threads";
import { CowcatcherError, messageOf } from "../../errors.js";
import { type Boots, bootsOver, expectBoots, noMoreBoots } from "../copy/thread-boots.js";
import { STORAGE_WORKER } from "../worker-files.js";
import type { AnswerMessage, ArgumentOf, CallMessage, ResultOf, StorageCall } from "./protocol.js";

/** It holds no data but what lies in shared memory; most of it is code. */
const HEAP = { maxOldGenerationSizeMb: 128, maxYoungGenerationSizeMb: 2 };

interface OpenCall {
  resolve: (result: never) => void;
  reject: (error: CowcatcherError) => void;
}

export class StorageThread {
  readonly #worker: Worker;
  readonly #boots: Boots;
  readonly #calls = new Map<number, OpenCall>();
  /** Called when the last of the calls has ended, and when the thread has died. */
  onIdle: () => void = () => {};
  #lastId = 0;
  #death: CowcatcherError | undefined;

  constructor() {
    this.#boots = expectBoots(1);
    this.#worker = new Worker(STORAGE_WORKER, {
      workerData: this.#boots.notes,
      resourceLimits: HEAP,
      // Copying threads write through the descriptors that this one has opened; it closes them itself.
      trackUnmanagedFds: false,
    });
    this.#boots.threads = () => (this.#death === undefined ? [this.#worker] : []);
    // What keeps the process alive is its sockets; a call that hangs must not.
    this.#worker.unref();
    this.#worker.on("message", (answer: AnswerMessage) => this.#answered(answer));
    this.#worker.on("error", (error) => this.#died(messageOf(error)));
    this.#worker.on("exit", (code) => this.#died(`exit code ${code}`));
  }

  get isBusy(): boolean {
    return this.#calls.size > 0;
  }

  get isAlive(): boolean {
    return this.#death === undefined;
  }

  /** Settles when it is up, or has died. Never rejects. */
  get booted(): Promise<void> {
    return bootsOver(this.#boots);
  }

  call<Call extends StorageCall>(call: Call, argument: ArgumentOf<Call>): Promise<ResultOf<Call>> {
    if (this.#death !== undefined) return Promise.reject(this.#death);
    const id = ++this.#lastId;
    return new Promise((resolve, reject) => {
      this.#calls.set(id, { resolve, reject });
      this.#worker.postMessage({ id, call, argument } satisfies CallMessage);
    });
  }

  /** Nothing is on its way, or will be called any more. Never rejects. */
  async end(): Promise<void> {
    await bootsOver(this.#boots);
    await this.#worker.terminate();
    noMoreBoots(this.#boots);
  }

  #answered(answer: AnswerMessage): void {
    const call = this.#calls.get(answer.id);
    this.#calls.delete(answer.id);
    if ("error" in answer) call?.reject(new CowcatcherError({ ...answer.error, cause: answer.stack }));
    else call?.resolve(answer.result as never);
    if (this.#calls.size === 0) this.onIdle();
  }

  #died(reason: string): void {
    if (this.#death !== undefined) return;
    this.#death = new CowcatcherError({
      code: "WORKER",
      object: "backup",
      problem: `a storage thread died: ${reason}`,
      hint: "start the backup again; with --log-level debug the log has the stack",
    });
    const calls = [...this.#calls.values()];
    this.#calls.clear();
    for (const { reject } of calls) reject(this.#death);
    this.onIdle();
  }
}
