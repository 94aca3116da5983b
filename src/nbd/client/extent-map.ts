// What a metadata context says of a whole disk, as a table that workers share.
//
// It is gathered once by the main thread and read by all workers without a question to the server: a worker that
// must know whether a region is empty cannot wait for the network. The table is an array of numbers, each the end of a
// run times two, plus one if the run has the flag; runs follow each other and neighbours differ. Ends are below 2^52.
//
// Bounds: MAX_RUNS runs (8 MiB) and a time limit. What lies behind the last run is not known: `extentAt` says of it
// what the caller calls safe (for zeroes: it may hold data; for a dirty bitmap: it is dirty).

import { MiB } from "../../units.js";
import { CowcatcherError } from "../../errors.js";
import { MAX_RANGE_BYTES, type NbdClient } from "./client.js";
import { NBD_META_BASE_ALLOCATION, NBD_STATE_ZERO } from "../wire/protocol.js";

const MAX_RUNS = 1 * MiB;
/** Of a server's time for all of the map; then the rest is read in vain, which is slower and no worse. */
const MAP_LIMIT_MS = 15_000;
/** The largest end that the table can hold. */
const MAX_END = 2 ** 52;
/** QEMU's dirty bitmaps as metadata contexts (docs/interop/nbd.rst): flag 1 is "dirty". */
const DIRTY_BITMAP_PREFIX = "qemu:dirty-bitmap:";
const NBD_STATE_DIRTY = 1;

export function dirtyBitmapContext(bitmap: string): string {
  return `${DIRTY_BITMAP_PREFIX}${bitmap}`;
}

export interface ExtentMap {
  /** Shared: cross a thread boundary as they are. */
  runs: SharedArrayBuffer;
  runCount: number;
}

/** One thread's cursor over a map. */
export class ExtentReader {
  readonly #runs: Float64Array;
  readonly #unknown: boolean;
  #at = 0;

  /** @param unknown what to say of what the map does not know */
  constructor(map: ExtentMap, unknown: boolean) {
    this.#runs = new Float64Array(map.runs, 0, map.runCount);
    this.#unknown = unknown;
  }

  /** Bytes from offsetBytes on, at most lengthBytes, that all have or all lack the flag. */
  extentAt(offsetBytes: number, lengthBytes: number): { lengthBytes: number; flag: boolean } {
    const index = this.#find(offsetBytes);
    const run = this.#runs[index];
    if (run === undefined) return { lengthBytes, flag: this.#unknown };
    const end = Math.floor(run / 2);
    return { lengthBytes: Math.min(lengthBytes, end - offsetBytes), flag: run % 2 === 1 };
  }

  /** Index of the first run that ends after offsetBytes; questions go forward as a rule. */
  #find(offsetBytes: number): number {
    const runs = this.#runs;
    const endOf = (index: number): number => Math.floor((runs[index] ?? Infinity) / 2);
    const isHere = (index: number): boolean =>
      endOf(index) > offsetBytes && (index === 0 || endOf(index - 1) <= offsetBytes);
    if (isHere(this.#at)) return this.#at;
    if (this.#at + 1 <= runs.length && isHere(this.#at + 1)) return ++this.#at;
    let [low, high] = [0, runs.length];
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (endOf(middle) > offsetBytes) high = middle;
      else low = middle + 1;
    }
    this.#at = low;
    return low;
  }
}

/** What reads as zeroes. Null where the server cannot say. @throws CowcatcherError as NbdClient.blockStatus. */
export async function gatherZeroes(client: NbdClient): Promise<ExtentMap | null> {
  if (!client.contexts.has(NBD_META_BASE_ALLOCATION)) return null;
  try {
    return await gather(client, NBD_META_BASE_ALLOCATION, NBD_STATE_ZERO);
  } catch (error) {
    // A server that offers the context and fails at it: the disk can be read all the same.
    if (error instanceof CowcatcherError && error.code === "IO" && client.failure === undefined) return null;
    throw error;
  }
}

/** What a dirty bitmap of QEMU's calls dirty. @throws CowcatcherError UNSUPPORTED without it, IO, PROTOCOL. */
export function gatherDirty(client: NbdClient, bitmap: string): Promise<ExtentMap> {
  return gather(client, dirtyBitmapContext(bitmap), NBD_STATE_DIRTY);
}

async function gather(client: NbdClient, context: string, mask: number): Promise<ExtentMap> {
  const { sizeBytes } = client;
  const deadlineMs = performance.now() + MAP_LIMIT_MS;
  const runs: number[] = [];
  let at = 0;
  while (at < sizeBytes && runs.length < MAX_RUNS && performance.now() < deadlineMs) {
    const asked = Math.min(sizeBytes - at, MAX_RANGE_BYTES);
    const { lengths, flags } = await client.blockStatus(context, at, asked);
    for (let i = 0; i < lengths.length && at < sizeBytes && runs.length < MAX_RUNS; i++) {
      at = Math.min(at + (lengths[i] ?? 0), sizeBytes);
      const flag = ((flags[i] ?? 0) & mask) === 0 ? 0 : 1;
      if (at >= MAX_END) break;
      const last = runs.at(-1);
      if (last !== undefined && last % 2 === flag) runs[runs.length - 1] = at * 2 + flag;
      else runs.push(at * 2 + flag);
    }
    if (at >= MAX_END) break;
  }
  const memory = new SharedArrayBuffer(Math.max(1, runs.length) * Float64Array.BYTES_PER_ELEMENT);
  new Float64Array(memory).set(runs);
  return { runs: memory, runCount: runs.length };
}
