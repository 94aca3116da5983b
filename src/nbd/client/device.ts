// An NBD export as an image: for info, map, compare, for a guest to whom `serve` hands it on, and, before a copy
// begins, for finding out what the workers need to know. Main thread.
//
// One connection, made again when it is lost (client/session.ts). A write that ends inside one of the server's
// blocks reads that block first, so it runs alone: it waits for the writes before it, those after it wait for it.
//
// A flush promises that what was acknowledged before lasts. After a reconnection it fails once if the server has lost
// any of it (unflushed.ts), so that the guest's file system learns of it; a lost network alone makes no flush fail.
//
// Workers have connections of their own. A server may take one client at a time (it then does not say CAN_MULTI_CONN),
// so for a copy `handOver` gathers what is to be known and hangs up before the workers come; one that takes several is
// left when the first worker is in. Where the export stays in
// use by a guest (a live backup) there are several connections at once, and the server must be fit for that.

import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import type {
  BlockStatus,
  Completion,
  FrozenSource,
  Image,
  NbdSourceDescription,
  WriteZeroesOptions,
} from "../../block/device.js";
import { MAX_RANGE_BYTES, type NbdClient } from "./client.js";
import { readRange, trimRange, writeRange, type ZeroPolicy, zeroRange } from "./io.js";
import { NbdSession } from "./session.js";
import type { ExtentMap } from "../../block/extent-map.js";
import { dirtyBitmapContext, gatherDirty, gatherZeroes } from "./extent-map.js";
import { NBD_META_BASE_ALLOCATION, NBD_STATE_HOLE, NBD_STATE_ZERO } from "../wire/protocol.js";
import { digestOfAll, UnflushedWrites } from "./unflushed.js";
import { WriteGate } from "./write-gate.js";

/** Of a source that a backup reads or a guest uses; that of a target is --target-retries. */
export const SOURCE_RETRIES = 5;

/** Guests write blocks of this size as a rule. Notes of up to 256 MiB, some 10 MiB of memory. */
const UNFLUSHED_BOUNDS = { unitBytes: 4096, maxPieces: 65_536, maxBytes: Infinity, digest: digestOfAll };

export interface OpenNbdOptions {
  readOnly: boolean;
  /** A dirty bitmap that the copy will ask for. */
  bitmap?: string | undefined;
  /** Asked while an answer is awaited; true ends the wait. */
  isCancelled?: (() => boolean) | undefined;
}

/** What the workers are told of the export. */
interface Handover {
  zeroes: ExtentMap | null;
  dirty: ExtentMap | null;
}

/**
 * @throws CowcatcherError as NbdClient.connect; IO (EROFS) for a read-only export that is to be written;
 *   UNSUPPORTED for a bitmap that the export does not have.
 */
export async function openNbdImage(uri: string, options: OpenNbdOptions): Promise<NbdImage> {
  const { bitmap, isCancelled = () => false } = options;
  // One of them: where a snapshot-access export of QEMU's refuses what lies outside the bitmap, QEMU 7.2 answers a
  // request for both twice, once with the error and once with the bitmap (nbd/server.c, NBD_CMD_BLOCK_STATUS).
  const contexts = [bitmap === undefined ? NBD_META_BASE_ALLOCATION : dirtyBitmapContext(bitmap)];
  const session = new NbdSession({ uri, retries: SOURCE_RETRIES, contexts, isCancelled });
  const client = await session.client();
  try {
    if (client.readOnly && !options.readOnly) {
      throw new CowcatcherError({
        code: "IO",
        object: uri,
        problem: "the export is read-only",
        hint: "give --read-only",
        errno: "EROFS",
      });
    }
    if (bitmap !== undefined && !client.contexts.has(dirtyBitmapContext(bitmap))) {
      throw new CowcatcherError({
        code: "UNSUPPORTED",
        object: uri,
        problem: `the server exports no dirty bitmap '${bitmap}' with it`,
        hint: "see what there is with nbdinfo --list; in QEMU add the bitmap to the export (qemu-nbd -B)",
      });
    }
    return new NbdImage(session, client, options);
  } catch (error) {
    await session.close();
    throw error;
  }
}

