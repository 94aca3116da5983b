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
// Epochs. At T0, in its turn, the active epoch is over and the next begins with no bit set, in a file that was made
// before. What was over goes to a file of its own in the background. A checkpoint is the name of the boundary: changed
// since it is all epochs from there on. So a guest write costs one bit whatever the number of chains.
//
// A backup holds what the guest wrote before T0 and may not have flushed. A host that goes down takes that back, and the
// disk differs from the backup where no bit is set. So a boundary has its name only once the image was flushed after T0.
//
// The guest goes first: where the tracking cannot be written it is given up, durably if that is possible, and the guest's
// writes go on.

import type { Completion } from "../block/device.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import type { Logger } from "../log.js";
import { KiB, MiB } from "../units.js";
import { LOG_BYTES, type LogWrite, LogWriter } from "./activity-log.js";
import { Bits } from "./bits.js";
import { activeName, type Checkpoint, encodeList, LIST_NAME, type Loss } from "./checkpoint-list.js";
import { EpochStore } from "./epoch-store.js";
import { ACTIVE_HEADER_BYTES, encodeActive } from "./epoch-file.js";
import type { Boot } from "./fingerprint.js";
import type { TrackingFile, TrackingFolder } from "./folder.js";
import { copyOffset, encodeHead, type Head, HEAD_BYTES, NO_IDENTITY, type TrackingMode } from "./head.js";
import { HotSet } from "./hot-set.js";
import { encodePulse, NO_LOOKS, type ImageLooks, PULSE_MS, PULSE_NAME, PulseKeeper } from "./pulse.js";
import { HEAD_NAME, type Kept, LOG_NAME, recover, type TrackedImage } from "./recovery.js";

/** QEMU's and Xen's; 2 MiB of bits for 1 TiB. */
export const GRANULARITY_BYTES = 64 * KiB;
/** DRBD's. */
const EXTENT_BYTES = 4 * MiB;
/** 16 GiB, which is what a host's crash may make count as changed. */
const HOT_EXTENTS_MAX = 4096;
/** How often idle extents are looked for (md's, too). */
const SWEEP_MS = 5_000;

export interface TrackerOptions {
  folder: TrackingFolder;
  mode: TrackingMode;
  image: TrackedImage;
  /** Makes everything durable that the guest has written: see above. */
  flushImage: () => Completion;
  boot: Boot;
  logger: Pick<Logger, "info" | "warn">;
  /** For tests. */
  extentBytes?: number;
  hotExtentsMax?: number;
  granularityBytes?: number;
}

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
  /** Once, when nobody asks any more. */
  end(): void;
}

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

interface ActiveEpoch {
  epoch: number;
  bits: Bits;
  file: TrackingFile;
}

export class DiskTracker {
  readonly mode: TrackingMode;
  readonly sizeBytes: number;
  readonly granularityBytes: number;
  readonly #options: TrackerOptions;
  readonly #extentBytes: number;
  readonly #store: EpochStore;
  readonly #headFile: TrackingFile;
  /** Null by `process`. */
  readonly #hot: HotSet | null;
  readonly #logFile: TrackingFile | null;
  readonly #pulseFile: TrackingFile;
  readonly #pulse: PulseKeeper;
  readonly #timers: readonly NodeJS.Timeout[];
  #head: Head;
  #active: ActiveEpoch;
  #next: ActiveEpoch | null = null;
  #preparing: Promise<void> | undefined;
  /** Each has the bits of all epochs that ended since. */
  readonly #followers = new Set<Bits>();
  /** Of the last epoch that ended. */
  #persisting: Promise<void> = Promise.resolve();
  /** One at a time; where writing is not local, all setting of bits. */
  #slowOrder: Promise<void> = Promise.resolve();
  #headOrder: Promise<void> = Promise.resolve();
  #failure: CowcatcherError | undefined;
  #givingUp: Promise<void> | undefined;

