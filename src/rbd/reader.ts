// A worker's reader of an RBD source: reads through the image's one handle (io.ts), holes from the map that was gathered
// when it was opened. One thread.

import type { Completion, RbdSourceDescription, SourceReader } from "../block/device.js";
import { ExtentReader } from "../block/extent-map.js";
import { RbdIo } from "./io.js";

export class RbdSourceReader implements SourceReader {
  readonly sizeBytes: number;
  readonly #io: RbdIo;
  readonly #zeroes: ExtentReader | null;

  /** @param isCancelled asked while an answer is awaited; true ends the wait */
  constructor({ sizeBytes, handle, zeroes }: RbdSourceDescription, isCancelled: () => boolean) {
    this.sizeBytes = sizeBytes;
    this.#io = new RbdIo(handle, isCancelled);
    this.#zeroes = zeroes === null ? null : new ExtentReader(zeroes, false);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.#io.read(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  extent(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean } {
    if (this.#zeroes === null) return { lengthBytes, zero: false };
    const extent = this.#zeroes.extentAt(offsetBytes, lengthBytes);
    return { lengthBytes: extent.lengthBytes, zero: extent.flag };
  }

  close(): void {
    this.#io.close();
  }
}
