// Of the method `ring`: this process keeps the old data, in its copy-before-write buffer and spill, exactly as for a disk
// of its own (cow/interceptor.ts). QEMU writes it to an NBD export of ours (capture-device.ts). Main thread.
//
// QEMU's own errors of such a job reach the guest, so none is ever given: when the old data cannot be kept the
// interceptor detaches itself, and whatever comes then is answered and forgotten. Only then is the job cancelled, as
// QEMU's monitor hangs in that for as long as one of its writes is unanswered.

import type { CopyRun } from "../backup/copy/run.js";
import { CopyThreads } from "../backup/copy/threads.js";
import { type BufferLease, BufferStore } from "../backup/memory/buffer-store.js";
import { type TableLease, TableStore } from "../backup/memory/table-store.js";
import { type JobOptions, SMALLEST_BUFFER_BYTES } from "../backup/options.js";
import type { JobProgress } from "../backup/progress.js";
import { StorageThreads } from "../backup/storage/threads.js";
import { BLOCK_BYTES, SLOT_BYTES } from "../cow/geometry.js";
import { Interceptor } from "../cow/interceptor.js";
import type { CowcatcherError } from "../errors.js";
import { type NbdListener, listenUnix } from "../nbd/server/listen.js";
import { type NbdExport, type NbdLogger, NbdServer } from "../nbd/server/server.js";
import type { Target } from "../target/target.js";
import { roundUp } from "../units.js";
import { ArrivedData, CaptureDevice } from "./capture-device.js";
import type { QemuDisk } from "./graph.js";
import type { Keeper } from "./keeper.js";
import type { RunFolder } from "./run-folder.js";

/** QEMU makes one connection for each disk. */
const CONNECTIONS_MAX = 256;
const SILENT: NbdLogger = { debug: () => {}, info: () => {}, warn: () => {}, error: () => {} };

/** What the disks of one backup have in common: the server that QEMU writes to, memory, threads. */
export class RingHost {
  readonly hands = new StorageThreads();
  readonly threads = new CopyThreads();
  readonly buffers = new BufferStore();
  readonly tables = new TableStore();
  readonly #exports = new Map<string, NbdExport>();
  readonly #server = new NbdServer({
    exports: this.#exports,
    maxConnections: CONNECTIONS_MAX,
    logger: SILENT,
  });
  #listener: NbdListener | undefined;

  /** @throws CowcatcherError as listenUnix */
  async listen(folder: RunFolder): Promise<void> {
    this.#listener = await listenUnix(folder.ringSocket, { mode: 0o600 });
    folder.giveRingSocket();
    this.#listener.serve(this.#server);
  }

  publish(name: string, device: CaptureDevice): void {
    const description = "old data of a running guest";
    this.#exports.set(name, { name, description, device, readOnly: false, canMultiConn: false });
  }

  /** After QEMU has let go of it. Never rejects. */
  async close(): Promise<void> {
    await this.#listener?.close().catch(() => undefined);
    await this.#server.close().catch(() => undefined);
    this.threads.close();
    this.hands.close();
  }
}

export class RingKeeper implements Keeper {
  readonly parts: Keeper["parts"];
  readonly source = { staysOpen: true };
  /** The workers lay over what they read what QEMU has sent. */
  readonly oldData = { fd: null };
  readonly #host: RingHost;
  readonly #exportName: string;
  readonly #disk: QemuDisk;
  readonly #job: JobOptions;
  readonly #lease: BufferLease;
  readonly #tables: TableLease;
  #interceptor: Interceptor | undefined;

  /** @throws CowcatcherError LIMIT where there is not so much memory */
  constructor(host: RingHost, exportName: string, disk: QemuDisk, job: JobOptions, target: Target) {
    this.#host = host;
    this.#exportName = exportName;
    this.#disk = disk;
    this.#job = job;
    const bufferBytes = bufferSizeOf(job, target);
    this.#lease = host.buffers.take(bufferBytes);
    this.#tables = host.tables.lease();
    const { hands, threads } = host;
    this.parts = {
      slots: this.#lease,
      bufferBytes,
      hands,
      threads,
      allocateTable: this.#tables.allocate,
      readAheadBytes: bufferBytes,
    };
  }

  attach({ shared, spill }: CopyRun, fail: (error: CowcatcherError) => void): void {
    const { sizeBytes } = this.#disk.node;
    const arrived = new ArrivedData(this.#disk.name, sizeBytes);
    this.#interceptor = new Interceptor({
      shared,
      image: arrived,
      openSpill: spill === null ? undefined : () => spill,
      spillLimitBytes: this.#job.spillLimitBytes ?? roundUp(sizeBytes, BLOCK_BYTES),
      policy: this.#job,
      onBroken: fail,
    });
    this.#host.publish(this.#exportName, new CaptureDevice(arrived, this.#interceptor));
  }

  look(): void {
    // Captures come by themselves.
  }

  progress(): Partial<JobProgress> {
    return { ...this.#interceptor?.counters };
  }

  letGo(): void {
    this.#interceptor?.detach();
  }

  explained(error: CowcatcherError): CowcatcherError {
    return error;
  }

  async close(leftBehind: boolean): Promise<void> {
    this.letGo();
    await this.#interceptor?.idle();
    // A worker that was left behind may still be at its share of it.
    if (leftBehind) return;
    this.#lease.release();
    this.#tables.release();
  }
}

/** Whole slots, and room for the captures of a few chunks, so that no single request needs more than there is. 0 stays 0. */
function bufferSizeOf({ cowBufferSizeBytes }: JobOptions, target: Target): number {
  if (cowBufferSizeBytes === 0) return 0;
  const largestChunk = Math.max(SMALLEST_BUFFER_BYTES / 2, target.granularityBytes, target.chunkBytes ?? 0);
  return roundUp(Math.max(cowBufferSizeBytes, 2 * largestChunk), SLOT_BYTES);
}
