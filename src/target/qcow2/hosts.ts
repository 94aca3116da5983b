// Host clusters of a qcow2 target: who takes which, and how often each is used. Any thread.
//
// Whole clusters (guest data that is stored plain, L2 tables) come from NEXT_FREE. Nothing is recorded where a target
// is not compressed: each cluster that was handed out is used once.
//
// Compressed clusters are packed byte by byte, whichever worker they come from. PACK_CLUSTER and PACK_BYTES say where
// the last one ended, in which host cluster and after how many of its bytes; the next one begins there. What does not
// fit goes on in the next host cluster if NEXT_FREE stands there, so that it is contiguous; if somebody has taken that
// one, it begins in a new cluster, and the rest of the last one stays empty. As compressed clusters are taken for a
// whole chunk at once and before its plain ones, that is rare: a part of a cluster for each L2 table and each chunk
// with plain clusters. The two words belong together, so a lock guards them, for microseconds a chunk.
//
// In a compressed target every use of a host cluster is counted in `refcounts`, a compressed cluster's only when its
// data is written. So bytes that a failed write has left behind are no leaks.

import { CowcatcherError } from "../../errors.js";
import { allocateClusters, NONE, PACK_BYTES, PACK_CLUSTER, PACK_LOCK, releaseClusters } from "./layout.js";
import type { Qcow2TargetDescription } from "../target.js";

const LOCKED = 1;
/** The lock is held for microseconds; a worker that died in it never gives it back. */
const LOCK_WAIT_MS_MAX = 60_000;

export class HostClusters {
  readonly #words: Int32Array;
  readonly #refcounts: Uint16Array | null;
  readonly #clusterBytes: number;
  readonly #name: string;

  constructor({ shared, refcounts, clusterBits, name }: Qcow2TargetDescription) {
    this.#words = new Int32Array(shared);
    this.#refcounts = refcounts === null ? null : new Uint16Array(refcounts);
    this.#clusterBytes = 2 ** clusterBits;
    this.#name = name;
  }

  /** @returns the first of `clusterCount` contiguous clusters. @throws CowcatcherError LIMIT. */
  allocate(clusterCount: number, guestOffsetBytes: number): number {
    const first = allocateClusters(this.#words, clusterCount);
    if (first < 0) throw this.#full(guestOffsetBytes);
    // Nobody else knows of them yet.
    this.#refcounts?.fill(1, first, first + clusterCount);
    return first;
  }

  /** Clusters that allocate() gave and that hold nothing. */
  release(first: number, clusterCount: number): void {
    if (this.#refcounts === null) releaseClusters(this.#words, first, clusterCount);
    else this.#refcounts.fill(0, first, first + clusterCount);
  }

  /**
   * Places for compressed clusters of sizes[0, count) bytes, each less than a cluster, or 0 for none.
   * hostOffsets[i] becomes where the i-th begins, in bytes. @throws CowcatcherError LIMIT, WORKER.
   */
  pack(sizes: Int32Array, count: number, hostOffsets: Float64Array, guestOffsetBytes: number): void {
    this.#lock(guestOffsetBytes);
    try {
      for (let i = 0; i < count; i++) {
        const bytes = sizes[i] ?? 0;
        if (bytes > 0) hostOffsets[i] = this.#packOne(bytes, guestOffsetBytes + i * this.#clusterBytes);
      }
    } finally {
      this.#unlock();
    }
  }

  /** The lock is held. @returns the host offset in bytes. */
  #packOne(bytes: number, guestOffsetBytes: number): number {
    const words = this.#words;
    const cluster = words[PACK_CLUSTER] ?? 0;
    const used = words[PACK_BYTES] ?? 0;
    const start = cluster * this.#clusterBytes + used;
    if (used + bytes <= this.#clusterBytes) {
      words[PACK_BYTES] = used + bytes;
      return start;
    }
    const next = allocateClusters(words, 1);
    if (next < 0) throw this.#full(guestOffsetBytes);
    const contiguous = next === cluster + 1;
    words[PACK_CLUSTER] = next;
    words[PACK_BYTES] = contiguous ? used + bytes - this.#clusterBytes : bytes;
    return contiguous ? start : next * this.#clusterBytes;
  }

  /** A compressed cluster stands in [hostOffsetBytes, +lengthBytes): one use of each host cluster there. */
  countUse(hostOffsetBytes: number, lengthBytes: number): void {
    if (this.#refcounts === null) return;
    const last = Math.floor((hostOffsetBytes + lengthBytes - 1) / this.#clusterBytes);
    for (let cluster = Math.floor(hostOffsetBytes / this.#clusterBytes); cluster <= last; cluster++) {
      Atomics.add(this.#refcounts, cluster, 1);
    }
  }

  #lock(guestOffsetBytes: number): void {
    const words = this.#words;
    while (Atomics.compareExchange(words, PACK_LOCK, NONE, LOCKED) !== NONE) {
      if (Atomics.wait(words, PACK_LOCK, LOCKED, LOCK_WAIT_MS_MAX) !== "timed-out") continue;
      throw new CowcatcherError({
        code: "WORKER",
        object: this.#name,
        problem: `another worker did not place its compressed clusters within ${LOCK_WAIT_MS_MAX / 1000} s`,
        offsetBytes: guestOffsetBytes,
      });
    }
  }

  #unlock(): void {
    Atomics.store(this.#words, PACK_LOCK, NONE);
    Atomics.notify(this.#words, PACK_LOCK, 1);
  }

  #full(guestOffsetBytes: number): CowcatcherError {
    return new CowcatcherError({
      code: "LIMIT",
      object: this.#name,
      problem: `the refcount table of a qcow2 image with clusters of ${this.#clusterBytes} bytes is full`,
      hint: "choose larger clusters",
      offsetBytes: guestOffsetBytes,
    });
  }
}