  private constructor(
    options: TrackerOptions,
    parts: {
      head: Head;
      active: ActiveEpoch;
      store: EpochStore;
      headFile: TrackingFile;
      pulseFile: TrackingFile;
      looks: ImageLooks | undefined;
    },
    log: { file: TrackingFile; writer: LogWriter } | null,
  ) {
    this.#options = options;
    this.mode = options.mode;
    this.sizeBytes = options.image.sizeBytes;
    this.granularityBytes = parts.head.granularityBytes;
    this.#extentBytes = parts.head.extentBytes;
    this.#head = parts.head;
    this.#active = parts.active;
    this.#store = parts.store;
    this.#headFile = parts.headFile;
    this.#logFile = log?.file ?? null;
    this.#hot =
      log === null
        ? null
        : new HotSet({
            file: log.file,
            log: log.writer,
            limit: options.hotExtentsMax ?? HOT_EXTENTS_MAX,
            syncBits: () => this.#syncBits(),
            onFailed: (error) => this.#giveUp(error),
          });
    this.#pulseFile = parts.pulseFile;
    this.#pulse = new PulseKeeper(
      {
        file: parts.pulseFile,
        generation: parts.head.generation,
        looks: () => options.image.looks(),
        isLocal: options.folder.isLocal,
        logger: options.logger,
      },
      parts.looks,
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
    const { folder, image, boot, logger } = options;
    const granularityBytes = options.granularityBytes ?? GRANULARITY_BYTES;
    const extentBytes = options.extentBytes ?? EXTENT_BYTES;
    const found = await recover(folder, image, boot, { granularityBytes, extentBytes });
    const base = { mode: options.mode, sizeBytes: image.sizeBytes, granularityBytes, extentBytes };
    if (found.kind === "kept") {
      logger.info({ folder: folder.name, how: found.how }, "changed-block tracking goes on");
      return DiskTracker.#goOn(options, base, found);
    }
    const loss =
      found.kind === "lost"
        ? { reason: found.reason, atMs: Date.now(), checkpoints: found.checkpoints }
        : null;
    if (loss !== null) {
      logger.warn(
        { folder: folder.name, ...loss },
        "all of the disk counts as changed: the tracking was lost",
      );
    }
    return DiskTracker.#begin(options, base, loss);
  }

