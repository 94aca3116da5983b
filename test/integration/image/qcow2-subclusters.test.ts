// Extended L2 entries and external data files, as QEMU makes and judges them: images that qemu-io wrote at random read
// byte for byte and map entry for entry as QEMU says; the frozen view of one that is written on stays what it was; and
// what cannot be read, or must not be opened, is refused by name.

import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { type MapEntry, mergedEntries } from "../../../src/cli/actions/map.js";
import type { Image } from "../../../src/block/device.js";
import { openImage } from "../../../src/image/open.js";
import { createQcow2 } from "../../../src/image/qcow2/create/create.js";
import { openSource } from "../../../src/image/reader.js";
import { KiB, MiB } from "../../../src/units.js";
import { randomFrom } from "../../support/qcow2-memory.js";
import { mixedContent } from "../../support/qcow2-shapes.js";

const SIZE = 512 * KiB;
const NAME = "image.qcow2";
let folder: string;

beforeAll(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), "qcow2-subclusters-"));
});
beforeEach(() => {
  for (const file of fs.readdirSync(folder)) fs.rmSync(path.join(folder, file));
});
afterAll(() => fs.rmSync(folder, { recursive: true, force: true }));

function at(name: string): string {
  return path.join(folder, name);
}

/** In the folder: QEMU looks for a data file where it runs. */
function qemu(program: "qemu-img" | "qemu-io", ...args: string[]): string {
  return execFileSync(program, args, { cwd: folder, encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
}

interface Made {
  name: string;
  options: string;
  /** Bytes of a raw backing file. */
  backingBytes?: number;
  compressed?: boolean;
}

const MADE: Made[] = [
  { name: "subclusters of 512 bytes", options: "cluster_size=16k,extended_l2=on" },
  { name: "subclusters of 2 KiB", options: "cluster_size=64k,extended_l2=on" },
  { name: "subclusters on raw", options: "cluster_size=16k,extended_l2=on", backingBytes: SIZE },
  {
    name: "subclusters on a shorter raw",
    options: "cluster_size=64k,extended_l2=on",
    backingBytes: 200 * KiB + 512,
  },
  { name: "subclusters, compressed", options: "cluster_size=16k,extended_l2=on", compressed: true },
  { name: "data file", options: "cluster_size=16k,data_file=data.raw" },
  { name: "data file on raw", options: "cluster_size=16k,data_file=data.raw", backingBytes: SIZE },
  { name: "raw data file", options: "cluster_size=16k,data_file=data.raw,data_file_raw=on" },
  {
    name: "subclusters, data file on raw",
    options: "cluster_size=16k,extended_l2=on,data_file=data.raw",
    backingBytes: SIZE,
  },
  {
    name: "subclusters, raw data file",
    options: "cluster_size=16k,extended_l2=on,data_file=data.raw,data_file_raw=on",
  },
];

function make({ options, backingBytes, compressed }: Made): void {
  if (compressed) {
    fs.writeFileSync(at("content.raw"), mixedContent(SIZE, 5));
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "content.raw", NAME);
    return;
  }
  const below = backingBytes === undefined ? [] : ["-b", "base.raw", "-F", "raw"];
  if (backingBytes !== undefined) fs.writeFileSync(at("base.raw"), mixedContent(backingBytes, 6));
  qemu("qemu-img", "create", "-q", "-f", "qcow2", ...below, "-o", options, NAME, `${SIZE}`);
}

/** Ranges that begin or end at, just before or just after the edges of subclusters and clusters. */
function edgeRange(random: (limit: number) => number): [start: number, length: number] {
  const unit = [512, 2 * KiB, 16 * KiB, 64 * KiB][random(4)] ?? 512;
  const edge = (): number => random(SIZE / unit) * unit + [0, 0, 0, -1, 1, 300][random(6)];
  const start = Math.max(0, Math.min(SIZE - 1, edge()));
  const length = random(3) === 0 ? edge() : unit + [0, 0, -1, 1, 511][random(5)];
  return [start, Math.max(1, Math.min(SIZE - start, length))];
}

function qemuWrites(seed: number, count: number): void {
  const random = randomFrom(seed);
  const commands = ["-d", "unmap", "-f", "qcow2"];
  for (let index = 0; index < count; index++) {
    const [start, length] = edgeRange(random);
    const verb = ["write", "write", "write", "write -z", "write -z -u", "discard"][random(6)] ?? "write";
    const pattern = verb === "write" ? ` -P ${1 + random(255)}` : "";
    commands.push("-c", `${verb}${pattern} ${start} ${length}`);
  }
  qemu("qemu-io", ...commands, NAME);
}

function open(readOnly: boolean): Promise<Image> {
  return openImage(at(NAME), { format: "qcow2", readOnly });
}

async function contentOf(image: Image): Promise<Buffer> {
  const bytes = Buffer.alloc(image.sizeBytes, 0xee);
  await image.read(bytes, 0, bytes.length, 0);
  return bytes;
}

function qemuContent(): Buffer {
  qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", NAME, "converted.raw");
  return fs.readFileSync(at("converted.raw"));
}

async function mapOf(image: Image): Promise<MapEntry[]> {
  const entries: MapEntry[] = [];
  for await (const entry of mergedEntries(image, 0, image.sizeBytes)) entries.push(entry);
  return entries;
}

function firstDifference(a: Buffer, b: Buffer): number {
  if (a.equals(b)) return -1;
  return a.findIndex((byte, index) => byte !== b[index]);
}

describe.each(MADE)("written by qemu-io: $name", (made) => {
  it("reads, maps and shows workers what QEMU says", async () => {
    make(made);
    for (const seed of [1, 2, 3]) {
      qemuWrites(seed, 15 * seed);
      const expected = qemuContent();
      const image = await open(true);
      expect(firstDifference(await contentOf(image), expected)).toBe(-1);
      const map = JSON.parse(qemu("qemu-img", "map", "--output=json", "-f", "qcow2", NAME)) as MapEntry[];
      expect(await mapOf(image)).toEqual(map);
      const frozen = image.freeze();
      expect(readFrozen(frozen.description, 0, SIZE).equals(expected)).toBe(true);
      frozen.release();
      await image.close();
    }
  });
});

function readFrozen(
  description: Parameters<typeof openSource>[0],
  offsetBytes: number,
  lengthBytes: number,
): Buffer {
  const reader = openSource(description);
  const bytes = Buffer.alloc(lengthBytes, 0xee);
  // Holes are skipped, as a backup does it: what the reader calls zero must be.
  for (let done = 0; done < lengthBytes;) {
    const extent = reader.extent(offsetBytes + done, lengthBytes - done);
    if (extent.zero) bytes.fill(0, done, done + extent.lengthBytes);
    else void reader.read(bytes, done, extent.lengthBytes, offsetBytes + done);
    done += extent.lengthBytes;
  }
  reader.close();
  return bytes;
}

describe.each(MADE)("a freeze: $name", (made) => {
  it("keeps what the guest has not touched since as it was, and QEMU finds the image sound", async () => {
    make(made);
    qemuWrites(4, 20);
    const image = await open(false);
    const model = await contentOf(image);
    const random = randomFrom(99);
    await writeAtRandom(image, model, random, 25);
    if (random(2) === 0) await image.flush();
    await writeAtRandom(image, model, random, 5);
    const t0 = Buffer.from(model);
    const frozen = image.freeze();
    const touched = await writeAtRandom(image, model, random, 30);
    await image.flush();
    await writeAtRandom(image, model, random, 10, touched);
    const seen = readFrozen(frozen.description, 0, SIZE);
    for (let index = 0; index < SIZE; index++) {
      if (touched[index] === 0 && seen[index] !== t0[index]) expect.fail(`byte ${index} is not T0's`);
    }
    frozen.release();
    expect(firstDifference(await contentOf(image), model)).toBe(-1);
    await image.close();
    qemu("qemu-img", "check", "-f", "qcow2", NAME);
    expect(firstDifference(qemuContent(), model)).toBe(-1);
    if (made.options.includes("data_file_raw")) {
      expect(firstDifference(fs.readFileSync(at("data.raw")), model)).toBe(-1);
    }
  });
});

/** Returns which bytes changed. What discard leaves is read back into the model. */
async function writeAtRandom(
  image: Image,
  model: Buffer,
  random: (limit: number) => number,
  count: number,
  touched: Uint8Array = new Uint8Array(SIZE),
): Promise<Uint8Array<ArrayBufferLike>> {
  for (let index = 0; index < count; index++) {
    const [start, length] = edgeRange(random);
    const choice = random(6);
    touched.fill(1, start, start + length);
    if (choice < 3) {
      const data = Buffer.alloc(length, 1 + random(255));
      await image.write(data, 0, length, start);
      data.copy(model, start);
    } else if (choice < 5) {
      await image.writeZeroes(start, length, { mayUnmap: choice === 4 });
      model.fill(0, start, start + length);
    } else {
      await image.discard(start, length);
      await image.read(model, start, length, start);
    }
  }
  return touched;
}

describe("subclusters are allocated one by one", () => {
  it("takes a write of one subcluster without its cluster, and zeroes by bits alone", async () => {
    make({ name: "", options: "cluster_size=64k,extended_l2=on", backingBytes: SIZE });
    const image = await open(false);
    await image.write(Buffer.alloc(100, 7), 0, 100, 64 * KiB + 5 * KiB);
    await image.writeZeroes(64 * KiB + 8 * KiB, 4 * KiB, { mayUnmap: false });
    await image.close();
    const map = JSON.parse(qemu("qemu-img", "map", "--output=json", "-f", "qcow2", NAME)) as MapEntry[];
    const own = map
      .filter(({ depth }) => depth === 0)
      .map(({ start, length, zero }) => [start, length, zero]);
    expect(own).toEqual([
      [64 * KiB + 4 * KiB, 2 * KiB, false],
      [64 * KiB + 8 * KiB, 4 * KiB, true],
    ]);
  });
});

describe("refusals", () => {
  async function expectRefusal(readOnly: boolean, code: string, text: string): Promise<void> {
    await expect(open(readOnly)).rejects.toMatchObject({
      code,
      message: expect.stringContaining(text) as string,
    });
  }

  /** Changes bytes of the image. */
  function patch(offset: number, ...bytes: number[]): void {
    const fd = fs.openSync(at(NAME), "r+");
    fs.writeSync(fd, Uint8Array.from(bytes), 0, bytes.length, offset);
    fs.closeSync(fd);
  }

  function firstL2Offset(): number {
    const bytes = fs.readFileSync(at(NAME));
    return Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0x00fffffffffffe00n);
  }

  it("says which data file is missing, and of which image", async () => {
    make({ name: "", options: "data_file=data.raw" });
    fs.rmSync(at("data.raw"));
    await expectRefusal(true, "NOT_FOUND", at(NAME));
    await expectRefusal(true, "NOT_FOUND", at("data.raw"));
  });

  it("does not take the image itself, or a link to it, for its data file", async () => {
    make({ name: "", options: "data_file=data.raw" });
    fs.rmSync(at("data.raw"));
    fs.linkSync(at(NAME), at("data.raw"));
    await expectRefusal(true, "FORMAT", "is the image itself");
    await expectRefusal(false, "FORMAT", "is the image itself");
  });

  it("does not write a data file that another program writes", async () => {
    make({ name: "", options: "data_file=data.raw" });
    const other = await openImage(at("data.raw"), { format: "raw", readOnly: false });
    await expectRefusal(false, "LOCKED", "data.raw");
    await other.close();
    await (await open(false)).close();
  });

  it("wants the data file's name", async () => {
    make({ name: "", options: "data_file=data.raw" });
    const bytes = fs.readFileSync(at(NAME));
    const extension = bytes.indexOf(Buffer.from([0x44, 0x41, 0x54, 0x41]));
    patch(extension, 0x44, 0x41, 0x54, 0x42);
    await expectRefusal(true, "FORMAT", "does not name it");
  });

  it("reads no cluster from elsewhere in the data file, and none that is compressed", async () => {
    make({ name: "", options: "cluster_size=64k,data_file=data.raw" });
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 128k", NAME);
    const l2 = firstL2Offset();
    const image = await open(true);
    await image.close();
    patch(l2 + 8 + 5, 3);
    await expectReadFails("places the guest's offset 65536 elsewhere");
    patch(l2 + 8, 0xc0);
    await expectReadFails("is compressed");
  });

  it.each([
    ["both allocated and zero", [0, 0, 0, 1, 0, 0, 0, 1], true],
    ["allocated subclusters, but no host cluster", [0, 0, 0, 0, 0, 0, 0, 1], false],
  ])("refuses a bitmap that has %s", async (text, bitmap, hasHost) => {
    make({ name: "", options: "cluster_size=64k,extended_l2=on" });
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", NAME);
    const l2 = firstL2Offset();
    if (!hasHost) patch(l2, 0, 0, 0, 0, 0, 0, 0, 0);
    patch(l2 + 8, ...bitmap);
    await expectReadFails(text);
    expect(() => qemuContent()).toThrow();
  });

  async function expectReadFails(text: string): Promise<void> {
    const image = await open(true);
    await expect(contentOf(image)).rejects.toMatchObject({
      code: "FORMAT",
      message: expect.stringContaining(text) as string,
    });
    const frozen = image.freeze();
    const reader = openSource(frozen.description);
    await expect(Promise.resolve(reader.read(Buffer.alloc(SIZE), 0, SIZE, 0))).rejects.toMatchObject({
      code: "FORMAT",
    });
    reader.close();
    frozen.release();
    await image.close();
  }
});

