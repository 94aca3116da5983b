// O_DIRECT: offsets, lengths and memory in multiples of 4 KiB; everything else goes through bounce buffers.
//
// A write that does not cover whole blocks reads its first and last block, changes them and writes all (a
// read-modify-write). Two such writes to one block would undo each other, so a write waits for every write in
// flight that touches one of its blocks. Bounce buffers are a fixed pool in page-aligned memory; a request that
// finds none waits its turn. Main thread only.

import * as fs from "node:fs";
import { errnoOf, ioError } from "../../errors.js";
import { MiB, roundDown, roundUp } from "../../units.js";
import type { Completion } from "../device.js";
import { closeFd, fdatasync, fileFacts, readFully, type QcowFile } from "./file.js";

const BLOCK = 4096;
const BOUNCE_BYTES = 1 * MiB;
const BOUNCE_COUNT = 8;
const WASM_PAGE = 65536;

interface WriteInFlight {
  start: number;
  end: number;
  done: Promise<void>;
}

/** Page-aligned memory of at least lengthBytes (a shared WebAssembly memory is). */
export function alignedBuffer(lengthBytes: number): Uint8Array {
  const pages = Math.ceil(lengthBytes / WASM_PAGE);
  return new Uint8Array(new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true }).buffer);
}

export class DirectFile implements QcowFile {
  readonly isBlockDevice: boolean;
  endOffset: number;
  private readonly freeBuffers: Uint8Array[] = [];
  private readonly waiters: ((buffer: Uint8Array) => void)[] = [];
  private writesInFlight: WriteInFlight[] = [];
  private syncBuffer: Uint8Array | undefined;

  constructor(
    readonly fd: number,
    readonly name: string,
  ) {
    const facts = fileFacts(fd, name);
    this.isBlockDevice = facts.isBlockDevice;
    this.endOffset = facts.sizeBytes;
    const memory = alignedBuffer(BOUNCE_BYTES * BOUNCE_COUNT);
    for (let index = 0; index < BOUNCE_COUNT; index++) {
      this.freeBuffers.push(memory.subarray(index * BOUNCE_BYTES, (index + 1) * BOUNCE_BYTES));
    }
  }

  async read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    if (isAligned(buffer, bufferOffset, lengthBytes, offsetBytes)) {
      try {
        const done = await readFully(this.fd, buffer, bufferOffset, lengthBytes, offsetBytes, this.name);
        buffer.fill(0, bufferOffset + done, bufferOffset + lengthBytes);
        return;
      } catch (cause) {
        if (!isEinval(cause)) throw cause; // EINVAL: the memory is not aligned after all
      }
    }
    const bounce = await this.takeBuffer();
    try {
      for (let done = 0; done < lengthBytes; ) {
        const start = roundDown(offsetBytes + done, BLOCK);
        const skip = offsetBytes + done - start;
        const count = Math.min(lengthBytes - done, BOUNCE_BYTES - skip);
        await this.readBlocks(bounce, start, roundUp(skip + count, BLOCK));
        buffer.set(bounce.subarray(skip, skip + count), bufferOffset + done);
        done += count;
      }
    } finally {
      this.giveBuffer(bounce);
    }
  }

  private async readBlocks(bounce: Uint8Array, offsetBytes: number, lengthBytes: number): Promise<void> {
    const done = await readFully(this.fd, bounce, 0, lengthBytes, offsetBytes, this.name);
    bounce.fill(0, done, lengthBytes);
  }

  readSync(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    const bounce = (this.syncBuffer ??= alignedBuffer(BOUNCE_BYTES));
    for (let done = 0; done < lengthBytes; ) {
      const start = roundDown(offsetBytes + done, BLOCK);
      const skip = offsetBytes + done - start;
      const count = Math.min(lengthBytes - done, BOUNCE_BYTES - skip);
      const length = roundUp(skip + count, BLOCK);
      let read = 0;
      try {
        read = fs.readSync(this.fd, bounce, 0, length, start);
      } catch (cause) {
        throw ioError("read", this.name, cause, start);
      }
      bounce.fill(0, read, length);
      buffer.set(bounce.subarray(skip, skip + count), bufferOffset + done);
      done += count;
    }
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const start = roundDown(offsetBytes, BLOCK);
    const end = roundUp(offsetBytes + lengthBytes, BLOCK);
    const before = this.writesInFlight.filter((other) => other.start < end && start < other.end);
    const done = this.writeAfter(before, buffer, bufferOffset, lengthBytes, offsetBytes);
    const entry: WriteInFlight = { start, end, done };
    this.writesInFlight.push(entry);
    return done.finally(() => {
      this.writesInFlight.splice(this.writesInFlight.indexOf(entry), 1);
    });
  }

  private async writeAfter(
    before: WriteInFlight[],
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    await Promise.allSettled(before.map(({ done }) => done));
    if (isAligned(buffer, bufferOffset, lengthBytes, offsetBytes)) {
      try {
        await this.writeBlocks(buffer, bufferOffset, lengthBytes, offsetBytes);
        return;
      } catch (cause) {
        if (!isEinval(cause)) throw cause;
      }
    }
    const bounce = await this.takeBuffer();
    try {
      for (let done = 0; done < lengthBytes; ) {
        const start = roundDown(offsetBytes + done, BLOCK);
        const skip = offsetBytes + done - start;
        const count = Math.min(lengthBytes - done, BOUNCE_BYTES - skip);
        const length = roundUp(skip + count, BLOCK);
        if (skip !== 0 || count !== length) await this.readBlocks(bounce, start, length);
        bounce.set(buffer.subarray(bufferOffset + done, bufferOffset + done + count), skip);
        await this.writeBlocks(bounce, 0, length, start);
        done += count;
      }
    } finally {
      this.giveBuffer(bounce);
    }
  }

  private async writeBlocks(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    let done = 0;
    while (done < lengthBytes) {
      done += await new Promise<number>((resolve, reject) => {
        fs.write(this.fd, buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done, (error, count) =>
          error ? reject(ioError("write", this.name, error, offsetBytes + done)) : resolve(count),
        );
      });
    }
    this.endOffset = Math.max(this.endOffset, offsetBytes + lengthBytes);
  }

  sync(): Promise<void> {
    return fdatasync(this.fd, this.name);
  }

  close(): Promise<void> {
    return closeFd(this.fd, this.name);
  }

  private takeBuffer(): Promise<Uint8Array> {
    const buffer = this.freeBuffers.pop();
    if (buffer !== undefined) return Promise.resolve(buffer);
    return new Promise((resolve) => this.waiters.push(resolve));
  }

  private giveBuffer(buffer: Uint8Array): void {
    const waiter = this.waiters.shift();
    if (waiter !== undefined) waiter(buffer);
    else this.freeBuffers.push(buffer);
  }
}

/** Only shared memory can be page-aligned here; whether it is, the kernel says (EINVAL if not). */
function isAligned(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): boolean {
  return (
    (buffer.byteOffset + bufferOffset) % BLOCK === 0 &&
    lengthBytes % BLOCK === 0 &&
    offsetBytes % BLOCK === 0 &&
    buffer.buffer instanceof SharedArrayBuffer
  );
}

function isEinval(cause: unknown): boolean {
  return errnoOf(cause) === "EINVAL" || (cause as { errno?: unknown }).errno === "EINVAL";
}
