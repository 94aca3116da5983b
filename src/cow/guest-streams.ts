// Which of a guest's writes go on where another ended: logs and copies of files, as against random writes.
//
// Without a buffer a write waits for the target. To one at a random place only its own clusters matter. One that goes on
// is followed by others, and where the target takes its time over each request, a request for each small cluster would
// cost them all that time: there the clusters up to the next boundary of MIN_CLUSTER_BYTES are taken along.

import { MIN_CLUSTER_BYTES } from "./geometry.js";

/** That many streams side by side; a guest's queue holds about as many writes. */
const STREAM_COUNT = 16;

/** Main thread only; offsets in bytes of the disk. */
export class GuestStreams {
  /** Where the last write of each ended; -1 for none. */
  readonly #ends = new Float64Array(STREAM_COUNT).fill(-1);
  #oldest = 0;

  /** Notes a write: the end of what is to be taken along with it, which is its own end unless it goes on. */
  note(offsetBytes: number, lengthBytes: number): number {
    const end = offsetBytes + lengthBytes;
    const stream = this.#ends.indexOf(offsetBytes);
    if (stream >= 0) {
      this.#ends[stream] = end;
      return Math.ceil(end / MIN_CLUSTER_BYTES) * MIN_CLUSTER_BYTES;
    }
    this.#ends[this.#oldest] = end;
    this.#oldest = (this.#oldest + 1) % STREAM_COUNT;
    return end;
  }
}
