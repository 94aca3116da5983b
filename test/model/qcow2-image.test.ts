// Random operations on qcow2 images of many shapes, against a plain buffer; after each episode QEMU has the last
// word: its check must be clean, and its view of the content the same as the model's.

import fc from "fast-check";
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { sampled } from "../support/campaign.js";
import type { Image } from "../../src/block/device.js";
import { openImage } from "../../src/image/open.js";
import { KiB, MiB } from "../../src/units.js";

const RUNS = Number(process.env["QCOW2_RUNS"] ?? 3);

interface Variant {
  name: string;
  clusterSize: string;
  compat: "0.10" | "1.1";
  sizeBytes: number;
  options?: string;
  backing?: "raw" | "qcow2";
  /** Of the backing file; the image's own by default. */
  backingSizeBytes?: number;
  /** The content starts as compressed clusters. */
  compressed?: "zlib" | "zstd";
  snapshot?: boolean;
  direct?: boolean;
  /** There is a data file, and it must read as the disk by itself. */
  rawData?: boolean;
}

const EXTENDED = { compat: "1.1", options: "extended_l2=on", sizeBytes: 256 * KiB } as const;
const WITH_DATA = { compat: "1.1", clusterSize: "16K", sizeBytes: 256 * KiB - 1536 } as const;

