// A file's pages to a socket without a copy in between: the socket refers to the page cache until its peer has read.
//
// Node has neither call. Null where koffi is missing; `isCached` is false where the kernel has no cachestat(2) (before
// Linux 6.5). No call blocks: the socket is Node's, and so is non-blocking, and what is cached is not read from a disk.
// Any thread; nothing is kept between calls but one small buffer a thread.
//
// Specification: sendfile(2), send(2), mm/filemap.c (cachestat).

import { addressOf } from "./addresses.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

/** This number on all architectures that Node runs on. */
const SYS_CACHESTAT = 451;
const MSG_DONTWAIT = 0x40;
const MSG_NOSIGNAL = 0x4000;
const MSG_MORE = 0x8000;
/** The smallest page of any kernel: fewer, larger ones cover the same range. */
const PAGE_BYTES = 4096;

export interface SendFile {
  /** What goes with more that follows at once: bytes taken, or minus errno. */
  sendHead(socketFd: number, buffer: ArrayBufferLike, bufferOffset: number, lengthBytes: number): number;
  /** Bytes that the socket has taken, fewer than asked where it is full, or minus errno. */
  sendFile(socketFd: number, fd: number, offsetBytes: number, lengthBytes: number): number;
  /** Whether the page cache has all of [offsetBytes, +lengthBytes). */
  isCached(fd: number, offsetBytes: number, lengthBytes: number): boolean;
}

function bind(): SendFile {
  const koffi = loadKoffi();
  const library = koffi.load("libc.so.6");
  type SystemCall = (...args: number[]) => number;
  const declare = (prototype: string): SystemCall => library.func(prototype);
  const send = declare("int64_t send(int fd, uint64_t buffer, uint64_t count, int flags)");
  const sendfile = declare("int64_t sendfile64(int out, int in, uint64_t offset, uint64_t count)");
  const syscall = declare(
    "int64_t syscall(int64_t number, uint64_t fd, uint64_t range, uint64_t result, uint64_t flags)",
  );
  const orErrno = (result: number): number => (result === -1 ? -koffi.errno() : result);
  const offset = new BigInt64Array(new ArrayBuffer(8));
  const offsetAddress = addressOf(offset.buffer);
  // struct cachestat_range { __u64 off, len; }, and of struct cachestat, five __u64, the first: nr_cache.
  const range = new BigUint64Array(new ArrayBuffer(16));
  const counts = new BigUint64Array(new ArrayBuffer(40));
  const [rangeAddress, countsAddress] = [addressOf(range.buffer), addressOf(counts.buffer)];
  let hasCachestat = true;

  return {
    sendHead: (socketFd, buffer, bufferOffset, lengthBytes) =>
      orErrno(
        send(socketFd, addressOf(buffer) + bufferOffset, lengthBytes, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE),
      ),
    sendFile(socketFd, fd, offsetBytes, lengthBytes) {
      offset[0] = BigInt(offsetBytes);
      return orErrno(sendfile(socketFd, fd, offsetAddress, lengthBytes));
    },
    isCached(fd, offsetBytes, lengthBytes) {
      if (!hasCachestat) return false;
      range[0] = BigInt(offsetBytes);
      range[1] = BigInt(lengthBytes);
      if (syscall(SYS_CACHESTAT, fd, rangeAddress, countsAddress, 0) !== 0) return (hasCachestat = false);
      const pages =
        Math.ceil((offsetBytes + lengthBytes) / PAGE_BYTES) - Math.floor(offsetBytes / PAGE_BYTES);
      return Number(counts[0]) >= pages;
    },
  };
}

export const sendFile: () => SendFile | null = optionalLibrary(bind);