/**
 * An NBD export as an image: raw, read and written through a session that connects again. Main thread only.
 */
export class NbdImage implements Image {
  readonly path: string;
  readonly name: string;
  readonly sizeBytes: number;
  readonly readOnly: boolean;
  readonly clusterSizeBytes = 0;
  readonly format = "raw" as const;
  /** Nothing was guessed: an export is raw unless the user says otherwise. */
  readonly probed = false;
  readonly backing = null;
  readonly files = [];
  /** The server is fit for several connections to the export at a time. */
  readonly canMultiConn: boolean;
  readonly #session: NbdSession;
  readonly #bitmap: string | undefined;
  readonly #canAskStatus: boolean;
  readonly #zeroPolicy: ZeroPolicy = { mayUnmap: true, fast: true };
  readonly #zeroKeepPolicy: ZeroPolicy = { mayUnmap: false, fast: true };
  #handover: Handover | null = null;
  readonly #blockBytes: number;
  readonly #gate = new WriteGate();
  readonly #unflushed = new UnflushedWrites(UNFLUSHED_BOUNDS);
  /** Of acknowledged writes; each is told by the flushes that were under way or are the next. */
  #lossCount = 0;
  #toldLossCount = 0;
  #loss: CowcatcherError | undefined;
  #isRelieving = false;