const VARIANTS: Variant[] = [
  { name: "v3, 64K", clusterSize: "64K", compat: "1.1", sizeBytes: 1 * MiB },
  { name: "v3, 64K, size not a multiple", clusterSize: "64K", compat: "1.1", sizeBytes: 1 * MiB - 1536 },
  { name: "v2, 4K", clusterSize: "4K", compat: "0.10", sizeBytes: 256 * KiB },
  { name: "v2, 512", clusterSize: "512", compat: "0.10", sizeBytes: 128 * KiB },
  {
    // Large enough for its refcount table to be outgrown.
    name: "v3, 512, 64-bit refcounts",
    clusterSize: "512",
    compat: "1.1",
    sizeBytes: 3 * MiB,
    options: "refcount_bits=64",
  },
  {
    name: "v3, 4K, 1-bit refcounts",
    clusterSize: "4K",
    compat: "1.1",
    sizeBytes: 256 * KiB,
    options: "refcount_bits=1",
  },
  {
    name: "v3, 4K, 4-bit refcounts",
    clusterSize: "4K",
    compat: "1.1",
    sizeBytes: 256 * KiB,
    options: "refcount_bits=4",
  },
  {
    name: "v3, 2M, 32-bit refcounts",
    clusterSize: "2M",
    compat: "1.1",
    sizeBytes: 5 * MiB,
    options: "refcount_bits=32",
  },
  {
    name: "v3, lazy refcounts",
    clusterSize: "4K",
    compat: "1.1",
    sizeBytes: 256 * KiB,
    options: "lazy_refcounts=on",
  },
  {
    name: "v3, preallocated",
    clusterSize: "4K",
    compat: "1.1",
    sizeBytes: 256 * KiB,
    options: "preallocation=metadata",
  },
  { name: "v3 on raw", clusterSize: "4K", compat: "1.1", sizeBytes: 256 * KiB, backing: "raw" },
  { name: "v2 on qcow2", clusterSize: "4K", compat: "0.10", sizeBytes: 256 * KiB, backing: "qcow2" },
  {
    name: "v3 on a shorter raw",
    clusterSize: "64K",
    compat: "1.1",
    sizeBytes: 1 * MiB,
    backing: "raw",
    backingSizeBytes: 300 * KiB + 512,
  },
  {
    name: "v2 on a longer qcow2",
    clusterSize: "4K",
    compat: "0.10",
    sizeBytes: 128 * KiB,
    backing: "qcow2",
    backingSizeBytes: 256 * KiB,
  },
  { name: "v3, zlib", clusterSize: "64K", compat: "1.1", sizeBytes: 1 * MiB, compressed: "zlib" },
  { name: "v2, zlib, 4K", clusterSize: "4K", compat: "0.10", sizeBytes: 256 * KiB, compressed: "zlib" },
  { name: "v3, zstd", clusterSize: "64K", compat: "1.1", sizeBytes: 1 * MiB, compressed: "zstd" },
  { name: "v3, snapshot", clusterSize: "4K", compat: "1.1", sizeBytes: 256 * KiB, snapshot: true },
  {
    name: "v3, 512, snapshot, zlib",
    clusterSize: "512",
    compat: "1.1",
    sizeBytes: 128 * KiB,
    snapshot: true,
    compressed: "zlib",
  },
  { name: "v3, O_DIRECT", clusterSize: "64K", compat: "1.1", sizeBytes: 1 * MiB, direct: true },
  {
    name: "v3 on qcow2, 512, O_DIRECT",
    clusterSize: "512",
    compat: "1.1",
    sizeBytes: 64 * KiB,
    backing: "qcow2",
    direct: true,
  },
  { ...EXTENDED, name: "subclusters, 16K", clusterSize: "16K" },
  { ...EXTENDED, name: "subclusters, 64K", clusterSize: "64K", sizeBytes: 1 * MiB - 1536 },
  { ...EXTENDED, name: "subclusters on raw", clusterSize: "16K", backing: "raw" },
  {
    ...EXTENDED,
    name: "subclusters on a shorter qcow2",
    clusterSize: "16K",
    backing: "qcow2",
    backingSizeBytes: 100 * KiB + 512,
  },
  { ...EXTENDED, name: "subclusters, zlib", clusterSize: "16K", compressed: "zlib" },
  { ...EXTENDED, name: "subclusters, snapshot", clusterSize: "16K", snapshot: true },
  {
    ...EXTENDED,
    name: "subclusters, snapshot, zstd",
    clusterSize: "64K",
    sizeBytes: 1 * MiB,
    snapshot: true,
    compressed: "zstd",
  },
  { ...EXTENDED, name: "subclusters, O_DIRECT", clusterSize: "16K", backing: "raw", direct: true },
  { ...WITH_DATA, name: "data file", options: "data_file=data.raw" },
  { ...WITH_DATA, name: "data file on raw", options: "data_file=data.raw", backing: "raw" },
  { ...WITH_DATA, name: "data file, O_DIRECT", options: "data_file=data.raw", direct: true },
  { ...WITH_DATA, name: "raw data file", options: "data_file=data.raw,data_file_raw=on", rawData: true },
  {
    ...WITH_DATA,
    name: "raw data file, subclusters",
    options: "data_file=data.raw,data_file_raw=on,extended_l2=on",
    rawData: true,
  },
  {
    ...WITH_DATA,
    name: "raw data file, O_DIRECT",
    options: "data_file=data.raw,data_file_raw=on",
    rawData: true,
    direct: true,
  },
  {
    ...WITH_DATA,
    name: "data file on raw, subclusters",
    options: "data_file=data.raw,extended_l2=on",
    backing: "raw",
  },
];

type Operation =
  | { kind: "write"; at: number; length: number; fill: number }
  | { kind: "zero"; at: number; length: number; mayUnmap: boolean }
  | { kind: "discard"; at: number; length: number }
  | { kind: "read"; at: number; length: number }
  | { kind: "flush" }
  | { kind: "reopen" };

let folder: string;
beforeAll(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), "qcow2-model-"));
});
afterAll(() => fs.rmSync(folder, { recursive: true, force: true }));

