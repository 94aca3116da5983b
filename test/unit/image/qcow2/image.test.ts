// Behaviour of the qcow2 image that random operations would meet too rarely: each test stages one moment.

import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { setImmediate as nextTurn } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { BlockStatus, Image } from "../../../../src/block/device.js";
import { openImage } from "../../../../src/image/open.js";
import { openQcow2, type Qcow2Image } from "../../../../src/image/qcow2/image.js";
import { KiB, MiB, TiB } from "../../../../src/units.js";
import { MemoryFile } from "../../../support/qcow2-memory.js";

const CLUSTER = 4 * KiB;
const SIZE = 64 * CLUSTER;
let folder: string;
const inFolder = (name: string): string => path.join(folder, name);
const qemuImg = (...args: string[]): string =>
  execFileSync("qemu-img", args, { cwd: folder, encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), "qcow2-image-"));
});
afterEach(() => fs.rmSync(folder, { recursive: true, force: true }));

/** An image whose clusters hold 1, 2, 3, … all over. */
function numbered(...convertArgs: string[]): Buffer {
  const raw = Buffer.alloc(SIZE);
  for (let cluster = 0; cluster < 64; cluster++)
    raw.fill(cluster + 1, cluster * CLUSTER, (cluster + 1) * CLUSTER);
  fs.writeFileSync(inFolder("numbered.raw"), raw);
  qemuImg(
    "convert",
    "-f",
    "raw",
    "-O",
    "qcow2",
    "-o",
    "cluster_size=4K",
    ...convertArgs,
    "numbered.raw",
    "numbered.qcow2",
  );
  return fs.readFileSync(inFolder("numbered.qcow2"));
}

function open(file: MemoryFile): Promise<Qcow2Image> {
  return openQcow2({
    path: "",
    name: "disk",
    fd: -1,
    readOnly: false,
    direct: false,
    probed: false,
    backing: null,
    file,
  });
}

async function readAt(image: Image, offsetBytes: number, lengthBytes: number): Promise<Buffer> {
  const bytes = Buffer.alloc(lengthBytes, 0xee);
  await image.read(bytes, 0, lengthBytes, offsetBytes);
  return bytes;
}

function expectClean(file: MemoryFile): void {
  fs.writeFileSync(inFolder("after.qcow2"), file.content());
  qemuImg("check", "-f", "qcow2", "after.qcow2");
}

