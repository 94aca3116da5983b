// A deterministic simulation of one live backup: a guest, the real interceptor and disk node on the main side, the
// real drainers as simulated workers, and a scheduler that from one seed decides every order there is to decide:
// which worker takes its next step, when a cold read or an asynchronous write of the image ends, when a write to
// the target ends, when the guest sends what. Reads and writes of the image also let workers run inside them, so
// that worker steps fall between any two steps of a capture.
//
// What it checks, by DESIGN's numbers:
//  1. at each write to the image: the T0 content of every block that it changes is in a slot, in the spill, or the
//     cluster is DONE (a worker has it in its own buffer);
//  2. with every write to the target held up, the guest's writes all end (unless there is no buffer to put the old
//     data in and the policy is to wait);
//  3. the target has every byte as at T0, and was given each byte once; where the copy is of the top layer alone, every
//     byte of the clusters that this layer has a block of, and no other byte;
//  5. at T0 no write is in flight in the image; where changes are tracked, a write is in exactly one epoch (cow-epochs.ts).
// (4, the target's name, is the target's own business: test/integration.) Besides: the disk holds what the guest
// wrote; nothing of the buffer or the spill is left in use; nobody waits for ever.

import { closeSync, mkdtempSync, openSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PAGES_READY } from "../../src/cow/buffer-pages.js";
import { DiskNode } from "../../src/cow/disk-node.js";
import { Drainer } from "../../src/cow/drain.js";
import type { DrainStep } from "../../src/cow/drain-io.js";
import { BLOCK_BYTES, SLOT_BYTES, type Geometry } from "../../src/cow/geometry.js";
import { Interceptor } from "../../src/cow/interceptor.js";
import {
  captureLength,
  captureStart,
  createSharedState,
  CTL_AHEAD_CHUNKS,
  CTL_READING,
  CTL_RUN,
  CTL_SPILL_BLOCKS,
  CTL_SWEEP,
  CTL_USED_BLOCKS,
  DONE,
  RUN_ABORTING,
  RUN_RUNNING,
  type SharedState,
  SPILLED,
} from "../../src/cow/shared.js";
import { type BufferMemory, createSlotFile, memoryAlone } from "../../src/cow/slot-memory.js";
import { spillBitmapBytes, SpillFile } from "../../src/cow/spill.js";
import type { CowcatcherError } from "../../src/errors.js";
import type { Completion, Image, SourceReader } from "../../src/block/device.js";
import type { TargetWriter } from "../../src/cow/target-writer.js";
import type { OnBufferFull } from "../../src/cow/policies.js";
import { Random } from "../support/random.js";
import { Epochs } from "./cow-epochs.js";

export class InvariantError extends Error {}

export interface Outcome {
  captures: number;
  spilledBytes: number;
  waits: number;
  steps: number;
  /** The guest was left alone before the target had everything. */
  leftEarly: boolean;
  ended: "complete" | "broken" | "aborted";
  /** Of checkpoints that were made while the backup ran; undefined where nothing is tracked. */
  epochs: number | undefined;
}

const CLUSTER_BYTES = 2 * BLOCK_BYTES;
const CHUNK_BYTES = 8 * BLOCK_BYTES;
const CHUNKS_PER_REGION = 2;
const MAX_STEPS = 100_000;
/** Turns of the event loop without any progress after which somebody waits for ever. */
const STUCK_TURNS = 3_000;
/** Of time that passes outside the simulation: a start in it is never late. */
const START_LIMIT_MS = 600_000;

interface Worker {
  steps: Generator<DrainStep, void, void>;
  blocked: (() => boolean) | null;
  thrown: { error: unknown } | null;
  ended: boolean;
}

interface Pending {
  kind: "image" | "target";
  complete: () => void;
}

const scratchDirectory = mkdtempSync(join(tmpdir(), "cow-model-"));
process.on("exit", () => rmSync(scratchDirectory, { recursive: true, force: true }));
let spillNumber = 0;

