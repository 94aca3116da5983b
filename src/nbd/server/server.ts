// The NBD server: exports, connections, and an orderly end. Sockets come from listen.ts.
//
// Specification: doc/proto.md of NetworkBlockDevice/nbd. Main thread only.

import type { Socket } from "node:net";
import { Connection } from "./connection.js";
import type { NbdExport, NbdLogger } from "./export.js";
import { CLOSE_TIMEOUT_MS, KEEP_ALIVE_MS } from "./limits.js";
import type { TlsCredentials } from "./tls.js";
import { SlabPool } from "./slab.js";

export type { NbdExport, NbdLogger } from "./export.js";

export interface NbdServerOptions {
  /** By name. May change while the server runs: clients that are connected keep what they have. */
  exports: ReadonlyMap<string, NbdExport>;
  /** Further clients are hung up on. */
  maxConnections: number;
  logger: NbdLogger;
  /** Bytes of buffers from which on a connection is held to one request at a time (limits.ts). */
  maxBufferBytes?: number | undefined;
  /** TLS is required of every client; undefined: it is off. */
  tls?: TlsCredentials | undefined;
}

/** Serves exports on listening sockets. Main thread only. Follows doc/proto.md. */
export class NbdServer {
  private readonly options: NbdServerOptions;
  private readonly connections = new Set<Connection>();
  private readonly pool: SlabPool;
  private closing: Promise<void> | undefined;
  private onLastGone: (() => void) | undefined;

  constructor(options: NbdServerOptions) {
    this.options = options;
    this.pool = new SlabPool(options.maxBufferBytes);
  }

  /** Clients, those included whose socket is closed but for whom a device still works. */
  get connectionCount(): number {
    return this.connections.size;
  }

  /** Bytes of buffers that connections hold at this moment. */
  get heldBytes(): number {
    return this.pool.inUseBytes;
  }

  /** Serves an accepted socket, which belongs to the server from now on. */
  accept(socket: Socket): void {
    const { exports, maxConnections, logger, tls } = this.options;
    if (this.closing !== undefined || this.connections.size >= maxConnections) {
      if (this.closing === undefined) logger.warn({ maxConnections }, "too many connections; client refused");
      socket.on("error", () => undefined);
      socket.destroy();
      return;
    }
    // Both mean nothing to a Unix socket. Without keep-alive a client whose machine died would stay for ever.
    socket.setNoDelay(true);
    socket.setKeepAlive(true, KEEP_ALIVE_MS);
    const connection = new Connection(socket, {
      exports,
      pool: this.pool,
      logger,
      tls,
      onGone: () => {
        this.connections.delete(connection);
        if (this.connections.size === 0) this.onLastGone?.();
      },
    });
    this.connections.add(connection);
  }

  /**
   * Ends the connections of an export that the caller has taken off the map, as `close` ends all; those whose client
   * takes no answers are cut off after CLOSE_TIMEOUT_MS. Returns at once.
   */
  endExport(nbdExport: NbdExport): void {
    const using = [...this.connections].filter((connection) => connection.nbdExport === nbdExport);
    if (using.length === 0) return;
    for (const connection of using) connection.shutDown();
    setTimeout(() => {
      for (const connection of using) connection.destroy();
    }, CLOSE_TIMEOUT_MS).unref();
  }

  /**
   * Finishes what is in flight, answers what still comes with ESHUTDOWN, and ends every connection; after
   * CLOSE_TIMEOUT_MS it does so at once. When it resolves in time, no device is used any more.
   */
  close(): Promise<void> {
    this.closing ??= this.closeConnections();
    return this.closing;
  }

  private async closeConnections(): Promise<void> {
    for (const connection of [...this.connections]) connection.shutDown();
    if (this.connections.size === 0) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(() => {
        this.options.logger.warn({ clients: this.connections.size }, "clients cut off at shutdown");
        for (const connection of [...this.connections]) connection.destroy();
        resolve();
      }, CLOSE_TIMEOUT_MS);
      this.onLastGone = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
