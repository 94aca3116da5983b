// What the phases of a check share: the file, the references counted so far, the findings, what may be repaired.
//
// A file may be huge and almost all hole (one wild offset that a guest wrote to is enough). Counters that nothing
// touched take no memory, and the groups of clusters without any reference are known, so that nothing walks them.
//
// Memory: one counter for each host cluster of the file, 2 bytes (4 where refcounts are wider than 16 bits), and
// one bit. MAX_HOST_CLUSTERS bounds that to about 1 GiB. Beside it one table is in memory at a time: an L1
// table (32 MiB at most), the refcount table (8 MiB at most), an L2 table and a refcount block (a cluster each).

import { CowcatcherError } from "../../../errors.js";
import { formatBytes } from "../../../units.js";
import type { QcowFile } from "../format/file.js";
import type { Qcow2Header } from "../format/header.js";

/** 2^29 clusters: an image file of 32 TiB with 64 KiB clusters. */
export const MAX_HOST_CLUSTERS = 2 ** 29;
/** Messages kept; findings beyond are counted but not described. */
export const MAX_MESSAGES = 1000;
/** References are known to be none by groups of 2^16 host clusters. */
const GROUP_BITS = 16;
/** Overflows kept one by one. */
const MAX_OVERFLOWS = 65536;
const SECTOR_BYTES = 512;

/** As `qemu-img check -r`: only leaks, or all that can be. */
export type RepairMode = "leaks" | "all";

export interface CheckCounts {
  corruptions: number;
  leaks: number;
  checkErrors: number;
  corruptionsFixed: number;
  leaksFixed: number;
  allocatedClusters: number;
  fragmentedClusters: number;
  compressedClusters: number;
}

export class CheckState {
  readonly counts: CheckCounts = {
    corruptions: 0,
    leaks: 0,
    checkErrors: 0,
    corruptionsFixed: 0,
    leaksFixed: 0,
    allocatedClusters: 0,
    fragmentedClusters: 0,
    compressedClusters: 0,
  };
  readonly messages: string[] = [];
  readonly clusterSizeBytes: number;
  /** As QEMU sees it: in whole sectors. */
  readonly fileBytes: number;
  /** How often each host cluster is referred to. */
  readonly references: Uint16Array | Uint32Array;
  /** The refcount structure itself is damaged, or lacks a block: refcounts cannot be corrected in place. */
  mustRebuild = false;
  /** Something was not walked: what it refers to was not counted, and must not be taken for leaked. */
  isIncomplete = false;
  /** What the bitmaps refer to is not known: a cluster without a reference may be theirs, and is not called leaked. */
  areLeaksUnknown = false;
  /** Another thing is in the refcount structure's place, so that to change it would harm that thing. */
  isStructureShared = false;
  /** Host clusters that are looked at: the file's, and one more where a reference begins in the last of them. */
  hostClusterCount: number;
  private readonly referenceMax: number;
  /** By group: 1 where a cluster may be referred to. */
  private readonly referredGroups: Uint8Array;
  /** Clusters with more references than a refcount of this width can say; MAX_OVERFLOWS of them at most. */
  private readonly overflowed = new Set<number>();

  /**
   * @param repair undefined: nothing is written.
   * @throws CowcatcherError LIMIT for a file with more than MAX_HOST_CLUSTERS.
   */
  constructor(
    readonly file: QcowFile,
    readonly header: Qcow2Header,
    readonly repair?: RepairMode,
  ) {
    this.clusterSizeBytes = 2 ** header.clusterBits;
    this.fileBytes = Math.ceil(file.endOffset / SECTOR_BYTES) * SECTOR_BYTES;
    this.hostClusterCount = Math.ceil(this.fileBytes / this.clusterSizeBytes);
    if (this.hostClusterCount > MAX_HOST_CLUSTERS) {
      const most = formatBytes(MAX_HOST_CLUSTERS * this.clusterSizeBytes);
      const problem = `the file of ${formatBytes(this.fileBytes)} is larger than a check can hold in memory (${most})`;
      throw new CowcatcherError({ code: "LIMIT", object: file.name, problem });
    }
    const isNarrow = header.refcountOrder <= 4;
    this.references = isNarrow
      ? new Uint16Array(this.hostClusterCount + 1)
      : new Uint32Array(this.hostClusterCount + 1);
    this.referredGroups = new Uint8Array((this.hostClusterCount >>> GROUP_BITS) + 1);
    this.referenceMax = Math.min(2 ** (2 ** header.refcountOrder) - 1, 2 ** 32 - 1);
  }

