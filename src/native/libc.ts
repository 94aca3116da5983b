// The system calls that Node lacks, through koffi: lseek(SEEK_DATA), preadv2(RWF_NOWAIT), fallocate, OFD locks,
// blocking recv.
//
// `libc` is null where koffi cannot load (an odd platform, COWCATCHER_NO_NATIVE=1): every caller has a slower way.
// Results are the system call's own: a count or offset, or minus errno. Any thread may call; nothing here is kept
// between calls but one iovec a thread.
//
// Buffers are passed as addresses. An ArrayBuffer's or SharedArrayBuffer's bytes never move, so the address is
// looked up once a buffer; a typed array of a few bytes without a buffer of its own would move, hence
// ArrayBufferLike in the signatures.

import { constants } from "node:os";
import { nameBytes } from "../file-names.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

/** Linux values on x86-64 and arm64 alike. */
const SEEK_END = 2;
const SEEK_DATA = 3;
const SEEK_HOLE = 4;
const RWF_NOWAIT = 0x8;
const FALLOC_FL_KEEP_SIZE = 0x1;
const FALLOC_FL_PUNCH_HOLE = 0x2;
const FALLOC_FL_ZERO_RANGE = 0x10;
const F_OFD_GETLK = 36;
const F_OFD_SETLK = 37;
const PRIO_PROCESS = 0;
const MADV_DONTNEED = 4;
const MADV_POPULATE_WRITE = 23;
const MFD_CLOEXEC = 1;
/** The largest page of the kernels that Node runs on; on others a multiple of theirs. */
const PAGE_BYTES = 65_536;
const SMALLEST_PAGE_BYTES = 4_096;
export const F_RDLCK = 0;
export const F_WRLCK = 1;
export const F_UNLCK = 2;
export const POSIX_FADV_DONTNEED = 4;

const FS_IOC_FIEMAP = 0xc020_660b;
const SOL_SOCKET = 1;
const SO_PEERCRED = 17;
const SO_RCVTIMEO = 20;
const SO_SNDTIMEO = 21;
const MSG_WAITALL = 0x100;
const MSG_NOSIGNAL = 0x4000;
const F_GETFL = 3;
const F_SETFL = 4;
const O_NONBLOCK = 0o4000;
const AT_FDCWD = -100;
const AT_SYMLINK_FOLLOW = 0x400;

export const ENXIO = constants.errno.ENXIO;
export const EAGAIN = constants.errno.EAGAIN;
export const EINTR = constants.errno.EINTR;
export const EINVAL = constants.errno.EINVAL;
export const EOPNOTSUPP = constants.errno.EOPNOTSUPP;
export const ENOSYS = constants.errno.ENOSYS;

