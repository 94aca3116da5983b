// The NBD server: exports, connections, and an orderly end. Sockets come from listen.ts.
//
// Places. A client that is in, its negotiation finished, has a place of `maxConnections` until it goes. Without a place
// nobody gets in; whoever asks is told so, and may ask for other things. Clients that are still negotiating take no
// place, and have a bound of their own: a newcomer is always greeted, and pushes out another, the oldest of the address
// that has most of them. So neither silence nor half a word keeps anybody out. One TCP address does not get the last
// places. (A Unix socket's clients have no address: whoever may connect there is trusted with the places.)
//
// Specification: doc/proto.md of NetworkBlockDevice/nbd. Main thread only.

import type { Socket } from "node:net";
import { boundedLog } from "./bounded-log.js";
import { Connection } from "./connection.js";
import type { NbdExport, NbdLogger } from "./export.js";
import { CLOSE_TIMEOUT_MS, KEEP_ALIVE_MS, MAX_NEGOTIATING, PLACES_PER_RESERVED } from "./limits.js";
import type { TlsCredentials } from "./tls.js";
import { SlabPool } from "./slab.js";

export type { NbdExport, NbdLogger } from "./export.js";

export interface NbdServerOptions {
  /** By name. May change while the server runs: clients that are connected keep what they have. */
  exports: ReadonlyMap<string, NbdExport>;
  /** Clients at a time that use an export; further ones are refused when they ask for one. */
  maxConnections: number;
  /** Clients at a time that do not yet use one (limits.ts). */
  maxNegotiating?: number | undefined;
  logger: NbdLogger;
  /** Bytes of buffers from which on a connection is held to one request at a time (limits.ts). */
  maxBufferBytes?: number | undefined;
  /** TLS is required of every client; undefined: it is off. */
  tls?: TlsCredentials | undefined;
}

/** Serves exports on listening sockets. Main thread only. Follows doc/proto.md. */
export class NbdServer {
  private readonly options: NbdServerOptions;
  /** All, with their address (empty for a Unix socket), oldest first. */
  private readonly connections = new Map<Connection, string>();
  private readonly negotiating = new Set<Connection>();
  /** Those that have a place. */
  private readonly inside = new Set<Connection>();
  /** Called when a connection is gone. */
  private readonly watchers = new Set<() => void>();
  private readonly logger: NbdLogger;
  private readonly pool: SlabPool;
  private closing: Promise<void> | undefined;
  private onLastGone: (() => void) | undefined;

  constructor(options: NbdServerOptions) {
    this.options = options;
    this.logger = boundedLog(options.logger);
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
    const { logger } = this;
    const { exports, tls, maxNegotiating = MAX_NEGOTIATING } = this.options;
    if (this.closing !== undefined) {
      socket.on("error", () => undefined);
      socket.destroy();
      return;
    }
    while (this.negotiating.size >= maxNegotiating) this.pushOutOne();
    // Both mean nothing to a Unix socket. Without keep-alive a client whose machine died would stay for ever.
    socket.setNoDelay(true);
    socket.setKeepAlive(true, KEEP_ALIVE_MS);
    const address = socket.remoteAddress ?? "";
    const connection = new Connection(socket, {
      exports,
      pool: this.pool,
      logger,
      tls,
      refusal: () => this.refusalFor(address),
      onIn: () => {
        this.negotiating.delete(connection);
        this.inside.add(connection);
      },
      onGone: () => {
        this.negotiating.delete(connection);
        this.inside.delete(connection);
        this.connections.delete(connection);
        for (const look of [...this.watchers]) look();
        if (this.connections.size === 0) this.onLastGone?.();
      },
    });
    this.connections.set(connection, address);
    this.negotiating.add(connection);
  }

  /** Why no client from there gets in now. */
  private refusalFor(address: string): string | undefined {
    const { maxConnections } = this.options;
    const isFull = this.inside.size >= maxConnections;
    const shareCount = maxConnections - Math.floor(maxConnections / PLACES_PER_RESERVED);
    if (!isFull && (address === "" || this.placesOf(address) < shareCount)) return undefined;
    this.logger.warn({ maxConnections, address }, "too many connections; client refused");
    return isFull
      ? `all ${maxConnections} places are taken (--max-connections)`
      : `${address} has as many of the ${maxConnections} places as one address may have (--max-connections)`;
  }

  private placesOf(address: string): number {
    let count = 0;
    for (const connection of this.inside) if (this.connections.get(connection) === address) count++;
    return count;
  }

  /** Hangs up on the oldest client that is still negotiating, of the address that has most of them. */
  private pushOutOne(): void {
    const counts = new Map<string, number>();
    let most = "";
    for (const connection of this.negotiating) {
      const address = this.connections.get(connection) ?? "";
      counts.set(address, (counts.get(address) ?? 0) + 1);
      if ((counts.get(address) ?? 0) > (counts.get(most) ?? 0)) most = address;
    }
    for (const connection of this.negotiating) {
      if (this.connections.get(connection) !== most) continue;
      this.negotiating.delete(connection);
      connection.destroy();
      break;
    }
    this.logger.warn({ address: most }, "a client that did not finish its negotiation made room for another");
  }

  /**
   * Ends the connections of an export that the caller has taken off the map, as `close` ends all; those whose client
   * takes no answers are cut off after CLOSE_DRAIN_MS, all others after CLOSE_TIMEOUT_MS.
   * @returns fulfilled when none of them uses the export's device any more
   */
  async endExport(nbdExport: NbdExport): Promise<void> {
    const using = this.connectionsOf(nbdExport);
    if (using.length === 0) return;
    for (const connection of using) connection.shutDown();
    const timer = setTimeout(() => {
      for (const connection of using) connection.destroy();
    }, CLOSE_TIMEOUT_MS).unref();
    await new Promise<void>((resolve) => {
      const look = (): void => {
        if (using.some((connection) => this.connections.has(connection))) return;
        this.watchers.delete(look);
        resolve();
      };
      this.watchers.add(look);
      look();
    });
    clearTimeout(timer);
  }

  /** Clients that have chosen the export. */
  clientCountOf(nbdExport: NbdExport): number {
    return this.connectionsOf(nbdExport).length;
  }

  private connectionsOf(nbdExport: NbdExport): Connection[] {
    return [...this.connections.keys()].filter((connection) => connection.nbdExport === nbdExport);
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
    for (const connection of [...this.connections.keys()]) connection.shutDown();
    if (this.connections.size === 0) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(() => {
        this.options.logger.warn({ clients: this.connections.size }, "clients cut off at shutdown");
        for (const connection of [...this.connections.keys()]) connection.destroy();
        resolve();
      }, CLOSE_TIMEOUT_MS);
      this.onLastGone = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
