// A worker's side of a qcow2 target.
//
// Guest data. A run of k guest clusters takes k contiguous host clusters (one compare-exchange on NEXT_FREE) and
// one write; then its L2 entries, one small write an L2 table. No order between the two is needed: nobody reads
// the file before complete(), and a file that was not finished is removed.
//
// L2 tables are not kept in memory. The first worker that needs one moves its place from NONE to ALLOCATING,
// takes a cluster and publishes it; the others wait on the word. A fresh file's cluster reads as zeroes already;
// on a block device the allocating worker zeroes it before it publishes. Entries of one table may be written by
// several workers at once: each byte of the disk is written once, so the ranges are disjoint and whole entries,
// and the kernel keeps writes of one page through the page cache from losing each other's bytes. That is why
// tables never go through O_DIRECT, and why O_DIRECT needs clusters that are whole pages (qcow2.ts).
//
// Failures. The writer remembers the run it is at. When the caller tries the same range again, it takes the same
// host clusters; when the caller gives up and goes on, the run is released, unless some of its entries may be in
// the table already: then it stays allocated, and in the worst case `qemu-img check` reports a few leaked clusters.

import { CowcatcherError } from "../errors.js";
import type { Completion } from "../image/device.js";
import { enterGate, leaveGate } from "./gate.js";
import { pwriteAll, pwriteData, writeError, Zeroer } from "./pwrite.js";
import {
  allocateClusters,
  ALLOCATING,
  ENTRY_BYTES,
  L2_PLACES,
  NONE,
  releaseClusters,
} from "./qcow2-layout.js";
import type { Qcow2TargetDescription, TargetWriter } from "./target.js";

/** Longest run written at once: bounds the buffer for entries to 32 KiB. */
const RUN_CLUSTER_COUNT_MAX = 4096;
/** Bit 63 of an entry, in its high word: the cluster's refcount is exactly one. */
export const COPIED_HIGH_WORD = 0x8000_0000;
/** Bit 0: the cluster reads as zeroes. */
const ZERO_FLAG_LOW_BYTE = 0x01;
export const TWO_POW_32 = 0x1_0000_0000;
/** Allocating takes microseconds in a file, one zeroed cluster on a device; a worker that died never publishes. */
const L2_WAIT_MS_MAX = 60_000;

export class Qcow2Writer implements TargetWriter {
  readonly #description: Qcow2TargetDescription;
  readonly #words: Int32Array;
  readonly #clusterBytes: number;
  readonly #l2EntryCount: number;
  readonly #zeroer = new Zeroer();
  readonly #entryBytes: Uint8Array;
  readonly #entries: DataView;
  #zeroEntries: Uint8Array | null = null;
  #tailCluster: Uint8Array | null = null;

  // The run in hand; count 0: none.
  #runGuestCluster = 0;
  #runHostCluster = 0;
  #runClusterCount = 0;
  #runEntriesBegun = false;

