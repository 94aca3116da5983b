// The keys of an encrypted repository, all derived from its master key, and what is done with them.
//
//   master            32 random bytes, made at `repo init`; wrapped in keys/ID (keys.ts), never stored otherwise
//   HKDF-SHA-256(master, salt = repository id, info):
//     "cowcatcher chunk id"     HMAC key of chunk ids
//     "cowcatcher patch id"     the same of patches (patch.ts)
//     "cowcatcher chunk"        from which each chunk has a key of its own: HMAC-SHA-256(it, id)
//     "cowcatcher metadata"     the same for indexes and manifests: HMAC-SHA-256(it, name)
//     "cowcatcher config"       HMAC key of `config`
//
// Why a key for each object. AES-GCM loses everything if a nonce comes twice with a key, and 96 random bits are not enough for
// a key that lives for years (NIST SP 800-38D, 8.3: 2^32 uses). With a key for each id only what is stored again under
// the same id (the same content) shares a key: a handful of times, each with a random nonce.
//
// Without encryption the id is the SHA-256 of the content, and nothing is secret.

import {
  type Cipher,
  createCipheriv,
  createDecipheriv,
  createHash,
  createHmac,
  type Decipher,
  hkdfSync,
  randomBytes,
} from "node:crypto";
import { libcrypto, TAG_BYTES } from "../../native/libcrypto.js";

export { TAG_BYTES };
export const ID_BYTES = 32;
export const MASTER_BYTES = 32;
export const NONCE_BYTES = 12;
const ALGORITHM = "aes-256-gcm";

export type Encryption = "none" | "aes-256-gcm";

/** Plain data, to cross to workers. */
export interface SecretsDescription {
  repositoryId: string;
  master: Uint8Array | null;
}

export class Secrets {
  readonly description: SecretsDescription;
  readonly #chunkIdKey: Buffer | null;
  readonly #patchIdKey: Buffer | null;
  readonly #chunkKey: Buffer | null;
  readonly #metadataKey: Buffer | null;
  readonly #configKey: Buffer | null;

  constructor(description: SecretsDescription) {
    this.description = description;
    const { master, repositoryId } = description;
    const derive = (purpose: string): Buffer | null =>
      master === null
        ? null
        : Buffer.from(
            hkdfSync("sha256", master, Buffer.from(repositoryId, "hex"), `cowcatcher ${purpose}`, 32),
          );
    this.#chunkIdKey = derive("chunk id");
    this.#patchIdKey = derive("patch id");
    this.#chunkKey = derive("chunk");
    this.#metadataKey = derive("metadata");
    this.#configKey = derive("config");
  }

  get encryption(): Encryption {
    return this.description.master === null ? "none" : ALGORITHM;
  }

  /** The id of a chunk with this content: 32 bytes. */
  chunkId(content: Uint8Array): Buffer {
    const key = this.#chunkIdKey;
    return (key === null ? createHash("sha256") : createHmac("sha256", key)).update(content).digest();
  }

  /** The id of a patch with this content (patch.ts). No chunk's content has it for its id but by a search for one. */
  patchId(patch: Uint8Array): Buffer {
    const key = this.#patchIdKey;
    return (key === null ? createHash("sha256").update("cowcatcher patch") : createHmac("sha256", key))
      .update(patch)
      .digest();
  }

  /** Of an object that only the repository's owner can make: null without encryption. */
  configCheck(text: string): Buffer | null {
    return this.#configKey === null ? null : createHmac("sha256", this.#configKey).update(text).digest();
  }

  keyOfChunk(id: Uint8Array): Buffer | null {
    return this.#chunkKey === null ? null : createHmac("sha256", this.#chunkKey).update(id).digest();
  }

  keyOfMetadata(name: string): Buffer | null {
    return this.#metadataKey === null ? null : createHmac("sha256", this.#metadataKey).update(name).digest();
  }
}

export function newNonce(): Buffer {
  return randomBytes(NONCE_BYTES);
}

/** Ciphertext and tag. */
export function encrypt(key: Uint8Array, nonce: Uint8Array, bound: Uint8Array, plain: Uint8Array): Buffer[] {
  const text = Buffer.from(plain);
  return [text, encryptInPlace(key, nonce, bound, text)];
}

/** @param sealed ciphertext and tag. @returns null where key, nonce, bound data or ciphertext do not belong together */
export function decrypt(
  key: Uint8Array,
  nonce: Uint8Array,
  bound: Uint8Array,
  sealed: Uint8Array,
): Buffer | null {
  const text = Buffer.from(sealed);
  return decryptInPlace(key, nonce, bound, text) ? text.subarray(0, text.length - TAG_BYTES) : null;
}

/** The ciphertext is as long as `text`, and takes its place. @returns the tag */
export function encryptInPlace(
  key: Uint8Array,
  nonce: Uint8Array,
  bound: Uint8Array,
  text: Uint8Array,
): Buffer {
  const native = libcrypto();
  if (native !== null) {
    const tag = Buffer.alloc(TAG_BYTES);
    native.encrypt(key, nonce, bound, text, tag);
    return tag;
  }
  const cipher = createCipheriv(ALGORITHM, key, nonce, { authTagLength: TAG_BYTES });
  cipher.setAAD(bound);
  inPieces(cipher, text);
  cipher.final();
  return cipher.getAuthTag();
}

/**
 * The content takes the place of its ciphertext.
 * @param sealed ciphertext and tag, lost afterwards
 * @returns false as `decrypt` null
 */
export function decryptInPlace(
  key: Uint8Array,
  nonce: Uint8Array,
  bound: Uint8Array,
  sealed: Uint8Array,
): boolean {
  if (sealed.length < TAG_BYTES || nonce.length !== NONCE_BYTES) return false;
  const text = sealed.subarray(0, sealed.length - TAG_BYTES);
  const tag = sealed.subarray(text.length);
  const native = libcrypto();
  if (native !== null) return native.decrypt(key, nonce, bound, text, tag);
  const decipher = createDecipheriv(ALGORITHM, key, nonce, { authTagLength: TAG_BYTES });
  decipher.setAAD(bound);
  decipher.setAuthTag(tag);
  inPieces(decipher, text);
  try {
    decipher.final();
    return true;
  } catch {
    return false;
  }
}

/** Node's cipher gives each output in new memory: in pieces the collector has it back before there is a lot. */
const PIECE_BYTES = 64 * 1024;

/** Of a mode in which each byte of input is one of output (GCM). */
function inPieces(cipher: Cipher | Decipher, text: Uint8Array): void {
  for (let at = 0; at < text.length; at += PIECE_BYTES) {
    text.set(cipher.update(text.subarray(at, at + PIECE_BYTES)), at);
  }
}
