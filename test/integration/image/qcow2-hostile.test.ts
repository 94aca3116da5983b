// Images that once did harm, each a sound image with a few bytes changed: found by `npm run fuzz`, kept here. None may
// hang, crash or touch what it should not; each ends as a CowcatcherError or is read as QEMU reads it.

import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as path from "node:path";
import { afterAll, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import type { Image } from "../../../src/block/device.js";
import { openImage } from "../../../src/image/open.js";
import { type CheckResult, checkImage } from "../../../src/image/qcow2/check/check.js";
import { openSource } from "../../../src/image/reader.js";
import { runProgram } from "../../../src/cli/program.js";
import { KiB, MiB } from "../../../src/units.js";
import { hostileNames, makeLibrary } from "../../fuzz/sandbox.js";
import { scratchFolder, stopAll } from "../../support/server.js";

const SIZE = 1 * MiB;
let folder: string;
let imagePath: string;

beforeEach(() => {
  folder = scratchFolder();
  imagePath = path.join(folder, "disk.qcow2");
});
afterAll(stopAll);

function create(options: string, ...commands: string[]): void {
  execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", "-o", options, imagePath, `${SIZE}`]);
  const args = commands.flatMap((command) => ["-c", command]);
  if (commands.length > 0) execFileSync("qemu-io", ["-f", "qcow2", ...args, imagePath], { stdio: "ignore" });
}

function patch(offset: number, ...bytes: number[]): void {
  const fd = fs.openSync(imagePath, "r+");
  fs.writeSync(fd, Uint8Array.from(bytes), 0, bytes.length, offset);
  fs.closeSync(fd);
}

function bigEndian(value: number, byteCount: 4 | 8): number[] {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value));
  return [...bytes.subarray(8 - byteCount)];
}

function numberAt(offset: number): number {
  return Number(fs.readFileSync(imagePath).readBigUInt64BE(offset) & 0x00fffffffffffe00n);
}

/** Puts a backing file name where there was none. */
function setBackingName(name: string, lengthBytes = Buffer.byteLength(name, "latin1")): void {
  patch(0x600, ...Buffer.from(name, "latin1"));
  patch(8, ...bigEndian(0x600, 8), ...bigEndian(lengthBytes, 4));
}

async function chainOf(): Promise<{ code: number; stdout: string; stderr: string }> {
  let stdout = "";
  let stderr = "";
  const code = await runProgram(["info", "--json", "--backing-chain", "-f", "qcow2", imagePath], {
    stdout: { write: (text) => (stdout += text) },
    stderr: { write: (text) => (stderr += text) },
    environment: {},
  });
  return { code, stdout, stderr };
}

async function withImage<T>(use: (image: Image) => Promise<T>): Promise<T> {
  const image = await openImage(imagePath, { format: "qcow2", readOnly: true });
  try {
    return await use(image);
  } finally {
    await image.close();
  }
}

/** The check, which must not take more than a moment of the processor. */
async function quickCheck(): Promise<CheckResult> {
  const before = process.cpuUsage();
  try {
    return await checkImage(imagePath, { format: "qcow2" });
  } finally {
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1e6).toBeLessThan(2);
  }
}

describe("a backing file name", () => {
  it("ends at its first zero byte, as in QEMU", async () => {
    create("cluster_size=4k");
    fs.writeFileSync(path.join(folder, "base.raw"), Buffer.alloc(SIZE, 7));
    setBackingName("base.raw\0\0.and.more");
    const { code, stdout } = await chainOf();
    expect(code).toBe(0);
    expect((JSON.parse(stdout) as unknown[]).length).toBe(2);
    const theirs = execFileSync("qemu-img", ["info", "--output=json", imagePath], { encoding: "utf8" });
    const [top] = JSON.parse(stdout) as Record<string, unknown>[];
    expect(top?.["backing-filename"]).toBe(
      (JSON.parse(theirs) as Record<string, unknown>)["backing-filename"],
    );
  });

  it("of zero bytes alone is none", async () => {
    create("cluster_size=4k");
    setBackingName("\0", 1023);
    expect(await withImage((image) => Promise.resolve(image.backing))).toBe(null);
    expect((JSON.parse((await chainOf()).stdout) as unknown[]).length).toBe(1);
  });

  it.each([
    ["a".repeat(300), /the name is too long/],
    ["loop-a", /too many symbolic links/],
  ])("that leads nowhere (%s) is an error in one line", async (name, problem) => {
    fs.symlinkSync("loop-b", path.join(folder, "loop-a"));
    fs.symlinkSync("loop-a", path.join(folder, "loop-b"));
    create("cluster_size=4k");
    setBackingName(name);
    const { code, stderr } = await chainOf();
    expect(code).toBe(1);
    expect(stderr).toMatch(problem);
    expect(stderr.trimEnd().split("\n")).toHaveLength(1);
  });

  it("of any hostile kind opens nothing that hangs or is no image", async () => {
    fs.mkdirSync(path.join(folder, "own"));
    makeLibrary(folder);
    imagePath = path.join(folder, "own", "disk.qcow2");
    create("cluster_size=4k", "write 64k 4k");
    const pristine = fs.readFileSync(imagePath);
    let opened = 0;
    for (const name of hostileNames(folder, "disk.qcow2").backing) {
      fs.writeFileSync(imagePath, pristine);
      setBackingName(name);
      try {
        await withImage((image) => Promise.resolve(image.read(Buffer.alloc(4096), 0, 4096, 0)));
        opened++;
      } catch (error) {
        expect(error, name).toBeInstanceOf(CowcatcherError);
        expect((error as CowcatcherError).code, name).not.toBe("INTERNAL");
      }
    }
    expect(opened).toBeGreaterThan(3);
  });
});

