// io_uring: reads, writes and syncs that the kernel carries out while this thread does something else. One system call
// hands over any number of requests, and what they came to is read from memory that the kernel writes to.
//
//   submission ring    prepare() fills an entry here; submit() hands all of them to the kernel at once
//   completion ring    the kernel puts a tag and a result here; reap() takes them without a system call
//
// The rings are the kernel's pages, mapped by mmap(2) and seen through koffi.view as typed arrays. Their four indexes
// are free-running 32-bit counters: each has one writer, who fills the entries first and moves the index afterwards.
// Atomics are those of V8 whether the buffer is a SharedArrayBuffer or not (they are chosen by the element's type alone),
// so that a load of the kernel's tail acquires and a store of ours releases, on x86 as on arm64. With the flags that
// are asked for here the kernel moves the completion tail in this very thread (task work, on its way out of a system
// call), so there is no other processor to be ordered against in the first place.
//
// No request is in flight without a place for its completion: the caller keeps to `maxInFlight`, the length of the
// completion ring, so that it never overflows.
//
// Memory of a request must stay where it is until its completion has been reaped; the caller keeps a reference. The
// kernel holds the pages of an O_DIRECT request itself, so a process that ends with requests in flight ends without harm.
//
// Specification: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), linux/io_uring.h. Linux 5.6 on; null where
// it is too old, where a container's seccomp profile or kernel.io_uring_disabled forbids it, or koffi is missing.
// One thread, the one that opened it.

import { constants } from "node:os";
import { addressOf } from "./addresses.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

/** System calls have these numbers on all architectures. */
const SYS_IO_URING_SETUP = 425;
const SYS_IO_URING_ENTER = 426;
const SYS_IO_URING_REGISTER = 427;

/** Both rings, where the kernel maps them together (Linux 5.4). */
const OFFSET_RINGS = 0;
const OFFSET_SQES = 0x1000_0000;
const SQE_BYTES = 64;
const SQE_WORDS = SQE_BYTES / 4;
const CQE_BYTES = 16;
const CQE_WORDS = CQE_BYTES / 4;

const SETUP_CQSIZE = 1 << 3;
/** Completions do not interrupt this thread while it runs JavaScript: its next system call finds them (Linux 5.19). */
const SETUP_COOP_TASKRUN = 1 << 8;
const ENTER_GETEVENTS = 1 << 0;
/** The last arguments are a structure and its length (Linux 5.11). */
const ENTER_EXT_ARG = 1 << 3;
/** struct io_uring_getevents_arg: a signal mask, its length, the address of a time limit. */
const EXT_ARG_BYTES = 24;
const EXT_ARG_TIME_LIMIT_AT = 16;
/** struct __kernel_timespec. */
const TIMESPEC_BYTES = 16;
/** In the completion ring's flags: completions are not counted in the eventfd (Linux 5.8). */
const CQ_EVENTFD_DISABLED = 1 << 0;
const FEAT_SINGLE_MMAP = 1 << 0;
const FEAT_NODROP = 1 << 1;
const FEAT_SUBMIT_STABLE = 1 << 2;
const FEAT_EXT_ARG = 1 << 8;
const REGISTER_EVENTFD = 4;
const REGISTER_PROBE = 8;
const OP_SUPPORTED = 1 << 0;
const PROBE_OPS = 64;
const PROBE_HEADER_BYTES = 16;
const PROBE_OP_BYTES = 8;

const PROT_READ = 1;
const PROT_WRITE = 2;
const MAP_SHARED = 0x01;
const MAP_POPULATE = 0x8000;
const MADV_DONTFORK = 10;

const { EBUSY, EAGAIN, EINTR, EINVAL, ENOSYS } = constants.errno;

export const RING_FSYNC = 3;
export const RING_READ = 22;
export const RING_WRITE = 23;
export type RingOperation = typeof RING_FSYNC | typeof RING_READ | typeof RING_WRITE;
const NEEDED_OPS: readonly RingOperation[] = [RING_FSYNC, RING_READ, RING_WRITE];
/** fdatasync, not fsync. */
const FSYNC_DATASYNC = 1 << 0;

/** struct io_uring_params, in 32-bit words. */
const PARAM = { sqEntries: 0, cqEntries: 1, flags: 2, features: 5, sqOffsets: 10, cqOffsets: 20, words: 30 };
/** struct io_sqring_offsets and io_cqring_offsets, in 32-bit words. */
const SQ_OFFSET = { head: 0, tail: 1, mask: 2, array: 6 };
const CQ_OFFSET = { head: 0, tail: 1, mask: 2, entries: 5, flags: 6 };
/** struct io_uring_sqe, in 32-bit words. */
const SQE = { opcodeAndFlags: 0, fd: 1, offset: 2, address: 4, length: 6, operationFlags: 7, tag: 8 };

