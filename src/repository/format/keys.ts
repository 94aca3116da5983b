// keys/ID: the master key, wrapped by a passphrase or by a key file. A repository may have several; each opens it, and a
// new passphrase is a new one of them: no data is written again.
//
//   {"version":1,"id":"…","repository":"…","kind":"passphrase","created":"…","comment":"…",
//    "scrypt":{"n":131072,"r":8,"p":1,"salt":"BASE64"},"nonce":"BASE64","wrapped":"BASE64"}
//   sha256 HEX
//
//   passphrase   wrapping key = scrypt(passphrase in UTF-8, salt, N, r, p), 32 bytes (RFC 7914)
//   file         wrapping key = HKDF-SHA-256(SHA-256 of the file, salt, "cowcatcher key file"), 32 bytes
//   wrapped      AES-256-GCM(wrapping key, nonce, AAD = "cowcatcher key" + repository id), then the tag
//
// N = 2^17 with r = 8 takes 128 MiB and some 0.4 s, and as much for each guess. A key file has its strength itself.

import { createHash, hkdfSync, randomBytes, scrypt } from "node:crypto";
import { CowcatcherError } from "../../errors.js";
import { MiB } from "../../units.js";
import { damagedError } from "./errors.js";
import { parseTextWithSum, textWithSum } from "./metadata.js";
import { KEYS_PREFIX } from "./names.js";
import { decrypt, encrypt, MASTER_BYTES, NONCE_BYTES } from "./secrets.js";

export const MAX_KEY_OBJECT_BYTES = 64 * 1024;
/** Keys of one repository, each of which a wrong passphrase is tried with. */
export const MAX_KEYS = 64;
export const MIN_KEY_FILE_BYTES = 32;
export const MAX_KEY_FILE_BYTES = 1 * MiB;
const SALT_BYTES = 32;
const SCRYPT = { n: 2 ** 17, r: 8, p: 1 };
/** What a key object may ask of this machine: 1 GiB. */
const MAX_SCRYPT_BYTES = 1024 * MiB;

/** What the user opens a repository with. */
export type KeySource =
  { kind: "passphrase"; passphrase: string } | { kind: "file"; path: string; content: Uint8Array };

export interface KeyInfo {
  id: string;
  kind: KeySource["kind"];
  created: string;
  comment: string;
}

interface ScryptParameters {
  n: number;
  r: number;
  p: number;
}

export interface WrappedKey extends KeyInfo {
  /** The id of the repository whose key it is. An init that was killed leaves the key of one that never came to be. */
  repository: string;
  salt: Buffer;
  scrypt: ScryptParameters | undefined;
  nonce: Buffer;
  wrapped: Buffer;
}

/** A key object for `source` and its name. @param cost of scrypt; for tests */
export async function wrapMaster(
  master: Uint8Array,
  source: KeySource,
  repositoryId: string,
  comment: string,
  cost: ScryptParameters = SCRYPT,
): Promise<{ name: string; id: string; object: Buffer }> {
  const id = randomBytes(16).toString("hex");
  const salt = randomBytes(SALT_BYTES);
  const parameters = source.kind === "passphrase" ? cost : undefined;
  const nonce = randomBytes(NONCE_BYTES);
  const key = await wrappingKey(source, salt, parameters);
  const wrapped = Buffer.concat(encrypt(key, nonce, boundTo(repositoryId), master));
  const text = textWithSum({
    version: 1,
    id,
    repository: repositoryId,
    kind: source.kind,
    created: new Date().toISOString(),
    comment,
    ...(parameters === undefined
      ? { hkdf: { salt: salt.toString("base64") } }
      : { scrypt: { ...parameters, salt: salt.toString("base64") } }),
    nonce: nonce.toString("base64"),
    wrapped: wrapped.toString("base64"),
  });
  return { name: KEYS_PREFIX + id, id, object: Buffer.from(text) };
}

/** @throws CowcatcherError FORMAT. */
export function parseKey(storeName: string, name: string, object: Buffer): WrappedKey {
  const { json } = parseTextWithSum(storeName, name, object);
  const { id, kind, created, comment } = json;
  if (name !== `${KEYS_PREFIX}${String(id)}` || (kind !== "passphrase" && kind !== "file")) {
    throw damagedError(storeName, name, "it is not what its name says");
  }
  const kdf = (kind === "passphrase" ? json["scrypt"] : json["hkdf"]) as Record<string, unknown> | undefined;
  const bytes = (value: unknown): Buffer => Buffer.from(typeof value === "string" ? value : "", "base64");
  return {
    id: String(id),
    repository: String(json["repository"]),
    kind,
    created: String(created),
    comment: String(comment),
    salt: bytes(kdf?.["salt"]),
    scrypt: kind === "passphrase" ? scryptParameters(storeName, name, kdf) : undefined,
    nonce: bytes(json["nonce"]),
    wrapped: bytes(json["wrapped"]),
  };
}

function scryptParameters(
  storeName: string,
  name: string,
  kdf: Record<string, unknown> | undefined,
): ScryptParameters {
  const [n, r, p] = [Number(kdf?.["n"]), Number(kdf?.["r"]), Number(kdf?.["p"])];
  const isSane = n >= 2 && Number.isInteger(Math.log2(n)) && r >= 1 && p >= 1 && p <= 16;
  if (isSane && Number.isInteger(r) && Number.isInteger(p) && 128 * n * r <= MAX_SCRYPT_BYTES)
    return { n, r, p };
  throw damagedError(storeName, name, "its scrypt parameters are none, or ask for more than 1 GiB");
}

/** The master key, or null where `source` is not what it was wrapped with. */
export async function unwrapMaster(
  key: WrappedKey,
  source: KeySource,
  repositoryId: string,
): Promise<Uint8Array | null> {
  if (key.kind !== source.kind || key.nonce.length !== NONCE_BYTES) return null;
  const wrapping = await wrappingKey(source, key.salt, key.scrypt);
  const master = decrypt(wrapping, key.nonce, boundTo(repositoryId), key.wrapped);
  return master?.length === MASTER_BYTES ? master : null;
}

function boundTo(repositoryId: string): Buffer {
  return Buffer.from(`cowcatcher key${repositoryId}`);
}

async function wrappingKey(
  source: KeySource,
  salt: Uint8Array,
  parameters: ScryptParameters | undefined,
): Promise<Uint8Array> {
  if (source.kind === "file") {
    // HKDF wants its input within bounds that a file need not keep.
    const material = createHash("sha256").update(source.content).digest();
    return Buffer.from(hkdfSync("sha256", material, salt, "cowcatcher key file", 32));
  }
  const { n, r, p } = parameters ?? SCRYPT;
  return new Promise((resolve, reject) => {
    const options = { N: n, r, p, maxmem: 128 * n * r + 64 * MiB };
    scrypt(Buffer.from(source.passphrase, "utf8"), salt, 32, options, (error, key) => {
      if (error === null) resolve(key);
      else reject(error);
    });
  });
}

/** @throws CowcatcherError USAGE for a file that is no key. */
export function checkKeyFile(path: string, content: Uint8Array): void {
  if (content.length >= MIN_KEY_FILE_BYTES && content.length <= MAX_KEY_FILE_BYTES) return;
  throw new CowcatcherError({
    code: "USAGE",
    object: path,
    problem: `a key file has from ${MIN_KEY_FILE_BYTES} bytes to 1 MiB, this one has ${content.length}`,
    hint: "make one with: head -c 32 /dev/urandom > FILE",
  });
}
