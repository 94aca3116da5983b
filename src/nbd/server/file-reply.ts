// A reply whose data leave a file's page cache for the socket without a copy in between, as the socket has room.
//
// Node tells that a socket has room only of what was written through it. So a small part of what the socket has none for is
// copied and written (`copyNext`), and when that has left the rest goes on.
//
// Nothing here waits for a disk, as the file is one in memory (RawImage.cachedRange). Main thread only.

import type { FileRange } from "../../block/device.js";
import { cutShortError } from "../../block/file/file-end.js";
import { readFullySync } from "../../block/file/fileio.js";
import { EAGAIN } from "../../native/libc.js";
import { sendFile } from "../../native/send-file.js";
import { KiB, MiB } from "../../units.js";

/** What is copied where the socket is full: a page, which tells as much as more would. */
const COPIED_BYTES = 4 * KiB;
/** Of a file whose file system has no such way to a socket: then all of it is copied. */
const ALL_COPIED_BYTES = 256 * KiB;
/** In one call. More than any socket holds. */
const PIECE_BYTES = 1 * MiB;

export class FileReply {
  private readonly fd: number;
  private readonly endBytes: number;
  private atBytes: number;
  /** `copyNext` copies so much at most. */
  copyBytes = COPIED_BYTES;

  /** @param name of the file, for errors */
  constructor(
    private readonly name: string,
    { fd, offsetBytes }: FileRange,
    lengthBytes: number,
  ) {
    this.fd = fd;
    this.atBytes = offsetBytes;
    this.endBytes = offsetBytes + lengthBytes;
  }

  /**
   * Hands over what the socket has room for.
   * @param socketFd undefined: the socket is gone, as its events will tell
   * @returns all has left; or the socket is full, or has failed
   */
  sendTo(socketFd: number | undefined): "done" | "full" {
    const calls = sendFile();
    while (this.atBytes < this.endBytes) {
      if (socketFd === undefined || calls === null) return "full";
      const pieceBytes = Math.min(PIECE_BYTES, this.endBytes - this.atBytes);
      const count = calls.sendFile(socketFd, this.fd, this.atBytes, pieceBytes);
      if (count <= 0) {
        if (count < 0 && count !== -EAGAIN) this.copyBytes = ALL_COPIED_BYTES;
        return "full";
      }
      this.atBytes += count;
    }
    return "done";
  }

  /** Of what comes next, after `sendTo` found the socket full: it is cached. @throws CowcatherError IO */
  copyNext(bytes: Uint8Array, at: number): number {
    const lengthBytes = Math.min(this.copyBytes, this.endBytes - this.atBytes);
    const count = readFullySync(this.name, this.fd, bytes, at, lengthBytes, this.atBytes);
    if (count < lengthBytes) throw cutShortError(this.name, this.atBytes + count, this.endBytes);
    this.atBytes += lengthBytes;
    return lengthBytes;
  }
}
