// The system's libzstd.so.1 through koffi, with a context that is used again for each cluster. libzstd() is null where koffi or
// the library cannot load (COWCATCHER_NO_NATIVE=1): Node's zlib has zstd from 22.15 on.
//
// Contexts belong to the thread that made them, and hold memory of the library until close(): 1.3 MB for level 3
// and 64 KiB, 95 KB for decompression.

import { addressOf } from "./addresses.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

export interface ZstdCompressor {
  /** One frame of input[inputOffset, +lengthBytes). @returns its bytes in `output`, or 0 where it does not fit. */
  readonly compress: (
    input: Uint8Array,
    inputOffset: number,
    lengthBytes: number,
    output: Uint8Array,
    outputOffset: number,
    capacityBytes: number,
  ) => number;
  readonly close: () => void;
}

export interface ZstdDecompressor {
  /** `input` is whole frames. @returns bytes written. @throws RangeError for damaged data, or too much of it. */
  readonly decompress: (input: Uint8Array, lengthBytes: number, output: Uint8Array) => number;
  readonly close: () => void;
}

export interface Libzstd {
  /** @throws RangeError where there is no memory. */
  compressor(level: number): ZstdCompressor;
  /** @throws RangeError where there is no memory. */
  decompressor(): ZstdDecompressor;
}

type NativeFunction = (...args: number[]) => number;

function bind(): Libzstd {
  const koffi = loadKoffi();
  const library = koffi.load("libzstd.so.1");
  const declare = (prototype: string): NativeFunction => library.func(prototype) as NativeFunction;
  const createCCtx = declare("uint64_t ZSTD_createCCtx()");
  const freeCCtx = declare("uint64_t ZSTD_freeCCtx(uint64_t context)");
  const compressCCtx = declare(
    "int64_t ZSTD_compressCCtx(uint64_t context, uint64_t output, uint64_t capacity, uint64_t input, uint64_t size, int level)",
  );
  const createDCtx = declare("uint64_t ZSTD_createDCtx()");
  const freeDCtx = declare("uint64_t ZSTD_freeDCtx(uint64_t context)");
  const decompressDCtx = declare(
    "int64_t ZSTD_decompressDCtx(uint64_t context, uint64_t output, uint64_t capacity, uint64_t input, uint64_t size)",
  );

  return {
    compressor(level) {
      const context = notNull(createCCtx());
      return {
        compress(input, inputOffset, lengthBytes, output, outputOffset, capacityBytes) {
          const from = addressOf(input.buffer) + input.byteOffset + inputOffset;
          const to = addressOf(output.buffer) + output.byteOffset + outputOffset;
          // Error codes are minus a small number. The only one to be met here: the output is too small.
          return Math.max(0, compressCCtx(context, to, capacityBytes, from, lengthBytes, level));
        },
        close: () => void freeCCtx(context),
      };
    },
    decompressor() {
      const context = notNull(createDCtx());
      return {
        decompress(input, lengthBytes, output) {
          const from = addressOf(input.buffer) + input.byteOffset;
          const to = addressOf(output.buffer) + output.byteOffset;
          const written = decompressDCtx(context, to, output.length, from, lengthBytes);
          if (written < 0) throw new RangeError("zstd reports damaged data");
          return written;
        },
        close: () => void freeDCtx(context),
      };
    },
  };
}

function notNull(pointer: number): number {
  if (Number(pointer) !== 0) return pointer;
  throw new RangeError("zstd has no memory");
}

/** Loaded when it is first asked for. */
export const libzstd = optionalLibrary<Libzstd>(bind);
