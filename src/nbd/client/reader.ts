// A worker's reader of an NBD source: a connection of its own, made at the first read. One thread.
//
// A worker copies several chunks at the same time through it (workers/copy.ts), each read cut into pieces that are in
// flight together, so that it is the server's throughput that counts and not the way there and back.
//
//   unopened ──first read─► opening ─┬─► blocking ──anything unusual─► session, for good
//                                    └─► session
//
// A disk whose file can be read past the server is read there first (live-file.ts).
//
// blocking: the server is on this machine, and reads are system calls (blocking-reader.ts). The session asks again
// for what that did not get, reconnects, and tells what is wrong.

import type { Completion, NbdSourceDescription, SourceReader } from "../../block/device.js";
import { BlockingReader } from "./blocking-reader.js";
import { readRange, trimRange } from "./io.js";
import { LiveFile } from "./live-file.js";
import { NbdSession } from "./session.js";
import { ExtentReader } from "../../block/extent-map.js";
import { parseNbdUri } from "../wire/uri.js";

/**
 * A worker's reader of an NBD export at T0, on a connection of its own. One worker thread; ranges in bytes
 * within the export.
 */
export class NbdSourceReader implements SourceReader {
  readonly sizeBytes: number;
  readonly #uri: string;
  readonly #session: NbdSession;
  readonly #zeroes: ExtentReader | null;
  readonly #isCancelled: () => boolean;
  readonly #isSnapshot: boolean;
  readonly #staysOpen: boolean;
  readonly #live: LiveFile | null;
  readonly #keptFromBytes: number;
  #blocking: BlockingReader | null | undefined;
  #opening: Promise<void> | undefined;
  #isClosed = false;

  /**
   * @param isCancelled asked while an answer is awaited; true ends the wait
   * @param mayBlock the thread waits for no other server meanwhile
   */
  constructor(description: NbdSourceDescription, isCancelled: () => boolean, mayBlock: boolean) {
    const { uri, sizeBytes, retries, zeroes, isSnapshot = false, staysOpen = isSnapshot } = description;
    const { live, keptFromBytes = sizeBytes } = description;
    this.#live = live === undefined ? null : new LiveFile(live);
    this.#keptFromBytes = keptFromBytes;
    this.#isSnapshot = isSnapshot;
    this.#staysOpen = staysOpen;
    this.sizeBytes = sizeBytes;
    this.#uri = uri;
    this.#isCancelled = isCancelled;
    if (!mayBlock) this.#blocking = null;
    this.#session = new NbdSession({ uri, retries, sizeBytes, isCancelled, staysOpen });
    this.#zeroes = zeroes === null ? null : new ExtentReader(zeroes, false);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    if (this.#live?.read(buffer, bufferOffset, lengthBytes, offsetBytes) === true) return undefined;
    if (this.#blocking === undefined) {
      return this.#open().then(() => this.read(buffer, bufferOffset, lengthBytes, offsetBytes));
    }
    if (this.#blocking !== null) {
      if (this.#blocking.read(buffer, bufferOffset, lengthBytes, offsetBytes)) return undefined;
      this.#blocking = null;
    }
    return this.#session.run((client) => readRange(client, buffer, bufferOffset, lengthBytes, offsetBytes));
  }

  #open(): Promise<void> {
    this.#opening ??= BlockingReader.open(
      parseNbdUri(this.#uri),
      this.#uri,
      this.sizeBytes,
      this.#isCancelled,
      this.#staysOpen,
    ).then(
      (reader) => {
        this.#blocking = reader;
        if (this.#isClosed) reader?.close();
      },
      // The session meets what is wrong again, and says it.
      () => {
        this.#blocking = null;
      },
    );
    return this.#opening;
  }

  extent(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean } {
    if (this.#zeroes === null) return { lengthBytes, zero: false };
    const extent = this.#zeroes.extentAt(offsetBytes, lengthBytes);
    return { lengthBytes: extent.lengthBytes, zero: extent.flag };
  }

  /** Discards the range of a snapshot that is kept for this reader alone. */
  release(offsetBytes: number, lengthBytes: number): Completion {
    const trimmedBytes = Math.min(offsetBytes + lengthBytes, this.#keptFromBytes) - offsetBytes;
    if (!this.#isSnapshot || trimmedBytes <= 0) return undefined;
    if (this.#blocking === undefined) return this.#open().then(() => this.release(offsetBytes, lengthBytes));
    if (this.#blocking?.trim(offsetBytes, trimmedBytes) === true) return undefined;
    return this.#session
      .run(async (client) => {
        if (client.canTrim) await trimRange(client, offsetBytes, trimmedBytes);
      })
      .catch(() => undefined);
  }

  close(): void {
    this.#isClosed = true;
    // Whoever has the export takes it away first; then it is the server that hangs up.
    if (this.#staysOpen) return;
    this.#blocking?.close();
    void this.#session.close();
  }
}
