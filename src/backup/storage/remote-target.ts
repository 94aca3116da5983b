// A target whose life goes on in a storage thread: the main thread's side of it. Its writers are the copying threads'.
//
// abort() does not wait for storage that does not answer. The thread may sit in any step of the target's; what is
// needed to stop after that step is a word in shared memory, and the aborting itself stands in the thread's queue.

import { setTimeout as delay } from "node:timers/promises";
import { unlinkSync } from "node:fs";
import { systemName } from "../../file-names.js";
import type { Target, TargetDescription, TargetOptions } from "../../target/target.js";
import type { MadeTarget, StorageHand } from "./protocol.js";

/** Longer than ordinary storage takes to remove a file. */
const ABORT_WAIT_MS_MAX = 2_500;
const CANCELLED = 1;

export class RemoteTarget implements Target {
  readonly name: string;
  readonly granularityBytes: number;
  readonly description: TargetDescription;
  readonly workerLimit: number | undefined;
  readonly unfinishedPath: string | null;
  readonly temporaryPaths: readonly string[];
  readonly workersAreIn: (() => Promise<void>) | undefined;
  readonly commitWaits: boolean;
  readonly #hand: StorageHand;
  readonly #id: number;
  readonly #cancel: Int32Array;
  #isFinished = false;
  #aborting: Promise<void> | undefined;

  /** @param started as Target.started */
  private constructor(
    hand: StorageHand,
    made: MadeTarget,
    cancel: Int32Array,
    readonly started?: () => void,
  ) {
    this.#hand = hand;
    this.#id = made.id;
    this.#cancel = cancel;
    this.name = made.name;
    this.granularityBytes = made.granularityBytes;
    this.description = made.description;
    this.workerLimit = made.workerLimit;
    this.commitWaits = made.commitWaits;
    this.unfinishedPath = made.unfinishedPath;
    this.temporaryPaths = made.temporaryPaths;
    if (made.awaitsWorkers) {
      // A thread that died has let go of its connections by that.
      this.workersAreIn = () => hand.call("workersAreIn", made.id).catch(() => undefined);
    }
  }

  /**
   * @param signal when it is aborted the making ends at its next step
   * @throws CowcatcherError as createTarget
   */
  static async make(
    hand: StorageHand,
    options: Omit<TargetOptions, "isCancelled">,
    signal: AbortSignal,
  ): Promise<RemoteTarget> {
    const cancel = new Int32Array(new SharedArrayBuffer(Int32Array.BYTES_PER_ELEMENT));
    const onAbort = (): void => void Atomics.store(cancel, 0, CANCELLED);
    signal.addEventListener("abort", onAbort);
    if (signal.aborted) onAbort();
    try {
      return new RemoteTarget(
        hand,
        await hand.call("makeTarget", { options, cancel: cancel.buffer }),
        cancel,
      );
    } finally {
      signal.removeEventListener("abort", onAbort);
    }
  }

  /** One that the thread has made otherwise. @param started as Target.started */
  static adopt(hand: StorageHand, made: MadeTarget, started: () => void): RemoteTarget {
    return new RemoteTarget(hand, made, new Int32Array(1), started);
  }

  complete(): Promise<void> {
    return this.#hand.call("completeTarget", this.#id);
  }

  async commit(): Promise<void> {
    await this.#hand.call("commitTarget", this.#id);
    this.#isFinished = true;
  }

  async finish(): Promise<void> {
    await this.complete();
    await this.commit();
  }

  async abort(): Promise<void> {
    if (this.#isFinished) return;
    Atomics.store(this.#cancel, 0, CANCELLED);
    // Never rejects; nor does the thread's death matter any more.
    this.#aborting ??= this.#hand.call("abortTarget", this.#id).catch(() => undefined);
    await Promise.race([this.#aborting, delay(ABORT_WAIT_MS_MAX, undefined, { ref: false })]);
  }

  /** The process ends now. A thread that sits in a call shows that the storage does not answer: nobody waits for it. */
  abortSync(): void {
    if (this.#isFinished) return;
    Atomics.store(this.#cancel, 0, CANCELLED);
    if (this.#hand.isBusy) return;
    for (const path of this.temporaryPaths) {
      try {
        unlinkSync(systemName(path));
      } catch {
        // Gone already, or its folder is.
      }
    }
  }
}