export interface Libc {
  /** First offset >= offsetBytes that holds data, or -ENXIO when there is none up to the end of the file. */
  seekData(fd: number, offsetBytes: number): number;
  /** Length of the file or block device in bytes. Moves the descriptor's position, which nothing here uses. */
  seekEnd(fd: number): number;
  /** First offset >= offsetBytes in a hole (the end of the file counts as one), or -ENXIO past the end. */
  seekHole(fd: number, offsetBytes: number): number;
  /**
   * Reads only what the page cache holds: bytes read (fewer than asked where the rest would block), or -EAGAIN
   * when the first byte would block, or another -errno.
   */
  readNowait(
    fd: number,
    buffer: ArrayBufferLike,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number;
  pread(
    fd: number,
    buffer: ArrayBufferLike,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number;
  pwrite(
    fd: number,
    buffer: ArrayBufferLike,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number;
  /** memcpy: the ranges must not overlap. */
  copy(
    target: ArrayBufferLike,
    targetOffset: number,
    source: ArrayBufferLike,
    sourceOffset: number,
    lengthBytes: number,
  ): void;
  punchHole(fd: number, offsetBytes: number, lengthBytes: number): number;
  /** Zeroes a range, keeping it allocated. */
  zeroRange(fd: number, offsetBytes: number, lengthBytes: number): number;
  /** Fills in a struct fiemap (ioctl(2), FS_IOC_FIEMAP): 0, or -errno (-EOPNOTSUPP: the file system has none). */
  extentMap(fd: number, request: ArrayBuffer): number;
  /** Extends or allocates [offsetBytes, +lengthBytes). */
  allocate(fd: number, offsetBytes: number, lengthBytes: number): number;
  fadvise(fd: number, offsetBytes: number, lengthBytes: number, advice: number): number;
  /** Non-blocking OFD lock or unlock (F_RDLCK, F_WRLCK, F_UNLCK) of bytes; -EAGAIN where another holder forbids it. */
  ofdLock(fd: number, type: number, startByte: number, lengthBytes: number): number;
  /**
   * Fills the page tables of buffer[offset, +lengthBytes), but for a page that is not whole in it, and changes no byte
   * (madvise(2), MADV_POPULATE_WRITE, Linux 5.14). 0, or -EINVAL on an older kernel, -ENOMEM, …
   */
  populatePages(buffer: ArrayBufferLike, offset: number, lengthBytes: number): number;
  /**
   * Zeroes a range of memory that no file stands behind, giving its whole pages back to the system: 0, or -errno with
   * the range as it was or partly zero. No other thread may use the range meanwhile.
   */
  dropPages(buffer: ArrayBufferLike, offset: number, lengthBytes: number): number;
  /** A file in memory without a name in any folder (memfd_create(2)), empty: its descriptor, or -errno. `name` is for /proc. */
  createMemoryFile(name: string): number;
  /** Niceness of the calling thread alone, 0 to 19 (Linux keeps it by thread): 0, or -errno. */
  setThreadNice(nice: number): number;
  /** Ends the process without a look at its other threads: no exit handlers, nothing flushed. */
  exitAtOnce(code: number): void;
  /** From now on the socket's calls block, each for timeoutMs at most; 0, or -errno. */
  makeBlocking(fd: number, timeoutMs: number): number;
  /** Waits for all of lengthBytes; fewer came within the time limit, 0: the peer hung up; -EAGAIN: nothing came. */
  receive(fd: number, buffer: ArrayBufferLike, bufferOffset: number, lengthBytes: number): number;
  send(fd: number, buffer: ArrayBufferLike, bufferOffset: number, lengthBytes: number): number;
  /** The process that listens at, or made, the other end of a Unix socket; 0: it is not to be seen, or -errno. */
  peerProcess(fd: number): number;
  /** Gives the open file a name (file-names.ts), also one that never had any (O_TMPFILE): 0, or -errno. Needs /proc. */
  linkFd(fd: number, path: string): number;
  /** Names of the extended attributes, each ended by a zero byte: bytes, or -errno (-ERANGE: the buffer is too small). */
  listAttributes(fd: number, names: Uint8Array): number;
  /** Bytes of the attribute's value, or -errno. */
  getAttribute(fd: number, name: string, value: Uint8Array): number;
  /** Makes or replaces it: 0, or -errno. */
  setAttribute(fd: number, name: string, value: Uint8Array): number;
  /** Whether a lock of `type` could be taken: 0 yes, 1 no, or -errno. */
  ofdTest(fd: number, type: number, startByte: number, lengthBytes: number): number;
}

function bind(): Libc {
  const koffi = loadKoffi();
  const library = koffi.load("libc.so.6");
  type SystemCall = (...args: number[]) => number;
  const declare = (prototype: string): SystemCall => library.func(prototype);
  const lseek = declare("int64_t lseek64(int fd, int64_t offset, int whence)");
  const pread64 = declare("int64_t pread64(int fd, uint64_t buffer, uint64_t count, int64_t offset)");
  const pwrite64 = declare("int64_t pwrite64(int fd, uint64_t buffer, uint64_t count, int64_t offset)");
  const preadv2 = declare("int64_t preadv64v2(int fd, uint64_t iov, int iovcnt, int64_t offset, int flags)");
  const fallocate = declare("int fallocate64(int fd, int mode, int64_t offset, int64_t length)");
  const posixFadvise = declare("int posix_fadvise64(int fd, int64_t offset, int64_t length, int advice)");
  const memcpy = declare("uint64_t memcpy(uint64_t target, uint64_t source, uint64_t count)");
  const memfdCreate = library.func("int memfd_create(const char *name, unsigned int flags)") as (
    name: string,
    flags: number,
  ) => number;
  const madvise = declare("int madvise(uint64_t address, uint64_t length, int advice)");
  const exit = declare("void _exit(int code)");
  const setpriority = declare("int setpriority(int which, uint32_t who, int priority)");
  const recv = declare("int64_t recv(int fd, uint64_t buffer, uint64_t count, int flags)");
  const sendBytes = declare("int64_t send(int fd, uint64_t buffer, uint64_t count, int flags)");
  const setsockopt = declare(
    "int setsockopt(int fd, int level, int name, uint64_t value, uint32_t valueBytes)",
  );
  const getsockopt = declare(
    "int getsockopt(int fd, int level, int name, uint64_t value, uint64_t valueBytes)",
  );
  const ioctl = declare("int ioctl(int fd, uint64_t request, uint64_t argument)");
  const fcntl = declare("int fcntl64(int fd, int command, uint64_t argument)");

  // Seldom called: koffi takes the memory itself, and holds it during the call.
  type LinkAt = (folder: number, from: Buffer, otherFolder: number, to: Buffer, flags: number) => number;
  const linkat = library.func(
    "int linkat(int folder, const uint8_t *from, int other, const uint8_t *to, int flags)",
  ) as LinkAt;
  const flistxattr = library.func("int64_t flistxattr(int fd, uint8_t *list, uint64_t size)") as (
    fd: number,
    list: Uint8Array,
    bytes: number,
  ) => number;
  type OnAttribute = (fd: number, name: string, value: Uint8Array, bytes: number, flags?: number) => number;
  const fgetxattr = library.func(
    "int64_t fgetxattr(int fd, const char *name, uint8_t *value, uint64_t size)",
  ) as OnAttribute;
  const fsetxattr = library.func(
    "int fsetxattr(int fd, const char *name, const uint8_t *value, uint64_t size, int flags)",
  ) as OnAttribute;

  const addresses = new WeakMap<ArrayBufferLike, number>();
  const addressOf = (buffer: ArrayBufferLike): number => {
    let address = addresses.get(buffer);
    if (address === undefined) {
      address = Number(koffi.address(new Uint8Array(buffer)));
      addresses.set(buffer, address);
    }
    return address;
  };
  const orErrno = (result: number): number => (result === -1 ? -koffi.errno() : result);

  const iovec = new BigUint64Array(new ArrayBuffer(16));
  const iovecWords = new Uint32Array(iovec.buffer);
  const iovecAddress = addressOf(iovec.buffer);

  // struct flock { short l_type; short l_whence; off_t l_start; off_t l_len; pid_t l_pid; }, 64-bit layout.
  const flockView = new DataView(new ArrayBuffer(32));
  const flockAddress = addressOf(flockView.buffer);
  const setFlock = (type: number, startByte: number, lengthBytes: number): void => {
    flockView.setInt16(0, type, true);
    flockView.setInt16(2, 0, true);
    flockView.setBigInt64(8, BigInt(startByte), true);
    flockView.setBigInt64(16, BigInt(lengthBytes), true);
    flockView.setInt32(24, 0, true);
  };

  /** Again after an EINTR: io_uring's task work ends some file systems' calls (tmpfs, for one), which then have done nothing. */
  const fallocateWhole = (fd: number, mode: number, offsetBytes: number, lengthBytes: number): number => {
    for (;;) {
      const result = orErrno(fallocate(fd, mode, offsetBytes, lengthBytes));
      if (result !== -EINTR) return result;
    }
  };

  return {
    seekEnd: (fd) => orErrno(lseek(fd, 0, SEEK_END)),
    seekData: (fd, offsetBytes) => orErrno(lseek(fd, offsetBytes, SEEK_DATA)),
    seekHole: (fd, offsetBytes) => orErrno(lseek(fd, offsetBytes, SEEK_HOLE)),
    readNowait(fd, buffer, bufferOffset, lengthBytes, offsetBytes) {
      const address = addressOf(buffer) + bufferOffset;
      iovecWords[0] = address >>> 0;
      iovecWords[1] = Math.floor(address / 0x1_0000_0000);
      iovecWords[2] = lengthBytes;
      iovecWords[3] = 0;
      return orErrno(preadv2(fd, iovecAddress, 1, offsetBytes, RWF_NOWAIT));
    },
    pread: (fd, buffer, bufferOffset, lengthBytes, offsetBytes) =>
      orErrno(pread64(fd, addressOf(buffer) + bufferOffset, lengthBytes, offsetBytes)),
    pwrite: (fd, buffer, bufferOffset, lengthBytes, offsetBytes) =>
      orErrno(pwrite64(fd, addressOf(buffer) + bufferOffset, lengthBytes, offsetBytes)),
    copy(target, targetOffset, source, sourceOffset, lengthBytes) {
      memcpy(addressOf(target) + targetOffset, addressOf(source) + sourceOffset, lengthBytes);
    },
    punchHole: (fd, offsetBytes, lengthBytes) =>
      fallocateWhole(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsetBytes, lengthBytes),
    zeroRange: (fd, offsetBytes, lengthBytes) =>
      fallocateWhole(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offsetBytes, lengthBytes),
    allocate: (fd, offsetBytes, lengthBytes) => fallocateWhole(fd, 0, offsetBytes, lengthBytes),
    extentMap: (fd, request) => orErrno(ioctl(fd, FS_IOC_FIEMAP, addressOf(request))),
    fadvise: (fd, offsetBytes, lengthBytes, advice) => -posixFadvise(fd, offsetBytes, lengthBytes, advice),
    ofdLock(fd, type, startByte, lengthBytes) {
      setFlock(type, startByte, lengthBytes);
      return orErrno(fcntl(fd, F_OFD_SETLK, flockAddress));
    },
    dropPages(buffer, offset, lengthBytes) {
      const start = addressOf(buffer) + offset;
      const end = start + lengthBytes;
      const firstPage = Math.min(Math.ceil(start / PAGE_BYTES) * PAGE_BYTES, end);
      const afterPages = Math.max(Math.floor(end / PAGE_BYTES) * PAGE_BYTES, firstPage);
      if (afterPages > firstPage) {
        const result = orErrno(madvise(firstPage, afterPages - firstPage, MADV_DONTNEED));
        if (result < 0) return result;
      }
      new Uint8Array(buffer, offset, firstPage - start).fill(0);
      new Uint8Array(buffer, offset + afterPages - start, end - afterPages).fill(0);
      return 0;
    },
    populatePages(buffer, offset, lengthBytes) {
      const start = addressOf(buffer) + offset;
      const firstPage = Math.ceil(start / SMALLEST_PAGE_BYTES) * SMALLEST_PAGE_BYTES;
      const afterPages = Math.floor((start + lengthBytes) / SMALLEST_PAGE_BYTES) * SMALLEST_PAGE_BYTES;
      return orErrno(madvise(firstPage, Math.max(0, afterPages - firstPage), MADV_POPULATE_WRITE));
    },
    createMemoryFile: (name) => orErrno(memfdCreate(name, MFD_CLOEXEC)),
    makeBlocking(fd, timeoutMs) {
      const seconds = Math.floor(timeoutMs / 1000);
      const timeval = new BigInt64Array([BigInt(seconds), BigInt((timeoutMs - seconds * 1000) * 1000)]);
      for (const name of [SO_RCVTIMEO, SO_SNDTIMEO]) {
        const result = setsockopt(fd, SOL_SOCKET, name, addressOf(timeval.buffer), timeval.byteLength);
        if (result < 0) return orErrno(result);
      }
      const flags = fcntl(fd, F_GETFL, 0);
      return orErrno(flags < 0 ? flags : fcntl(fd, F_SETFL, flags & ~O_NONBLOCK));
    },
    receive: (fd, buffer, bufferOffset, lengthBytes) =>
      orErrno(recv(fd, addressOf(buffer) + bufferOffset, lengthBytes, MSG_WAITALL)),
    send: (fd, buffer, bufferOffset, lengthBytes) =>
      orErrno(sendBytes(fd, addressOf(buffer) + bufferOffset, lengthBytes, MSG_NOSIGNAL)),
    peerProcess(fd) {
      // struct ucred { pid_t pid; uid_t uid; gid_t gid; }
      const credentials = new Int32Array(new ArrayBuffer(12));
      const length = new Uint32Array(new ArrayBuffer(4)).fill(credentials.byteLength);
      const result = getsockopt(
        fd,
        SOL_SOCKET,
        SO_PEERCRED,
        addressOf(credentials.buffer),
        addressOf(length.buffer),
      );
      return result < 0 ? orErrno(result) : (credentials[0] ?? 0);
    },
    linkFd(fd, path) {
      const from = terminated(Buffer.from(`/proc/self/fd/${fd}`));
      return orErrno(linkat(AT_FDCWD, from, AT_FDCWD, terminated(nameBytes(path)), AT_SYMLINK_FOLLOW));
    },
    listAttributes: (fd, names) => orErrno(flistxattr(fd, names, names.length)),
    getAttribute: (fd, name, value) => orErrno(fgetxattr(fd, name, value, value.length)),
    setAttribute: (fd, name, value) => orErrno(fsetxattr(fd, name, value, value.length, 0)),
    exitAtOnce: (code) => void exit(code),
    // "Process" 0 is the calling thread for the kernel, whatever POSIX says.
    setThreadNice: (nice) => orErrno(setpriority(PRIO_PROCESS, 0, nice)),
    ofdTest(fd, type, startByte, lengthBytes) {
      setFlock(type, startByte, lengthBytes);
      const result = orErrno(fcntl(fd, F_OFD_GETLK, flockAddress));
      return result < 0 ? result : flockView.getInt16(0, true) === F_UNLCK ? 0 : 1;
    },
  };
}

/** C's form of a name. */
function terminated(name: Buffer): Buffer {
  return Buffer.concat([name, Buffer.of(0)]);
}

export const libc: Libc | null = optionalLibrary(bind)();

/**
 * Copies between buffers of which one is shared. `TypedArray.set` does that a word at a time, since another thread
 * may look on, at a quarter of memcpy's speed; here the caller knows that no other thread touches the ranges.
 */
export function copyBytes(
  target: Uint8Array,
  targetOffset: number,
  source: Uint8Array,
  sourceOffset: number,
  lengthBytes: number,
): void {
  if (libc === null) {
    target.set(source.subarray(sourceOffset, sourceOffset + lengthBytes), targetOffset);
    return;
  }
  libc.copy(
    target.buffer,
    target.byteOffset + targetOffset,
    source.buffer,
    source.byteOffset + sourceOffset,
    lengthBytes,
  );
}
