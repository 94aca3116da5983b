// Listening sockets: Unix, TCP, and those that systemd hands over.
//
// Sockets that arrive before `serve` is called wait; nothing is read from them (pauseOnConnect), so none is lost.
//
// Main thread only.

import { readFileSync, readlinkSync } from "node:fs";
import { createServer, type ListenOptions, type Server, type Socket } from "node:net";
import { CowcatcherError, ioError } from "../../errors.js";
import { listenAtPath, type UnixSocketOptions } from "../../unix-socket.js";
import type { NbdPlace } from "../wire/place.js";

export { notifyReady } from "./notify.js";

export interface SocketServer {
  accept(socket: Socket): void;
}

export interface NbdListener {
  /** For people and logs: a path, or host:port as bound. */
  readonly address: string;
  /** The same for programs; undefined for a socket whose address nobody knows. */
  readonly place: NbdPlace | undefined;
  /** Hands every socket to `server`, those that came before too. */
  serve(server: SocketServer): void;
  /** Stops listening and removes a Unix socket's file. Accepted sockets go on. */
  close(): Promise<void>;
}

const LISTEN_BACKLOG = 128;
/** systemd passes its sockets from this descriptor on (sd_listen_fds(3)). */
const SD_LISTEN_FDS_START = 3;
const MAX_SYSTEMD_SOCKETS = 64;

/**
 * Listens on a Unix socket. A socket file that no one listens on any more is replaced.
 * @param options permission bits of the socket's file, as asked for or as the umask leaves them
 * @throws CowcatcherError BUSY where another program listens there, EXISTS where the file is no socket, LIMIT, IO.
 */
export async function listenUnix(
  path: string,
  options: Pick<UnixSocketOptions, "mode" | "groupId"> = {},
): Promise<NbdListener> {
  const listener = new Listener(path);
  await listener.listenAtPath(path, options);
  return listener;
}

/** Listens on TCP; port 0 takes a free one, which `address` then names. @throws CowcatcherError IO. */
export async function listenTcp(host: string, port: number): Promise<NbdListener> {
  const listener = new Listener(`${host}:${port}`);
  await listener.listen({ host, port });
  return listener;
}

/**
 * The sockets that systemd (or systemd-socket-activate) has passed to this process, none if it was not started so.
 * The variables are removed from the environment, so that no child takes the sockets for its own.
 * @throws CowcatcherError USAGE for variables that make no sense; IO.
 */
export async function systemdListeners(
  environment: NodeJS.ProcessEnv = process.env,
  firstDescriptor = SD_LISTEN_FDS_START,
): Promise<NbdListener[]> {
  const { LISTEN_PID: pid, LISTEN_FDS: count } = environment;
  if (pid === undefined || count === undefined || Number(pid) !== process.pid) return [];
  for (const name of ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"]) delete environment[name];
  const socketCount = Number(count);
  if (!Number.isInteger(socketCount) || socketCount < 1 || socketCount > MAX_SYSTEMD_SOCKETS) {
    throw new CowcatcherError({
      code: "USAGE",
      object: "LISTEN_FDS",
      problem: `'${count}' is not a number of sockets from 1 to ${MAX_SYSTEMD_SOCKETS}`,
    });
  }
  const listeners: NbdListener[] = [];
  for (let fd = firstDescriptor; fd < firstDescriptor + socketCount; fd++) {
    const listener = new Listener(`systemd socket ${fd}`);
    await listener.listen({ fd });
    listeners.push(listener);
  }
  return listeners;
}

class Listener implements NbdListener {
  address: string;
  place: NbdPlace | undefined;
  private readonly server: Server;
  private readonly early: Socket[] = [];
  private target: SocketServer | undefined;

  constructor(address: string) {
    this.address = address;
    this.server = createServer({ pauseOnConnect: true, allowHalfOpen: true, noDelay: true }, (socket) => {
      if (this.target !== undefined) this.target.accept(socket);
      else this.early.push(socket);
    });
  }

  async listenAtPath(path: string, access: Pick<UnixSocketOptions, "mode" | "groupId">): Promise<void> {
    await listenAtPath(this.server, path, { ...access, backlog: LISTEN_BACKLOG });
    this.place = { path };
    this.outlastErrors();
  }

  async listen(options: ListenOptions & { fd?: number }): Promise<void> {
    try {
      await new Promise<void>((resolve, reject) => {
        this.server.once("error", reject);
        this.server.listen({ backlog: LISTEN_BACKLOG, ...options }, resolve);
      });
    } catch (error) {
      throw ioError("listen on", this.address, error);
    }
    this.outlastErrors();
    const bound = this.server.address();
    if (bound === null && options.fd !== undefined) this.place = unixPlaceOf(options.fd);
    if (bound !== null && typeof bound === "object") {
      this.place = { host: bound.address, port: bound.port };
      this.address =
        bound.family === "IPv6" ? `[${bound.address}]:${bound.port}` : `${bound.address}:${bound.port}`;
    }
  }

  /** Running out of descriptors fails one accept; it must not end the process. */
  private outlastErrors(): void {
    this.server.removeAllListeners("error");
    this.server.on("error", () => undefined);
  }

  serve(server: SocketServer): void {
    this.target = server;
    for (const socket of this.early.splice(0)) server.accept(socket);
  }

  async close(): Promise<void> {
    for (const socket of this.early.splice(0)) socket.destroy();
    if (!this.server.listening) return;
    // Node removes a Unix socket's file itself. The callback waits for sockets that are still open, which are not
    // this listener's business.
    this.server.close();
    await Promise.resolve();
  }
}

/** Node does not know the path of an inherited Unix socket; the kernel's list of them does. */
function unixPlaceOf(fd: number): NbdPlace | undefined {
  try {
    const inode = /^socket:\[(\d+)\]$/.exec(readlinkSync(`/proc/self/fd/${fd}`))?.[1];
    for (const line of readFileSync("/proc/self/net/unix", "utf8").split("\n")) {
      const found = /^\S+ \S+ \S+ \S+ \S+ \S+ +(\d+) (\/.*)$/.exec(line);
      if (found?.[1] === inode && found?.[2] !== undefined) return { path: found[2] };
    }
  } catch {
    // No /proc: it stays unknown.
  }
  return undefined;
}
