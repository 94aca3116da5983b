// A worker's side of a compressed qcow2 target.
//
// A batch is a run of guest clusters, at most a chunk. Its way:
//
//   compress each cluster into the worker's own buffer, one after another
//   take places for what got smaller (qcow2/hosts.ts): most of it in one contiguous stretch of the file
//   write the stretches; count the uses of their host clusters; write the L2 entries
//   hand the clusters that did not get smaller to the plain writer, run by run
//
// Entry of a compressed cluster (docs/interop/qcow2.rst, "Compressed Clusters Descriptor"; x = 70 - clusterBits):
// host offset in bytes in bits 0 to x-1, the count of 512-byte sectors after the first one from bit x on, bit 62 set.
//
// Compressed data goes through the page cache even where plain clusters do not (--direct): it is not aligned to
// anything, and neighbouring workers' share pages. Plain clusters and packed ones never share a host cluster.
//
// Failures. The writer remembers its batch. When the caller tries the same range again, it takes up where the batch
// failed, with the same places. When the caller gives up, the places stay unused and uncounted, unless entries may
// be in the table already: then the worst that `qemu-img check` reports is leaked clusters.

import type { Completion } from "../../block/device.js";
import { Compressor } from "../../image/qcow2/format/compress.js";
import type { Compression } from "../../image/qcow2/format/compression.js";
import { MiB } from "../../units.js";
import { enterGate, leaveGate } from "../file/gate.js";
import { pwriteAll, writeError } from "../file/pwrite.js";
import { HostClusters } from "./hosts.js";
import { ENTRY_BYTES, SECTOR_BYTES } from "./layout.js";
import { L2Tables } from "./tables.js";
import { checkRange, Qcow2Writer, TWO_POW_32 } from "./writer.js";
import type { Qcow2TargetDescription } from "../target.js";
import type { TargetWriter } from "../../cow/target-writer.js";

/** A drain's chunk, so that most batches are one write. */
const BATCH_BYTES = 1 * MiB;
/** Bit 62 of an entry, in its high word. */
const COMPRESSED_HIGH_WORD = 0x4000_0000;

export class CompressingWriter implements TargetWriter {
  readonly #description: Qcow2TargetDescription;
  readonly #words: Int32Array;
  readonly #clusterBytes: number;
  readonly #batchClusterCount: number;
  readonly #compressor: Compressor;
  readonly #plain: Qcow2Writer;
  readonly #hosts: HostClusters;
  readonly #tables: L2Tables;

  // The batch in hand: bytes of each compressed cluster (0: plain), where it goes, and one after another what it is.
  readonly #sizes: Int32Array;
  readonly #hostOffsets: Float64Array;
  readonly #packed: Uint8Array;
  readonly #entryBytes: Uint8Array;
  readonly #entries: DataView;
  #tailCluster: Uint8Array | null = null;
  #guestCluster = 0;
  /** 0: no batch. */
  #clusterCount = 0;
  #step: "write" | "count" | "enter" | "plain" = "write";
  /** Clusters before this one are done with, among the plain ones. */
  #plainDone = 0;

