// The walk over a guest's range, one run of like units or clusters a step: what guest reads, writes and zero writes
// have in common.
//
// `step` serves the first run of the range. Either it is done on return, or `wait` holds the promise after which it is; a
// result of 0 with `wait` set means "look again then". While nothing waits the walk is one synchronous loop, without a
// promise or an object. From the first wait on it is an operation of its own for the freeing of host clusters
// (frees.ts): a step that waits goes by the mapping it has seen, and host clusters dropped meanwhile are not used again
// before the walk ends.
//
// Main thread only.

import type { Completion } from "../../../block/device.js";
import { toCowcatcherError } from "../../../errors.js";
import type { Mapping } from "./mapping.js";

export abstract class RangeWalk {
  wait: Completion;

  /** @param name what errors of the walk call the image */
  constructor(
    protected readonly mapping: Mapping,
    private readonly walkName: string,
  ) {}

  /**
   * Serves the first run of [offsetBytes, +lengthBytes): bytes done, or to be done when `wait` is over.
   * @param mode what the subclass's entry gave to `walk`
   */
  protected abstract walkStep(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
    mode: number,
  ): number;

  /** Steps until [offsetBytes, +lengthBytes) is served. Rejects, and never throws, with a CowcatcherError. */
  protected walk(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
    mode: number,
  ): Completion {
    let done = 0;
    try {
      while (done < lengthBytes) {
        const at = offsetBytes + done;
        const count = this.walkStep(buffer, bufferOffset + done, lengthBytes - done, at, mode);
        if (this.wait !== undefined) {
          return this.walkOn(count, buffer, bufferOffset + done, lengthBytes - done, at, mode);
        }
        done += count;
      }
      return undefined;
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, this.walkName));
    }
  }

  /** Goes on after a step that has to wait; `pendingBytes` is what that step will have done. */
  private async walkOn(
    pendingBytes: number,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
    mode: number,
  ): Promise<void> {
    const operation = this.mapping.frees.beginOperation();
    let done = 0;
    let count = pendingBytes;
    try {
      for (;;) {
        const { wait } = this;
        this.wait = undefined;
        if (wait !== undefined) await wait;
        done += count;
        if (done >= lengthBytes) return;
        count = this.walkStep(buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done, mode);
      }
    } finally {
      this.mapping.frees.endOperation(operation);
    }
  }
}