type SystemCall = (...args: number[]) => number;

interface Calls {
  setup(entries: number, paramsAddress: number): number;
  enter(fd: number, toSubmit: number, minComplete: number, flags: number, argumentAddress: number): number;
  register(fd: number, operation: number, address: number, count: number): number;
  /** The address, or minus errno. */
  map(lengthBytes: number, fd: number, offset: number): number;
  unmap(address: number, lengthBytes: number): void;
  close(fd: number): void;
  view(address: number, lengthBytes: number): ArrayBuffer;
}

function bind(): Calls {
  const koffi = loadKoffi();
  const library = koffi.load("libc.so.6");
  const declare = (prototype: string): SystemCall => library.func(prototype);
  const number = "uint64_t";
  const syscall = declare(
    `int64_t syscall(int64_t number, ${number} a, ${number} b, ${number} c, ${number} d, ${number} e, ${number} f)`,
  );
  const mmap = declare(
    "int64_t mmap64(uint64_t at, uint64_t bytes, int prot, int flags, int fd, int64_t offset)",
  );
  const munmap = declare("int munmap(uint64_t address, uint64_t bytes)");
  const madvise = declare("int madvise(uint64_t address, uint64_t bytes, int advice)");
  const close = declare("int close(int fd)");
  const orErrno = (result: number): number => (result === -1 ? -koffi.errno() : result);
  return {
    setup: (entries, params) => orErrno(syscall(SYS_IO_URING_SETUP, entries, params, 0, 0, 0, 0)),
    enter: (fd, toSubmit, minComplete, flags, argument) =>
      orErrno(
        syscall(SYS_IO_URING_ENTER, fd, toSubmit, minComplete, flags, argument, argument && EXT_ARG_BYTES),
      ),
    register: (fd, operation, address, count) =>
      orErrno(syscall(SYS_IO_URING_REGISTER, fd, operation, address, count, 0, 0)),
    map(lengthBytes, fd, offset) {
      const protection = PROT_READ | PROT_WRITE;
      const address = orErrno(mmap(0, lengthBytes, protection, MAP_SHARED | MAP_POPULATE, fd, offset));
      // A program that is started must not have them, be it for the moment before its own memory is set up.
      if (address > 0) madvise(address, lengthBytes, MADV_DONTFORK);
      return address;
    },
    unmap: (address, lengthBytes) => void munmap(address, lengthBytes),
    close: (fd) => void close(fd),
    view: (address, lengthBytes) => koffi.view(BigInt(address), lengthBytes),
  };
}

/** Where 64-bit numbers have their low word first, and MAP_POPULATE this value. */
const calls = optionalLibrary(bind, ["x64", "arm64", "riscv64", "loong64"]);

/** Takes a request's tag and its result: bytes, or minus errno. */
export type OnCompletion = (tag: number, result: number) => void;

interface Mapping {
  address: number;
  lengthBytes: number;
}

/** What is prepared, handed over and taken back by one thread. */
export class IoUring {
  /** Requests that may be in flight at a time; the caller's to keep to. */
  readonly maxInFlight: number;
  /** Entries that `submit` will hand over. */
  preparedCount = 0;
  private readonly sqEntries: number;
  private readonly sqes: Uint32Array;
  private readonly indexes: Int32Array;
  private readonly sqHeadAt: number;
  private readonly sqTailAt: number;
  private readonly sqMask: number;
  private readonly cqHeadAt: number;
  private readonly cqTailAt: number;
  private readonly cqMask: number;
  private readonly cqesAt: number;
  private readonly cqFlagsAt: number;
  /** Of `submitAndWait`; null: this kernel does not know of a time limit. */
  private readonly limit: WaitLimit | null;
  private isClosed = false;

  /** @param fd closed with the ring */
  private constructor(
    private readonly system: Calls,
    private readonly fd: number,
    params: Int32Array,
    private readonly rings: Mapping,
    private readonly entries: Mapping,
  ) {
    const word = (offsetAt: number): number => params[offsetAt] / 4;
    this.indexes = new Int32Array(system.view(rings.address, rings.lengthBytes));
    this.sqes = new Uint32Array(system.view(entries.address, entries.lengthBytes));
    this.sqEntries = params[PARAM.sqEntries];
    this.maxInFlight = params[PARAM.cqEntries];
    this.sqHeadAt = word(PARAM.sqOffsets + SQ_OFFSET.head);
    this.sqTailAt = word(PARAM.sqOffsets + SQ_OFFSET.tail);
    this.sqMask = this.indexes[word(PARAM.sqOffsets + SQ_OFFSET.mask)];
    this.cqHeadAt = word(PARAM.cqOffsets + CQ_OFFSET.head);
    this.cqTailAt = word(PARAM.cqOffsets + CQ_OFFSET.tail);
    this.cqMask = this.indexes[word(PARAM.cqOffsets + CQ_OFFSET.mask)];
    this.cqesAt = word(PARAM.cqOffsets + CQ_OFFSET.entries);
    this.cqFlagsAt = word(PARAM.cqOffsets + CQ_OFFSET.flags);
    const canWait = (params[PARAM.features] & FEAT_EXT_ARG) !== 0 && this.cqFlagsAt !== 0;
    this.limit = canWait ? new WaitLimit() : null;
    // The array between ring and entries is never needed in another order.
    const arrayAt = word(PARAM.sqOffsets + SQ_OFFSET.array);
    for (let index = 0; index < this.sqEntries; index++) this.indexes[arrayAt + index] = index;
  }

