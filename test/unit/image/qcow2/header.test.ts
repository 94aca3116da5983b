import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../../src/errors.js";
import {
  EXTENSION_BACKING_FORMAT,
  EXTENSION_FEATURE_NAMES,
  INCOMPATIBLE_CORRUPT,
  INCOMPATIBLE_DIRTY,
  MAX_SIZE_BYTES,
  assertSupported,
  l1EntriesFor,
  parseHeader,
  readHeader,
  type Qcow2Header,
} from "../../../../src/image/qcow2/format/header.js";
import { featureNameTable, serialiseHeader } from "../../../../src/image/qcow2/format/header-write.js";
import { openQcow2 } from "../../../../src/image/qcow2/image.js";
import { GiB, KiB, MiB, TiB } from "../../../../src/units.js";
import { MemoryFile } from "../../../support/qcow2-memory.js";

const base: Qcow2Header = {
  version: 3,
  clusterBits: 16,
  sizeBytes: 1 * GiB,
  cryptMethod: 0,
  l1Size: 2,
  l1TableOffset: 3 * 65536,
  refcountTableOffset: 65536,
  refcountTableClusters: 1,
  snapshotCount: 0,
  snapshotsOffset: 0,
  incompatibleFeatures: 0n,
  compatibleFeatures: 0n,
  autoclearFeatures: 0n,
  refcountOrder: 4,
  headerLengthBytes: 112,
  compressionType: "zlib",
  extensions: [],
  backingFile: null,
  backingFormat: null,
  externalDataFile: null,
  bitmaps: null,
};

function bytesOf(changes: Partial<Qcow2Header> = {}): Buffer {
  return Buffer.from(serialiseHeader({ ...base, ...changes }, "test"));
}

/** The error that parsing gives, as "CODE: problem". */
function refusal(bytes: Uint8Array): string {
  try {
    assertSupported(parseHeader(bytes, "disk.qcow2"), "disk.qcow2");
  } catch (error) {
    if (error instanceof CowcatcherError) return `${error.code}: ${error.problem}`;
    throw error;
  }
  return "accepted";
}

function patched(changes: Partial<Qcow2Header>, patch: (bytes: Buffer) => void): string {
  const bytes = bytesOf(changes);
  patch(bytes);
  return refusal(bytes);
}

