// Crashes at any moment: what was synced is in the file, of the rest any sectors may be. After each, a check (of some
// also QEMU's) may find leaked clusters but no corruption, and every byte that a completed flush covered reads back.

import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { checkImage } from "../../src/image/qcow2/check/check.js";
import { openQcow2, type Qcow2Image } from "../../src/image/qcow2/image.js";
import { KiB, MiB } from "../../src/units.js";
import { IS_CAMPAIGN } from "../support/campaign.js";
import { MemoryFile, crashedContent, randomFrom } from "../support/qcow2-memory.js";

const SIZE = 256 * KiB;
const CRASHES_PER_EPISODE = Number(process.env["QCOW2_CRASHES"] ?? 36);
/** The rest is checked by cowcatcher's own check alone, which needs no process. */
const CRASHES_PER_QEMU_CHECK = 9;
const SEEDS = Number(process.env["QCOW2_SEEDS"] ?? (IS_CAMPAIGN ? 10 : 1));
const OPTIONS = { path: "", name: "memory", fd: -1, direct: false, probed: false, backing: null };
let folder: string;

interface Shape {
  name: string;
  options: string;
  snapshot?: boolean;
  compress?: boolean;
  /** Freezes as a backup makes come and go. */
  freezes?: boolean;
  /** The file is made this long at first, so that the refcount table is soon too small. */
  fileBytes?: number;
  /** The options name DATA_NAME as the data file. */
  dataFile?: boolean;
}

const DATA_NAME = "data.raw";

const SHAPES: Shape[] = [
  { name: "4K clusters", options: "cluster_size=4096" },
  {
    name: "refcount table grows",
    options: "cluster_size=512,refcount_bits=64",
    fileBytes: 2 * MiB - 8 * KiB,
    snapshot: true,
  },
  { name: "1-bit refcounts", options: "cluster_size=1024,refcount_bits=1" },
  { name: "internal snapshot", options: "cluster_size=512", snapshot: true },
  { name: "compressed", options: "cluster_size=4096", compress: true },
  {
    name: "zstd, snapshot",
    options: "cluster_size=512,compression_type=zstd",
    compress: true,
    snapshot: true,
  },
  {
    name: "refcount table grows, a backup comes and goes",
    options: "cluster_size=512,refcount_bits=64",
    fileBytes: 2 * MiB - 8 * KiB,
    freezes: true,
  },
  { name: "version 2", options: "cluster_size=512,compat=0.10" },
  { name: "subclusters", options: "cluster_size=16k,extended_l2=on" },
  { name: "subclusters, snapshot", options: "cluster_size=16k,extended_l2=on", snapshot: true },
  { name: "subclusters, a backup", options: "cluster_size=16k,extended_l2=on", freezes: true },
  { name: "data file", options: "cluster_size=4096,data_file=data.raw", dataFile: true },
  {
    name: "data file, subclusters",
    options: "cluster_size=16k,extended_l2=on,data_file=data.raw",
    dataFile: true,
  },
  {
    name: "raw data file",
    options: "cluster_size=4096,data_file=data.raw,data_file_raw=on",
    dataFile: true,
  },
  { name: "a backup comes and goes", options: "cluster_size=512", freezes: true },
];

beforeAll(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), "qcow2-crash-"));
});
afterAll(() => fs.rmSync(folder, { recursive: true, force: true }));

function makeImage({ options, snapshot, compress, fileBytes, dataFile }: Shape): {
  file: Buffer;
  content: Buffer;
  data: Buffer | null;
} {
  const image = path.join(folder, "new.qcow2");
  const raw = path.join(folder, "new.raw");
  const content = Buffer.alloc(SIZE);
  for (let at = 0; at < SIZE; at += 6000) content.fill(`${at} `, at, at + 3000);
  fs.writeFileSync(raw, content);
  const flags = compress ? ["-c"] : [];
  const convert = ["convert", ...flags, "-f", "raw", "-O", "qcow2", "-o", options, raw, image];
  // QEMU looks for a data file in the folder that it runs in.
  execFileSync("qemu-img", convert, { cwd: folder });
  if (snapshot) execFileSync("qemu-img", ["snapshot", "-c", "s", image]);
  if (fileBytes !== undefined) fs.truncateSync(image, fileBytes);
  const data = dataFile ? fs.readFileSync(path.join(folder, DATA_NAME)) : null;
  return { file: fs.readFileSync(image), content, data };
}

function checkByQemu(imagePath: string, what: string): void {
  const args = ["check", "-f", "qcow2", imagePath];
  const check = spawnSync("qemu-img", args, { cwd: folder, encoding: "utf8" });
  const isSound = check.status === 0 || check.status === 3; // 3: leaked clusters
  if (!isSound) expect.fail(`${what}: ${check.stdout}${check.stderr}`);
}

interface Touch {
  /** Length of the log when it began: a crash before that knows nothing of it. */
  events: number;
  start: number;
  length: number;
  /** What it makes of its bytes (a discard: zero, or nothing). */
  fill: number;
}

/** What a flush promises from the event on at which it was complete. */
interface Promised {
  events: number;
  content: Buffer;
  /** Bytes that were discarded, so that nobody knows what they hold. */
  isOpen: Uint8Array;
  /** Touches that began before the flush. */
  touchCount: number;
}

class Episode {
  private readonly random: (limit: number) => number;
  private readonly initial: Buffer;
  private readonly file: MemoryFile;
  private readonly initialData: Buffer | null;
  private readonly dataFile: MemoryFile | undefined;
  private readonly model: Buffer;
  private readonly isOpen = new Uint8Array(SIZE);
  private readonly touches: Touch[] = [];
  private readonly promises: Promised[] = [];