export class Simulation {
  readonly random: Random;
  readonly geometry: Geometry;
  readonly disk: Uint8Array;
  readonly expectedDisk: Uint8Array;
  snapshot: Uint8Array | null = null;
  readonly target: Uint8Array;
  readonly targetWritten: Uint8Array;
  readonly node: DiskNode;
  /** Who keeps track of changes; null: nobody. */
  readonly #epochs: Epochs | null;
  #checkpointing: Promise<void> | null = null;
  #checkpointCount = 0;
  shared: SharedState;
  interceptor: Interceptor | null = null;
  broken: CowcatcherError | null = null;
  readonly workers: Worker[] = [];
  readonly pending: Pending[] = [];
  readonly guestRanges: { from: number; to: number }[] = [];
  guestFailures: unknown[] = [];
  imageWritesInFlight = 0;
  targetStalled = false;
  /** Virtual time: it passes with each step of the schedule. */
  nowMs = 0;
  sleepers: { atMs: number; wake: () => void }[] = [];
  stepCount = 0;
  leftEarly = false;
  #nesting = 0;
  readonly #holes: Uint8Array;
  /** Blocks that the image's own layer provides at T0, in a copy of that layer alone; null: all are copied. */
  readonly #own: Uint8Array | null;
  readonly #spillFd: number;
  readonly #buffer: BufferMemory;
  /** Chunks that workers may read ahead of the target; 0: they do not. */
  readonly #aheadChunks: number;
  readonly #aheadFd: number;
  readonly #spillBitmaps: SharedArrayBuffer;
  readonly #policy: OnBufferFull;
  readonly #bufferBytes: number;
  readonly #coldness: number;
  /** How likely a write to the target ends at once, and how likely a later one ends in a turn of its own. */
  readonly #targetSpeed: number;
  /** Of the guest's last request. */
  #lastEnd = 0;
  /** Steps of others between two requests of the guest: less than this. */
  readonly #haste: number;

