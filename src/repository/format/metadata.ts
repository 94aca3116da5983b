// Indexes, manifests and other small objects: compressed, checked or encrypted, and bound to their place.
//
//   offset  bytes
//        0      8  magic "cwmeta_1"
//        8      1  encryption: 0 none, 1 AES-256-GCM
//        9      7  0
//       16     12  nonce; 0 without encryption
//       28      4  0
//       32         encrypted: ciphertext of the body, then the tag (16 bytes)
//                  not encrypted: the body, then SHA-256 of PLACE, header and body
//   body           the content as a zlib stream (RFC 1950)
//   PLACE          repository id (32 hex digits), a zero byte, the object's name, a zero byte
//
// Encrypted, PLACE and header are the additional authenticated data: so no object passes for another, in this
// repository or out of another one, be it of another group, disk or time. Without encryption the sum finds what happens by
// accident; somebody who means harm can make it anew.
//
// zlib, as Node and nearly every language bring it along: what is in a repository can be listed even where there is no zstd.

import { createHash } from "node:crypto";
import { promisify } from "node:util";
import * as zlib from "node:zlib";
import { damagedError } from "./errors.js";
import { decrypt, encrypt, NONCE_BYTES, newNonce, type Secrets } from "./secrets.js";

const MAGIC = Buffer.from("cwmeta_1");
const ENCRYPTION_AT = 8;
const NONCE_AT = 16;
const HEADER_BYTES = 32;
const SUM_BYTES = 32;
/** Chunk ids do not compress, and runs of zeroes do at any level. */
const DEFLATE_LEVEL = 1;

/** What is smaller is dealt with at once: a turn through the thread pool would cost more. */
const AT_ONCE_BYTES = 64 * 1024;

/** What zlib takes memory in: a manifest has a kilobyte or two, and a thousand of them are listed in a second. */
const SMALL_CHUNK_BYTES = 4 * 1024;

const deflatePooled = promisify<Uint8Array, zlib.ZlibOptions, Buffer>(zlib.deflate);
const inflatePooled = promisify<Uint8Array, zlib.ZlibOptions, Buffer>(zlib.inflate);

/** The object that stands under `name` with this content. */
export async function sealMetadata(secrets: Secrets, name: string, content: Uint8Array): Promise<Buffer> {
  const header = Buffer.alloc(HEADER_BYTES);
  MAGIC.copy(header);
  const options = { level: DEFLATE_LEVEL };
  const body =
    content.length < AT_ONCE_BYTES
      ? zlib.deflateSync(content, options)
      : await deflatePooled(content, options);
  const key = secrets.keyOfMetadata(name);
  if (key === null) return Buffer.concat([header, body, sumOf(secrets, name, header, body)]);
  header[ENCRYPTION_AT] = 1;
  const nonce = newNonce();
  nonce.copy(header, NONCE_AT);
  return Buffer.concat([header, ...encrypt(key, nonce, boundTo(secrets, name, header), body)]);
}

/** @throws CowcatcherError FORMAT where a single bit is not as it was written under this name, or over maxBytes. */
export async function openMetadata(
  secrets: Secrets,
  storeName: string,
  name: string,
  object: Buffer,
  maxBytes: number,
): Promise<Buffer> {
  const fail = (problem: string): never => {
    throw damagedError(storeName, name, problem);
  };
  if (object.length < HEADER_BYTES) fail(`it is ${object.length} bytes long`);
  const header = object.subarray(0, HEADER_BYTES);
  const sealed = object.subarray(HEADER_BYTES);
  if (!header.subarray(0, 8).equals(MAGIC)) fail("it does not begin as it should");
  const key = secrets.keyOfMetadata(name);
  if (header[ENCRYPTION_AT] !== (key === null ? 0 : 1)) fail("its encryption is not the repository's");
  let body: Buffer;
  if (key === null) {
    body = sealed.subarray(0, Math.max(0, sealed.length - SUM_BYTES));
    const isWhole = sumOf(secrets, name, header, body).equals(sealed.subarray(body.length));
    if (!isWhole) fail("its sum does not fit: it was changed, or was not written under this name");
  } else {
    const nonce = header.subarray(NONCE_AT, NONCE_AT + NONCE_BYTES);
    const opened = decrypt(key, nonce, boundTo(secrets, name, header), sealed);
    body = opened ?? fail("it was changed, or was not written under this name with this repository's key");
  }
  try {
    return await unpack(body, maxBytes);
  } catch {
    return fail("it cannot be decompressed");
  }
}

function unpack(body: Buffer, maxBytes: number): Buffer | Promise<Buffer> {
  // A small body may be a large index of holes.
  if (body.length >= AT_ONCE_BYTES / 64)
    return inflatePooled(body, { maxOutputLength: Math.max(1, maxBytes) });
  try {
    return zlib.inflateSync(body, { maxOutputLength: AT_ONCE_BYTES, chunkSize: SMALL_CHUNK_BYTES });
  } catch {
    return inflatePooled(body, { maxOutputLength: Math.max(1, maxBytes) });
  }
}

function placeOf({ description }: Secrets, name: string): Buffer {
  return Buffer.from(`${description.repositoryId}\0${name}\0`);
}

function sumOf(secrets: Secrets, name: string, header: Buffer, body: Buffer): Buffer {
  return createHash("sha256").update(placeOf(secrets, name)).update(header).update(body).digest();
}

function boundTo(secrets: Secrets, name: string, header: Buffer): Buffer {
  return Buffer.concat([placeOf(secrets, name), header]);
}

/** Content and a sum of it, for what must be readable without a key: two lines of text. */
export function textWithSum(json: object): string {
  const text = JSON.stringify(json);
  return `${text}\nsha256 ${createHash("sha256").update(text).digest("hex")}\n`;
}

/** @throws CowcatcherError FORMAT; the first line's JSON, and the lines after the second. */
export function parseTextWithSum(
  storeName: string,
  name: string,
  object: Buffer,
): { json: Record<string, unknown>; text: string; rest: string[] } {
  const [text = "", sum = "", ...rest] = object.toString("utf8").split("\n");
  if (sum !== `sha256 ${createHash("sha256").update(text).digest("hex")}`) {
    throw damagedError(storeName, name, "its sum does not fit");
  }
  try {
    const json: unknown = JSON.parse(text);
    if (typeof json === "object" && json !== null)
      return { json: json as Record<string, unknown>, text, rest };
  } catch {
    // Said below.
  }
  throw damagedError(storeName, name, "it is not JSON");
}