  constructor(
    private readonly shape: Shape,
    seed: number,
  ) {
    this.random = randomFrom(seed);
    const randomTurns = randomFrom(seed + 1000);
    const { file, content, data } = makeImage(shape);
    this.initial = file;
    this.model = Buffer.from(content);
    const latency = (): number => (randomTurns(4) === 0 ? randomTurns(3) : 0);
    this.file = new MemoryFile(file, "memory", latency);
    this.initialData = data;
    if (data !== null) this.dataFile = new MemoryFile(data, DATA_NAME, latency, this.file.log);
    this.promises.push(this.promise(0));
  }

  private promise(events: number): Promised {
    const { model, isOpen, touches } = this;
    return { events, content: Buffer.from(model), isOpen: isOpen.slice(), touchCount: touches.length };
  }

  async play(): Promise<void> {
    const image = await openQcow2({ ...OPTIONS, readOnly: false, file: this.file, dataFile: this.dataFile });
    const pending: Promise<void>[] = [];
    let frozen: { release(): void } | undefined;
    for (let step = 0; step < 60; step++) {
      if (this.random(6) === 0) {
        const promised = this.promise(Infinity);
        const flush = Promise.resolve(image.flush()).then(() => {
          promised.events = this.file.log.length;
          this.promises.push(promised);
        });
        if (this.random(2) === 0) await flush;
        else pending.push(flush);
      } else if (this.shape.freezes && this.random(8) === 0) {
        frozen?.release();
        frozen = this.random(2) === 0 ? image.freeze() : undefined;
      } else await this.act(image);
    }
    await Promise.all(pending);
    frozen?.release();
    await image.close();
  }

  private async act(image: Qcow2Image): Promise<void> {
    const { random } = this;
    const unit = [1, 512, 4096][random(3)] ?? 1;
    const start = Math.floor(random(SIZE) / unit) * unit;
    const units = 1 + random(random(8) === 0 ? 40 : 6);
    const length = Math.min(SIZE - start, units * (unit === 1 ? 700 : unit));
    const choice = random(10);
    const fill = choice < 6 ? 1 + random(255) : 0;
    this.touches.push({ events: this.file.log.length, start, length, fill });
    this.model.fill(fill, start, start + length);
    this.isOpen.fill(choice < 8 ? 0 : 1, start, start + length);
    if (choice < 6) await image.write(Buffer.alloc(length, fill), 0, length, start);
    else if (choice < 8) await image.writeZeroes(start, length, { mayUnmap: random(2) === 0 });
    else await image.discard(start, length);
  }

  /** The first one comes after all that was done. */
  async crash(number: number): Promise<void> {
    const { random, file } = this;
    const at = number === 0 ? file.log.length : this.crashPoint();
    // Nothing unsynced survives, or all of it (the process was killed), or any sectors (power was cut).
    const mode = random(4);
    const keeps = (): boolean => mode > 0 && (mode === 1 || random(2) === 0);
    const content = crashedContent(this.initial, file.log, at, keeps, file.name);
    const dataFile = this.crashedDataFile(at, keeps);
    const imagePath = path.join(folder, "crashed.qcow2");
    fs.writeFileSync(imagePath, content);
    const found = await checkImage(imagePath, { format: "qcow2" });
    if (found.corruptions + found.checkErrors > 0) {
      expect.fail(`crash at event ${at}, mode ${mode}: ${found.messages.join("\n")}`);
    }
    if (number % CRASHES_PER_QEMU_CHECK === 0) checkByQemu(imagePath, `crash at event ${at}, mode ${mode}`);
    const image = await openQcow2({ ...OPTIONS, readOnly: true, file: new MemoryFile(content), dataFile });
    const data = Buffer.alloc(SIZE);
    await image.read(data, 0, SIZE, 0);
    this.expectPromised(data, at);
  }

  private crashedDataFile(at: number, keeps: () => boolean): MemoryFile | undefined {
    if (this.initialData === null) return undefined;
    const content = crashedContent(this.initialData, this.file.log, at, keeps, DATA_NAME);
    fs.writeFileSync(path.join(folder, DATA_NAME), content);
    return new MemoryFile(content);
  }

  /** Each byte is as the last flush promised, or as an operation made it that came later. */
  private expectPromised(data: Buffer, at: number): void {
    const last = this.promises.findLast(({ events }) => events <= at);
    if (last === undefined) return;
    const isFine = last.isOpen.slice();
    for (const { events, start, length, fill } of this.touches.slice(last.touchCount)) {
      if (events > at) continue;
      for (let index = start; index < start + length; index++) {
        if (data[index] === fill) isFine[index] = 1;
      }
    }
    for (let index = 0; index < SIZE; index++) {
      if (isFine[index] || data[index] === last.content[index]) continue;
      expect.fail(`crash at event ${at}: byte ${index} is neither old nor new`);
    }
  }

  /** Half of the crashes come just before a sync, when most is at stake. */
  private crashPoint(): number {
    const { random, file } = this;
    const point = random(file.log.length + 1);
    if (random(2) === 0) return point;
    const sync = file.log.findIndex((event, index) => index >= point && event.kind === "sync-begins");
    return sync < 0 ? point : sync;
  }
}

describe("qcow2 image after a crash", () => {
  it.each(SHAPES)("$name", async (shape) => {
    for (let seed = 1; seed <= SEEDS; seed++) {
      const episode = new Episode(shape, seed);
      await episode.play();
      for (let crash = 0; crash < CRASHES_PER_EPISODE; crash++) await episode.crash(crash);
    }
  });
});
