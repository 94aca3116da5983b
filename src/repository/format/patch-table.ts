// Which chunks of a disk are patches, as its index has it (index.ts): sorted by chunk, PATCH_ENTRY_BYTES each. Any thread;
// what is read does not change.

import { BLOCK_SET_BYTES, countBlocks, MAX_PATCH_BLOCKS } from "./patch.js";
import { ID_BYTES } from "./secrets.js";

const BLOCKS_AT = 8;
const BASE_AT = BLOCKS_AT + BLOCK_SET_BYTES;
const CONTENT_ID_AT = BASE_AT + ID_BYTES;
export const PATCH_ENTRY_BYTES = CONTENT_ID_AT + ID_BYTES;
/** What an entry has beside the chunk's number: of one chunk, as it crosses between threads. */
export const PATCH_RECORD_BYTES = PATCH_ENTRY_BYTES - BLOCKS_AT;

export interface Patch {
  /** BLOCK_SET_BYTES: where it differs from its base. */
  blocks: Uint8Array;
  base: Uint8Array;
  /** The id that the chunk would have as a whole one; zeroes where whoever stored the patch did not have it. */
  contentId: Uint8Array;
}

export function patchOfRecord(record: Uint8Array): Patch {
  return {
    blocks: record.subarray(0, BLOCK_SET_BYTES),
    base: record.subarray(BLOCK_SET_BYTES, BLOCK_SET_BYTES + ID_BYTES),
    contentId: record.subarray(BLOCK_SET_BYTES + ID_BYTES, PATCH_RECORD_BYTES),
  };
}

export function writeRecord({ blocks, base, contentId }: Patch, record: Uint8Array): void {
  record.set(blocks);
  record.set(base, BLOCK_SET_BYTES);
  record.set(contentId, BLOCK_SET_BYTES + ID_BYTES);
}

export class PatchTable {
  readonly #view: DataView;

  /** @param bytes whole entries */
  constructor(readonly bytes: Uint8Array) {
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  }

  static readonly EMPTY = new PatchTable(new Uint8Array(0));

  /** @param records of chunks in ascending order */
  static from(records: readonly { chunk: number; record: Uint8Array }[]): PatchTable {
    const bytes = new Uint8Array(records.length * PATCH_ENTRY_BYTES);
    const table = new PatchTable(bytes);
    records.forEach(({ chunk, record }, entry) => {
      table.#view.setUint32(entry * PATCH_ENTRY_BYTES, chunk, true);
      bytes.set(record, entry * PATCH_ENTRY_BYTES + BLOCKS_AT);
    });
    return table;
  }

  get count(): number {
    return this.bytes.length / PATCH_ENTRY_BYTES;
  }

  chunkAt(entry: number): number {
    return this.#view.getUint32(entry * PATCH_ENTRY_BYTES, true);
  }

  recordAt(entry: number): Uint8Array {
    const at = entry * PATCH_ENTRY_BYTES;
    return this.bytes.subarray(at + BLOCKS_AT, at + PATCH_ENTRY_BYTES);
  }

  /** The record of a chunk that is a patch; undefined for a whole one. */
  find(chunk: number): Uint8Array | undefined {
    let low = 0;
    let high = this.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.chunkAt(middle) < chunk) low = middle + 1;
      else high = middle;
    }
    if (low === this.count || this.chunkAt(low) !== chunk) return undefined;
    return this.recordAt(low);
  }

  *bases(): Generator<Uint8Array, void, void> {
    for (let entry = 0; entry < this.count; entry++) yield patchOfRecord(this.recordAt(entry)).base;
  }

  /** Whether each entry is one that a writer makes, for a chunk that there is and that is no hole. */
  fits(ids: Uint8Array): boolean {
    let last = -1;
    for (let entry = 0; entry < this.count; entry++) {
      const chunk = this.chunkAt(entry);
      const { blocks, base } = patchOfRecord(this.recordAt(entry));
      const count = countBlocks(blocks);
      const isWhole = chunk > last && (chunk + 1) * ID_BYTES <= ids.length && count <= MAX_PATCH_BLOCKS;
      const id = ids.subarray(chunk * ID_BYTES, (chunk + 1) * ID_BYTES);
      if (!isWhole || count === 0 || isZeroId(base) || isZeroId(id)) return false;
      if (this.#view.getUint32(entry * PATCH_ENTRY_BYTES + 4, true) !== 0) return false;
      last = chunk;
    }
    return true;
  }
}

function isZeroId(id: Uint8Array): boolean {
  return id.every((byte) => byte === 0);
}
