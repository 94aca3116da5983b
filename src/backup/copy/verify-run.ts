// --verify: reads the complete, synced target back and compares each cluster with its digest of T0. Main thread; the
// reading and hashing is the workers' (workers/verify.ts), as this thread serves the guest.
//
//   drop the target from the page cache, so that what is read comes from the medium ──► all workers read, each
//   stretch by one of them ──► no difference, or one error that names the first and counts them all
//
// The check ends early by `cancel`, or when a worker fails: the others see it at their next chunk. One that sits in
// a read that does not return is left behind after ABORT_GRACE_MS.

import { setTimeout as delay } from "node:timers/promises";
import type { Piscina } from "piscina";
import type { Geometry } from "../../cow/geometry.js";
import { CTL_RUN, RUN_ABORTING, RUN_RUNNING } from "../../cow/shared.js";
import { CowcatcherError } from "../../errors.js";
import type { SourceDescription } from "../../block/device.js";
import type { ImageFormat } from "../../block/format.js";
import { formatBytes } from "../../units.js";
import { createCopyPool, endPool } from "./pool.js";
import { ABORT_GRACE_MS, workerError } from "./run.js";
import type { CopyThreads } from "./threads.js";
import { CONTROL_WORDS, type VerifyResult, type VerifyTask } from "./verify-task.js";
import { VERIFY_WORKER } from "../worker-files.js";

export interface VerifyRunOptions {
  geometry: Geometry;
  digests: SharedArrayBuffer;
  path: string;
  name: string;
  format: ImageFormat;
  /** Instead of path and format, where the target is open already for all threads. */
  source?: SourceDescription | undefined;
  direct: boolean;
  workerCount: number;
  /** Where the check has its pool from; one of its own where undefined. */
  threads?: CopyThreads | undefined;
}

export class VerifyRun {
  /** Fulfilled if the target is what was read at T0; rejects with VERIFY if not, or with what ended the check. */
  readonly ended: Promise<void>;
  readonly #task: Omit<VerifyTask, "workerIndex">;
  readonly #control = new Int32Array(new SharedArrayBuffer(CONTROL_WORDS * Int32Array.BYTES_PER_ELEMENT));
  readonly #pool: Piscina;
  readonly #workerCount: number;
  readonly #threads: CopyThreads | undefined;
  #threadDied = false;
  #firstError: CowcatcherError | undefined;
  #giveUp: () => void = () => {};

  constructor({ workerCount, threads, ...target }: VerifyRunOptions) {
    this.#task = { ...target, control: this.#control.buffer };
    this.#workerCount = workerCount;
    this.#threads = threads;
    Atomics.store(this.#control, CTL_RUN, RUN_RUNNING);
    this.#pool = threads?.take(workerCount) ?? createCopyPool(workerCount, { file: VERIFY_WORKER });
    // A thread that fails while it has no task, as one that cannot be started. Unheard, it would end the process.
    this.#pool.on("error", this.#onPoolError);
    this.ended = this.#run();
    // Whoever started the check looks at `ended`; until then a failure is not an unhandled one.
    this.ended.catch(() => {});
  }

  /** Ends the check with this error, unless it has failed already. Returns at once; idempotent. */
  cancel(error: CowcatcherError): void {
    if (this.#firstError !== undefined) return;
    this.#firstError = error;
    Atomics.store(this.#control, CTL_RUN, RUN_ABORTING);
    Atomics.notify(this.#control, CTL_RUN);
    setTimeout(this.#giveUp, ABORT_GRACE_MS).unref();
  }

  async #run(): Promise<void> {
    const abandoned = new Promise<void>((resolve) => {
      this.#giveUp = resolve;
    });
    const results: VerifyResult[] = [];
    const isOver = await Promise.race([this.#check(results).then(() => true), abandoned]);
    await this.#endThreads(isOver === true && !this.#threadDied);
    if (this.#firstError !== undefined) throw this.#firstError;
    const differences = results.reduce((sum, { differingClusterCount }) => sum + differingClusterCount, 0);
    if (differences > 0) throw this.#difference(differences, results);
  }

  async #endThreads(areFit: boolean): Promise<void> {
    if (areFit && this.#threads !== undefined) {
      this.#pool.off("error", this.#onPoolError);
      this.#threads.giveBack(this.#pool);
      return;
    }
    await Promise.race([endPool(this.#pool), delay(ABORT_GRACE_MS, undefined, { ref: false })]);
  }

  readonly #onPoolError = (error: unknown): void => this.cancel(workerError(error));

  async #check(results: VerifyResult[]): Promise<void> {
    await this.#work("dropCache", 0);
    if (this.#firstError !== undefined) return;
    const workers = Array.from({ length: this.#workerCount }, async (_, workerIndex) => {
      const result = await this.#work("default", workerIndex);
      if (result !== undefined) results.push(result);
    });
    await Promise.all(workers);
  }

  /** Undefined: the worker failed, and with it the check. */
  async #work(name: "dropCache" | "default", workerIndex: number): Promise<VerifyResult | undefined> {
    try {
      const task: VerifyTask = { ...this.#task, workerIndex };
      const result = (await this.#pool.run(task, { name, filename: VERIFY_WORKER.href })) as VerifyResult;
      if (result.error === undefined) return result;
      this.cancel(new CowcatcherError({ ...result.error, cause: result.stack }));
    } catch (error) {
      this.#threadDied = true;
      this.cancel(workerError(error));
    }
    return undefined;
  }

  #difference(clusterCount: number, results: readonly VerifyResult[]): CowcatcherError {
    const size = formatBytes(this.#task.geometry.clusterBytes);
    const [clusters, where] =
      clusterCount === 1
        ? [`1 cluster of ${size} differs`, "the one"]
        : [`${clusterCount} clusters of ${size} differ`, "the first"];
    return new CowcatcherError({
      code: "VERIFY",
      object: this.#task.name,
      problem: `read back, ${clusters} from what was read at T0, ${where}`,
      hint: "do not trust this storage: it, or the way to it, changed the data",
      offsetBytes: Math.min(...results.map(({ firstDifferenceBytes }) => firstDifferenceBytes)),
    });
  }
}
