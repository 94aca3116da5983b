// A qcow2 target, the main thread's side: what is made before the workers start and written after they end.
//
//   cluster 0        header; written last
//   1 ..             L1 table; written at the end
//   ..               guest clusters and L2 tables, as workers come by them (qcow2/writer.ts)
//   at the end       refcount table, then refcount blocks
//
// Every cluster that was handed out is used once, so all refcounts are 1 and need no memory: they are made up
// while they are written. (Runs that a failed write gave back are 0.) Only where compressed clusters share host
// clusters are they counted, in memory, as the workers go (qcow2/hosts.ts). complete() writes them, the L1 table and the
// header through libuv's pool, 1 MiB at a time, as this thread serves the guest meanwhile.
//
// On a block device the old header is wiped first, so that an unfinished target is not taken for an image, and
// the new one is written after all else is synced, and wiped again if the target is given up then. Each wipe is synced:
// after a crash no old header may come back over new clusters. A file needs none of it: it has no name yet.

import { CowcatcherError } from "../../errors.js";
import { writeFully } from "../../block/file/fileio.js";
import { checkCompression } from "../../image/qcow2/format/compress.js";
import type { CompressionType } from "../../image/qcow2/format/header.js";
import { KiB, MiB } from "../../units.js";
import { FileTarget } from "../file/file-target.js";
import { openTargetFile, syncData, type TargetFile } from "../file/file.js";
import { type Backing, encodeHeaderCluster } from "./header.js";
import {
  createRefcounts,
  createShared,
  ENTRY_BYTES,
  HEADER_CLUSTER_COUNT,
  L2_PLACES,
  NEXT_FREE,
  planGeometry,
  planRefcounts,
  type Qcow2Geometry,
  REFCOUNT_BYTES,
  type RefcountPlan,
  RELEASED_CAPACITY,
  RELEASED_COUNT,
  RELEASED_RUNS,
} from "./layout.js";
import { COPIED_HIGH_WORD, TWO_POW_32 } from "./writer.js";
import type { Qcow2TargetDescription, Target, TargetOptions } from "../target.js";

const WRITE_BYTES = 1 * MiB;
/** Data and tables must not share a page: the largest page of the platforms that Node runs on. */
const DIRECT_CLUSTER_BYTES_MIN = 64 * KiB;

/**
 * With clusters under 64 KiB `direct` has no effect.
 * @throws CowcatcherError as planGeometry, encodeHeaderCluster and openTargetFile.
 */
export async function createQcow2Target(options: TargetOptions): Promise<Target> {
  const name = options.path;
  const compression = options.compression ?? null;
  const planned = planGeometry(name, options.sizeBytes, options.clusterSizeBytes, compression !== null);
  const backing = backingOf(options);
  // Made only to see that it fits, while there is nothing to clean up.
  encodeHeaderCluster(name, planned, planRefcounts(0, planned.clusterBytes), backing);
  if (compression !== null) checkCompression(compression, name);
  const refcounts = compression === null ? null : createRefcounts(name, planned);
  const geometry = refcounts === null ? planned : withLimit(planned, refcounts.byteLength / REFCOUNT_BYTES);

  const file = await openTargetFile(
    options,
    options.direct && geometry.clusterBytes >= DIRECT_CLUSTER_BYTES_MIN,
  );
  try {
    if (!file.startsZeroed) await prepareDevice(file, geometry);
  } catch (error) {
    await file.closeDescriptors();
    throw error;
  }
  const shared = createShared(geometry);
  const description: Qcow2TargetDescription = {
    format: "qcow2",
    name,
    dataFd: file.dataFd,
    metadataFd: file.bufferedFd,
    sizeBytes: geometry.sizeBytes,
    direct: file.direct,
    clusterBits: geometry.clusterBits,
    showsOther: backing !== null || options.isPart === true,
    startsZeroed: file.startsZeroed,
    shared,
    compression,
    refcounts,
  };
  const metadata = new MetadataWriter(file, geometry, backing, description);
  return new FileTarget({
    file,
    description,
    granularityBytes: geometry.clusterBytes,
    shared,
    writeMetadata: (checkOpen) => metadata.writeAll(checkOpen),
    isCancelled: options.isCancelled,
    retract: file.startsZeroed ? undefined : () => wipeHeader(file, geometry),
  });
}