describe("qcow2 image", () => {
  it("does what is in the cache without a promise", async () => {
    const image = await open(new MemoryFile(numbered()));
    const buffer = Buffer.alloc(8 * CLUSTER);
    expect(image.read(buffer, 0, buffer.length, 100)).toBeUndefined();
    expect(image.write(buffer, 0, buffer.length, 100)).toBeUndefined();
    expect(image.writeZeroes(CLUSTER, CLUSTER, { mayUnmap: true })).toBeUndefined();
    expect(image.write(buffer, 0, 10, CLUSTER)).toBeUndefined();
    expect(image.discard(0, SIZE)).toBeUndefined();
    expect(image.flush()).toBeInstanceOf(Promise);
    await image.close();
  });

  it("writes a run of contiguous clusters in one call", async () => {
    const file = new MemoryFile(numbered());
    const image = await open(file);
    await image.write(Buffer.alloc(9 * CLUSTER, 7), 0, 9 * CLUSTER, 3 * CLUSTER);
    expect(file.log.filter(({ kind }) => kind === "write")).toHaveLength(1);
    await image.close();
  });

  it("does not reuse a cluster that a slow read still reads", async () => {
    let turns = 0;
    const file = new MemoryFile(numbered(), "disk", () => turns);
    const image = await open(file);
    await readAt(image, 0, SIZE);
    turns = 40;
    const slow = readAt(image, 5 * CLUSTER, CLUSTER);
    turns = 0;
    await image.discard(0, SIZE);
    await image.flush();
    await image.write(Buffer.alloc(32 * CLUSTER, 0xdd), 0, 32 * CLUSTER, 32 * CLUSTER);
    const bytes = await slow;
    expect(bytes.equals(Buffer.alloc(CLUSTER, 6))).toBe(true);
    await image.close();
    expectClean(file);
  });

  it("reuses freed clusters after the flush, not before", async () => {
    const file = new MemoryFile(numbered());
    const image = await open(file);
    const sizeAtFirst = file.endOffset;
    await image.discard(0, SIZE);
    await image.flush();
    await image.write(Buffer.alloc(SIZE, 3), 0, SIZE, 0);
    await image.flush();
    expect(file.endOffset).toBe(sizeAtFirst);
    await image.discard(0, SIZE);
    await image.write(Buffer.alloc(SIZE, 4), 0, SIZE, 0);
    expect(file.endOffset).toBeGreaterThanOrEqual(sizeAtFirst + SIZE);
    await image.close();
    expectClean(file);
  });

  it("does not reuse freed clusters while the flush that frees them runs", async () => {
    let turns = 0;
    const file = new MemoryFile(numbered(), "disk", () => turns);
    const image = await open(file);
    const sizeAtFirst = file.endOffset;
    await image.discard(0, SIZE);
    turns = 5;
    const flush = image.flush();
    turns = 0;
    await image.write(Buffer.alloc(SIZE, 3), 0, SIZE, 0);
    expect(file.endOffset).toBeGreaterThanOrEqual(sizeAtFirst + SIZE);
    await flush;
    await image.close();
    expectClean(file);
  });

  it("lets write-zeroes wait for a write that copies the same cluster", async () => {
    let turns = 0;
    const file = new MemoryFile(numbered("-c"), "disk", () => turns);
    const image = await open(file);
    await readAt(image, 40 * CLUSTER, 1);
    turns = 10;
    const written = Promise.resolve(image.write(Buffer.alloc(100, 0xaa), 0, 100, 1000));
    turns = 0;
    const zeroed = Promise.resolve(image.writeZeroes(0, CLUSTER, { mayUnmap: true }));
    await Promise.all([written, zeroed]);
    const bytes = await readAt(image, 0, CLUSTER);
    const rest = Buffer.concat([bytes.subarray(0, 1000), bytes.subarray(1100)]);
    expect(rest.every((byte) => byte === 0)).toBe(true);
    await image.close();
    expectClean(file);
  });

  it("shares the next flush among callers that come while one runs", async () => {
    let turns = 0;
    const file = new MemoryFile(numbered(), "disk", () => turns);
    const image = await open(file);
    await image.write(Buffer.alloc(1, 1), 0, 1, 0);
    turns = 5;
    const first = image.flush();
    turns = 0;
    await image.write(Buffer.alloc(1, 2), 0, 1, 0);
    const second = image.flush();
    const third = image.flush();
    expect(second).toBe(third);
    expect(second).not.toBe(first);
    await Promise.all([first, second]);
    expect(file.log.filter(({ kind }) => kind === "sync-done")).toHaveLength(2);
    expect(image.flush()).toBeUndefined();
    await image.close();
  });

  it("keeps everything to be flushed again after a failed flush", async () => {
    const file = new MemoryFile(numbered("-c"));
    const image = await open(file);
    await image.write(Buffer.alloc(3 * CLUSTER, 9), 0, 3 * CLUSTER, CLUSTER);
    for (let attempt = 0; attempt < 3; attempt++) {
      if (attempt % 2 === 0) file.failNextSync = Object.assign(new Error("EIO"), { code: "EIO" });
      else file.failNextWrite = Object.assign(new Error("EIO"), { code: "EIO" });
      await expect(image.flush()).rejects.toThrow();
    }
    await image.flush();
    await image.close();
    expectClean(file);
    const again = await open(new MemoryFile(file.content()));
    expect((await readAt(again, CLUSTER, 3 * CLUSTER)).equals(Buffer.alloc(3 * CLUSTER, 9))).toBe(true);
  });

  it.each([
    ["whole clusters", 0, 4 * CLUSTER],
    ["a part of a cluster", 100, 200],
  ])("leaves the old content when a write of %s fails", async (_name, offset, length) => {
    for (const turns of [0, 3]) {
      const file = new MemoryFile(numbered("-c"), "disk", () => turns);
      const image = await open(file);
      const before = await readAt(image, 0, SIZE);
      file.failNextWrite = Object.assign(new Error("ENOSPC"), { code: "ENOSPC" });
      await expect(image.write(Buffer.alloc(length, 5), 0, length, offset)).rejects.toThrow();
      expect((await readAt(image, 0, SIZE)).equals(before)).toBe(true);
      await image.write(Buffer.alloc(length, 5), 0, length, offset);
      await image.close();
      expectClean(file);
    }
  });

  it("leaves the L2 tables of T0 in the file as they are until the release", async () => {
    const file = new MemoryFile(numbered());
    const image = await open(file);
    const frozen = image.freeze();
    const { description } = frozen;
    if (description.format !== "qcow2") throw new Error("not qcow2");
    const words = new Uint32Array(description.l1Table);
    const table = (): Buffer => file.content().subarray(words[0], (words[0] ?? 0) + CLUSTER);
    const before = Buffer.from(table());
    for (let round = 0; round < 5; round++) {
      await image.discard(round * CLUSTER, CLUSTER);
      await image.write(Buffer.alloc(CLUSTER, 1), 0, CLUSTER, 63 * CLUSTER);
      await image.flush();
      expect(table().equals(before)).toBe(true);
    }
    frozen.release();
    frozen.release();
    await image.close();
    expectClean(file);
  });

  it("refuses to hand out metadata that the refcounts call free", async () => {
    const bytes = numbered();
    const tableOffset = Number(bytes.readBigUInt64BE(48));
    const blockOffset = Number(bytes.readBigUInt64BE(tableOffset));
    bytes.fill(0, blockOffset, blockOffset + CLUSTER);
    const file = new MemoryFile(bytes);
    const image = await open(file);
    await image.discard(0, CLUSTER);
    await expect(image.write(Buffer.alloc(CLUSTER), 0, CLUSTER, 0)).rejects.toThrow(
      /the refcounts call a cluster free that holds the header/,
    );
    expect(file.log.filter(({ kind }) => kind === "write")).toHaveLength(0);
  });

  it.each([
    [
      "an L2 entry off a cluster",
      (b: Buffer, l2: number) => b.set([0x80, 0, 0, 0, 0, 0, 2, 0], l2),
      /points to no cluster boundary/,
    ],
    [
      "an L2 entry beyond 2^53",
      (b: Buffer, l2: number) => b.writeUInt32BE(0x80ff0000, l2),
      /outside the limit: 2\^53/,
    ],
    [
      "damaged compressed data",
      (b: Buffer, l2: number) => b.fill(0xff, b.readUInt32BE(l2 + 4), b.readUInt32BE(l2 + 4) + 20),
      /cannot be decompressed/,
    ],
  ])("reports %s", async (_name, damage, problem) => {
    const bytes = numbered("-c");
    const l1 = Number(bytes.readBigUInt64BE(40));
    damage(bytes, bytes.readUInt32BE(l1 + 4));
    const image = await open(new MemoryFile(bytes));
    await expect(image.read(Buffer.alloc(10), 0, 10, 0)).rejects.toThrow(problem);
  });

  it("answers block status as qemu-img map does", async () => {
    fs.writeFileSync(inFolder("base.raw"), Buffer.alloc(40 * CLUSTER, 1));
    qemuImg(
      "create",
      "-f",
      "qcow2",
      "-b",
      "base.raw",
      "-F",
      "raw",
      "-o",
      "cluster_size=4K",
      "image",
      `${SIZE}`,
    );
    let image = await openImage(inFolder("image"), { format: "qcow2", readOnly: false });
    await image.write(Buffer.alloc(6 * CLUSTER, 2), 0, 6 * CLUSTER, 4 * CLUSTER);
    await image.writeZeroes(20 * CLUSTER, 3 * CLUSTER, { mayUnmap: true });
    await image.writeZeroes(6 * CLUSTER, 1 * CLUSTER, { mayUnmap: false });
    await image.close();
    const expected = JSON.parse(qemuImg("map", "--output=json", "-f", "qcow2", "image")) as Record<
      string,
      unknown
    >[];
    image = await openImage(inFolder("image"), { format: "qcow2", readOnly: true });
    const actual: Record<string, unknown>[] = [];
    for (let start = 0; start < SIZE;) {
      const status: BlockStatus = await image.blockStatus(start, SIZE - start);
      const { lengthBytes: length, zero, data, depth, present } = status;
      const entry: Record<string, unknown> = { start, length, depth, present, zero, data };
      if (status.hostOffsetBytes !== undefined) entry["offset"] = status.hostOffsetBytes;
      actual.push(entry);
      start += length;
    }
    await image.close();
    expect(actual).toEqual(expected);
  });

  it("discards and zeroes a whole empty disk of 16 TiB in one step", async () => {
    qemuImg("create", "-f", "qcow2", "image", `${16 * TiB}`);
    const image = await openImage(inFolder("image"), { format: "qcow2", readOnly: false });
    const started = performance.now();
    await image.discard(0, 16 * TiB);
    await image.writeZeroes(0, 16 * TiB, { mayUnmap: true });
    expect(await image.blockStatus(0, 16 * TiB)).toMatchObject({
      lengthBytes: 16 * TiB,
      zero: true,
      present: false,
    });
    expect(performance.now() - started).toBeLessThan(20_000);
    await image.close();
    expect(fs.statSync(inFolder("image")).size).toBeLessThan(2 * MiB);
  });

  it("goes on when dirty tables crowd its cache", async () => {
    const size = 64 * 32 * MiB; // 64 tables' worth with clusters of 16 KiB, of which the cache holds fewer when small
    qemuImg("create", "-f", "qcow2", "-o", "cluster_size=2M", "image", `${40 * TiB}`);
    const image = await openImage(inFolder("image"), { format: "qcow2", readOnly: false });
    const bytesPerTable = 512 * 1024 * MiB;
    for (let table = 0; table < 40; table++) {
      await image.write(Buffer.alloc(512, table + 1), 0, 512, table * bytesPerTable + size);
      if (table % 7 === 0) await nextTurn();
    }
    for (let table = 0; table < 40; table++) {
      const bytes = await readAt(image, table * bytesPerTable + size, 512);
      expect(bytes.every((byte) => byte === table + 1)).toBe(true);
    }
    await image.close();
    qemuImg("check", "-f", "qcow2", "image");
  });
});
