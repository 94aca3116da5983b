// A worker's side of a qcow2 target.
//
// Guest data. A run of k guest clusters takes k contiguous host clusters (one compare-exchange on NEXT_FREE) and
// one write; then its L2 entries, one small write an L2 table. No order between the two is needed: nobody reads
// the file before complete(), and a file that was not finished is removed.
//
// The entries are put off until the next write, or until settle(). Writes to a file take turns (the inode's lock), and
// one of 128 bytes that follows one of 1 MiB waits for another worker's 1 MiB first, while this worker could read.
// Put off, it is made when this worker wants the lock anyway. (Measured: docs/measurements/copy.md.) They stay until they
// are written or given up by name: several drainers may share a writer (workers/copy.ts), and that one of them goes on
// says nothing of another's entries, which it may be about to try again.
//
// Failures. The writer remembers the run it is at. When the caller tries the same range again, it takes the same
// host clusters; when the caller gives up and goes on, the run is released, unless some of its entries may be in
// the table already: then it stays allocated, and in the worst case `qemu-img check` reports a few leaked clusters.

import { CowcatcherError } from "../../errors.js";
import type { Completion } from "../../block/device.js";
import { enterGate, leaveGate } from "../file/gate.js";
import { pwriteAll, pwriteData, writeError } from "../file/pwrite.js";
import { HostClusters } from "./hosts.js";
import { ENTRY_BYTES } from "./layout.js";
import { L2Tables } from "./tables.js";
import type { Qcow2TargetDescription } from "../target.js";
import type { TargetWriter } from "../../cow/target-writer.js";

/** Longest run written at once: bounds the buffer for entries to 32 KiB. */
const RUN_CLUSTER_COUNT_MAX = 4096;
/** Bit 63 of an entry, in its high word: the cluster's refcount is exactly one. */
export const COPIED_HIGH_WORD = 0x8000_0000;
/** Bit 0: the cluster reads as zeroes. */
const ZERO_FLAG_LOW_BYTE = 0x01;
export const TWO_POW_32 = 0x1_0000_0000;

export class Qcow2Writer implements TargetWriter {
  readonly #description: Qcow2TargetDescription;
  readonly #words: Int32Array;
  readonly #clusterBytes: number;
  readonly #hosts: HostClusters;
  readonly #tables: L2Tables;
  readonly #entryBytes: Uint8Array;
  readonly #entries: DataView;
  #zeroEntries: Uint8Array | null = null;
  #tailCluster: Uint8Array | null = null;

  // The run in hand; count 0: none.
  #runGuestCluster = 0;
  #runHostCluster = 0;
  #runClusterCount = 0;
  #runEntriesBegun = false;

  /** Entries in #entryBytes that are to be written; count 0: none. */
  #lateEntryCount = 0;
  #lateEntryOffset = 0;
  #lateGuestCluster = 0;