  /** A new generation. The head, which makes it one, comes last. */
  static async #begin(options: TrackerOptions, base: HeadBase, loss: Loss | null): Promise<DiskTracker> {
    const { folder, image } = options;
    const generation = crypto.randomUUID();
    const head = headOf(options, base, { generation, sequence: 1, epoch: 1 });
    const list = { generation, epochs: [], checkpoints: [], loss };
    await folder.replace(LIST_NAME, encodeList(list));
    const bits = new Bits(image.sizeBytes, base.granularityBytes);
    await folder.replace(activeName(1), encodeActive(activeHeader(head, 1), bits));
    const writer = await newLog(options, generation);
    await newPulse(options, generation);
    await folder.replace(HEAD_NAME, wholeHead(head));
    const store = new EpochStore(folder, list, base.granularityBytes);
    return DiskTracker.#opened(options, head, bits, store, writer);
  }

  /** The same generation, in a new epoch's file: it holds all that was found before the log that told of it goes. */
  static async #goOn(options: TrackerOptions, base: HeadBase, found: Kept): Promise<DiskTracker> {
    const { folder } = options;
    const { generation, sequence, activeEpoch, nextEpoch } = found.head;
    const epoch = Math.max(activeEpoch, nextEpoch) + 1;
    const head = headOf(options, base, { generation, sequence: sequence + 1, epoch });
    await folder.replace(activeName(epoch), encodeActive(activeHeader(head, epoch), found.active));
    await newPulse(options, generation);
    const headFile = await folder.open(HEAD_NAME);
    await headFile.writeDurably(encodeHead(head), copyOffset(head));
    await headFile.close();
    const writer =
      options.mode === "host" && found.logSequence > 0
        ? new LogWriter(generation, found.logSequence + 1)
        : await newLog(options, generation);
    const store = new EpochStore(folder, found.list, base.granularityBytes);
    return DiskTracker.#opened(options, head, found.active, store, writer);
  }

  static async #opened(
    options: TrackerOptions,
    head: Head,
    bits: Bits,
    store: EpochStore,
    writer: LogWriter | null,
  ): Promise<DiskTracker> {
    const { folder } = options;
    const looks = await options.image.looks();
    const headFile = await folder.open(HEAD_NAME);
    const pulseFile = await folder.open(PULSE_NAME);
    const file = await folder.open(activeName(head.activeEpoch));
    const log = writer === null ? null : { file: await folder.open(LOG_NAME), writer };
    if (log !== null) await writeAll(log.file, log.writer.base([]));
    await removeStale(folder, head, store);
    const active = { epoch: head.activeEpoch, bits, file };
    return new DiskTracker(options, { head, active, store, headFile, pulseFile, looks }, log);
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
    return this.state.checkpoints.find((checkpoint) => checkpoint.name === name);
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
    const { bits } = this.#active;
    if (first === last ? bits.has(first) : bits.hasAll(first, last)) return undefined;
    return this.#note(first, last);
  }

  /** Before anything else that may write to the image (a flush), and when what was asked of it is done. */
  touched(): void {
    this.#tell(() => this.#pulse.touch());
  }

  /** Before the image is closed. */
  imageCloses(): void {
    this.#tell(() => this.#pulse.end());
  }

  #tell(news: () => void): void {
    try {
      news();
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
    if (!this.#options.folder.isLocal) return this.#noteSlowly(first, last);
    const { bits, file } = this.#active;
    bits.set(first, last);
    try {
      file.writeNow(bits.bytes, first >>> 3, (last >>> 3) + 1, ACTIVE_HEADER_BYTES + (first >>> 3));
      return undefined;
    } catch (error) {
      return this.#giveUp(error);
    }
  }

  /** Where a write to the folder may take its time: the bits are seen to be set only when they are in the file. */
  #noteSlowly(first: number, last: number): Promise<void> {
    const work = async (): Promise<void> => {
      const { bits, file } = this.#active;
      if (this.#failure !== undefined || bits.hasAll(first, last)) return;
      const firstByte = first >>> 3;
      const changed = new Bits(bits.sizeBytes, bits.granularityBytes);
      changed.or(bits);
      changed.set(first, last);
      await file.write(changed.bytes, firstByte, (last >>> 3) + 1, ACTIVE_HEADER_BYTES + firstByte);
      // The epoch may be over by now; then whoever waits asks again.
      bits.set(first, last);
    };
    this.#slowOrder = this.#slowOrder.then(work).catch((error: unknown) => this.#giveUp(error));
    return this.#slowOrder;
  }

  /**
   * Makes ready what one `freeze` needs: shortly before T0, and no other may come in between.
   * @throws CowcatcherError IO, NO_SPACE; the tracking's failure.
   */
  prepareFreeze(): Promise<void> {
    this.#preparing ??= this.#prepareNext().finally(() => (this.#preparing = undefined));
    return this.#preparing;
  }

  async #prepareNext(): Promise<void> {
    await this.#persisting;
    this.#throwIfFailed();
    if (this.#next !== null) return;
    const { folder } = this.#options;
    const epoch = this.#active.epoch + 1;
    const bits = new Bits(this.sizeBytes, this.granularityBytes);
    const name = activeName(epoch);
    await folder.replace(name, encodeActive(activeHeader(this.#head, epoch), bits));
    const file = await folder.open(name);
    await this.#writeHead({ nextEpoch: epoch });
    this.#next = { epoch, bits, file };
  }

  /**
   * T0, after `prepareFreeze`: synchronous, with no guest write in flight. Several at one T0 have one boundary.
   * @throws CowcatcherError the failure.
   */
  freeze(): FrozenEpoch {
    this.#throwIfFailed();
    const over = this.#active;
    // Nothing was written since the last T0 of all: its boundary is as good.
    const isFresh = over.bits.next(0, true) === over.bits.granuleCount;
    if (isFresh) return this.#hold(over.epoch);
    if (this.#next === null) {
      throw new CowcatcherError({
        code: "INTERNAL",
        object: this.#options.folder.name,
        problem: "T0 came before the next epoch's file was made",
      });
    }
    this.#active = this.#next;
    this.#next = null;
    const frozen = this.#hold(this.#active.epoch);
    for (const bits of this.#followers) bits.or(over.bits);
    this.#persisting = this.#persist(over).catch((error: unknown) => this.#giveUp(error));
    return frozen;
  }

  #hold(epoch: number): FrozenEpoch {
    this.#store.hold(epoch);
    let isHeld = true;
    return {
      epoch,
      release: () => {
        if (isHeld) this.#store.release(epoch);
        isHeld = false;
      },
    };
  }

  async #persist(over: ActiveEpoch): Promise<void> {
    await this.#store.add(over.epoch, over.bits);
    await this.#writeHead({ activeEpoch: over.epoch + 1, nextEpoch: over.epoch + 1 });
    await over.file.close();
    await this.#options.folder.remove(activeName(over.epoch));
  }

  /** Every bit set so far is durable then: of the epoch that is being put away, too. */
  async #syncBits(): Promise<void> {
    await this.#persisting;
    await this.#active.file.sync();
  }

  /** What has changed since the checkpoint up to now; a copy. @throws CowcatcherError NOT_FOUND, IO, FORMAT */
  changesSince(name: string): Promise<Bits> {
    return this.#collect(name, (bits) => bits);
  }

  /** @param take called in the turn in which the bits are up to date */
  async #collect<T>(name: string, take: (bits: Bits) => T): Promise<T> {
    for (;;) {
      await this.#persisting;
      const checkpoint = this.checkpoint(name);
      if (checkpoint === undefined) throw this.#noCheckpoint(name);
      const active = this.#active;
      const bits = new Bits(this.sizeBytes, this.granularityBytes);
      await this.#store.collect(checkpoint.epoch, bits);
      // An epoch may have ended meanwhile, and what is in neither would be missed.
      if (this.#active !== active) continue;
      bits.or(active.bits);
      return take(bits);
    }
  }

  /** As `changesSince`, and goes on: with the bits of each epoch that ends until then. @throws as changesSince */
  follow(name: string): Promise<Following> {
    return this.#collect(name, (known) => {
      const bits = known.copy();
      this.#followers.add(bits);
      return { known, late: () => bits.except(known), end: () => void this.#followers.delete(bits) };
    });
  }

  #noCheckpoint(name: string): CowcatcherError {
    return new CowcatcherError({
      code: "NOT_FOUND",
      object: this.#options.folder.name,
      problem: `there is no checkpoint '${name}'`,
      hint: "cowcatcher checkpoints lists them",
    });
  }

  /**
   * Gives the T0 of a frozen epoch a name, when the backup that it began is good. Its predecessor of the same name is
   * forgotten. @throws CowcatcherError LIMIT, IO, NO_SPACE; the tracking's failure. The checkpoints are as before then.
   */
  async commit(frozen: FrozenEpoch, name: string, uuid: string, createdMs: number): Promise<void> {
    await this.#options.flushImage();
    await this.#persisting;
    this.#throwIfFailed();
    await this.#store.name({ name, uuid, epoch: frozen.epoch, createdMs });
  }

  /** @returns false where there is no such checkpoint. @throws CowcatcherError IO, NO_SPACE */
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
   * the next server will find. @throws CowcatcherError IO
   */
  async close(): Promise<void> {
    for (const timer of this.#timers) clearInterval(timer);
    try {
      await this.#hot?.idle();
      await this.#slowOrder;
      await this.#persisting;
      await this.#store.idle();
      await this.#headOrder;
      await this.#pulse.idle();
      if (this.#failure === undefined) {
        await this.#active.file.sync();
        const identity = (await this.#options.image.identity()) ?? NO_IDENTITY;
        await this.#writeHead({ state: "clean", identity });
      }
      await this.#givingUp;
    } finally {
      const files = [this.#active.file, this.#next?.file, this.#headFile, this.#logFile, this.#pulseFile];
      await Promise.allSettled(files.flatMap((file) => file?.close() ?? []));
      await this.#options.folder.close();
    }
  }

  /** Durable when it is fulfilled. */
  #writeHead(change: Partial<Head>): Promise<void> {
    const work = async (): Promise<void> => {
      if (this.#failure !== undefined && change.state !== "lost") return;
      const head = { ...this.#head, ...change, sequence: this.#head.sequence + 1 };
      await this.#headFile.writeDurably(encodeHead(head), copyOffset(head));
      this.#head = head;
    };
    const result = this.#headOrder.then(work);
    this.#headOrder = result.catch(() => undefined);
    return result;
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
    this.#givingUp = this.#markLost().then(() => this.#active.bits.setAll());
    return this.#givingUp;
  }

  async #markLost(): Promise<void> {
    const { folder, logger } = this.#options;
    try {
      await this.#writeHead({ state: "lost" });
    } catch {
      await folder
        .remove(HEAD_NAME)
        .catch((error: unknown) =>
          logger.warn({ err: error }, "remove the tracking folder before this disk is served again"),
        );
    }
  }
}

type HeadBase = Pick<Head, "mode" | "sizeBytes" | "granularityBytes" | "extentBytes">;

function headOf(
  { boot }: TrackerOptions,
  base: HeadBase,
  { generation, sequence, epoch }: { generation: string; sequence: number; epoch: number },
): Head {
  return {
    ...base,
    generation,
    sequence,
    state: "open",
    activeEpoch: epoch,
    nextEpoch: epoch,
    bootId: boot.id,
    processId: process.pid,
    identity: NO_IDENTITY,
  };
}

function activeHeader(head: Head, epoch: number): Parameters<typeof encodeActive>[0] {
  const { generation, granularityBytes, sizeBytes } = head;
  return { generation, granularityBytes, sizeBytes, first: epoch, last: epoch };
}

function wholeHead(head: Head): Uint8Array {
  const bytes = new Uint8Array(HEAD_BYTES);
  bytes.set(encodeHead(head), copyOffset(head));
  return bytes;
}

/** All blank: nothing of another generation. @returns null by `process`. */
async function newLog({ folder, mode }: TrackerOptions, generation: string): Promise<LogWriter | null> {
  if (mode !== "host") return null;
  await folder.replace(LOG_NAME, new Uint8Array(LOG_BYTES));
  return new LogWriter(generation, 1);
}

/** Before the head says `open`. */
async function newPulse({ folder, image }: TrackerOptions, generation: string): Promise<void> {
  const looks = (await image.looks()) ?? NO_LOOKS;
  await folder.replace(PULSE_NAME, encodePulse({ ...looks, writing: true, generation }));
}

async function writeAll(file: TrackingFile, writes: readonly LogWrite[]): Promise<void> {
  for (const { bytes, offsetBytes } of writes) await file.writeDurably(bytes, offsetBytes);
}

/** What earlier generations, and steps that were cut short, have left. */
async function removeStale(folder: TrackingFolder, head: Head, store: EpochStore): Promise<void> {
  const kept = new Set([
    activeName(head.activeEpoch),
    ...store.list.epochs.map(({ first }) => `epoch-${first}.bits`),
  ]);
  for (const name of await folder.list()) {
    const isBits = /^(active|epoch)-\d+\.bits$/.test(name);
    if ((isBits && !kept.has(name)) || name.endsWith(".new")) await folder.remove(name);
  }
}

function lossBy(failure: CowcatcherError, checkpoints: readonly Checkpoint[]): Loss {
  return { reason: failure.message, atMs: 0, checkpoints: checkpoints.map(({ name }) => name) };
}
