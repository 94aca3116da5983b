// Raw images: regular files and block devices, byte for byte.
//
// Main thread. What the page cache can do at once is done at once: a read that preadv2(RWF_NOWAIT) can serve, a
// write of up to SYNC_LIMIT_BYTES. A read that would wait for the disk goes to libuv's pool, and so do requests so
// large that copying them would hold up the event loop. So do the large reads of a turn of the event loop but for its
// first: who asks for several at a time gets them copied by two processors, who waits for each gets it at once (through
// the pool it would take a fifth longer). With O_DIRECT everything goes to the pool (direct.ts).
// On tmpfs RWF_NOWAIT is unknown, but nothing there ever waits: reads are plain preads.
//
// The size is fixed at opening. What someone cuts off a file meanwhile is an error where it is read, and so is the
// shorter length itself at a flush, at T0 and when a copy is done (block/file/file-end.ts). While a copy goes on, each
// write looks at the length first: past the new end it would let the file grow again, and zeroes stand in between.
// A write into the first sector of a probed image passes the guard first (image/probe-guard.ts); from there to the system
// call nothing else runs, unless the file is O_DIRECT, where the range is held instead.

import * as fs from "node:fs";
import { constants } from "node:os";
import { CowcatcherError, ioError, toCowcatcherError } from "../errors.js";
import { libc } from "../native/libc.js";
import { sendFile } from "../native/send-file.js";
import { KiB, MiB } from "../units.js";
import type {
  BlockStatus,
  Completion,
  FileRange,
  FrozenSource,
  Image,
  ImageFile,
  WriteZeroesOptions,
} from "../block/device.js";
import { DirectFile } from "../block/file/direct.js";
import { sizeOf } from "../block/file/device-size.js";
import { assertNotCut, cutShortError, fileEnd } from "../block/file/file-end.js";
import {
  closeFile,
  errnoError,
  FileExtents,
  readFirstBytes,
  readFully,
  readFullySync,
  syncFileData,
  writeFully,
  writeFullySync,
} from "../block/file/fileio.js";
import { PROBE_BYTES } from "./probe.js";
import { ProbeGuard } from "./probe-guard.js";

/** Copying this much takes well under a millisecond. */
const SYNC_LIMIT_BYTES = 1 * MiB;
/** A read that is worth the way to another thread, where that can copy while this one does something else. */
const LARGE_READ_BYTES = 128 * KiB;
/** Up to here zeroes are written, rather than asked of fallocate: on older kernels that waits for dirty pages. */
const WRITTEN_ZEROES_BYTES = 64 * KiB;
/** One fallocate call; between two the event loop runs. */
const FALLOCATE_PIECE_BYTES = 16 * MiB;
const ZEROES = new Uint8Array(256 * KiB);

const MEMORY_FILE_SYSTEMS = new Set([0x01021994 /* tmpfs */, 0x858458f6 /* ramfs */]);
const NOWAIT_UNSUPPORTED = new Set([
  -constants.errno.EOPNOTSUPP,
  -constants.errno.EINVAL,
  -constants.errno.ENOSYS,
]);
const FALLOCATE_UNSUPPORTED = new Set([
  -constants.errno.EOPNOTSUPP,
  -constants.errno.ENOSYS,
  -constants.errno.ENODEV,
  // Block devices want whole logical blocks.
  -constants.errno.EINVAL,
]);

export interface RawImageOptions {
  path: string;
  name: string;
  /** Becomes the image's: `close` closes it. */
  fd: number;
  readOnly: boolean;
  /** `fd` was opened with O_DIRECT. */
  direct: boolean;
  probed: boolean;
}

/** @throws CowcatcherError IO. On failure `fd` stays the caller's. */
export async function openRaw(options: RawImageOptions): Promise<RawImage> {
  const { name, fd, readOnly } = options;
  try {
    const sizeBytes = sizeOf(name, fd, fs.fstatSync(fd));
    const directFile = options.direct ? await DirectFile.open(name, fd, sizeBytes, readOnly) : null;
    return new RawImage(options, sizeBytes, directFile);
  } catch (error) {
    throw ioError("open", name, error);
  }
}

