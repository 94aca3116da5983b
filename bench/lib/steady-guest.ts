// A guest that writes 32 KiB blocks at random places at a steady rate, and knows what it wrote.
//
// Each block has a version: how many times it was written, 0 for never. A block's content follows from its number
// and its version, so the model of the whole disk is one counter a block. No block has two writes in flight, since
// NBD does not order them. If the disk falls behind, writes are put off (a real guest's queue is full) rather than
// piled up. Latency is from the request to its reply.

import { randomFillSync } from "node:crypto";
import type { NbdClient } from "../../src/nbd/client/client.js";
import { KiB, MiB } from "../../src/units.js";
import { sleep } from "./children.js";

export const GUEST_BLOCK_BYTES = 32 * KiB;
const QUEUE_DEPTH = 32;
const POOL_BYTES = 4 * MiB;
/** Writes that are made up for after a delay; beyond, the clock is set anew. */
const MAX_ARREARS = 256;

export interface GuestPhase {
  writeCount: number;
  seconds: number;
  /** Milliseconds, ascending. */
  latencies: Float64Array;
}

export class SteadyGuest {
  readonly #client: NbdClient;
  readonly #pool = randomFillSync(Buffer.alloc(POOL_BYTES + GUEST_BLOCK_BYTES));
  readonly #versions: Uint32Array;
  readonly #busy: Uint8Array;
  readonly #blocks: Buffer[] = Array.from({ length: QUEUE_DEPTH }, () => Buffer.alloc(GUEST_BLOCK_BYTES));
  readonly #writesPerSecond: number;
  #latencies: number[] = [];
  #inFlight = 0;
  #isRunning = false;
  #failure: unknown;
  #idle: Promise<void> = Promise.resolve();
  #phaseStartMs = 0;

  constructor(client: NbdClient, writesPerSecond: number) {
    this.#client = client;
    this.#writesPerSecond = writesPerSecond;
    const blockCount = Math.floor(client.sizeBytes / GUEST_BLOCK_BYTES);
    this.#versions = new Uint32Array(blockCount);
    this.#busy = new Uint8Array(blockCount);
  }

  /** Writes acknowledged since `resume`. */
  get writeCount(): number {
    return this.#latencies.length;
  }

  /** How many blocks it has ever written. */
  get blocksWritten(): number {
    return this.#versions.reduce((count, version) => count + (version > 0 ? 1 : 0), 0);
  }

  resume(): void {
    this.#latencies = [];
    this.#phaseStartMs = performance.now();
    this.#isRunning = true;
    this.#idle = this.#run();
  }

  /** Stops when every write is acknowledged. @throws CowcatcherError if a write failed. */
  async pause(): Promise<GuestPhase> {
    this.#isRunning = false;
    await this.#idle;
    if (this.#failure !== undefined) throw this.#failure as Error;
    const seconds = (performance.now() - this.#phaseStartMs) / 1000;
    const latencies = Float64Array.from(this.#latencies).sort();
    return { writeCount: latencies.length, seconds, latencies };
  }

  /**
   * The first byte offset at which `disk` is not what this guest wrote, undefined if there is none. Blocks that it
   * never wrote must be as in `original`. Both are read 32 KiB at a time, from block 0 on.
   */
  firstDifference(disk: (block: number) => Buffer, original: (block: number) => Buffer): number | undefined {
    const expected = Buffer.alloc(GUEST_BLOCK_BYTES);
    for (let block = 0; block < this.#versions.length; block++) {
      const version = this.#versions[block] ?? 0;
      const wanted = version === 0 ? original(block) : this.#content(expected, block, version);
      if (!disk(block).equals(wanted)) return block * GUEST_BLOCK_BYTES;
    }
    return undefined;
  }

  #content(buffer: Buffer, block: number, version: number): Buffer {
    const start = ((block * 7919 + version * 104_729) % (POOL_BYTES / 64)) * 64;
    this.#pool.copy(buffer, 0, start, start + GUEST_BLOCK_BYTES);
    buffer.writeUInt32LE(block, 0);
    buffer.writeUInt32LE(version, 4);
    return buffer;
  }

  async #run(): Promise<void> {
    let startMs = performance.now();
    let issued = 0;
    while (this.#isRunning && this.#failure === undefined) {
      const due = Math.floor(((performance.now() - startMs) * this.#writesPerSecond) / 1000);
      if (due - issued > MAX_ARREARS) {
        startMs = performance.now();
        issued = 0;
      } else {
        for (; issued < due && this.#inFlight < QUEUE_DEPTH; issued++) this.#write();
      }
      await sleep(1);
    }
    while (this.#inFlight > 0 && this.#failure === undefined) await sleep(1);
  }

  #write(): void {
    let block = Math.floor(Math.random() * this.#versions.length);
    while (this.#busy[block] === 1) block = (block + 1) % this.#versions.length;
    const buffer = this.#blocks.pop() ?? Buffer.alloc(GUEST_BLOCK_BYTES);
    const version = (this.#versions[block] ?? 0) + 1;
    this.#versions[block] = version;
    this.#busy[block] = 1;
    this.#inFlight++;
    this.#content(buffer, block, version);
    const startMs = performance.now();
    this.#client.write(buffer, 0, GUEST_BLOCK_BYTES, block * GUEST_BLOCK_BYTES).then(
      () => {
        this.#latencies.push(performance.now() - startMs);
        this.#busy[block] = 0;
        this.#blocks.push(buffer);
        this.#inFlight--;
      },
      (error: unknown) => {
        this.#failure ??= error;
      },
    );
  }
}
