// Of the method `filter`: QEMU keeps the old data, in a file of ours. Main thread.
//
// The file takes the place of the copy-before-write buffer and of the spill file at once (it is QEMU's page
// cache first, and the file system's later), so its limit is the sum of both. A guest's write cannot be made to wait
// for room in it: when the limit is near, the backup ends.

import type { CopyRun } from "../backup/copy/run.js";
import { NO_BUFFER } from "../cow/slot-memory.js";
import type { JobOptions } from "../backup/options.js";
import type { JobProgress } from "../backup/progress.js";
import { CowcatcherError } from "../errors.js";
import { formatBytes } from "../units.js";
import { Fleece } from "./fleece.js";
import type { QemuDisk } from "./graph.js";
import type { Keeper } from "./keeper.js";
import type { RunFolder } from "./run-folder.js";

/** Of a copy-before-write node whose target states no cluster size. */
export const QEMU_CLUSTER_BYTES = 65_536;
/** What QEMU answers for a snapshot that broke, and for what was discarded. */
const BROKEN_ERRNOS = new Set(["EACCES", "EPERM", "EINVAL", "EIO"]);

export class FleeceKeeper implements Keeper {
  readonly parts: Keeper["parts"];
  readonly source = { isSnapshot: true };
  readonly oldData: { fd: number } | undefined;
  readonly fleece: Fleece;
  readonly #disk: QemuDisk;
  readonly #job: JobOptions;
  #run: CopyRun | undefined;
  #fail: (error: CowcatcherError) => void = () => undefined;

  /** @throws CowcatcherError */
  constructor(folder: RunFolder, index: number, disk: QemuDisk, job: JobOptions) {
    this.#disk = disk;
    this.#job = job;
    this.parts = {
      slots: NO_BUFFER,
      bufferBytes: 0,
      hasForeignCaptures: true,
      readAheadBytes: job.cowBufferSizeBytes,
    };
    this.fleece = new Fleece(folder.createFile(index, disk.node.sizeBytes));
    this.oldData = this.fleece.tellsClusters(QEMU_CLUSTER_BYTES) ? { fd: this.fleece.fd } : undefined;
  }

  attach(run: CopyRun, fail: (error: CowcatcherError) => void): void {
    this.#run = run;
    this.#fail = fail;
  }

  /** What the file holds is read next; at its limit the backup ends. */
  look(): void {
    const run = this.#run;
    if (run === undefined) return;
    this.fleece.look(run.geometry, (chunk) => run.hurry(chunk));
    const { cowBufferSizeBytes, onBufferFull, spillLimitBytes = this.#disk.node.sizeBytes } = this.#job;
    const limitBytes = cowBufferSizeBytes + (onBufferFull === "spill" ? spillLimitBytes : 0);
    if (this.fleece.expectedBytes <= limitBytes) return;
    this.#fail(
      new CowcatcherError({
        code: "BUFFER_FULL",
        object: this.#disk.name,
        problem: `the guest has overwritten more than the fleecing file may hold (${formatBytes(limitBytes)})`,
        hint: "give a larger --cow-buffer-size or --spill-limit, or a faster target",
      }),
    );
  }

  progress(): Partial<JobProgress> {
    const { cowBufferSizeBytes } = this.#job;
    const { usedBytes, usedBytesMax, capturedBytes } = this.fleece;
    return {
      bufferBytesUsed: Math.min(usedBytes, cowBufferSizeBytes),
      bufferBytesTotal: cowBufferSizeBytes,
      capturedBytes,
      captureCount: Math.ceil(capturedBytes / QEMU_CLUSTER_BYTES),
      spilledBytes: Math.max(0, usedBytesMax - cowBufferSizeBytes),
    };
  }

  letGo(): void {
    // Nothing of the guest ever waits for this process.
  }

  left(): void {
    this.fleece.empty();
  }

  /** A reader only sees that its snapshot cannot be read any more. */
  explained(error: CowcatcherError, uri: string): CowcatcherError {
    if (error.code !== "IO" || error.object !== uri) return error;
    if (error.errno === undefined || !BROKEN_ERRNOS.has(error.errno)) return error;
    return new CowcatcherError({
      code: "SNAPSHOT",
      object: this.#disk.name,
      problem:
        "QEMU could not keep the disk as it was at the start, as no room or no time was left for old data",
      hint: `is there room in the folder of ${this.fleece.path}? the guest goes on`,
      cause: error,
    });
  }

  close(): Promise<void> {
    this.#run = undefined;
    this.fleece.close();
    return Promise.resolve();
  }
}
