// Parts of check and repair: refcounts of every width, the snapshot table, the command's arguments, header limits.
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { parseCheckRequest, repairLines } from "../../../../src/cli/actions/check.js";
import { refcountIn, setRefcountIn } from "../../../../src/image/qcow2/check/blocks.js";
import { checkExitCode, checkImage } from "../../../../src/image/qcow2/check/check.js";
import { readHeader } from "../../../../src/image/qcow2/format/header.js";
import { checkMetadata } from "../../../../src/image/qcow2/check/repair.js";
import {
  findSnapshot,
  readSnapshotTable,
  serialiseSnapshotTable,
} from "../../../../src/image/qcow2/format/snapshots.js";
import { Poker, createImage, qemuCheck, qemuIo, snapshot } from "../../../support/qcow2-damage.js";
import { MemoryFile } from "../../../support/qcow2-memory.js";

let folder: string;
let file: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-repair-unit-"));
  file = path.join(folder, "disk.qcow2");
});

afterEach(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

describe("refcounts in a block", () => {
  it.each([1, 2, 4, 8, 16, 32, 64])("are kept apart at %d bits", (bits) => {
    const view = new DataView(new ArrayBuffer(64));
    const count = (64 * 8) / bits;
    const max = Math.min(2 ** bits - 1, 2 ** 53 - 1);
    const values = Array.from({ length: count }, (_, index) => (index * 7919) % (max + 1));
    values.forEach((value, index) => setRefcountIn(view, index, bits, max - value));
    values.forEach((value, index) => setRefcountIn(view, index, bits, value));
    expect(values.map((_, index) => refcountIn(view, index, bits))).toEqual(values);
  });

  it("are filled from the least significant bit on below a byte", () => {
    const view = new DataView(new ArrayBuffer(1));
    setRefcountIn(view, 0, 2, 1);
    setRefcountIn(view, 3, 2, 3);
    expect(view.getUint8(0)).toBe(0b11000001);
  });
});

describe("the snapshot table", () => {
  it("is made whole: what an entry lacks is added, what is too much is cut off", () => {
    createImage(file, "cluster_size=64k");
    for (const name of ["one", "two", "three"]) snapshot(file, name);
    const image = new Poker(file);
    image.setSnapshotExtra((index) => [0, 1500, 24][index] ?? 0);
    const read = (offset: number, length: number): DataView => {
      const bytes = image.bytes(offset, length);
      return new DataView(bytes.buffer, bytes.byteOffset, length);
    };
    expect(() => readSnapshotTable(image.header, read, file)).toThrow(/1500 bytes of extra data/);
    const { entries } = readSnapshotTable(image.header, read, file, true);
    expect(entries.map(({ name, diskSizeBytes }) => [name, diskSizeBytes])).toEqual([
      ["one", null],
      ["two", 2 ** 23],
      ["three", 2 ** 23],
    ]);
    const whole = Buffer.from(serialiseSnapshotTable(entries, 12345));
    const again = readSnapshotTable(
      { snapshotCount: 3, snapshotsOffset: 0 },
      (offset, length) => new DataView(Uint8Array.from(whole.subarray(offset, offset + length)).buffer),
      file,
    );
    expect(again.entries.map((entry) => [entry.name, entry.diskSizeBytes, entry.extraBytes])).toEqual([
      ["one", 12345, 16],
      ["two", 2 ** 23, 1024],
      ["three", 2 ** 23, 24],
    ]);
    expect(again.lengthBytes).toBe(whole.length);
  });

  it("gives an id precedence over a name, and lists no more names than a line holds", () => {
    createImage(file, "cluster_size=64k");
    snapshot(file, "2");
    snapshot(file, "1");
    const image = new Poker(file);
    const { entries } = readSnapshotTable(
      image.header,
      (offset, length) => new DataView(Uint8Array.from(image.bytes(offset, length)).buffer),
      file,
    );
    expect(findSnapshot(entries, "1", file)).toMatchObject({ id: "1", name: "2" });
    expect(() => findSnapshot([], "1", file)).toThrow(/the image has no internal snapshots/);
    const [entry] = entries;
    const many = entry === undefined ? [] : Array.from({ length: 30 }, () => entry);
    expect(() => findSnapshot(many, "x", file)).toThrow(/and 10 more/);
  });
});

describe("a repair", () => {
  it("writes nothing to a sound image", async () => {
    createImage(file, "cluster_size=4k");
    qemuIo(file, "write -P 1 0 1M");
    const bytes = fs.readFileSync(file);
    const memory = new MemoryFile(bytes);
    const header = readHeader((buffer, offset) => bytes.copy(buffer, 0, offset), file);
    await checkMetadata(memory, header, "all");
    expect(memory.log).toEqual([]);
  });

  it("clears autoclear bits that it does not know, and keeps those of bitmaps", async () => {
    createImage(file, "cluster_size=4k");
    spawnSync("qemu-img", ["bitmap", "--add", file, "first"]);
    const image = new Poker(file);
    expect(image.get(88)).toBe(1n);
    image.set(88, 1n | (1n << 40n));
    await checkImage(file, { repair: "all" });
    expect(image.get(88)).toBe(1n);
  });

  it("switches to a new structure by one write within the header's first sector", async () => {
    createImage(file, "cluster_size=4k");
    qemuIo(file, "write -P 1 0 1M");
    new Poker(file).set(new Poker(file).refcountTable, 0n);
    const bytes = fs.readFileSync(file);
    const memory = new MemoryFile(bytes);
    const header = readHeader((buffer, offset) => bytes.copy(buffer, 0, offset), file);
    await checkMetadata(memory, header, "all");
    const kinds = memory.log.map((event) =>
      event.kind !== "write"
        ? event.kind
        : event.offsetBytes < bytes.length
          ? `at ${event.offsetBytes}`
          : "new",
    );
    const beforeSwitch = kinds.slice(0, kinds.indexOf("at 48"));
    expect(kinds.filter((kind) => kind.startsWith("at "))).toEqual(["at 48"]);
    expect(beforeSwitch.at(-1)).toBe("sync-done");
    expect(beforeSwitch).toContain("new");
  });
});

describe("a new structure on a block device", () => {
  const CLUSTER = 4096;

  /** An image without a refcount block, on a device with so many clusters behind it. */
  function device(spareClusters: number): { memory: MemoryFile; bytes: Buffer } {
    createImage(file, "cluster_size=4k", "1M");
    qemuIo(file, "write -P 1 0 1M");
    const image = new Poker(file);
    image.set(image.refcountTable, 0n);
    const stored = fs.readFileSync(file);
    const whole = Math.ceil(stored.length / CLUSTER) * CLUSTER;
    const bytes = Buffer.alloc(whole + spareClusters * CLUSTER);
    stored.copy(bytes);
    return { memory: Object.assign(new MemoryFile(bytes), { isBlockDevice: true }), bytes };
  }

  function headerOf(bytes: Buffer): ReturnType<typeof readHeader> {
    return readHeader((buffer, offset) => bytes.copy(buffer, 0, offset), file);
  }

  it.each([
    ["goes behind the last cluster in use", 40],
    ["goes to the old structure's place if there is no other", 0],
  ])("%s", async (_name, spareClusters) => {
    const { memory, bytes } = device(spareClusters);
    await checkMetadata(memory, headerOf(bytes), "all");
    expect(memory.endOffset).toBe(bytes.length);
    fs.writeFileSync(file, memory.content());
    expect(qemuCheck(file).status).toBe(0);
    const { refcountTableOffset } = headerOf(memory.content());
    expect(refcountTableOffset >= bytes.length - spareClusters * CLUSTER).toBe(spareClusters > 0);
    const { status } = spawnSync("qemu-io", ["-f", "qcow2", "-r", "-c", "read -P 1 0 1M", file]);
    expect(status).toBe(0);
  });
});

describe("headers that cannot be checked", () => {
  const FIELDS: [name: string, damage: (image: Poker) => void][] = [
    ["a header that is too long", (image) => image.set32(100, 0xffffff00)],
    ["a header length of 0", (image) => image.set32(100, 0)],
    ["a backing file name that is too long", (image) => (image.set(8, 0x200n), image.set32(16, 0xffff))],
    ["an L1 table of too many entries", (image) => image.set32(36, 0x7fffffff)],
    ["an L1 table too small for the disk", (image) => image.set32(36, 0)],
    ["an L1 table at no cluster boundary", (image) => image.set(40, 0x1234n)],
    ["a refcount table at no cluster boundary", (image) => image.set(48, 0x1234n)],
    ["a refcount table that is too large", (image) => image.set32(56, 0x7fffffff)],
    ["clusters of 4 MiB", (image) => image.set32(20, 22)],
    ["clusters of 256 bytes", (image) => image.set32(20, 8)],
    ["refcounts of 128 bits", (image) => image.set32(96, 7)],
    ["a snapshot table at no cluster boundary", (image) => (image.set(64, 0x1234n), image.set32(60, 1))],
    ["too many snapshots", (image) => (image.set(64, 0x50000n), image.set32(60, 70000))],
    ["version 4", (image) => image.set32(4, 4)],
    ["an unknown incompatible feature", (image) => image.set(72, 1n << 62n)],
    [
      "an extension that leaves the header",
      (image) => (image.set32(112, 0x1234), image.set32(116, 0x7fffffff)),
    ],
  ];

  it.each(FIELDS)("080: %s: exit code 1, as qemu-img check", async (_name, damage) => {
    createImage(file, "cluster_size=64k");
    damage(new Poker(file));
    const bytes = fs.readFileSync(file);
    expect(qemuCheck(file).status).toBe(1);
    const code = await checkImage(file, { format: "qcow2", repair: "all" }).then(checkExitCode, () => 1);
    expect(code).toBe(1);
    expect(fs.readFileSync(file).equals(bytes)).toBe(true);
  });
});

describe("the arguments of check", () => {
  it.each([
    [undefined, { repair: "a.qcow2" }, { path: "a.qcow2", repair: "all" }],
    ["a.qcow2", { repair: true }, { path: "a.qcow2", repair: "all" }],
    ["a.qcow2", { repair: "leaks" }, { path: "a.qcow2", repair: "leaks" }],
    ["a.qcow2", {}, { path: "a.qcow2", repair: undefined }],
    [undefined, { repair: "./all" }, { path: "./all", repair: "all" }],
  ] as const)("%s with %j", (image, flags, request) => {
    expect(parseCheckRequest(image, flags)).toEqual(request);
  });

  it("says nothing of a repair that changed nothing", async () => {
    createImage(file, "cluster_size=64k");
    expect(repairLines(await checkImage(file, { repair: "all" }))).toEqual([]);
  });
});
