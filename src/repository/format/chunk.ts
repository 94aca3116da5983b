// A chunk as an object: a header, and the content, compressed and encrypted as the repository has it.
//
//   offset  bytes
//        0      8  magic "cwchunk1"; of a patch (patch.ts) "cwpatch1"
//        8      1  encryption: 0 none, 1 AES-256-GCM
//        9      7  0
//       16     12  nonce; 0 without encryption
//       28      4  0
//       32         body; encrypted: ciphertext of the body, then the tag (16 bytes)
//
//   body:  0    1  compression: 0 none, 1 one zstd frame
//          1    3  0
//          4    4  length of the content, little-endian, 1 to the repository's chunk size
//          8    4  length of the data that follows
//         12    4  0
//         16       data; encrypted: then zeroes up to a multiple of 64 KiB
//
// The additional authenticated data is the header and the chunk's id, so that no chunk passes for another. Every bit of an
// object is accounted for: it is checked to be what it must be, or the id (a hash of the content) or the tag covers it.
//
// The zeroes: how well each chunk compresses, to the byte, would be a fingerprint by which somebody who sees two stores
// could tell that they hold the same disk. In steps of 64 KiB most chunks look alike.
//
// A patch is stored in the same way, as if it were the chunk; its id is another hash, so that none passes for a chunk.
//
// A codec belongs to one thread, and one call at a time: it keeps its compressor and its buffer. Memory: the chunk size.

import { Compressor } from "../../image/qcow2/format/compress.js";
import { Decompressor } from "../../image/qcow2/format/decompress.js";
import { messageOf } from "../../errors.js";
import { KiB, roundUp } from "../../units.js";
import { damagedError } from "./errors.js";
import { blockBytesOf, isPatch, maxPatchBytes } from "./patch.js";
import { decryptInPlace, encryptInPlace, NONCE_BYTES, newNonce, type Secrets, TAG_BYTES } from "./secrets.js";

/** What an object holds. */
export type ChunkKind = "chunk" | "patch";
const MAGIC = { chunk: Buffer.from("cwchunk1"), patch: Buffer.from("cwpatch1") } as const;
const MAGIC_BYTES = 8;
const ENCRYPTION_AT = 8;
const NONCE_AT = 16;
export const CHUNK_HEADER_BYTES = 32;
const BODY_HEADER_BYTES = 16;
const PADDING_BYTES = 64 * KiB;

const PLAIN = 0;
const ZSTD = 1;

/** Of a repository's chunks; null: stored as they are. Only the writer needs it. */
export type ChunkCompression = { type: "zstd"; level: number } | null;

/** Longest object that a chunk of this size may be: what does not get smaller is stored plain. */
export function maxChunkObjectBytes(chunkBytes: number): number {
  return CHUNK_HEADER_BYTES + roundUp(BODY_HEADER_BYTES + chunkBytes, PADDING_BYTES) + TAG_BYTES;
}

export class ChunkEncoder {
  readonly #secrets: Secrets;
  readonly #compressor: Compressor | null;
  /** Header and body, encrypted in place. */
  readonly #object: Buffer;

  /** @throws CowcatcherError UNSUPPORTED where there is no zstd. */
  constructor(secrets: Secrets, chunkBytes: number, compression: ChunkCompression, storeName: string) {
    this.#secrets = secrets;
    this.#compressor = compression === null ? null : new Compressor(compression, storeName);
    this.#object = Buffer.alloc(maxChunkObjectBytes(chunkBytes));
  }

