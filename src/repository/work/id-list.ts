// Lists of chunks as objects: what a run claims, and what it has condemned.
//
//   magic "cwidlist", number of entries (32 bits, little-endian), 4 bytes 0,
//   33 bytes an entry: id and generation, then SHA-256 of all before it

import { createHash } from "node:crypto";
import { damagedError } from "../format/errors.js";
import type { Generation } from "../format/names.js";
import { ID_BYTES } from "../format/secrets.js";

const MAGIC = Buffer.from("cwidlist");
const HEADER_BYTES = 16;
const ENTRY_BYTES = ID_BYTES + 1;
const SUM_BYTES = 32;
/** Entries of one list: 2 MiB. */
export const MAX_LIST_ENTRIES = 65_536;
export const MAX_LIST_BYTES = HEADER_BYTES + MAX_LIST_ENTRIES * ENTRY_BYTES + SUM_BYTES;

export interface ListedChunk {
  id: Uint8Array;
  generation: Generation;
}

export function encodeIdList(chunks: readonly ListedChunk[]): Buffer {
  const object = Buffer.alloc(HEADER_BYTES + chunks.length * ENTRY_BYTES + SUM_BYTES);
  MAGIC.copy(object);
  object.writeUInt32LE(chunks.length, 8);
  chunks.forEach(({ id, generation }, index) => {
    const at = HEADER_BYTES + index * ENTRY_BYTES;
    object.set(id, at);
    object[at + ID_BYTES] = generation;
  });
  const end = object.length - SUM_BYTES;
  createHash("sha256").update(object.subarray(0, end)).digest().copy(object, end);
  return object;
}

/** @throws CowcatcherError FORMAT. */
export function decodeIdList(storeName: string, name: string, object: Buffer): ListedChunk[] {
  const end = object.length - SUM_BYTES;
  const isWhole =
    end >= HEADER_BYTES &&
    object.subarray(0, 8).equals(MAGIC) &&
    end === HEADER_BYTES + object.readUInt32LE(8) * ENTRY_BYTES &&
    createHash("sha256").update(object.subarray(0, end)).digest().equals(object.subarray(end));
  if (!isWhole) throw damagedError(storeName, name, "it is no whole list of chunks");
  const chunks: ListedChunk[] = [];
  for (let at = HEADER_BYTES; at < end; at += ENTRY_BYTES) {
    chunks.push({ id: object.subarray(at, at + ID_BYTES), generation: object[at + ID_BYTES] ?? 0 });
  }
  return chunks;
}