  /**
   * @param sqEntries length of the submission ring, @param cqEntries of the completion ring; powers of two
   * @returns minus errno where there is none to be had
   */
  static open(sqEntries: number, cqEntries: number): IoUring | number {
    const system = calls();
    if (system === null) return -ENOSYS;
    const params = new Int32Array(new ArrayBuffer(PARAM.words * 4));
    const fd = setUp(system, params, sqEntries, cqEntries);
    if (fd < 0) return fd;
    const opened = IoUring.map(system, fd, params);
    if (typeof opened === "number") system.close(fd);
    return opened;
  }

  private static map(system: Calls, fd: number, params: Int32Array): IoUring | number {
    const needed = FEAT_SINGLE_MMAP | FEAT_NODROP | FEAT_SUBMIT_STABLE;
    if ((params[PARAM.features] & needed) !== needed || !hasOperations(system, fd)) return -ENOSYS;
    const sqBytes = params[PARAM.sqOffsets + SQ_OFFSET.array] + params[PARAM.sqEntries] * 4;
    const cqBytes = params[PARAM.cqOffsets + CQ_OFFSET.entries] + params[PARAM.cqEntries] * CQE_BYTES;
    const rings = { lengthBytes: Math.max(sqBytes, cqBytes), address: 0 };
    const entries = { lengthBytes: params[PARAM.sqEntries] * SQE_BYTES, address: 0 };
    rings.address = system.map(rings.lengthBytes, fd, OFFSET_RINGS);
    if (rings.address < 0) return rings.address;
    entries.address = system.map(entries.lengthBytes, fd, OFFSET_SQES);
    if (entries.address < 0) {
      system.unmap(rings.address, rings.lengthBytes);
      return entries.address;
    }
    return new IoUring(system, fd, params, rings, entries);
  }

  /** From now on each completion is counted in that eventfd. @returns 0, or minus errno */
  signal(eventFd: number): number {
    const argument = new Int32Array(new ArrayBuffer(4));
    argument[0] = eventFd;
    return this.system.register(this.fd, REGISTER_EVENTFD, addressOf(argument.buffer), 1);
  }

  /** Whether there is room for another entry before the next `submit`. */
  get hasRoom(): boolean {
    return this.preparedCount < this.sqEntries;
  }

  /**
   * Fills an entry. There must be room.
   * @param tag 32 bits, given back with the result
   * @param address of the memory, which stays valid until the request is reaped; 0 for a sync
   */
  prepare(
    operation: RingOperation,
    fd: number,
    address: number,
    lengthBytes: number,
    offsetBytes: number,
    tag: number,
  ): void {
    const { sqes, indexes } = this;
    const tail = indexes[this.sqTailAt];
    const at = (tail & this.sqMask) * SQE_WORDS;
    // The other words are zero from the beginning: the kernel writes to none.
    sqes[at + SQE.opcodeAndFlags] = operation;
    sqes[at + SQE.fd] = fd;
    setWide(sqes, at + SQE.offset, offsetBytes);
    setWide(sqes, at + SQE.address, address);
    sqes[at + SQE.length] = lengthBytes;
    sqes[at + SQE.operationFlags] = operation === RING_FSYNC ? FSYNC_DATASYNC : 0;
    sqes[at + SQE.tag] = tag;
    Atomics.store(indexes, this.sqTailAt, (tail + 1) | 0);
    this.preparedCount++;
  }

  /**
   * Hands over what is prepared. What the kernel did not take (it is short of memory) stays prepared.
   * @returns 0, or minus errno where it took nothing: -EAGAIN and -EBUSY pass
   */
  submit(): number {
    return this.enter(0, 0, 0);
  }

