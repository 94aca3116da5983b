// The epochs of a disk: the active one, the one that is made before T0, those that are over. Main thread.
//
// At T0, in its turn, the active epoch is over and the next begins with no bit set, in a file that was made before.
// What was over goes to a file of its own in the background. A checkpoint is the name of the boundary: changed since it
// is all epochs from there on. So a guest write costs one bit whatever the number of chains.

import { CowcatcherError } from "../errors.js";
import { ActiveEpoch } from "./active-epoch.js";
import { Bits } from "./bits.js";
import type { Checkpoint } from "./checkpoint-list.js";
import type { EpochStore } from "./epoch-store.js";
import type { TrackingFolder } from "./folder.js";
import type { HeadKeeper } from "./head-keeper.js";

/** The boundary at T0. */
export interface FrozenEpoch {
  /** The one that began then: what a checkpoint of this T0 is about. */
  readonly epoch: number;
  /** The boundary is forgotten unless a checkpoint has it. */
  release(): void;
}

/** What has changed since a checkpoint, followed up to a T0 that is to come. */
export interface Following {
  /** Up to the moment at which it was asked for; not to be changed. */
  readonly known: Bits;
  /** In T0's turn, after `freeze`: what came to it since. */
  late(): Bits;
  /** In T0's turn, after `freeze`: all of it; not to be changed. */
  all(): Bits;
  /** Once, when nobody asks any more. */
  end(): void;
}

export interface EpochsParts {
  folder: TrackingFolder;
  head: HeadKeeper;
  store: EpochStore;
  active: ActiveEpoch;
  /** Undefined where there is none of this name that can be believed. */
  checkpoint: (name: string) => Checkpoint | undefined;
  /** @throws CowcatcherError where the tracking was given up */
  assertKept(): void;
  /** An epoch that is over could not be put away. */
  onFailed(error: unknown): Promise<void>;
}

export class Epochs {
  readonly #parts: EpochsParts;
  #active: ActiveEpoch;
  #next: ActiveEpoch | null = null;
  #preparing: Promise<void> | undefined;
  /** Each has the bits of all epochs that ended since. */
  readonly #followers = new Set<Bits>();
  /** Of the last epoch that ended. Never rejects. */
  #persisting: Promise<void> = Promise.resolve();

  constructor(parts: EpochsParts) {
    this.#parts = parts;
    this.#active = parts.active;
  }

  get active(): ActiveEpoch {
    return this.#active;
  }

  /**
   * Makes ready what one `freeze` needs: shortly before T0, and no other may come in between.
   * @throws CowcatcherError IO, NO_SPACE; the tracking's failure.
   */
  prepare(): Promise<void> {
    this.#preparing ??= this.#prepareNext().finally(() => (this.#preparing = undefined));
    return this.#preparing;
  }

  async #prepareNext(): Promise<void> {
    await this.#persisting;
    const { folder, head } = this.#parts;
    this.#parts.assertKept();
    if (this.#next !== null) return;
    const { epoch: before, bits: shape } = this.#active;
    const epoch = before + 1;
    const bits = new Bits(shape.sizeBytes, shape.granularityBytes);
    await ActiveEpoch.write(folder, head.head, epoch, bits);
    const next = await ActiveEpoch.open(folder, epoch, bits);
    await head.write({ nextEpoch: epoch });
    this.#next = next;
  }