  /** @throws CowcatcherError UNSUPPORTED where this thread cannot compress. */
  constructor(description: Qcow2TargetDescription, compression: Compression) {
    this.#description = description;
    this.#words = new Int32Array(description.shared);
    this.#clusterBytes = 2 ** description.clusterBits;
    this.#compressor = new Compressor(compression, description.name);
    this.#plain = new Qcow2Writer(description);
    this.#hosts = new HostClusters(description);
    this.#tables = new L2Tables(description, this.#hosts);
    const batchBytes = Math.max(BATCH_BYTES, this.#clusterBytes);
    this.#batchClusterCount = batchBytes / this.#clusterBytes;
    this.#sizes = new Int32Array(this.#batchClusterCount);
    this.#hostOffsets = new Float64Array(this.#batchClusterCount);
    this.#packed = new Uint8Array(new ArrayBuffer(batchBytes));
    this.#entryBytes = new Uint8Array(new ArrayBuffer(this.#batchClusterCount * ENTRY_BYTES));
    this.#entries = new DataView(this.#entryBytes.buffer);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    checkRange(this.#description, offsetBytes, lengthBytes);
    const batchBytes = this.#batchClusterCount * this.#clusterBytes;
    for (let done = 0; done < lengthBytes; done += batchBytes) {
      const bytes = Math.min(batchBytes, lengthBytes - done);
      this.#writeBatch(buffer, bufferOffset + done, bytes, offsetBytes + done);
    }
    return undefined;
  }

  settle(): Completion {
    return this.#plain.settle();
  }

  giveUp(): void {
    this.#plain.giveUp();
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    return this.#plain.writeZeroes(offsetBytes, lengthBytes);
  }

  close(): void {
    this.#plain.close();
    this.#compressor.close();
  }

  #writeBatch(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    const guestCluster = offsetBytes / this.#clusterBytes;
    const clusterCount = Math.ceil(lengthBytes / this.#clusterBytes);
    if (this.#clusterCount !== clusterCount || this.#guestCluster !== guestCluster) {
      this.#takeBatch(buffer, bufferOffset, lengthBytes, guestCluster, clusterCount);
    }
    if (this.#step !== "plain") this.#writePacked();
    this.#writePlain(buffer, bufferOffset, lengthBytes, offsetBytes);
    this.#clusterCount = 0;
  }

  /** Compresses the batch and takes places for what got smaller. */
  #takeBatch(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    guestCluster: number,
    clusterCount: number,
  ): void {
    this.#clusterCount = 0;
    let packedBytes = 0;
    for (let i = 0; i < clusterCount; i++) {
      const from = i * this.#clusterBytes;
      const bytes = Math.min(this.#clusterBytes, lengthBytes - from);
      const size = this.#compress(buffer, bufferOffset + from, bytes, packedBytes);
      this.#sizes[i] = size;
      packedBytes += size;
    }
    this.#hosts.pack(this.#sizes, clusterCount, this.#hostOffsets, guestCluster * this.#clusterBytes);
    this.#guestCluster = guestCluster;
    this.#clusterCount = clusterCount;
    this.#step = "write";
    this.#plainDone = 0;
  }

  /** @returns the bytes that one cluster took in #packed, 0 where it does not get smaller. */
  #compress(buffer: Uint8Array, offset: number, lengthBytes: number, packedOffset: number): number {
    const clusterBytes = this.#clusterBytes;
    const capacity = clusterBytes - 1;
    if (lengthBytes === clusterBytes) {
      return this.#compressor.run(buffer, offset, clusterBytes, this.#packed, packedOffset, capacity);
    }
    // The disk's last cluster: decompression must give a whole one.
    this.#tailCluster ??= new Uint8Array(new ArrayBuffer(clusterBytes));
    this.#tailCluster.fill(0);
    this.#tailCluster.set(buffer.subarray(offset, offset + lengthBytes));
    return this.#compressor.run(this.#tailCluster, 0, clusterBytes, this.#packed, packedOffset, capacity);
  }

  #writePacked(): void {
    enterGate(this.#words, this.#description.name);
    try {
      if (this.#step === "write") this.#writeStretches();
      if (this.#step === "count") this.#countUses();
      this.#writeEntries();
      this.#step = "plain";
    } finally {
      leaveGate(this.#words);
    }
  }

  /** Compressed clusters whose places follow each other go in one write. */
  #writeStretches(): void {
    const { metadataFd, name } = this.#description;
    let packedOffset = 0;
    for (let i = 0; i < this.#clusterCount;) {
      const first = i;
      const start = this.#hostOffsets[first] ?? 0;
      let bytes = this.#sizes[i++] ?? 0;
      if (bytes === 0) continue;
      for (; i < this.#clusterCount; i++) {
        const size = this.#sizes[i] ?? 0;
        if (size > 0 && this.#hostOffsets[i] !== start + bytes) break;
        bytes += size;
      }
      const result = pwriteAll(metadataFd, this.#packed, packedOffset, bytes, start);
      if (result < 0) throw writeError(name, result, (this.#guestCluster + first) * this.#clusterBytes);
      packedOffset += bytes;
    }
    this.#step = "count";
  }

  /** Once a batch, however often its entries are tried. */
  #countUses(): void {
    for (let i = 0; i < this.#clusterCount; i++) {
      const size = this.#sizes[i] ?? 0;
      if (size > 0) this.#hosts.countUse(this.#hostOffsets[i] ?? 0, size);
    }
    this.#step = "enter";
  }

  /** A run of compressed clusters in one L2 table is one write. */
  #writeEntries(): void {
    for (let i = 0; i < this.#clusterCount;) {
      if (this.#sizes[i] === 0) {
        i++;
        continue;
      }
      const guestCluster = this.#guestCluster + i;
      const most = Math.min(this.#clusterCount - i, this.#tables.entriesLeft(guestCluster));
      let count = 0;
      for (; count < most && this.#sizes[i + count] !== 0; count++) this.#encodeEntry(i + count, count);
      const entryOffset = this.#tables.entryOffset(guestCluster);
      this.#tables.writeEntries(this.#entryBytes, count, entryOffset, guestCluster);
      i += count;
    }
  }

  #encodeEntry(index: number, at: number): void {
    const start = this.#hostOffsets[index] ?? 0;
    const last = start + (this.#sizes[index] ?? 0) - 1;
    const sectorCount = Math.floor(last / SECTOR_BYTES) - Math.floor(start / SECTOR_BYTES);
    const sectorUnit = 2 ** (70 - this.#description.clusterBits - 32);
    const highWord = Math.floor(start / TWO_POW_32) + sectorCount * sectorUnit + COMPRESSED_HIGH_WORD;
    this.#entries.setUint32(at * ENTRY_BYTES, highWord);
    this.#entries.setUint32(at * ENTRY_BYTES + 4, start % TWO_POW_32);
  }

  #writePlain(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    for (let i = this.#plainDone; i < this.#clusterCount;) {
      if (this.#sizes[i] !== 0) {
        i++;
        continue;
      }
      const from = i * this.#clusterBytes;
      while (i < this.#clusterCount && this.#sizes[i] === 0) i++;
      const bytes = Math.min(i * this.#clusterBytes, lengthBytes) - from;
      // It is done when it returns.
      void this.#plain.write(buffer, bufferOffset + from, bytes, offsetBytes + from);
      this.#plainDone = i;
    }
  }
}
