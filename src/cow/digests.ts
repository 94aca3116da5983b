// What each cluster was at T0, in eight bytes, so that the target can be read back and compared with it.
//
// A worker records a cluster when it has the cluster's final T0 content in hand, before the first byte of it goes to
// the target: whatever the writer, the kernel or the storage then does to it shows as a difference. Each cluster is
// recorded once, by the one worker that took it, and nobody reads the digests before all workers have ended, so the
// words need no atomic access.
//
//   word 2n, 2n + 1   the first eight bytes of the SHA-256 of cluster n, the last one at its true length;
//                     0, 0 if all of it is zero: nothing need be hashed or even recorded for a hole
//
// A corruption passes unseen once in 2^64. Without --verify there are no digests and nothing is hashed. Memory: 8
// bytes a cluster, 128 MiB for each TiB with clusters of 64 KiB; the kernel gives pages only as data is recorded.

import { createHash } from "node:crypto";
import { CowcatcherError } from "../errors.js";
import type { Geometry } from "./geometry.js";
import { isZero } from "./zero.js";

const WORDS = 2;
const BYTES_PER_CLUSTER = WORDS * Uint32Array.BYTES_PER_ELEMENT;

/** @throws CowcatcherError LIMIT when the system has no room for it. */
export function allocateDigests(
  { clusterCount }: Geometry,
  allocate = (bytes: number) => new SharedArrayBuffer(bytes),
): SharedArrayBuffer {
  const bytes = BYTES_PER_CLUSTER * Math.max(1, clusterCount);
  try {
    return allocate(bytes);
  } catch (cause) {
    throw new CowcatcherError({
      code: "LIMIT",
      object: "--verify",
      problem: `${bytes} bytes of memory for the clusters' digests cannot be allocated`,
      hint: "choose a larger --cluster-size, or leave --verify out and compare afterwards",
      cause,
    });
  }
}

/** Any thread. Ranges are [from, to) of a buffer and hold one whole cluster, but for the disk's last. */
export class ClusterDigests {
  readonly #words: Uint32Array;

  constructor(memory: SharedArrayBuffer) {
    this.#words = new Uint32Array(memory);
  }

  /** Records a cluster that is not all zero. */
  record(cluster: number, buffer: Uint8Array, from: number, to: number): void {
    const digest = sha256(buffer, from, to);
    this.#words[cluster * WORDS] = firstWord(digest);
    this.#words[cluster * WORDS + 1] = secondWord(digest);
  }

  /** The cluster was all zero at T0. */
  expectsZero(cluster: number): boolean {
    return this.#words[cluster * WORDS] === 0 && this.#words[cluster * WORDS + 1] === 0;
  }

  /** Whether the range is what the cluster was at T0. */
  matches(cluster: number, buffer: Uint8Array, from: number, to: number): boolean {
    if (this.expectsZero(cluster)) return isZero(buffer, from, to);
    const digest = sha256(buffer, from, to);
    return (
      this.#words[cluster * WORDS] === firstWord(digest) &&
      this.#words[cluster * WORDS + 1] === secondWord(digest)
    );
  }
}

function sha256(buffer: Uint8Array, from: number, to: number): Buffer {
  return createHash("sha256").update(buffer.subarray(from, to)).digest();
}

function firstWord(digest: Buffer): number {
  return digest.readUInt32LE(0);
}

/** Never 0, so that no content is taken for a hole. */
function secondWord(digest: Buffer): number {
  return digest.readUInt32LE(4) || 1;
}
