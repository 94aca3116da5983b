// Where the workers of copy-before-write put what they copy. The engine knows no more of a target than this.

import type { Completion } from "../block/device.js";

/**
 * One worker's door to the target. Ranges are aligned to the target's granularity but for the end of the disk,
 * and each byte of the disk is written at most once, by one worker.
 */
export interface TargetWriter {
  /**
   * Of a chunk of the disk that is to be written whole: sets the flags of units that write() will not look at, so that they
   * need not be read.
   * @param unneeded one flag for each unit of the chunk at offsetBytes
   * @returns how many bytes write() will look at, which is then called for the chunk even if what was read of it is zeroes;
   *   undefined where it is all of it, and no flag was set
   */
  noteUnneeded?(offsetBytes: number, unneeded: Uint8Array, unitBytes: number): number | undefined;
  /** Writes buffer[bufferOffset, +lengthBytes). @throws CowcatcherError IO or NO_SPACE with the guest offset. */
  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  /** The range reads as zeroes afterwards. Costs nothing where it does already. */
  writeZeroes(offsetBytes: number, lengthBytes: number): Completion;
  /**
   * Makes up for what the last write put off. Called before the next write, so that its failures are told apart from
   * that one's, and after the last.
   * @throws as write; it may be tried again, and so does every later write until it is given up
   */
  settle?(): Completion;
  /** What settle() failed to do is lost: the caller passes over its error. */
  giveUp?(): void;
  /** After this worker's last write: what must be done through its own door for the data to be stored for good. */
  finish?(): Promise<void>;
  close(): void;
}