  constructor(readonly seed: number) {
    this.random = new Random(seed);
    const { random } = this;
    // Now and then more than the interceptor captures in one turn of the event loop.
    const chunkCount = 1 + random.below(random.chance(0.2) ? 40 : 12);
    const sizeBytes = Math.max(
      1,
      chunkCount * CHUNK_BYTES - (random.chance(0.5) ? random.below(CHUNK_BYTES) : 0),
    );
    this.geometry = {
      sizeBytes,
      clusterBytes: CLUSTER_BYTES,
      chunkBytes: CHUNK_BYTES,
      clusterCount: Math.ceil(sizeBytes / CLUSTER_BYTES),
      chunkCount: Math.ceil(sizeBytes / CHUNK_BYTES),
      chunksPerRegion: CHUNKS_PER_REGION,
      regionCount: Math.ceil(Math.ceil(sizeBytes / CHUNK_BYTES) / CHUNKS_PER_REGION),
      clustersPerChunk: CHUNK_BYTES / CLUSTER_BYTES,
      blocksPerChunk: CHUNK_BYTES / BLOCK_BYTES,
    };
    this.#coldness = random.pick([0, 0.1, 0.5]);
    this.#haste = random.pick([2, 6, 14]);
    this.#targetSpeed = random.pick([0.02, 0.02, 0.3, 1]);
    this.#policy = random.pick(["spill", "wait", "cancel"] as const);
    this.#bufferBytes = random.pick([0, SLOT_BYTES, SLOT_BYTES, 2 * SLOT_BYTES, 64 * SLOT_BYTES]);
    this.#buffer = this.#makeBuffer();
    this.shared = createSharedState(this.geometry, this.#buffer, this.#bufferBytes);
    this.disk = new Uint8Array(sizeBytes);
    this.#holes = new Uint8Array(Math.ceil(sizeBytes / BLOCK_BYTES));
    this.#fillDisk();
    this.#own = this.#layOut();
    this.expectedDisk = this.disk.slice();
    // What the target holds before must not pass for a zero that was written.
    this.target = new Uint8Array(sizeBytes).fill(0xee);
    this.targetWritten = new Uint8Array(sizeBytes);
    this.#spillFd = openSync(join(scratchDirectory, `spill-${spillNumber++}`), "w+");
    this.#aheadChunks = this.#bufferBytes === 0 ? 0 : new Random(seed + 0xa4ead).pick([0, 0, 1, 3, 64]);
    this.#aheadFd = openSync(join(scratchDirectory, `ahead-${spillNumber}`), "w+");
    this.#spillBitmaps = new SharedArrayBuffer(spillBitmapBytes(this.geometry));
    this.#epochs = this.#newEpochs();
    this.node = new DiskNode("disk", this.#image(), this.#epochs);
  }

  /** Whether there is one: by a sequence of its own, too. */
  #newEpochs(): Epochs | null {
    const random = new Random(this.seed + 0xe90c);
    if (random.chance(0.65)) return null;
    return new Epochs({
      sizeBytes: this.geometry.sizeBytes,
      blockBytes: BLOCK_BYTES,
      extentBytes: CHUNK_BYTES,
      isLocal: random.chance(0.7),
      call: (work) =>
        this.random.chance(0.3) ? Promise.resolve(work()) : this.#later("image", () => work()),
    });
  }

  /** Mapped as a whole, or a part of it, or nothing; of a part the pages become ready by and by. */
  #makeBuffer(): BufferMemory {
    const slotCount = this.#bufferBytes / SLOT_BYTES;
    const mappedBytes = this.random.below(slotCount + 1) * SLOT_BYTES;
    if (this.random.chance(0.5)) return memoryAlone(new Uint8Array(new SharedArrayBuffer(this.#bufferBytes)));
    const fileFd = createSlotFile();
    if (fileFd < 0) throw new Error("there is no file in memory here");
    return { ...memoryAlone(new Uint8Array(new SharedArrayBuffer(mappedBytes))), fileFd };
  }

  #fillDisk(): void {
    const emptyFrom = this.random.below(this.#holes.length + 1);
    for (let block = 0; block < this.#holes.length; block++) {
      const hole = block >= emptyFrom || this.random.chance(0.2);
      this.#holes[block] = hole ? 1 : 0;
      const fill = hole ? 0 : this.random.below(256);
      this.disk.fill(fill, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
    }
  }

  /** By a sequence of its own, so that a seed's schedule does not depend on it. */
  #layOut(): Uint8Array | null {
    const random = new Random(this.seed + 0x5eed);
    if (random.chance(0.6)) return null;
    const own = new Uint8Array(this.#holes.length);
    for (let block = 0; block < own.length;) {
      const end = block + 1 + random.below(random.pick([2, 8, 40]));
      own.fill(random.below(2), block, end);
      block = end;
    }
    return own;
  }

  /** The guest's disk: bytes in memory, some reads cold, some writes asynchronous. */
  #image(): Image {
    const write = (from: number, to: number, change: () => void): Completion => {
      // Now, not when the write ends: by then a worker may have the captured data in its own buffer.
      this.#checkCaptured(from, to);
      this.#epochs?.wrote(from, to);
      const apply = () => {
        change();
        for (let block = Math.floor(from / BLOCK_BYTES); block * BLOCK_BYTES < to; block++)
          this.#holes[block] = 0;
      };
      this.#letWorkersIn();
      if (!this.random.chance(this.#coldness)) {
        apply();
        return undefined;
      }
      this.imageWritesInFlight++;
      return this.#later("image", () => {
        this.imageWritesInFlight--;
        apply();
      });
    };
    return {
      name: "model",
      path: "model",
      format: "raw",
      probed: false,
      backing: null,
      files: [],
      sizeBytes: this.geometry.sizeBytes,
      readOnly: false,
      clusterSizeBytes: 0,
      read: (buffer, bufferOffset, length, offset) => {
        const copy = () => buffer.set(this.disk.subarray(offset, offset + length), bufferOffset);
        this.#letWorkersIn();
        if (!this.random.chance(this.#coldness)) {
          copy();
          this.#letWorkersIn();
          return undefined;
        }
        return this.#later("image", copy);
      },
      write: (buffer, bufferOffset, length, offset) =>
        write(offset, offset + length, () =>
          this.disk.set(buffer.subarray(bufferOffset, bufferOffset + length), offset),
        ),
      writeZeroes: (offset, length) =>
        write(offset, offset + length, () => this.disk.fill(0, offset, offset + length)),
      discard: (offset, length) =>
        write(offset, offset + length, () => this.disk.fill(0, offset, offset + length)),
      flush: () => undefined,
      blockStatus: (_offset, length) => ({
        lengthBytes: length,
        zero: false,
        data: true,
        depth: 0,
        present: true,
        compressed: false,
      }),
      close: () => Promise.resolve(),
      freeze: () => ({
        description: {
          format: "raw",
          name: "model",
          fd: -1,
          sizeBytes: this.geometry.sizeBytes,
          direct: false,
        },
        release: () => {},
      }),
    };
  }

  #later<T>(kind: Pending["kind"], effect: () => T): Promise<T> {
    return new Promise<void>((resolve) => this.pending.push({ kind, complete: resolve })).then(effect);
  }

  /** Invariant 1, from outside the engine: looks for the T0 bytes wherever they may be. */
  #checkCaptured(from: number, to: number): void {
    if (this.snapshot === null || this.interceptor === null || this.interceptor.detached) return;
    for (let block = Math.floor(from / BLOCK_BYTES); block * BLOCK_BYTES < to; block++) {
      const cluster = Math.floor((block * BLOCK_BYTES) / CLUSTER_BYTES);
      if (this.shared.clusterStates[cluster] === DONE || this.#inHoleRegion(block)) continue;
      if (this.#heldInBuffer(block) || this.#heldInSpill(block)) continue;
      throw new InvariantError(
        `1: block ${block} changes, and its T0 content is nowhere (seed ${this.seed})`,
      );
    }
  }

  #inHoleRegion(block: number): boolean {
    const region = Math.floor((block * BLOCK_BYTES) / (CHUNK_BYTES * CHUNKS_PER_REGION));
    return this.shared.regionStates[region] === 2;
  }

  #heldInBuffer(block: number): boolean {
    const chunk = Math.floor((block * BLOCK_BYTES) / CHUNK_BYTES);
    const inChunk = block - (chunk * CHUNK_BYTES) / BLOCK_BYTES;
    const { shared } = this;
    for (let c = shared.chunkHead(chunk); c >= 0; c = shared.captureNext[c]) {
      const info = shared.captureInfo[c];
      const start = captureStart(info);
      if (inChunk < start || inChunk >= start + captureLength(info)) continue;
      const at = (c + inChunk - start) * BLOCK_BYTES;
      const data = new Uint8Array(BLOCK_BYTES);
      shared.slots.read(at, data, 0, BLOCK_BYTES);
      return this.#isT0(block, data);
    }
    return false;
  }

  #heldInSpill(block: number): boolean {
    const chunk = Math.floor((block * BLOCK_BYTES) / CHUNK_BYTES);
    const inChunk = block - (chunk * CHUNK_BYTES) / BLOCK_BYTES;
    if ((this.shared.chunkWords[chunk] & SPILLED) === 0) return false;
    const spill = this.#spill();
    const bitmap = new Uint8Array(this.geometry.blocksPerChunk / 8);
    spill.readBitmap(chunk, bitmap);
    if ((bitmap[inChunk >> 3] & (1 << (inChunk & 7))) === 0) return false;
    const data = new Uint8Array(BLOCK_BYTES);
    spill.readBlocks(data, 0, chunk, inChunk, 1);
    return this.#isT0(block, data);
  }

