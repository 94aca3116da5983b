// One disk of a backup of a running guest: its target, its workers, its fleecing file, and how QEMU becomes what it
// was. Main thread.
//
// The fleecing file takes the place of the copy-before-write buffer and of the spill file at once (it is QEMU's page
// cache first, and the file system's later), so its limit is the sum of both. A guest's write cannot be made to wait
// for room in it: when the limit is near, the backup ends.

import { closeSync } from "node:fs";
import { unpreparedMemory } from "../backup/copy/page-preparer.js";
import { CopyRun } from "../backup/copy/run.js";
import { openBacking } from "../backup/guard/backing-check.js";
import { refuseFileAsTarget } from "../backup/guard/target-guard.js";
import { Finishing } from "../backup/job/finishing.js";
import type { JobOptions } from "../backup/options.js";
import type { JobProgress } from "../backup/progress.js";
import type { Image, NbdSourceDescription } from "../block/device.js";
import { CowcatcherError } from "../errors.js";
import { createTarget } from "../target/create.js";
import type { Target } from "../target/target.js";
import { formatBytes } from "../units.js";
import { Fleece } from "./fleece.js";
import type { FilteredDisk } from "./filter.js";
import type { QemuDisk } from "./graph.js";
import type { RunFolder } from "./run-folder.js";
import { UndoStack } from "./undo.js";

/** A reader of the export tries to connect again so often: on one machine it is there or it is gone. */
const SOURCE_RETRIES = 2;
/** Of a copy-before-write node whose target states no cluster size. */
const QEMU_CLUSTER_BYTES = 65_536;
/** What QEMU answers for a snapshot that broke, and for what was discarded. */
const BROKEN_ERRNOS = new Set(["EACCES", "EPERM", "EINVAL", "EIO"]);

export interface DiskCopyRequest {
  disk: QemuDisk;
  index: number;
  job: JobOptions;
  /** Made already; undefined: the one that the job names. */
  target?: Target | undefined;
  folder: RunFolder;
  /** Files that QEMU has open: none is a target. */
  filesInUse: readonly string[];
  isCancelled: () => boolean;
  onStopped: (error: CowcatcherError) => void;
  /** The disk is read, or never will be: QEMU is to be as it was before the readers' connections end. Never rejects. */
  leaveQemu: (copy: DiskCopy) => Promise<void>;
}

export class DiskCopy implements FilteredDisk {
  readonly disk: QemuDisk;
  readonly index: number;
  readonly job: JobOptions;
  readonly undo = new UndoStack();
  readonly fleecePath: string;
  readonly run: CopyRun;
  readonly #fleece: Fleece;
  readonly #target: Target;
  readonly #backing: Image | null;
  readonly #finishing: Finishing;
  #uri = "";
  #isOver = false;

  private constructor(
    { disk, index, job }: DiskCopyRequest,
    { fleece, target, backing, run }: { fleece: Fleece; target: Target; backing: Image | null; run: CopyRun },
  ) {
    this.disk = disk;
    this.index = index;
    this.job = job;
    this.fleecePath = fleece.path;
    this.run = run;
    this.#fleece = fleece;
    this.#target = target;
    this.#backing = backing;
    this.#finishing = new Finishing(target, job, run.shared);
  }

  /** @throws CowcatcherError; nothing is left behind. */
  static async prepare(request: DiskCopyRequest): Promise<DiskCopy> {
    const { disk, index, job, folder, filesInUse, isCancelled, onStopped, leaveQemu } = request;
    const { sizeBytes } = disk.node;
    let { target } = request;
    if (target === undefined) await refuseFileAsTarget(job.target, filesInUse);
    const backing = target === undefined ? await openBacking({ ...job, path: job.target }) : null;
    let file: { path: string; fd: number } | undefined;
    try {
      target ??= await createTarget({
        ...job,
        path: job.target,
        format: job.targetFormat,
        sizeBytes,
        isCancelled,
      });
      file = folder.createFile(index, sizeBytes);
      const made: { copy?: DiskCopy } = {};
      const run = await CopyRun.prepare({
        job,
        target,
        sizeBytes,
        sourceClusterBytes: QEMU_CLUSTER_BYTES,
        slots: unpreparedMemory(new Uint8Array(new SharedArrayBuffer(0))),
        bufferBytes: 0,
        live: true,
        onStopped,
        beforeThreadsEnd: async () => {
          if (made.copy !== undefined) await leaveQemu(made.copy);
        },
      });
      const fleece = new Fleece(file, run.geometry);
      made.copy = new DiskCopy(request, { fleece, target, backing, run });
      return made.copy;
    } catch (error) {
      await target?.abort();
      await backing?.close();
      if (file !== undefined) closeSync(file.fd);
      throw error;
    }
  }

