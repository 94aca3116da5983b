// Compressed clusters: raw deflate or one zstd frame, followed by whatever shares the last sector.
//
// Output is bounded by the cluster size, and must be exactly that. By native code where it loads (src/native), else
// by Node's zlib, which has zstd from 22.15 on. Any thread; all ways are synchronous, as a cluster takes tens of
// microseconds. Native contexts are made when the first compressed cluster is met, and hold memory until close().

import * as zlib from "node:zlib";
import { CowcatcherError, messageOf } from "../../../errors.js";
import { libz } from "../../../native/libz.js";
import { libzstd } from "../../../native/libzstd.js";
import { noZstdError } from "./compression.js";
import type { CompressionType } from "./header.js";

/** Decompresses to `output` (one cluster). @returns bytes written. @throws Error where the data is damaged. */
type Decompress = (input: Uint8Array, output: Uint8Array) => number;

interface Opened {
  decompress: Decompress;
  close: () => void;
}

/** Writers of other programs may use all of deflate's window. */
const WINDOW_BITS = 15;

export class Decompressor {
  private opened: Opened | undefined;

  /** @throws CowcatcherError UNSUPPORTED where zstd is needed and neither Node nor the system has it. */
  constructor(
    private readonly type: CompressionType,
    private readonly name: string,
  ) {
    if (type === "zstd" && libzstd() === null && nodeZstd === undefined) {
      throw noZstdError(name, "the image uses zstd compression");
    }
  }

  /** @throws CowcatcherError FORMAT, naming hostOffset. */
  run(input: Uint8Array, output: Uint8Array, hostOffset: number): void {
    try {
      this.opened ??= this.type === "zlib" ? openInflate() : openZstd();
      const length = this.opened.decompress(input, output);
      if (length !== output.length) throw new RangeError(`it ends after ${length} bytes`);
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

  /** It may be used again, and is to be closed again then. */
  close(): void {
    this.opened?.close();
    this.opened = undefined;
  }
}

function openInflate(): Opened {
  const native = libz();
  if (native !== null) {
    const { inflate, close } = native.inflater(WINDOW_BITS);
    return { decompress: inflate, close };
  }
  return {
    decompress(input, output) {
      // One piece, not four of 16 KiB that are put together.
      const options = { maxOutputLength: output.length, chunkSize: output.length };
      return put(zlib.inflateRawSync(input, options), output);
    },
    close: () => {},
  };
}

type NodeDecompress = (input: Uint8Array, options: { maxOutputLength: number }) => Uint8Array;

/** Not in the types of Node 20, nor in Node 20. */
const nodeZstd = Reflect.get(zlib, "zstdDecompressSync") as NodeDecompress | undefined;

function openZstd(): Opened {
  const native = libzstd();
  if (native !== null) {
    const { decompress, close } = native.decompressor();
    return { decompress: (input, output) => decompress(input, zstdFrameBytes(input), output), close };
  }
  return {
    decompress(input, output) {
      if (nodeZstd === undefined) throw new RangeError("there is no zstd");
      const frame = input.subarray(0, zstdFrameBytes(input));
      return put(nodeZstd(frame, { maxOutputLength: output.length }), output);
    },
    close: () => {},
  };
}

function put(result: Uint8Array, output: Uint8Array): number {
  output.set(result);
  return result.length;
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
