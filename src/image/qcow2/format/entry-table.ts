// A table of 64-bit entries that lies contiguously in the file and wholly in memory: the L1 table and the refcount
// table. Entries are two 32-bit words, low word first in memory (as Qcow2SourceDescription promises for the L1),
// big-endian in the file. What changed is remembered by blocks of 4 KiB, so that a flush writes little.

import { formatError } from "./header.js";

const BLOCK_ENTRIES = 512;
const WORD = 2 ** 32;
const LOW_OFFSET_MASK = 0xfffffe00;

export interface TablePiece {
  offsetBytes: number;
  bytes: Uint8Array;
}

export class EntryTable {
  private readonly dirtyBlocks = new Set<number>();

  /** `words` holds two words an entry. */
  constructor(
    readonly words: Uint32Array,
    public offsetBytes: number,
  ) {}

  static fromBytes(bytes: Uint8Array, offsetBytes: number): EntryTable {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const words = new Uint32Array(bytes.length / 4);
    for (let position = 0; position + 8 <= bytes.length; position += 8) {
      words[position / 4] = view.getUint32(position + 4);
      words[position / 4 + 1] = view.getUint32(position);
    }
    return new EntryTable(words, offsetBytes);
  }

  get length(): number {
    return this.words.length / 2;
  }

  get lengthBytes(): number {
    return this.words.length * 4;
  }

  get isDirty(): boolean {
    return this.dirtyBlocks.size > 0;
  }

  /** The host offset in an entry; `highMask` drops flag and reserved bits (0x00ffffff for L1 entries). */
  offsetAt(index: number, highMask: number): number {
    const low = this.words[index * 2] ?? 0;
    const high = this.words[index * 2 + 1] ?? 0;
    return (high & highMask) * WORD + ((low & LOW_OFFSET_MASK) >>> 0);
  }

  highWordAt(index: number): number {
    return this.words[index * 2 + 1] ?? 0;
  }

  set(index: number, offsetBytes: number, highFlags: number): void {
    this.words[index * 2] = offsetBytes % WORD;
    this.words[index * 2 + 1] = (Math.floor(offsetBytes / WORD) | highFlags) >>> 0;
    this.dirtyBlocks.add(Math.floor(index / BLOCK_ENTRIES));
  }

  markAllDirty(): void {
    for (let block = 0; block * BLOCK_ENTRIES < this.length; block++) this.dirtyBlocks.add(block);
  }

  /** Copies of the changed blocks in the file's form; the table is clean afterwards. */
  takeDirty(): TablePiece[] {
    const pieces: TablePiece[] = [];
    for (const block of this.dirtyBlocks) {
      const first = block * BLOCK_ENTRIES;
      const count = Math.min(BLOCK_ENTRIES, this.length - first);
      pieces.push({ offsetBytes: this.offsetBytes + first * 8, bytes: this.serialise(first, count) });
    }
    this.dirtyBlocks.clear();
    return pieces;
  }

  /** Undoes `takeDirty` where the pieces could not be written. */
  giveBack(pieces: readonly TablePiece[]): void {
    for (const { offsetBytes } of pieces) {
      this.dirtyBlocks.add((offsetBytes - this.offsetBytes) / (BLOCK_ENTRIES * 8));
    }
  }

  private serialise(first: number, count: number): Uint8Array {
    const bytes = new Uint8Array(count * 8);
    const view = new DataView(bytes.buffer);
    for (let index = 0; index < count; index++) {
      view.setUint32(index * 8, this.words[(first + index) * 2 + 1] ?? 0);
      view.setUint32(index * 8 + 4, this.words[(first + index) * 2] ?? 0);
    }
    return bytes;
  }

  /** @throws CowcatcherError FORMAT where an entry's offset is not aligned to a cluster, or not exact below 2^53. */
  checkOffsets(clusterSizeBytes: number, highMask: number, what: string, name: string): void {
    for (let index = 0; index < this.length; index++) {
      const offset = this.offsetAt(index, highMask);
      if (offset % clusterSizeBytes !== 0 || !Number.isSafeInteger(offset)) {
        throw formatError(name, `${what} entry ${index} points to no cluster boundary`, offset);
      }
    }
  }
}
