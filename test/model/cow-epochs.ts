// Who keeps track of changes, in the engine's model: a real tracker over a folder in memory, of which each call ends when
// the schedule says so, and what guest writes are to be in which of its epochs. The first epoch ends at the T0 of the
// backup, the others at those of checkpoints that are made while it runs. Checked at the end, block by block: a write is
// in the epoch in which the image was written, and in no other, but for one that had its bits, waited to be captured,
// and met a T0 meanwhile.

import type { Completion } from "../../src/block/device.js";
import type { WriteTracker } from "../../src/cow/write-tracker.js";
import type { Bits } from "../../src/tracking/bits.js";
import { decodeActive, decodeEpoch } from "../../src/tracking/epoch-file.js";
import type { TrackingFile, TrackingFolder } from "../../src/tracking/folder.js";
import { PULSE_NAME } from "../../src/tracking/pulse.js";
import { DiskTracker } from "../../src/tracking/tracker.js";

const HOT_EXTENTS_MAX = 4;

/** A call of storage: `work` takes effect when it ends. */
export type StorageCall = <T>(work: () => T) => Promise<T>;

/** Between two T0s, by block. */
interface Period {
  /** That began with it. */
  epoch: number;
  /** The tracker let a write of it go on. */
  asked: Set<number>;
  /** The image was written. */
  written: Set<number>;
}

interface EpochsOptions {
  sizeBytes: number;
  blockBytes: number;
  extentBytes: number;
  /** Its folder is as quick as the image. */
  isLocal: boolean;
  call: StorageCall;
}

export class Epochs implements WriteTracker {
  readonly #options: EpochsOptions;
  readonly #files = new Map<string, { bytes: Uint8Array }>();
  readonly #periods: Period[] = [];
  #tracker: DiskTracker | undefined;
  #isOver = false;

  constructor(options: EpochsOptions) {
    this.#options = options;
  }

  /** Before the first write. */
  async open(): Promise<void> {
    const { sizeBytes, blockBytes, extentBytes, call } = this.#options;
    this.#options.call = (work) => Promise.resolve(work());
    const tracker = await DiskTracker.open({
      folder: this.#folder(),
      mode: "host",
      boot: { id: crypto.randomUUID(), startedMs: 0 },
      granularityBytes: blockBytes,
      extentBytes,
      hotExtentsMax: HOT_EXTENTS_MAX,
      logger: { info: () => undefined, warn: () => undefined },
      flushImage: () => undefined,
      image: {
        sizeBytes,
        identity: () => Promise.resolve(undefined),
        looks: () => Promise.resolve(undefined),
        writesOfOthers: () => Promise.resolve(undefined),
      },
    });
    this.#tracker = tracker;
    await this.prepare();
    this.t0();
    this.#options.call = call;
  }

  beforeWrite(offsetBytes: number, lengthBytes: number): Completion {
    const wait = this.#opened.beforeWrite(offsetBytes, lengthBytes);
    // In a folder that takes its time, bits are there before the question is asked again.
    if (wait === undefined || !this.#options.isLocal) {
      this.#add("asked", offsetBytes, offsetBytes + lengthBytes);
    }
    return wait;
  }

  touched(): void {
    this.#opened.touched();
  }

  /** The image is being written. */
  wrote(from: number, to: number): void {
    this.#add("written", from, to);
  }

  sweep(): void {
    if (!this.#isOver) this.#opened.sweep();
  }

  /** Before `t0`, and no other one may come in between. */
  prepare(): Promise<void> {
    return this.#opened.prepareFreeze();
  }

  /** In T0's turn. */
  t0(): void {
    const { epoch } = this.#opened.freeze();
    this.#periods.push({ epoch, asked: new Set(), written: new Set() });
  }

  /**
   * When no write can come any more; the storage must go on.
   * @throws Error naming a write that is in the wrong epoch
   */
  async check(): Promise<void> {
    this.#isOver = true;
    await this.#opened.close();
    if (this.#opened.state.state === "failed") throw new Error("5: the tracking was given up");
    const inEpochs = this.#inEpochs();
    for (const [at, { epoch, asked, written }] of this.#periods.entries()) {
      const next = this.#periods[at + 1]?.epoch ?? Infinity;
      const noted = inEpochs.filter(({ first }) => epoch <= first && first < next);
      const has = (block: number): boolean => noted.some(({ bits }) => bits.has(block));
      // Nobody captures before the first T0.
      const may = at === 0 && this.#options.isLocal ? written : asked;
      for (let block = 0; block * this.#options.blockBytes < this.#options.sizeBytes; block++) {
        if (written.has(block) && !has(block)) {
          throw new Error(`5: block ${block} was written after T0 ${at} and is not in its epoch`);
        }
        if (has(block) && !may.has(block)) {
          throw new Error(`5: block ${block} was not written after T0 ${at} and is in its epoch`);
        }
      }
    }
  }

  get #opened(): DiskTracker {
    if (this.#tracker === undefined) throw new Error("not opened");
    return this.#tracker;
  }

  #add(kind: "asked" | "written", from: number, to: number): void {
    const { blockBytes } = this.#options;
    const blocks = this.#periods.at(-1)?.[kind];
    for (let block = Math.floor(from / blockBytes); block * blockBytes < to; block++) blocks?.add(block);
  }

  /** What the folder has, of epochs that are over and of the last. */
  #inEpochs(): { first: number; bits: Bits }[] {
    return [...this.#files].flatMap(([name, { bytes }]) => {
      if (!name.endsWith(".bits")) return [];
      const file = name.startsWith("active") ? decodeActive(bytes) : decodeEpoch(bytes);
      return file === undefined ? [] : [{ first: file.header.first, bits: file.bits }];
    });
  }

  #folder(): TrackingFolder {
    const files = this.#files;
    const call: StorageCall = (work) => this.#options.call(work);
    return {
      name: "tracking",
      isLocal: this.#options.isLocal,
      read: (name) => call(() => files.get(name)?.bytes.slice() ?? null),
      replace: (name, bytes) => call(() => void files.set(name, { bytes: bytes.slice() })),
      open: (name) =>
        call(() => {
          const file = files.get(name);
          if (file === undefined) throw new Error(`no file ${name}`);
          // How often it is written depends on no schedule.
          return fileOf(file, name === PULSE_NAME ? (work) => Promise.resolve(work()) : call);
        }),
      list: () => call(() => [...files.keys()]),
      remove: (name) => call(() => void files.delete(name)),
      changedMs: () => Promise.resolve(undefined),
      close: () => Promise.resolve(),
    };
  }
}

function fileOf(file: { bytes: Uint8Array }, call: StorageCall): TrackingFile {
  const write = (bytes: Uint8Array, offset: number): void => file.bytes.set(bytes, offset);
  return {
    writeNow: (bytes, from, to, offset) => write(bytes.subarray(from, to), offset),
    write: (bytes, from, to, offset) => {
      const copy = bytes.slice(from, to);
      return call(() => write(copy, offset));
    },
    writeDurably: (bytes, offset) => {
      const copy = bytes.slice();
      return call(() => write(copy, offset));
    },
    sync: () => call(() => undefined),
    close: () => Promise.resolve(),
  };
}
