// A worker's reader of an NBD source: a connection of its own, made at the first read. One thread.
//
// A worker copies several chunks at the same time through it (workers/copy.ts), each read cut into pieces that are in
// flight together, so that it is the server's throughput that counts and not the way there and back.

import type { Completion, NbdSourceDescription, SourceReader } from "../image/device.js";
import { readRange } from "./client-io.js";
import { NbdSession } from "./client-session.js";
import { ExtentReader } from "./extent-map.js";

export class NbdSourceReader implements SourceReader {
  readonly sizeBytes: number;
  readonly #session: NbdSession;
  readonly #zeroes: ExtentReader | null;

  /** @param isCancelled asked while an answer is awaited; true ends the wait */
  constructor(description: NbdSourceDescription, isCancelled: () => boolean) {
    const { uri, sizeBytes, retries, zeroes } = description;
    this.sizeBytes = sizeBytes;
    this.#session = new NbdSession({ uri, retries, sizeBytes, isCancelled });
    this.#zeroes = zeroes === null ? null : new ExtentReader(zeroes, false);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.#session.run((client) => readRange(client, buffer, bufferOffset, lengthBytes, offsetBytes));
  }

  extent(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean } {
    if (this.#zeroes === null) return { lengthBytes, zero: false };
    const extent = this.#zeroes.extentAt(offsetBytes, lengthBytes);
    return { lengthBytes: extent.lengthBytes, zero: extent.flag };
  }

  close(): void {
    void this.#session.close();
  }
}
