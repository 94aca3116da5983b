// The control socket's server: a Unix socket that only its owner may use, and the clients on it.
//
// What becomes of the socket's file is unix-socket.ts's business. Main thread only.

import { createServer } from "node:net";
import type { Server, Socket } from "node:net";
import type { Logger } from "../log.js";
import type { JobHost } from "../backup/host.js";
import type { JobOptions } from "../backup/options.js";
import { execute, versionInfo } from "./commands.js";
import type { CommandContext } from "./command.js";
import { ControlConnection } from "./connection.js";
import type { ExportHost } from "./export-host.js";
import { JobMonitor } from "./job-monitor.js";
import type { JsonObject } from "../qmp/protocol.js";
import { TargetNodes } from "./target-nodes.js";
import { listenAtPath, type UnixSocketOptions } from "../unix-socket.js";

/** Each may hold REQUEST_LIMITS.maxBytes of input and OUTPUT_BYTES_MAX of output. */
const CLIENT_COUNT_MAX = 32;
const PRIVATE_MODE = 0o600;

export interface ControlServerSettings {
  host: JobHost;
  logger: Logger;
  exports?: ExportHost | undefined;
  /** Defaults of jobs that are started here, such as the server's buffer size. */
  jobDefaults?: Partial<JobOptions> | undefined;
  /** cowcatcher's version, for the greeting. */
  version?: string | undefined;
}

/** Listens on the control socket and serves QMP on it, to several clients at once. Main thread only. */
export class ControlServer {
  readonly #logger: Logger;
  readonly #context: CommandContext;
  readonly #monitor: JobMonitor;
  readonly #server: Server;
  readonly #clients = new Set<ControlConnection>();

  constructor({ host, logger, exports, jobDefaults = {}, version = "unknown" }: ControlServerSettings) {
    this.#logger = logger;
    this.#monitor = new JobMonitor(host, (event, data) => this.#broadcast(event, data), logger);
    this.#context = {
      host,
      monitor: this.#monitor,
      targets: new TargetNodes(),
      exports,
      jobDefaults,
      version,
      logger,
    };
    exports?.onDeleted((id) => this.#broadcast("BLOCK_EXPORT_DELETED", { id }));
    this.#server = createServer((socket) => this.#accept(socket));
  }

  /**
   * Listens on the Unix socket at `path`, mode 0600 unless something else is asked for.
   * @throws CowcatcherError BUSY if another server answers there, EXISTS if another kind of file is there, LIMIT
   *   for a path that is too long, IO.
   */
  async listen(path: string, access: Pick<UnixSocketOptions, "mode" | "groupId"> = {}): Promise<void> {
    const mode = access.mode ?? (access.groupId === undefined ? PRIVATE_MODE : undefined);
    await listenAtPath(this.#server, path, { mode, groupId: access.groupId });
    this.#server.on("error", (error) => this.#logger.warn({ error }, "the control socket failed"));
  }

  /** Ends all connections and removes the socket file. Jobs go on. */
  async close(): Promise<void> {
    this.#monitor.close();
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    for (const client of this.#clients) client.end();
    await closed;
  }

  #accept(socket: Socket): void {
    // One that has said nothing yet keeps nobody out.
    const silent = [...this.#clients].find((client) => !client.isNegotiated);
    if (this.#clients.size >= CLIENT_COUNT_MAX && silent !== undefined) {
      this.#clients.delete(silent);
      silent.end();
    }
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
