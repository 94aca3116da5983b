// What has changed on a disk since when: one tracker for each disk that is served for writing. Main thread.
//
// A guest write asks one question, whether the bits of what it changes are set already in this epoch, and mostly they
// are: a load and a mask. Else its extents must be hot (hot-set.ts), which is another look in memory or, for the first
// write to an extent in a while, a wait for one write to the log that all who wait share; then the bits are set, in
// memory and in the page cache of active-N.bits, before the write is issued. So a bit is set, and outlives this process,
// before a byte changes; and if it might not outlive the host, its extent is in the log, and does.
//
//   set bit ⇒ its byte is in the file's cache, and durable or its extent hot
//
// A backup holds what the guest wrote before T0 and may not have flushed. A host that goes down takes that back, and the
// disk differs from the backup where no bit is set. So a boundary between epochs (epochs.ts) has its name only once the
// image was flushed after T0.
//
// The guest goes first: where the tracking cannot be written it is given up, durably if that is possible, and the guest's
// writes go on.

import type { Completion } from "../block/device.js";
import { type CowcatcherError, toCowcatcherError } from "../errors.js";
import type { Bits } from "./bits.js";
import type { Checkpoint, Loss } from "./checkpoint-list.js";
import { Epochs, type Following, type FrozenEpoch } from "./epochs.js";
import type { EpochStore, MadeChange, NameChange } from "./epoch-store.js";
import type { TrackingFile } from "./folder.js";
import { NO_IDENTITY, type TrackingMode } from "./head.js";
import type { HeadKeeper } from "./head-keeper.js";
import { HotSet } from "./hot-set.js";
import { type OpenedTracking, openTracking, type TrackerOptions } from "./opening.js";
import { PULSE_MS, PulseKeeper } from "./pulse.js";

export type { Following, FrozenEpoch } from "./epochs.js";
export type { TrackerOptions } from "./opening.js";

/** With extents of 4 MiB 16 GiB, which is what a host's crash may make count as changed. */
const HOT_EXTENTS_MAX = 4096;
/** How often idle extents are looked for (md's, too). */
const SWEEP_MS = 5_000;

export interface TrackingState {
  mode: TrackingMode;
  /** `failed`: it was given up, and nothing is noted any more until the disk is served again. */
  state: "tracking" | "failed";
  granularityBytes: number;
  generation: string;
  hotExtents: number;
  /** How often a guest write waited for the activity log. */
  logWaits: number;
  /** What was given up when the disk was opened, or since. */
  loss: Loss | null;
  checkpoints: readonly Checkpoint[];
}

export class DiskTracker {
  readonly mode: TrackingMode;
  readonly sizeBytes: number;
  readonly granularityBytes: number;
  readonly #options: TrackerOptions;
  readonly #extentBytes: number;
  readonly #store: EpochStore;
  readonly #epochs: Epochs;
  readonly #head: HeadKeeper;
  /** Null by `process`. */
  readonly #hot: HotSet | null;
  readonly #logFile: TrackingFile | null;
  readonly #pulseFile: TrackingFile;
  readonly #pulse: PulseKeeper;
  readonly #timers: readonly NodeJS.Timeout[];
  #failure: CowcatcherError | undefined;
  #givingUp: Promise<void> | undefined;

