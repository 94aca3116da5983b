// What follows the copy: metadata and sync, the check if it was asked for, the final name. A target that does not
// pass the check, or whose job is cancelled before it gets its name, never has one. Main thread.

import type { SharedState } from "../../cow/shared.js";
import { CowcatcherError } from "../../errors.js";
import type { Target } from "../../target/target.js";
import type { CopyThreads } from "../copy/threads.js";
import type { JobOptions } from "../options.js";
import { VerifyRun } from "../copy/verify-run.js";

/** Ordinary storage gives a name in less: a cancel that comes meanwhile is too late. */
const NAMING_GRACE_MS = 2_000;

export class Finishing {
  readonly #target: Target;
  readonly #job: JobOptions;
  readonly #shared: SharedState;
  readonly #threads: CopyThreads | undefined;
  #check: VerifyRun | null = null;
  #cancelled: CowcatcherError | undefined;
  #isUnderWay = false;
  #named = false;
  /** The commit is under way, and abort() may still come before it. */
  #isUndecided = false;
  /** Of storage that does not say whether the target has its name. */
  #silence: CowcatcherError | undefined;
  #giveUp: (error: CowcatcherError) => void = () => {};
  /** Rejects at `cancel`: a sync to storage that does not answer may never end, and nobody has to wait for it. */
  readonly #givenUp = new Promise<never>((_resolve, reject) => {
    this.#giveUp = reject;
  });

  /** @param threads whose the check's threads are; its own where undefined. */
  constructor(target: Target, job: JobOptions, shared: SharedState, threads?: CopyThreads) {
    this.#target = target;
    this.#job = job;
    this.#shared = shared;
    this.#threads = threads;
    this.#givenUp.catch(() => {});
  }

  /** Whether `run` has begun: the target is neither as the workers left it nor complete. */
  get isUnderWay(): boolean {
    return this.#isUnderWay;
  }

  /** Before `run`: what it waits for, unless it is cancelled meanwhile. @throws CowcatcherError its cause */
  async after(event: Promise<void>): Promise<void> {
    await Promise.race([event, this.#givenUp]);
    this.#throwIfCancelled();
  }

  /** The workers have ended. @throws CowcatcherError; the target is still to be aborted then. */
  async run(): Promise<void> {
    this.#throwIfCancelled();
    this.#isUnderWay = true;
    await Promise.race([this.#target.complete(), this.#givenUp]);
    this.#throwIfCancelled();
    await this.#verify();
    this.#throwIfCancelled();
    if (this.#target.commitWaits === true) {
      await this.#commitWithOthers();
      return;
    }
    if (this.#target.commitMayHang === true) {
      await Promise.race([this.#target.commit(), this.#givenUp]);
      this.#named = true;
      return;
    }
    this.#named = true;
    await Promise.race([this.#target.commit(), this.#givenUp]);
  }

  async #commitWithOthers(): Promise<void> {
    this.#isUndecided = true;
    try {
      await Promise.race([this.#target.commit(), this.#givenUp]);
    } catch (error) {
      throw error === this.#silence ? error : (this.#cancelled ?? error);
    } finally {
      this.#isUndecided = false;
      this.#named = true;
    }
  }

  /**
   * Ends it with this error. False: too late, the target is getting its name; if that does not come about in a while it
   * ends nevertheless, as nobody has to wait for storage that does not answer.
   */
  cancel(error: CowcatcherError): boolean {
    if (this.#isUndecided) {
      this.#cancelled ??= error;
      void this.#target.abort();
    }
    if (this.#named || this.#isUndecided) {
      setTimeout(() => this.#giveUp((this.#silence = this.#unnamed(error))), NAMING_GRACE_MS).unref();
      return false;
    }
    this.#cancelled ??= error;
    this.#giveUp(error);
    this.#check?.cancel(error);
    return true;
  }

  async #verify(): Promise<void> {
    const { geometry, digests } = this.#shared.buffers;
    const { unfinishedPath, name, description, readBack } = this.#target;
    if (digests === undefined || unfinishedPath === null) return;
    if (
      description.format === "null" ||
      description.format === "stdout" ||
      description.format === "repository"
    )
      return;
    this.#check = new VerifyRun({
      geometry,
      digests,
      path: unfinishedPath,
      name,
      format: description.format === "qcow2" ? "qcow2" : "raw",
      source: readBack,
      direct: description.direct,
      threads: this.#threads,
      workerCount: Math.min(this.#job.workerCount, this.#target.workerLimit ?? Infinity),
    });
    await this.#check.ended;
  }

  #unnamed({ code }: CowcatcherError): CowcatcherError {
    return new CowcatcherError({
      code,
      object: this.#target.name,
      problem: "was cancelled while it was getting its name, and its storage does not answer",
      hint: "look whether it is there when the storage answers again: it is complete then",
    });
  }

  #throwIfCancelled(): void {
    if (this.#cancelled !== undefined) throw this.#cancelled;
  }
}
