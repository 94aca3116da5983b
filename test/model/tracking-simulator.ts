// A disk, its tracking folder, a guest, backups, and the end of the process or of the host at any moment.
//
// Storage is simulated. What was written and not synced is lost or kept page by page when the host goes down, in any
// combination, each page in any version that it had since its last sync; a durable write that was under way is torn by
// sectors. Each asynchronous call of storage ends when the schedule says so, so that every order of them comes up. The
// pages of bits are 16 bytes here, of 128 granules: more to lose than there is in a real file, never less.
//
// What is checked after each recovery, for each checkpoint: what differs from the disk as it was at the checkpoint's T0
// is reported; what is reported and was never written to lies in few extents. After the process's end alone nothing is
// reported that no write asked for.

import { Bits } from "../../src/tracking/bits.js";
import type { TrackingFile, TrackingFolder } from "../../src/tracking/folder.js";
import { DiskTracker, type Following, type FrozenEpoch } from "../../src/tracking/tracker.js";
import { PULSE_NAME } from "../../src/tracking/pulse.js";
import type { Random } from "../support/random.js";

const PAGE_BYTES = 16;
const SECTOR_BYTES = 512;
export const GRANULE_BYTES = 512;
const GRANULES_PER_EXTENT = 16;
const HOT_EXTENTS_MAX = 8;
const NAMES = ["daily", "weekly", "odd"];

/** Calls of storage that are under way, in the order in which they were made. */
class Schedule {
  #steps: { work: () => void; end: (error?: Error) => void }[] = [];

  constructor(readonly random: Random) {}

  get length(): number {
    return this.#steps.length;
  }

  /** `work` takes effect at the moment at which the call ends. */
  call<T>(work: () => T): Promise<T> {
    return new Promise((resolve, reject) => {
      let result: T;
      const end = (error?: Error): void => (error === undefined ? resolve(result) : reject(error));
      this.#steps.push({ work: () => (result = work()), end });
    });
  }

  async endOne(): Promise<void> {
    const [step] = this.#steps.splice(this.random.below(this.#steps.length), 1);
    step?.work();
    step?.end();
    await settle();
  }

  /** A handful of them. */
  async endSome(): Promise<void> {
    for (let count = this.random.below(8); count > 0 && this.length > 0; count--) await this.endOne();
    await settle();
  }

  async endAll(): Promise<void> {
    await settle();
    while (this.length > 0) await this.endOne();
  }

  abandon(): void {
    // Nobody may go on: promises that stay pending for ever are as good as a process that is gone.
    this.#steps = [];
  }
}

/** All that follows from what has just ended, up to the next calls of storage. */
async function settle(): Promise<void> {
  for (let turn = 0; turn < 3; turn++) await new Promise((resolve) => setImmediate(resolve));
}

/** In ms; each step of a schedule takes a tenth of a second. */
let nowMs = 0;

class SimFile {
  /** Of the last change. */
  changedMs = nowMs;
  content: Uint8Array;
  durable: Uint8Array;
  /** By page: what it held at some time since its last sync, and the number of the write that made it so. */
  readonly versions = new Map<number, { write: number; bytes: Uint8Array }[]>();
  #writeCount = 0;
  /** Durable writes that are under way. */
  readonly torn = new Set<{ bytes: Uint8Array; offset: number }>();

  constructor(bytes: Uint8Array) {
    this.content = bytes.slice();
    this.durable = bytes.slice();
  }