describe("a data file that held something before", () => {
  it.each(["cluster_size=16k,data_file=data.raw", "cluster_size=16k,extended_l2=on,data_file=data.raw"])(
    "shows none of it (%s)",
    async (options) => {
      make({ name: "", options });
      fs.writeFileSync(at("data.raw"), Buffer.alloc(SIZE, 0xaa));
      const image = await open(false);
      const model = Buffer.alloc(SIZE);
      for (let start = 700; start < SIZE; start += 37 * KiB) {
        await image.write(Buffer.alloc(100, 5), 0, 100, start);
        model.fill(5, start, start + 100);
      }
      expect(firstDifference(await contentOf(image), model)).toBe(-1);
      await writeAtRandom(image, model, randomFrom(12), 40);
      expect(firstDifference(await contentOf(image), model)).toBe(-1);
      await image.close();
      expect(firstDifference(qemuContent(), model)).toBe(-1);
    },
  );
});

describe("autoclear bits", () => {
  it("clears what it does not know, and keeps the raw data file's", async () => {
    make({ name: "", options: "data_file=data.raw,data_file_raw=on" });
    const fd = fs.openSync(at(NAME), "r+");
    fs.writeSync(fd, Uint8Array.of(0x80, 0, 0, 0, 0, 0, 0, 2), 0, 8, 88);
    await (await open(true)).close();
    const field = Buffer.alloc(8);
    fs.readSync(fd, field, 0, 8, 88);
    expect([...field]).toEqual([0x80, 0, 0, 0, 0, 0, 0, 2]);
    await (await open(false)).close();
    fs.readSync(fd, field, 0, 8, 88);
    fs.closeSync(fd);
    expect([...field]).toEqual([0, 0, 0, 0, 0, 0, 0, 2]);
  });
});