  constructor(description: Qcow2TargetDescription) {
    this.#description = description;
    this.#words = new Int32Array(description.shared);
    this.#clusterBytes = 2 ** description.clusterBits;
    this.#hosts = new HostClusters(description);
    this.#tables = new L2Tables(description, this.#hosts);
    const entryCountMax = Math.min(RUN_CLUSTER_COUNT_MAX, this.#tables.entryCount);
    this.#entryBytes = new Uint8Array(new ArrayBuffer(entryCountMax * ENTRY_BYTES));
    this.#entries = new DataView(this.#entryBytes.buffer);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    checkRange(this.#description, offsetBytes, lengthBytes);
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
    checkRange(this.#description, offsetBytes, lengthBytes);
    // Else an unallocated cluster reads as zeroes.
    if (!this.#description.showsOther || lengthBytes === 0) return undefined;
    enterGate(this.#words, this.#description.name);
    try {
      const end = Math.ceil((offsetBytes + lengthBytes) / this.#clusterBytes);
      for (let at = offsetBytes / this.#clusterBytes; at < end;) {
        at += this.#markZero(at, Math.min(end - at, this.#tables.entriesLeft(at)));
      }
    } finally {
      leaveGate(this.#words);
    }
    return undefined;
  }

  settle(): Completion {
    if (this.#lateEntryCount === 0) return undefined;
    enterGate(this.#words, this.#description.name);
    try {
      this.#writeLateEntries();
    } finally {
      leaveGate(this.#words);
    }
    return undefined;
  }

  giveUp(): void {
    this.#lateEntryCount = 0;
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
    this.#runHostCluster = this.#hosts.allocate(clusterCount, offsetBytes);
    this.#runGuestCluster = guestCluster;
    this.#runClusterCount = clusterCount;
    this.#runEntriesBegun = false;
  }

  #abandonRun(): void {
    if (this.#runClusterCount > 0 && !this.#runEntriesBegun) {
      this.#hosts.release(this.#runHostCluster, this.#runClusterCount);
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

  /** Writes the run's entries, but for those of its last L2 table, which are put off. */
  #writeEntries(guestCluster: number, clusterCount: number): void {
    this.#writeLateEntries();
    for (let done = 0; done < clusterCount;) {
      const entryCount = Math.min(clusterCount - done, this.#tables.entriesLeft(guestCluster + done));
      const entryOffset = this.#tables.entryOffset(guestCluster + done);
      for (let i = 0; i < entryCount; i++) {
        const hostOffset = (this.#runHostCluster + done + i) * this.#clusterBytes;
        this.#entries.setUint32(i * ENTRY_BYTES, Math.floor(hostOffset / TWO_POW_32) + COPIED_HIGH_WORD);
        this.#entries.setUint32(i * ENTRY_BYTES + 4, hostOffset % TWO_POW_32);
      }
      this.#runEntriesBegun = true;
      this.#lateEntryCount = entryCount;
      this.#lateEntryOffset = entryOffset;
      this.#lateGuestCluster = guestCluster + done;
      done += entryCount;
      if (done < clusterCount) this.#writeLateEntries();
    }
  }

  #writeLateEntries(): void {
    const entryCount = this.#lateEntryCount;
    if (entryCount === 0) return;
    this.#tables.writeEntries(this.#entryBytes, entryCount, this.#lateEntryOffset, this.#lateGuestCluster);
    this.#lateEntryCount = 0;
  }

  /** Within one L2 table. @returns entryCount */
  #markZero(guestCluster: number, entryCount: number): number {
    if (this.#zeroEntries === null) {
      this.#zeroEntries = new Uint8Array(new ArrayBuffer(this.#clusterBytes));
      for (let at = ENTRY_BYTES - 1; at < this.#clusterBytes; at += ENTRY_BYTES) {
        this.#zeroEntries[at] = ZERO_FLAG_LOW_BYTE;
      }
    }
    const entryOffset = this.#tables.entryOffset(guestCluster);
    this.#tables.writeEntries(this.#zeroEntries, entryCount, entryOffset, guestCluster);
    return entryCount;
  }
}

/** @throws CowcatcherError INTERNAL unless the range is in whole clusters, but for the disk's end. */
export function checkRange(
  { name, sizeBytes, clusterBits }: Qcow2TargetDescription,
  offsetBytes: number,
  lengthBytes: number,
): void {
  const clusterBytes = 2 ** clusterBits;
  const end = offsetBytes + lengthBytes;
  const inside = offsetBytes >= 0 && lengthBytes >= 0 && end <= sizeBytes;
  // The disk may end up to 511 bytes before the image, which has whole sectors.
  const atEnd = end > sizeBytes - 512;
  const aligned = offsetBytes % clusterBytes === 0 && (end % clusterBytes === 0 || atEnd);
  if (inside && aligned) return;
  throw new CowcatcherError({
    code: "INTERNAL",
    object: name,
    problem: `a write of ${lengthBytes} bytes is not in whole clusters, or leaves the disk of ${sizeBytes}`,
    offsetBytes,
  });
}