  /** After T0. `zeroes`: what the export says reads as zeroes. */
  begin(uri: string, zeroes: NbdSourceDescription["zeroes"]): void {
    this.#uri = uri;
    const { name, node } = this.disk;
    const { sizeBytes } = node;
    this.run.begin({
      format: "nbd",
      name,
      uri,
      sizeBytes,
      retries: SOURCE_RETRIES,
      zeroes,
      isSnapshot: true,
    });
  }

  /** Looks after the fleecing file: what it holds is read next; at its limit the backup ends. */
  look(): void {
    if (this.#isOver || this.run.failure !== undefined) return;
    this.#fleece.look((chunk) => this.run.hurry(chunk));
    const limitBytes = this.#limitBytes();
    if (this.#fleece.expectedBytes <= limitBytes) return;
    this.run.abort(
      new CowcatcherError({
        code: "BUFFER_FULL",
        object: this.disk.name,
        problem: `the guest has overwritten more than the fleecing file may hold (${formatBytes(limitBytes)})`,
        hint: "give a larger --cow-buffer-size or --spill-limit, or a faster target",
      }),
    );
  }

  #limitBytes(): number {
    const { cowBufferSizeBytes, onBufferFull, spillLimitBytes = this.disk.node.sizeBytes } = this.job;
    return cowBufferSizeBytes + (onBufferFull === "spill" ? spillLimitBytes : 0);
  }

  progress(): JobProgress {
    const { cowBufferSizeBytes } = this.job;
    const { usedBytes, usedBytesMax, capturedBytes } = this.#fleece;
    return {
      ...this.run.progress(),
      bufferBytesUsed: Math.min(usedBytes, cowBufferSizeBytes),
      bufferBytesTotal: cowBufferSizeBytes,
      capturedBytes,
      captureCount: Math.ceil(capturedBytes / QEMU_CLUSTER_BYTES),
      spilledBytes: Math.max(0, usedBytesMax - cowBufferSizeBytes),
    };
  }

  cancel(error: CowcatcherError): void {
    this.run.abort(error);
    this.#finishing.cancel(error);
  }

  /** The target gets its name, or goes. @throws CowcatcherError: the first cause */
  async finish(): Promise<void> {
    try {
      await this.run.ended;
      await this.#finishing.run();
    } catch (error) {
      throw this.#explained(error);
    } finally {
      await this.dispose();
    }
  }

  /** Gives up what `prepare` made; a target that has its name stays. Never rejects. */
  async dispose(): Promise<void> {
    this.#isOver = true;
    this.#fleece.close();
    await this.#target.abort();
    await this.#backing?.close();
  }

  abortSync(): void {
    this.#target.abortSync();
  }

  /** A reader only sees that its snapshot cannot be read any more. */
  #explained(error: unknown): unknown {
    if (!(error instanceof CowcatcherError) || error.code !== "IO" || error.object !== this.#uri)
      return error;
    if (error.errno === undefined || !BROKEN_ERRNOS.has(error.errno)) return error;
    return new CowcatcherError({
      code: "SNAPSHOT",
      object: this.disk.name,
      problem:
        "QEMU could not keep the disk as it was at the start, as no room or no time was left for old data",
      hint: `is there room in the folder of ${this.fleecePath}? the guest goes on`,
      cause: error,
    });
  }
}