describe("created", () => {
  it.each([
    ["subclusters", { extendedL2: true }],
    ["data file", { dataFile: "data.raw" }],
    ["raw data file", { dataFile: "data.raw", dataFileRaw: true }],
    ["raw data file, subclusters", { dataFile: "data.raw", dataFileRaw: true, extendedL2: true }],
  ])("%s: sound, and shows what is in the data file", async (_name, options) => {
    const sizeBytes = 5 * MiB + 512;
    const fd = fs.openSync(at(NAME), "w+");
    createQcow2(fd, NAME, { sizeBytes, clusterSizeBytes: 16 * KiB, ...options });
    fs.closeSync(fd);
    const isRaw = "dataFileRaw" in options;
    const content = isRaw ? mixedContent(sizeBytes, 8) : Buffer.alloc(sizeBytes);
    if ("dataFile" in options) fs.writeFileSync(at("data.raw"), content);
    qemu("qemu-img", "check", "-f", "qcow2", NAME);
    expect(firstDifference(qemuContent(), content)).toBe(-1);
    const image = await open(false);
    expect(firstDifference(await contentOf(image), content)).toBe(-1);
    await image.write(Buffer.alloc(3000, 4), 0, 3000, 70 * KiB + 100);
    content.fill(4, 70 * KiB + 100, 70 * KiB + 3100);
    await image.close();
    qemu("qemu-img", "check", "-f", "qcow2", NAME);
    expect(firstDifference(qemuContent(), content)).toBe(-1);
    if (isRaw) expect(firstDifference(fs.readFileSync(at("data.raw")), content)).toBe(-1);
  });
});
