// A job of QEMU's sync mode `none`: from T0 on the disk's snapshot can be read, and nothing is copied anywhere.
//
//   created ─start─► running ⇄ paused ─cancel, or the snapshot is lost─► aborting ─cleaned up─► concluded ─► null
//
// It never ends by itself. Cancelling it is its orderly end, as in QEMU: the job's error is CANCELLED and the event
// BLOCK_JOB_CANCELLED; only who waits for it (the command line) takes that for success. A pause has nothing to hold
// up and only shows. In QEMU the old data would go to the target; here the spill does that office, and a target of
// old blocks alone, whose rest stands in a disk that goes on changing, would be of use to nobody after the end.

import { CowcatcherError } from "../../errors.js";
import type { SnapshotInfo } from "../host.js";
import type { HostedJob, HostedJobParts } from "./hosted-job.js";
import { JobState } from "./job-state.js";
import type { JobOptions } from "../options.js";
import { type JobProgress, NO_PROGRESS } from "../progress.js";
import { Snapshot } from "./snapshot.js";

export class SnapshotJob extends JobState implements HostedJob {
  readonly #snapshot: Snapshot;
  #startMs: number | undefined;
  #endMs: number | undefined;

  private constructor(parts: HostedJobParts, snapshot: Snapshot) {
    super(parts);
    this.#snapshot = snapshot;
  }

  /** @throws CowcatcherError; nothing is left then. */
  static async prepare(parts: HostedJobParts): Promise<SnapshotJob> {
    refuseOptions(parts.options);
    const { node, options, buffers, tables, threads, publisher, tracker, hands, signal } = parts;
    const snapshot = await Snapshot.prepare({
      node,
      options,
      buffers,
      tables,
      threads,
      publisher,
      tracker,
      hands,
      signal,
      onBroken: (error) => job.#end(error),
    });
    const job: SnapshotJob = new SnapshotJob(parts, snapshot);
    return job;
  }

  get snapshot(): SnapshotInfo | undefined {
    return this.isOver ? undefined : this.#snapshot.info;
  }

  beforeT0(): Promise<void> {
    return this.#snapshot.beforeT0();
  }

  checkReady(): void {
    // There are no workers that could have failed since.
  }

  start(t0Ms: number): void {
    this.#snapshot.start();
    this.t0Ms = t0Ms;
    this.#startMs = performance.now();
    this.setStatus("running");
  }

  async abandon(): Promise<void> {
    await this.#snapshot.end();
  }

  /** The first cause stays; the guest is free at once. */
  #end(error: CowcatcherError): void {
    if (this.status !== "running" && this.status !== "paused") return;
    this.error = error;
    this.#snapshot.detach();
    this.#endMs = performance.now();
    this.setStatus("aborting");
    void this.#conclude();
  }

  async #conclude(): Promise<void> {
    await this.#snapshot.end();
    this.conclude();
  }

  cancel(cause?: CowcatcherError): void {
    const ended = new CowcatcherError({
      code: "CANCELLED",
      object: this.#snapshot.info.exportName,
      problem: "the snapshot was ended",
    });
    this.#end(cause ?? ended);
  }

  pause(): void {
    if (this.status === "running") this.setStatus("paused");
  }

  resume(): void {
    if (this.status === "paused") this.setStatus("running");
  }

  setSpeed(bytesPerSecond: number): void {
    this.speed = bytesPerSecond;
  }

  /** `bytesDone` is what was captured, as in QEMU: the rest is read from the disk itself. */
  progress(): JobProgress {
    const counters = this.#snapshot.counters;
    const { sizeBytes } = this.#snapshot.geometry;
    const nowMs = this.#endMs ?? performance.now();
    return {
      ...NO_PROGRESS,
      bytesDone: Math.min(counters?.capturedBytes ?? 0, sizeBytes),
      bytesTotal: sizeBytes,
      bufferBytesUsed: this.#snapshot.bufferBytesUsed,
      bufferBytesTotal: this.#snapshot.bufferBytesTotal,
      elapsedMs: this.#startMs === undefined ? 0 : nowMs - this.#startMs,
      ...counters,
    };
  }

  abortSync(): void {
    // Nothing outlives the process: the spill file has no name.
  }
}

/** What cannot mean anything without a target, said before anything is prepared. */
function refuseOptions(options: JobOptions): void {
  const { target, onBufferFull, cowBufferSizeBytes, verify, checkpoint, since } = options;
  const refuse = (object: string, problem: string, hint: string): never => {
    throw new CowcatcherError({ code: "USAGE", object, problem, hint });
  };
  if (target !== "null:") {
    refuse(target, "sync none writes no target", "give null: and read the snapshot's export");
  }
  if (onBufferFull === "wait") {
    refuse("--on-buffer-full", "'wait' would wait for ever with sync none", "give spill or cancel");
  }
  if (cowBufferSizeBytes === 0) {
    refuse("--cow-buffer-size", "sync none keeps old data in the buffer", "give a size");
  }
  if (checkpoint !== undefined) refuse("--checkpoint", "sync none makes no backup", "leave it out");
  if (since !== undefined) refuse("--since", "sync none copies nothing", "leave it out");
  if (verify) refuse("--verify", "sync none writes no target", "leave it out");
}
