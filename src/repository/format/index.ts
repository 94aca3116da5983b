// The index of one disk: which chunk stands where. Sealed as metadata (metadata.ts); its content:
//
//   offset  bytes
//        0      8  magic "cwindex1"
//        8      8  size of the disk in bytes, little-endian
//       16      4  chunk size in bytes
//       20      4  number of chunks: the disk's size over the chunk size, rounded up
//       24         32 bytes for each chunk: its id, or zeroes for a chunk that reads as zeroes
//
// With chunks that are patches (patch.ts; version 2 of the repository): magic "cwindex2", and
//
//       24      4  number of patches
//       28      4  0
//       32         the ids as above, of which those of these chunks are ids of patches; then for each patch, in order
//                  of their chunks: number of the chunk (4), 0 (4), blocks (8), id of the base (32), id of the chunk's
//                  content or zeroes (32). The content's id is there where whoever stored the patch had it at hand.
//
// The last chunk of a disk whose size is no multiple of the chunk size has as many bytes as the disk has left.

import { CowcatcherError } from "../../errors.js";
import { damagedError } from "./errors.js";
import { PATCH_ENTRY_BYTES, PatchTable } from "./patch-table.js";
import { ID_BYTES } from "./secrets.js";

const MAGIC = Buffer.from("cwindex1");
const HEADER_BYTES = 24;
const PATCHED_MAGIC = Buffer.from("cwindex2");
const PATCHED_HEADER_BYTES = 32;
/** 64 TiB with chunks of 4 MiB; ids of 512 MiB. */
export const MAX_CHUNKS_PER_DISK = 2 ** 24;
export const MAX_INDEX_BYTES = PATCHED_HEADER_BYTES + MAX_CHUNKS_PER_DISK * (ID_BYTES + PATCH_ENTRY_BYTES);

/** Which objects a disk is put together from. */
export interface ChunkMap {
  /** ID_BYTES for each chunk. */
  ids: Uint8Array;
  patches: PatchTable;
}

export interface DiskIndex extends ChunkMap {
  sizeBytes: number;
  chunkBytes: number;
}

export function chunkCountOf(sizeBytes: number, chunkBytes: number): number {
  return Math.ceil(sizeBytes / chunkBytes);
}

/** @throws CowcatcherError LIMIT for a disk that an index cannot hold. */
export function checkDiskSize(disk: string, sizeBytes: number, chunkBytes: number): void {
  if (chunkCountOf(sizeBytes, chunkBytes) <= MAX_CHUNKS_PER_DISK) return;
  throw new CowcatcherError({
    code: "LIMIT",
    object: disk,
    problem: `a disk of ${sizeBytes} bytes has more than ${MAX_CHUNKS_PER_DISK} chunks of ${chunkBytes}`,
    hint: "make a repository with larger chunks (repo init --chunk-size 8M)",
  });
}

export function encodeIndex({ sizeBytes, chunkBytes, ids, patches }: DiskIndex): Buffer {
  const isPatched = patches.count > 0;
  const headerBytes = isPatched ? PATCHED_HEADER_BYTES : HEADER_BYTES;
  const content = Buffer.alloc(headerBytes + ids.length + patches.bytes.length);
  (isPatched ? PATCHED_MAGIC : MAGIC).copy(content);
  content.writeBigUInt64LE(BigInt(sizeBytes), 8);
  content.writeUInt32LE(chunkBytes, 16);
  content.writeUInt32LE(ids.length / ID_BYTES, 20);
  if (isPatched) content.writeUInt32LE(patches.count, 24);
  content.set(ids, headerBytes);
  content.set(patches.bytes, headerBytes + ids.length);
  return content;
}

/** @throws CowcatcherError FORMAT. */
export function decodeIndex(storeName: string, name: string, content: Buffer): DiskIndex {
  const fail = (problem: string): never => {
    throw damagedError(storeName, name, problem);
  };
  const isPatched = content.subarray(0, 8).equals(PATCHED_MAGIC);
  const headerBytes = isPatched ? PATCHED_HEADER_BYTES : HEADER_BYTES;
  if (content.length < headerBytes || !(isPatched || content.subarray(0, 8).equals(MAGIC)))
    fail("it is no index");
  const sizeBytes = Number(content.readBigUInt64LE(8));
  const chunkBytes = content.readUInt32LE(16);
  const count = content.readUInt32LE(20);
  if (!Number.isSafeInteger(sizeBytes) || chunkBytes === 0 || chunkCountOf(sizeBytes, chunkBytes) !== count) {
    fail("its numbers do not fit each other");
  }
  const patchCount = isPatched ? content.readUInt32LE(24) : 0;
  const idsEnd = headerBytes + count * ID_BYTES;
  if (content.length !== idsEnd + patchCount * PATCH_ENTRY_BYTES) {
    fail("it is shorter or longer than its chunks");
  }
  const ids = content.subarray(headerBytes, idsEnd);
  const patches = new PatchTable(content.subarray(idsEnd));
  if (isPatched && (content.readUInt32LE(28) !== 0 || patchCount === 0 || !patches.fits(ids))) {
    fail("its patches do not fit its chunks");
  }
  return { sizeBytes, chunkBytes, ids, patches };
}