describe("a version 2 image with the zero flag, which it cannot have", () => {
  it("is refused by the device and by a worker alike", async () => {
    create("compat=0.10,cluster_size=4k", "write -P 1 0 64k");
    const l2 = numberAt(numberAt(40));
    patch(l2 + 8 * 3 + 7, 1);
    await withImage(async (image) => {
      const frozen = image.freeze();
      const reader = openSource(frozen.description);
      const buffer = Buffer.alloc(64 * KiB);
      await expect(Promise.resolve(reader.read(buffer, 0, buffer.length, 0))).rejects.toThrow(/zero flag/);
      await expect(Promise.resolve(image.read(buffer, 0, buffer.length, 0))).rejects.toThrow(/zero flag/);
      reader.close();
      frozen.release();
    });
  });
});

describe("an external data file that says it is empty, and is not", () => {
  it("lacks what the image refers to, for the device and for a worker alike", async () => {
    const dataFile = path.join(folder, "data.img");
    create(`cluster_size=4k,data_file=${dataFile}`, "write -P 1 0 64k");
    const name = Buffer.from(dataFile);
    const at = fs.readFileSync(imagePath).indexOf(name);
    patch(at, ...Buffer.from("/proc/self/environ".padEnd(name.length, "\0")));
    await withImage(async (image) => {
      const frozen = image.freeze();
      const reader = openSource(frozen.description);
      const buffer = Buffer.alloc(4 * KiB);
      const missing = /behind the end of the file, at 0 bytes/;
      await expect(Promise.resolve(image.read(buffer, 0, buffer.length, 0))).rejects.toThrow(missing);
      await expect(Promise.resolve(reader.read(buffer, 0, buffer.length, 0))).rejects.toThrow(missing);
      reader.close();
      frozen.release();
    });
  });
});

describe("an L2 entry that points to the image's own metadata", () => {
  it.each([
    ["the L1 table", () => numberAt(40)],
    ["an L2 table", () => numberAt(numberAt(40))],
    ["the refcount table", () => numberAt(48)],
    ["a refcount block", () => numberAt(numberAt(48))],
  ])("lets no guest write over %s", async (what, place) => {
    create("cluster_size=4k", "write -P 1 0 64k");
    const l2 = numberAt(numberAt(40));
    patch(l2 + 8 * 3, ...bigEndian(place(), 8));
    patch(l2 + 8 * 3, 0x80);
    const before = fs.readFileSync(imagePath);
    const image = await openImage(imagePath, { format: "qcow2", readOnly: false });
    try {
      const data = Buffer.alloc(4 * KiB, 0xff);
      const written = Promise.resolve(image.write(data, 0, data.length, 3 * 4 * KiB));
      await expect(written).rejects.toThrow(
        `an L2 entry would let the guest write over ${what} at offset ${l2 + 24}`,
      );
    } finally {
      await image.close();
    }
    expect(fs.readFileSync(imagePath).equals(before)).toBe(true);
    // What is there can still be saved.
    const saved = Buffer.alloc(4 * KiB);
    await withImage(async (readable) => readable.read(saved, 0, saved.length, 0));
    expect(saved.equals(Buffer.alloc(4 * KiB, 1))).toBe(true);
  });
});