  private constructor(options: TrackerOptions, opened: OpenedTracking) {
    const { head, store, log, pulseFile, active } = opened;
    const { folder, image, logger } = options;
    const { granularityBytes, extentBytes, generation } = head.head;
    this.#options = options;
    this.mode = options.mode;
    this.sizeBytes = image.sizeBytes;
    this.granularityBytes = granularityBytes;
    this.#extentBytes = extentBytes;
    this.#head = head;
    this.#store = store;
    this.#epochs = new Epochs({
      folder,
      head,
      store,
      active,
      checkpoint: (name) => this.checkpoint(name),
      assertKept: () => this.#throwIfFailed(),
      onFailed: (error) => this.#giveUp(error),
    });
    this.#logFile = log?.file ?? null;
    this.#hot =
      log === null
        ? null
        : new HotSet({
            file: log.file,
            log: log.writer,
            extentCount: Math.ceil(image.sizeBytes / extentBytes),
            limit: options.hotExtentsMax ?? HOT_EXTENTS_MAX,
            syncBits: () => this.#epochs.syncBits(),
            onFailed: (error) => this.#giveUp(error),
          });
    this.#pulseFile = pulseFile;
    const looks = (): ReturnType<typeof image.looks> => image.looks();
    this.#pulse = new PulseKeeper(
      { file: pulseFile, generation, looks, isLocal: folder.isLocal, logger },
      opened.looks,
    );
    this.#timers = [
      setInterval(() => this.sweep(), SWEEP_MS).unref(),
      setInterval(() => void this.beat(), PULSE_MS).unref(),
    ];
  }

  /**
   * Takes up what the folder holds, as far as that can be believed (recovery.ts), and marks it as in use. No guest write
   * may come before it is fulfilled.
   * @throws CowcatcherError IO, NO_SPACE: the disk cannot be tracked there.
   */
  static async open(options: TrackerOptions): Promise<DiskTracker> {
    return new DiskTracker(options, await openTracking(options));
  }

  get state(): TrackingState {
    const { generation, checkpoints, loss } = this.#store.list;
    const failed = this.#failure;
    return {
      mode: this.mode,
      state: failed === undefined ? "tracking" : "failed",
      granularityBytes: this.granularityBytes,
      generation,
      hotExtents: this.#hot?.size ?? 0,
      logWaits: this.#hot?.intentCount ?? 0,
      loss: failed === undefined ? loss : lossBy(failed, checkpoints),
      checkpoints: failed === undefined ? checkpoints : [],
    };
  }

  /** Undefined where there is none of this name that can be believed. */
  checkpoint(name: string): Checkpoint | undefined {
    if (this.#failure !== undefined) return undefined;
    return this.#store.list.checkpoints.find((checkpoint) => checkpoint.name === name);
  }

  /**
   * Before a guest's write, trim or write of zeroes: undefined when it may go on. Else it is to ask again when the promise
   * is fulfilled, which never rejects. Bytes; the range lies within the disk.
   */
  beforeWrite(offsetBytes: number, lengthBytes: number): Completion {
    if (lengthBytes === 0) return undefined;
    this.touched();
    const { granularityBytes } = this;
    const first = Math.floor(offsetBytes / granularityBytes);
    const last = Math.floor((offsetBytes + lengthBytes - 1) / granularityBytes);
    const { bits } = this.#epochs.active;
    if (first === last ? bits.has(first) : bits.hasAll(first, last)) return undefined;
    return this.#note(first, last);
  }

  /** Before anything else that may write to the image (a flush), and when what was asked of it is done. */
  touched(): void {
    try {
      this.#pulse.touch();
    } catch (error) {
      void this.#giveUp(error);
    }
  }

  /** Before the image is closed. */
  imageCloses(): void {
    try {
      this.#pulse.end();
    } catch (error) {
      void this.#giveUp(error);
    }
  }

  #note(first: number, last: number): Completion {
    if (this.#failure !== undefined) return this.#givingUp;
    const perExtent = this.#extentBytes / this.granularityBytes;
    const firstExtent = Math.floor(first / perExtent);
    const lastExtent = Math.floor(last / perExtent);
    const hot = this.#hot;
    if (hot !== null && !hot.areHot(firstExtent, lastExtent)) return hot.request(firstExtent, lastExtent);
    hot?.touch(firstExtent, lastExtent);
    const { active } = this.#epochs;
    try {
      if (this.#options.folder.isLocal) active.set(first, last);
      else return this.#noteSlowly(first, last, () => hot?.touchHot(firstExtent, lastExtent) ?? true);
      return undefined;
    } catch (error) {
      return this.#giveUp(error);
    }
  }

  /**
   * A sync of the bits that began before the file had them does not cover them, and their extents may go with it: they
   * must be hot before and after.
   */
  #noteSlowly(first: number, last: number, areHot: () => boolean): Promise<void> {
    const isAllowed = (): boolean => this.#failure === undefined && areHot();
    return this.#epochs.active
      .setSlowly(first, last, isAllowed)
      .catch((error: unknown) => this.#giveUp(error));
  }

  /** See Epochs: before `freeze`. @throws CowcatherError IO, NO_SPACE; the tracking's failure. */
  prepareFreeze(): Promise<void> {
    return this.#epochs.prepare();
  }

  /** T0, after `prepareFreeze`: synchronous, with no guest write in flight. @throws CowcatherError the failure. */
  freeze(): FrozenEpoch {
    return this.#epochs.freeze();
  }

  /** What has changed since the checkpoint up to now; a copy. @throws CowcatcherError NOT_FOUND, IO, FORMAT */
  changesSince(name: string): Promise<Bits> {
    return this.#epochs.changesSince(name);
  }

  /** What has changed since the frozen epoch's boundary up to now; a copy. @throws CowcatcherError IO, FORMAT */
  changesSinceT0({ epoch }: FrozenEpoch): Promise<Bits> {
    return this.#epochs.changesSinceEpoch(epoch);
  }

  /**
   * What all of the checkpoints hold together, and goes on: with the bits of each epoch that ends until then, as far as
   * one of them records. @throws as changesSince
   */
  follow(...names: readonly string[]): Promise<Following> {
    return this.#epochs.follow(names);
  }

  /**
   * Gives the T0 of a frozen epoch a name, when the backup that it began is good. Its predecessor of the same name is
   * forgotten. @throws CowcatherError LIMIT, IO, NO_SPACE; the tracking's failure. The checkpoints are as before then.
   */
  async commit(frozen: FrozenEpoch, name: string, uuid: string, createdMs: number): Promise<void> {
    const made = await this.change([{ name, to: { name, uuid, epoch: frozen.epoch, createdMs } }]);
    await made.done();
  }

  /**
   * What becomes of names at the T0 of a frozen epoch, all of them or none. @throws as commit
   */
  async change(changes: readonly NameChange[]): Promise<MadeChange> {
    await this.#options.flushImage();
    await this.#epochs.persisted();
    this.#throwIfFailed();
    return this.#store.change(changes);
  }

  /** @returns false where there is no such checkpoint. @throws CowcatherError IO, NO_SPACE */
  async remove(name: string): Promise<boolean> {
    this.#throwIfFailed();
    return this.#store.delete(name);
  }

  /** What a timer does: lets idle extents go. */
  sweep(): void {
    if (this.#failure === undefined) this.#hot?.sweep();
  }

  /** What a timer does: says that the server lives, or what the image looks like. Never rejects. */
  async beat(): Promise<void> {
    if (this.#failure === undefined) await this.#pulse.beat();
  }

  /**
   * When no guest write can come any more and the image is flushed. Never rejects for the tracking's own failure, which
   * the next server will find.
   * @param bitmap name of the one that was left in the image for others to write their changes to
   * @throws CowcatherError IO
   */
  async close(bitmap: string | null = null): Promise<void> {
    for (const timer of this.#timers) clearInterval(timer);
    try {
      await this.#hot?.idle();
      await this.#epochs.active.idle();
      await this.#epochs.persisted();
      await this.#store.idle();
      await this.#head.idle();
      await this.#pulse.idle();
      if (this.#failure === undefined) {
        await this.#epochs.active.sync();
        // It tells which files the image was, for as long as the head says clean.
        await this.#pulseFile.sync();
        const identity = (await this.#options.image.identity()) ?? NO_IDENTITY;
        await this.#head.write({ state: "clean", identity, bitmap });
      }
      await this.#givingUp;
    } finally {
      const files = [this.#epochs, this.#head, this.#logFile, this.#pulseFile];
      await Promise.allSettled(files.flatMap((file) => file?.close() ?? []));
      await this.#options.folder.close();
    }
  }

  #throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  /** Fulfilled when nobody will believe what the folder holds, or nothing can be done about that. */
  #giveUp(error: unknown): Promise<void> {
    if (this.#givingUp !== undefined) return this.#givingUp;
    const { folder, logger } = this.#options;
    this.#failure = toCowcatcherError(error, folder.name);
    logger.warn({ err: this.#failure }, "changed blocks are not tracked any more; the guest goes on");
    this.#givingUp = this.#head.markLost(folder, logger).then(() => this.#epochs.active.bits.setAll());
    return this.#givingUp;
  }
}

function lossBy(failure: CowcatcherError, checkpoints: readonly Checkpoint[]): Loss {
  return { reason: failure.message, atMs: 0, checkpoints: checkpoints.map(({ name }) => name) };
}
