// One disk's chunks on their way into the store: whole, or as patches of the last backup's (format/patch.ts). A worker's.
//
//   what has changed is known (tracking, a bitmap)
//     blocks that changed, and those in which the last backup's chunk differs from its base ─► a patch
//   it is not
//     hash ─► known? ─► the base is read and compared ─► a patch
//   where more than half of the chunk would go into the patch, or there is no base that is known to be there ─► a whole chunk
//
// In the first case nothing of the base is read, and only the patch is hashed. In the second a chunk is read from the
// repository for each one that has changed, which is cheaper than to compress, encrypt and store as much; but not from an object
// store, whose answers cost as much time as what is put there, and money.

import { toCowcatcherError } from "../../errors.js";
import { PATCH_RECORD_BYTES, PatchTable, patchOfRecord, writeRecord } from "../format/patch-table.js";
import {
  blockBytesOf,
  BLOCK_SET_BYTES,
  countBlocks,
  differingBlocks,
  hasBlock,
  MAX_PATCH_BLOCKS,
} from "../format/patch.js";
import { isHole } from "../format/names.js";
import { ID_BYTES } from "../format/secrets.js";
import type { ChunkWriter } from "./chunk-writer.js";
import { DirtyBlocks } from "./dirty-blocks.js";

/** Where a chunk of a disk stands: not seen yet; its id is in place (zeroes for a hole); the same, and it is a patch. */
export const CHUNK_PENDING = 0;
export const CHUNK_DONE = 1;
export const CHUNK_PATCHED = 2;

/** Plain data, to cross to workers. */
export interface PatchingDescription {
  /** The last backup's disk, of the same size: ids and patches as in its index. */
  parentIds: SharedArrayBuffer;
  parentPatches: SharedArrayBuffer;
  /** PATCH_RECORD_BYTES for each chunk: of those that are CHUNK_PATCHED. */
  records: SharedArrayBuffer;
  /** DirtyBlocks */
  dirty: SharedArrayBuffer;
  /** Whether bases are read. */
  comparesBases: boolean;
}

export interface DiskChunksDescription {
  chunkBytes: number;
  ids: SharedArrayBuffer;
  states: SharedArrayBuffer;
  /** Null: all chunks are stored whole. */
  patching: PatchingDescription | null;
}

interface ParentChunk {
  id: Uint8Array;
  /** As patches have it; undefined: the chunk is whole. */
  record: Uint8Array | undefined;
  base: Uint8Array;
}

const NO_ID = new Uint8Array(ID_BYTES);

export class DiskChunks {
  readonly #chunks: ChunkWriter;
  readonly #blockBytes: number;
  readonly #ids: Uint8Array;
  readonly #states: Uint8Array;
  readonly #patching: Patching | null;

  constructor(chunks: ChunkWriter, { chunkBytes, ids, states, patching }: DiskChunksDescription) {
    this.#chunks = chunks;
    this.#blockBytes = blockBytesOf(chunkBytes);
    this.#ids = new Uint8Array(ids);
    this.#states = new Uint8Array(states);
    this.#patching = patching === null ? null : new Patching(patching, chunkBytes);
  }