describe("qcow2 header", () => {
  it("reads back what it has written", () => {
    const header: Qcow2Header = {
      ...base,
      backingFile: "dir/base é.raw",
      backingFormat: "raw",
      extensions: [
        { type: EXTENSION_BACKING_FORMAT, data: Buffer.from("raw") },
        featureNameTable(),
        { type: 0x12345678, data: new Uint8Array([1, 2, 3]) },
      ],
      incompatibleFeatures: INCOMPATIBLE_DIRTY,
      compatibleFeatures: 1n << 63n,
      autoclearFeatures: 1n << 40n,
    };
    const parsed = parseHeader(serialiseHeader(header, "test"), "test");
    const plain = (value: Qcow2Header): unknown => ({
      ...value,
      extensions: value.extensions.map(({ type, data }) => [type, Buffer.from(data).toString("hex")]),
    });
    expect(plain(parsed)).toEqual(plain(header));
  });

  it("writes version 2 in 72 bytes", () => {
    const bytes = bytesOf({ version: 2, backingFile: "b", backingFormat: "qcow2" });
    const parsed = parseHeader(bytes, "test");
    expect(parsed).toMatchObject({
      version: 2,
      headerLengthBytes: 72,
      refcountOrder: 4,
      backingFile: "b",
      backingFormat: "qcow2",
    });
  });

  it.each([
    ["a text file", () => refusal(Buffer.from("#!/bin/sh".padEnd(600))), "FORMAT: not a qcow2 image"],
    ["an empty file", () => refusal(new Uint8Array(0)), "FORMAT: not a qcow2 image"],
    [
      "version 4",
      () => patched({}, (b) => b.writeUInt32BE(4, 4)),
      "UNSUPPORTED: the image uses qcow2 version 4, which is not supported",
    ],
    [
      "cluster_bits 8",
      () => patched({}, (b) => b.writeUInt32BE(8, 20)),
      "LIMIT: cluster_bits 8 is outside the limit: 9 to 21 (512 bytes to 2 MiB)",
    ],
    [
      "cluster_bits 22",
      () => patched({}, (b) => b.writeUInt32BE(22, 20)),
      "LIMIT: cluster_bits 22 is outside the limit: 9 to 21 (512 bytes to 2 MiB)",
    ],
    [
      "a size beyond 2^53",
      () => patched({}, (b) => b.writeUInt32BE(0x200000, 24)),
      "LIMIT: the field size is outside the limit: 2^53",
    ],
    [
      "a size beyond the limit",
      () => patched({}, (b) => b.writeBigUInt64BE(BigInt(MAX_SIZE_BYTES) + 512n, 24)),
      /^LIMIT: the disk size \d+ is outside the limit: 4.00 PiB/,
    ],
    [
      "refcount_order 7",
      () => patched({}, (b) => b.writeUInt32BE(7, 96)),
      "LIMIT: refcount_order 7 is outside the limit: 6 (64 bits)",
    ],
    [
      "an L1 table over 32 MiB",
      () => patched({}, (b) => b.writeUInt32BE(4 * MiB + 1, 36)),
      /^LIMIT: the L1 table of 4194305 entries is outside the limit: 32.0 MiB/,
    ],
    [
      "an L1 table too small",
      () => patched({}, (b) => b.writeUInt32BE(1, 36)),
      "FORMAT: the L1 table is too small for the disk's size",
    ],
    [
      "an L1 table off a cluster",
      () => patched({}, (b) => b.writeUInt32BE(512, 44)),
      "FORMAT: the L1 table is not aligned to a cluster (offset 512)",
    ],
    [
      "no refcount table",
      () => patched({}, (b) => b.writeUInt32BE(0, 56)),
      "FORMAT: there is no refcount table",
    ],
    [
      "a refcount table over 8 MiB",
      () => patched({}, (b) => b.writeUInt32BE(129, 56)),
      /^LIMIT: the refcount table of 129 clusters/,
    ],
    [
      "too many snapshots",
      () => patched({}, (b) => b.writeUInt32BE(65537, 60)),
      /^LIMIT: the count of 65537 snapshots/,
    ],
    [
      "a snapshot table off a cluster",
      () => patched({}, (b) => (b.writeUInt32BE(1, 60), b.writeUInt32BE(8, 68))),
      /^FORMAT: the snapshot table is not aligned/,
    ],
    [
      "a header length of 105",
      () => patched({}, (b) => b.writeUInt32BE(105, 100)),
      /^FORMAT: the header length 105/,
    ],
    [
      "a header length beyond the cluster",
      () => patched({}, (b) => b.writeUInt32BE(65544, 100)),
      /^FORMAT: the header length 65544 exceeds/,
    ],
    [
      "an extension that leaves the cluster",
      () => patched({}, (b) => (b.writeUInt32BE(5, 112), b.writeUInt32BE(70000, 116))),
      /^FORMAT: header extension 0x5 leaves/,
    ],
    [
      "a backing name of 1024 bytes",
      () => patched({ backingFile: "b" }, (b) => b.writeUInt32BE(1024, 16)),
      /^LIMIT: the backing file name of 1024 bytes/,
    ],
    [
      "a backing name beyond the cluster",
      () => patched({ backingFile: "b" }, (b) => b.writeUInt32BE(65536, 12)),
      /^FORMAT: the backing file name leaves/,
    ],
    [
      "AES",
      () => patched({}, (b) => b.writeUInt32BE(1, 32)),
      /^UNSUPPORTED: the image uses encryption \(AES\)/,
    ],
    [
      "LUKS",
      () => patched({}, (b) => b.writeUInt32BE(2, 32)),
      /^UNSUPPORTED: the image uses encryption \(LUKS\)/,
    ],
    [
      "extended L2 in clusters of 8 KiB",
      () => patched({ incompatibleFeatures: 16n, clusterBits: 13, l1Size: 4096 }, () => undefined),
      /^FORMAT: extended L2 entries need clusters of at least 16 KiB/,
    ],
    [
      "a compression type without its bit",
      () => patched({}, (b) => b.writeUInt8(1, 104)),
      /^FORMAT: the compression type and its/,
    ],
    [
      "compression type 2",
      () => patched({ incompatibleFeatures: 8n }, (b) => b.writeUInt8(2, 104)),
      /^UNSUPPORTED: the image uses compression type 2/,
    ],
  ] as const)("refuses %s", (_name, refuse, expected) => {
    const answer = refuse();
    if (typeof expected === "string") expect(answer).toBe(expected);
    else expect(answer).toMatch(expected);
  });

  it("names unknown incompatible features as the image's own table does", () => {
    const data = new Uint8Array(96);
    data.set([0, 7]);
    data.set(Buffer.from("warp drive\n"), 2);
    data.set([1, 9], 48);
    const extensions = [{ type: EXTENSION_FEATURE_NAMES, data }];
    const answer = refusal(bytesOf({ incompatibleFeatures: (1n << 7n) | (1n << 9n), extensions }));
    expect(answer).toBe(
      "UNSUPPORTED: the image uses incompatible features: warp drive?, bit 9, which is not supported",
    );
  });

  it("accepts unknown compatible and autoclear features", () => {
    expect(refusal(bytesOf({ compatibleFeatures: 1n << 50n, autoclearFeatures: 1n << 50n }))).toBe(
      "accepted",
    );
  });

  it("computes the L1 size", () => {
    expect(l1EntriesFor(0, 16)).toBe(0);
    expect(l1EntriesFor(1, 16)).toBe(1);
    expect(l1EntriesFor(512 * MiB + 1, 16)).toBe(2);
    expect(l1EntriesFor(16 * TiB, 16)).toBe(32768);
    expect(l1EntriesFor(128 * KiB, 9)).toBe(4);
  });

  it("reads no more than the first cluster", () => {
    const bytes = Buffer.concat([
      bytesOf({
        clusterBits: 9,
        l1Size: 32768,
        l1TableOffset: 1024,
        refcountTableOffset: 512,
        backingFile: "x",
      }),
      Buffer.alloc(8192, 0xff),
    ]);
    const reads: number[] = [];
    const header = readHeader((buffer, offset) => {
      reads.push(offset);
      return bytes.copy(buffer, 0, offset);
    }, "test");
    expect(header.backingFile).toBe("x");
    expect(reads).toEqual([0]);
  });

  it("never throws anything but its own errors, whatever the bytes", () => {
    let state = 1;
    for (let run = 0; run < 3000; run++) {
      const bytes = bytesOf({ backingFile: "base", backingFormat: "raw", extensions: [featureNameTable()] });
      for (let change = 0; change < 4; change++) {
        state = (state * 69069 + 1) >>> 0;
        bytes[state % 600] = state >>> 24;
      }
      refusal(bytes);
    }
  });
});

