// Pacing for `--on-buffer-full wait`: from 75 % of the buffer on, captures are admitted at the rate at which blocks
// come free, times a factor that falls from 4 (at 75 %) to 1 (full). So the guest slows smoothly to the target's
// rate instead of running at full speed into a wall.
//
// A target that stands still has no rate, and the average of none goes to zero, so the wait between two captures has
// a bound: a stall must not use up the guest's timeout while there is room left.

import { CTL_USED_BLOCKS, type SharedState } from "./shared.js";

const PACED_FROM = 0.75;
const FACTOR_AT_START = 4;
/** Time over which the rate of freed blocks is averaged. */
const AVERAGE_MS = 1000;
/** Between two captures while there is room: long enough to spare the buffer, short beside any guest's timeout. */
const LONGEST_DELAY_MS = 100;

export class Pacer {
  readonly #shared: SharedState;
  #admittedBlocks = 0;
  #lastFreedBlocks = 0;
  #lastMs = 0;
  #blocksPerMs = 0;
  /** The next capture is admitted from this time on. */
  #nextMs = 0;

  constructor(shared: SharedState) {
    this.#shared = shared;
  }

  /** Milliseconds until the next capture may be made; 0 or less: now. */
  delayMs(nowMs: number): number {
    const used = Atomics.load(this.#shared.control, CTL_USED_BLOCKS);
    this.#measure(nowMs, used);
    if (used < this.#shared.bufferBlockCount * PACED_FROM) {
      this.#nextMs = nowMs;
      return 0;
    }
    return this.#nextMs - nowMs;
  }

  /** A capture of `blockCount` blocks was made: the next one is due when as many have come free. */
  admitted(blockCount: number): void {
    this.#admittedBlocks += blockCount;
    const capacity = this.#shared.bufferBlockCount;
    const used = Atomics.load(this.#shared.control, CTL_USED_BLOCKS);
    if (used < capacity * PACED_FROM || this.#blocksPerMs <= 0) return;
    const filled = (used / capacity - PACED_FROM) / (1 - PACED_FROM);
    const factor = FACTOR_AT_START + (1 - FACTOR_AT_START) * Math.min(1, filled);
    const delayMs = Math.min(blockCount / (this.#blocksPerMs * factor), LONGEST_DELAY_MS);
    this.#nextMs = Math.max(this.#nextMs, this.#lastMs) + delayMs;
  }

  #measure(nowMs: number, usedBlocks: number): void {
    const elapsed = nowMs - this.#lastMs;
    if (elapsed < 10) return;
    const freed = this.#admittedBlocks - usedBlocks;
    const rate = Math.max(0, freed - this.#lastFreedBlocks) / elapsed;
    const weight = Math.min(1, elapsed / AVERAGE_MS);
    this.#blocksPerMs += (rate - this.#blocksPerMs) * weight;
    this.#lastFreedBlocks = freed;
    this.#lastMs = nowMs;
  }
}