  constructor(session: NbdSession, client: NbdClient, { readOnly, bitmap }: OpenNbdOptions) {
    this.path = this.name = session.uri;
    this.sizeBytes = client.sizeBytes;
    this.readOnly = readOnly;
    this.canMultiConn = client.canMultiConn;
    this.#session = session;
    this.#bitmap = bitmap;
    this.#blockBytes = client.info.minimumBlockBytes;
    this.#canAskStatus = client.contexts.has(NBD_META_BASE_ALLOCATION);
    session.whenReconnected = async (connection) => this.#noteLoss(await this.#unflushed.lostBy(connection));
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.#session.run((client) => readRange(client, buffer, bufferOffset, lengthBytes, offsetBytes));
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.#change(
      offsetBytes,
      lengthBytes,
      (client) => writeRange(client, buffer, bufferOffset, lengthBytes, offsetBytes),
      () => this.#unflushed.written(offsetBytes, lengthBytes, buffer, bufferOffset),
    );
  }

  writeZeroes(offsetBytes: number, lengthBytes: number, { mayUnmap }: WriteZeroesOptions): Completion {
    const policy = mayUnmap ? this.#zeroPolicy : this.#zeroKeepPolicy;
    return this.#change(
      offsetBytes,
      lengthBytes,
      (client) => zeroRange(client, offsetBytes, lengthBytes, policy),
      () => this.#unflushed.zeroed(offsetBytes, lengthBytes),
    );
  }

  discard(offsetBytes: number, lengthBytes: number): Completion {
    // What it leaves is the server's choice.
    this.#unflushed.begin(offsetBytes, lengthBytes);
    return this.#session.run((client) => trimRange(client, offsetBytes, lengthBytes), undefined, true);
  }

  /** @throws CowcatcherError also VERIFY (EIO): a server that was connected to again has lost acknowledged writes. */
  async flush(): Promise<void> {
    const toldLossCount = this.#toldLossCount;
    const epoch = this.#unflushed.startFlush();
    await this.#session.run((client) => client.flush());
    this.#unflushed.flushed(epoch);
    if (this.#lossCount === toldLossCount || this.#loss === undefined) return;
    this.#toldLossCount = this.#lossCount;
    throw this.#loss;
  }

  #noteLoss(loss: CowcatcherError | undefined): void {
    if (loss === undefined) return;
    this.#loss = loss;
    this.#lossCount++;
    this.#unflushed.clear();
  }

  /** A guest that never flushes: so that what is not flushed stays bounded. */
  #relieve(): void {
    if (this.#isRelieving) return;
    this.#isRelieving = true;
    const epoch = this.#unflushed.startFlush();
    this.#session
      .run((client) => client.flush())
      .then(
        () => this.#unflushed.flushed(epoch),
        // A server may answer a flush's failure once only.
        (error: unknown) => this.#noteLoss(toCowcatcherError(error, this.name)),
      )
      .finally(() => {
        this.#isRelieving = false;
      });
  }

  async blockStatus(offsetBytes: number, lengthBytes: number): Promise<BlockStatus> {
    if (!this.#canAskStatus) return statusOf(offsetBytes, lengthBytes, 0);
    const asked = Math.min(lengthBytes, MAX_RANGE_BYTES);
    return this.#session.run(async (client) => {
      const unit = client.info.minimumBlockBytes;
      const start = offsetBytes - (offsetBytes % unit);
      const length = Math.min(
        Math.ceil((offsetBytes + asked - start) / unit) * unit,
        client.sizeBytes - start,
      );
      const { lengths, flags } = await client.blockStatus(NBD_META_BASE_ALLOCATION, start, length);
      const found = Math.max(1, (lengths[0] ?? 0) - (offsetBytes - start));
      return statusOf(offsetBytes, Math.min(found, asked), flags[0] ?? 0);
    });
  }

  /**
   * Gathers what workers need to know, for the connections that they will make. A server that takes one client at a
   * time is left now; another when `letGo` is called, as it may end with its last client (nbdkit's exitlast filter).
   * @throws CowcatcherError
   */
  async handOver(): Promise<void> {
    const bitmap = this.#bitmap;
    this.#handover = await this.#session.run(async (client) => ({
      zeroes: await gatherZeroes(client),
      dirty: bitmap === undefined ? null : await gatherDirty(client, bitmap),
    }));
    if (!this.canMultiConn) await this.#session.rest();
  }

  /** After `handOver`, when a worker has its connection. The place may be wanted for another. Never rejects. */
  async letGo(): Promise<void> {
    if (this.#handover !== null) await this.#session.rest();
  }

  /** The dirty bitmap's map; null without one, or before `handOver`. */
  get dirty(): ExtentMap | null {
    return this.#handover?.dirty ?? null;
  }

  /** @throws CowcatcherError UNSUPPORTED while a guest uses a server that takes one connection at a time. */
  freeze(): FrozenSource {
    if (this.#handover === null && !this.canMultiConn) {
      throw new CowcatcherError({
        code: "UNSUPPORTED",
        object: this.name,
        problem:
          "the server is not fit for several connections (no CAN_MULTI_CONN), which a live backup needs",
        hint: "start it so that it is, as with qemu-nbd --shared=8",
      });
    }
    const description: NbdSourceDescription = {
      format: "nbd",
      name: this.name,
      uri: this.name,
      sizeBytes: this.sizeBytes,
      retries: SOURCE_RETRIES,
      // While a guest writes, what was empty at the time of asking may not be so at T0.
      zeroes: this.#handover?.zeroes ?? null,
    };
    return { description, release: () => undefined };
  }

  async close(): Promise<void> {
    try {
      if (!this.readOnly) await this.flush();
    } finally {
      await this.#session.close();
    }
  }

  async #change(
    offsetBytes: number,
    lengthBytes: number,
    work: (client: NbdClient) => Promise<void>,
    note: () => void,
  ): Promise<void> {
    const unit = this.#blockBytes;
    const run = (): Promise<void> => {
      this.#unflushed.begin(offsetBytes, lengthBytes);
      return this.#session.run(work, undefined, true);
    };
    const alone = offsetBytes % unit !== 0 || lengthBytes % unit !== 0;
    await (unit === 1 ? run() : this.#gate.run(alone, run));
    note();
    if (this.#unflushed.isFull) this.#relieve();
  }
}

/** base:allocation in the terms of a raw file: an NBD client sees no more than what a file shows. */
function statusOf(offsetBytes: number, lengthBytes: number, flags: number): BlockStatus {
  return {
    lengthBytes,
    zero: (flags & NBD_STATE_ZERO) !== 0,
    data: (flags & NBD_STATE_HOLE) === 0,
    depth: 0,
    present: true,
    compressed: false,
    hostOffsetBytes: offsetBytes,
  };
}
