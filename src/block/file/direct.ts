// O_DIRECT for requests of any alignment.
//
// The kernel takes aligned offsets, lengths and addresses only. A request that is so already goes straight to the
// device. Any other goes through a bounce buffer; a write then reads the blocks that it covers in part, lays the
// new bytes over them and writes whole blocks back. In between, another write to those blocks would be lost, so
// every write holds the blocks that it touches (RangeLock), aligned ones too. Reads hold nothing.
//
// Two kinds of file. A raw image has a fixed size: where that is no multiple of the alignment, its end cannot be
// written in whole blocks without growing the file, so that last piece goes through a second, buffered descriptor; the
// kernel keeps the two coherent, as no block is ever written both ways and a direct read waits for dirty pages in its
// way. The file of a qcow2 image grows, by whole blocks, and has no such end.
//
// Order of waiting: first the range, then a bounce buffer, then the device. Whoever has a bounce buffer waits for
// the device only, so no circle can form. Main thread only, but for readDirectSync; how the requests get to the device is
// direct-io.ts's matter.

import { constants } from "node:fs";
import { CowcatcherError } from "../../errors.js";
import { beginsPage } from "../../native/pages.js";
import { roundDown, roundUp } from "../../units.js";
import { BouncePool } from "./bounce-pool.js";
import { DirectIo } from "./direct-io.js";
import { cutShortError } from "./file-end.js";
import { DIRECT_ALIGNMENT_BYTES, closeFile, openFile, readOnceSync, writeFully } from "./fileio.js";
import { RangeLock } from "./range-lock.js";

/**
 * A file that is open with O_DIRECT, for requests of any alignment, in bytes. Main thread only; rejects
 * with CowcatcherError IO or NO_SPACE.
 */
export class DirectFile {
  private readonly ranges = new RangeLock();
  private readonly bounces = new BouncePool();
  private inFlightCount = 0;
  private onIdle: (() => void) | null = null;
  /** Start of the last, incomplete block; sizeBytes where there is none. */
  private readonly tailStart: number;

  /**
   * @param sizeBytes Infinity for a file that grows
   * @param endOffset up to where the file has bytes: one that ends sooner has been cut short
   */
  private constructor(
    private readonly name: string,
    private readonly io: DirectIo,
    sizeBytes: number,
    private readonly tailFd: number | null,
    private readonly endOffset: () => number,
  ) {
    this.tailStart = roundDown(sizeBytes, DIRECT_ALIGNMENT_BYTES);
  }

  /** @param fd open with O_DIRECT; stays the caller's. @param endOffset asked at each read */
  static growing(
    name: string,
    fd: number,
    endOffset: () => number,
    io: DirectIo = new DirectIo(name, fd),
  ): DirectFile {
    return new DirectFile(name, io, Infinity, null, endOffset);
  }

  /** @param fd open with O_DIRECT; stays the caller's. @throws CowcatcherError IO */
  static async open(name: string, fd: number, sizeBytes: number, readOnly: boolean): Promise<DirectFile> {
    const needsTail = !readOnly && sizeBytes % DIRECT_ALIGNMENT_BYTES !== 0;
    const tailFd = needsTail ? await openFile(`/proc/self/fd/${fd}`, constants.O_RDWR) : null;
    return new DirectFile(name, new DirectIo(name, fd), sizeBytes, tailFd, () => sizeBytes);
  }

  /** Waits for what is in flight. `fd` stays open. */
  async close(): Promise<void> {
    if (this.inFlightCount > 0) {
      await new Promise<void>((resolve) => {
        this.onIdle = resolve;
      });
    }
    await this.io.close();
    if (this.tailFd !== null) await closeFile(this.tailFd);
  }

  /** fdatasync. @throws what the system gave */
  async sync(): Promise<void> {
    this.inFlightCount++;
    try {
      await this.io.syncData();
    } finally {
      this.ended();
    }
  }

