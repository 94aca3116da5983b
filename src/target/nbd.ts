// An NBD export as a target: byte n of the disk is byte n of the export, as `qemu-img convert -n` writes one.
//
//   main thread   createNbdTarget: asks for size, block sizes and what is zero already, hangs up
//   each worker   NbdTargetWriter: a connection of its own; writes; FLUSH after its last write
//
// The export exists already and is written in place: there is no temporary name and nothing to rename or remove. A
// backup that fails or is cancelled leaves the export with whatever was written by then, neither old nor new. It must
// be as large as the disk at least; what a larger one has behind the disk's end stays as it is.
//
// Only a server that says CAN_MULTI_CONN may have several writers, since only there one connection sees what another
// has written. Each worker flushes through its own connection, which covers its own writes on any server.
//
// Zeroes: nothing is sent for what was zero before the copy; else WRITE_ZEROES, which may unmap, first in its fast form
// where that is offered. A lost connection is made again and the write sent again by whoever called, up to
// --target-retries (cow/drain-io.ts); the session only connects. The flush at the end retries by itself.
//
// A server that was lost may have crashed, and with it what it had acknowledged and not flushed. So each new connection
// is asked for that first (nbd/client/unflushed.ts); where it is gone the backup fails: its data is in no one's hands any more.

import { CowcatcherError, toCowcatcherError } from "../errors.js";
import type { Completion } from "../block/device.js";
import { NbdClient } from "../nbd/client/client.js";
import { writeRange, type ZeroPolicy, zeroRange } from "../nbd/client/io.js";
import { NbdSession } from "../nbd/client/session.js";
import { ExtentReader } from "../block/extent-map.js";
import { gatherZeroes } from "../nbd/client/extent-map.js";
import { NBD_META_BASE_ALLOCATION } from "../nbd/wire/protocol.js";
import { digestOfSample, UnflushedWrites } from "../nbd/client/unflushed.js";
import { KiB, MiB } from "../units.js";
import type { NbdTargetDescription, Target, TargetOptions } from "./target.js";
import type { TargetWriter } from "../cow/target-writer.js";

/** The drainer tries a write again as it does for files, with the job's policies; the session need not. */
const CALLER_RETRIES = 0;
/** Read back in a second or two after a reconnection; a flush more often would hold up the copy. */
const UNFLUSHED_BOUNDS = {
  unitBytes: 256 * KiB,
  maxPieces: 16_384,
  maxBytes: 512 * MiB,
  digest: digestOfSample,
};
/** Zeroing what is zero is better than a question and answer for each of many holes in between. */
const MAX_ZERO_RANGES = 8;

/**
 * @throws CowcatcherError as NbdClient.connect; UNSUPPORTED for a format but raw; IO (EROFS) for a read-only export;
 *   NO_SPACE for one that is smaller than the disk.
 */
export async function createNbdTarget(options: TargetOptions): Promise<Target> {
  const { path: uri, format, sizeBytes, targetRetries = 0 } = options;
  if (format !== "raw" || options.backingFile !== undefined) {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: uri,
      problem: "an NBD target is written as raw",
      hint: "give -O raw, or write a qcow2 file",
    });
  }
  let kept: NbdClient | null = null;
  const client = await NbdClient.connect(uri, {
    contexts: [NBD_META_BASE_ALLOCATION],
    ...(options.isCancelled !== undefined && { isCancelled: options.isCancelled }),
  });
  try {
    checkExport(client, sizeBytes);
    const description: NbdTargetDescription = {
      format: "nbd",
      name: uri,
      uri,
      sizeBytes,
      exportBytes: client.sizeBytes,
      retries: targetRetries,
      // What takes a part of a disk may lie on that disk, and be zero only as long as that is.
      zeroes: options.isPart === true ? null : await gatherZeroes(client),
      direct: false,
    };
    // A server may end with its last client (nbdkit's exitlast filter); another takes one at a time.
    if (client.canMultiConn) kept = client;
    return new NbdTarget(description, client.info.minimumBlockBytes, kept);
  } finally {
    if (kept === null) await client.disconnect();
  }
}

function checkExport(client: NbdClient, sizeBytes: number): void {
  const { name: object } = client;
  if (client.readOnly) {
    const problem = "the export is read-only";
    throw new CowcatcherError({ code: "IO", object, problem, hint: "export it writable", errno: "EROFS" });
  }
  if (client.sizeBytes >= sizeBytes) return;
  throw new CowcatcherError({
    code: "NO_SPACE",
    object,
    problem: `the export has ${client.sizeBytes} bytes, the disk ${sizeBytes}`,
    hint: "choose a larger export",
  });
}

class NbdTarget implements Target {
  readonly name: string;
  readonly unfinishedPath: string;
  readonly workerLimit: number | undefined;

  constructor(
    readonly description: NbdTargetDescription,
    readonly granularityBytes: number,
    /** The first connection, until a worker has its own. */
    private kept: NbdClient | null,
  ) {
    this.name = this.unfinishedPath = description.uri;
    this.workerLimit = kept === null ? 1 : undefined;
  }