function withLimit(geometry: Qcow2Geometry, clusterLimit: number): Qcow2Geometry {
  return { ...geometry, clusterLimit: Math.min(geometry.clusterLimit, clusterLimit) };
}

function backingOf({ path, backingFile, backingFormat }: TargetOptions): Backing | null {
  if (backingFile === undefined) return null;
  if (backingFile !== "") return { file: backingFile, format: backingFormat };
  throw new CowcatcherError({ code: "USAGE", object: path, problem: "the backing file's name is empty" });
}

async function prepareDevice(file: TargetFile, geometry: Qcow2Geometry): Promise<void> {
  const smallest = planRefcounts(HEADER_CLUSTER_COUNT + geometry.l1ClusterCount, geometry.clusterBytes);
  const bytesNeeded = smallest.totalClusterCount * geometry.clusterBytes;
  if (file.capacityBytes !== null && file.capacityBytes < bytesNeeded) {
    throw new CowcatcherError({
      code: "NO_SPACE",
      object: file.name,
      problem: `the device has ${file.capacityBytes} bytes; an empty image takes ${bytesNeeded}`,
      hint: "choose a larger device",
    });
  }
  await wipeHeader(file, geometry);
}

async function wipeHeader({ name, bufferedFd }: TargetFile, { clusterBytes }: Qcow2Geometry): Promise<void> {
  await writeFully(name, bufferedFd, Buffer.alloc(clusterBytes), 0, clusterBytes, 0);
  await syncData(name, bufferedFd);
}

class MetadataWriter {
  readonly words: Int32Array;
  readonly refcounts: Uint16Array | null;
  readonly compressionType: CompressionType | undefined;

  constructor(
    readonly file: TargetFile,
    readonly geometry: Qcow2Geometry,
    readonly backing: Backing | null,
    { shared, refcounts, compression }: Qcow2TargetDescription,
  ) {
    this.words = new Int32Array(shared);
    this.refcounts = refcounts === null ? null : new Uint16Array(refcounts);
    this.compressionType = compression?.type;
  }

  /** The workers are done. @throws CowcatcherError IO or NO_SPACE, and what checkOpen throws. */
  async writeAll(checkOpen: () => void): Promise<void> {
    const { file, geometry } = this;
    const refcounts = planRefcounts(Atomics.load(this.words, NEXT_FREE), geometry.clusterBytes);
    const header = encodeHeaderCluster(file.name, geometry, refcounts, this.backing, this.compressionType);
    // The blocks end the file, so whatever cluster before them is short or a hole becomes whole.
    await this.#writeRefcountBlocks(refcounts, checkOpen);
    await this.#writeRefcountTable(refcounts);
    await this.#writeL1Table(checkOpen);
    checkOpen();
    if (!file.startsZeroed) await syncData(file.name, file.bufferedFd);
    checkOpen();
    await this.#write(header, header.length, 0);
  }

