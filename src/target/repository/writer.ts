// A worker's door to a repository: each write is one chunk. Several may be under way at a time.

import { threadId } from "node:worker_threads";
import { randomBytes } from "node:crypto";
import type { Completion } from "../../block/device.js";
import { CowcatcherError } from "../../errors.js";
import { ChunkWriter } from "../../repository/backup/chunk-writer.js";
import { CHUNK_DONE } from "../../repository/backup/session.js";
import { ID_BYTES } from "../../repository/format/secrets.js";
import type { TargetWriter } from "../../cow/target-writer.js";
import type { RepositoryTargetDescription } from "../target.js";

export class RepositoryWriter implements TargetWriter {
  readonly #description: RepositoryTargetDescription;
  readonly #chunks: ChunkWriter;
  readonly #ids: Uint8Array;
  readonly #states: Uint8Array;

  constructor(description: RepositoryTargetDescription) {
    this.#description = description;
    this.#chunks = new ChunkWriter(description.writer, `${threadId}${randomBytes(4).toString("hex")}`);
    this.#ids = new Uint8Array(description.ids);
    this.#states = new Uint8Array(description.states);
  }

  async write(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const chunk = this.#chunkAt(offsetBytes, lengthBytes);
    const { chunkBytes } = this.#description;
    let done = 0;
    // Neighbours that were found to hold data together come in one write.
    for (let next = chunk; done < lengthBytes; next++) {
      const count = Math.min(chunkBytes, lengthBytes - done);
      const at = bufferOffset + done;
      const id = await this.#chunks.write(buffer.subarray(at, at + count));
      this.#ids.set(id, next * ID_BYTES);
      this.#states[next] = CHUNK_DONE;
      done += count;
    }
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    const first = this.#chunkAt(offsetBytes, lengthBytes);
    const end = first + Math.ceil(lengthBytes / this.#description.chunkBytes);
    this.#ids.fill(0, first * ID_BYTES, end * ID_BYTES);
    this.#states.fill(CHUNK_DONE, first, end);
    return undefined;
  }

  /** @throws CowcatcherError INTERNAL for anything but whole chunks, but for the disk's end. */
  #chunkAt(offsetBytes: number, lengthBytes: number): number {
    const { chunkBytes, sizeBytes, name } = this.#description;
    const end = offsetBytes + lengthBytes;
    if (offsetBytes % chunkBytes === 0 && (end % chunkBytes === 0 || end === sizeBytes) && end <= sizeBytes) {
      return offsetBytes / chunkBytes;
    }
    throw new CowcatcherError({
      code: "INTERNAL",
      object: name,
      problem: `a write of ${lengthBytes} bytes is not one of whole chunks`,
      offsetBytes,
    });
  }

  finish(): Promise<void> {
    return this.#chunks.flush();
  }

  close(): void {
    this.#chunks.close();
  }
}
