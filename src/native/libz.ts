// zlib through koffi, with one stream that is used again for each cluster: Node's own zlib functions make and free
// one a call, and gather the output in pieces.
//
// Which zlib. Node carries one with vector instructions, and exports its functions from its executable (or loads the
// system's library, where it was built that way): it is found by loading "the program itself". The system's
// libz.so.1 is not loaded on purpose. Its level 6 takes 1.9 times as long here, and its inner calls would end up in
// Node's functions of the same name, whose streams look different, and crash.
//
// libz() is null where koffi cannot load or the functions are not there (COWCATCHER_NO_NATIVE=1): callers use
// node:zlib then. Streams belong to the thread that made them, and hold memory of the library until close().

import { addressOf } from "./addresses.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

/** zlib's constants (zlib.h). */
const Z_OK = 0;
const Z_STREAM_END = 1;
const Z_BUF_ERROR = -5;
const Z_FINISH = 4;
const Z_DEFLATED = 8;
const Z_DEFAULT_STRATEGY = 0;

/** sizeof(z_stream) and its fields where pointers and long have 64 bits. */
const Z_STREAM_BYTES = 112;
const NEXT_IN = 0;
const AVAIL_IN = 8;
const NEXT_OUT = 24;
const AVAIL_OUT = 32;
const TWO_POW_32 = 0x1_0000_0000;

export interface Deflater {
  /** Raw deflate of input[inputOffset, +lengthBytes). @returns its bytes in `output`, or 0 where it does not fit. */
  readonly deflate: (
    input: Uint8Array,
    inputOffset: number,
    lengthBytes: number,
    output: Uint8Array,
    outputOffset: number,
    capacityBytes: number,
  ) => number;
  readonly close: () => void;
}

export interface Inflater {
  /**
   * Raw inflate of what `input` begins with; bytes after the end of the stream are not looked at.
   * @returns bytes written, all of the stream's.
   * @throws RangeError for damaged data, or more of it than `output` holds.
   */
  readonly inflate: (input: Uint8Array, output: Uint8Array) => number;
  readonly close: () => void;
}

export interface Libz {
  /** memLevel 9. @throws RangeError where zlib refuses the parameters or has no memory. */
  deflater(level: number, windowBits: number): Deflater;
  /** @throws RangeError as deflater. */
  inflater(windowBits: number): Inflater;
}

type NativeFunction = (...args: (number | string)[]) => number;

function bind(): Libz {
  const koffi = loadKoffi();
  const library = koffi.load(null);
  const declare = (prototype: string): NativeFunction => library.func(prototype) as NativeFunction;
  const zlibVersion = library.func("const char *zlibVersion()") as () => string;
  const deflateInit2 = declare(
    "int deflateInit2_(uint64_t stream, int level, int method, int window_bits, int mem_level, int strategy, const char *version, int stream_size)",
  );
  const deflate = declare("int deflate(uint64_t stream, int flush)");
  const deflateReset = declare("int deflateReset(uint64_t stream)");
  const deflateEnd = declare("int deflateEnd(uint64_t stream)");
  const inflateInit2 = declare(
    "int inflateInit2_(uint64_t stream, int window_bits, const char *version, int stream_size)",
  );
  const inflate = declare("int inflate(uint64_t stream, int flush)");
  const inflateReset = declare("int inflateReset(uint64_t stream)");
  const inflateEnd = declare("int inflateEnd(uint64_t stream)");
  const version = zlibVersion();

  return {
    deflater(level, windowBits) {
      const stream = new Stream();
      const memLevel = 9;
      expectOk(
        deflateInit2(
          stream.address,
          level,
          Z_DEFLATED,
          -windowBits,
          memLevel,
          Z_DEFAULT_STRATEGY,
          version,
          Z_STREAM_BYTES,
        ),
      );
      return {
        deflate(input, inputOffset, lengthBytes, output, outputOffset, capacityBytes) {
          expectOk(deflateReset(stream.address));
          stream.setInput(input, inputOffset, lengthBytes);
          stream.setOutput(output, outputOffset, capacityBytes);
          // Anything but the end means that the output is full.
          return deflate(stream.address, Z_FINISH) === Z_STREAM_END ? capacityBytes - stream.availOut : 0;
        },
        close: () => void deflateEnd(stream.address),
      };
    },
    inflater(windowBits) {
      const stream = new Stream();
      expectOk(inflateInit2(stream.address, -windowBits, version, Z_STREAM_BYTES));
      return {
        inflate(input, output) {
          expectOk(inflateReset(stream.address));
          stream.setInput(input, 0, input.length);
          stream.setOutput(output, 0, output.length);
          const result = inflate(stream.address, Z_FINISH);
          if (result === Z_STREAM_END) return output.length - stream.availOut;
          if (result !== Z_BUF_ERROR) throw new RangeError("zlib reports damaged data");
          throw new RangeError(stream.availOut === 0 ? "it goes on past its cluster" : "it is cut short");
        },
        close: () => void inflateEnd(stream.address),
      };
    },
  };
}

function expectOk(result: number): void {
  if (result !== Z_OK) throw new RangeError(`zlib answers ${result}`);
}

/** A z_stream with zlib's own memory functions. zlib keeps its address. */
class Stream {
  readonly #view = new DataView(new ArrayBuffer(Z_STREAM_BYTES));
  readonly address = addressOf(this.#view.buffer);

  setInput(buffer: Uint8Array, offset: number, lengthBytes: number): void {
    this.#setAddress(NEXT_IN, addressOf(buffer.buffer) + buffer.byteOffset + offset);
    this.#view.setUint32(AVAIL_IN, lengthBytes, true);
  }

  setOutput(buffer: Uint8Array, offset: number, capacityBytes: number): void {
    this.#setAddress(NEXT_OUT, addressOf(buffer.buffer) + buffer.byteOffset + offset);
    this.#view.setUint32(AVAIL_OUT, capacityBytes, true);
  }

  get availOut(): number {
    return this.#view.getUint32(AVAIL_OUT, true);
  }

  #setAddress(field: number, address: number): void {
    this.#view.setUint32(field, address % TWO_POW_32, true);
    this.#view.setUint32(field + 4, Math.floor(address / TWO_POW_32), true);
  }
}

/** 32-bit platforms lay the stream out otherwise. */
const ARCHITECTURES: readonly NodeJS.Architecture[] = ["x64", "arm64"];

/** Loaded when it is first asked for. */
export const libz = optionalLibrary<Libz>(bind, ARCHITECTURES);
