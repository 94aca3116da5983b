// Reading a socket straight into our own buffers.
//
// Node gives each read a fresh 64 KiB buffer. A net.Socket that is made with `onread` reads into buffers of the
// caller's choice instead, of any size and without an allocation a read. Node's servers cannot be told to make
// such sockets, so an accepted socket's handle is moved into a new one. The handle is not documented; where it does
// not look as expected (a TLS socket has none of its own), the socket stays as it is and its chunks are copied.

import { Socket, type OnReadOpts, type SocketConstructorOpts } from "node:net";

export interface SocketReader {
  /** Where the next bytes go; never empty. Asked for again after each `received`. */
  landing(): Buffer;
  /** byteCount bytes lie in the landing. To stop, pause the socket. */
  received(byteCount: number): void;
}

/**
 * The descriptor that a plain socket's bytes go to, for system calls of our own. Undefined: its bytes are changed on their way
 * (TLS), or it is closed. To be asked for anew each time, as the number may be another file's later.
 */
export function descriptorOf(socket: object): number | undefined {
  if (socket.constructor !== Socket || (socket as Socket).destroyed || (socket as Socket).writableEnded)
    return undefined;
  const fd = (socket as SocketWithHandle)._handle?.fd;
  return typeof fd === "number" && fd >= 0 ? fd : undefined;
}

interface MovableHandle {
  fd?: unknown;
  useUserBuffer: unknown;
  readStart: unknown;
}

interface SocketWithHandle {
  _handle?: MovableHandle | null;
}

/** Node's documented option for outgoing sockets; its types leave it out of the constructor's. */
type OptionsWithHandle = SocketConstructorOpts & { handle: MovableHandle; onread: OnReadOpts };

/** Starts reading. Returns the socket to use from now on, which may not be the one given. */
export function readDirectly(socket: Socket, reader: SocketReader): Socket {
  const owner = socket as unknown as SocketWithHandle;
  const handle = owner._handle;
  const canMove =
    socket.constructor === Socket &&
    socket.readableLength === 0 &&
    typeof handle?.useUserBuffer === "function" &&
    typeof handle.readStart === "function";
  if (!canMove) {
    readByCopy(socket, reader);
    return socket;
  }
  const options: OptionsWithHandle = {
    handle,
    allowHalfOpen: true,
    readable: true,
    writable: true,
    onread: {
      buffer: () => reader.landing(),
      callback: (byteCount) => {
        reader.received(byteCount);
        return true;
      },
    },
  };
  owner._handle = null;
  const moved = new Socket(options);
  // Without its handle the old socket has nothing to close; this only takes it off its server's list.
  socket.destroy();
  return moved;
}

/**
 * Starts reading the ordinary way, which any kind of socket allows. Returns a function that stops it, with the
 * socket paused, and tells how many bytes had been read from the socket but not been delivered.
 */
export function readByCopy(socket: Socket, reader: SocketReader): () => number {
  socket.allowHalfOpen = true;
  let rest: Buffer | undefined;
  const deliver = (): void => {
    while (rest !== undefined && !socket.isPaused()) {
      const landing = reader.landing();
      const byteCount = rest.copy(landing);
      rest = byteCount === rest.length ? undefined : rest.subarray(byteCount);
      reader.received(byteCount);
    }
  };
  const take = (chunk: Buffer): void => {
    rest = rest === undefined ? chunk : Buffer.concat([rest, chunk]);
    deliver();
  };
  socket.on("data", take);
  socket.on("resume", deliver);
  return () => {
    socket.pause();
    socket.off("data", take);
    socket.off("resume", deliver);
    return rest?.length ?? 0;
  };
}
