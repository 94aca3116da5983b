// The epochs that are over, and the names of the boundaries between them: what is on disk of them, changed by one order
// at a time. docs/tracking.md has why each step comes where it does; in short, bits are durable in their new place before
// a list says so, and only then do they go from the old one. Main thread.

import type { Bits } from "./bits.js";
import {
  type Checkpoint,
  type CheckpointList,
  encodeList,
  epochName,
  type EpochRange,
  LIST_NAME,
} from "./checkpoint-list.js";
import { encodeEpoch } from "./epoch-file.js";
import type { TrackingFolder } from "./folder.js";
import { readEpoch } from "./recovery.js";
import { CowcatcherError } from "../errors.js";

/** More chains than this are a script that names each backup and deletes none. */
export const CHECKPOINTS_MAX = 64;

export class EpochStore {
  readonly #folder: TrackingFolder;
  #list: CheckpointList;
  #granularityBytes: number;
  /** Boundaries that have no name yet, of backups that run: how many want each. */
  readonly #pending = new Map<number, number>();
  #order: Promise<void> = Promise.resolve();

  constructor(folder: TrackingFolder, list: CheckpointList, granularityBytes: number) {
    this.#folder = folder;
    this.#list = list;
    this.#granularityBytes = granularityBytes;
  }

  get list(): Readonly<CheckpointList> {
    return this.#list;
  }

  /** The boundary at which the epoch begins is kept until `release`, with a name or without. */
  hold(epoch: number): void {
    this.#pending.set(epoch, (this.#pending.get(epoch) ?? 0) + 1);
  }

  release(epoch: number): void {
    const count = (this.#pending.get(epoch) ?? 1) - 1;
    if (count > 0) this.#pending.set(epoch, count);
    else this.#pending.delete(epoch);
  }

  /** An epoch is over. Fulfilled when it is on the medium, or need not be. */
  add(epoch: number, bits: Bits): Promise<void> {
    return this.#inOrder(async () => {
      const range = { first: epoch, last: epoch };
      const isWanted = this.#isWanted(range);
      if (isWanted) await this.#write(range, bits);
      const epochs = isWanted ? [...this.#list.epochs, range] : [];
      await this.#change({ ...this.#list, epochs });
    });
  }

  /** Everything that changed since the boundary, of epochs that are over, is set in `into`. */
  collect(epoch: number, into: Bits): Promise<void> {
    return this.#inOrder(async () => {
      for (const range of this.#list.epochs.filter(({ last }) => last >= epoch)) {
        into.or(await this.#read(range));
      }
    });
  }

  /** Gives the boundary the name, which it takes from another one. @throws CowcatcherError LIMIT, IO, NO_SPACE */
  name(checkpoint: Checkpoint): Promise<void> {
    return this.#inOrder(async () => {
      const others = this.#list.checkpoints.filter(({ name }) => name !== checkpoint.name);
      if (others.length >= CHECKPOINTS_MAX) {
        throw new CowcatcherError({
          code: "LIMIT",
          object: this.#folder.name,
          problem: `there are ${CHECKPOINTS_MAX} checkpoints, which is the most that a disk may have`,
          hint: "delete some with cowcatcher checkpoints delete",
        });
      }
      const checkpoints = [...others, checkpoint].sort((a, b) => a.epoch - b.epoch);
      await this.#change({ ...this.#list, checkpoints });
    });
  }

  /** @returns false where there is no such checkpoint */
  delete(name: string): Promise<boolean> {
    return this.#inOrder(async () => {
      const checkpoints = this.#list.checkpoints.filter((checkpoint) => checkpoint.name !== name);
      if (checkpoints.length === this.#list.checkpoints.length) return false;
      await this.#change({ ...this.#list, checkpoints });
      return true;
    });
  }

  /** Fulfilled when no order is under way. */
  async idle(): Promise<void> {
    await this.#order;
  }

  /** The new list, with the epochs that it still tells apart; nothing in memory changes unless all of it worked. */
  async #change(list: CheckpointList): Promise<void> {
    const epochs: EpochRange[] = [];
    const gone: EpochRange[] = [];
    for (const range of list.epochs) {
      const before = epochs.at(-1);
      if (!this.#isWanted(range, list.checkpoints)) gone.push(range);
      else if (before !== undefined && !this.#isBoundary(before.last, range.first, list.checkpoints)) {
        await this.#merge(before, range);
        epochs[epochs.length - 1] = { first: before.first, last: range.last };
        gone.push(range);
      } else epochs.push(range);
    }
    const next = { ...list, epochs };
    await this.#folder.replace(LIST_NAME, encodeList(next));
    this.#list = next;
    for (const range of gone) await this.#folder.remove(epochName(range));
  }

  /** Some name, or a backup that runs, asks for what changed in it. */
  #isWanted({ last }: EpochRange, checkpoints: readonly Checkpoint[] = this.#list.checkpoints): boolean {
    const isOld = (epoch: number): boolean => epoch <= last;
    return checkpoints.some(({ epoch }) => isOld(epoch)) || [...this.#pending.keys()].some(isOld);
  }

  /**
   * Whether two neighbours are to be told apart. A checkpoint's epoch need not be the later one's first: a server that
   * starts again goes on with the bits of the active epoch under a higher number.
   */
  #isBoundary(before: number, after: number, checkpoints: readonly Checkpoint[]): boolean {
    const isBetween = (epoch: number): boolean => before < epoch && epoch <= after;
    return checkpoints.some(({ epoch }) => isBetween(epoch)) || [...this.#pending.keys()].some(isBetween);
  }

  async #merge(into: EpochRange, range: EpochRange): Promise<void> {
    const bits = await this.#read(into);
    const later = await this.#read(range);
    // Of a disk that has grown meanwhile the later one has more.
    const merged = later.sizeBytes > bits.sizeBytes ? bits.resized(later.sizeBytes) : bits;
    merged.or(later);
    await this.#write({ first: into.first, last: range.last }, merged);
  }

  async #read(range: EpochRange): Promise<Bits> {
    const epoch = await readEpoch(this.#folder, range, this.#list.generation);
    if (epoch !== undefined) return epoch.bits;
    throw new CowcatcherError({
      code: "FORMAT",
      object: this.#folder.name,
      problem: `${epochName(range)} is missing or damaged`,
      hint: "make a full backup",
    });
  }

  #write(range: EpochRange, bits: Bits): Promise<void> {
    const header = {
      ...range,
      generation: this.#list.generation,
      granularityBytes: this.#granularityBytes,
      sizeBytes: bits.sizeBytes,
    };
    return this.#folder.replace(epochName(range), encodeEpoch(header, bits));
  }

  #inOrder<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#order.then(work);
    this.#order = result.then(
      () => undefined,
      () => undefined,
    );
    return result;
  }
}