  #isT0(block: number, data: Uint8Array): boolean {
    const t0 = (this.snapshot as Uint8Array).subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
    return Buffer.compare(t0, data.subarray(0, t0.length)) === 0;
  }

  #spill(): SpillFile {
    return new SpillFile({ path: "spill", fd: this.#spillFd, bitmaps: this.#spillBitmaps }, this.geometry);
  }

  // ---- workers ----

  #startWorkers(count: number): void {
    for (let i = 0; i < count; i++) {
      const chunkBuffer = new Uint8Array(CHUNK_BYTES).fill(0x55);
      const drainer = new Drainer({
        shared: this.shared,
        reader: this.#reader(),
        writer: this.#writer(),
        topOnly: this.#own !== null,
        zeroUnitBytes: BLOCK_BYTES,
        spill: this.#spill(),
        chunkBuffer,
        onSourceError: "report",
        onTargetError: "report",
        targetRetries: 0,
        onStop: () => {},
        now: () => BigInt(this.stepCount),
        ...(this.#aheadChunks > 0 && {
          readAhead: {
            fd: this.#aheadFd,
            chunkLimit: this.#aheadChunks,
            part: i,
            writeBuffer: new Uint8Array(CHUNK_BYTES).fill(0x66),
          },
        }),
      });
      this.workers.push({ steps: drainer.run(), blocked: null, thrown: null, ended: false });
    }
  }

  #reader(): SourceReader {
    return {
      sizeBytes: this.geometry.sizeBytes,
      read: (buffer, bufferOffset, length, offset) => {
        buffer.set(this.disk.subarray(offset, offset + length), bufferOffset);
        return undefined;
      },
      extent: (offset, length) => {
        const zero = this.#holes[Math.floor(offset / BLOCK_BYTES)] === 1;
        let end = offset;
        while (end < offset + length && (this.#holes[Math.floor(end / BLOCK_BYTES)] === 1) === zero) {
          end = (Math.floor(end / BLOCK_BYTES) + 1) * BLOCK_BYTES;
        }
        return { lengthBytes: Math.min(end, offset + length) - offset, zero };
      },
      ...(this.#own === null ? {} : { allocation: this.#allocationOf(this.#own) }),
      close: () => {},
    };
  }

  #allocationOf(own: Uint8Array): NonNullable<SourceReader["allocation"]> {
    return (offset, length) => {
      const bit = own[Math.floor(offset / BLOCK_BYTES)];
      let end = offset;
      while (end < offset + length && own[Math.floor(end / BLOCK_BYTES)] === bit) {
        end = (Math.floor(end / BLOCK_BYTES) + 1) * BLOCK_BYTES;
      }
      return { lengthBytes: Math.min(end, offset + length) - offset, allocated: bit === 1 };
    };
  }

  #writer(): TargetWriter {
    const write = (from: number, to: number, data: Uint8Array | null): Completion => {
      // The data is the worker's own by now: what it holds when the write is made is what counts.
      const apply = () => {
        for (let i = from; i < to; i++) {
          if (this.targetWritten[i])
            throw new InvariantError(`3: byte ${i} was written twice (seed ${this.seed})`);
          this.targetWritten[i] = 1;
        }
        if (data === null) this.target.fill(0, from, to);
        else this.target.set(data, from);
      };
      if (!this.targetStalled && this.random.chance(this.#targetSpeed)) {
        apply();
        return undefined;
      }
      return this.#later("target", apply);
    };
    return {
      write: (buffer, bufferOffset, length, offset) =>
        write(offset, offset + length, buffer.subarray(bufferOffset, bufferOffset + length)),
      writeZeroes: (offset, length) => write(offset, offset + length, null),
      close: () => {},
    };
  }

  /** As soon as everything is read nobody needs the guest's old data: where workers read ahead, that is known. */
  #leaveGuestEarly(): void {
    const { control, geometry } = this.shared;
    if (this.#aheadChunks === 0 || this.interceptor === null || this.interceptor.detached) return;
    if (control[CTL_SWEEP] < geometry.chunkCount || control[CTL_READING] > 0) return;
    if (this.workers.some(({ ended }) => !ended)) this.leftEarly = true;
    this.interceptor.detach();
  }

  #runnableWorkers(): Worker[] {
    return this.workers.filter((worker) => {
      if (worker.ended) return false;
      if (worker.blocked === null) return true;
      if (!worker.blocked()) return false;
      worker.blocked = null;
      return true;
    });
  }

  #stepWorker(worker: Worker): void {
    this.stepCount++;
    if (this.#nesting === 0) this.#leaveGuestEarly();
    if (this.stepCount > MAX_STEPS) throw new InvariantError(`a worker runs in circles (seed ${this.seed})`);
    let result: IteratorResult<DrainStep, void>;
    if (worker.thrown !== null) {
      const { error } = worker.thrown;
      worker.thrown = null;
      result = worker.steps.throw(error);
    } else {
      result = worker.steps.next();
    }
    if (result.done) {
      worker.ended = true;
      return;
    }
    const step = result.value;
    if (step.kind === "wait") {
      const { words, index, value } = step;
      worker.blocked = () => Atomics.load(words, index) !== value;
    } else if (step.kind === "promise") {
      let settled = false;
      worker.blocked = () => settled;
      step.promise.then(
        () => {
          settled = true;
        },
        (error: unknown) => {
          worker.thrown = { error };
          settled = true;
        },
      );
    }
  }

  /** Called from inside the image's reads and writes: worker steps between two steps of the main thread. */
  #letWorkersIn(): void {
    if (this.#nesting > 0) return;
    this.#nesting++;
    try {
      for (let i = this.random.below(4); i > 0; i--) {
        const runnable = this.#runnableWorkers();
        if (runnable.length > 0) this.#stepWorker(this.random.pick(runnable));
      }
    } finally {
      this.#nesting--;
    }
  }

  // ---- the guest ----

  #guestRequest(): void {
    const { sizeBytes } = this.geometry;
    const lengths = [1, 512, BLOCK_BYTES, 3 * BLOCK_BYTES, CHUNK_BYTES, 20 * CHUNK_BYTES];
    if (this.random.chance(0.2)) Atomics.add(new Int32Array(this.#buffer.pages), PAGES_READY, 1);
    let from = this.random.below(sizeBytes);
    if (this.random.chance(0.5)) from -= from % BLOCK_BYTES;
    // Some go on where the one before ended.
    if (this.random.chance(0.2) && this.#lastEnd < sizeBytes) from = this.#lastEnd;
    const to = Math.min(sizeBytes, from + 1 + this.random.below(this.random.pick(lengths)));
    // Writes that overlap in time may end in either order, so the model cannot say what the disk holds then.
    if (this.guestRanges.some((range) => range.from < to && from < range.to)) return;
    const fill = this.random.chance(0.3) ? 0 : this.random.below(256);
    this.#lastEnd = to;
    this.expectedDisk.fill(fill, from, to);
    const data = new Uint8Array(to - from).fill(fill);
    const completion =
      fill !== 0
        ? this.node.write(data, 0, to - from, from)
        : this.random.chance(0.5)
          ? this.node.writeZeroes(from, to - from, { mayUnmap: true })
          : this.node.discard(from, to - from);
    if (!completion) return;
    const range = { from, to };
    this.guestRanges.push(range);
    void completion
      .catch((error: unknown) => this.guestFailures.push(error))
      .finally(() => this.guestRanges.splice(this.guestRanges.indexOf(range), 1));
  }

  // ---- the schedule ----

  async run(): Promise<Outcome> {
    try {
      return await this.#run();
    } finally {
      closeSync(this.#spillFd);
      if (this.#buffer.fileFd >= 0) closeSync(this.#buffer.fileFd);
      closeSync(this.#aheadFd);
    }
  }

  async #run(): Promise<Outcome> {
    await this.#epochs?.open();
    for (let i = this.random.below(4); i > 0; i--) this.#guestRequest();
    let failed = false;
    const starting = this.#atT0(() => this.#start());
    starting.catch(() => {
      failed = true;
    });
    while (this.snapshot === null && !failed) {
      if (this.random.chance(0.3)) this.#guestRequest();
      this.#completeOne("image");
      await turn();
    }
    await starting;
    const abortAt = this.random.chance(0.15) ? this.random.below(60) : -1;
    const stallAt = this.random.chance(0.3) ? this.random.below(40) : -1;
    const requests = this.random.below(60);
    for (let i = 0; i < requests; i++) {
      if (i === abortAt) return this.#abort();
      if (i === stallAt) await this.#stallTarget();
      await this.#someSteps();
      this.#guestRequest();
      if (this.#epochs !== null && this.random.chance(0.05)) this.#checkpoint();
    }
    await this.#settle(() => this.workers.every((worker) => worker.ended) && this.guestRanges.length === 0);
    return this.#finish();
  }

  /** As a job that starts does it. */
  #atT0(step: () => void): Promise<void> {
    const epochs = this.#epochs;
    const turn = (): void => {
      if (this.imageWritesInFlight > 0)
        throw new InvariantError(`5: a write is half done at T0 (seed ${this.seed})`);
      epochs?.t0();
      step();
    };
    const prepare = epochs === null ? undefined : () => epochs.prepare();
    return DiskNode.quiesceAll([this.node], turn, START_LIMIT_MS, undefined, prepare);
  }

  /** A T0 without a job: an epoch ends while guests write, and the backup runs. */
  #checkpoint(): void {
    if (this.#checkpointing !== null) return;
    this.#checkpointing = this.#atT0(() => void this.#checkpointCount++)
      .catch((error: unknown) => void this.guestFailures.push(error))
      .finally(() => (this.#checkpointing = null));
  }

  #start(): void {
    this.snapshot = this.disk.slice();
    this.interceptor = new Interceptor({
      shared: this.shared,
      image: this.node.image,
      openSpill: this.#policy === "spill" ? () => this.#spill() : undefined,
      spillLimitBytes: Number.MAX_SAFE_INTEGER,
      policy: { onBufferFull: this.#policy, onCbwError: "break-snapshot", guestTimeoutMs: 1e9 },
      onBroken: (error) => {
        this.broken = error;
        this.#endWorkers();
      },
      // For ever: a wake-up that is lost must show.
      recheckMs: Infinity,
      heldChunksMax: this.random.pick([1, 2, 64]),
      clock: {
        nowMs: () => this.nowMs,
        sleep: (ms) =>
          new Promise((resolve) => {
            this.sleepers.push({ atMs: this.nowMs + ms, wake: resolve });
          }),
      },
    });
    this.node.addInterceptor(this.interceptor);
    Atomics.store(this.shared.control, CTL_RUN, RUN_RUNNING);
    this.#startWorkers(1 + this.random.below(3));
  }

  async #someSteps(): Promise<void> {
    if (this.random.chance(0.1)) this.#epochs?.sweep();
    for (let i = this.random.below(this.#haste); i > 0; i--) {
      const runnable = this.#runnableWorkers();
      if (runnable.length > 0 && this.random.chance(0.8)) this.#stepWorker(this.random.pick(runnable));
      else this.#completeOne(this.random.chance(this.#targetSpeed) ? "target" : "image");
      if (this.random.chance(0.3)) await turn();
    }
    await turn();
  }

  /** Wakes who has slept enough; if nothing else can go on, the first sleeper has. */
  #passTime(busy: boolean): boolean {
    const first = this.sleepers.reduce((least, { atMs }) => Math.min(least, atMs), Infinity);
    this.nowMs = busy || first === Infinity ? this.nowMs + 0.1 : Math.max(this.nowMs, first);
    const due = this.sleepers.filter(({ atMs }) => atMs <= this.nowMs);
    this.sleepers = this.sleepers.filter(({ atMs }) => atMs > this.nowMs);
    for (const { wake } of due) wake();
    return due.length > 0;
  }

  #completeOne(kind: Pending["kind"]): boolean {
    const candidates = this.pending.filter((pending) => pending.kind === kind);
    if (candidates.length === 0) return false;
    const chosen = this.random.pick(candidates);
    this.pending.splice(this.pending.indexOf(chosen), 1);
    chosen.complete();
    return true;
  }

  /** Runs everything there is to run, in random order, until `done`. */
  async #settle(done: () => boolean): Promise<void> {
    let idleTurns = 0;
    while (!done()) {
      const runnable = this.#runnableWorkers();
      let progress = false;
      if (runnable.length > 0) {
        this.#stepWorker(this.random.pick(runnable));
        progress = true;
      }
      progress = this.#completeOne("image") || progress;
      if (!this.targetStalled) progress = this.#completeOne("target") || progress;
      progress = this.#passTime(progress) || progress;
      idleTurns = progress ? 0 : idleTurns + 1;
      if (idleTurns > STUCK_TURNS) throw new InvariantError(`somebody waits for ever (seed ${this.seed})`);
      if (!progress || this.random.chance(0.3)) await turn();
    }
  }

  /** Invariant 2: no write to the target ends, and yet every guest write does. */
  async #stallTarget(): Promise<void> {
    if (this.#bufferBytes === 0 || this.#policy === "wait") return;
    this.targetStalled = true;
    for (let i = 0; i < 5; i++) this.#guestRequest();
    try {
      await this.#settle(() => this.guestRanges.length === 0);
    } catch (error) {
      throw new InvariantError(`2: a guest write waits for the target (${String(error)})`);
    }
    this.targetStalled = false;
  }

  #endWorkers(): void {
    Atomics.store(this.shared.control, CTL_RUN, RUN_ABORTING);
  }

  /** Cancel at any moment: the guest's writes end without the target's help, and so do the workers. */
  async #abort(): Promise<Outcome> {
    this.#endWorkers();
    this.interceptor?.detach();
    this.targetStalled = true;
    await this.#settle(() => this.guestRanges.length === 0);
    this.targetStalled = false;
    await this.#settle(() => this.workers.every((worker) => worker.ended));
    await this.#checkDisk();
    return this.#outcome("aborted");
  }

  async #finish(): Promise<Outcome> {
    await this.#checkDisk();
    if (this.broken !== null) return this.#outcome("broken");
    const t0 = this.snapshot as Uint8Array;
    const isWanted = this.#wantedClusters();
    const wanted = (at: number): boolean => isWanted[Math.floor(at / CLUSTER_BYTES)] === true;
    const missing = this.targetWritten.findIndex((written, at) => written === 0 && wanted(at));
    if (missing >= 0)
      throw new InvariantError(`3: byte ${missing} never reached the target (seed ${this.seed})`);
    const surplus = this.targetWritten.findIndex((written, at) => written === 1 && !wanted(at));
    if (surplus >= 0) throw new InvariantError(`3: byte ${surplus} is of a lower layer (seed ${this.seed})`);
    const different = t0.findIndex((byte, at) => wanted(at) && this.target[at] !== byte);
    if (different >= 0) throw new InvariantError(`3: byte ${different} is not as at T0 (seed ${this.seed})`);
    const used = this.shared.control[CTL_USED_BLOCKS];
    if (used !== 0)
      throw new InvariantError(`${used} blocks of the buffer are still in use (seed ${this.seed})`);
    const spilled = this.shared.control[CTL_SPILL_BLOCKS];
    if (spilled !== 0)
      throw new InvariantError(`${spilled} blocks are still in the spill (seed ${this.seed})`);
    const kept = this.shared.control[CTL_AHEAD_CHUNKS];
    if (kept !== 0) throw new InvariantError(`${kept} chunks are still kept (seed ${this.seed})`);
    return this.#outcome("complete");
  }

  #wantedClusters(): boolean[] {
    const own = this.#own;
    const blocks = CLUSTER_BYTES / BLOCK_BYTES;
    return Array.from(
      { length: this.geometry.clusterCount },
      (_, cluster) => own === null || own.subarray(cluster * blocks, (cluster + 1) * blocks).includes(1),
    );
  }

  async #checkDisk(): Promise<void> {
    await this.#settle(() => this.#checkpointing === null);
    if (this.guestFailures.length > 0) throw this.guestFailures[0] as Error;
    const different = this.disk.findIndex((byte, at) => this.expectedDisk[at] !== byte);
    if (different >= 0)
      throw new InvariantError(`the guest's disk is wrong at ${different} (seed ${this.seed})`);
    await this.#checkEpochs();
  }

  async #checkEpochs(): Promise<void> {
    let isOver = this.#epochs === null;
    const checked = this.#epochs?.check().finally(() => (isOver = true));
    checked?.catch(() => undefined);
    await this.#settle(() => isOver);
    await checked?.catch((error: unknown) => {
      throw new InvariantError(`${String(error)} (seed ${this.seed})`);
    });
  }

  #outcome(ended: Outcome["ended"]): Outcome {
    const counters = this.interceptor?.counters;
    return {
      captures: counters?.captureCount ?? 0,
      spilledBytes: counters?.spilledBytes ?? 0,
      waits: counters?.guestWaitCount ?? 0,
      steps: this.stepCount,
      leftEarly: this.leftEarly,
      ended,
      epochs: this.#epochs === null ? undefined : this.#checkpointCount,
    };
  }
}

function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
