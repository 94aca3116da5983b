// A connection to one export that is made again when it is lost. Main thread or worker; one event loop owns it.
//
//   idle ─first use─► connecting ─► connected ─lost─► idle …          close(): ended, for good
//
// `run` does a piece of work on the connection; all who work at the same time share one. When the connection is lost
// the work is done again on the next: what it asked for is asked for again, which is harmless, as to read, write or
// zero a range twice is the same as once. Tries are counted and spaced by a growing pause. What the server itself
// says is wrong (EIO, ENOSPC) is an answer, not a loss, and goes to the caller, as does a breach of the protocol.
//
// After a reconnection the export must be the one it was: same size, and still writable if it was. Who writes also has
// it looked at, before anything else is asked, for what was acknowledged before and not flushed (unflushed.ts).

import { setTimeout as delay } from "node:timers/promises";
import { CowcatcherError } from "../../errors.js";
import { NbdClient, type NbdClientOptions } from "./client.js";
import { connectionError } from "./request.js";

/** First pause before the next try; doubled each time up to the longest. */
const RETRY_FIRST_MS = 100;
const RETRY_LONGEST_MS = 5_000;
/** A pause is slept in slices, so that cancelling ends it. */
const SLICE_MS = 100;
/** Retrying ends after this time, however many tries are left. */
export const RECONNECT_LIMIT_MS = 120_000;

export interface NbdSessionOptions extends NbdClientOptions {
  uri: string;
  /** Tries after the first, of one `run` that does not say otherwise. */
  retries: number;
  /** The export's size, once it is known. */
  sizeBytes?: number | undefined;
  isCancelled?: () => boolean;
}

/** A client that connects again when its connection is lost, a stated number of times. One thread. */
export class NbdSession {
  readonly #options: NbdSessionOptions;
  /** Called with each connection after the first, before anybody else has it; what it throws, all who wait get. */
  whenReconnected: ((client: NbdClient) => Promise<void>) | undefined;
  #client: NbdClient | undefined;
  #connecting: Promise<NbdClient> | undefined;
  #sizeBytes: number | undefined;
  #isClosed = false;

  constructor(options: NbdSessionOptions) {
    this.#options = options;
    this.#sizeBytes = options.sizeBytes;
  }

  get uri(): string {
    return this.#options.uri;
  }

  /** The connection of this moment, made if there is none. @throws CowcatcherError as NbdClient.connect. */
  async client(): Promise<NbdClient> {
    if (this.#client !== undefined && this.#client.failure === undefined) return this.#client;
    this.#connecting ??= this.#connect().finally(() => {
      this.#connecting = undefined;
    });
    return this.#connecting;
  }

  async #connect(): Promise<NbdClient> {
    this.#refuseIfClosed();
    const client = await NbdClient.connect(this.uri, this.#options);
    try {
      this.#refuseIfClosed();
      this.#checkSameExport(client);
      if (this.#client !== undefined) await this.whenReconnected?.(client);
    } catch (error) {
      client.destroy();
      throw error;
    }
    this.#sizeBytes = client.sizeBytes;
    this.#client = client;
    return client;
  }

  #checkSameExport(client: NbdClient): void {
    const isSameSize = this.#sizeBytes === undefined || client.sizeBytes === this.#sizeBytes;
    const wasWritable = this.#client !== undefined && !this.#client.readOnly;
    const blockBytes = this.#client?.info.minimumBlockBytes ?? Infinity;
    // Who writes has decided by the block size whether writes to one block must follow each other.
    if (client.info.minimumBlockBytes > blockBytes) {
      throw new CowcatcherError({
        code: "PROTOCOL",
        object: this.uri,
        problem: `connected again, the export has blocks of ${client.info.minimumBlockBytes} bytes instead of ${blockBytes}`,
        hint: "start the server as it was",
      });
    }
    if (isSameSize && !(wasWritable && client.readOnly)) return;
    throw new CowcatcherError({
      code: "PROTOCOL",
      object: this.uri,
      problem: isSameSize
        ? "connected again, the export is read-only"
        : `connected again, the export has ${client.sizeBytes} bytes instead of ${this.#sizeBytes}`,
      hint: "another disk stands there now",
    });
  }

  /**
   * Does `work` on the connection, and again on the next one if the connection is lost meanwhile.
   * @param retries tries after the first
   * @param isChange `work` changes the disk, and later changes of the same place may follow. It is not done again
   *   after a server fell silent: alive perhaps, it may carry the first one out over those that follow the second.
   * @throws CowcatcherError what `work` throws otherwise; CANCELLED; the loss, when the tries are used up.
   */
  async run<T>(
    work: (client: NbdClient) => Promise<T>,
    retries = this.#options.retries,
    isChange = false,
  ): Promise<T> {
    const startMs = performance.now();
    for (let attempt = 0; ; attempt++) {
      let client: NbdClient | undefined;
      try {
        client = await this.client();
        return await work(client);
      } catch (error) {
        const lost = this.#lossOf(client, error);
        const isLate = performance.now() - startMs > RECONNECT_LIMIT_MS;
        if (lost === undefined) throw error;
        if (isChange && client !== undefined && lost.errno === "ETIMEDOUT") throw lost;
        if (attempt >= retries || isLate) throw lost;
        await this.#pause(Math.min(RETRY_FIRST_MS * 2 ** attempt, RETRY_LONGEST_MS));
      }
    }
  }

  /** The loss of the connection that an error is; undefined: it is something else. */
  #lossOf(client: NbdClient | undefined, error: unknown): CowcatcherError | undefined {
    if (this.#isClosed || !(error instanceof CowcatcherError)) return undefined;
    if (client !== undefined) {
      const isGoing = error.errno === "ESHUTDOWN" && client.failure === undefined;
      if (isGoing) client.destroy();
      return isGoing || (client.failure === error && error.code === "IO") ? error : undefined;
    }
    // Never connected: that is an error to be told at once. Later a socket or an export that is gone may come back.
    const isLoss = error.code === "IO" || error.code === "NOT_FOUND";
    if (this.#sizeBytes === undefined || !isLoss) return undefined;
    if (error.object !== this.uri || error.errno === "EACCES") return undefined;
    return new CowcatcherError({ ...error.toDetails(), code: "IO", cause: error });
  }

  async #pause(ms: number): Promise<void> {
    const endMs = performance.now() + ms;
    for (let leftMs = ms; leftMs > 0; leftMs = endMs - performance.now()) {
      this.#refuseIfClosed();
      await delay(Math.min(leftMs, SLICE_MS));
    }
    this.#refuseIfClosed();
  }

  #refuseIfClosed(): void {
    if (this.#isClosed) throw connectionError(this.uri, "the connection is closed", "ENOTCONN");
    if (this.#options.isCancelled?.() !== true) return;
    throw new CowcatcherError({ code: "CANCELLED", object: this.uri, problem: "given up, as asked" });
  }

  /** Says goodbye when the requests at hand are answered. The session may be used again. */
  async rest(): Promise<void> {
    const client = this.#client;
    await client?.disconnect();
  }

  /** For good; requests in flight reject. */
  destroy(): void {
    this.#isClosed = true;
    this.#client?.destroy();
  }

  /** For good, with a goodbye. Never rejects. */
  async close(): Promise<void> {
    await this.rest();
    this.destroy();
  }
}
