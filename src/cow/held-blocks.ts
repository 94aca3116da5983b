// Which blocks of the chunks that the guest wrote to lately are captured already: the main thread's own note of it.
//
// The truth is in the chunks' lists of captures and in the spill's bitmaps. But a chunk under random 4 KiB writes has
// up to 256 captures, and walking them for each write, each a cache miss or two, cost as much as the write itself. So
// the outcome is kept as a bit a block, for as many chunks as fit into a table of fixed size, found by the chunk's
// number modulo the table's length. What is not in the table, or was pushed out of it, is looked up in the list
// again. Notes never go stale: a captured block stays captured until its cluster is DONE, and that is asked first.

/** 64 GiB of disk, in 2 MiB of memory. */
const ENTRIES_MAX = 65_536;
const NONE = -1;

export class HeldBlocks {
  readonly #chunks: Int32Array;
  readonly #bits: Uint32Array;
  readonly #mask: number;
  readonly #wordsPerChunk: number;

  constructor(chunkCount: number, blocksPerChunk: number, entriesMax = ENTRIES_MAX) {
    let entries = 1;
    while (entries < chunkCount && entries < entriesMax) entries *= 2;
    this.#mask = entries - 1;
    this.#wordsPerChunk = Math.ceil(blocksPerChunk / 32);
    this.#chunks = new Int32Array(entries).fill(NONE);
    this.#bits = new Uint32Array(entries * this.#wordsPerChunk);
  }

  knows(chunk: number): boolean {
    return this.#chunks[chunk & this.#mask] === chunk;
  }

  /** Makes room for the chunk, with no block noted; what stood there is forgotten. */
  begin(chunk: number): void {
    const entry = chunk & this.#mask;
    this.#chunks[entry] = chunk;
    this.#bits.fill(0, entry * this.#wordsPerChunk, (entry + 1) * this.#wordsPerChunk);
  }

  /** Of a chunk that `knows` knows. */
  has(chunk: number, block: number): boolean {
    const word = (chunk & this.#mask) * this.#wordsPerChunk + (block >> 5);
    return ((this.#bits[word] >>> (block & 31)) & 1) === 1;
  }

  /** Whether the chunk is known and blocks [from, to) of it, at least one, are all noted. */
  hasAll(chunk: number, from: number, to: number): boolean {
    if (!this.knows(chunk)) return false;
    const base = (chunk & this.#mask) * this.#wordsPerChunk;
    const lastWord = (to - 1) >> 5;
    for (let word = from >> 5; word <= lastWord; word++) {
      let wanted = -1;
      if (word === from >> 5) wanted <<= from & 31;
      if (word === lastWord) wanted &= -1 >>> (31 - ((to - 1) & 31));
      if ((this.#bits[base + word] & wanted) !== wanted) return false;
    }
    return true;
  }

  /** Notes blocks [from, to) of the chunk as captured; nothing happens if it was pushed out meanwhile. */
  add(chunk: number, from: number, to: number): void {
    if (!this.knows(chunk)) return;
    const base = (chunk & this.#mask) * this.#wordsPerChunk;
    for (let block = from; block < to; block++) this.#bits[base + (block >> 5)] |= 1 << (block & 31);
  }
}
