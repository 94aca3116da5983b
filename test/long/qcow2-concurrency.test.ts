// Operations that overlap in time, on a file whose every access may take some turns of the event loop: the ranges of
// a batch are disjoint but share clusters, tables and flushes, so whatever order they end in, one content is right.

import fc from "fast-check";
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openQcow2, type Qcow2Image } from "../../src/image/qcow2/image.js";
import { KiB } from "../../src/units.js";
import { MemoryFile, MemoryImage, randomFrom } from "../support/qcow2-memory.js";

const SIZE = 192 * KiB;
let folder: string;
let templates: Map<string, Buffer>;

const SHAPES = [
  { name: "4K clusters", args: ["-o", "cluster_size=4096"], source: "create" },
  {
    name: "512-byte clusters, 64-bit refcounts",
    args: ["-o", "cluster_size=512,refcount_bits=64"],
    source: "create",
  },
  { name: "compressed, 16K clusters", args: ["-c", "-o", "cluster_size=16K"], source: "convert" },
  { name: "snapshot, 4K clusters", args: ["-o", "cluster_size=4K"], source: "snapshot" },
  { name: "over a backing file", args: ["-o", "cluster_size=4K"], source: "backing" },
  { name: "subclusters", args: ["-o", "cluster_size=16K,extended_l2=on"], source: "create" },
  {
    name: "subclusters over a backing file",
    args: ["-o", "cluster_size=16K,extended_l2=on"],
    source: "backing",
  },
  { name: "subclusters, snapshot", args: ["-o", "cluster_size=16K,extended_l2=on"], source: "snapshot" },
  {
    name: "subclusters, compressed",
    args: ["-c", "-o", "cluster_size=16K,extended_l2=on"],
    source: "convert",
  },
  {
    name: "data file over a backing file",
    args: ["-o", "cluster_size=4K,data_file=data.raw"],
    source: "backing",
  },
  {
    name: "subclusters in a data file over a backing file",
    args: ["-o", "cluster_size=16K,extended_l2=on,data_file=data.raw"],
    source: "backing",
  },
  {
    name: "raw data file",
    args: ["-o", "cluster_size=4K,data_file=data.raw,data_file_raw=on"],
    source: "create",
  },
] as const;

/** Where QEMU runs, and so looks for it. */
const DATA_NAME = "data.raw";

function hasDataFile({ args }: (typeof SHAPES)[number]): boolean {
  return args.some((arg) => arg.includes(DATA_NAME));
}

beforeAll(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), "qcow2-concurrency-"));
  templates = new Map();
  const raw = path.join(folder, "raw");
  const image = path.join(folder, "image");
  fs.writeFileSync(raw, initialContent());
  const run = (...args: string[]): void =>
    void execFileSync("qemu-img", args, { cwd: folder, stdio: "pipe" });
  for (const { name, args, source } of SHAPES) {
    if (source === "create") run("create", "-q", "-f", "qcow2", ...args, image, `${SIZE}`);
    else if (source === "backing") {
      run("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", ...args, image, `${SIZE}`);
    } else run("convert", "-f", "raw", "-O", "qcow2", ...args, raw, image);
    if (source === "snapshot") run("snapshot", "-c", "s", image);
    templates.set(name, fs.readFileSync(image));
    fs.rmSync(image);
  }
});
afterAll(() => fs.rmSync(folder, { recursive: true, force: true }));

function initialContent(): Buffer {
  const bytes = Buffer.alloc(SIZE);
  for (let at = 0; at < SIZE; at += 1024) bytes.fill(`${at},`, at, at + 700);
  return bytes;
}

/** Cuts the disk into disjoint ranges of all alignments. */
function cut(random: (limit: number) => number): number[] {
  const points = new Set([0, SIZE]);
  const count = 4 + random(24);
  for (let index = 0; index < count; index++) {
    const unit = [1, 512, 4096][random(3)] ?? 1;
    points.add(Math.floor(random(SIZE) / unit) * unit);
  }
  return [...points].sort((a, b) => a - b);
}

async function operate(
  image: Qcow2Image,
  model: Buffer,
  start: number,
  length: number,
  random: (limit: number) => number,
): Promise<void> {
  const choice = random(10);
  if (choice < 5) {
    const data = Buffer.alloc(length, 1 + random(255));
    data.copy(model, start);
    await image.write(data, 0, length, start);
  } else if (choice < 7) {
    model.fill(0, start, start + length);
    await image.writeZeroes(start, length, { mayUnmap: random(2) === 0 });
  } else if (choice < 8) {
    await image.discard(start, length);
    await image.read(model, start, length, start);
  } else {
    const data = Buffer.alloc(length);
    const expected = Buffer.from(model.subarray(start, start + length));
    await image.read(data, 0, length, start);
    expect(data.equals(expected)).toBe(true);
  }
}

async function episode(shape: (typeof SHAPES)[number], seed: number): Promise<void> {
  const random = randomFrom(seed);
  const latency = (): number => (random(2) === 0 ? 0 : random(6));
  const template = templates.get(shape.name) ?? Buffer.alloc(0);
  const file = new MemoryFile(template, "memory.qcow2", latency);
  // As qemu-img makes it: of the disk's length if it is raw, as all of it is mapped then; else empty.
  const dataBytes = shape.name === "raw data file" ? SIZE : 0;
  const dataFile = hasDataFile(shape)
    ? new MemoryFile(Buffer.alloc(dataBytes), DATA_NAME, latency)
    : undefined;
  const backing = shape.source === "backing" ? new MemoryImage(initialContent(), latency) : null;
  const options = { path: "", name: "memory", fd: -1, readOnly: false, direct: false, probed: false };
  const image = await openQcow2({ ...options, backing, file, dataFile });
  const model = shape.source === "create" ? Buffer.alloc(SIZE) : initialContent();
  for (let batch = 0; batch < 8; batch++) {
    const points = cut(random);
    const work: Promise<void>[] = [];
    for (let index = 0; index + 1 < points.length; index++) {
      const start = points[index] ?? 0;
      if (random(3) > 0) work.push(operate(image, model, start, (points[index + 1] ?? 0) - start, random));
      if (random(6) === 0) work.push(Promise.resolve(image.flush()));
    }
    await Promise.all(work);
  }
  const whole = Buffer.alloc(SIZE);
  await image.read(whole, 0, SIZE, 0);
  expect(whole.equals(model)).toBe(true);
  await image.close();
  const imagePath = path.join(folder, "after.qcow2");
  fs.writeFileSync(imagePath, file.content());
  if (dataFile !== undefined) fs.writeFileSync(path.join(folder, DATA_NAME), dataFile.content());
  const inFolder = { cwd: folder, stdio: "pipe" } as const;
  execFileSync("qemu-img", ["check", "-f", "qcow2", imagePath], inFolder);
  const modelPath = path.join(folder, "model");
  fs.writeFileSync(modelPath, model);
  execFileSync("qemu-img", ["compare", "-f", "qcow2", "-F", "raw", imagePath, modelPath], inFolder);
}

describe("qcow2 image with overlapping operations", () => {
  it.each(SHAPES)("$name", async (shape) => {
    await fc.assert(
      fc.asyncProperty(fc.nat(), (seed) => episode(shape, seed)),
      { numRuns: Number(process.env["QCOW2_RUNS"] ?? 15), endOnFailure: true },
    );
  });
});
