// AES-256-GCM in place, by the OpenSSL that Node carries and exports from its executable (or loads as a shared library, where
// it was built that way), as its zlib (libz.ts).
//
// Why not node:crypto alone. Its cipher gives all output in new memory, which the kernel hands out page by page: 12 ms for
// a chunk of 4 MiB on a virtual machine, where the cipher itself takes 1.2 ms; and what the collector has not
// found yet came to some hundred MiB in the threads of a backup.
//
// Functions and constants: evp.h of OpenSSL 1.1 to 3.x; AEAD mode as in EVP_EncryptInit(3).
//
// libcrypto() is null where koffi cannot load or the functions are not there (COWCATCHER_NO_NATIVE=1): callers use
// node:crypto then. Any thread; each call has a context of its own.

import { addressOf } from "./addresses.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

const EVP_CTRL_AEAD_GET_TAG = 0x10;
const EVP_CTRL_AEAD_SET_TAG = 0x11;
const ENCRYPT = 1;
const DECRYPT = 0;

const KEY_BYTES = 32;
const NONCE_BYTES = 12;
export const TAG_BYTES = 16;
/** Where things stand in the scratch memory of a thread. */
const KEY_AT = 0;
const NONCE_AT = KEY_AT + KEY_BYTES;
const TAG_AT = NONCE_AT + NONCE_BYTES + 4;
const LENGTH_AT = TAG_AT + TAG_BYTES;
const BOUND_AT = LENGTH_AT + 16;
const MAX_BOUND_BYTES = 1024;

export interface Libcrypto {
  /**
   * @param key 32 bytes
   * @param nonce 12 bytes
   * @param bound additional authenticated data, at most 1 KiB
   * @param text becomes the ciphertext
   * @param tag of 16 bytes, is filled
   * @throws RangeError where a length is another, or OpenSSL refuses
   */
  encrypt(key: Uint8Array, nonce: Uint8Array, bound: Uint8Array, text: Uint8Array, tag: Uint8Array): void;
  /**
   * As `encrypt`; `text` becomes the content, which is not to be used where the result is false.
   * @returns whether all of it belongs together
   */
  decrypt(key: Uint8Array, nonce: Uint8Array, bound: Uint8Array, text: Uint8Array, tag: Uint8Array): boolean;
}

type NativeFunction = (...args: number[]) => number;

function bind(): Libcrypto {
  const library = loadKoffi().load(null);
  const declare = (prototype: string): NativeFunction => library.func(prototype) as NativeFunction;
  const newContext = declare("uint64_t EVP_CIPHER_CTX_new()");
  const freeContext = declare("void EVP_CIPHER_CTX_free(uint64_t context)");
  const aes256Gcm = declare("uint64_t EVP_aes_256_gcm()");
  const init = declare(
    "int EVP_CipherInit_ex(uint64_t context, uint64_t type, uint64_t engine, uint64_t key, uint64_t nonce, int direction)",
  );
  const update = declare(
    "int EVP_CipherUpdate(uint64_t context, uint64_t output, uint64_t length, uint64_t input, int input_length)",
  );
  const final = declare("int EVP_CipherFinal_ex(uint64_t context, uint64_t output, uint64_t length)");
  const control = declare(
    "int EVP_CIPHER_CTX_ctrl(uint64_t context, int type, int argument, uint64_t pointer)",
  );
  const clearErrors = declare("void ERR_clear_error()");

  const memory = new ArrayBuffer(BOUND_AT + MAX_BOUND_BYTES);
  const scratch = new Uint8Array(memory);
  const at = addressOf(memory);

  function inContext(
    direction: number,
    key: Uint8Array,
    nonce: Uint8Array,
    bound: Uint8Array,
    text: Uint8Array,
    use: (context: number) => boolean,
  ): boolean {
    if (key.length !== KEY_BYTES || nonce.length !== NONCE_BYTES || bound.length > MAX_BOUND_BYTES) {
      throw new RangeError(`AES-256-GCM: lengths ${key.length}, ${nonce.length}, ${bound.length}`);
    }
    scratch.set(key, KEY_AT);
    scratch.set(nonce, NONCE_AT);
    scratch.set(bound, BOUND_AT);
    const context = newContext();
    try {
      const address = text.length === 0 ? at : addressOf(text.buffer) + text.byteOffset;
      const { length } = text;
      const lengthAt = at + LENGTH_AT;
      expectOk(init(context, aes256Gcm(), 0, at + KEY_AT, at + NONCE_AT, direction));
      if (bound.length > 0) expectOk(update(context, 0, lengthAt, at + BOUND_AT, bound.length));
      if (length > 0) expectOk(update(context, address, lengthAt, address, length));
      return use(context);
    } finally {
      freeContext(context);
      scratch.fill(0, KEY_AT, KEY_AT + KEY_BYTES);
    }
  }

  // Of GCM the last call gives no bytes: what it is given to write to is not written to.
  const finish = (context: number): boolean => final(context, at + BOUND_AT, at + LENGTH_AT) === 1;

  return {
    encrypt(key, nonce, bound, text, tag) {
      inContext(ENCRYPT, key, nonce, bound, text, (context) => {
        expectOk(Number(finish(context)));
        expectOk(control(context, EVP_CTRL_AEAD_GET_TAG, TAG_BYTES, at + TAG_AT));
        return true;
      });
      tag.set(scratch.subarray(TAG_AT, TAG_AT + TAG_BYTES));
    },
    decrypt(key, nonce, bound, text, tag) {
      return inContext(DECRYPT, key, nonce, bound, text, (context) => {
        scratch.set(tag.subarray(0, TAG_BYTES), TAG_AT);
        expectOk(control(context, EVP_CTRL_AEAD_SET_TAG, TAG_BYTES, at + TAG_AT));
        if (finish(context)) return true;
        // Node's own calls would find it in the thread's queue.
        clearErrors();
        return false;
      });
    },
  };

  function expectOk(result: number): void {
    if (result === 1) return;
    clearErrors();
    throw new RangeError("OpenSSL refuses AES-256-GCM");
  }
}

/** Null where there is none. */
export const libcrypto = optionalLibrary(bind, ["x64", "arm64"]);
