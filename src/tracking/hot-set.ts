// The extents that guests write to, and their activity log: who is hot needs no more than a bit and a page in the cache.
//
//   cold ──intent durable──► hot ──bits synced, no new bit since that sync began──► evicted, which is cold
//
// Intents that come while a write to the log is under way go with the next, all by one. Each costs the guest a sync, so
// the more were needed since the last sweep, the more neighbours each takes along, as read-ahead does: one that writes
// here and there gets the extents that it writes to, one that writes all over a disk has all of it after a handful of
// syncs. Half of the set is left to what was asked for.
//
// The set is bounded: where it is full, those that had no new bit for longest make room, an eighth of the set at a time,
// for one sync of the bits. One loop does all writing to the log, so that its order is that of the decisions. Main
// thread; it never waits for storage.

import { EXTENTS_PER_RECORD, type LogWrite, type LogWriter } from "./activity-log.js";
import type { TrackingFile } from "./folder.js";

/** Idle for this many sweeps: evicted (as md clears its bits). */
const IDLE_SWEEPS = 2;
/** Neighbours that an intent takes along: a share of what was admitted since the last sweep, up to a bound. */
const ADMITTED_PER_NEIGHBOUR = 8;
const NEIGHBOURS_MAX = 64;
/** Of a full set, this share makes room at once. */
const EVICTED_SHARE = 1 / 8;

export interface HotSetParts {
  file: TrackingFile;
  log: LogWriter;
  /** Of the disk. */
  extentCount: number;
  /** Most extents that are hot at a time. */
  limit: number;
  /** Every bit that was set before the call is durable once it is fulfilled. */
  syncBits(): Promise<void>;
  /** The log cannot be written; fulfilled when the tracking has been given up. Called once. */
  onFailed(error: unknown): Promise<void>;
}

interface Intent {
  first: number;
  last: number;
  done: () => void;
}

export class HotSet {
  /** Times that somebody had to wait for the log, for the metrics. */
  intentCount = 0;
  readonly #parts: HotSetParts;
  /** By extent, the clock's time of its last new bit. */
  readonly #touched = new Map<number, number>();
  #clock = 1;
  #admittedSinceSweep = 0;
  /** The clock at the last sweeps, the oldest first. */
  #sweeps: number[] = [];
  #waiting: Intent[] = [];
  #sweepDue = false;
  #running: Promise<void> | undefined;
  #failed = false;

  constructor(parts: HotSetParts) {
    this.#parts = parts;
  }

  get size(): number {
    return this.#touched.size;
  }

