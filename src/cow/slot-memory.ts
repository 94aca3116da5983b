// Where the slots of the copy-before-write buffer are. The first ones are shared memory, which a capture is read into and a
// worker copies out of. Those behind stand in a file in memory (memfd_create) that nobody maps: a capture is written to it and
// a worker reads it.
//
//   slot 0 ........................ mapped ........................ end of the buffer
//   shared memory, kept from job    │ file in memory, of this job alone: its pages come
//   to job, made ready once         │ with the write that fills them, and go with the job
//
// Why. Memory that a process has mapped and not touched yet has no pages, and each first touch traps: into the kernel, and
// in a virtual machine that keeps shadow page tables, into its host. 20 µs a page were measured there, 0.15 ms of a guest's
// write of 32 KiB, and 12 µs even where the kernel has filled the page tables in bulk. A write to a file in memory never touches
// a mapping: 0.3 µs a page more than to one that is there already. What it costs is a copy: a capture is read into memory that is
// in the cache, and written from there. So the captures of a guest that writes at leisure take the mapped slots again and again
// (slots.ts gives them out first), and a burst that needs more than those takes the file.

import { errnoName } from "../errno.js";
import { CowcatcherError } from "../errors.js";
import { copyBytes, EINTR, libc } from "../native/libc.js";
import { newPageWords } from "./buffer-pages.js";
import type { PageMemory } from "./page-memory.js";
import { isZero } from "./zero.js";
import { BLOCK_BYTES, SLOT_BYTES } from "./geometry.js";
import { MiB } from "../units.js";

/** Mapped of a buffer whose rest may be a file. */
export const MAPPED_BYTES_MAX = 32 * MiB;

/** The buffer's memory, plain data for other threads of this process. */
export interface BufferMemory {
  /** Page-aligned; may be longer than the job's buffer, as it is kept from job to job. */
  memory: PageMemory;
  /** Which of its pages are ready (buffer-pages.ts). */
  pages: SharedArrayBuffer;
  /** Has the slots that lie behind `memory`; -1: `memory` has all. */
  fileFd: number;
}

/** A buffer that is mapped as a whole, and of which no page is known to be ready. */
export function memoryAlone(memory: PageMemory): BufferMemory {
  return { memory, pages: newPageWords(), fileFd: -1 };
}

/** Of a job that captures nothing. */
export const NO_BUFFER: BufferMemory = memoryAlone(new Uint8Array(new SharedArrayBuffer(0)));

/** Of a buffer of so many bytes, how many are mapped: whole slots. */
export function mappedBytesOf({ memory, fileFd }: BufferMemory, bufferBytes: number): number {
  if (fileFd < 0) return bufferBytes;
  return Math.min(bufferBytes, Math.floor(memory.length / SLOT_BYTES) * SLOT_BYTES);
}

/** A file in memory for slots, or -1 where the system has none. Closing it frees them. */
export function createSlotFile(): number {
  return Math.max(-1, libc?.createMemoryFile("cowcatcher-buffer") ?? -1);
}

/** One thread's hands on the slots. Ranges are bytes of the buffer, within one slot. */
export class SlotMemory {
  /** Shared memory from the buffer's first byte on. */
  readonly mapped: PageMemory;
  readonly #mappedBytes: number;
  readonly #fileFd: number;
  #scratch: Uint8Array<ArrayBuffer> | undefined;

  constructor(buffer: BufferMemory, bufferBytes: number) {
    this.mapped = buffer.memory;
    this.#mappedBytes = mappedBytesOf(buffer, bufferBytes);
    this.#fileFd = buffer.fileFd;
  }

  /** Whether the slot is a part of `mapped`. */
  isMapped(offsetBytes: number): boolean {
    return offsetBytes < this.#mappedBytes;
  }

  /** @throws CowcatcherError IO */
  read(offsetBytes: number, target: Uint8Array, targetOffset: number, lengthBytes: number): void {
    if (this.isMapped(offsetBytes)) {
      copyBytes(target, targetOffset, this.mapped, offsetBytes, lengthBytes);
      return;
    }
    const { buffer, byteOffset } = target;
    const count = again(() =>
      libc?.pread(this.#fileFd, buffer, byteOffset + targetOffset, lengthBytes, offsetBytes),
    );
    if (count !== lengthBytes) throw memoryError("read", count);
  }

  /** Of a slot that is not mapped. @throws CowcatcherError IO where the system gives no more memory. */
  write(source: Uint8Array, sourceOffset: number, lengthBytes: number, offsetBytes: number): void {
    const { buffer, byteOffset } = source;
    const count = again(() =>
      libc?.pwrite(this.#fileFd, buffer, byteOffset + sourceOffset, lengthBytes, offsetBytes),
    );
    if (count !== lengthBytes) throw memoryError("write", count);
  }

  /** Whether the block there is zero. */
  isZeroBlock(offsetBytes: number): boolean {
    if (this.isMapped(offsetBytes)) return isZero(this.mapped, offsetBytes, offsetBytes + BLOCK_BYTES);
    this.#scratch ??= new Uint8Array(BLOCK_BYTES);
    this.read(offsetBytes, this.#scratch, 0, BLOCK_BYTES);
    return isZero(this.#scratch, 0, BLOCK_BYTES);
  }
}

/** io_uring's task work ends calls of tmpfs's before they have done anything (native/libc.ts). */
function again(call: () => number | undefined): number | undefined {
  for (;;) {
    const count = call();
    if (count !== -EINTR) return count;
  }
}

function memoryError(action: string, result = 0): CowcatcherError {
  return new CowcatcherError({
    code: "IO",
    object: "--cow-buffer-size",
    problem: `cannot ${action} the buffer's memory (${result < 0 ? errnoName(result) : `${result} bytes done`})`,
    hint: "give less, or raise the limits of memory and file size (ulimit -f, the container's)",
  });
}