  constructor(description: Qcow2TargetDescription) {
    this.#description = description;
    this.#words = new Int32Array(description.shared);
    this.#clusterBytes = 2 ** description.clusterBits;
    this.#l2EntryCount = this.#clusterBytes / ENTRY_BYTES;
    const entryCountMax = Math.min(RUN_CLUSTER_COUNT_MAX, this.#l2EntryCount);
    this.#entryBytes = new Uint8Array(new ArrayBuffer(entryCountMax * ENTRY_BYTES));
    this.#entries = new DataView(this.#entryBytes.buffer);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    this.#checkRange(offsetBytes, lengthBytes);
    const runBytesMax = RUN_CLUSTER_COUNT_MAX * this.#clusterBytes;
    enterGate(this.#words, this.#description.name);
    try {
      for (let done = 0; done < lengthBytes; done += runBytesMax) {
        this.#writeRun(
          buffer,
          bufferOffset + done,
          Math.min(runBytesMax, lengthBytes - done),
          offsetBytes + done,
        );
      }
    } finally {
      leaveGate(this.#words);
    }
    return undefined;
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    this.#checkRange(offsetBytes, lengthBytes);
    // An unallocated cluster without a backing file reads as zeroes.
    if (!this.#description.hasBacking || lengthBytes === 0) return undefined;
    enterGate(this.#words, this.#description.name);
    try {
      const end = Math.ceil((offsetBytes + lengthBytes) / this.#clusterBytes);
      for (let at = offsetBytes / this.#clusterBytes; at < end;) {
        at += this.#markZero(at, Math.min(end - at, this.#l2EntryCount - (at % this.#l2EntryCount)));
      }
    } finally {
      leaveGate(this.#words);
    }
    return undefined;
  }

  close(): void {
    this.#abandonRun();
  }

  #writeRun(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    const guestCluster = offsetBytes / this.#clusterBytes;
    const clusterCount = Math.ceil(lengthBytes / this.#clusterBytes);
    this.#takeRun(guestCluster, clusterCount, offsetBytes);
    const hostOffset = this.#runHostCluster * this.#clusterBytes;
    const result = this.#writeData(buffer, bufferOffset, lengthBytes, hostOffset);
    if (result < 0) throw writeError(this.#description.name, result, offsetBytes);
    this.#writeEntries(guestCluster, clusterCount);
    this.#runClusterCount = 0;
  }

  #takeRun(guestCluster: number, clusterCount: number, offsetBytes: number): void {
    if (this.#runClusterCount === clusterCount && this.#runGuestCluster === guestCluster) return;
    this.#abandonRun();
    this.#runHostCluster = this.#allocate(clusterCount, offsetBytes);
    this.#runGuestCluster = guestCluster;
    this.#runClusterCount = clusterCount;
    this.#runEntriesBegun = false;
  }

  #abandonRun(): void {
    if (this.#runClusterCount > 0 && !this.#runEntriesBegun) {
      releaseClusters(this.#words, this.#runHostCluster, this.#runClusterCount);
    }
    this.#runClusterCount = 0;
  }

  /** A short last cluster ends in zeroes: those of the fresh file, or written ones. */
  #writeData(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, hostOffset: number): number {
    const { dataFd, metadataFd, startsZeroed } = this.#description;
    const tailBytes = startsZeroed ? 0 : lengthBytes % this.#clusterBytes;
    const bodyBytes = lengthBytes - tailBytes;
    const result = pwriteData(dataFd, metadataFd, buffer, bufferOffset, bodyBytes, hostOffset);
    if (result < 0 || tailBytes === 0) return result;
    this.#tailCluster ??= new Uint8Array(new ArrayBuffer(this.#clusterBytes));
    this.#tailCluster.fill(0);
    const from = bufferOffset + bodyBytes;
    this.#tailCluster.set(buffer.subarray(from, from + tailBytes));
    return pwriteAll(metadataFd, this.#tailCluster, 0, this.#clusterBytes, hostOffset + bodyBytes);
  }

  #writeEntries(guestCluster: number, clusterCount: number): void {
    for (let done = 0; done < clusterCount;) {
      const l2Index = (guestCluster + done) % this.#l2EntryCount;
      const entryCount = Math.min(clusterCount - done, this.#l2EntryCount - l2Index);
      const tableOffset = this.#l2TableOffset(guestCluster + done);
      for (let i = 0; i < entryCount; i++) {
        const hostOffset = (this.#runHostCluster + done + i) * this.#clusterBytes;
        this.#entries.setUint32(i * ENTRY_BYTES, Math.floor(hostOffset / TWO_POW_32) + COPIED_HIGH_WORD);
        this.#entries.setUint32(i * ENTRY_BYTES + 4, hostOffset % TWO_POW_32);
      }
      this.#runEntriesBegun = true;
      this.#writeTable(
        this.#entryBytes,
        entryCount,
        tableOffset + l2Index * ENTRY_BYTES,
        guestCluster + done,
      );
      done += entryCount;
    }
  }

  /** Within one L2 table. @returns entryCount */
  #markZero(guestCluster: number, entryCount: number): number {
    if (this.#zeroEntries === null) {
      this.#zeroEntries = new Uint8Array(new ArrayBuffer(this.#clusterBytes));
      for (let at = ENTRY_BYTES - 1; at < this.#clusterBytes; at += ENTRY_BYTES) {
        this.#zeroEntries[at] = ZERO_FLAG_LOW_BYTE;
      }
    }
    const entryOffset = (guestCluster % this.#l2EntryCount) * ENTRY_BYTES;
    this.#writeTable(
      this.#zeroEntries,
      entryCount,
      this.#l2TableOffset(guestCluster) + entryOffset,
      guestCluster,
    );
    return entryCount;
  }

  #writeTable(entries: Uint8Array, entryCount: number, hostOffset: number, guestCluster: number): void {
    const { metadataFd, name } = this.#description;
    const result = pwriteAll(metadataFd, entries, 0, entryCount * ENTRY_BYTES, hostOffset);
    if (result < 0) throw writeError(name, result, guestCluster * this.#clusterBytes);
  }

  /** Host offset of the L2 table for a guest cluster; allocates it. */
  #l2TableOffset(guestCluster: number): number {
    const word = L2_PLACES + Math.floor(guestCluster / this.#l2EntryCount);
    for (;;) {
      const place = Atomics.compareExchange(this.#words, word, NONE, ALLOCATING);
      if (place === NONE) return this.#publishL2Table(word, guestCluster) * this.#clusterBytes;
      if (place !== ALLOCATING) return place * this.#clusterBytes;
      if (Atomics.wait(this.#words, word, ALLOCATING, L2_WAIT_MS_MAX) === "timed-out") {
        throw new CowcatcherError({
          code: "WORKER",
          object: this.#description.name,
          problem: `another worker did not allocate an L2 table within ${L2_WAIT_MS_MAX / 1000} s`,
          offsetBytes: guestCluster * this.#clusterBytes,
        });
      }
    }
  }

  /** The place is ALLOCATING and ours. Whatever happens, it is not left so. @returns the host cluster. */
  #publishL2Table(word: number, guestCluster: number): number {
    let place = NONE;
    try {
      place = this.#newL2Table(guestCluster * this.#clusterBytes);
    } finally {
      Atomics.store(this.#words, word, place);
      Atomics.notify(this.#words, word);
    }
    return place;
  }

  #newL2Table(guestOffsetBytes: number): number {
    const { metadataFd, name, startsZeroed } = this.#description;
    const cluster = this.#allocate(1, guestOffsetBytes);
    if (startsZeroed) return cluster;
    const result = this.#zeroer.zero(metadataFd, cluster * this.#clusterBytes, this.#clusterBytes);
    if (result === 0) return cluster;
    releaseClusters(this.#words, cluster, 1);
    throw writeError(name, result, guestOffsetBytes);
  }

  #allocate(clusterCount: number, guestOffsetBytes: number): number {
    const first = allocateClusters(this.#words, clusterCount);
    if (first >= 0) return first;
    throw new CowcatcherError({
      code: "LIMIT",
      object: this.#description.name,
      problem: `the refcount table of a qcow2 image with clusters of ${this.#clusterBytes} bytes is full`,
      hint: "choose larger clusters",
      offsetBytes: guestOffsetBytes,
    });
  }

  #checkRange(offsetBytes: number, lengthBytes: number): void {
    const { name, sizeBytes } = this.#description;
    const end = offsetBytes + lengthBytes;
    const inside = offsetBytes >= 0 && lengthBytes >= 0 && end <= sizeBytes;
    // The disk may end up to 511 bytes before the image, which has whole sectors.
    const atEnd = end > sizeBytes - 512;
    const aligned = offsetBytes % this.#clusterBytes === 0 && (end % this.#clusterBytes === 0 || atEnd);
    if (inside && aligned) return;
    throw new CowcatcherError({
      code: "INTERNAL",
      object: name,
      problem: `a write of ${lengthBytes} bytes is not in whole clusters, or leaves the disk of ${sizeBytes}`,
      offsetBytes,
    });
  }
}