function qemuImg(...args: string[]): string {
  return execFileSync("qemu-img", args, { cwd: folder, encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
}

/** Half random blocks, half zeroes and text, so that compression has something to do. */
function content(sizeBytes: number, seed: number): Buffer {
  const bytes = Buffer.alloc(sizeBytes);
  let state = seed;
  for (let at = 0; at < sizeBytes; at += 512) {
    state = (state * 1103515245 + 12345) >>> 0;
    if (state % 3 === 0) continue;
    if (state % 3 === 1) bytes.fill(`block ${at} `, at, Math.min(sizeBytes, at + 512));
    else
      for (let i = at; i < Math.min(sizeBytes, at + 512); i++)
        bytes[i] = (state = (state * 69069 + 1) >>> 0) >>> 24;
  }
  return bytes;
}

/** Makes the image and returns what it must read as. */
function makeImage(variant: Variant): Buffer {
  for (const file of fs.readdirSync(folder)) fs.rmSync(path.join(folder, file));
  const { sizeBytes, clusterSize, compat } = variant;
  const options = [`compat=${compat}`, `cluster_size=${clusterSize}`];
  if (variant.options !== undefined) options.push(variant.options);
  if (variant.compressed === "zstd") options.push("compression_type=zstd");
  if (variant.backing !== undefined) return makeOverlay(variant, options, variant.backing);
  if (variant.compressed !== undefined || variant.snapshot) {
    const bytes = content(sizeBytes, sizeBytes);
    fs.writeFileSync(path.join(folder, "content.raw"), bytes);
    const compress = variant.compressed === undefined ? [] : ["-c"];
    qemuImg(
      "convert",
      ...compress,
      "-O",
      "qcow2",
      "-o",
      options.join(),
      "-f",
      "raw",
      "content.raw",
      "image.qcow2",
    );
    if (variant.snapshot) qemuImg("snapshot", "-c", "before", "image.qcow2");
    return bytes;
  }
  qemuImg("create", "-q", "-f", "qcow2", "-o", options.join(), "image.qcow2", `${sizeBytes}`);
  return Buffer.alloc(sizeBytes);
}

function makeOverlay(variant: Variant, options: string[], backing: "raw" | "qcow2"): Buffer {
  const bytes = content(variant.backingSizeBytes ?? variant.sizeBytes, 7);
  fs.writeFileSync(path.join(folder, "base.raw"), bytes);
  if (backing === "qcow2") qemuImg("convert", "-O", "qcow2", "-f", "raw", "base.raw", "base.qcow2");
  const base = ["-b", `base.${backing}`, "-F", backing];
  qemuImg(
    "create",
    "-q",
    "-f",
    "qcow2",
    ...base,
    "-o",
    options.join(),
    "image.qcow2",
    `${variant.sizeBytes}`,
  );
  const model = Buffer.alloc(variant.sizeBytes);
  bytes.copy(model, 0, 0, Math.min(bytes.length, model.length));
  return model;
}

/** What lies beyond its end reads as zeroes. */
function readDataFile(sizeBytes: number): Buffer {
  return Buffer.concat([fs.readFileSync(path.join(folder, "data.raw")), Buffer.alloc(sizeBytes)]).subarray(
    0,
    sizeBytes,
  );
}

function open(variant: Variant): Promise<Image> {
  return openImage(path.join(folder, "image.qcow2"), {
    format: "qcow2",
    readOnly: false,
    direct: variant.direct ?? false,
  });
}

function operationsFor(sizeBytes: number): fc.Arbitrary<Operation[]> {
  const range = fc
    .record({
      at: fc.nat(sizeBytes - 1),
      length: fc.oneof(fc.integer({ min: 1, max: 9000 }), fc.integer({ min: 1, max: sizeBytes })),
      unit: fc.constantFrom(1, 512, 4096, 65536),
    })
    .map(({ at, length, unit }) => {
      const start = Math.floor(at / unit) * unit;
      return { at: start, length: Math.min(sizeBytes - start, Math.ceil(length / unit) * unit) };
    });
  const operation: fc.Arbitrary<Operation> = fc.oneof(
    {
      weight: 6,
      arbitrary: fc
        .tuple(range, fc.integer({ min: 1, max: 255 }))
        .map(([at, fill]) => ({ kind: "write" as const, ...at, fill })),
    },
    {
      weight: 2,
      arbitrary: fc
        .tuple(range, fc.boolean())
        .map(([at, mayUnmap]) => ({ kind: "zero" as const, ...at, mayUnmap })),
    },
    { weight: 2, arbitrary: range.map((at) => ({ kind: "discard" as const, ...at })) },
    { weight: 2, arbitrary: range.map((at) => ({ kind: "read" as const, ...at })) },
    { weight: 1, arbitrary: fc.constant({ kind: "flush" as const }) },
    { weight: 1, arbitrary: fc.constant({ kind: "reopen" as const }) },
  );
  return fc.array(operation, { minLength: 1, maxLength: 40 });
}

/** Applies one operation to both; what a discard leaves is zeroes or the old data, block by block: the model learns. */
async function apply(image: Image, model: Buffer, operation: Operation): Promise<void> {
  switch (operation.kind) {
    case "write": {
      const data = Buffer.alloc(operation.length, operation.fill);
      data.writeUInt8((operation.at % 251) + 1, operation.length >> 1);
      await image.write(data, 0, operation.length, operation.at);
      data.copy(model, operation.at);
      return;
    }
    case "zero":
      await image.writeZeroes(operation.at, operation.length, { mayUnmap: operation.mayUnmap });
      model.fill(0, operation.at, operation.at + operation.length);
      return;
    case "discard": {
      await image.discard(operation.at, operation.length);
      const after = Buffer.alloc(operation.length, 0xee);
      await image.read(after, 0, operation.length, operation.at);
      for (let index = 0; index < after.length; index++) {
        const byte = after[index] ?? 0;
        if (byte !== 0 && byte !== model[operation.at + index])
          throw new Error(`discard invented byte ${index}`);
      }
      after.copy(model, operation.at);
      return;
    }
    case "read": {
      const data = Buffer.alloc(operation.length + 7, 0xee);
      await image.read(data, 3, operation.length, operation.at);
      expect(data.subarray(3, -4).equals(model.subarray(operation.at, operation.at + operation.length))).toBe(
        true,
      );
      expect(data.subarray(0, 3).equals(Buffer.alloc(3, 0xee))).toBe(true);
      expect(data.subarray(-4).equals(Buffer.alloc(4, 0xee))).toBe(true);
      return;
    }
    case "flush":
      await image.flush();
      return;
    case "reopen":
      return;
  }
}

async function episode(variant: Variant, operations: Operation[]): Promise<void> {
  const model = makeImage(variant);
  const snapshotContent = variant.snapshot ? Buffer.from(model) : null;
  let image = await open(variant);
  for (const operation of operations) {
    if (operation.kind === "reopen") {
      await image.close();
      image = await open(variant);
    } else await apply(image, model, operation);
  }
  const whole = Buffer.alloc(model.length);
  await image.read(whole, 0, whole.length, 0);
  await image.close();
  expect(whole.equals(model)).toBe(true);
  qemuImg("check", "-f", "qcow2", "image.qcow2");
  fs.writeFileSync(path.join(folder, "model.raw"), model);
  qemuImg("compare", "-f", "qcow2", "-F", "raw", "image.qcow2", "model.raw");
  if (variant.rawData) expect(readDataFile(model.length).equals(model)).toBe(true);
  if (snapshotContent === null) return;
  fs.writeFileSync(path.join(folder, "snapshot.raw"), snapshotContent);
  qemuImg("convert", "-l", "before", "-f", "qcow2", "-O", "raw", "image.qcow2", "old.raw");
  qemuImg("compare", "-f", "raw", "-F", "raw", "old.raw", "snapshot.raw");
}

describe("qcow2 image against a buffer and QEMU", () => {
  it.each(sampled(VARIANTS, 2))("$name", { timeout: RUNS * 8000 }, async (variant) => {
    await fc.assert(
      fc.asyncProperty(operationsFor(variant.sizeBytes), (operations) => episode(variant, operations)),
      { numRuns: RUNS, endOnFailure: true },
    );
  });
});
