// Listening sockets: Unix, TCP, and those that systemd hands over.
//
// Sockets that arrive before `serve` is called wait; nothing is read from them (pauseOnConnect), so none is lost.
//
// Main thread only.

import { lstatSync, unlinkSync, chmodSync } from "node:fs";
import { connect, createServer, type ListenOptions, type Server, type Socket } from "node:net";
import { CowcatcherError, errnoOf, ioError } from "../errors.js";

export { notifyReady } from "./notify.js";

export interface SocketServer {
  accept(socket: Socket): void;
}

export interface NbdListener {
  /** For people and logs: a path, or host:port as bound. */
  readonly address: string;
  /** Hands every socket to `server`, those that came before too. */
  serve(server: SocketServer): void;
  /** Stops listening and removes a Unix socket's file. Accepted sockets go on. */
  close(): Promise<void>;
}

/** A stale socket refuses at once; a live but busy server may take a moment. */
const LIVENESS_TIMEOUT_MS = 2_000;
const LISTEN_BACKLOG = 128;
/** systemd passes its sockets from this descriptor on (sd_listen_fds(3)). */
const SD_LISTEN_FDS_START = 3;
const MAX_SYSTEMD_SOCKETS = 64;

/**
 * Listens on a Unix socket. A socket file that no one listens on any more is replaced.
 * @throws CowcatcherError EXISTS where another program listens there, or the file is no socket; IO.
 */
export async function listenUnix(path: string, options: { mode?: number } = {}): Promise<NbdListener> {
  await removeStaleSocket(path);
  const listener = new Listener(path);
  await listener.listen({ path });
  if (options.mode !== undefined) {
    try {
      chmodSync(path, options.mode);
    } catch (error) {
      await listener.close();
      throw ioError("set the mode of", path, error);
    }
  }
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
    await listener.listen({ fd } as ListenOptions);
    listeners.push(listener);
  }
  return listeners;
}

class Listener implements NbdListener {
  address: string;
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

  async listen(options: ListenOptions): Promise<void> {
    try {
      await new Promise<void>((resolve, reject) => {
        this.server.once("error", reject);
        this.server.listen({ backlog: LISTEN_BACKLOG, ...options }, resolve);
      });
    } catch (error) {
      throw ioError("listen on", this.address, error);
    }
    this.server.removeAllListeners("error");
    // Running out of descriptors fails one accept; it must not end the process.
    this.server.on("error", () => undefined);
    const bound = this.server.address();
    if (bound !== null && typeof bound === "object") {
      this.address =
        bound.family === "IPv6" ? `[${bound.address}]:${bound.port}` : `${bound.address}:${bound.port}`;
    }
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

async function removeStaleSocket(path: string): Promise<void> {
  try {
    if (!lstatSync(path).isSocket()) {
      throw new CowcatcherError({
        code: "EXISTS",
        object: path,
        problem: "a file that is not a socket is in the way",
        hint: "choose another path for the socket",
      });
    }
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return;
    throw ioError("look at", path, error);
  }
  if (await isLive(path)) {
    throw new CowcatcherError({
      code: "EXISTS",
      object: path,
      problem: "another program listens on this socket",
      hint: "stop it, or choose another path",
    });
  }
  try {
    unlinkSync(path);
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw ioError("remove the stale socket", path, error);
  }
}

/** Only a refused connection proves that nobody listens. */
function isLive(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect(path);
    const answer = (live: boolean): void => {
      probe.destroy();
      resolve(live);
    };
    probe.setTimeout(LIVENESS_TIMEOUT_MS, () => {
      answer(true);
    });
    probe.once("connect", () => {
      answer(true);
    });
    probe.once("error", (error) => {
      const errno = errnoOf(error);
      answer(errno !== "ECONNREFUSED" && errno !== "ENOENT");
    });
  });
}
