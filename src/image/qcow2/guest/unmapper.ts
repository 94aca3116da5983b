// The storage of clusters that the guest has unmapped goes back to the file system.
//
//   ready (frees.ts) ──► queued here ──hole punched──► refcount lowered: the allocator may hand the cluster out
//
// The hole comes first: while the refcount stands, nobody else writes there. Only what nothing else refers to is
// punched, a cluster that a snapshot shares is not. A crash in between leaks clusters that read as zeroes.
//
// Punching is a system call of tens of microseconds, on the thread that serves the guest, and an fstrim may let go of
// thousands of runs. So it is done in the background, for some of each turn of the event loop; no flush waits for it.
// It is advice: where the file cannot, the clusters are freed all the same. Main thread only.

import { setImmediate as nextTurn } from "node:timers/promises";
import { MiB } from "../../../units.js";
import type { QcowFile } from "../format/file.js";
import type { Refcounts } from "./refcounts.js";

/** Of one turn of the event loop; a guest's request waits no longer than this and one call. */
const TURN_MS = 0.5;
/** One fallocate call. */
const PIECE_BYTES = 16 * MiB;

export class Unmapper {
  private readonly regions: number[] = [];
  private running: Promise<void> | undefined;

  constructor(
    private readonly file: QcowFile,
    private readonly refcounts: Refcounts,
    private readonly clusterSizeBytes: number,
    /** Host clusters were freed. */
    private readonly whenFreed: () => void,
  ) {}

  get hasWork(): boolean {
    return this.regions.length > 0;
  }

  /** Takes a region over: each cluster that it touches loses a reference, in time. False: this file has no holes. */
  take(offsetBytes: number, lengthBytes: number): boolean {
    if (this.file.punch === undefined) return false;
    this.regions.push(offsetBytes, lengthBytes);
    return true;
  }

  /** Goes on with what there is, unless it does already. */
  resume(): void {
    if (this.running !== undefined || !this.hasWork) return;
    this.running = this.run().finally(() => {
      this.running = undefined;
    });
  }

  /** Until nothing is left, or the refcounts must be written first. Never rejects. */
  async idle(): Promise<void> {
    await this.running;
  }

  private async run(): Promise<void> {
    await nextTurn();
    let endMs = performance.now() + TURN_MS;
    while (this.hasWork && !this.refcounts.isCrowded) {
      try {
        this.freeFirst();
      } catch {
        // A refcount that cannot be read is no use to anybody: what is queued leaks, which a check puts right.
        this.regions.length = 0;
      }
      if (performance.now() < endMs) continue;
      await nextTurn();
      endMs = performance.now() + TURN_MS;
    }
    this.whenFreed();
  }

  /** One run of like clusters at the start of the first region. */
  private freeFirst(): void {
    const [offsetBytes = 0, lengthBytes = 0] = this.regions;
    const { clusterSizeBytes } = this;
    const first = Math.floor(offsetBytes / clusterSizeBytes);
    const end = Math.min(
      Math.ceil((offsetBytes + lengthBytes) / clusterSizeBytes),
      first + Math.max(1, PIECE_BYTES / clusterSizeBytes),
    );
    const isLast = this.refcounts.get(first) === 1;
    let past = first + 1;
    while (past < end && (this.refcounts.get(past) === 1) === isLast) past++;
    const runStart = first * clusterSizeBytes;
    const runBytes = (past - first) * clusterSizeBytes;
    if (isLast) this.file.punch?.(runStart, runBytes);
    this.refcounts.dropRegion(runStart, runBytes);
    const left = offsetBytes + lengthBytes - (runStart + runBytes);
    if (left > 0) this.regions.splice(0, 2, runStart + runBytes, left);
    else this.regions.splice(0, 2);
  }
}
