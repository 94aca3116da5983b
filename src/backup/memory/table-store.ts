// The tables that a job's threads share (src/cow/shared.ts), kept from job to job. Main thread.
//
// The collector takes a SharedArrayBuffer for a few bytes, whatever it holds, so it sees no reason to run: on a quiet
// heap the tables of some forty jobs waited for it, 0.5 MiB each for a disk of 1 GiB with a buffer of 256 MiB, 28 MiB
// each for a disk of 1 TiB. Here a job's tables become the next one's.
//
// Tables are zero when a job gets them. Small ones are overwritten. Large ones are given back to the system, which has
// zeroes for whoever touches them again: of a large disk only what was touched takes memory, and that in use only.
//
//   allocate ──► the job ──release──► cleared, a piece a turn of the event loop ──► free ──► allocate
//
// Only who knows that no other thread still has the tables may release them: a worker left behind in a call that does
// not return would write into another job's. Such a job's tables are left to the collector.

import { libc } from "../../native/libc.js";
import { MiB } from "../../units.js";

/** A job has nine at most; more are kept only where jobs run side by side. */
const KEPT_MAX = 36;
/** Up to there overwriting takes no longer than asking the system, and needs no page faults later. */
const OVERWRITTEN_MAX_BYTES = 1 * MiB;
/** Some thousand pages: well under a millisecond. */
const PIECE_BYTES = 16 * MiB;

/** The tables of one job. */
export interface TableLease {
  /** Zeroes, of exactly that length. @throws RangeError when the system has no room. */
  readonly allocate: (bytes: number) => SharedArrayBuffer;
  /** Idempotent. */
  release(): void;
}

export class TableStore {
  /** All zero; last released first. */
  #free: SharedArrayBuffer[] = [];

  lease(): TableLease {
    let taken: SharedArrayBuffer[] = [];
    return {
      allocate: (bytes) => {
        const table = this.#take(bytes) ?? new SharedArrayBuffer(bytes);
        taken.push(table);
        return table;
      },
      release: () => {
        for (const table of taken) void this.#keep(table);
        taken = [];
      },
    };
  }

  /** What is kept now, for tests. */
  get freeCount(): number {
    return this.#free.length;
  }

  #take(bytes: number): SharedArrayBuffer | undefined {
    const index = this.#free.findIndex((table) => table.byteLength === bytes);
    return index < 0 ? undefined : this.#free.splice(index, 1)[0];
  }

  async #keep(table: SharedArrayBuffer): Promise<void> {
    if (!(await clear(table))) return;
    this.#free = [table, ...this.#free].slice(0, KEPT_MAX);
  }
}

/** False: it would take too long without the system's help. */
async function clear(table: SharedArrayBuffer): Promise<boolean> {
  if (table.byteLength <= OVERWRITTEN_MAX_BYTES) {
    overwrite(table, 0, table.byteLength);
    return true;
  }
  if (libc === null) return false;
  for (let from = 0; from < table.byteLength; from += PIECE_BYTES) {
    const length = Math.min(PIECE_BYTES, table.byteLength - from);
    const result = libc.dropPages(table, from, length);
    if (result < 0) return false;
    await new Promise((resolve) => setImmediate(resolve));
  }
  return true;
}

/** Word by word: on shared memory `fill` is a loop, not memset. */
function overwrite(table: SharedArrayBuffer, from: number, to: number): void {
  const words = Math.floor((to - from) / BigUint64Array.BYTES_PER_ELEMENT);
  new BigUint64Array(table, from, words).fill(0n);
  new Uint8Array(table, from + words * BigUint64Array.BYTES_PER_ELEMENT, (to - from) % 8).fill(0);
}