  write(bytes: Uint8Array, offset: number): void {
    this.content.set(bytes, offset);
    this.changedMs = nowMs;
    const write = ++this.#writeCount;
    const lastPage = Math.floor((offset + bytes.length - 1) / PAGE_BYTES);
    for (let page = Math.floor(offset / PAGE_BYTES); page <= lastPage; page++) {
      const versions = this.versions.get(page) ?? [];
      versions.push({ write, bytes: this.content.slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES) });
      this.versions.set(page, versions);
    }
  }

  /** @returns what makes it so: pages as they are now, unless a sync that began later was quicker */
  sync(): () => void {
    const upTo = this.#writeCount;
    return () => {
      for (const [page, versions] of this.versions) {
        const taken = versions.filter(({ write }) => write <= upTo).at(-1);
        if (taken === undefined) continue;
        this.durable.set(taken.bytes, page * PAGE_BYTES);
        const later = versions.filter(({ write }) => write > upTo);
        if (later.length > 0) this.versions.set(page, later);
        else this.versions.delete(page);
      }
    };
  }

  writeDurably(bytes: Uint8Array, offset: number): void {
    this.content.set(bytes, offset);
    this.durable.set(bytes, offset);
    const end = (offset + bytes.length) / PAGE_BYTES;
    for (let page = offset / PAGE_BYTES; page < end; page++) this.versions.delete(page);
  }

  powerCut(random: Random): void {
    for (const [page, versions] of this.versions) {
      if (random.chance(0.5)) continue;
      this.durable.set(random.pick(versions).bytes, page * PAGE_BYTES);
    }
    for (const { bytes, offset } of this.torn) {
      for (let at = 0; at < bytes.length; at += SECTOR_BYTES) {
        if (random.chance(0.5)) this.durable.set(bytes.subarray(at, at + SECTOR_BYTES), offset + at);
      }
    }
    this.content = this.durable.slice();
    this.versions.clear();
  }
}

/** Outlives processes and hosts; each process has a folder on it of its own. */
class SimStorage {
  files = new Map<string, SimFile>();

  powerCut(random: Random): void {
    for (const file of this.files.values()) file.powerCut(random);
  }

  processGone(): void {
    for (const file of this.files.values()) file.torn.clear();
  }

  folder(schedule: Schedule, isLocal: boolean): TrackingFolder {
    const { files } = this;
    return {
      name: "tracking",
      isLocal,
      read: (name) => schedule.call(() => files.get(name)?.content.slice() ?? null),
      replace: (name, bytes) => schedule.call(() => void files.set(name, new SimFile(bytes))),
      open: (name) =>
        schedule.call(() => {
          const file = files.get(name);
          if (file === undefined) throw new Error(`no file ${name}`);
          const opened = openFile(schedule, file);
          // Its times tell how late it was: four times a second is no matter of the schedule.
          if (name !== PULSE_NAME) return opened;
          return { ...opened, write: (...args) => Promise.resolve(opened.writeNow(...args)) };
        }),
      list: () => schedule.call(() => [...files.keys()]),
      remove: (name) => schedule.call(() => void files.delete(name)),
      changedMs: (name) => Promise.resolve(files.get(name)?.changedMs),
      close: () => Promise.resolve(),
    };
  }
}

function openFile(schedule: Schedule, file: SimFile): TrackingFile {
  return {
    writeNow: (bytes, from, to, offset) => file.write(bytes.subarray(from, to), offset),
    write: (bytes, from, to, offset) => {
      const copy = bytes.slice(from, to);
      return schedule.call(() => file.write(copy, offset));
    },
    writeDurably: (bytes, offset) => {
      const write = { bytes: bytes.slice(), offset };
      file.torn.add(write);
      return schedule.call(() => {
        file.torn.delete(write);
        file.writeDurably(write.bytes, offset);
      });
    },
    sync: () => schedule.call(file.sync()),
    close: () => Promise.resolve(),
  };
}

/** One number for each granule: which write it holds. */
class SimImage {
  content: number[];
  durable: number[];
  readonly versions = new Map<number, number[]>();
  writeCount = 0;
  changedMs = 0;

  constructor(granules: number) {
    this.content = new Array<number>(granules).fill(0);
    this.durable = this.content.slice();
  }

  write(granule: number): void {
    this.content[granule] = ++this.writeCount;
    this.changedMs = nowMs;
    this.versions.set(granule, [...(this.versions.get(granule) ?? []), this.writeCount]);
  }

