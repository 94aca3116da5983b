// The NBD server: exports, connections, and an orderly end. Sockets come from listen.ts.
//
// Specification: doc/proto.md of NetworkBlockDevice/nbd. Main thread only.

import type { Socket } from "node:net";
import { Connection } from "./connection.js";
import type { NbdExport, NbdLogger } from "./export.js";
import { CLOSE_TIMEOUT_MS, KEEP_ALIVE_MS } from "./limits.js";
import { SlabPool } from "./slab.js";

export type { NbdExport, NbdLogger } from "./export.js";

export interface NbdServerOptions {
  /** By name. May change while the server runs: clients that are connected keep what they have. */
  exports: ReadonlyMap<string, NbdExport>;
  /** Further clients are hung up on. */
  maxConnections: number;
  logger: NbdLogger;
}

export class NbdServer {
  private readonly options: NbdServerOptions;
  private readonly connections = new Set<Connection>();
  private readonly pool = new SlabPool();
  private closing: Promise<void> | undefined;
  private onLastGone: (() => void) | undefined;

  constructor(options: NbdServerOptions) {
    this.options = options;
  }

  /** Clients, those included whose socket is closed but for whom a device still works. */
  get connectionCount(): number {
    return this.connections.size;
  }

  /** Serves an accepted socket, which belongs to the server from now on. */
  accept(socket: Socket): void {
    const { exports, maxConnections, logger } = this.options;
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
      onGone: () => {
        this.connections.delete(connection);
        if (this.connections.size === 0) this.onLastGone?.();
      },
    });
    this.connections.add(connection);
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