describe("a check", () => {
  it("does not believe in a billion bitmaps", async () => {
    create("cluster_size=64k");
    execFileSync("qemu-img", ["bitmap", "--add", imagePath, "b"]);
    const bytes = fs.readFileSync(imagePath);
    const extension = bytes.indexOf(Buffer.from("2385287500000018", "hex"));
    patch(extension + 8, 0x48);
    const { messages } = await quickCheck();
    expect(messages[0]).toMatch(/bitmap directory: \d+ bitmaps are said to be there/);
    // A count that is allowed, but not the directory's.
    patch(extension + 8, 0, 0, 0xff, 0xff);
    expect((await quickCheck()).messages[0]).toMatch(/bitmap directory: it has 1 of 65535 bitmaps/);
  });

  it("does not walk tables past the end of the file", async () => {
    create("cluster_size=64k", "write -P 1 0 1M");
    // Data as an L1 table: each entry is the same place, far outside.
    patch(36, ...bigEndian(0x20000, 4));
    const { corruptions } = await quickCheck();
    expect(corruptions).toBeGreaterThan(1000);
  });

  it("does not walk one table as often as a hostile L1 table names it", async () => {
    create("cluster_size=64k", "write -P 1 0 64k");
    const l1 = numberAt(40);
    const l2 = numberAt(l1);
    const entries = Buffer.alloc(512 * KiB);
    for (let at = 0; at < entries.length; at += 8) entries.writeBigUInt64BE((1n << 63n) | BigInt(l2), at);
    const end = Math.ceil(fs.statSync(imagePath).size / (64 * KiB)) * 64 * KiB;
    fs.truncateSync(imagePath, end);
    fs.appendFileSync(imagePath, entries);
    patch(36, ...bigEndian(entries.length / 8, 4), ...bigEndian(end, 8));
    const { messages } = await quickCheck();
    expect(messages.join("\n")).toMatch(/names more L2 tables than the file has clusters/);
  });
});

describe("an image whose metadata contradicts itself", () => {
  const CLUSTER = 64 * KiB;

  async function open(): Promise<Image> {
    return openImage(imagePath, { format: "qcow2", readOnly: false });
  }

  /** Writes one byte value over [offset, +length) as a guest does. */
  async function write(image: Image, offset: number, length: number): Promise<void> {
    await image.write(new Uint8Array(length).fill(0x5a), 0, length, offset);
  }

  it("gives a guest no cluster in which an L2 table stands, though its refcount is 0", async () => {
    create("cluster_size=64k", "write -P 1 0 64k");
    const l1Offset = numberAt(40);
    const l2Offset = numberAt(l1Offset);
    const blockOffset = numberAt(numberAt(48));
    patch(blockOffset + (l2Offset / CLUSTER) * 2, 0, 0);
    const before = fs.readFileSync(imagePath).subarray(l2Offset, l2Offset + CLUSTER);
    const image = await open();
    await expect(write(image, 8 * CLUSTER, CLUSTER)).rejects.toThrow(/L2 table/);
    await image.close().catch(() => undefined);
    expect(
      fs
        .readFileSync(imagePath)
        .subarray(l2Offset, l2Offset + CLUSTER)
        .equals(before),
    ).toBe(true);
  });

  it("cannot map a second guest cluster onto the data file's first", async () => {
    const dataPath = path.join(folder, "disk.data");
    create(`cluster_size=64k,data_file=${dataPath}`, "write -P 1 0 64k");
    const l2Offset = numberAt(numberAt(40));
    patch(l2Offset + 8 * 5, 0x80, 0, 0, 0, 0, 0, 0, 0);
    const image = await open();
    await expect(write(image, 5 * CLUSTER, 512)).rejects.toThrow(/L2 entry 5/);
    await image.close();
    expect(
      fs
        .readFileSync(dataPath)
        .subarray(0, 512)
        .every((byte) => byte === 1),
    ).toBe(true);
  });

  it("keeps the refcounts of what a repair could not walk to", async () => {
    create("cluster_size=64k", "write -P 1 0 512k");
    execFileSync("qemu-img", ["snapshot", "-c", "one", imagePath]);
    execFileSync("qemu-io", ["-f", "qcow2", "-c", "write -P 2 0 512k", imagePath], { stdio: "ignore" });
    // The snapshot's L1 table is said to be the active L2 table, one entry of which is at no cluster boundary.
    const l2Offset = numberAt(numberAt(40));
    const snapshots = numberAt(64);
    patch(snapshots, ...bigEndian(l2Offset, 8));
    const entry = numberAt(l2Offset);
    patch(l2Offset, 0x80, ...bigEndian(entry + 512, 8).slice(1, 7), ((entry + 512) & 0xfe) | 1);
    const refcounts = (): Buffer => {
      const block = numberAt(numberAt(48));
      return Buffer.from(fs.readFileSync(imagePath).subarray(block, block + 64));
    };
    const used = [...Array(32).keys()].filter((cluster) => refcounts().readUInt16BE(cluster * 2) > 0);
    await checkImage(imagePath, { format: "qcow2", repair: "all" }).catch((error: unknown) => {
      expect(error).toBeInstanceOf(CowcatcherError);
    });
    const active = [...Array(8).keys()].map((index) => numberAt(l2Offset + 8 * index) / CLUSTER);
    for (const cluster of active.filter((each) => Number.isInteger(each) && used.includes(each))) {
      expect(refcounts().readUInt16BE(cluster * 2)).toBeGreaterThan(0);
    }
  });

  it("that is dirty and cannot be opened stays as it is", async () => {
    create("cluster_size=64k,lazy_refcounts=on", "write -P 1 0 64k");
    patch(79, 1);
    setBackingName("missing.raw");
    const before = fs.readFileSync(imagePath);
    await expect(open()).rejects.toThrow(/missing\.raw/);
    expect(fs.readFileSync(imagePath).equals(before)).toBe(true);
  });
});