  async workersAreIn(): Promise<void> {
    const { kept } = this;
    this.kept = null;
    await kept?.disconnect();
  }

  /** Each worker has flushed what it wrote; nothing else was written. */
  complete(): Promise<void> {
    return this.workersAreIn();
  }

  commit(): Promise<void> {
    return Promise.resolve();
  }

  finish(): Promise<void> {
    return Promise.resolve();
  }

  abort(): Promise<void> {
    return this.workersAreIn();
  }

  abortSync(): void {
    // An export cannot be removed by its client.
  }
}

export class NbdTargetWriter implements TargetWriter {
  readonly #description: NbdTargetDescription;
  readonly #session: NbdSession;
  readonly #zeroes: ExtentReader | null;
  readonly #zeroPolicy: ZeroPolicy = { mayUnmap: true, fast: true };
  readonly #unflushed = new UnflushedWrites(UNFLUSHED_BOUNDS);
  #hasWritten = false;
  #isRelieving = false;
  #flushFailure: CowcatcherError | undefined;

  constructor(description: NbdTargetDescription, isCancelled: () => boolean) {
    const { uri, exportBytes: sizeBytes, retries, zeroes } = description;
    this.#description = description;
    this.#session = new NbdSession({ uri, retries, sizeBytes, isCancelled });
    this.#zeroes = zeroes === null ? null : new ExtentReader(zeroes, false);
    this.#session.whenReconnected = async (client) => {
      const loss = await this.#unflushed.lostBy(client);
      if (loss !== undefined) throw loss;
    };
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    this.#checkRange(offsetBytes, lengthBytes);
    this.#hasWritten = true;
    return this.#change(
      (client) => writeRange(client, buffer, bufferOffset, lengthBytes, offsetBytes),
      () => this.#unflushed.written(offsetBytes, lengthBytes, buffer, bufferOffset),
    );
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    this.#checkRange(offsetBytes, lengthBytes);
    const ranges = this.#rangesToZero(offsetBytes, lengthBytes);
    if (ranges.length === 0) return undefined;
    this.#hasWritten = true;
    return this.#change(
      async (client) => {
        for (const [from, to] of ranges) await zeroRange(client, from, to - from, this.#zeroPolicy);
      },
      () => {
        for (const [from, to] of ranges) this.#unflushed.zeroed(from, to - from);
      },
    );
  }

  async #change(work: (client: NbdClient) => Promise<void>, note: () => void): Promise<void> {
    if (this.#flushFailure !== undefined) throw this.#flushFailure;
    await this.#session.run(work, CALLER_RETRIES);
    note();
    if (this.#unflushed.isFull) this.#relieve();
  }

  async #flush(): Promise<void> {
    const epoch = this.#unflushed.startFlush();
    await this.#session.run((client) => client.flush());
    this.#unflushed.flushed(epoch);
  }

  /** Beside the copy, so that what a crash could take stays bounded. A flush that failed once may succeed in vain. */
  #relieve(): void {
    if (this.#isRelieving) return;
    this.#isRelieving = true;
    this.#flush()
      .catch((error: unknown) => {
        this.#flushFailure = toCowcatcherError(error, this.#description.name);
      })
      .finally(() => {
        this.#isRelieving = false;
      });
  }

  /** What of the range was not zero before the copy; a few stretches, or one that takes in all of them. */
  #rangesToZero(offsetBytes: number, lengthBytes: number): [number, number][] {
    const end = offsetBytes + lengthBytes;
    if (this.#zeroes === null) return [[offsetBytes, end]];
    const ranges: [number, number][] = [];
    let lastEnd = offsetBytes;
    for (let at = offsetBytes; at < end;) {
      const extent = this.#zeroes.extentAt(at, end - at);
      if (!extent.flag) {
        lastEnd = at + extent.lengthBytes;
        ranges.push([at, lastEnd]);
      }
      at += extent.lengthBytes;
    }
    const first = ranges[0];
    return first !== undefined && ranges.length > MAX_ZERO_RANGES ? [[first[0], lastEnd]] : ranges;
  }

  /** Waits until the server has stored what this worker wrote. @throws CowcatcherError: the backup fails. */
  async finish(): Promise<void> {
    if (this.#hasWritten) await this.#flush();
    if (this.#flushFailure !== undefined) throw this.#flushFailure;
    await this.#session.rest();
  }

  close(): void {
    void this.#session.close();
  }

  #checkRange(offsetBytes: number, lengthBytes: number): void {
    const { name, sizeBytes } = this.#description;
    if (offsetBytes >= 0 && lengthBytes >= 0 && offsetBytes + lengthBytes <= sizeBytes) return;
    throw new CowcatcherError({
      code: "INTERNAL",
      object: name,
      problem: `a write of ${lengthBytes} bytes leaves the disk of ${sizeBytes}`,
      offsetBytes,
    });
  }
}
