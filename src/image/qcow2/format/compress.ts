// Compressing clusters, as decompress.ts has them: raw deflate with a window of 4 KiB, or one zstd frame.
//
// By native code where it loads (src/native), else by Node's zlib. What does not get smaller than its cluster is
// for the caller to store plain. Any thread; a compressor is its thread's own, and holds memory until close().

import * as zlib from "node:zlib";
import { CowcatcherError, messageOf } from "../../../errors.js";
import { libz } from "../../../native/libz.js";
import { libzstd } from "../../../native/libzstd.js";
import { type Compression, noZstdError, QCOW2_DEFLATE_WINDOW_BITS } from "./compression.js";

/** @returns bytes written to output[outputOffset, +capacityBytes), or 0 where they do not fit. */
type Compress = (
  input: Uint8Array,
  inputOffset: number,
  lengthBytes: number,
  output: Uint8Array,
  outputOffset: number,
  capacityBytes: number,
) => number;

/**
 * Compresses clusters one after another with one context. The thread's own that made it; close() gives the
 * library's memory back.
 */
export class Compressor {
  /** See Compress. @throws RangeError where the library fails, which for whole clusters it does not. */
  readonly run: Compress;
  readonly #close: () => void;

  /** @throws CowcatcherError UNSUPPORTED, naming `name`, where neither Node nor the system has zstd; IO. */
  constructor({ type, level }: Compression, name: string) {
    try {
      const { compress, close } = type === "zlib" ? openDeflate(level) : openZstd(level, name);
      this.run = compress;
      this.#close = close;
    } catch (cause) {
      if (cause instanceof CowcatcherError) throw cause;
      const problem = `cannot compress with ${type}: ${messageOf(cause)}`;
      throw new CowcatcherError({ code: "IO", object: name, problem, cause });
    }
  }

  close(): void {
    this.#close();
  }
}

/** @throws CowcatcherError as Compressor's constructor; nothing is kept. */
export function checkCompression(compression: Compression, name: string): void {
  new Compressor(compression, name).close();
}

interface Opened {
  compress: Compress;
  close: () => void;
}

function openDeflate(level: number): Opened {
  const native = libz();
  if (native !== null) {
    const { deflate, close } = native.deflater(level, QCOW2_DEFLATE_WINDOW_BITS);
    return { compress: deflate, close };
  }
  const options = { level, windowBits: QCOW2_DEFLATE_WINDOW_BITS, memLevel: 9 };
  return withoutContext((input) => zlib.deflateRawSync(input, options));
}

function openZstd(level: number, name: string): Opened {
  const native = libzstd();
  if (native !== null) {
    const { compress, close } = native.compressor(level);
    return { compress, close };
  }
  // Not in the types of Node 20, nor in Node 20.
  const candidate: unknown = Reflect.get(zlib, "zstdCompressSync");
  if (typeof candidate !== "function") throw noZstdError(name, "it is to be compressed with zstd");
  const compressSync = candidate as (input: Uint8Array, options: object) => Uint8Array;
  /** ZSTD_c_compressionLevel (zstd.h). */
  const parameters = { params: { 100: level } };
  return withoutContext((input) => compressSync(input, parameters));
}

function withoutContext(compress: (input: Uint8Array) => Uint8Array): Opened {
  return {
    compress(input, inputOffset, lengthBytes, output, outputOffset, capacityBytes) {
      const result = compress(input.subarray(inputOffset, inputOffset + lengthBytes));
      if (result.length > capacityBytes) return 0;
      output.set(result, outputOffset);
      return result.length;
    },
    close: () => {},
  };
}
