// The life of a target that is a file or a block device:
//
//   open ──complete()──► completing ──► complete ──commit()──► committing ──► finished
//
// and from anywhere but the end abort() leads to `aborted`. complete() closes the gate to workers first, so the
// metadata that it writes is the last; abort() closes it too, unlinks at once and closes the descriptors when the
// last user is gone (see gate.ts): a write to a server that does not answer may take its time, and abort() does not
// wait for it.
//
// From complete() on a device may hold a header that makes an image of it. An abort between then and commit() takes
// it off again (`retract`), after the step that is in flight, which might write it yet. abort() waits for that for a
// while, as the process may end then; if the storage answers later, it is done later. On the thread that made it.

import { CowcatcherError } from "../../errors.js";
import { syncData, type TargetFile } from "./file.js";
import { closeGate, writesInFlight } from "./gate.js";
import type { Target, TargetDescription } from "../target.js";

const CLOSE_POLL_MS = 100;
/** A write that hangs for longer keeps its descriptors until the process ends. */
const CLOSE_WAIT_MS_MAX = 10 * 60_000;
/** A last sync of ordinary storage takes less; a user who gives up a backup waits for no more. */
const RETRACT_WAIT_MS_MAX = 2_000;

export interface FileTargetParts {
  file: TargetFile;
  description: TargetDescription;
  granularityBytes: number;
  /** The gate's memory, and whatever the format adds to it. */
  shared: SharedArrayBuffer;
  /** Writes the format's own metadata. Asks `checkOpen` now and then, which throws once the target is aborted. */
  writeMetadata(checkOpen: () => void): Promise<void>;
  /** Asked between two steps: who wants it aborted may be on a thread whose word comes only after the step in flight. */
  isCancelled?: (() => boolean) | undefined;
  /** Where unlinking takes nothing away (a device): undoes, on the medium, what makes it look like an image. */
  retract?: (() => Promise<void>) | undefined;
}

export class FileTarget implements Target {
  readonly name: string;
  readonly granularityBytes: number;
  readonly description: TargetDescription;
  readonly unfinishedPath: string;
  readonly temporaryPaths: readonly string[];
  readonly #parts: FileTargetParts;
  readonly #gate: Int32Array;
  #state: "open" | "completing" | "complete" | "committing" | "finished" | "aborted" = "open";
  /** complete(), commit() and abort() use the descriptors as a worker does. */
  #stepInFlight = false;
  /** Fulfilled when the last step has ended, well or not. */
  #stepEnd: Promise<void> = Promise.resolve();
  #mustRetract = false;
  #retracted: Promise<void> | null = null;
  #closed = false;

  constructor(parts: FileTargetParts) {
    this.name = parts.file.name;
    this.granularityBytes = parts.granularityBytes;
    this.description = parts.description;
    this.unfinishedPath = parts.file.readPath;
    this.temporaryPaths = parts.file.temporaryPaths;
    this.#parts = parts;
    this.#gate = new Int32Array(parts.shared);
  }

  async complete(): Promise<void> {
    if (this.#state !== "open") throw this.#misuse(`complete() on a target that is ${this.#state}`);
    const inFlight = closeGate(this.#gate);
    if (inFlight !== 0) throw this.#misuse(`complete() while ${inFlight} writes are in flight`);
    this.#state = "completing";
    const { file } = this.#parts;
    await this.#step(async () => {
      await this.#parts.writeMetadata(() => this.#checkNotAborted());
      this.#checkNotAborted();
      await syncData(file.name, file.bufferedFd);
      this.#checkNotAborted();
    });
    this.#state = "complete";
  }

  async commit(): Promise<void> {
    if (this.#state !== "complete") throw this.#misuse(`commit() on a target that is ${this.#state}`);
    this.#checkNotAborted();
    this.#state = "committing";
    await this.#step(() => this.#parts.file.commit(() => this.#checkNotAborted()));
    // An abort that came while the file got its name was too late: the target is complete and stays.
    this.#state = "finished";
    await this.#closeDescriptors();
  }

  async finish(): Promise<void> {
    await this.complete();
    await this.commit();
  }

  async #step(work: () => Promise<void>): Promise<void> {
    this.#stepInFlight = true;
    const running = work();
    this.#stepEnd = running.catch(() => {});
    try {
      await running;
    } catch (error) {
      // What the abort led to is not the cause.
      if (this.#state === "aborted") this.#checkNotAborted();
      throw error;
    } finally {
      this.#stepInFlight = false;
    }
  }

  async abort(): Promise<void> {
    if (!this.#abandon()) return;
    await this.#parts.file.unlink();
    if (this.#mustRetract) await atMost(RETRACT_WAIT_MS_MAX, (this.#retracted ??= this.#retract()));
    if (this.#isIdle()) await this.#closeDescriptors();
    else this.#closeWhenIdle();
  }

  abortSync(): void {
    if (this.#abandon()) this.#parts.file.unlinkSync();
  }

  #abandon(): boolean {
    if (this.#state === "finished" || this.#closed) return false;
    const mayBeImage = this.#state === "completing" || this.#state === "complete";
    if (mayBeImage && this.#parts.retract !== undefined) this.#mustRetract = true;
    this.#state = "aborted";
    closeGate(this.#gate);
    return true;
  }

  async #retract(): Promise<void> {
    await this.#stepEnd;
    this.#stepInFlight = true;
    // It is given up already; what fails here is not the cause.
    await this.#parts.retract?.().catch(() => {});
    this.#stepInFlight = false;
    this.#mustRetract = false;
  }

  #isIdle(): boolean {
    return !this.#stepInFlight && !this.#mustRetract && writesInFlight(this.#gate) === 0;
  }

  #closeWhenIdle(): void {
    let waitedMs = 0;
    const timer = setInterval(() => {
      waitedMs += CLOSE_POLL_MS;
      if (!this.#isIdle() && waitedMs < CLOSE_WAIT_MS_MAX) return;
      clearInterval(timer);
      if (this.#isIdle()) void this.#closeDescriptors();
    }, CLOSE_POLL_MS);
    timer.unref();
  }

  async #closeDescriptors(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    await this.#parts.file.closeDescriptors();
  }

  #checkNotAborted(): void {
    if (this.#state !== "aborted" && this.#parts.isCancelled?.() !== true) return;
    throw new CowcatcherError({ code: "CANCELLED", object: this.name, problem: "the target was aborted" });
  }

  #misuse(problem: string): CowcatcherError {
    return new CowcatcherError({ code: "INTERNAL", object: this.name, problem });
  }
}

async function atMost(waitMs: number, work: Promise<void>): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const over = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, waitMs);
  });
  await Promise.race([work, over]);
  clearTimeout(timer);
}