  /**
   * The object for this content, which is 1 to chunkBytes long.
   * @returns memory of the encoder, valid until its next call.
   */
  encode(id: Uint8Array, content: Uint8Array, kind: ChunkKind = "chunk"): Uint8Array {
    const object = this.#object;
    const key = this.#secrets.keyOfChunk(id);
    const bodyEnd = this.#fillBody(content, key !== null);
    object.fill(0, 0, CHUNK_HEADER_BYTES);
    MAGIC[kind].copy(object);
    if (key === null) return object.subarray(0, bodyEnd);
    object[ENCRYPTION_AT] = 1;
    const nonce = newNonce();
    nonce.copy(object, NONCE_AT);
    const bound = Buffer.concat([object.subarray(0, CHUNK_HEADER_BYTES), id]);
    const tag = encryptInPlace(key, nonce, bound, object.subarray(CHUNK_HEADER_BYTES, bodyEnd));
    tag.copy(object, bodyEnd);
    return object.subarray(0, bodyEnd + TAG_BYTES);
  }

  /** Body header, data and padding. @returns their end in the object */
  #fillBody(content: Uint8Array, isPadded: boolean): number {
    const object = this.#object;
    const bodyAt = CHUNK_HEADER_BYTES;
    const dataAt = bodyAt + BODY_HEADER_BYTES;
    const packedBytes =
      this.#compressor === null || content.length < 2
        ? 0
        : this.#compressor.run(content, 0, content.length, object, dataAt, content.length - 1);
    if (packedBytes === 0) object.set(content, dataAt);
    const storedBytes = packedBytes === 0 ? content.length : packedBytes;
    object.fill(0, bodyAt, dataAt);
    object[bodyAt] = packedBytes === 0 ? PLAIN : ZSTD;
    object.writeUInt32LE(content.length, bodyAt + 4);
    object.writeUInt32LE(storedBytes, bodyAt + 8);
    const dataEnd = dataAt + storedBytes;
    if (!isPadded) return dataEnd;
    const end = bodyAt + roundUp(dataEnd - bodyAt, PADDING_BYTES);
    object.fill(0, dataEnd, end);
    return end;
  }

  close(): void {
    this.#compressor?.close();
  }
}

export class ChunkDecoder {
  readonly #secrets: Secrets;
  readonly #chunkBytes: number;
  readonly #storeName: string;
  #decompressor: Decompressor | undefined;
  #content: Buffer | undefined;

  constructor(secrets: Secrets, chunkBytes: number, storeName: string) {
    this.#secrets = secrets;
    this.#chunkBytes = chunkBytes;
    this.#storeName = storeName;
  }

