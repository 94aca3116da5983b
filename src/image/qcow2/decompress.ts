// Compressed clusters: raw deflate or one zstd frame, followed by whatever shares the last sector.
//
// Output is bounded by the cluster size, and must be exactly that. zstd comes from Node's zlib where it has it
// (22.15 on), else from the system's libzstd through koffi. Any thread; both ways are synchronous, as a cluster
// takes tens of microseconds.

import koffi from "koffi";
import * as zlib from "node:zlib";
import { CowcatcherError, messageOf } from "../../errors.js";
import type { CompressionType } from "./header.js";

/** Fills `output` (one cluster). @throws Error where the data is not one cluster. */
type Decompress = (input: Uint8Array, output: Uint8Array) => void;

const inflate: Decompress = (input, output) => {
  const result = zlib.inflateRawSync(input, { maxOutputLength: output.length });
  if (result.length !== output.length) throw new RangeError(`it ends after ${result.length} bytes`);
  output.set(result);
};

export class Decompressor {
  private readonly decompress: Decompress;

  /** @throws CowcatcherError UNSUPPORTED where zstd is needed and neither Node nor the system has it. */
  constructor(
    type: CompressionType,
    private readonly name: string,
  ) {
    this.decompress = type === "zlib" ? inflate : loadZstd(name);
  }

  /** @throws CowcatcherError FORMAT, naming hostOffset. */
  run(input: Uint8Array, output: Uint8Array, hostOffset: number): void {
    try {
      this.decompress(input, output);
    } catch (cause) {
      throw new CowcatcherError({
        code: "FORMAT",
        object: this.name,
        problem: `a compressed cluster cannot be decompressed: ${messageOf(cause)}`,
        hint: "the image is damaged there; qemu-img check may say more",
        offsetBytes: hostOffset,
        cause,
      });
    }
  }
}

let zstd: Decompress | undefined;

function loadZstd(name: string): Decompress {
  zstd ??= nodeZstd() ?? systemZstd();
  if (zstd !== undefined) return zstd;
  throw new CowcatcherError({
    code: "UNSUPPORTED",
    object: name,
    problem: "the image uses zstd compression, and neither this Node nor the system has zstd",
    hint: "use Node 22.15 or later, or install libzstd (libzstd.so.1)",
  });
}

function nodeZstd(): Decompress | undefined {
  const candidate: unknown = Reflect.get(zlib, "zstdDecompressSync");
  if (typeof candidate !== "function") return undefined;
  const decompress = candidate as (input: Uint8Array, options: { maxOutputLength: number }) => Uint8Array;
  return (input, output) => {
    const frame = input.subarray(0, zstdFrameBytes(input));
    const result = decompress(frame, { maxOutputLength: output.length });
    if (result.length !== output.length) throw new RangeError(`it ends after ${result.length} bytes`);
    output.set(result);
  };
}

function systemZstd(): Decompress | undefined {
  if (process.env["COWCATCHER_NO_NATIVE"] === "1") return undefined;
  try {
    const library = koffi.load("libzstd.so.1");
    const decompress = library.func(
      "size_t ZSTD_decompress(_Out_ uint8_t *dst, size_t capacity, const uint8_t *src, size_t size)",
    ) as unknown as (output: Uint8Array, capacity: number, input: Uint8Array, size: number) => number;
    return (input, output) => {
      const written = decompress(output, output.length, input, zstdFrameBytes(input));
      // An error code is a huge size_t, far beyond any length.
      if (written !== output.length) throw new RangeError("zstd reports damaged data");
    };
  } catch {
    return undefined;
  }
}

const ZSTD_MAGIC = 0xfd2fb528;

/**
 * Length of the zstd frame that `input` starts with (RFC 8878, section 3.1.1): decompressors refuse what follows.
 * @throws RangeError where there is no complete frame.
 */
export function zstdFrameBytes(input: Uint8Array): number {
  const view = new DataView(input.buffer, input.byteOffset, input.byteLength);
  if (input.length < 6 || view.getUint32(0, true) !== ZSTD_MAGIC) throw new RangeError("no zstd frame");
  const descriptor = view.getUint8(4);
  const isSingleSegment = (descriptor & 0x20) !== 0;
  const dictionaryIdBytes = [0, 1, 2, 4][descriptor & 3] ?? 0;
  const sizeFlag = descriptor >>> 6;
  const contentSizeBytes = sizeFlag === 0 ? (isSingleSegment ? 1 : 0) : 2 ** sizeFlag;
  let offset = 5 + (isSingleSegment ? 0 : 1) + dictionaryIdBytes + contentSizeBytes;
  for (;;) {
    if (offset + 3 > input.length) throw new RangeError("the zstd frame is cut short");
    const blockHeader = view.getUint16(offset, true) + view.getUint8(offset + 2) * 65536;
    const blockType = (blockHeader >>> 1) & 3;
    offset += 3 + (blockType === 1 ? 1 : blockHeader >>> 3);
    if (blockHeader & 1) break;
  }
  offset += descriptor & 4 ? 4 : 0;
  if (offset > input.length) throw new RangeError("the zstd frame is cut short");
  return offset;
}