export class RawImage implements Image {
  readonly path: string;
  readonly name: string;
  readonly readOnly: boolean;
  readonly probed: boolean;
  readonly format = "raw" as const;
  readonly clusterSizeBytes = 0;
  readonly backing = null;
  private readonly fd: number;
  private readonly guard: ProbeGuard | null;
  private readonly isInMemory: boolean;
  private readonly isBlockDevice: boolean;
  private canReadNowait = libc !== null;
  /** What fallocate can do with this file, as far as known. */
  private canPunch: boolean | undefined;
  private canZeroRange = false;
  private flushError: CowcatcherError | null = null;
  private readonly extents: FileExtents;
  /** Copies that read the file as it was at their T0. */
  private freezeCount = 0;
  /** In this turn of the event loop a large read was made at once. */
  private hasReadLarge = false;

  constructor(
    options: RawImageOptions,
    readonly sizeBytes: number,
    private readonly directFile: DirectFile | null,
  ) {
    const { path, name, fd, readOnly, probed } = options;
    this.path = path;
    this.name = name;
    this.fd = fd;
    this.readOnly = readOnly;
    this.probed = probed;
    this.extents = new FileExtents(fd);
    this.isBlockDevice = fs.fstatSync(fd).isBlockDevice();
    this.isInMemory = directFile === null && isOnMemoryFileSystem(fd);
    this.guard =
      probed && !readOnly ? new ProbeGuard(name, () => readFirstBytes(name, fd, PROBE_BYTES)) : null;
  }

  get files(): readonly ImageFile[] {
    return [{ name: this.name, fd: this.fd }];
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    if (this.directFile !== null) {
      return this.directFile.read(buffer, bufferOffset, lengthBytes, offsetBytes);
    }
    let done = 0;
    if (lengthBytes <= LARGE_READ_BYTES || (lengthBytes <= SYNC_LIMIT_BYTES && this.isFirstLargeRead())) {
      if (this.isInMemory) return this.readNow(buffer, bufferOffset, lengthBytes, offsetBytes);
      done = this.readCached(buffer, bufferOffset, lengthBytes, offsetBytes);
      if (done === lengthBytes) return undefined;
    }
    return this.readLater(buffer, bufferOffset + done, lengthBytes - done, offsetBytes + done);
  }

  /** Of a file in memory alone: of any other nobody says which cached pages have been read, and which are being read. */
  cachedRange(offsetBytes: number, lengthBytes: number): FileRange | undefined {
    const { name, fd } = this;
    if (!this.isInMemory || sendFile() === null) return undefined;
    return fileEnd(name, fd) < offsetBytes + lengthBytes ? undefined : { fd, offsetBytes };
  }

  private isFirstLargeRead(): boolean {
    if (this.hasReadLarge) return false;
    this.hasReadLarge = true;
    setImmediate(() => {
      this.hasReadLarge = false;
    });
    return true;
  }