describe("qcow2 image, opening", () => {
  let folder: string;
  beforeEach(() => {
    folder = fs.mkdtempSync(path.join(os.tmpdir(), "qcow2-header-"));
  });
  afterEach(() => fs.rmSync(folder, { recursive: true, force: true }));

  const options = { path: "", name: "disk.qcow2", fd: -1, direct: false, probed: false, backing: null };
  function imageBytes(...createArgs: string[]): Buffer {
    const file = path.join(folder, "image");
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", ...createArgs, file, "1M"]);
    return fs.readFileSync(file);
  }

  it.each([
    ["corrupt", INCOMPATIBLE_CORRUPT, /marked corrupt/],
    ["dirty", INCOMPATIBLE_DIRTY, /not closed cleanly/],
  ] as const)("opens a %s image read-only, and refuses to write to it", async (_name, feature, problem) => {
    const bytes = imageBytes();
    bytes.writeBigUInt64BE(feature, 72);
    const image = await openQcow2({ ...options, readOnly: true, file: new MemoryFile(bytes) });
    await expect(image.write(Buffer.alloc(1), 0, 1, 0)).rejects.toThrow(/read-only/);
    await expect(openQcow2({ ...options, readOnly: false, file: new MemoryFile(bytes) })).rejects.toThrow(
      problem,
    );
    await expect(openQcow2({ ...options, readOnly: false, file: new MemoryFile(bytes) })).rejects.toThrow(
      /qemu-img check -r all/,
    );
  });

  it("clears autoclear features before it writes, and not when it only reads", async () => {
    const bytes = imageBytes();
    bytes.writeBigUInt64BE(1n << 33n, 88);
    const file = new MemoryFile(bytes);
    await openQcow2({ ...options, readOnly: true, file });
    expect(file.log).toEqual([]);
    await openQcow2({ ...options, readOnly: false, file });
    expect(file.content().readBigUInt64BE(88)).toBe(0n);
    expect(file.log.at(-1)?.kind).toBe("sync-done");
  });

  it("describes an image as qemu-img info does", async () => {
    const file = path.join(folder, "image");
    execFileSync("qemu-img", [
      "create",
      "-q",
      "-f",
      "qcow2",
      "-o",
      "lazy_refcounts=on,refcount_bits=8",
      file,
      "3M",
    ]);
    execFileSync("qemu-img", ["snapshot", "-c", "first one", file]);
    execFileSync("qemu-img", ["bitmap", "--add", "-g", "128K", file, "marks"]);
    const expected = JSON.parse(
      execFileSync("qemu-img", ["info", "--output=json", file], { encoding: "utf8" }),
    ) as Record<string, unknown>;
    const image = await openQcow2({
      ...options,
      readOnly: true,
      file: new MemoryFile(fs.readFileSync(file)),
    });
    const info: Record<string, unknown> = { ...image.imageInfo() };
    for (const key of Object.keys(info)) expect(info[key], key).toEqual(expected[key]);
    expect(Object.keys(info).sort()).toEqual(["cluster-size", "dirty-flag", "format-specific", "snapshots"]);
  });
});
