// O_DIRECT: offsets, lengths and memory in multiples of 4 KiB; everything else goes through bounce buffers.
//
// A write that does not cover whole blocks reads its first and last block, changes them and writes all (a
// read-modify-write). Two such writes to one block would undo each other, so a write waits for every write in
// flight that touches one of its blocks. Unlike a raw image's file, this one grows: by whole blocks.
//
// Bounce buffers are a fixed pool in page-aligned memory; a request that finds none waits its turn. Who waits for a
// buffer holds none, and who waits for another write holds none either, so nobody waits in a circle.
// Main thread only, and once for each reader in a worker (readSync alone).

import { CowcatcherError } from "../../../errors.js";
import { MiB, roundDown, roundUp } from "../../../units.js";
import {
  DIRECT_ALIGNMENT_BYTES as BLOCK,
  pageAlignedMemory,
  readOnce,
  readOnceSync,
  writeFully,
} from "../../../block/file/fileio.js";
import { QcowFileBase, type QcowFile } from "./file.js";

const BOUNCE_BYTES = 1 * MiB;
/** As many as libuv has threads by default: more could not be in use at once. */
const BOUNCE_COUNT = 4;

interface WriteInFlight {
  start: number;
  end: number;
  done: Promise<void>;
}

export class DirectQcowFile extends QcowFileBase implements QcowFile {
  private freeBuffers: Uint8Array[] | undefined;
  private readonly waiters: ((buffer: Uint8Array) => void)[] = [];
  private readonly writesInFlight: WriteInFlight[] = [];
  private syncBuffer: Uint8Array | undefined;

  async read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    if (isAligned(buffer, bufferOffset, lengthBytes, offsetBytes)) {
      try {
        await this.readBlocks(buffer, bufferOffset, offsetBytes, lengthBytes);
        return;
      } catch (error) {
        if (!isRefusedAlignment(error)) throw error;
      }
    }
    const bounce = await this.takeBuffer();
    try {
      for (let done = 0; done < lengthBytes;) {
        const start = roundDown(offsetBytes + done, BLOCK);
        const skip = offsetBytes + done - start;
        const count = Math.min(lengthBytes - done, BOUNCE_BYTES - skip);
        await this.readBlocks(bounce, 0, start, roundUp(skip + count, BLOCK));
        buffer.set(bounce.subarray(skip, skip + count), bufferOffset + done);
        done += count;
      }
    } finally {
      this.giveBuffer(bounce);
    }
  }

  readSync(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    if (isAligned(buffer, bufferOffset, lengthBytes, offsetBytes)) {
      try {
        this.readBlocksSync(buffer, bufferOffset, offsetBytes, lengthBytes);
        return;
      } catch (error) {
        if (!isRefusedAlignment(error)) throw error;
      }
    }
    const bounce = (this.syncBuffer ??= pageAlignedMemory(BOUNCE_BYTES));
    for (let done = 0; done < lengthBytes;) {
      const start = roundDown(offsetBytes + done, BLOCK);
      const skip = offsetBytes + done - start;
      const count = Math.min(lengthBytes - done, BOUNCE_BYTES - skip);
      this.readBlocksSync(bounce, 0, start, roundUp(skip + count, BLOCK));
      buffer.set(bounce.subarray(skip, skip + count), bufferOffset + done);
      done += count;
    }
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Promise<void> {
    const start = roundDown(offsetBytes, BLOCK);
    const end = roundUp(offsetBytes + lengthBytes, BLOCK);
    const before = this.writesInFlight.filter((other) => other.start < end && start < other.end);
    const done = this.writeAfter(before, buffer, bufferOffset, lengthBytes, offsetBytes).finally(() => {
      this.writesInFlight.splice(this.writesInFlight.indexOf(entry), 1);
    });
    const entry: WriteInFlight = { start, end, done };
    this.writesInFlight.push(entry);
    this.endOffset = Math.max(this.endOffset, end);
    return done;
  }

  private async writeAfter(
    before: readonly WriteInFlight[],
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    await Promise.allSettled(before.map(({ done }) => done));
    if (isAligned(buffer, bufferOffset, lengthBytes, offsetBytes)) {
      try {
        await writeFully(this.name, this.fd, buffer, bufferOffset, lengthBytes, offsetBytes);
        return;
      } catch (error) {
        if (!isRefusedAlignment(error)) throw error;
      }
    }
    const bounce = await this.takeBuffer();
    try {
      for (let done = 0; done < lengthBytes;) {
        const start = roundDown(offsetBytes + done, BLOCK);
        const skip = offsetBytes + done - start;
        const count = Math.min(lengthBytes - done, BOUNCE_BYTES - skip);
        const length = roundUp(skip + count, BLOCK);
        if (skip !== 0 || count !== length) await this.readBlocks(bounce, 0, start, length);
        bounce.set(buffer.subarray(bufferOffset + done, bufferOffset + done + count), skip);
        await writeFully(this.name, this.fd, bounce, 0, length, start);
        done += count;
      }
    } finally {
      this.giveBuffer(bounce);
    }
  }

  /** Whole blocks. A short read is the file's end, even an odd one: to go on from there would be refused. */
  private async readBlocks(
    place: Uint8Array,
    placeOffset: number,
    offsetBytes: number,
    lengthBytes: number,
  ): Promise<void> {
    let done = 0;
    while (done < lengthBytes) {
      const at = placeOffset + done;
      const count = await readOnce(this.name, this.fd, place, at, lengthBytes - done, offsetBytes + done);
      done += count;
      if (count === 0 || count % BLOCK !== 0) break;
    }
    place.fill(0, placeOffset + done, placeOffset + lengthBytes);
  }

  private readBlocksSync(
    place: Uint8Array,
    placeOffset: number,
    offsetBytes: number,
    lengthBytes: number,
  ): void {
    let done = 0;
    while (done < lengthBytes) {
      const at = placeOffset + done;
      const count = readOnceSync(this.name, this.fd, place, at, lengthBytes - done, offsetBytes + done);
      done += count;
      if (count === 0 || count % BLOCK !== 0) break;
    }
    place.fill(0, placeOffset + done, placeOffset + lengthBytes);
  }

  private takeBuffer(): Promise<Uint8Array> {
    if (this.freeBuffers === undefined) {
      const memory = pageAlignedMemory(BOUNCE_BYTES * BOUNCE_COUNT);
      this.freeBuffers = Array.from({ length: BOUNCE_COUNT }, (_, index) =>
        memory.subarray(index * BOUNCE_BYTES, (index + 1) * BOUNCE_BYTES),
      );
    }
    const buffer = this.freeBuffers.pop();
    if (buffer !== undefined) return Promise.resolve(buffer);
    return new Promise((resolve) => this.waiters.push(resolve));
  }

  private giveBuffer(buffer: Uint8Array): void {
    const waiter = this.waiters.shift();
    if (waiter !== undefined) waiter(buffer);
    else this.freeBuffers?.push(buffer);
  }
}

/** Only shared memory can be page-aligned here; whether it is, the kernel says (EINVAL if not). */
function isAligned(
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): boolean {
  return (
    (buffer.byteOffset + bufferOffset) % BLOCK === 0 &&
    lengthBytes % BLOCK === 0 &&
    offsetBytes % BLOCK === 0 &&
    buffer.buffer instanceof SharedArrayBuffer
  );
}

function isRefusedAlignment(error: unknown): boolean {
  return error instanceof CowcatcherError && error.errno === "EINVAL";
}
