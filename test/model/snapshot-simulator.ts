// One schedule of a snapshot's life, from its seed: a guest writes, zeroes and discards odd ranges of a disk in memory
// while readers pull the T0 view, with every asynchronous step of the disk ended when the seed says so. Reads, writes
// and status of the disk may take two steps, between which others come: a read may be torn, a status old.
//
// Checked from outside: whatever a reader is given is T0's; a reader fails only when the snapshot is over; the guest
// gets what it wrote, whatever becomes of the snapshot; at the end nothing is in flight.

import { closeSync, mkdtempSync, openSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { DiskNode } from "../../src/cow/disk-node.js";
import { BLOCK_BYTES, geometryOf } from "../../src/cow/geometry.js";
import { Interceptor } from "../../src/cow/interceptor.js";
import { createSharedState } from "../../src/cow/shared.js";
import { SnapshotDevice } from "../../src/cow/snapshot-device.js";
import { spillBitmapBytes, SpillFile } from "../../src/cow/spill.js";
import { CowcatcherError } from "../../src/errors.js";
import type { BlockStatus, Completion, Image } from "../../src/block/device.js";
import { Random } from "../support/random.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const SIZE_BYTES = 2 * MiB + 5 * KiB + 512;
/** Around a chunk's edge and at the disk's odd end: small enough for overlaps, together larger than the buffer. */
const HOT: readonly (readonly [from: number, to: number])[] = [
  [MiB - 80 * KiB, MiB + 80 * KiB],
  [SIZE_BYTES - 40 * KiB, SIZE_BYTES],
];
const STEPS = 110;
const CANARY = 0xa5;

/** Asynchronous steps that wait for their turn. */
class Turns {
  readonly waiting: (() => void)[] = [];

  constructor(readonly random: Random) {}

  /** Fulfilled when the schedule says so. */
  later(): Promise<void> {
    return new Promise((resolve) => this.waiting.push(resolve));
  }

  next(): void {
    const [turn] = this.waiting.splice(this.random.below(this.waiting.length), 1);
    turn?.();
  }
}

class MemoryDisk {
  readonly name = "disk";
  readonly sizeBytes = SIZE_BYTES;
  readonly readOnly = false;
  readonly clusterSizeBytes = 0;
  readonly content = new Uint8Array(SIZE_BYTES);
  readonly holes = new Uint8Array(Math.ceil(SIZE_BYTES / BLOCK_BYTES)).fill(1);
  slowShare = 0;
  failingReads = 0;

  constructor(
    readonly turns: Turns,
    readonly random: Random,
  ) {}

  #isSlow(): boolean {
    return this.random.chance(this.slowShare);
  }

  read(buffer: Uint8Array, bufferOffset: number, length: number, offset: number): Completion {
    const copy = (from: number, to: number) =>
      buffer.set(this.content.subarray(offset + from, offset + to), bufferOffset + from);
    if (!this.#isSlow()) {
      copy(0, length);
      return undefined;
    }
    const cut = this.random.below(length + 1);
    const fails = this.failingReads > 0 && this.failingReads-- === 1;
    return (async () => {
      await this.turns.later();
      copy(0, cut);
      await this.turns.later();
      if (fails) throw new CowcatcherError({ code: "IO", object: "disk", problem: "fails", errno: "EIO" });
      copy(cut, length);
    })();
  }

  write(buffer: Uint8Array, bufferOffset: number, length: number, offset: number): Completion {
    this.#markData(offset, length);
    return this.#change(buffer.subarray(bufferOffset, bufferOffset + length), offset);
  }

  writeZeroes(offset: number, length: number): Completion {
    const done = this.#change(new Uint8Array(length), offset);
    this.#markHoles(offset, length);
    return done;
  }

  /** Whole blocks become holes, or nothing happens: both are right. */
  discard(offset: number, length: number): Completion {
    const from = Math.ceil(offset / BLOCK_BYTES) * BLOCK_BYTES;
    const to = Math.floor((offset + length) / BLOCK_BYTES) * BLOCK_BYTES;
    if (from >= to || this.random.chance(0.3)) return undefined;
    const done = this.#change(new Uint8Array(to - from), from);
    this.#markHoles(from, to - from);
    return done;
  }

  #change(data: Uint8Array, offset: number): Completion {
    const put = (from: number, to: number) => this.content.set(data.subarray(from, to), offset + from);
    if (!this.#isSlow()) {
      put(0, data.length);
      return undefined;
    }
    const cut = this.random.below(data.length + 1);
    return (async () => {
      put(0, cut);
      await this.turns.later();
      put(cut, data.length);
    })();
  }

  #markData(offset: number, length: number): void {
    this.holes.fill(0, Math.floor(offset / BLOCK_BYTES), Math.ceil((offset + length) / BLOCK_BYTES));
  }

  #markHoles(offset: number, length: number): void {
    const from = Math.ceil(offset / BLOCK_BYTES);
    const to = Math.floor((offset + length) / BLOCK_BYTES);
    if (from < to) this.holes.fill(1, from, to);
  }

  blockStatus(offset: number, length: number): BlockStatus | Promise<BlockStatus> {
    const answer = (): BlockStatus => {
      const first = Math.floor(offset / BLOCK_BYTES);
      const zero = this.holes[first] === 1;
      let block = first + 1;
      while (block * BLOCK_BYTES < offset + length && (this.holes[block] === 1) === zero) block++;
      const lengthBytes = Math.min(block * BLOCK_BYTES, offset + length) - offset;
      return { lengthBytes, zero, data: !zero, depth: 0, present: true, compressed: false };
    };
    if (!this.#isSlow()) return answer();
    return (async () => {
      if (this.random.chance(0.5)) await this.turns.later();
      const old = answer();
      await this.turns.later();
      return old;
    })();
  }
}

