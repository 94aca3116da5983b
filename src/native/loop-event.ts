// An eventfd that wakes Node's event loop: what the kernel counts in it arrives as a callback.
//
// Node offers no way to poll a descriptor. What it has is a socket on a pipe's end, and of that end libuv asks no more
// than that it can be polled and read. So a socket is made on a pipe, and before the loop has polled it the eventfd takes
// the pipe's place (dup3). From then on libuv polls the eventfd and reads its eight bytes, which sets it to zero: one
// read a wake-up, whatever it counted. The other ways were dearer: a blocked thread that posts a message 41 µs, a read of
// libuv's pool that blocks 36 µs and one of its four threads.
//
// Level-triggered: what is signalled before the read is seen again. A callback may come without need.
// Main thread. Null where koffi is missing.

import { Socket, type OnReadOpts, type SocketConstructorOpts } from "node:net";
import { constants } from "node:os";
import { addressOf } from "./addresses.js";
import { loadKoffi } from "./koffi.js";
import { optionalLibrary } from "./optional-library.js";

const { O_NONBLOCK, O_CLOEXEC } = { O_NONBLOCK: 0o4000, O_CLOEXEC: 0o2000000 };
/** More than the eight bytes: a read that does not fill its buffer is not followed by another. */
const READ_BYTES = 64;

interface Calls {
  /** -1: failed; the error is koffi.errno(). */
  eventfd(initial: number, flags: number): number;
  pipe2(fdsAddress: number, flags: number): number;
  dup3(from: number, to: number, flags: number): number;
  close(fd: number): number;
  errno(): number;
}

const calls = optionalLibrary((): Calls => {
  const koffi = loadKoffi();
  const library = koffi.load("libc.so.6");
  const declare = (prototype: string): ((...args: number[]) => number) => library.func(prototype);
  return {
    eventfd: declare("int eventfd(unsigned int initial, int flags)"),
    pipe2: declare("int pipe2(uint64_t fds, int flags)"),
    dup3: declare("int dup3(int from, int to, int flags)"),
    close: declare("int close(int fd)"),
    errno: () => koffi.errno(),
  };
});

/** How often is looked where the eventfd cannot be read any more. */
const WITHOUT_SIGNALS_MS = 1;

export class LoopEvent {
  private isAwaited = false;
  private isClosed = false;
  private timer: NodeJS.Timeout | undefined;

  /** @param fd the eventfd, which the socket closes */
  private constructor(
    readonly fd: number,
    private readonly socket: Socket,
    onSignal: () => void,
  ) {
    // Reading an eventfd does not fail. If it did, who waits for a signal would wait for ever.
    socket.once("close", () => {
      if (this.isClosed) return;
      this.timer = setInterval(onSignal, WITHOUT_SIGNALS_MS);
      if (!this.isAwaited) this.timer.unref();
    });
  }

  /**
   * @param onSignal called in a turn of the event loop after the eventfd was counted up
   * @returns minus errno where the system has none to give, or Node no such socket
   */
  static open(onSignal: () => void): LoopEvent | number {
    const system = calls();
    if (system === null) return -constants.errno.ENOSYS;
    const eventFd = system.eventfd(0, O_CLOEXEC | O_NONBLOCK);
    if (eventFd < 0) return -system.errno();
    const ends = new Int32Array(new ArrayBuffer(8));
    if (system.pipe2(addressOf(ends.buffer), O_CLOEXEC | O_NONBLOCK) < 0) {
      const result = -system.errno();
      system.close(eventFd);
      return result;
    }
    const [fd, otherEnd] = [ends[0], ends[1]];
    const options: SocketConstructorOpts & { onread: OnReadOpts } = {
      fd,
      readable: true,
      writable: false,
      onread: {
        buffer: Buffer.allocUnsafeSlow(READ_BYTES),
        callback: () => {
          onSignal();
          return true;
        },
      },
    };
    const socket = pollable(options);
    const result = socket === null ? -constants.errno.ENOTSUP : system.dup3(eventFd, fd, O_CLOEXEC);
    const errno = result === -1 ? -system.errno() : result;
    system.close(eventFd);
    system.close(otherEnd);
    if (socket === null) system.close(fd);
    if (socket !== null && errno >= 0) return new LoopEvent(fd, socket, onSignal);
    socket?.destroy();
    return errno;
  }

  /** The loop does not end while a signal is awaited. */
  setAwaited(isAwaited: boolean): void {
    this.isAwaited = isAwaited;
    const source = this.timer ?? this.socket;
    if (isAwaited) source.ref();
    else source.unref();
  }

  close(): void {
    this.isClosed = true;
    clearInterval(this.timer);
    this.socket.destroy();
  }
}

/** Null where this Node makes no socket of it. */
function pollable(options: SocketConstructorOpts): Socket | null {
  try {
    return new Socket(options).on("error", () => undefined).unref();
  } catch {
    return null;
  }
}