  /** @returns what makes it so: all that was written up to now, unless a flush that began later was quicker */
  flush(): () => void {
    const upTo = this.writeCount;
    return () => {
      for (const [granule, versions] of this.versions) {
        const taken = versions.filter((write) => write <= upTo).at(-1);
        if (taken === undefined) continue;
        this.durable[granule] = taken;
        const later = versions.filter((write) => write > upTo);
        if (later.length > 0) this.versions.set(granule, later);
        else this.versions.delete(granule);
      }
    };
  }

  powerCut(random: Random): void {
    for (const [granule, versions] of this.versions) {
      if (random.chance(0.5)) this.durable[granule] = random.pick(versions);
    }
    this.content = this.durable.slice();
    this.versions.clear();
  }

  grow(granules: number): void {
    while (this.content.length < granules) {
      this.content.push(0);
      this.durable.push(0);
    }
  }
}

/** The disk at a T0, and what may be reported as changed since. */
interface Backup {
  content: number[];
  allowed: Set<number>;
}

interface FrozenBackup {
  epoch: FrozenEpoch;
  uuid: string;
  kept?: Kept | undefined;
}

/** What a checkpoint of that backup has at a T0. */
interface Kept {
  of: string;
  name: string;
  bits: Bits;
}

export class TrackingSimulator {
  readonly #random: Random;
  readonly #storage = new SimStorage();
  readonly #image: SimImage;
  readonly #backups = new Map<string, Backup>();
  readonly #isLocal: boolean;
  /** How likely an end of the process or of the host comes about that the schedule could have: some go on for long. */
  readonly #unrest: number;
  readonly #log: string[] = [];
  #schedule: Schedule;
  #tracker: DiskTracker | undefined;
  /** Granules that somebody else has written between two runs. */
  #others: Set<number> | undefined;
  #bootId = crypto.randomUUID();
  #bootedMs = 0;
  #frozen: FrozenBackup | undefined;
  #preparing = false;
  /** An incremental backup that is being prepared, of the checkpoint that another one may have had as its T0 since. */
  #following: { of: string; name: string; changes: Following } | undefined;
  #failure: unknown;
  /** Somebody wrote the image of whom nobody knows what. */
  #isSpoilt = false;
  /** When it was given up for good reason. */
  #justLossMs: number | undefined;
  #uuids = 0;
  /** Since the last recovery from the host's end. */
  #mayOverReport = false;

  constructor(random: Random) {
    this.#random = random;
    this.#schedule = new Schedule(random);
    this.#image = new SimImage(640 + random.below(400));
    this.#isLocal = random.chance(0.7);
    this.#unrest = random.pick([0.1, 0.3, 1]);
  }