  #ownMemory(): Buffer {
    const bytes = Math.max(this.#chunkBytes, maxPatchBytes(this.#chunkBytes));
    return (this.#content ??= Buffer.allocUnsafeSlow(bytes));
  }

  /**
   * The content of the object that stands under this id, checked against it.
   * @param kind what it has to be
   * @param object is overwritten
   * @param into where the content goes; undefined: memory of the decoder, valid until its next call
   * @throws CowcatcherError FORMAT where a single bit is not as it was written, or the content does not fit `into`.
   */
  decode(
    objectName: string,
    id: Uint8Array,
    object: Buffer,
    into?: Uint8Array,
    kind: ChunkKind = "chunk",
  ): Buffer {
    const fail = (problem: string): never => {
      throw damagedError(this.#storeName, objectName, problem);
    };
    const body = this.#openBody(id, object, kind, fail);
    const contentBytes = body.readUInt32LE(4);
    const storedBytes = body.readUInt32LE(8);
    const data = body.subarray(BODY_HEADER_BYTES, BODY_HEADER_BYTES + storedBytes);
    const maxBytes = kind === "chunk" ? this.#chunkBytes : maxPatchBytes(this.#chunkBytes);
    if (contentBytes === 0 || contentBytes > maxBytes) fail(`it claims ${contentBytes} bytes of content`);
    if (into !== undefined && into.length !== contentBytes) {
      fail(`it has ${contentBytes} bytes of content where the disk has ${into.length}`);
    }
    const content =
      into === undefined
        ? this.#ownMemory().subarray(0, contentBytes)
        : Buffer.from(into.buffer, into.byteOffset, into.length);
    this.#unpack(body[0], data, content, fail);
    const found = kind === "chunk" ? this.#secrets.chunkId(content) : this.#secrets.patchId(content);
    if (!found.equals(id)) fail("its content has another id");
    if (kind === "patch" && !isPatch(content, blockBytesOf(this.#chunkBytes))) fail("it is no patch");
    return content;
  }

  /**
   * As decode, without the look whether the content has this id: where it has not, whoever reads it finds out.
   * @returns a part of `object`, or memory of the decoder
   */
  peek(objectName: string, id: Uint8Array, object: Buffer): Buffer {
    const fail = (problem: string): never => {
      throw damagedError(this.#storeName, objectName, problem);
    };
    const body = this.#openBody(id, object, "chunk", fail);
    const contentBytes = body.readUInt32LE(4);
    const data = body.subarray(BODY_HEADER_BYTES, BODY_HEADER_BYTES + body.readUInt32LE(8));
    if (contentBytes === 0 || contentBytes > this.#chunkBytes)
      fail(`it claims ${contentBytes} bytes of content`);
    if (body[0] === PLAIN && data.length === contentBytes) return data;
    const content = this.#ownMemory().subarray(0, contentBytes);
    this.#unpack(body[0], data, content, fail);
    return content;
  }

  /** Checks an object of either kind. @throws as decode */
  check(objectName: string, id: Uint8Array, object: Buffer): void {
    const isPatchObject = object.subarray(0, MAGIC_BYTES).equals(MAGIC.patch);
    this.decode(objectName, id, object, undefined, isPatchObject ? "patch" : "chunk");
  }

  #openBody(id: Uint8Array, object: Buffer, kind: ChunkKind, fail: (problem: string) => never): Buffer {
    const header = object.subarray(0, CHUNK_HEADER_BYTES);
    if (object.length < CHUNK_HEADER_BYTES + BODY_HEADER_BYTES)
      return fail(`it is ${object.length} bytes long`);
    if (!header.subarray(0, MAGIC_BYTES).equals(MAGIC[kind])) return fail(`it does not begin like a ${kind}`);
    const key = this.#secrets.keyOfChunk(id);
    if (header[ENCRYPTION_AT] !== (key === null ? 0 : 1))
      return fail("its encryption is not the repository's");
    if (!isZero(header, 9, 16) || !isZero(header, 28, 32)) return fail("reserved bytes are set");
    const sealed = object.subarray(CHUNK_HEADER_BYTES);
    let body = sealed;
    if (key === null) {
      if (!isZero(header, NONCE_AT, 28)) return fail("reserved bytes are set");
    } else {
      const nonce = header.subarray(NONCE_AT, NONCE_AT + NONCE_BYTES);
      if (!decryptInPlace(key, nonce, Buffer.concat([header, id]), sealed))
        return fail("it was not written under this id with this repository's key");
      body = sealed.subarray(0, sealed.length - TAG_BYTES);
    }
    const end = BODY_HEADER_BYTES + body.readUInt32LE(8);
    const wholeEnd = key === null ? end : roundUp(end, PADDING_BYTES);
    if (wholeEnd !== body.length)
      return fail(`its body is ${body.length} bytes long and should have ${wholeEnd}`);
    if (!isZero(body, 1, 4) || !isZero(body, 12, 16)) return fail("reserved bytes are set");
    return body;
  }

  #unpack(
    compression: number | undefined,
    data: Buffer,
    content: Uint8Array,
    fail: (problem: string) => never,
  ): void {
    if (compression === PLAIN) {
      if (data.length !== content.length) fail("it is shorter or longer than its content");
      content.set(data);
      return;
    }
    if (compression !== ZSTD) fail(`its compression ${compression} is not known`);
    this.#decompressor ??= new Decompressor("zstd", this.#storeName);
    try {
      this.#decompressor.run(data, content, 0);
    } catch (error) {
      fail(
        `it cannot be decompressed (${messageOf(error instanceof Error ? (error.cause ?? error) : error)})`,
      );
    }
  }

  close(): void {
    this.#decompressor?.close();
  }
}

function isZero(bytes: Uint8Array, from: number, to: number): boolean {
  return bytes.subarray(from, to).every((byte) => byte === 0);
}
