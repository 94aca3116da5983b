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
  type Loss,
  newKeptName,
} from "./checkpoint-list.js";
import { encodeEpoch, type EpochHeader } from "./epoch-file.js";
import type { TrackingFolder } from "./folder.js";
import { readEpoch, readKept } from "./recovery.js";
import { CowcatcherError } from "../errors.js";

/** More chains than this are a script that names each backup and deletes none. */
export const CHECKPOINTS_MAX = 64;

/** What becomes of a name; the bits that it is to keep are written before. */
export interface NameChange {
  name: string;
  /** Undefined: it goes. */
  to: Checkpoint | undefined;
  kept?: Bits | undefined;
}

/** A change that has been made. One of the two is to be called, once. */
export interface MadeChange {
  /** The names stand for what they stood for before. @throws CowcatcherError IO, NO_SPACE */
  undo(): Promise<void>;
  /** What was kept for `undo` goes. */
  done(): Promise<void>;
}

export class EpochStore {
  readonly #folder: TrackingFolder;
  #list: CheckpointList;
  #granularityBytes: number;
  /** Boundaries that have no name yet, of backups that run: how many want each. */
  readonly #pending = new Map<number, number>();
  /** Of kept bits that no name has any more, and may have again. */
  readonly #heldFiles = new Set<string>();
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
    return this.#inOrder(() => this.#collectFrom(epoch, into));
  }

  async #collectFrom(epoch: number, into: Bits): Promise<void> {
    for (const range of this.#list.epochs.filter(({ last }) => last >= epoch)) {
      into.or(await this.#read(range));
    }
  }

  /**
   * What the checkpoints of these names hold, of kept bits and of epochs that are over, is set in `into`.
   * @returns whether any of them records; undefined where one of the names is not there any more
   * @throws CowcatcherError FORMAT, IO
   */
  collectNamed(names: readonly string[], into: Bits): Promise<boolean | undefined> {
    return this.#inOrder(async () => {
      const { checkpoints, generation } = this.#list;
      let from = Infinity;
      for (const wanted of names) {
        const checkpoint = checkpoints.find(({ name }) => name === wanted);
        if (checkpoint === undefined) return undefined;
        const { epoch, isStopped, keptBits } = checkpoint;
        if (isStopped !== true) from = Math.min(from, epoch);
        if (keptBits === undefined) continue;
        const bits = await readKept(this.#folder, keptBits, generation);
        if (bits === undefined) throw this.#damaged(keptBits);
        into.or(bits);
      }
      await this.#collectFrom(from, into);
      return from !== Infinity;
    });
  }

  /** All of the names, or none. @throws CowcatcherError LIMIT, IO, NO_SPACE */
  change(changes: readonly NameChange[]): Promise<MadeChange> {
    return this.#inOrder(async () => {
      const before = changes.map(({ name }) => ({
        name,
        to: this.#list.checkpoints.find((checkpoint) => checkpoint.name === name),
      }));
      const files = before.flatMap(({ to }) => to?.keptBits ?? []);
      const epochs = before.flatMap(({ to }) => to?.epoch ?? []);
      for (const file of files) this.#heldFiles.add(file);
      for (const epoch of epochs) this.hold(epoch);
      const letGo = async (): Promise<void> => {
        for (const epoch of epochs) this.release(epoch);
        for (const file of files) this.#heldFiles.delete(file);
        const inUse = new Set(this.#list.checkpoints.map(({ keptBits }) => keptBits));
        const unused = files.filter((file) => !inUse.has(file));
        // One that stays is removed when the folder is opened again.
        await Promise.allSettled(unused.map((file) => this.#folder.remove(file)));
      };
      try {
        await this.#apply(changes);
      } catch (error) {
        await letGo();
        throw error;
      }
      return {
        undo: () => this.#inOrder(() => this.#apply(before).finally(letGo)),
        done: () => this.#inOrder(letGo),
      };
    });
  }

  /** What was written for names that do not come about is removed when the folder is opened again: a list may know it. */
  async #apply(changes: readonly NameChange[]): Promise<void> {
    const names = new Set(changes.map(({ name }) => name));
    const checkpoints = this.#list.checkpoints.filter(({ name }) => !names.has(name));
    const removed = changes.flatMap(({ name, to }) => (to === undefined ? [name] : []));
    for (const { to, kept } of changes) {
      if (to === undefined) continue;
      const isEmpty = kept === undefined || kept.next(0, true) === kept.granuleCount;
      checkpoints.push(isEmpty ? to : { ...to, keptBits: await this.#writeKept(kept) });
    }
    this.#refuseTooMany(checkpoints);
    checkpoints.sort((a, b) => a.epoch - b.epoch);
    await this.#change({ ...this.#list, checkpoints, loss: this.#lossWithout(removed) });
  }

  /** Who has removed a name that was lost does not ask for it any more. */
  #lossWithout(names: readonly string[]): Loss | null {
    const { loss } = this.#list;
    return loss && { ...loss, checkpoints: loss.checkpoints.filter((name) => !names.includes(name)) };
  }

  /** Durable when it is fulfilled, though no list speaks of it. */
  async #writeKept(bits: Bits): Promise<string> {
    const name = newKeptName();
    await this.#folder.replace(name, encodeEpoch(this.#header({ first: 0, last: 0 }, bits), bits));
    return name;
  }

  #refuseTooMany({ length }: readonly Checkpoint[]): void {
    if (length <= CHECKPOINTS_MAX || length <= this.#list.checkpoints.length) return;
    throw new CowcatcherError({
      code: "LIMIT",
      object: this.#folder.name,
      problem: `there are ${CHECKPOINTS_MAX} checkpoints, which is the most that a disk may have`,
      hint: "delete some with cowcatcher checkpoints delete",
    });
  }

  /** One that was lost is forgotten as well. @returns false where there is no such checkpoint */
  delete(name: string): Promise<boolean> {
    return this.#inOrder(async () => {
      const checkpoints = this.#list.checkpoints.filter((checkpoint) => checkpoint.name !== name);
      const isLost = this.#list.loss?.checkpoints.includes(name) === true;
      if (checkpoints.length === this.#list.checkpoints.length && !isLost) return false;
      await this.#change({ ...this.#list, checkpoints, loss: this.#lossWithout([name]) });
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
    const isKept = ({ keptBits }: Checkpoint): boolean =>
      list.checkpoints.some((checkpoint) => checkpoint.keptBits === keptBits);
    const unkept = this.#list.checkpoints.filter((checkpoint) => !isKept(checkpoint));
    await this.#folder.replace(LIST_NAME, encodeList(next));
    this.#list = next;
    for (const range of gone) await this.#folder.remove(epochName(range));
    for (const { keptBits } of unkept) {
      if (keptBits !== undefined && !this.#heldFiles.has(keptBits)) await this.#folder.remove(keptBits);
    }
  }

  /** Some name, or a backup that runs, asks for what changed in it. */
  #isWanted({ last }: EpochRange, checkpoints: readonly Checkpoint[] = this.#list.checkpoints): boolean {
    const isOld = (epoch: number): boolean => epoch <= last;
    const isWanting = ({ epoch, isStopped }: Checkpoint): boolean => isStopped !== true && isOld(epoch);
    return checkpoints.some(isWanting) || [...this.#pending.keys()].some(isOld);
  }

  /**
   * Whether two neighbours are to be told apart. A checkpoint's epoch need not be the later one's first: a server that
   * starts again goes on with the bits of the active epoch under a higher number.
   */
  #isBoundary(before: number, after: number, checkpoints: readonly Checkpoint[]): boolean {
    const isBetween = (epoch: number): boolean => before < epoch && epoch <= after;
    const isThere = ({ epoch, isStopped }: Checkpoint): boolean => isStopped !== true && isBetween(epoch);
    return checkpoints.some(isThere) || [...this.#pending.keys()].some(isBetween);
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
    throw this.#damaged(epochName(range));
  }

  #damaged(name: string): CowcatcherError {
    return new CowcatcherError({
      code: "FORMAT",
      object: this.#folder.name,
      problem: `${name} is missing or damaged`,
      hint: "make a full backup",
    });
  }

  #write(range: EpochRange, bits: Bits): Promise<void> {
    return this.#folder.replace(epochName(range), encodeEpoch(this.#header(range, bits), bits));
  }

  #header(range: EpochRange, { sizeBytes }: Bits): EpochHeader {
    const { generation } = this.#list;
    return { ...range, generation, granularityBytes: this.#granularityBytes, sizeBytes };
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
