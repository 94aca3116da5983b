// The file of a qcow2 image with O_DIRECT: it grows, by whole blocks (block/file/direct.ts).
// Main thread only, and once for each reader in a worker (readSync alone).

import { DirectFile, readDirectSync } from "../../../block/file/direct.js";
import { DIRECT_ALIGNMENT_BYTES, pageAlignedMemory } from "../../../block/file/fileio.js";
import { MiB, roundUp } from "../../../units.js";
import { QcowFileBase, type QcowFile } from "./file.js";

const SYNC_BOUNCE_BYTES = 1 * MiB;

export class DirectQcowFile extends QcowFileBase implements QcowFile {
  private readonly direct = DirectFile.growing(this.name, this.fd, () => this.endOffset);
  private syncBounce: Uint8Array | undefined;

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Promise<void> {
    return this.direct.read(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  readSync(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    this.syncBounce ??= pageAlignedMemory(SYNC_BOUNCE_BYTES);
    const { name, fd, syncBounce } = this;
    readDirectSync(name, fd, this.endOffset, syncBounce, buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  async write(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    if (this.isWatched) this.assertNotCut();
    try {
      await this.direct.write(buffer, bufferOffset, lengthBytes, offsetBytes);
    } catch (error) {
      this.growByFailedWrite();
      throw error;
    }
    // Whole blocks were written; the file's own odd end may be in the last of them, and further out.
    this.grewTo(roundUp(offsetBytes + lengthBytes, DIRECT_ALIGNMENT_BYTES));
  }

  protected override syncData(): Promise<void> {
    return this.direct.sync();
  }

  override async close(): Promise<void> {
    await this.direct.close();
    await super.close();
  }
}