export interface Outcome {
  ended: "kept" | "cancelled" | "broken";
  captures: number;
  spilledBytes: number;
  readsRight: number;
  readsRefused: number;
  zeroStatus: number;
  slowReads: number;
}

export class SnapshotSimulation {
  readonly #random: Random;
  readonly #turns: Turns;
  readonly #disk: MemoryDisk;
  readonly #node: DiskNode;
  readonly #t0: Uint8Array;
  /** What the guest must read. */
  readonly #guest: Uint8Array;
  readonly #guestBusy = new Set<readonly [number, number]>();
  readonly #unsettled = new Set<Promise<void>>();
  readonly #problems: string[] = [];
  readonly #outcome: Outcome = {
    ended: "kept",
    captures: 0,
    spilledBytes: 0,
    readsRight: 0,
    readsRefused: 0,
    zeroStatus: 0,
    slowReads: 0,
  };
  readonly #guestKinds: readonly string[];
  #mayReadsFail = false;
  #readersWaiting = 0;

  constructor(readonly seed: number) {
    this.#random = new Random(seed);
    this.#turns = new Turns(this.#random);
    // A guest that only makes holes shows best whether status is T0's.
    this.#guestKinds = this.#random.pick([
      ["write", "write", "zero", "discard"],
      ["zero", "discard"],
    ]);
    this.#disk = new MemoryDisk(this.#turns, this.#random);
    for (const [from, to] of HOT) this.#prepareHot(from, to);
    this.#node = new DiskNode("disk", this.#disk as unknown as Image);
    this.#t0 = this.#disk.content.slice();
    this.#guest = this.#disk.content.slice();
  }

  #prepareHot(from: number, to: number): void {
    const holeShare = this.#random.pick([0.3, 0.85]);
    for (let at = from; at < to; at += BLOCK_BYTES) {
      if (this.#random.chance(holeShare)) continue;
      const end = Math.min(at + BLOCK_BYTES, to);
      void this.#disk.write(new Uint8Array(end - at).fill(1 + this.#random.below(100)), 0, end - at, at);
    }
  }

  async run(): Promise<Outcome> {
    const random = this.#random;
    const folder = mkdtempSync(join(tmpdir(), "cowcatcher-snapshot-model-"));
    const path = join(folder, "spill");
    closeSync(openSync(path, "w"));
    const fault = random.pick(["none", "none", "none", "limit", "read-only spill", "bad read", "no spill"]);
    const fd = openSync(path, fault === "read-only spill" ? "r" : "r+");
    try {
      await this.#play(path, fd, fault);
    } finally {
      closeSync(fd);
      rmSync(folder, { recursive: true });
    }
    if (this.#problems.length > 0) throw new Error(`seed ${this.seed}: ${this.#problems.join("; ")}`);
    return this.#outcome;
  }

  async #play(path: string, fd: number, fault: string): Promise<void> {
    const random = this.#random;
    const geometry = geometryOf(SIZE_BYTES);
    const bufferBytes = random.pick([64, 128, 1024]) * KiB;
    const shared = createSharedState(geometry, new SharedArrayBuffer(bufferBytes), bufferBytes);
    const spill = new SpillFile(
      { path, fd, bitmaps: new SharedArrayBuffer(spillBitmapBytes(geometry)) },
      geometry,
    );
    const spills = fault !== "no spill";
    const interceptor = new Interceptor({
      shared,
      image: this.#disk,
      openSpill: spills ? () => spill : undefined,
      spillLimitBytes: fault === "limit" ? 64 * KiB : SIZE_BYTES + BLOCK_BYTES,
      policy: {
        onBufferFull: spills ? "spill" : "cancel",
        onCbwError: "break-snapshot",
        guestTimeoutMs: 1e9,
      },
      onBroken: () => {
        this.#outcome.ended = "broken";
        this.#node.removeInterceptor(interceptor);
      },
      recheckMs: Infinity,
      heldChunksMax: random.pick([1, 64]),
    });
    const device = new SnapshotDevice({
      name: "disk-snapshot",
      image: this.#disk as unknown as Image,
      shared,
      spill: spills ? spill : undefined,
      source: interceptor,
    });
    await DiskNode.quiesceAll([this.#node], () => this.#node.addInterceptor(interceptor), 1e4);
    this.#disk.slowShare = random.pick([0, 0.3, 0.7]);
    if (fault === "bad read") {
      this.#disk.failingReads = 1 + random.below(12);
      this.#mayReadsFail = true;
    }
    const cancelAt = random.chance(0.2) ? random.below(STEPS) : STEPS;
    for (let step = 0; step < cancelAt; step++) await this.#step(device, interceptor);
    interceptor.detach();
    this.#node.removeInterceptor(interceptor);
    if (cancelAt < STEPS && this.#outcome.ended === "kept") this.#outcome.ended = "cancelled";
    for (let step = 0; step < 10; step++) await this.#step(device, interceptor);
    await this.#finish(device, interceptor);
  }

  async #step(device: SnapshotDevice, interceptor: Interceptor): Promise<void> {
    const choice = this.#random.below(100);
    if (choice < 30) this.#guestOperation();
    else if (choice < 50) this.#read(device, interceptor);
    else if (choice < 65) this.#status(device, interceptor);
    else this.#turns.next();
    await new Promise((resolve) => setImmediate(resolve));
  }

  /** Everything in flight comes to its end; then the device gives its resources back. */
  async #finish(device: SnapshotDevice, interceptor: Interceptor): Promise<void> {
    const closed = device.close().then(async () => {
      // Its readers hear of their ends within the same turn.
      await new Promise((resolve) => setImmediate(resolve));
      // From now on buffer and spill are another job's.
      if (this.#readersWaiting > 0)
        this.#problems.push(`${this.#readersWaiting} requests outlive the device`);
    });
    for (let turn = 0; this.#unsettled.size > 0; turn++) {
      if (turn > 10_000) throw new Error(`seed ${this.seed}: something never ends`);
      this.#turns.next();
      await new Promise((resolve) => setImmediate(resolve));
    }
    await closed;
    await interceptor.idle();
    this.#read(device, interceptor);
    await Promise.all(this.#unsettled);
    this.#outcome.captures = interceptor.counters.captureCount;
    this.#outcome.spilledBytes = interceptor.counters.spilledBytes;
    if (Buffer.compare(this.#disk.content, this.#guest) !== 0) this.#problems.push("the guest lost a write");
  }

  #range(): [offset: number, length: number] {
    const random = this.#random;
    const [from, to] = random.pick(HOT);
    const offset = from + random.below(to - from);
    const length = 1 + random.below(random.pick([600, 5_000, 40_000, 200_000]));
    const aligned = random.chance(0.3) ? offset - (offset % BLOCK_BYTES) : offset;
    return [aligned, Math.min(length, SIZE_BYTES - aligned)];
  }

  #guestOperation(): void {
    const range = this.#range();
    const [offset, length] = range;
    // The order of overlapping writes in flight is nobody's promise.
    for (const [from, bytes] of this.#guestBusy) if (from < offset + length && offset < from + bytes) return;
    this.#guestBusy.add(range);
    const kind = this.#random.pick(this.#guestKinds);
    const data = new Uint8Array(length).fill(kind === "write" ? 101 + this.#random.below(150) : 0);
    const completion =
      kind === "write"
        ? this.#node.write(data, 0, length, offset)
        : kind === "zero"
          ? this.#node.writeZeroes(offset, length, { mayUnmap: true })
          : this.#node.discard(offset, length);
    this.#follow(completion, (failed) => {
      this.#guestBusy.delete(range);
      if (failed !== undefined) this.#problems.push(`a guest's ${kind} failed: ${failed.message}`);
      if (kind !== "discard") this.#guest.set(data, offset);
      // What a discarded range reads as is the disk's choice.
      else this.#guest.set(this.#disk.content.subarray(offset, offset + length), offset);
    });
  }

  #read(device: SnapshotDevice, interceptor: Interceptor): void {
    const isLarge = this.#random.chance(0.05);
    const [offset, length] = isLarge ? [100, SIZE_BYTES - 200] : this.#range();
    const margin = 3;
    const buffer = new Uint8Array(length + 2 * margin).fill(CANARY);
    const completion = device.read(buffer, margin, length, offset);
    if (completion) this.#outcome.slowReads++;
    this.#readersWaiting++;
    this.#follow(completion, (failed) => {
      this.#readersWaiting--;
      if (failed !== undefined) return this.#noteRefusal(failed, interceptor);
      this.#outcome.readsRight++;
      const edges = [...buffer.subarray(0, margin), ...buffer.subarray(length + margin)];
      if (edges.some((byte) => byte !== CANARY)) this.#problems.push(`a read at ${offset} wrote outside`);
      const found = buffer.subarray(margin, length + margin);
      const wanted = this.#t0.subarray(offset, offset + length);
      if (Buffer.compare(found, wanted) === 0) return;
      const at = found.findIndex((byte, index) => byte !== wanted[index]);
      this.#problems.push(`not T0 at ${offset + at} of the read ${offset}+${length}`);
    });
  }

  #noteRefusal(failed: CowcatcherError, interceptor: Interceptor): void {
    this.#outcome.readsRefused++;
    if (failed.errno !== "EIO") this.#problems.push(`an answer other than EIO: ${failed.message}`);
    if (!interceptor.detached && !this.#mayReadsFail) this.#problems.push(`failed: ${failed.message}`);
  }

  #status(device: SnapshotDevice, interceptor: Interceptor): void {
    const [offset, shortest] = this.#range();
    const length = Math.min(SIZE_BYTES - offset, this.#random.chance(0.5) ? shortest : 160 * KiB);
    const check = (status: BlockStatus) => {
      if (!(status.lengthBytes >= 1 && status.lengthBytes <= length)) {
        this.#problems.push(`status of ${offset}+${length} has length ${status.lengthBytes}`);
      }
      if (!status.zero) return;
      this.#outcome.zeroStatus++;
      const isZero = this.#t0.subarray(offset, offset + status.lengthBytes).every((byte) => byte === 0);
      if (!isZero) this.#problems.push(`${offset}+${status.lengthBytes} is not zero at T0`);
    };
    try {
      const status = device.blockStatus(offset, length);
      if (!(status instanceof Promise)) check(status);
      else this.#follow(status.then(check), (failed) => failed && this.#noteRefusal(failed, interceptor));
    } catch (error) {
      this.#noteRefusal(error as CowcatcherError, interceptor);
    }
  }

  #follow(completion: Completion, then: (failed: CowcatcherError | undefined) => void): void {
    if (!completion) return then(undefined);
    const settled = completion.then(
      () => then(undefined),
      (error: unknown) => then(error as CowcatcherError),
    );
    this.#unsettled.add(settled);
    void settled.finally(() => this.#unsettled.delete(settled));
  }
}
