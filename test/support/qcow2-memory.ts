// A qcow2 image's file in memory, for tests: every access can be made to wait some turns of the event loop, and
// writes and syncs are logged, so that a crash can be staged at any moment (Crash, below).

import { setImmediate as nextTurn } from "node:timers/promises";
import type { BlockStatus, Completion, FrozenSource, Image } from "../../src/block/device.js";
import type { QcowFile } from "../../src/image/qcow2/format/file.js";

/** `file` is its name: two files may share one log. */
export type FileEvent =
  | { kind: "write"; file: string; offsetBytes: number; bytes: Uint8Array }
  | { kind: "sync-begins"; file: string }
  /** `begins` is the index of the event with which it began. */
  | { kind: "sync-done"; file: string; begins: number }
  | { kind: "mark"; label: string };

/** Turns of the event loop that the next access waits; 0: it is done at once. */
export type Latency = () => number;

async function wait(turns: number): Promise<void> {
  for (let turn = 0; turn < turns; turn++) await nextTurn();
}

export class MemoryFile implements QcowFile {
  readonly fd = -1;
  readonly isBlockDevice = false;
  private bytes: Buffer;
  endOffset: number;
  /** The next write from here on fails with this, once. */
  failNextWrite: Error | undefined;
  failNextSync: Error | undefined;

  constructor(
    content: Uint8Array,
    readonly name = "memory.qcow2",
    private readonly latency: Latency = () => 0,
    readonly log: FileEvent[] = [],
  ) {
    this.bytes = Buffer.from(content);
    this.endOffset = content.length;
  }

  content(): Buffer {
    return Buffer.from(this.bytes.subarray(0, this.endOffset));
  }

  mark(label: string): void {
    this.log.push({ kind: "mark", label });
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const turns = this.latency();
    if (turns > 0) {
      return wait(turns).then(() => this.readSync(buffer, bufferOffset, lengthBytes, offsetBytes));
    }
    this.readSync(buffer, bufferOffset, lengthBytes, offsetBytes);
    return undefined;
  }

  readSync(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    const stored = this.bytes.subarray(0, this.endOffset).subarray(offsetBytes, offsetBytes + lengthBytes);
    buffer.set(stored, bufferOffset);
    buffer.fill(0, bufferOffset + stored.length, bufferOffset + lengthBytes);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const turns = this.latency();
    if (turns > 0) {
      return wait(turns).then(() => this.store(buffer, bufferOffset, lengthBytes, offsetBytes));
    }
    this.store(buffer, bufferOffset, lengthBytes, offsetBytes);
    return undefined;
  }

  private store(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    const failure = this.failNextWrite;
    this.failNextWrite = undefined;
    if (failure !== undefined) throw failure;
    const bytes = buffer.slice(bufferOffset, bufferOffset + lengthBytes);
    this.log.push({ kind: "write", file: this.name, offsetBytes, bytes });
    const end = offsetBytes + lengthBytes;
    if (end > this.bytes.length) {
      this.bytes = Buffer.concat([
        this.bytes,
        Buffer.alloc(Math.max(end, this.bytes.length * 2) - this.bytes.length),
      ]);
    }
    this.bytes.set(bytes, offsetBytes);
    this.endOffset = Math.max(this.endOffset, end);
  }

  async sync(): Promise<void> {
    const begins = this.log.length;
    this.log.push({ kind: "sync-begins", file: this.name });
    await wait(this.latency());
    const failure = this.failNextSync;
    this.failNextSync = undefined;
    if (failure !== undefined) throw failure;
    this.log.push({ kind: "sync-done", file: this.name, begins });
  }

  async close(): Promise<void> {
    // Nothing was opened.
  }
}

/**
 * The file of a name after a crash at `eventCount` events: what a completed sync of it covers is there; of the rest
 * `keeps` decides sector by sector.
 */
export function crashedContent(
  initial: Uint8Array,
  log: readonly FileEvent[],
  eventCount: number,
  keeps: () => boolean,
  file = "memory.qcow2",
): Buffer {
  let durable = 0;
  for (const event of log.slice(0, eventCount)) {
    if (event.kind === "sync-done" && event.file === file) durable = Math.max(durable, event.begins);
  }
  let bytes = Buffer.from(initial);
  log.slice(0, eventCount).forEach((event, index) => {
    if (event.kind !== "write" || event.file !== file) return;
    const end = event.offsetBytes + event.bytes.length;
    const wholeIsKept = index < durable;
    for (let at = 0; at < event.bytes.length;) {
      const toBoundary = 512 - ((event.offsetBytes + at) % 512);
      const count = Math.min(toBoundary, event.bytes.length - at);
      if (wholeIsKept || keeps()) {
        if (end > bytes.length) bytes = Buffer.concat([bytes, Buffer.alloc(end - bytes.length)]);
        bytes.set(event.bytes.subarray(at, at + count), event.offsetBytes + at);
      }
      at += count;
    }
  });
  return bytes;
}

/** A backing image in memory. Read-only. */
export class MemoryImage implements Image {
  readonly name = "memory.raw";
  readonly path = "memory.raw";
  readonly format = "raw";
  readonly probed = false;
  readonly backing = null;
  readonly files = [];
  readonly readOnly = true;
  readonly clusterSizeBytes = 0;
  readonly sizeBytes: number;

  constructor(
    private readonly bytes: Buffer,
    private readonly latency: Latency = () => 0,
  ) {
    this.sizeBytes = bytes.length;
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    if (offsetBytes + lengthBytes > this.sizeBytes) throw new Error("read beyond the backing image");
    const turns = this.latency();
    const copy = (): void => {
      buffer.set(this.bytes.subarray(offsetBytes, offsetBytes + lengthBytes), bufferOffset);
    };
    if (turns > 0) return wait(turns).then(copy);
    copy();
    return undefined;
  }

  write(): Completion {
    throw new Error("the backing image is read-only");
  }
  writeZeroes(): Completion {
    throw new Error("the backing image is read-only");
  }
  discard(): Completion {
    throw new Error("the backing image is read-only");
  }
  flush(): Completion {
    return undefined;
  }
  blockStatus(_offsetBytes: number, lengthBytes: number): BlockStatus {
    return { lengthBytes, zero: false, data: true, depth: 0, present: true, compressed: false };
  }
  freeze(): FrozenSource {
    const description = { format: "null" as const, name: this.name, sizeBytes: this.sizeBytes };
    return { description, release: () => undefined };
  }
  async close(): Promise<void> {
    // Nothing was opened.
  }
}

/** A small reproducible generator: integers in [0, limit). */
export function randomFrom(seed: number): (limit: number) => number {
  let state = (seed * 2654435761 + 88675123) >>> 0;
  return (limit) => {
    state ^= state << 13;
    state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state % limit;
  };
}
