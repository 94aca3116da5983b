// The keys of an encrypted repository, all derived from its master key, and what is done with them.
//
//   master            32 random bytes, made at `repo init`; wrapped in keys/ID (keys.ts), never stored otherwise
//   HKDF-SHA-256(master, salt = repository id, info):
//     "cowcatcher chunk id"     HMAC key of chunk ids
//     "cowcatcher chunk"        from which each chunk has a key of its own: HMAC-SHA-256(it, id)
//     "cowcatcher metadata"     the same for indexes and manifests: HMAC-SHA-256(it, name)
//     "cowcatcher config"       HMAC key of `config`
//
// Why a key for each object. AES-GCM loses everything if a nonce comes twice with a key, and 96 random bits are not enough for
// a key that lives for years (NIST SP 800-38D, 8.3: 2^32 uses). With a key for each id only what is stored again under
// the same id (the same content) shares a key: a handful of times, each with a random nonce.
//
// Without encryption the id is the SHA-256 of the content, and nothing is secret.

import { createCipheriv, createDecipheriv, createHash, createHmac, hkdfSync, randomBytes } from "node:crypto";

export const ID_BYTES = 32;
export const MASTER_BYTES = 32;
export const NONCE_BYTES = 12;
export const TAG_BYTES = 16;
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
  const cipher = createCipheriv(ALGORITHM, key, nonce, { authTagLength: TAG_BYTES });
  cipher.setAAD(bound);
  const text = cipher.update(plain);
  return [text, cipher.final(), cipher.getAuthTag()];
}

/** @param sealed ciphertext and tag. @returns null where key, nonce, bound data or ciphertext do not belong together */
export function decrypt(
  key: Uint8Array,
  nonce: Uint8Array,
  bound: Uint8Array,
  sealed: Uint8Array,
): Buffer | null {
  if (sealed.length < TAG_BYTES) return null;
  const decipher = createDecipheriv(ALGORITHM, key, nonce, { authTagLength: TAG_BYTES });
  decipher.setAAD(bound);
  decipher.setAuthTag(sealed.subarray(sealed.length - TAG_BYTES));
  try {
    const text = decipher.update(sealed.subarray(0, sealed.length - TAG_BYTES));
    const rest = decipher.final();
    return rest.length === 0 ? text : Buffer.concat([text, rest]);
  } catch {
    return null;
  }
}