  get name(): string {
    return this.file.name;
  }

  get repairsErrors(): boolean {
    return this.repair === "all";
  }

  corruption(message: string): void {
    this.counts.corruptions++;
    this.note(`ERROR ${message}`);
  }

  /** What was one corruption is none any more. */
  corruptionFixed(): void {
    this.counts.corruptions--;
    this.counts.corruptionsFixed++;
  }

  leak(message: string): void {
    if (this.areLeaksUnknown) return;
    this.counts.leaks++;
    this.note(`Leaked ${message}`);
  }

  /** The check itself could not look at something, or a repair could not be made. */
  checkError(message: string): void {
    this.counts.checkErrors++;
    this.note(message);
  }

  note(message: string): void {
    if (this.messages.length < MAX_MESSAGES) this.messages.push(message);
  }

  /**
   * Counts a reference to each host cluster that [offsetBytes, +lengthBytes) touches. The file's last cluster may
   * be cut short; what lies further out is a corruption.
   */
  refer(offsetBytes: number, lengthBytes: number): void {
    if (lengthBytes <= 0) return;
    const { clusterSizeBytes } = this;
    const end = offsetBytes + lengthBytes;
    if (end - this.fileBytes >= clusterSizeBytes) {
      const where = `offset ${hex(offsetBytes)} size ${hex(lengthBytes)}`;
      const what = "counting reference for region exceeding the end of the file by one cluster or more";
      this.corruption(`${what}: ${where}`);
      return;
    }
    const first = Math.floor(offsetBytes / clusterSizeBytes);
    const last = Math.ceil(end / clusterSizeBytes);
    if (last > this.hostClusterCount) this.hostClusterCount = last;
    for (let cluster = first; cluster < last; cluster++) {
      this.referredGroups[cluster >>> GROUP_BITS] = 1;
      const count = this.references[cluster] ?? 0;
      if (count < this.referenceMax) {
        this.references[cluster] = count + 1;
      } else {
        this.corruption(`overflow cluster offset=${hex(cluster * clusterSizeBytes)}`);
        if (this.overflowed.size < MAX_OVERFLOWS) this.overflowed.add(cluster);
      }
    }
  }

  /** Whether any of the host clusters [first, end) may be referred to; false is sure. */
  mayRefer(first: number, end: number): boolean {
    for (let group = first >>> GROUP_BITS; group <= (end - 1) >>> GROUP_BITS; group++) {
      if (this.referredGroups[group] !== 0) return true;
    }
    return false;
  }

  /** Nothing else refers to the cluster. Where that is not known any more, the answer is no. */
  isReferredToOnce(cluster: number): boolean {
    if (this.references[cluster] !== 1 || this.overflowed.has(cluster)) return false;
    return this.overflowed.size < MAX_OVERFLOWS;
  }

  isMisaligned(offsetBytes: number): boolean {
    return offsetBytes % this.clusterSizeBytes !== 0;
  }

  /**
   * Bytes of the file; zeroes past its end.
   * @throws CowcatcherError IO
   */
  async read(offsetBytes: number, lengthBytes: number): Promise<DataView> {
    const bytes = new Uint8Array(Math.max(lengthBytes, 0));
    if (offsetBytes < this.fileBytes && bytes.length > 0) {
      const completion = this.file.read(bytes, 0, bytes.length, offsetBytes);
      if (completion !== undefined) await completion;
    }
    return new DataView(bytes.buffer);
  }

  /** The same, blocking the thread: for what is small and rare. @throws CowcatcherError IO */
  readNow(offsetBytes: number, lengthBytes: number): DataView {
    const bytes = new Uint8Array(lengthBytes);
    if (offsetBytes < this.fileBytes) this.file.readSync(bytes, 0, bytes.length, offsetBytes);
    return new DataView(bytes.buffer);
  }

  /** @throws CowcatcherError IO, NO_SPACE */
  async write(bytes: Uint8Array, offsetBytes: number): Promise<void> {
    await this.file.write(bytes, 0, bytes.length, offsetBytes);
  }
}

export function hex(value: number | bigint): string {
  return `0x${value.toString(16)}`;
}

/** Bits 9..55 of a table entry given as two words. Exact: such an offset has 47 significant bits. */
export function offsetOf(high: number, low: number): number {
  return (high & 0x00ffffff) * 2 ** 32 + ((low & 0xfffffe00) >>> 0);
}

export function entryHex(high: number, low: number): string {
  const digits = high.toString(16) + low.toString(16).padStart(8, "0");
  return digits.replace(/^0+(?=.)/, "");
}
