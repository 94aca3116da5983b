// A worker's door to a repository: each write is one chunk. Several may be under way at a time.

import { threadId } from "node:worker_threads";
import { randomBytes } from "node:crypto";
import type { Completion } from "../../block/device.js";
import { CowcatcherError } from "../../errors.js";
import { ChunkWriter } from "../../repository/backup/chunk-writer.js";
import { DiskChunks } from "../../repository/backup/disk-chunks.js";
import { countBlocks, hasBlock } from "../../repository/format/patch.js";
import type { TargetWriter } from "../../cow/target-writer.js";
import type { RepositoryTargetDescription } from "../target.js";

export class RepositoryWriter implements TargetWriter {
  readonly #description: RepositoryTargetDescription;
  readonly #chunks: ChunkWriter;
  readonly #disk: DiskChunks;

  constructor(description: RepositoryTargetDescription) {
    this.#description = description;
    this.#chunks = new ChunkWriter(description.writer, `${threadId}${randomBytes(4).toString("hex")}`);
    this.#disk = new DiskChunks(this.#chunks, description);
  }

  noteUnneeded(offsetBytes: number, unneeded: Uint8Array, unitBytes: number): number | undefined {
    const { chunkBytes } = this.#description;
    // Where a source's clusters are larger than a chunk, each write is several.
    if (unneeded.length * unitBytes !== chunkBytes) return undefined;
    const needed = this.#disk.neededBlocks(offsetBytes / chunkBytes);
    if (needed === undefined) return undefined;
    const { blocks, blockBytes } = needed;
    for (let unit = 0; unit < unneeded.length; unit++) {
      if (!hasBlock(blocks, Math.floor((unit * unitBytes) / blockBytes))) unneeded[unit] = 1;
    }
    return countBlocks(blocks) * blockBytes;
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
      await this.#disk.store(next, buffer.subarray(at, at + count));
      done += count;
    }
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    const first = this.#chunkAt(offsetBytes, lengthBytes);
    const end = first + Math.ceil(lengthBytes / this.#description.chunkBytes);
    this.#disk.setHoles(first, end);
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
