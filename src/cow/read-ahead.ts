// What was read before the target could take it: whole chunks, kept in memory. A worker's; one thread.
//
// Of a guest that another program runs (src/qemu) the old data is that program's to keep, and each first write of the guest
// to a cluster costs the guest a copy there, until the cluster is read. So a worker does not read at the target's pace but
// as fast as it can, and keeps what the target has no time for:
//
//   source ──read──► buffer ──► the target, where that keeps up
//                      └──► kept chunks (first in, first out) ──► the target, when it has time
//
// What is read is DONE (shared.ts): the guest's writes to it cost nothing any more. When everything is read the guest can
// be left alone, while the target still takes its time.
//
// The chunks stand in a file that is memory and nothing else (memfd), not in the process's own memory. A page of
// that costs its first touch: a fault, and under a hypervisor with shadow page tables 20 µs, 5 ms for a chunk. A page
// that the kernel writes to for us costs 1.2 µs. Each worker's part of the file is as long as all may keep together, since only
// what stands in it takes memory; what is taken out is given back at once.

import { readSync, writeSync } from "node:fs";
import { CowcatcherError, ioError } from "../errors.js";
import { libc } from "../native/libc.js";
import { type Filling, runsOf } from "./chunk-copy.js";
import type { Geometry } from "./geometry.js";
import { CTL_AHEAD_CHUNKS, type SharedState } from "./shared.js";

/** Of a job: plain data for its workers. */
export interface ReadAheadDescription {
  fd: number;
  /** Kept by all workers together, at most. */
  chunkLimit: number;
}

/** A chunk that was read and not written. */
export interface KeptChunk {
  chunk: number;
  takenBytes: number;
  filling: Filling;
}

type FileCall = (fd: number, buffer: Uint8Array, offset: number, length: number, position: number) => number;

/** One drainer's part. */
export class ReadAhead {
  readonly #shared: SharedState;
  readonly #fd: number;
  readonly #limit: number;
  /** The system has no memory for more (a control group's limit, strict accounting). */
  #isRefused = false;
  readonly #baseBytes: number;
  readonly #kept: KeptChunk[] = [];
  /** Counts chunks put in and taken out: their places follow each other, and come again after #limit. */
  #putCount = 0;
  #takenCount = 0;

  /** @param part no two drainers of a job have the same */
  constructor(shared: SharedState, { fd, chunkLimit }: ReadAheadDescription, part: number) {
    this.#shared = shared;
    this.#fd = fd;
    this.#limit = chunkLimit;
    this.#baseBytes = part * chunkLimit * shared.geometry.chunkBytes;
  }

  get isEmpty(): boolean {
    return this.#putCount === this.#takenCount;
  }

  get hasRoom(): boolean {
    return !this.#isRefused && Atomics.load(this.#shared.control, CTL_AHEAD_CHUNKS) < this.#limit;
  }

  /** False: the others have taken the room, or the system refuses it; then the chunk is the caller's to write. */
  put(kept: KeptChunk, chunkBuffer: Uint8Array): boolean {
    if (this.#isRefused) return false;
    const { control } = this.#shared;
    for (;;) {
      const count = Atomics.load(control, CTL_AHEAD_CHUNKS);
      if (count >= this.#limit) return false;
      if (Atomics.compareExchange(control, CTL_AHEAD_CHUNKS, count, count + 1) === count) break;
    }
    try {
      this.#transfer(writeSync, this.#putCount, kept, chunkBuffer);
    } catch {
      this.#isRefused = true;
      this.#giveBack(this.#putCount);
      return false;
    }
    this.#kept.push(kept);
    this.#putCount++;
    return true;
  }

  /** The oldest, with its data in `chunkBuffer`. There must be one. @throws CowcatherError */
  take(chunkBuffer: Uint8Array): KeptChunk {
    const kept = this.#kept.shift();
    if (kept === undefined) throw new Error("nothing was read ahead");
    this.#transfer(readSync, this.#takenCount, kept, chunkBuffer);
    this.#giveBack(this.#takenCount++);
    return kept;
  }

  #giveBack(count: number): void {
    libc?.punchHole(this.#fd, this.#placeOf(count), this.#shared.geometry.chunkBytes);
    Atomics.sub(this.#shared.control, CTL_AHEAD_CHUNKS, 1);
  }

  #placeOf(count: number): number {
    return this.#baseBytes + (count % this.#limit) * this.#shared.geometry.chunkBytes;
  }

  #transfer(call: FileCall, count: number, { chunk, filling }: KeptChunk, buffer: Uint8Array): void {
    const { clusterBytes }: Geometry = this.#shared.geometry;
    const length = this.#shared.chunkLengthBytes(chunk);
    const place = this.#placeOf(count);
    for (const [first, end] of runsOf(filling.copied)) {
      const to = Math.min(end * clusterBytes, length);
      for (let at = first * clusterBytes; at < to;) {
        at += this.#call(call, buffer, at, to - at, place + at);
      }
    }
  }

  #call(call: FileCall, buffer: Uint8Array, offset: number, lengthBytes: number, position: number): number {
    let count: number;
    try {
      count = call(this.#fd, buffer, offset, lengthBytes, position);
    } catch (error) {
      throw ioError("keep what was read ahead", "memory", error);
    }
    if (count > 0) return count;
    throw new CowcatcherError({ code: "IO", object: "memory", problem: "what was read ahead is gone" });
  }
}
