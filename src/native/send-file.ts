// A file's pages to a socket without a copy in between: the socket refers to the page cache until its peer has read.
//
// Node has neither call. Null where koffi is missing. A send does not block, as the socket is Node's, and so is non-blocking; the
// file may: sendfile waits for what has to be read, or is being read.
// Any thread; nothing is kept between calls but one small buffer a thread.
//
// Specification: sendfile(2), send(2).

import { addressOf } from "./addresses.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

const MSG_DONTWAIT = 0x40;
const MSG_NOSIGNAL = 0x4000;
const MSG_MORE = 0x8000;

export interface SendFile {
  /** What goes with more that follows at once: bytes taken, or minus errno. */
  sendHead(socketFd: number, buffer: ArrayBufferLike, bufferOffset: number, lengthBytes: number): number;
  /** Bytes that the socket has taken, fewer than asked where it is full, or minus errno. */
  sendFile(socketFd: number, fd: number, offsetBytes: number, lengthBytes: number): number;
}

function bind(): SendFile {
  const koffi = loadKoffi();
  const library = koffi.load("libc.so.6");
  type SystemCall = (...args: number[]) => number;
  const declare = (prototype: string): SystemCall => library.func(prototype);
  const send = declare("int64_t send(int fd, uint64_t buffer, uint64_t count, int flags)");
  const sendfile = declare("int64_t sendfile64(int out, int in, uint64_t offset, uint64_t count)");
  const orErrno = (result: number): number => (result === -1 ? -koffi.errno() : result);
  const offset = new BigInt64Array(new ArrayBuffer(8));
  const offsetAddress = addressOf(offset.buffer);
  return {
    sendHead: (socketFd, buffer, bufferOffset, lengthBytes) =>
      orErrno(
        send(socketFd, addressOf(buffer) + bufferOffset, lengthBytes, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE),
      ),
    sendFile(socketFd, fd, offsetBytes, lengthBytes) {
      offset[0] = BigInt(offsetBytes);
      return orErrno(sendfile(socketFd, fd, offsetAddress, lengthBytes));
    },
  };
}

export const sendFile: () => SendFile | null = optionalLibrary(bind);