  async #writeRefcountBlocks(plan: RefcountPlan, checkOpen: () => void): Promise<void> {
    const { clusterBytes } = this.geometry;
    const start = (plan.tableFirstCluster + plan.tableClusterCount) * clusterBytes;
    const lengthBytes = plan.blockCount * clusterBytes;
    const chunk = Buffer.alloc(Math.min(WRITE_BYTES, lengthBytes));
    for (let done = 0; done < lengthBytes; done += WRITE_BYTES) {
      checkOpen();
      const bytes = Math.min(WRITE_BYTES, lengthBytes - done);
      this.#fillRefcounts(chunk, done / REFCOUNT_BYTES, plan.totalClusterCount);
      this.#fillCounted(chunk, done / REFCOUNT_BYTES, plan.tableFirstCluster);
      await this.#write(chunk, bytes, start + done);
    }
  }

  /** Refcounts of the host clusters from `firstCluster` on: 1 up to the end of the image, 0 where released. */
  #fillRefcounts(chunk: Buffer, firstCluster: number, totalClusterCount: number): void {
    const refcountCount = chunk.length / REFCOUNT_BYTES;
    const usedCount = Math.max(0, Math.min(refcountCount, totalClusterCount - firstCluster));
    chunk.fill(Buffer.from([0, 1]), 0, usedCount * REFCOUNT_BYTES);
    chunk.fill(0, usedCount * REFCOUNT_BYTES);
    const releasedCount = Math.min(Atomics.load(this.words, RELEASED_COUNT), RELEASED_CAPACITY);
    for (let i = 0; i < releasedCount; i++) {
      const first = (this.words[RELEASED_RUNS + 2 * i] ?? 0) - firstCluster;
      const end = Math.min(first + (this.words[RELEASED_RUNS + 2 * i + 1] ?? 0), refcountCount);
      if (end > 0 && first < refcountCount) {
        chunk.fill(0, Math.max(0, first) * REFCOUNT_BYTES, end * REFCOUNT_BYTES);
      }
    }
  }

  /** The counted refcounts over those that were made up: of all clusters before the refcount table. */
  #fillCounted(chunk: Buffer, firstCluster: number, endCluster: number): void {
    if (this.refcounts === null) return;
    const end = Math.min(firstCluster + chunk.length / REFCOUNT_BYTES, endCluster);
    for (let cluster = firstCluster; cluster < end; cluster++) {
      chunk.writeUInt16BE(this.refcounts[cluster] ?? 0, (cluster - firstCluster) * REFCOUNT_BYTES);
    }
  }

  async #writeRefcountTable(plan: RefcountPlan): Promise<void> {
    const { clusterBytes } = this.geometry;
    // At most 8 MiB (see qcow2/layout.ts).
    const table = Buffer.alloc(plan.tableClusterCount * clusterBytes);
    const firstBlock = plan.tableFirstCluster + plan.tableClusterCount;
    for (let i = 0; i < plan.blockCount; i++) {
      writeOffset(table, i * ENTRY_BYTES, (firstBlock + i) * clusterBytes, 0);
    }
    await this.#write(table, table.length, plan.tableFirstCluster * clusterBytes);
  }

  async #writeL1Table(checkOpen: () => void): Promise<void> {
    const { clusterBytes, l1EntryCount } = this.geometry;
    const entriesAtOnce = WRITE_BYTES / ENTRY_BYTES;
    const chunk = Buffer.alloc(Math.min(entriesAtOnce, l1EntryCount) * ENTRY_BYTES);
    for (let first = 0; first < l1EntryCount; first += entriesAtOnce) {
      checkOpen();
      const count = Math.min(entriesAtOnce, l1EntryCount - first);
      let tableCount = 0;
      for (let i = 0; i < count; i++) {
        const l2Cluster = Atomics.load(this.words, L2_PLACES + first + i);
        writeOffset(chunk, i * ENTRY_BYTES, l2Cluster * clusterBytes, l2Cluster === 0 ? 0 : COPIED_HIGH_WORD);
        if (l2Cluster !== 0) tableCount++;
      }
      if (tableCount === 0 && this.file.startsZeroed) continue;
      await this.#write(
        chunk,
        count * ENTRY_BYTES,
        HEADER_CLUSTER_COUNT * clusterBytes + first * ENTRY_BYTES,
      );
    }
  }

  async #write(buffer: Buffer, lengthBytes: number, offsetBytes: number): Promise<void> {
    await writeFully(this.file.name, this.file.bufferedFd, buffer, 0, lengthBytes, offsetBytes);
  }
}

function writeOffset(table: Buffer, at: number, hostOffsetBytes: number, flagsHighWord: number): void {
  table.writeUInt32BE(Math.floor(hostOffsetBytes / TWO_POW_32) + flagsHighWord, at);
  table.writeUInt32BE(hostOffsetBytes % TWO_POW_32, at + 4);
}
