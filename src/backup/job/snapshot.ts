// The T0 view of a disk as an export: captures before each guest write, as for a backup, but nobody drains them.
// They fill the buffer, then the spill, until the snapshot ends. Main thread only; there are no workers.
//
//   prepare (buffer, spill file) ─► start, at T0: intercept, publish ─► detach: the guest is free, readers get EIO
//                                                                     ─► end: the export goes, then the memory
//
// A backup with a T0 view (`serve --snapshot-export`) has one of these beside its own interceptor rather than sharing
// captures with it. Its workers hand slots back as soon as the target has the data, and clusters that are DONE are
// not captured any more; a reader needs both kept. Two interceptors read a block twice before its first overwrite,
// a few µs, and in return neither can harm the other: a snapshot that runs out of room leaves the backup whole, and
// nothing in the backup's path knows of snapshots.

import type { DiskNode } from "../../cow/disk-node.js";
import { BLOCK_BYTES, geometryOf, SLOT_BYTES, type Geometry } from "../../cow/geometry.js";
import { type GuestWaitCounters, Interceptor } from "../../cow/interceptor.js";
import { createSharedState, CTL_USED_BLOCKS, type SharedState } from "../../cow/shared.js";
import { SnapshotDevice } from "../../cow/snapshot-device.js";
import { spillBitmapBytes } from "../../cow/spill.js";
import { CowcatcherError } from "../../errors.js";
import type { BlockDevice } from "../../block/device.js";
import { MiB, roundUp } from "../../units.js";
import { PagePreparer } from "../copy/page-preparer.js";
import { MAPPED_BYTES_MAX } from "../../cow/slot-memory.js";
import { LIVE_WORKER_NICENESS } from "../copy/run.js";
import type { CopyThreads } from "../copy/threads.js";
import type { BufferLease, BufferStore } from "../memory/buffer-store.js";
import type { TableLease, TableStore } from "../memory/table-store.js";
import type { StatusContext } from "../../nbd/server/export.js";
import type { DiskTracker } from "../../tracking/tracker.js";
import type { SnapshotInfo } from "../host.js";
import { JOB_DEFAULTS, type JobOptions } from "../options.js";
import { SnapshotBitmaps } from "./snapshot-bitmaps.js";
import type { StorageHands } from "../storage/protocol.js";
import { RemoteSpill } from "../storage/remote-spill.js";

/** Who offers a device to readers; in `serve`, the NBD server. */
export interface SnapshotPublisher {
  /**
   * From now on readers find the device under the name; the result takes it away again, from them, too. Synchronous,
   * as T0 is.
   * @param contexts metadata contexts besides base:allocation
   * @throws CowcatcherError EXISTS for a name that is in use.
   */
  publish(name: string, device: BlockDevice, contexts: readonly StatusContext[]): () => void;
}

export interface SnapshotParts {
  node: DiskNode;
  options: JobOptions;
  buffers: BufferStore;
  tables: TableStore;
  threads: CopyThreads;
  publisher: SnapshotPublisher | undefined;
  /** Whose checkpoints the view's export has as bitmaps; undefined where the disk's changes are not tracked. */
  tracker?: DiskTracker | undefined;
  hands: StorageHands;
  /** Ends its preparation. */
  signal: AbortSignal;
  /** The snapshot is lost; called once, when the guest goes on already. */
  onBroken(error: CowcatcherError): void;
}

const SMALLEST_BUFFER_BYTES = 2 * MiB;

/** The export of a disk's T0 view. */
export function snapshotNameOf(disk: string): string {
  return `${disk}-snapshot`;
}

export class Snapshot {
  readonly info: SnapshotInfo;
  readonly #parts: SnapshotParts;
  readonly #publisher: SnapshotPublisher;
  readonly #shared: SharedState;
  readonly #lease: BufferLease;
  readonly #tables: TableLease;
  readonly #spill: RemoteSpill | null;
  readonly #preparer: PagePreparer;
  readonly #bitmaps: SnapshotBitmaps | null;
  #interceptor: Interceptor | undefined;
  #device: SnapshotDevice | undefined;
  #withdraw: (() => void) | undefined;
  #ending: Promise<void> | undefined;

  private constructor(
    parts: SnapshotParts,
    publisher: SnapshotPublisher,
    shared: SharedState,
    lease: BufferLease,
    tables: TableLease,
    spill: RemoteSpill | null,
    preparer: PagePreparer,
  ) {
    this.#preparer = preparer;
    this.#parts = parts;
    this.#publisher = publisher;
    this.#shared = shared;
    this.#lease = lease;
    this.#tables = tables;
    this.#spill = spill;
    this.#bitmaps = parts.tracker === undefined ? null : new SnapshotBitmaps(parts.tracker);
    this.info = { exportName: snapshotNameOf(parts.node.nodeName), error: undefined };
  }

