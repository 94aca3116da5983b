// How a drainer's reads and writes are carried out: under the job's error policies, its retries and its rate limit.
//
// An operation is a function that may be called again: after a back-off, or after somebody has resumed the job that
// an error paused. Every wait is a step that the drainer's driver takes (workers/copy.ts), and each ends with the job.

import type { OnIoError } from "./policies.js";
import { CowcatcherError, isTransient } from "../errors.js";
import type { Completion } from "../block/device.js";
import {
  CNT_RATE_LIMIT,
  CNT_RATE_NEXT_NS,
  CTL_IGNORED_ERRORS,
  CTL_RUN,
  RUN_ABORTING,
  RUN_PAUSED,
  type SharedState,
} from "./shared.js";
import { bookTransfer } from "./throttle.js";

/** Why a worker's generator paused. */
export type DrainStep =
  /** Others may run here; go on at once. */
  | { kind: "step" }
  /** Go on when `words[index]` no longer is `value` (or was notified). */
  | { kind: "wait"; words: Int32Array; index: number; value: number }
  /** Go on at this monotonic time (ns), or earlier: who sleeps looks again whether it is time. */
  | { kind: "sleep"; untilNs: bigint }
  /** Go on when the promise is fulfilled; throw its reason into the generator. */
  | { kind: "promise"; promise: Promise<void> };

/** Another thread may come between here. */
export const STEP: DrainStep = { kind: "step" };

export type Steps<T> = Generator<DrainStep, T, void>;

export interface DrainIoOptions {
  onSourceError: OnIoError;
  onTargetError: OnIoError;
  targetRetries: number;
  /** Called before the job pauses for an error under the policy `stop`. */
  onStop(error: CowcatcherError): void;
  /** Monotonic clock in nanoseconds. */
  now(): bigint;
}

/** First wait before a failed target write is tried again; doubled each time up to the longest. */
const RETRY_FIRST_MS = 100;
const RETRY_LONGEST_MS = 5_000;

export class DrainIo {
  readonly #shared: SharedState;
  readonly #options: DrainIoOptions;

  constructor(shared: SharedState, options: DrainIoOptions) {
    this.#shared = shared;
    this.#options = options;
  }

  /** Books a write of lengthBytes with the rate limit and waits for its turn; returns when the job is aborted, too. */
  *waitForRate(lengthBytes: number): Steps<void> {
    const { counters, control } = this.#shared;
    let start = bookTransfer(counters, lengthBytes, this.#options.now());
    while (start > this.#options.now()) {
      yield { kind: "sleep", untilNs: start };
      if (Atomics.load(control, CTL_RUN) === RUN_ABORTING) return;
      // Only another limit, with which the schedule begins afresh, makes a booking void: a pause does not.
      if (Atomics.load(counters, CNT_RATE_NEXT_NS) < start) {
        start = bookTransfer(counters, lengthBytes, this.#options.now());
      }
    }
  }

  /** The target may not be written to at this time. */
  get isHeldBack(): boolean {
    const { counters } = this.#shared;
    if (Atomics.load(counters, CNT_RATE_LIMIT) <= 0n) return false;
    return Atomics.load(counters, CNT_RATE_NEXT_NS) > this.#options.now();
  }

  /** Runs one read under the source's error policy: the error if it may be passed over. */
  *fromSource(read: () => Completion): Steps<CowcatcherError | undefined> {
    for (;;) {
      try {
        const pending = read();
        if (pending) yield { kind: "promise", promise: pending };
        return undefined;
      } catch (error) {
        if (!(error instanceof CowcatcherError)) throw error;
        const policy = policyFor(error, this.#options.onSourceError);
        if (policy === "report") throw error;
        if (policy === "ignore") return error;
        if (!(yield* this.#stopFor(error))) throw error;
      }
    }
  }

  /** Runs one write under the target's error policy, after its retries: the error if it was passed over. */
  *toTarget(write: () => Completion): Steps<CowcatcherError | undefined> {
    let attempt = 0;
    for (;;) {
      if (Atomics.load(this.#shared.control, CTL_RUN) === RUN_ABORTING) return undefined;
      try {
        const pending = write();
        if (pending) yield { kind: "promise", promise: pending };
        return undefined;
      } catch (error) {
        if (!(error instanceof CowcatcherError)) throw error;
        // A full target stays full until somebody acts, a read-only one read-only: trying again would only delay the news.
        if (isTransient(error) && attempt < this.#options.targetRetries) {
          yield* this.#backOff(attempt++);
          continue;
        }
        const policy = policyFor(error, this.#options.onTargetError);
        if (policy === "report") throw error;
        if (policy === "ignore") {
          Atomics.add(this.#shared.control, CTL_IGNORED_ERRORS, 1);
          return error;
        }
        if (!(yield* this.#stopFor(error))) throw error;
        attempt = 0;
      }
    }
  }

  *#backOff(attempt: number): Steps<void> {
    const waitMs = Math.min(RETRY_FIRST_MS * 2 ** attempt, RETRY_LONGEST_MS);
    const untilNs = this.#options.now() + BigInt(waitMs) * 1_000_000n;
    while (this.#options.now() < untilNs && Atomics.load(this.#shared.control, CTL_RUN) !== RUN_ABORTING) {
      yield { kind: "sleep", untilNs };
    }
  }

  /** Pauses the job until somebody resumes it; false if it was aborted instead. */
  *#stopFor(error: CowcatcherError): Steps<boolean> {
    const { control } = this.#shared;
    this.#options.onStop(error);
    for (;;) {
      const state = Atomics.load(control, CTL_RUN);
      if (state === RUN_ABORTING) return false;
      if (state !== RUN_PAUSED) return true;
      yield { kind: "wait", words: control, index: CTL_RUN, value: RUN_PAUSED };
    }
  }
}

function policyFor({ code }: CowcatcherError, policy: OnIoError): OnIoError {
  if (policy !== "enospc") return policy;
  return code === "NO_SPACE" ? "stop" : "report";
}