  /**
   * T0, after `prepare`: synchronous, with no guest write in flight. Several at one T0 have one boundary.
   * @throws CowcatcherError the failure.
   */
  freeze(): FrozenEpoch {
    this.#parts.assertKept();
    const over = this.#active;
    // Nothing was written since the last T0 of all: its boundary is as good.
    if (over.isEmpty) return this.#hold(over.epoch);
    if (this.#next === null) {
      throw new CowcatcherError({
        code: "INTERNAL",
        object: this.#parts.folder.name,
        problem: "T0 came before the next epoch's file was made",
      });
    }
    this.#active = this.#next;
    this.#next = null;
    const frozen = this.#hold(this.#active.epoch);
    for (const bits of this.#followers) bits.or(over.bits);
    this.#persisting = this.#persist(over).catch((error: unknown) => this.#parts.onFailed(error));
    return frozen;
  }

  #hold(epoch: number): FrozenEpoch {
    const { store } = this.#parts;
    store.hold(epoch);
    let isHeld = true;
    return {
      epoch,
      release: () => {
        if (isHeld) store.release(epoch);
        isHeld = false;
      },
    };
  }

  async #persist(over: ActiveEpoch): Promise<void> {
    const { folder, head, store } = this.#parts;
    await store.add(over.epoch, over.bits);
    await head.write({ activeEpoch: over.epoch + 1, nextEpoch: over.epoch + 1 });
    await over.close();
    await ActiveEpoch.remove(folder, over.epoch);
  }

  /** Every bit set so far is durable then: of the epoch that is being put away, too. @throws CowcatcherError IO */
  async syncBits(): Promise<void> {
    await this.#persisting;
    await this.#active.sync();
  }

  /** Fulfilled when no epoch is being put away. */
  async persisted(): Promise<void> {
    await this.#persisting;
  }

  /** What has changed since the checkpoint up to now; a copy. @throws CowcatcherError NOT_FOUND, IO, FORMAT */
  changesSince(name: string): Promise<Bits> {
    return this.#collect(this.#named([name]), (bits) => bits);
  }

  /** What has changed since the epoch began up to now; a copy. @throws CowcatcherError IO, FORMAT */
  changesSinceEpoch(epoch: number): Promise<Bits> {
    const collect = async (into: Bits): Promise<boolean> => {
      await this.#parts.store.collect(epoch, into);
      return true;
    };
    return this.#collect(collect, (bits) => bits);
  }

  /** Of all the checkpoints together, and it goes on: with the bits of each epoch that ends until then. @throws as changesSince */
  follow(names: readonly string[]): Promise<Following> {
    return this.#collect(this.#named(names), (known, goesOn) => {
      const bits = known.copy();
      if (goesOn) this.#followers.add(bits);
      return {
        known,
        late: () => bits.except(known),
        all: () => bits,
        end: () => void this.#followers.delete(bits),
      };
    });
  }

  #named(names: readonly string[]): (into: Bits) => Promise<boolean> {
    const { store, folder, checkpoint } = this.#parts;
    return async (into) => {
      const missing = (): string | undefined => names.find((name) => checkpoint(name) === undefined);
      const goesOn = missing() === undefined ? await store.collectNamed(names, into) : undefined;
      if (goesOn !== undefined) return goesOn;
      throw noCheckpoint(folder.name, missing() ?? "");
    };
  }

  /**
   * @param collect sets what is known of epochs that are over; false: what is being written now is none of its business
   * @param take called in the turn in which the bits are up to date
   */
  async #collect<T>(
    collect: (into: Bits) => Promise<boolean>,
    take: (bits: Bits, goesOn: boolean) => T,
  ): Promise<T> {
    for (;;) {
      await this.#persisting;
      const active = this.#active;
      const bits = new Bits(active.bits.sizeBytes, active.bits.granularityBytes);
      const goesOn = await collect(bits);
      // An epoch may have ended meanwhile, and what is in neither would be missed.
      if (this.#active !== active) continue;
      if (goesOn) bits.or(active.bits);
      return take(bits, goesOn);
    }
  }

  async close(): Promise<void> {
    await Promise.allSettled([this.#active.close(), this.#next?.close()]);
  }
}

function noCheckpoint(object: string, name: string): CowcatcherError {
  return new CowcatcherError({
    code: "NOT_FOUND",
    object,
    problem: `there is no checkpoint '${name}'`,
    hint: "cowcatcher checkpoints lists them",
  });
}
