// The control socket's server: a Unix socket that only its owner may use, and the clients on it.
//
// The socket file. It is bound under a umask, so that no moment exists in which others could connect. A file that
// is left over from a server that is gone (a connection is refused) is replaced; one that answers, or that is no
// socket, is left alone. Main thread only.

import { lstatSync, unlinkSync } from "node:fs";
import { connect, createServer } from "node:net";
import type { Server, Socket } from "node:net";
import { CowcatcherError, errnoOf, ioError } from "../errors.js";
import type { Logger } from "../log.js";
import type { JobHost } from "../backup/host.js";
import type { JobOptions } from "../backup/options.js";
import { execute, versionInfo } from "./commands.js";
import type { CommandContext } from "./command.js";
import { ControlConnection } from "./connection.js";
import { JobMonitor } from "./job-monitor.js";
import type { JsonObject } from "./qmp.js";

/** Each may hold REQUEST_LIMITS.maxBytes of input and OUTPUT_BYTES_MAX of output. */
const CLIENT_COUNT_MAX = 32;
/** sun_path holds 108 bytes with the final NUL; longer ones would be cut silently. */
const SOCKET_PATH_BYTES_MAX = 107;
const PRIVATE_UMASK = 0o177;

export interface ControlServerSettings {
  host: JobHost;
  logger: Logger;
  /** Defaults of jobs that are started here, such as the server's buffer size. */
  jobDefaults?: Partial<JobOptions> | undefined;
  /** cowcatcher's version, for the greeting. */
  version?: string | undefined;
}

export class ControlServer {
  readonly #logger: Logger;
  readonly #context: CommandContext;
  readonly #monitor: JobMonitor;
  readonly #server: Server;
  readonly #clients = new Set<ControlConnection>();

  constructor({ host, logger, jobDefaults = {}, version = "unknown" }: ControlServerSettings) {
    this.#logger = logger;
    this.#monitor = new JobMonitor(host, (event, data) => this.#broadcast(event, data), logger);
    this.#context = { host, monitor: this.#monitor, jobDefaults, version, logger };
    this.#server = createServer((socket) => this.#accept(socket));
  }

  /**
   * Listens on the Unix socket at `path`, mode 0600.
   * @throws CowcatcherError BUSY if another server answers there, EXISTS if another kind of file is there, LIMIT
   *   for a path that is too long, IO.
   */
  async listen(path: string): Promise<void> {
    checkPath(path);
    try {
      await this.#bind(path);
    } catch (cause) {
      if (errnoOf(cause) !== "EADDRINUSE") throw ioError("listen", path, cause);
      await removeStaleSocket(path);
      await this.#bind(path).catch((again: unknown) => {
        throw ioError("listen", path, again);
      });
    }
    this.#server.on("error", (error) => this.#logger.warn({ error }, "the control socket failed"));
  }

  /** Ends all connections and removes the socket file. Jobs go on. */
  async close(): Promise<void> {
    this.#monitor.close();
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    for (const client of this.#clients) client.end();
    await closed;
  }

  #bind(path: string): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#server.once("error", reject);
      const umask = process.umask(PRIVATE_UMASK);
      try {
        // The socket file is made before listen() returns; only the callback comes later.
        this.#server.listen(path, () => {
          this.#server.off("error", reject);
          resolve();
        });
      } finally {
        process.umask(umask);
      }
    });
  }

  #accept(socket: Socket): void {
    if (this.#clients.size >= CLIENT_COUNT_MAX) {
      this.#logger.warn({ limit: CLIENT_COUNT_MAX }, "refused a control client: too many are connected");
      socket.on("error", () => undefined);
      socket.end(
        `{"error":{"class":"GenericError","desc":"Too many clients: ${CLIENT_COUNT_MAX} are connected"}}\r\n`,
      );
      socket.resume();
      return;
    }
    const client = new ControlConnection(socket, {
      greeting: { QMP: { version: versionInfo(this.#context.version), capabilities: [] } },
      execute: (name, args) => execute(name, args, this.#context),
      logger: this.#logger,
    });
    this.#clients.add(client);
    socket.once("close", () => this.#clients.delete(client));
  }

  #broadcast(event: string, data: JsonObject): void {
    const nowMs = Date.now();
    const timestamp = { seconds: Math.floor(nowMs / 1000), microseconds: (nowMs % 1000) * 1000 };
    const line = `${JSON.stringify({ timestamp, event, data })}\r\n`;
    for (const client of this.#clients) client.sendEvent(line);
  }
}

function checkPath(path: string): void {
  if (path !== "" && !path.includes("\0") && Buffer.byteLength(path) <= SOCKET_PATH_BYTES_MAX) return;
  throw new CowcatcherError({
    code: "LIMIT",
    object: path,
    problem: `a Unix socket's path has 1 to ${SOCKET_PATH_BYTES_MAX} bytes`,
    hint: "choose a shorter path",
  });
}

/** @throws CowcatcherError unless a socket file was there that nobody listens on, and is gone now. */
async function removeStaleSocket(path: string): Promise<void> {
  try {
    if (!lstatSync(path).isSocket()) {
      throw new CowcatcherError({
        code: "EXISTS",
        object: path,
        problem: "exists and is not a socket",
        hint: "choose another path",
      });
    }
    if (await answers(path)) {
      throw new CowcatcherError({
        code: "BUSY",
        object: path,
        problem: "another process listens there",
        hint: "end it, or choose another path",
      });
    }
    unlinkSync(path);
  } catch (cause) {
    // Gone meanwhile: as good as removed.
    if (errnoOf(cause) !== "ENOENT") throw ioError("replace the socket", path, cause);
  }
}

/** Only a refused connection shows that nobody listens; any other trouble is taken for a living server. */
function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect(path);
    probe.once("connect", () => {
      probe.destroy();
      resolve(true);
    });
    probe.once("error", (error) => {
      const errno = errnoOf(error);
      resolve(errno !== "ECONNREFUSED" && errno !== "ENOENT");
    });
  });
}
