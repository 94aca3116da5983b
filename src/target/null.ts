// The target `null:`, which throws everything away: for measuring what a source can give.

import type { Completion } from "../block/device.js";
import type { NullTargetDescription, Target } from "./target.js";
import type { TargetWriter } from "../cow/target-writer.js";

export const NULL_TARGET_PATH = "null:";

export class NullTarget implements Target {
  readonly name = NULL_TARGET_PATH;
  readonly granularityBytes = 1;
  readonly description: NullTargetDescription = { format: "null", name: NULL_TARGET_PATH };
  readonly unfinishedPath = null;

  complete(): Promise<void> {
    return Promise.resolve();
  }

  commit(): Promise<void> {
    return Promise.resolve();
  }

  finish(): Promise<void> {
    return Promise.resolve();
  }

  abort(): Promise<void> {
    return Promise.resolve();
  }

  abortSync(): void {
    // There is nothing to remove.
  }
}

/** Counts what one worker wrote. */
export class NullWriter implements TargetWriter {
  writtenBytes = 0;
  zeroedBytes = 0;

  write(_buffer: Uint8Array, _bufferOffset: number, lengthBytes: number): Completion {
    this.writtenBytes += lengthBytes;
    return undefined;
  }

  writeZeroes(_offsetBytes: number, lengthBytes: number): Completion {
    this.zeroedBytes += lengthBytes;
    return undefined;
  }

  close(): void {
    // Nothing is open.
  }
}