  async read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    this.inFlightCount++;
    try {
      const isStraight = isAlignedRequest(buffer, bufferOffset, lengthBytes, offsetBytes);
      if (isStraight && (await this.readStraight(buffer, bufferOffset, lengthBytes, offsetBytes))) return;
      await this.readBounced(buffer, bufferOffset, lengthBytes, offsetBytes);
    } finally {
      this.ended();
    }
  }

  private ended(): void {
    this.inFlightCount--;
    if (this.inFlightCount === 0) this.onIdle?.();
  }

  private async readBounced(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const end = offsetBytes + lengthBytes;
    const taken = this.bounces.take(blockBytesOf(offsetBytes, end));
    const bounce = taken instanceof Promise ? await taken : taken;
    try {
      let at = offsetBytes;
      while (at < end) {
        const from = roundDown(at, DIRECT_ALIGNMENT_BYTES);
        const until = Math.min(from + bounce.length, roundUp(end, DIRECT_ALIGNMENT_BYTES));
        await this.readBlocks(bounce, 0, until - from, from);
        const count = Math.min(until, end) - at;
        buffer.set(bounce.subarray(at - from, at - from + count), bufferOffset + (at - offsetBytes));
        at += count;
      }
    } finally {
      this.bounces.giveBack(bounce);
    }
  }

  /** Holds the range against other writes, those of whole blocks around a part included, while `action` runs. */
  async exclusively(offsetBytes: number, lengthBytes: number, action: () => Promise<void>): Promise<void> {
    const from = roundDown(offsetBytes, DIRECT_ALIGNMENT_BYTES);
    const end = roundUp(offsetBytes + lengthBytes, DIRECT_ALIGNMENT_BYTES);
    this.inFlightCount++;
    const range = this.ranges.tryHold(from, end) ?? (await this.ranges.hold(from, end));
    try {
      await action();
    } finally {
      this.ranges.release(range);
      this.ended();
    }
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Promise<void> {
    return this.exclusively(offsetBytes, lengthBytes, () =>
      this.writeHeld(buffer, bufferOffset, lengthBytes, offsetBytes),
    );
  }

  /** The caller holds the range (`exclusively`). */
  async writeHeld(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const bodyBytes = Math.max(0, Math.min(offsetBytes + lengthBytes, this.tailStart) - offsetBytes);
    if (bodyBytes > 0) await this.writeBody(buffer, bufferOffset, bodyBytes, offsetBytes);
    if (bodyBytes === lengthBytes || this.tailFd === null) return;
    const tailBytes = lengthBytes - bodyBytes;
    const tailAt = offsetBytes + bodyBytes;
    await writeFully(this.name, this.tailFd, buffer, bufferOffset + bodyBytes, tailBytes, tailAt);
  }

  private async writeBody(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const end = offsetBytes + lengthBytes;
    const isStraight = isAlignedRequest(buffer, bufferOffset, lengthBytes, offsetBytes);
    if (isStraight && (await this.writeStraight(buffer, bufferOffset, lengthBytes, offsetBytes))) return;
    const taken = this.bounces.take(blockBytesOf(offsetBytes, end));
    const bounce = taken instanceof Promise ? await taken : taken;
    try {
      let at = offsetBytes;
      while (at < end) {
        const from = roundDown(at, DIRECT_ALIGNMENT_BYTES);
        const until = Math.min(from + bounce.length, roundUp(end, DIRECT_ALIGNMENT_BYTES));
        const count = Math.min(until, end) - at;
        if (at > from || at + count < until)
          await this.readPartialBlocks(bounce, from, until, at, at + count);
        const source = bufferOffset + (at - offsetBytes);
        bounce.set(buffer.subarray(source, source + count), at - from);
        await this.io.writeFully(bounce, 0, until - from, from);
        at += count;
      }
    } finally {
      this.bounces.giveBack(bounce);
    }
  }

  /** Fills the blocks of [from, until) that [at, end) covers in part: the first, the last or neither. */
  private async readPartialBlocks(
    bounce: Uint8Array,
    from: number,
    until: number,
    at: number,
    end: number,
  ): Promise<void> {
    const lastBlock = until - DIRECT_ALIGNMENT_BYTES;
    const isFirstRead = at > from;
    if (isFirstRead) await this.readBlocks(bounce, 0, DIRECT_ALIGNMENT_BYTES, from);
    if (end === until || (isFirstRead && lastBlock === from)) return;
    await this.readBlocks(bounce, lastBlock - from, DIRECT_ALIGNMENT_BYTES, lastBlock);
  }

  /**
   * Whole blocks; what lies past the end of the file reads as zeroes, and an end that comes too soon is an error. A
   * read that ends within a block has met that end:
   * going on from there would be refused.
   */
  private async readBlocks(
    place: Uint8Array,
    placeOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    let done = 0;
    while (done < lengthBytes) {
      const at = placeOffset + done;
      const count = await this.io.readOnce(place, at, lengthBytes - done, offsetBytes + done);
      done += count;
      if (count === 0 || !isAligned(count)) break;
    }
    clearPastEnd(this.name, place, placeOffset, lengthBytes, offsetBytes, done, this.endOffset());
  }

  /** @returns false where the device wants more alignment of the memory than this one has. */
  private async readStraight(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<boolean> {
    try {
      await this.readBlocks(buffer, bufferOffset, lengthBytes, offsetBytes);
      return true;
    } catch (error) {
      if (isRefusedAlignment(error)) return false;
      throw error;
    }
  }

  private async writeStraight(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<boolean> {
    try {
      await this.io.writeFully(buffer, bufferOffset, lengthBytes, offsetBytes);
      return true;
    } catch (error) {
      if (isRefusedAlignment(error)) return false;
      throw error;
    }
  }
}

/**
 * As DirectFile's read of a file that grows, blocking the thread. Any thread.
 * @param endOffset up to where the file has bytes
 * @param bounce page-aligned memory of whole blocks, at least one
 * @throws CowcatcherError IO, also where the file ends before `endOffset`
 */
export function readDirectSync(
  name: string,
  fd: number,
  endOffset: number,
  bounce: Uint8Array,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): void {
  const end = offsetBytes + lengthBytes;
  if (isAlignedRequest(buffer, bufferOffset, lengthBytes, offsetBytes)) {
    try {
      readBlocksSync(name, fd, endOffset, buffer, bufferOffset, lengthBytes, offsetBytes);
      return;
    } catch (error) {
      if (!isRefusedAlignment(error)) throw error;
    }
  }
  for (let at = offsetBytes; at < end;) {
    const from = roundDown(at, DIRECT_ALIGNMENT_BYTES);
    const until = Math.min(from + bounce.length, roundUp(end, DIRECT_ALIGNMENT_BYTES));
    readBlocksSync(name, fd, endOffset, bounce, 0, until - from, from);
    const count = Math.min(until, end) - at;
    buffer.set(bounce.subarray(at - from, at - from + count), bufferOffset + (at - offsetBytes));
    at += count;
  }
}

/** As DirectFile.readBlocks. */
function readBlocksSync(
  name: string,
  fd: number,
  endOffset: number,
  place: Uint8Array,
  placeOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): void {
  let done = 0;
  while (done < lengthBytes) {
    const count = readOnceSync(name, fd, place, placeOffset + done, lengthBytes - done, offsetBytes + done);
    done += count;
    if (count === 0 || !isAligned(count)) break;
  }
  clearPastEnd(name, place, placeOffset, lengthBytes, offsetBytes, done, endOffset);
}

/** Of a read that got `done` bytes: the rest is zeroes if it lies past the end. @throws CowcatcherError IO if not */
function clearPastEnd(
  name: string,
  place: Uint8Array,
  placeOffset: number,
  lengthBytes: number,
  offsetBytes: number,
  done: number,
  endOffset: number,
): void {
  if (offsetBytes + done < Math.min(offsetBytes + lengthBytes, endOffset)) {
    throw cutShortError(name, offsetBytes + done, endOffset);
  }
  place.fill(0, placeOffset + done, placeOffset + lengthBytes);
}

function isAligned(value: number): boolean {
  return value % DIRECT_ALIGNMENT_BYTES === 0;
}

/** Offset, length and memory are whole blocks. */
function isAlignedRequest(
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): boolean {
  if (!isAligned(offsetBytes) || !isAligned(lengthBytes)) return false;
  return beginsPage(buffer.buffer, buffer.byteOffset + bufferOffset);
}

/** Of the blocks that [offsetBytes, end) lies in. */
function blockBytesOf(offsetBytes: number, end: number): number {
  return roundUp(end, DIRECT_ALIGNMENT_BYTES) - roundDown(offsetBytes, DIRECT_ALIGNMENT_BYTES);
}

function isRefusedAlignment(error: unknown): boolean {
  return error instanceof CowcatcherError && error.errno === "EINVAL";
}
