// What QEMU asks of persistent bitmaps and of the header before it opens an image, asked by `check` as well. QEMU is the
// judge: an image that qemu-img refuses or finds fault with is not clean, one that it finds clean is.
import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import { afterAll, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { checkExitCode, checkImage, type CheckResult } from "../../../src/image/qcow2/check/check.js";
import { openImage } from "../../../src/image/open.js";
import { readHeader } from "../../../src/image/qcow2/format/header.js";
import { cowcatcher } from "../../support/cli.js";
import { Random } from "../../support/random.js";
import { scratchFolder, Server, stopAll } from "../../support/server.js";

let folder: string;
let image: string;
let directoryOffset: number;

beforeEach(() => {
  folder = scratchFolder();
  image = join(folder, "disk.qcow2");
  qemuImg("create", "-q", "-f", "qcow2", image, "64M");
  for (const name of ["b0", "second"]) qemuImg("bitmap", "--add", "-g", "64K", image, name);
  execFileSync("qemu-io", ["-f", "qcow2", "-c", "write -P 1 0 1M", image], { stdio: "ignore" });
  directoryOffset = headerOf().bitmaps?.directoryOffset ?? 0;
});
afterAll(stopAll);

function qemuImg(...args: string[]): void {
  execFileSync("qemu-img", args, { stdio: "ignore" });
}

function headerOf() {
  const bytes = fs.readFileSync(image);
  return readHeader((buffer, offset) => bytes.copy(buffer, 0, offset), image);
}

function patch(offset: number, ...bytes: number[]): void {
  const fd = fs.openSync(image, "r+");
  fs.writeSync(fd, Uint8Array.from(bytes), 0, bytes.length, offset);
  fs.closeSync(fd);
}

function qemuCheckCode(): number | null {
  return spawnSync("qemu-img", ["check", "-f", "qcow2", image]).status;
}

/** 1 also where it could not be made. */
async function check(repair?: "all" | "leaks"): Promise<{ code: number; result: CheckResult | null }> {
  try {
    const result = await checkImage(image, { format: "qcow2", repair });
    return { code: checkExitCode(result), result };
  } catch (error) {
    expect(error).toBeInstanceOf(CowcatcherError);
    return { code: 1, result: null };
  }
}

/** Of a record: 8 bytes table offset, 4 table size, 4 flags, type, granularity, 2 name size, 4 extra data size. */
const DAMAGES: [string, number, number[]][] = [
  ["granularity of 3 bits", 17, [3]],
  ["granularity of 40 bits", 17, [40]],
  ["a type that is not known", 16, [2]],
  ["a flag that is not known", 12, [0x80]],
  ["a table of no entries", 8, [0, 0, 0, 0]],
  ["a table of too many entries", 8, [0x10, 0, 0, 0]],
  ["a table at no cluster boundary", 6, [0x12, 0x34]],
  ["a table behind the end of the file", 3, [1]],
  ["a table at 0", 0, [0, 0, 0, 0, 0, 0, 0, 0]],
  ["a name that leaves the directory", 18, [0xff, 0xff]],
  ["extra data", 23, [8]],
];

describe("check of a damaged bitmap directory", () => {
  it("starts with an image that is clean", async () => {
    expect([(await check()).code, qemuCheckCode()]).toEqual([0, 0]);
  });

  it.each(DAMAGES)(
    "reports %s, and its repair drops the bitmaps and their clusters",
    async (what, at, bytes) => {
      patch(directoryOffset + at, ...bytes);
      // QEMU opens an image whose bitmap's table lies behind the end of the file, and finds it in the check.
      expect(qemuCheckCode()).toBe(what.includes("behind the end") ? 2 : 1);
      const found = await check();
      expect(found.code).toBe(1);
      expect(found.result?.messages.join("\n")).toContain("ERROR bitmap directory: ");
      // Nothing is freed for a leak while nobody knows what the bitmaps refer to.
      const before = fs.readFileSync(image);
      expect((await check("leaks")).code).toBe(1);
      expect(Buffer.compare(fs.readFileSync(image), before)).toBe(0);

      const repaired = await check("all");
      expect(repaired.code).toBe(0);
      expect(repaired.result?.leaksFixed).toBeGreaterThan(0);
      expect(qemuCheckCode()).toBe(0);
      execFileSync("qemu-io", ["-f", "qcow2", "-c", "read -P 1 0 1M", image], { stdio: "ignore" });
    },
  );

  it("reports two bitmaps of one name, and a count that is not the directory's", async () => {
    const bytes = fs.readFileSync(image);
    // The second record's name is as long as the first's then.
    qemuImg("bitmap", "--remove", image, "second");
    qemuImg("bitmap", "--add", "-g", "64K", image, "b1");
    directoryOffset = headerOf().bitmaps?.directoryOffset ?? 0;
    const directory = fs.readFileSync(image).subarray(directoryOffset, directoryOffset + 200);
    const second = directory.indexOf("b1");
    const other = directory.indexOf("b0");
    patch(directoryOffset + Math.max(second, other) + 1, directory[Math.min(second, other) + 1] ?? 0);
    expect(qemuCheckCode()).toBe(1);
    expect((await check()).code).toBe(1);

    fs.writeFileSync(image, bytes);
    const extension = bytes.indexOf(Buffer.from([0x23, 0x85, 0x28, 0x75]));
    for (const count of [0, 1, 3]) {
      patch(extension + 8 + 3, count);
      expect([count, qemuCheckCode()]).toEqual([count, 1]);
      expect([count, (await check()).code]).toEqual([count, 1]);
    }
  });

  it("agrees with QEMU on whether an image with random damage there is clean", async () => {
    const sound = fs.readFileSync(image);
    const random = new Random(42);
    const extension = sound.indexOf(Buffer.from([0x23, 0x85, 0x28, 0x75]));
    const { bitmaps } = headerOf();
    for (let round = 0; round < 60; round++) {
      fs.writeFileSync(image, sound);
      const inHeader = random.chance(0.3);
      const at = inHeader
        ? extension + 8 + random.below(24)
        : directoryOffset + random.below(bitmaps?.directoryBytes ?? 1);
      const value = random.chance(0.5) ? (sound[at] ?? 0) ^ (1 << random.below(8)) : random.below(256);
      patch(at, value);
      const isCleanForQemu = qemuCheckCode() === 0;
      const { code } = await check();
      expect(`${at} = ${value}: ${code === 0}`).toBe(`${at} = ${value}: ${isCleanForQemu}`);
    }
  });
});

describe("the header, as QEMU's iotest 080 breaks it", () => {
  const cases: [string, [number, number[]][]][] = [
    ["a huge unknown extension", [[104, [0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff, 0xff]]]],
    [
      "one that the backing file's name begins in",
      [
        [104, [0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff, 0xff]],
        [8, [0, 0, 0, 0, 0, 0, 0, 108]],
      ],
    ],
    ["a backing name inside the end marker", [[8, [0, 0, 0, 0, 0, 0, 0, 118]]]],
    ["a backing format of 16 bytes", [[104, [0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 16]]]],
  ];
  it.each(cases)("is refused by open and by check: %s", async (_what, patches) => {
    qemuImg("create", "-q", "-f", "qcow2", image, "64M");
    for (const [offset, bytes] of patches) patch(offset, ...bytes);
    expect(qemuCheckCode()).toBe(1);
    expect((await check()).code).toBe(1);
    await expect(openImage(image, { format: "qcow2", readOnly: true })).rejects.toMatchObject({
      code: "FORMAT",
    });
  });
});

describe("bitmaps of a disk that is served", () => {
  it("are named at the start when they go out of date, and not when they do not", async () => {
    const first = await Server.start(folder, [image], { args: ["--read-only"] });
    await first.stop();
    expect(first.process.stderr).toBe("");
    const second = await Server.start(folder, [image]);
    await second.stop();
    expect(second.process.stderr).toContain("its persistent bitmaps 'b0', 'second' will be out of date");
    expect(second.process.stderr.trim().split("\n")).toHaveLength(1);
    const third = await Server.start(folder, [image]);
    await third.stop();
    expect(third.process.stderr).toBe("");
  });
});

describe("what a guest may not write over", () => {
  /** Puts `hostOffset` into the L2 entry of the guest's cluster 20. */
  async function writeOver(hostOffset: number): Promise<Promise<void> | undefined> {
    const { l1TableOffset } = headerOf();
    const l2 = Number(fs.readFileSync(image).readBigUInt64BE(l1TableOffset) & 0x00fffffffffffe00n);
    const entry = Buffer.alloc(8);
    entry.writeBigUInt64BE(BigInt(hostOffset) | (1n << 63n));
    patch(l2 + 20 * 8, ...entry);
    const opened = await openImage(image, { format: "qcow2", readOnly: false });
    try {
      await opened.write(new Uint8Array(512), 0, 512, 20 * 65536);
    } finally {
      await opened.close();
    }
    return undefined;
  }

  it("is a snapshot's L1 table, and the bitmap directory", async () => {
    await expect(writeOver(directoryOffset)).rejects.toThrow("write over the bitmap directory");
    qemuImg("create", "-q", "-f", "qcow2", image, "64M");
    execFileSync("qemu-io", ["-f", "qcow2", "-c", "write 0 64k", image], { stdio: "ignore" });
    qemuImg("snapshot", "-c", "one", image);
    execFileSync("qemu-io", ["-f", "qcow2", "-c", "write 0 64k", image], { stdio: "ignore" });
    const bytes = fs.readFileSync(image);
    const snapshotL1 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(64))));
    await expect(writeOver(snapshotL1)).rejects.toThrow("write over the L1 table of snapshot 'one'");
  });
});

it("says on the command line how a damaged directory is repaired", async () => {
  patch(directoryOffset + 17, 3);
  const { code, stdout, stderr } = await cowcatcher(["check", image]);
  expect(code).toBe(1);
  expect(stdout + stderr).toContain("--repair all drops them");
});