  /**
   * As `submit`, and blocks its thread until a request is complete, a signal comes or the time is over. What completes
   * meanwhile is not counted in the eventfd: the caller is to reap next.
   * @param microseconds at most; below a second. A kernel that knows no limit (before Linux 5.11) does not wait at all.
   */
  submitAndWait(microseconds: number): number {
    const { limit, indexes, cqFlagsAt } = this;
    if (limit === null || this.preparedCount === 0 || this.isClosed) return this.submit();
    Atomics.store(indexes, cqFlagsAt, CQ_EVENTFD_DISABLED);
    try {
      return this.enter(1, ENTER_GETEVENTS | ENTER_EXT_ARG, limit.addressFor(microseconds));
    } finally {
      Atomics.store(indexes, cqFlagsAt, 0);
    }
  }

  private enter(minComplete: number, flags: number, argumentAddress: number): number {
    if (this.preparedCount === 0 || this.isClosed) return 0;
    let taken: number;
    do taken = this.system.enter(this.fd, this.preparedCount, minComplete, flags, argumentAddress);
    while (taken === -EINTR);
    if (taken < 0) return taken;
    this.preparedCount -= taken;
    return 0;
  }

  /** Takes back what is prepared and not handed over: nothing of it will be done. */
  withdraw(): void {
    Atomics.store(this.indexes, this.sqTailAt, Atomics.load(this.indexes, this.sqHeadAt));
    this.preparedCount = 0;
  }

  /** Calls back for each request that is complete. No system call. @returns how many there were */
  reap(onCompletion: OnCompletion): number {
    // The memory is gone then.
    if (this.isClosed) return 0;
    const { indexes } = this;
    let head = indexes[this.cqHeadAt];
    let count = 0;
    for (let tail = Atomics.load(indexes, this.cqTailAt); head !== tail; count++) {
      const at = this.cqesAt + (head & this.cqMask) * CQE_WORDS;
      const tag = indexes[at] >>> 0;
      const result = indexes[at + 2];
      head = (head + 1) | 0;
      // Before the call: what it throws must not bring the same completion again.
      Atomics.store(indexes, this.cqHeadAt, head);
      onCompletion(tag, result);
      if (head === tail) tail = Atomics.load(indexes, this.cqTailAt);
    }
    return count;
  }

  /** Nothing may be in flight. */
  close(): void {
    if (this.isClosed) return;
    this.isClosed = true;
    this.system.unmap(this.rings.address, this.rings.lengthBytes);
    this.system.unmap(this.entries.address, this.entries.lengthBytes);
    this.system.close(this.fd);
  }
}

/** struct io_uring_getevents_arg with its time limit behind it, in memory that stays. */
class WaitLimit {
  private readonly memory = new DataView(new ArrayBuffer(EXT_ARG_BYTES + TIMESPEC_BYTES));
  private readonly address = addressOf(this.memory.buffer);

  constructor() {
    const limitAddress = BigInt(this.address + EXT_ARG_BYTES);
    this.memory.setBigUint64(EXT_ARG_TIME_LIMIT_AT, limitAddress, true);
  }

  /** Below a second. */
  addressFor(microseconds: number): number {
    // Seconds stay zero.
    this.memory.setUint32(EXT_ARG_BYTES + 8, microseconds * 1000, true);
    return this.address;
  }
}

/** The kernel's newest way that it knows. @returns the descriptor, or minus errno */
function setUp(system: Calls, params: Int32Array, sqEntries: number, cqEntries: number): number {
  for (const flags of [SETUP_COOP_TASKRUN, 0]) {
    params.fill(0);
    params[PARAM.flags] = flags | SETUP_CQSIZE;
    params[PARAM.cqEntries] = cqEntries;
    const fd = system.setup(sqEntries, addressOf(params.buffer));
    if (fd !== -EINVAL) return fd;
  }
  return -EINVAL;
}

/** struct io_uring_probe: the last operation, a count, and for each operation its number and flags. */
function hasOperations(system: Calls, fd: number): boolean {
  const probe = new Uint8Array(new ArrayBuffer(PROBE_HEADER_BYTES + PROBE_OPS * PROBE_OP_BYTES));
  if (system.register(fd, REGISTER_PROBE, addressOf(probe.buffer), PROBE_OPS) < 0) return false;
  return NEEDED_OPS.every(
    (operation) => (probe[PROBE_HEADER_BYTES + operation * PROBE_OP_BYTES + 2] & OP_SUPPORTED) !== 0,
  );
}

/** A number below 2^53 as 64 bits, low word first. */
function setWide(words: Uint32Array, at: number, value: number): void {
  words[at] = value >>> 0;
  words[at + 1] = Math.floor(value / 0x1_0000_0000);
}

/** Of a submission that passes when some requests are complete. */
export function isPassing(minusErrno: number): boolean {
  return minusErrno === -EAGAIN || minusErrno === -EBUSY;
}
