import { createCipheriv, createDecipheriv, randomBytes } from "node:crypto";
import { describe, expect, it } from "vitest";
import { libcrypto } from "../../../src/native/libcrypto.js";

const ALGORITHM = "aes-256-gcm";
const LENGTHS = [0, 1, 15, 16, 17, 4096, 65_537, 4 * 1024 * 1024 + 3];

const native = libcrypto();
const key = randomBytes(32);
const nonce = randomBytes(12);
const bound = randomBytes(61);

function nodeEncrypts(text: Uint8Array): { text: Buffer; tag: Buffer } {
  const cipher = createCipheriv(ALGORITHM, key, nonce);
  cipher.setAAD(bound);
  return { text: Buffer.concat([cipher.update(text), cipher.final()]), tag: cipher.getAuthTag() };
}

describe("AES-256-GCM of the OpenSSL that Node carries", () => {
  it.each(LENGTHS)("encrypts %i bytes as node:crypto does", (length) => {
    const plain = randomBytes(length);
    const expected = nodeEncrypts(plain);
    // At an odd place in its memory.
    const text = Buffer.alloc(length + 7).subarray(5, 5 + length);
    text.set(plain);
    const tag = Buffer.alloc(16);
    native?.encrypt(key, nonce, bound, text, tag);
    expect(tag.equals(expected.tag)).toBe(true);
    expect(text.equals(expected.text)).toBe(true);
  });

  it.each(LENGTHS)("decrypts %i bytes that node:crypto has encrypted", (length) => {
    const plain = randomBytes(length);
    const { text, tag } = nodeEncrypts(plain);
    expect(native?.decrypt(key, nonce, bound, text, tag)).toBe(true);
    expect(text.equals(plain)).toBe(true);
  });

  it("works in shared memory, which workers have", () => {
    const text = Buffer.from(new SharedArrayBuffer(100_000));
    const plain = randomBytes(100_000);
    text.set(plain);
    const tag = Buffer.alloc(16);
    native?.encrypt(key, nonce, bound, text, tag);
    expect(Buffer.from(text).equals(nodeEncrypts(plain).text)).toBe(true);
  });

  it("refuses what does not belong together, bit by bit", () => {
    const sealed = nodeEncrypts(randomBytes(40));
    const parts = { key, nonce, bound, ...sealed };
    for (const part of ["key", "nonce", "bound", "text", "tag"] as const) {
      for (let bit = 0; bit < parts[part].length * 8; bit += 5) {
        const copy = structuredClone(parts);
        const bytes = copy[part];
        bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) ^ (1 << (bit & 7));
        expect(native?.decrypt(copy.key, copy.nonce, copy.bound, copy.text, copy.tag)).toBe(false);
      }
    }
    // The thread's queue of errors holds none that the next call would take for its own.
    const decipher = createDecipheriv(ALGORITHM, key, nonce);
    decipher.setAAD(bound).setAuthTag(sealed.tag);
    expect(() => Buffer.concat([decipher.update(sealed.text), decipher.final()])).not.toThrow();
  });

  it("takes no other lengths of key and nonce", () => {
    const text = Buffer.alloc(1);
    const tag = Buffer.alloc(16);
    expect(() => native?.encrypt(key.subarray(1), nonce, bound, text, tag)).toThrow(RangeError);
    expect(() => native?.encrypt(key, nonce.subarray(1), bound, text, tag)).toThrow(RangeError);
    expect(() => native?.encrypt(key, nonce, Buffer.alloc(2000), text, tag)).toThrow(RangeError);
  });

  it("is there, wherever koffi is", () => {
    expect(native).not.toBeNull();
  });
});