  /**
   * Which parts of a chunk `store` will look at, as far as that is known: the others need not be read.
   * @returns a flag for each block of `blockBytes`; undefined: all of it
   */
  neededBlocks(chunk: number): { blocks: Uint8Array; blockBytes: number } | undefined {
    const blocks = this.#changedBlocks(chunk, this.#patching?.parentOf(chunk, this.#chunks));
    return blocks && { blocks, blockBytes: this.#blockBytes };
  }

  /**
   * @param content of the whole chunk, or as much as is needed of it; must not change before the promise is fulfilled
   * @throws CowcatcherError as ChunkWriter
   */
  async store(chunk: number, content: Uint8Array): Promise<void> {
    const parent = this.#patching?.parentOf(chunk, this.#chunks);
    const changed = this.#changedBlocks(chunk, parent);
    if (parent !== undefined && changed !== undefined) {
      this.#chunks.countRead(bytesOf(changed, content.length, this.#blockBytes));
      return this.#patch(chunk, parent, changed, content, NO_ID);
    }
    this.#chunks.countRead(content.length);
    const id = this.#chunks.idOf(content);
    if (parent?.record !== undefined && isSame(patchOfRecord(parent.record).contentId, id)) {
      if (this.#chunks.isKnown(parent.id)) return this.#setPatched(chunk, parent.id, parent.record);
    }
    if (!this.#chunks.isKnown(id)) {
      if (await this.#patchByComparison(chunk, parent, content, id)) return;
      const place = await this.#chunks.placeFor(id);
      if (place !== undefined) await this.#chunks.put(place, id, content);
    }
    this.#ids.set(id, chunk * ID_BYTES);
    this.#states[chunk] = CHUNK_DONE;
  }

  /** Chunks from `first` to `end` read as zeroes. */
  setHoles(first: number, end: number): void {
    this.#ids.fill(0, first * ID_BYTES, end * ID_BYTES);
    this.#states.fill(CHUNK_DONE, first, end);
  }

  /** Where a backup has lost a chunk, whether this is it can only be told by all of the content. */
  #changedBlocks(chunk: number, parent: ParentChunk | undefined): Uint8Array | undefined {
    return this.#chunks.isAnyWanted ? undefined : this.#patching?.changedBlocks(chunk, parent);
  }

  async #patchByComparison(
    chunk: number,
    parent: ParentChunk | undefined,
    content: Uint8Array,
    contentId: Uint8Array,
  ): Promise<boolean> {
    if (parent === undefined || this.#patching?.comparesBases !== true) return false;
    if (this.#chunks.isWanted(contentId)) return false;
    const blocks = await this.#differences(parent.base, content);
    if (blocks === undefined || !isWorthPatching(blocks)) return false;
    await this.#patch(chunk, parent, blocks, content, contentId);
    return true;
  }

  /** Undefined where the base cannot be read: then the chunk is stored whole. */
  async #differences(base: Uint8Array, content: Uint8Array): Promise<Uint8Array | undefined> {
    try {
      return await this.#chunks.peek(base, (of) =>
        of.length === content.length ? differingBlocks(content, of, this.#blockBytes) : undefined,
      );
    } catch (error) {
      const { code } = toCowcatcherError(error);
      if (code === "FORMAT" || code === "NOT_FOUND") return undefined;
      throw error;
    }
  }

  async #patch(
    chunk: number,
    { base }: ParentChunk,
    blocks: Uint8Array,
    content: Uint8Array,
    contentId: Uint8Array,
  ): Promise<void> {
    const id = await this.#chunks.writePatch(base, blocks, content);
    const record = new Uint8Array(PATCH_RECORD_BYTES);
    writeRecord({ blocks, base, contentId }, record);
    this.#setPatched(chunk, id, record);
  }

  #setPatched(chunk: number, id: Uint8Array, record: Uint8Array): void {
    this.#patching?.setRecord(chunk, record);
    this.#ids.set(id, chunk * ID_BYTES);
    this.#states[chunk] = CHUNK_PATCHED;
  }
}

class Patching {
  readonly comparesBases: boolean;
  readonly #parentIds: Uint8Array;
  readonly #parentPatches: PatchTable;
  readonly #records: Uint8Array;
  readonly #dirty: DirtyBlocks;

  constructor(description: PatchingDescription, chunkBytes: number) {
    this.comparesBases = description.comparesBases;
    this.#parentIds = new Uint8Array(description.parentIds);
    this.#parentPatches = new PatchTable(new Uint8Array(description.parentPatches));
    this.#records = new Uint8Array(description.records);
    this.#dirty = new DirtyBlocks(description.dirty, chunkBytes);
  }

  /** The last backup's chunk, if one can build on its base: that is there, and this run has its claim on it. */
  parentOf(chunk: number, chunks: ChunkWriter): ParentChunk | undefined {
    if (isHole(this.#parentIds, chunk)) return undefined;
    const id = this.#parentIds.subarray(chunk * ID_BYTES, (chunk + 1) * ID_BYTES);
    const record = this.#parentPatches.find(chunk);
    const base = record === undefined ? id : patchOfRecord(record).base;
    return chunks.isKnown(base) ? { id, record, base } : undefined;
  }

  /**
   * Where the chunk may differ from its base; undefined where that is not known, or a patch is not worth it. The answer
   * for a chunk stays what it was once it is not undefined.
   */
  changedBlocks(chunk: number, parent: ParentChunk | undefined): Uint8Array | undefined {
    if (parent === undefined || !this.#dirty.isKnown) return undefined;
    const blocks = Uint8Array.from(this.#dirty.ofChunk(chunk));
    const before = parent.record === undefined ? undefined : patchOfRecord(parent.record).blocks;
    if (before !== undefined) for (let i = 0; i < BLOCK_SET_BYTES; i++) blocks[i] |= before[i];
    return isWorthPatching(blocks) ? blocks : undefined;
  }

  setRecord(chunk: number, record: Uint8Array): void {
    this.#records.set(record, chunk * PATCH_RECORD_BYTES);
  }
}

/** None: there is nothing to store, and who finds that out reads the chunk. */
function isWorthPatching(blocks: Uint8Array): boolean {
  const count = countBlocks(blocks);
  return count > 0 && count <= MAX_PATCH_BLOCKS;
}

function bytesOf(blocks: Uint8Array, lengthBytes: number, blockBytes: number): number {
  let bytes = 0;
  for (let block = 0; block * blockBytes < lengthBytes; block++) {
    if (hasBlock(blocks, block)) bytes += Math.min(blockBytes, lengthBytes - block * blockBytes);
  }
  return bytes;
}

function isSame(a: Uint8Array, b: Uint8Array): boolean {
  return Buffer.compare(a, b) === 0;
}