  /** @returns how many bytes the page cache had. Errors are left to the asynchronous read to find. */
  private readCached(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number {
    if (!this.canReadNowait || libc === null) return 0;
    const at = buffer.byteOffset + bufferOffset;
    const result = libc.readNowait(this.fd, buffer.buffer, at, lengthBytes, offsetBytes);
    if (NOWAIT_UNSUPPORTED.has(result)) this.canReadNowait = false;
    return Math.max(0, result);
  }

  private readNow(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Completion {
    try {
      const count = readFullySync(this.name, this.fd, buffer, bufferOffset, lengthBytes, offsetBytes);
      if (count < lengthBytes) throw cutShortError(this.name, offsetBytes + count, this.sizeBytes);
      return undefined;
    } catch (error) {
      return rejected(error);
    }
  }

  private async readLater(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const count = await readFully(this.name, this.fd, buffer, bufferOffset, lengthBytes, offsetBytes);
    if (count < lengthBytes) throw cutShortError(this.name, offsetBytes + count, this.sizeBytes);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    if (this.readOnly) return this.refuseReadOnly(offsetBytes);
    if (this.directFile !== null) {
      return this.writeDirect(this.directFile, buffer, bufferOffset, lengthBytes, offsetBytes);
    }
    const now = Math.min(lengthBytes, SYNC_LIMIT_BYTES);
    try {
      if (this.freezeCount > 0) this.assertNotCut();
      this.guard?.admit(buffer, bufferOffset, lengthBytes, offsetBytes);
      writeFullySync(this.name, this.fd, buffer, bufferOffset, now, offsetBytes);
    } catch (error) {
      this.guard?.markStale();
      return rejected(error);
    }
    if (now === lengthBytes) return undefined;
    return writeFully(this.name, this.fd, buffer, bufferOffset + now, lengthBytes - now, offsetBytes + now);
  }

  private writeDirect(
    file: DirectFile,
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    return file.exclusively(offsetBytes, lengthBytes, async () => {
      try {
        if (this.freezeCount > 0) this.assertNotCut();
        this.guard?.admit(buffer, bufferOffset, lengthBytes, offsetBytes);
        await file.writeHeld(buffer, bufferOffset, lengthBytes, offsetBytes);
      } catch (error) {
        this.guard?.markStale();
        throw error;
      }
    });
  }

  writeZeroes(offsetBytes: number, lengthBytes: number, { mayUnmap }: WriteZeroesOptions): Completion {
    if (this.readOnly) return this.refuseReadOnly(offsetBytes);
    if (lengthBytes <= WRITTEN_ZEROES_BYTES && !mayUnmap) {
      return this.write(ZEROES, 0, lengthBytes, offsetBytes);
    }
    const end = offsetBytes + lengthBytes;
    if (this.directFile !== null) {
      return this.directFile.exclusively(offsetBytes, lengthBytes, async () => {
        this.guard?.admit(null, 0, lengthBytes, offsetBytes);
        await this.zeroFrom(offsetBytes, end, mayUnmap);
      });
    }
    try {
      this.guard?.admit(null, 0, lengthBytes, offsetBytes);
    } catch (error) {
      return rejected(error);
    }
    return this.zeroFrom(offsetBytes, end, mayUnmap);
  }

  /**
   * Small ranges are written, which costs no more than data would. For others the file system must have shown that
   * it can: with holes at the first question, which frees nothing as it lies behind the end, without holes by an
   * earlier request. A block device may write zeroes itself.
   */
  canZeroFast(_offsetBytes: number, lengthBytes: number, { mayUnmap }: WriteZeroesOptions): boolean {
    if (libc === null || this.readOnly) return false;
    if (lengthBytes <= WRITTEN_ZEROES_BYTES && !mayUnmap) return true;
    if (this.isBlockDevice) return false;
    if (!mayUnmap) return this.canZeroRange;
    this.canPunch ??= libc.punchHole(this.fd, this.sizeBytes, WRITTEN_ZEROES_BYTES) >= 0;
    return this.canPunch;
  }

  /** The first piece at once, the others each in a turn of their own. */
  private zeroFrom(offsetBytes: number, end: number, mayUnmap: boolean): Completion {
    const pieceEnd = Math.min(end, offsetBytes + FALLOCATE_PIECE_BYTES);
    try {
      if (!this.fallocateZeroes(offsetBytes, pieceEnd - offsetBytes, mayUnmap)) {
        return this.writeZeroBytes(offsetBytes, end);
      }
    } catch (error) {
      this.guard?.markStale();
      return rejected(error);
    }
    return pieceEnd === end ? undefined : this.zeroRest(pieceEnd, end, mayUnmap);
  }

  private async zeroRest(offsetBytes: number, end: number, mayUnmap: boolean): Promise<void> {
    for (let at = offsetBytes; at < end; at += FALLOCATE_PIECE_BYTES) {
      await turnOfTheEventLoop();
      const pieceBytes = Math.min(end - at, FALLOCATE_PIECE_BYTES);
      if (!this.fallocateZeroes(at, pieceBytes, mayUnmap)) return this.writeZeroBytes(at, end);
    }
  }

  /** @returns false where the file system cannot. */
  private fallocateZeroes(offsetBytes: number, lengthBytes: number, mayUnmap: boolean): boolean {
    if (libc === null) return false;
    this.extents.forget();
    const result = mayUnmap
      ? libc.punchHole(this.fd, offsetBytes, lengthBytes)
      : libc.zeroRange(this.fd, offsetBytes, lengthBytes);
    if (!mayUnmap) this.canZeroRange = result >= 0;
    if (FALLOCATE_UNSUPPORTED.has(result)) return false;
    if (result < 0) throw errnoError("write zeroes", this.name, result, offsetBytes);
    return true;
  }

  private async writeZeroBytes(offsetBytes: number, end: number): Promise<void> {
    for (let at = offsetBytes; at < end; at += ZEROES.length) {
      const pieceBytes = Math.min(end - at, ZEROES.length);
      // The caller holds the range of an O_DIRECT file.
      if (this.directFile !== null) await this.directFile.writeHeld(ZEROES, 0, pieceBytes, at);
      else await writeFully(this.name, this.fd, ZEROES, 0, pieceBytes, at);
    }
  }

  discard(offsetBytes: number, lengthBytes: number): Completion {
    if (this.readOnly) return this.refuseReadOnly(offsetBytes);
    if (libc === null) return undefined;
    const end = offsetBytes + lengthBytes;
    if (this.directFile !== null) {
      return this.directFile.exclusively(offsetBytes, lengthBytes, () => this.discardFrom(offsetBytes, end));
    }
    if (lengthBytes > FALLOCATE_PIECE_BYTES) return this.discardFrom(offsetBytes, end);
    try {
      this.punchPiece(offsetBytes, lengthBytes);
      return undefined;
    } catch (error) {
      return rejected(error);
    }
  }

  private async discardFrom(offsetBytes: number, end: number): Promise<void> {
    for (let at = offsetBytes; at < end; at += FALLOCATE_PIECE_BYTES) {
      if (at > offsetBytes) await turnOfTheEventLoop();
      if (!this.punchPiece(at, Math.min(end - at, FALLOCATE_PIECE_BYTES))) return;
    }
  }

  /** @returns false where the file system cannot, or the guard says no: a discard is advice, and may be ignored. */
  private punchPiece(offsetBytes: number, lengthBytes: number): boolean {
    try {
      this.guard?.admit(null, 0, lengthBytes, offsetBytes);
    } catch {
      return false;
    }
    this.extents.forget();
    const result = libc?.punchHole(this.fd, offsetBytes, lengthBytes) ?? -constants.errno.ENOSYS;
    if (result >= 0) return true;
    this.guard?.markStale();
    if (FALLOCATE_UNSUPPORTED.has(result)) return false;
    throw errnoError("discard", this.name, result, offsetBytes);
  }

  flush(): Completion {
    return this.readOnly ? undefined : this.syncData();
  }

  /** After a failed fdatasync the kernel has dropped the pages: no later flush can make them safe again. */
  private async syncData(): Promise<void> {
    if (this.flushError !== null) throw this.flushError;
    try {
      await (this.directFile === null ? syncFileData(this.fd) : this.directFile.sync());
    } catch (error) {
      this.flushError = ioError("flush", this.name, error);
      throw this.flushError;
    }
    this.assertNotCut();
  }

  private assertNotCut(): void {
    assertNotCut(this.name, this.fd, this.sizeBytes);
  }

  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus> {
    const { lengthBytes: runBytes, zero } = this.extents.extentAt(offsetBytes, lengthBytes);
    // What lies past a file's end counts as a hole.
    if (zero) {
      try {
        this.assertNotCut();
      } catch (error) {
        return Promise.reject(toCowcatcherError(error));
      }
    }
    return {
      lengthBytes: runBytes,
      zero,
      data: !zero,
      depth: 0,
      present: true,
      compressed: false,
      hostOffsetBytes: offsetBytes,
    };
  }

  freeze(): FrozenSource {
    const { name, fd, sizeBytes } = this;
    this.assertNotCut();
    const description = { format: "raw", name, fd, sizeBytes, direct: this.directFile !== null } as const;
    this.freezeCount++;
    let isReleased = false;
    const release = (): void => {
      if (!isReleased) this.freezeCount--;
      isReleased = true;
    };
    return { description, release, assertNotCut: () => this.assertNotCut() };
  }

  async close(): Promise<void> {
    try {
      await this.flush();
    } finally {
      await this.directFile?.close();
      await closeFile(this.fd);
    }
  }

  private refuseReadOnly(offsetBytes: number): Completion {
    const problem = "cannot write: the image is open read-only";
    return rejected(
      new CowcatcherError({ code: "IO", object: this.name, problem, offsetBytes, errno: "EROFS" }),
    );
  }
}

function rejected(error: unknown): Promise<void> {
  return Promise.reject(toCowcatcherError(error));
}

function turnOfTheEventLoop(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

function isOnMemoryFileSystem(fd: number): boolean {
  try {
    return MEMORY_FILE_SYSTEMS.has(fs.statfsSync(`/proc/self/fd/${fd}`).type);
  } catch {
    return false;
  }
}
