// Which blocks of a disk (format/patch.ts) have changed since the group's last backup, as far as something keeps track: told by
// the main thread before the copy begins, read by whoever stores chunks. Blocks stand one after another, whatever the
// chunk, so a chunk's are the BLOCK_SET_BYTES at its number.

import { BLOCK_SET_BYTES, blockBytesOf } from "../format/patch.js";

const KNOWN_BYTES = 8;
const KNOWN = 0;

/** Of the disk's bytes, as DirtyRuns of the engine's room have them. */
type Runs = (offsetBytes: number, lengthBytes: number) => { lengthBytes: number; dirty: boolean };

export class DirtyBlocks {
  readonly #words: Int32Array;
  readonly #blocks: Uint8Array;
  readonly #blockBytes: number;

  /** @param memory of dirtyBlocksMemory */
  constructor(memory: SharedArrayBuffer, chunkBytes: number) {
    this.#words = new Int32Array(memory, 0, 1);
    this.#blocks = new Uint8Array(memory, KNOWN_BYTES);
    this.#blockBytes = blockBytesOf(chunkBytes);
  }

  /** False: nothing keeps track, and each block may have changed. */
  get isKnown(): boolean {
    return Atomics.load(this.#words, KNOWN) === 1;
  }

  /** From now on what was not noted is as it was. */
  setKnown(): void {
    Atomics.store(this.#words, KNOWN, 1);
  }

  /** [offsetBytes, +lengthBytes) has changed; more than once does no harm. */
  note(offsetBytes: number, lengthBytes: number): void {
    const end = offsetBytes + lengthBytes;
    for (let block = Math.floor(offsetBytes / this.#blockBytes); block * this.#blockBytes < end; block++) {
      this.#blocks[block >>> 3] |= 1 << (block & 7);
    }
  }

  noteRuns(runs: Runs, fromBytes: number, endBytes: number): void {
    for (let at = fromBytes; at < endBytes;) {
      const { lengthBytes, dirty } = runs(at, endBytes - at);
      if (dirty) this.note(at, lengthBytes);
      at += lengthBytes;
    }
  }

  ofChunk(chunk: number): Uint8Array {
    return this.#blocks.subarray(chunk * BLOCK_SET_BYTES, (chunk + 1) * BLOCK_SET_BYTES);
  }
}

export function dirtyBlocksMemory(chunkCount: number): SharedArrayBuffer {
  return new SharedArrayBuffer(KNOWN_BYTES + chunkCount * BLOCK_SET_BYTES);
}
