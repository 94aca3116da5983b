// The index of one disk: which chunk stands where. Sealed as metadata (metadata.ts); its content:
//
//   offset  bytes
//        0      8  magic "cwindex1"
//        8      8  size of the disk in bytes, little-endian
//       16      4  chunk size in bytes
//       20      4  number of chunks: the disk's size over the chunk size, rounded up
//       24         32 bytes for each chunk: its id, or zeroes for a chunk that reads as zeroes
//
// The last chunk of a disk whose size is no multiple of the chunk size has as many bytes as the disk has left.

import { CowcatcherError } from "../../errors.js";
import { damagedError } from "./errors.js";
import { ID_BYTES } from "./secrets.js";

const MAGIC = Buffer.from("cwindex1");
const HEADER_BYTES = 24;
/** 64 TiB with chunks of 4 MiB; ids of 512 MiB. */
export const MAX_CHUNKS_PER_DISK = 2 ** 24;
export const MAX_INDEX_BYTES = HEADER_BYTES + MAX_CHUNKS_PER_DISK * ID_BYTES;

export interface DiskIndex {
  sizeBytes: number;
  chunkBytes: number;
  /** ID_BYTES for each chunk. */
  ids: Uint8Array;
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

export function encodeIndex({ sizeBytes, chunkBytes, ids }: DiskIndex): Buffer {
  const content = Buffer.allocUnsafeSlow(HEADER_BYTES + ids.length);
  MAGIC.copy(content);
  content.writeBigUInt64LE(BigInt(sizeBytes), 8);
  content.writeUInt32LE(chunkBytes, 16);
  content.writeUInt32LE(ids.length / ID_BYTES, 20);
  content.set(ids, HEADER_BYTES);
  return content;
}

/** @throws CowcatcherError FORMAT. */
export function decodeIndex(storeName: string, name: string, content: Buffer): DiskIndex {
  const fail = (problem: string): never => {
    throw damagedError(storeName, name, problem);
  };
  if (content.length < HEADER_BYTES || !content.subarray(0, 8).equals(MAGIC)) fail("it is no index");
  const sizeBytes = Number(content.readBigUInt64LE(8));
  const chunkBytes = content.readUInt32LE(16);
  const count = content.readUInt32LE(20);
  if (!Number.isSafeInteger(sizeBytes) || chunkBytes === 0 || chunkCountOf(sizeBytes, chunkBytes) !== count) {
    fail("its numbers do not fit each other");
  }
  if (content.length !== HEADER_BYTES + count * ID_BYTES) fail("it is shorter or longer than its chunks");
  return { sizeBytes, chunkBytes, ids: content.subarray(HEADER_BYTES) };
}
