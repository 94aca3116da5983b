// What is known of a whole disk, as a table that workers share: which stretches have a flag (read as zeroes, are dirty).
//
// It is gathered once by the main thread or a keeper and read by all workers without a question to the server: a worker that
// must know whether a region is empty cannot wait for the network. The table is an array of numbers, each the end of a
// run times two, plus one if the run has the flag; runs follow each other and neighbours differ. Ends are below 2^52.
//
// Bounds: MAX_RUNS runs (8 MiB). What lies behind the last run is not known: `extentAt` says of it what the caller calls
// safe (for zeroes: it may hold data; for a dirty bitmap: it is dirty).

import { MiB } from "../units.js";

const MAX_RUNS = 1 * MiB;
/** The largest end that the table can hold. */
const MAX_END = 2 ** 52;

export interface ExtentMap {
  /** Shared: cross a thread boundary as they are. */
  runs: SharedArrayBuffer;
  runCount: number;
}

/** Runs in the order of the disk, put together into a map. */
export class ExtentMapBuilder {
  readonly #runs: number[] = [];
  #end = 0;

  /** Where the next run begins. */
  get endBytes(): number {
    return this.#end;
  }

  /** No room: what comes next stays unknown. */
  get isFull(): boolean {
    return this.#runs.length >= MAX_RUNS || this.#end >= MAX_END;
  }

  /** The stretch from the last run's end to endBytes. Not in a full map. */
  add(endBytes: number, flag: boolean): void {
    if (endBytes <= this.#end) return;
    this.#end = endBytes;
    if (endBytes >= MAX_END) return;
    const bit = flag ? 1 : 0;
    const last = this.#runs.at(-1);
    if (last !== undefined && last % 2 === bit) this.#runs[this.#runs.length - 1] = endBytes * 2 + bit;
    else this.#runs.push(endBytes * 2 + bit);
  }

  finish(): ExtentMap {
    const memory = new SharedArrayBuffer(Math.max(1, this.#runs.length) * Float64Array.BYTES_PER_ELEMENT);
    new Float64Array(memory).set(this.#runs);
    return { runs: memory, runCount: this.#runs.length };
  }
}

/** So much of the disk, from its begin on, the map knows of. */
export function endOfMap({ runs, runCount }: ExtentMap): number {
  return Math.floor((new Float64Array(runs, 0, runCount).at(-1) ?? 0) / 2);
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
