// A chunk of which little has changed: what differs from another chunk, its base, is all that is stored. From version 2 on.
//
//   chunk 17 of last night   c0ffee…   an object of 4 MiB
//   chunk 17 of tonight      a patch   base c0ffee…, blocks 3 and 40: an object of 128 KiB and what makes it one
//
// A base is a whole chunk, never a patch, so that whoever reads needs two objects at most, and a damaged one does not harm
// a chain of others. What changes next is stored with what had changed before, again against the base; when that is more
// than half of the chunk, a whole one is stored, and is the base from then on.
//
// Which chunks are patches, of what base, and in which blocks stands in the index (index.ts), so that prune knows what a
// backup refers to without reading chunks, and a backup that knows which blocks are dirty reads none.
//
// The content of a patch; its object is that of a chunk with another magic (chunk.ts):
//
//   offset  bytes
//        0     32  id of the base
//       32      4  length of the chunk in bytes, little-endian
//       36      4  0
//       40      8  the blocks, a bit each: block n is bit n % 8 of byte n / 8
//       48         content of those blocks, in order
//
// A block is a 64th of the repository's chunk size. The id of a patch covers all of that, and the base's id the base's
// content: so what is put together from both is as certain as a chunk's content.

import { ID_BYTES } from "./secrets.js";

export const BLOCKS_PER_CHUNK = 64;
/** Bytes of the set of blocks. */
export const BLOCK_SET_BYTES = BLOCKS_PER_CHUNK / 8;
/** With more of them a whole chunk is stored: a patch is there to be small. */
export const MAX_PATCH_BLOCKS = BLOCKS_PER_CHUNK / 2;

const LENGTH_AT = ID_BYTES;
const BLOCKS_AT = 40;
const DATA_AT = BLOCKS_AT + BLOCK_SET_BYTES;

export function blockBytesOf(chunkBytes: number): number {
  return chunkBytes / BLOCKS_PER_CHUNK;
}

export function maxPatchBytes(chunkBytes: number): number {
  return DATA_AT + MAX_PATCH_BLOCKS * blockBytesOf(chunkBytes);
}

export function hasBlock(blocks: Uint8Array, block: number): boolean {
  return ((blocks[block >> 3] >> (block & 7)) & 1) === 1;
}

export function addBlock(blocks: Uint8Array, block: number): void {
  blocks[block >> 3] |= 1 << (block & 7);
}

export function countBlocks(blocks: Uint8Array): number {
  let count = 0;
  for (let block = 0; block < BLOCKS_PER_CHUNK; block++) if (hasBlock(blocks, block)) count++;
  return count;
}

/** Blocks in which two contents of one length differ. */
export function differingBlocks(content: Uint8Array, base: Uint8Array, blockBytes: number): Uint8Array {
  const blocks = new Uint8Array(BLOCK_SET_BYTES);
  for (let block = 0; block * blockBytes < content.length; block++) {
    const from = block * blockBytes;
    const end = Math.min(from + blockBytes, content.length);
    if (Buffer.compare(content.subarray(from, end), base.subarray(from, end)) !== 0) addBlock(blocks, block);
  }
  return blocks;
}

/** @param into where the patch goes, of maxPatchBytes. @returns the part of it that it takes */
export function encodePatch(
  into: Buffer,
  base: Uint8Array,
  blocks: Uint8Array,
  content: Uint8Array,
  blockBytes: number,
): Buffer {
  into.fill(0, 0, DATA_AT);
  into.set(base);
  into.writeUInt32LE(content.length, LENGTH_AT);
  into.set(blocks, BLOCKS_AT);
  let end = DATA_AT;
  for (let block = 0; block < BLOCKS_PER_CHUNK; block++) {
    if (!hasBlock(blocks, block)) continue;
    const from = block * blockBytes;
    const part = content.subarray(from, Math.min(from + blockBytes, content.length));
    into.set(part, end);
    end += part.length;
  }
  return into.subarray(0, end);
}

/** Whether this is a patch, of whatever base. */
export function isPatch(patch: Buffer, blockBytes: number): boolean {
  if (patch.length < DATA_AT || patch.readUInt32LE(LENGTH_AT + 4) !== 0) return false;
  const length = patch.readUInt32LE(LENGTH_AT);
  const blocks = patch.subarray(BLOCKS_AT, DATA_AT);
  const count = countBlocks(blocks);
  if (count === 0 || count > MAX_PATCH_BLOCKS) return false;
  let dataBytes = 0;
  for (let block = 0; block < BLOCKS_PER_CHUNK; block++) {
    if (!hasBlock(blocks, block)) continue;
    const bytes = Math.min(blockBytes, length - block * blockBytes);
    if (bytes <= 0) return false;
    dataBytes += bytes;
  }
  return patch.length === DATA_AT + dataBytes;
}

/**
 * Puts a patch's blocks over the content of its base.
 * @param patch has been found to be one
 * @returns false, and `content` as it was, where it is one of another base or another length
 */
export function applyPatch(
  patch: Buffer,
  base: Uint8Array,
  content: Uint8Array,
  blockBytes: number,
): boolean {
  if (!patch.subarray(0, ID_BYTES).equals(base) || patch.readUInt32LE(LENGTH_AT) !== content.length)
    return false;
  const blocks = patch.subarray(BLOCKS_AT, DATA_AT);
  let at = DATA_AT;
  for (let block = 0; block < BLOCKS_PER_CHUNK; block++) {
    if (!hasBlock(blocks, block)) continue;
    const from = block * blockBytes;
    const count = Math.min(blockBytes, content.length - from);
    content.set(patch.subarray(at, at + count), from);
    at += count;
  }
  return true;
}
