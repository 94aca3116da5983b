// Runs of like status on a device: what BLOCK_STATUS answers, and what a structured read leaves out.

import { CowcatcherError } from "../errors.js";
import type { BlockDevice, BlockStatus } from "../image/device.js";
import { NBD_STATE_HOLE, NBD_STATE_ZERO } from "./protocol.js";

/** Consecutive extents from one offset on; `lengthsBytes[i]` has the base:allocation `flags[i]`. */
export class ExtentList {
  readonly lengthsBytes: number[] = [];
  readonly flags: number[] = [];
  coveredBytes = 0;

  constructor(
    private readonly device: BlockDevice,
    private readonly offsetBytes: number,
    private readonly lengthBytes: number,
    private readonly maxExtents: number,
  ) {}

  /**
   * Asks the device as long as it answers at once. Returns a promise's status that it came upon (the caller adds
   * it and goes on), or undefined when the range is covered or the list is full.
   */
  gather(): Promise<BlockStatus> | undefined {
    while (this.coveredBytes < this.lengthBytes && this.lengthsBytes.length < this.maxExtents) {
      const status = this.device.blockStatus(
        this.offsetBytes + this.coveredBytes,
        this.lengthBytes - this.coveredBytes,
      );
      if (status instanceof Promise) return status;
      this.add(status);
    }
    return undefined;
  }

  async gatherRest(first: Promise<BlockStatus>): Promise<void> {
    for (let next: Promise<BlockStatus> | undefined = first; next !== undefined; next = this.gather()) {
      this.add(await next);
    }
  }

  add(status: BlockStatus): void {
    const lengthBytes = Math.min(status.lengthBytes, this.lengthBytes - this.coveredBytes);
    if (!(lengthBytes > 0)) {
      throw new CowcatcherError({
        code: "INTERNAL",
        object: this.device.name,
        problem: "block status made no progress",
        offsetBytes: this.offsetBytes + this.coveredBytes,
      });
    }
    const flags = (status.data ? 0 : NBD_STATE_HOLE) | (status.zero ? NBD_STATE_ZERO : 0);
    this.coveredBytes += lengthBytes;
    const last = this.flags.length - 1;
    if (last >= 0 && this.flags[last] === flags) {
      this.lengthsBytes[last] = (this.lengthsBytes[last] ?? 0) + lengthBytes;
    } else {
      this.lengthsBytes.push(lengthBytes);
      this.flags.push(flags);
    }
  }
}