  /** Of extents first to last. */
  areHot(first: number, last: number): boolean {
    for (let extent = first; extent <= last; extent++) if (!this.#touched.has(extent)) return false;
    return true;
  }

  /** A bit of these extents, which are hot, is being set. */
  touch(first: number, last: number): void {
    for (let extent = first; extent <= last; extent++) this.#touched.set(extent, this.#clock);
  }

  /** As `touch`, where all of them are hot. @returns whether they are */
  touchHot(first: number, last: number): boolean {
    if (!this.areHot(first, last)) return false;
    this.touch(first, last);
    return true;
  }

  /** Fulfilled when the extents are hot, or when the log has failed. They may be cold again in a later turn. */
  request(first: number, last: number): Promise<void> {
    this.intentCount++;
    return new Promise((done) => {
      this.#waiting.push({ first, last, done });
      this.#start();
    });
  }

  /** To be called every few seconds. */
  sweep(): void {
    this.#sweeps.push(this.#clock);
    this.#clock++;
    this.#admittedSinceSweep = 0;
    if (this.#sweeps.length <= IDLE_SWEEPS) return;
    this.#sweepDue = true;
    this.#start();
  }

  /** Fulfilled when nothing is being written to the log. */
  async idle(): Promise<void> {
    while (this.#running !== undefined) await this.#running;
  }

  #start(): void {
    if (this.#failed) this.#letGo();
    else this.#running ??= this.#run();
  }

  async #run(): Promise<void> {
    try {
      // Intents of this turn go together.
      await Promise.resolve();
      for (;;) {
        if (this.#waiting.length > 0) await this.#admit(this.#takeBatch());
        else if (this.#sweepDue) await this.#evictIdle();
        else return;
      }
    } catch (error) {
      this.#failed = true;
      await this.#parts.onFailed(error);
      this.#letGo();
    } finally {
      // In the turn that found nothing to do: who asks in the next microtask must not rely on a loop that is over.
      this.#running = undefined;
    }
  }

  #letGo(): void {
    for (const { done } of this.#waiting.splice(0)) done();
  }

  /** So many intents as leave room for each other: at least one, of half the set at most. */
  #takeBatch(): Intent[] {
    let extents = 0;
    let count = 0;
    for (const { first, last } of this.#waiting) {
      extents += last - first + 1;
      if (count > 0 && extents > this.#parts.limit / 2) break;
      count++;
    }
    // They stay in `waiting` until they are done, so that a failure lets them go.
    return this.#waiting.slice(0, count);
  }

  async #admit(batch: readonly Intent[]): Promise<void> {
    const wanted = new Set<number>();
    for (const { first, last } of batch)
      for (let extent = first; extent <= last; extent++) wanted.add(extent);
    let cold = [...wanted].filter((extent) => !this.#touched.has(extent));
    while (cold.length > 0 && this.size + cold.length > this.#parts.limit && this.size > 0) {
      if (!(await this.#evictOldest(this.size + cold.length - this.#parts.limit, wanted))) break;
      cold = [...wanted].filter((extent) => !this.#touched.has(extent));
    }
    this.#admittedSinceSweep += cold.length;
    const neighbours = this.#neighboursOf(cold, wanted);
    await this.#append("add", [...cold, ...neighbours]);
    for (const extents of [wanted, neighbours]) {
      for (const extent of extents) this.#touched.set(extent, this.#clock);
    }
    this.#waiting.splice(0, batch.length);
    for (const { done } of batch) done();
  }

  /** What is hot together with those that are about to be: cold ones of the same aligned group. */
  #neighboursOf(cold: readonly number[], wanted: ReadonlySet<number>): Set<number> {
    const { extentCount, limit } = this.#parts;
    const neighbours = new Set<number>();
    const wish = Math.min(NEIGHBOURS_MAX, this.#admittedSinceSweep / ADMITTED_PER_NEIGHBOUR);
    const groupSize = wish < 2 ? 1 : 2 ** Math.floor(Math.log2(wish));
    const room = Math.floor(limit / 2) - this.size - cold.length;
    for (const extent of groupSize === 1 ? [] : cold) {
      const first = extent - (extent % groupSize);
      const end = Math.min(extentCount, first + groupSize);
      for (let other = first; other < end && neighbours.size < room; other++) {
        if (!this.#touched.has(other) && !wanted.has(other)) neighbours.add(other);
      }
    }
    return neighbours;
  }

  /** @returns false where none may go */
  async #evictOldest(count: number, keep: ReadonlySet<number>): Promise<boolean> {
    if (![...this.#touched.keys()].some((extent) => !keep.has(extent))) return false;
    const syncedAt = ++this.#clock;
    await this.#parts.syncBits();
    const oldest = [...this.#touched]
      .filter(([extent, touched]) => touched < syncedAt && !keep.has(extent))
      .sort(([, a], [, b]) => a - b);
    await this.#evict(oldest.slice(0, Math.max(count, this.#parts.limit * EVICTED_SHARE)));
    return true;
  }

  async #evictIdle(): Promise<void> {
    this.#sweepDue = false;
    this.#sweeps = this.#sweeps.slice(-IDLE_SWEEPS - 1);
    const [before = 0] = this.#sweeps;
    if (![...this.#touched.values()].some((touched) => touched <= before)) return;
    this.#clock++;
    await this.#parts.syncBits();
    await this.#evict([...this.#touched].filter(([, touched]) => touched <= before));
  }

  /** Whoever writes to one of them from now on asks for it again, and so comes behind this in the log. */
  async #evict(victims: readonly (readonly [extent: number, touched: number])[]): Promise<void> {
    for (const [extent] of victims) this.#touched.delete(extent);
    await this.#append(
      "evict",
      victims.map(([extent]) => extent),
    );
  }

  async #append(kind: "add" | "evict", extents: readonly number[]): Promise<void> {
    const { log } = this.#parts;
    for (let at = 0; at < extents.length; at += EXTENTS_PER_RECORD) {
      const part = extents.slice(at, at + EXTENTS_PER_RECORD);
      if (log.needsBase()) await this.#write(log.base(this.#hotWith(kind, extents, at)));
      await this.#write(log.record(kind, part));
    }
  }

  /** What the log holds before record `at` of these: a base must not leave out what is still to be evicted. */
  #hotWith(kind: "add" | "evict", extents: readonly number[], at: number): number[] {
    const pending = kind === "add" ? extents.slice(0, at) : extents.slice(at);
    return [...new Set([...this.#touched.keys(), ...pending])];
  }

  async #write(writes: readonly LogWrite[]): Promise<void> {
    for (const { bytes, offsetBytes } of writes) await this.#parts.file.writeDurably(bytes, offsetBytes);
  }
}