  /** @throws Error naming what was not reported, with the schedule that led there */
  async run(steps: number): Promise<void> {
    try {
      await this.#start();
      for (let step = 0; step < steps && this.#failure === undefined; step++) await this.#step();
      if (this.#failure !== undefined) throw this.#failure as Error;
      // A write that goes on while the question is answered would be missing in the answer.
      await this.#schedule.endAll();
      await this.#check("at the end");
    } catch (error) {
      throw new Error(`${String(error)}\n${this.#log.slice(-60).join("\n")}`);
    }
  }

  async #step(): Promise<void> {
    nowMs += 100;
    void this.#tracker?.beat();
    const action = this.#random.below(100);
    if (action < 40) this.#guestWrite();
    else if (action < 70) await this.#schedule.endOne();
    else if (action < 75) this.#flush();
    else if (action < 80) this.#tracker?.sweep();
    else if (action < 90) await this.#backupStep();
    else if (action < 91) this.#deleteCheckpoint();
    else if (action < 92 || !this.#random.chance(this.#unrest)) await this.#schedule.endSome();
    else if (action < 94) await this.#kill();
    else if (action < 97) await this.#powerCut();
    else await this.#cleanEnd();
  }

  get #sizeBytes(): number {
    return this.#image.content.length * GRANULE_BYTES;
  }

  async #start(): Promise<void> {
    const schedule = new Schedule(this.#random);
    this.#schedule = schedule;
    const image = this.#image;
    const sizeBytes = this.#sizeBytes;
    let failure: unknown;
    const opening = DiskTracker.open({
      folder: this.#storage.folder(schedule, this.#isLocal),
      mode: "host",
      boot: { id: this.#bootId, startedMs: this.#bootedMs },
      granularityBytes: GRANULE_BYTES,
      extentBytes: GRANULES_PER_EXTENT * GRANULE_BYTES,
      hotExtentsMax: HOT_EXTENTS_MAX,
      logger: { info: () => undefined, warn: () => undefined },
      flushImage: () => schedule.call(image.flush()),
      image: {
        sizeBytes,
        identity: () => Promise.resolve(String(image.writeCount).padStart(64, "0")),
        looks: () =>
          Promise.resolve({ changedNs: BigInt(image.changedMs) * 1_000_000n, files: "11".repeat(32) }),
        writesOfOthers: () => Promise.resolve(this.#othersBits(sizeBytes)),
      },
    }).then(
      (tracker) => (this.#tracker = tracker),
      (error: unknown) => (failure = error),
    );
    // The power may go while a server starts.
    while (this.#tracker === undefined && failure === undefined) {
      await settle();
      if (schedule.length > 0) await schedule.endOne();
      // Not after somebody's write, which nobody could tell from the server's then (docs/tracking.md).
      if (this.#tracker === undefined && !this.#isSpoilt && this.#random.chance(0.01)) {
        return this.#powerCut();
      }
    }
    await opening;
    if (failure !== undefined) throw failure as Error;
    this.#others = undefined;
    await this.#check("after the start");
  }

  #othersBits(sizeBytes: number): Bits | undefined {
    if (this.#others === undefined) return undefined;
    const bits = new Bits(sizeBytes, GRANULE_BYTES);
    for (const granule of this.#others) bits.set(granule, granule);
    return bits;
  }

  #guestWrite(): void {
    const { length } = this.#image.content;
    const first = this.#random.chance(0.3) ? this.#random.below(length) : this.#random.below(length / 8);
    const last = Math.min(length - 1, first + this.#random.below(this.#random.chance(0.2) ? 40 : 3));
    this.#log.push(`guest writes ${first}..${last}`);
    this.#goOn(this.#tracker, first, last);
  }

  /** As DiskNode does it: a write that waited starts again from the top. */
  #goOn(tracker: DiskTracker | undefined, first: number, last: number): void {
    if (tracker === undefined || tracker !== this.#tracker) return;
    // Also of a T0 that came while it waited.
    for (const { allowed } of this.#backups.values()) {
      for (let granule = first; granule <= last; granule++) allowed.add(granule);
    }
    const wait = tracker.beforeWrite(first * GRANULE_BYTES, (last - first + 1) * GRANULE_BYTES);
    if (wait !== undefined) {
      void wait.then(() => this.#goOn(tracker, first, last));
      return;
    }
    for (let granule = first; granule <= last; granule++) this.#image.write(granule);
  }

  #flush(): void {
    this.#log.push("flush");
    const makeSo = this.#image.flush();
    void this.#schedule.call(makeSo);
  }

  async #backupStep(): Promise<void> {
    const tracker = this.#tracker;
    if (tracker === undefined) return;
    if (this.#following === undefined && this.#random.chance(0.5)) return this.#follow(tracker);
    if (this.#frozen !== undefined) return this.#endBackup(tracker);
    if (this.#preparing) return;
    this.#preparing = true;
    const t0 = tracker.prepareFreeze().then(() => {
      if (tracker !== this.#tracker) return;
      this.#preparing = false;
      const uuid = `backup ${++this.#uuids}`;
      const frozen: FrozenBackup = { epoch: tracker.freeze(), uuid };
      this.#frozen = frozen;
      this.#backups.set(uuid, { content: this.#image.content.slice(), allowed: new Set() });
      this.#log.push(`T0 of ${uuid}`);
      if (this.#random.chance(0.5)) frozen.kept = this.#endFollowing();
    });
    t0.catch((error: unknown) => (this.#failure ??= error));
    await settle();
  }

  async #follow(tracker: DiskTracker): Promise<void> {
    const { checkpoints } = tracker.state;
    if (checkpoints.length === 0) return;
    const { name, uuid: of } = this.#random.pick(checkpoints);
    const followed = (changes: Following): void => {
      // Another backup may have got the name meanwhile: nobody knows of which of the two this is.
      const isOfIt = tracker === this.#tracker && tracker.checkpoint(name)?.uuid === of;
      if (!isOfIt || this.#following !== undefined) return changes.end();
      this.#following = { of, name, changes };
    };
    // The checkpoint may be deleted meanwhile.
    void tracker.follow(name).then(followed, () => undefined);
    await settle();
  }

  /** In T0's turn. */
  #endFollowing(): Kept | undefined {
    if (this.#following === undefined) return undefined;
    const { of, name, changes } = this.#following;
    this.#following = undefined;
    const bits = changes.known.copy();
    bits.or(changes.late());
    changes.end();
    const then = this.#backups.get(of)?.content ?? [];
    this.#image.content.forEach((value, granule) => {
      if (bits.has(granule) || value === then[granule]) return;
      throw new Error(`at T0, since ${of}: granule ${granule} has changed and is not followed`);
    });
    return { of, name, bits };
  }

  async #endBackup(tracker: DiskTracker): Promise<void> {
    const frozen = this.#frozen;
    this.#frozen = undefined;
    if (frozen === undefined) return;
    const { epoch, uuid, kept } = frozen;
    if (kept !== undefined && this.#random.chance(0.5)) return this.#keep(tracker, epoch, kept);
    const name = this.#random.pick(NAMES);
    const isGood = this.#random.chance(0.7);
    this.#log.push(`${uuid} ${isGood ? `becomes ${name}` : "fails"}`);
    if (isGood) void tracker.commit(epoch, name, uuid, 0).finally(() => epoch.release());
    else epoch.release();
    await settle();
  }

  /** What a merged or enabled bitmap is: bits of before T0 in a file of its own, and the epochs from T0 on. */
  async #keep(tracker: DiskTracker, epoch: FrozenEpoch, { of, name, bits }: Kept): Promise<void> {
    this.#log.push(`${name} keeps its bits of ${of}, and records from T0 on`);
    const to = { name, uuid: of, epoch: epoch.epoch, createdMs: 0 };
    const isUndone = this.#random.chance(0.3);
    const work = async (): Promise<void> => {
      const made = await tracker.change([{ name, to, kept: bits }]);
      await (isUndone ? made.undo() : made.done());
    };
    void work().finally(() => epoch.release());
    await settle();
  }

  #deleteCheckpoint(): void {
    const name = this.#random.pick(NAMES);
    this.#log.push(`delete ${name}`);
    void this.#tracker?.remove(name);
  }

  async #kill(): Promise<void> {
    this.#log.push("the process is killed");
    this.#forget();
    this.#storage.processGone();
    if (this.#random.chance(0.2)) this.#writeBehindItsBack();
    await this.#start();
  }

  /** Nobody keeps a bitmap of it: all must be given up. */
  #writeBehindItsBack(): void {
    nowMs += 2_000;
    const granule = this.#random.below(this.#image.content.length);
    this.#log.push(`somebody writes ${granule}`);
    this.#image.write(granule);
    this.#others = undefined;
    this.#isSpoilt = true;
  }

  async #powerCut(): Promise<void> {
    this.#log.push("the power goes");
    this.#forget();
    this.#storage.powerCut(this.#random);
    this.#storage.processGone();
    this.#image.powerCut(this.#random);
    this.#bootId = crypto.randomUUID();
    nowMs += 10_000;
    this.#bootedMs = nowMs;
    if (!this.#isSpoilt && this.#random.chance(0.1)) {
      nowMs += 5_000;
      this.#writeBehindItsBack();
    }
    this.#mayOverReport = true;
    await this.#start();
  }

  async #cleanEnd(): Promise<void> {
    const tracker = this.#tracker;
    if (tracker === undefined) return;
    // What is in flight ends first: requests, jobs, then the image, then the tracker.
    await this.#schedule.endAll();
    this.#frozen?.epoch.release();
    this.#frozen = undefined;
    void this.#schedule.call(this.#image.flush());
    await this.#schedule.endAll();
    const closed = tracker.close(crypto.randomUUID());
    await this.#schedule.endAll();
    await closed;
    this.#forget();
    this.#log.push("closed");
    if (this.#random.chance(0.5)) this.#writeOfOthers();
    if (this.#random.chance(0.3)) this.#bootId = crypto.randomUUID();
    await this.#start();
  }

  /** A program that keeps bitmaps, and may make the disk larger. */
  #writeOfOthers(): void {
    this.#others = new Set();
    const grown = this.#random.chance(0.5) ? this.#random.below(200) : 0;
    for (let i = this.#random.below(4); i >= 0; i--)
      this.#others.add(this.#random.below(this.#image.content.length));
    const before = this.#image.content.length;
    this.#image.grow(before + grown);
    for (const granule of this.#others) this.#image.write(granule);
    this.#image.flush()();
    for (const { allowed } of this.#backups.values()) {
      for (const granule of this.#others) allowed.add(granule);
      for (let granule = before; granule < before + grown; granule++) allowed.add(granule);
    }
    this.#log.push(`others write ${[...this.#others].join(", ")}, and grow it by ${grown}`);
  }

  #forget(): void {
    this.#schedule.abandon();
    this.#tracker = undefined;
    this.#frozen = undefined;
    this.#preparing = false;
    this.#following = undefined;
  }

  async #check(when: string): Promise<void> {
    const tracker = this.#tracker;
    if (tracker === undefined) return;
    const { loss, state, checkpoints } = tracker.state;
    if (this.#isSpoilt) {
      if (checkpoints.length > 0) throw new Error(`${when}: a write behind its back was not noticed`);
      this.#isSpoilt = false;
      this.#justLossMs = loss?.atMs;
    }
    if ((loss !== null && loss.atMs !== this.#justLossMs) || state === "failed")
      throw new Error(`${when}: the tracking was lost: ${loss?.reason}`);
    for (const { name, uuid } of tracker.state.checkpoints) {
      const backup = this.#backups.get(uuid);
      if (backup === undefined) throw new Error(`${when}: checkpoint ${name} is of no backup`);
      let isAnswered = false;
      const asked = tracker.changesSince(name).finally(() => (isAnswered = true));
      asked.catch(() => undefined);
      while (!isAnswered) {
        await settle();
        if (this.#schedule.length > 0) await this.#schedule.endOne();
      }
      this.#compare(`${when}, since ${name} (${uuid})`, await asked, backup);
    }
    this.#mayOverReport = false;
  }

  #compare(what: string, changes: Bits, backup: Backup): void {
    const extra = new Set<number>();
    this.#image.content.forEach((value, granule) => {
      const isReported = changes.has(granule);
      if (!isReported && value !== backup.content[granule]) {
        throw new Error(`${what}: granule ${granule} has changed and is not reported`);
      }
      if (isReported && !backup.allowed.has(granule)) extra.add(Math.floor(granule / GRANULES_PER_EXTENT));
      if (isReported) backup.allowed.add(granule);
    });
    const allowed = this.#mayOverReport ? HOT_EXTENTS_MAX : 0;
    if (extra.size > allowed) throw new Error(`${what}: ${extra.size} extents are reported for nothing`);
  }
}