  /** All that takes time before T0. @throws CowcatcherError; nothing is left then. */
  static async prepare(parts: SnapshotParts): Promise<Snapshot> {
    const { node, options, buffers, publisher, hands, signal } = parts;
    if (publisher === undefined) {
      throw new CowcatcherError({
        code: "UNSUPPORTED",
        object: node.nodeName,
        problem: "nothing here could export its snapshot",
      });
    }
    const bufferBytes = bufferSizeOf(options);
    const lease = buffers.take(bufferBytes);
    const tables = parts.tables.lease();
    try {
      const shared = createSharedState(
        geometryOf(node.sizeBytes),
        lease,
        bufferBytes,
        false,
        tables.allocate,
      );
      signal.throwIfAborted();
      const { onBufferFull, spillDir, target } = options;
      const spill =
        onBufferFull === "spill"
          ? await RemoteSpill.open(
              hands,
              { spillDir, target },
              shared.geometry,
              tables.allocate(spillBitmapBytes(shared.geometry)),
              signal,
            )
          : null;
      const preparer = new PagePreparer(parts.threads, lease, {
        bufferBytes: Math.min(bufferBytes, MAPPED_BYTES_MAX, roundUp(node.sizeBytes, SLOT_BYTES)),
        niceness: LIVE_WORKER_NICENESS,
      });
      return new Snapshot(parts, publisher, shared, lease, tables, spill, preparer);
    } catch (error) {
      lease.release();
      tables.release();
      throw error;
    }
  }

  get geometry(): Geometry {
    return this.#shared.geometry;
  }

  /** Shortly before T0. Never rejects: without its bitmaps the view is as good. */
  async beforeT0(): Promise<void> {
    try {
      await this.#bitmaps?.beforeT0();
    } catch {
      this.#bitmaps?.end();
    }
  }

  /** The step at T0: synchronous, with no guest write in flight. @throws CowcatcherError EXISTS: nothing has begun. */
  start(): void {
    const { node, options } = this.#parts;
    const shared = this.#shared;
    const spill = this.#spill ?? undefined;
    const interceptor = new Interceptor({
      shared,
      image: node.image,
      openSpill: spill === undefined ? undefined : () => spill,
      spillLimitBytes: options.spillLimitBytes ?? roundUp(node.sizeBytes, BLOCK_BYTES),
      policy: {
        ...options,
        // Nothing is drained, so room never comes back: waiting for it would only delay the end.
        onBufferFull: spill === undefined ? "cancel" : "spill",
        // A backup is not the snapshot's to fail, nor is a guest's write because of a view beside a backup.
        onCbwError: options.sync === "none" ? options.onCbwError : "break-snapshot",
      },
      onBroken: (error) => this.#broken(error),
    });
    const { exportName } = this.info;
    const device = new SnapshotDevice({
      name: exportName,
      image: node.image,
      shared,
      spill,
      source: interceptor,
    });
    this.#withdraw = this.#publisher.publish(exportName, device, this.#contexts());
    this.#device = device;
    this.#interceptor = interceptor;
    node.addInterceptor(interceptor);
  }

  #contexts(): StatusContext[] {
    try {
      return this.#bitmaps?.atT0() ?? [];
    } catch {
      // The tracking has failed: nothing of it can be believed.
      this.#bitmaps?.end();
      return [];
    }
  }

  get counters(): GuestWaitCounters | undefined {
    return this.#interceptor?.counters;
  }

  get bufferBytesUsed(): number {
    return Atomics.load(this.#shared.control, CTL_USED_BLOCKS) * BLOCK_BYTES;
  }

  get bufferBytesTotal(): number {
    return this.#shared.bufferBlockCount * BLOCK_BYTES;
  }

  #broken(error: CowcatcherError): void {
    this.info.error = error;
    this.detach();
    this.#parts.onBroken(error);
  }

  /** The guest's writes go straight to its disk, and readers get errors. Synchronous; idempotent. */
  detach(): void {
    if (this.#interceptor === undefined) return;
    this.#interceptor.detach();
    this.#parts.node.removeInterceptor(this.#interceptor);
  }

  /** Takes the export away and gives back what the snapshot has, once nothing uses it any more. Idempotent. */
  end(): Promise<void> {
    this.#ending ??= this.#release();
    return this.#ending;
  }

  async #release(): Promise<void> {
    this.detach();
    this.#withdraw?.();
    this.#bitmaps?.end();
    await this.#device?.close();
    await this.#interceptor?.idle();
    this.#spill?.close();
    await this.#preparer.stop();
    this.#lease.release();
    this.#tables.release();
  }
}

/** A job without a buffer of its own still needs one for the view: without workers nobody else takes a capture. */
function bufferSizeOf({ cowBufferSizeBytes }: JobOptions): number {
  const bytes = cowBufferSizeBytes === 0 ? JOB_DEFAULTS.cowBufferSizeBytes : cowBufferSizeBytes;
  return roundUp(Math.max(bytes, SMALLEST_BUFFER_BYTES), SLOT_BYTES);
}
