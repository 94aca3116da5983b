// A worker's door to the L2 tables of a qcow2 target.
//
// They are not kept in memory. The first worker that needs one moves its place from NONE to ALLOCATING, takes a
// cluster and publishes it; the others wait on the word. A fresh file's cluster reads as zeroes already; on a block
// device the allocating worker zeroes it before it publishes. Entries of one table may be written by several workers
// at once: each byte of the disk is written once, so the ranges are disjoint and whole entries, and the kernel keeps
// writes of one page through the page cache from losing each other's bytes. That is why tables never go through
// O_DIRECT, and why O_DIRECT needs clusters that are whole pages (qcow2.ts).

import { CowcatcherError } from "../../errors.js";
import { pwriteAll, writeError, Zeroer } from "../file/pwrite.js";
import type { HostClusters } from "./hosts.js";
import { ALLOCATING, ENTRY_BYTES, L2_PLACES, NONE } from "./layout.js";
import type { Qcow2TargetDescription } from "../target.js";

/** Allocating takes microseconds in a file, one zeroed cluster on a device; a worker that died never publishes. */
const L2_WAIT_MS_MAX = 60_000;

export class L2Tables {
  readonly entryCount: number;
  readonly #description: Qcow2TargetDescription;
  readonly #hosts: HostClusters;
  readonly #words: Int32Array;
  readonly #clusterBytes: number;
  readonly #zeroer = new Zeroer();

  constructor(description: Qcow2TargetDescription, hosts: HostClusters) {
    this.#description = description;
    this.#hosts = hosts;
    this.#words = new Int32Array(description.shared);
    this.#clusterBytes = 2 ** description.clusterBits;
    this.entryCount = this.#clusterBytes / ENTRY_BYTES;
  }

  /** Entries from this guest cluster to the end of its table. */
  entriesLeft(guestCluster: number): number {
    return this.entryCount - (guestCluster % this.entryCount);
  }

  /** Host offset of a guest cluster's entry; allocates the table. @throws CowcatcherError IO, NO_SPACE, LIMIT, WORKER. */
  entryOffset(guestCluster: number): number {
    return this.#tableOffset(guestCluster) + (guestCluster % this.entryCount) * ENTRY_BYTES;
  }

  /** Writes the first `entryCount` of `entries` at an offset that entryOffset() gave; all of one table. */
  writeEntries(entries: Uint8Array, entryCount: number, hostOffset: number, guestCluster: number): void {
    const { metadataFd, name } = this.#description;
    const result = pwriteAll(metadataFd, entries, 0, entryCount * ENTRY_BYTES, hostOffset);
    if (result < 0) throw writeError(name, result, guestCluster * this.#clusterBytes);
  }

  #tableOffset(guestCluster: number): number {
    const word = L2_PLACES + Math.floor(guestCluster / this.entryCount);
    for (;;) {
      const place = Atomics.compareExchange(this.#words, word, NONE, ALLOCATING);
      if (place === NONE) return this.#publish(word, guestCluster) * this.#clusterBytes;
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
  #publish(word: number, guestCluster: number): number {
    let place = NONE;
    try {
      place = this.#newTable(guestCluster * this.#clusterBytes);
    } finally {
      Atomics.store(this.#words, word, place);
      Atomics.notify(this.#words, word);
    }
    return place;
  }

  #newTable(guestOffsetBytes: number): number {
    const { metadataFd, name, startsZeroed } = this.#description;
    const cluster = this.#hosts.allocate(1, guestOffsetBytes);
    if (startsZeroed) return cluster;
    const result = this.#zeroer.zero(metadataFd, cluster * this.#clusterBytes, this.#clusterBytes);
    if (result === 0) return cluster;
    this.#hosts.release(cluster, 1);
    throw writeError(name, result, guestOffsetBytes);
  }
}
