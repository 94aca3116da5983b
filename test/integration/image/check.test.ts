import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  type CheckResult,
  checkExitCode,
  checkImage,
  checkResultToJson,
} from "../../../src/image/qcow2/check/check.js";
import { readHeader } from "../../../src/image/qcow2/format/header.js";

let folder: string;
let file: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-check-"));
  file = path.join(folder, "disk.qcow2");
});

afterEach(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

function create(options: string, size = "64M"): void {
  execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", "-o", options, file, size]);
}

function qemuIo(...commands: string[]): void {
  const args = commands.flatMap((command) => ["-c", command]);
  execFileSync("qemu-io", ["-f", "qcow2", ...args, file], { stdio: "ignore" });
}

/** Both checks, which must agree in counts, in messages and in exit code. */
async function expectAgreement(): Promise<CheckResult> {
  const qemu = spawnSync("qemu-img", ["check", "-f", "qcow2", "--output=json", file], { encoding: "utf8" });
  const ours = await checkImage(file, { format: "qcow2" });
  expect(checkResultToJson(ours)).toEqual(JSON.parse(qemu.stdout));
  const theirMessages = qemu.stderr.split("\n").filter((line) => /^(ERROR|Leaked|Can't)/.test(line));
  expect(ours.messages).toEqual(theirMessages.map((line) => line.replace(/^ERROR: /, "ERROR ")));
  expect(checkExitCode(ours)).toBe(qemu.status);
  return ours;
}

class Poker {
  private readonly fd = fs.openSync(file, "r+");
  readonly header = readHeader(
    (buffer, offset) => fs.readSync(this.fd, buffer, 0, buffer.length, offset),
    file,
  );

  get(offset: number): bigint {
    const bytes = Buffer.alloc(8);
    fs.readSync(this.fd, bytes, 0, 8, offset);
    return bytes.readBigUInt64BE();
  }

  set(offset: number, value: bigint): void {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64BE(value);
    fs.writeSync(this.fd, bytes, 0, 8, offset);
  }

  l2At(index = 0): number {
    return Number(this.get(this.header.l1TableOffset + index * 8) & 0x00fffffffffffe00n);
  }

  blockAt(): number {
    return Number(this.get(this.header.refcountTableOffset));
  }

  setRefcount16(cluster: number, refcount: number): void {
    const bytes = Buffer.alloc(2);
    bytes.writeUInt16BE(refcount);
    fs.writeSync(this.fd, bytes, 0, 2, this.blockAt() + cluster * 2);
  }
}

const COPIED = 1n << 63n;

describe("checkImage on sound images", () => {
  it.each([
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=2M",
    "compat=0.10",
    "refcount_bits=1",
    "refcount_bits=2",
    "refcount_bits=4",
    "refcount_bits=8",
    "refcount_bits=32",
    "refcount_bits=64",
    "extended_l2=on",
    "compression_type=zstd",
  ])("agrees with qemu-img check on -o %s", async (options) => {
    create(options);
    qemuIo(
      "write -P 1 1M 2M",
      "write -P 2 0 1000",
      "write -z 8M 1M",
      "write -P 3 40M 100k",
      "discard 1M 128k",
    );
    for (const at of ["16M", "24M", "26M"]) qemuIo(`write -c -P 5 ${at} 2M`);
    const result = await expectAgreement();
    expect(result).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 });
    expect(result.compressedClusters).toBeGreaterThan(0);
  });

  it("counts snapshots, and the clusters that they share", async () => {
    create("cluster_size=4k");
    qemuIo("write -P 1 0 1M");
    execFileSync("qemu-img", ["snapshot", "-c", "before", file]);
    qemuIo("write -P 2 512k 1M");
    execFileSync("qemu-img", ["snapshot", "-c", "after", file]);
    expect(await expectAgreement()).toMatchObject({ corruptions: 0, leaks: 0 });
  });

  it("counts persistent bitmaps", async () => {
    create("cluster_size=4k");
    execFileSync("qemu-img", ["bitmap", "--add", "-g", "512", file, "first"]);
    qemuIo("write -P 1 0 1M", "write -P 1 33M 64k");
    execFileSync("qemu-img", ["bitmap", "--add", file, "second"]);
    qemuIo("write -P 1 5M 1M");
    expect(await expectAgreement()).toMatchObject({ corruptions: 0, leaks: 0 });
  });

  it("takes an image with an external data file", async () => {
    const dataFile = path.join(folder, "data.raw");
    create(`data_file=${dataFile},cluster_size=64k`);
    qemuIo("write -P 1 0 1M");
    expect(await expectAgreement()).toMatchObject({ corruptions: 0, leaks: 0 });
  });

  it("spans several refcount blocks and L2 tables", async () => {
    create("cluster_size=512", "8M");
    qemuIo("write -P 1 0 3M", "write -P 2 5M 100k");
    await expectAgreement();
  });
});

describe("checkImage on damaged images", () => {
  const DAMAGES: [name: string, damage: (image: Poker) => void][] = [
    ["a leaked cluster", (image) => image.set(image.l2At(), 0n)],
    ["a refcount of 0 on a data cluster", (image) => image.setRefcount16(8, 0)],
    ["a refcount too high", (image) => image.setRefcount16(8, 2)],
    ["a refcount of 0 on the header", (image) => image.setRefcount16(0, 0)],
    ["two L2 entries for one host cluster", (image) => image.set(image.l2At() + 8, image.get(image.l2At()))],
    [
      "an L2 entry for the L1 table",
      (image) => image.set(image.l2At() + 8, BigInt(image.header.l1TableOffset) | COPIED),
    ],
    [
      "COPIED missing on a data cluster",
      (image) => image.set(image.l2At(), image.get(image.l2At()) & ~COPIED),
    ],
    [
      "COPIED missing on an L2 table",
      (image) => image.set(image.header.l1TableOffset, image.get(image.header.l1TableOffset) & ~COPIED),
    ],
    ["a misaligned data cluster", (image) => image.set(image.l2At(), image.get(image.l2At()) | 0x200n)],
    ["a misaligned zero cluster", (image) => image.set(image.l2At(), image.get(image.l2At()) | 0x201n)],
    ["reserved bits in an L2 entry", (image) => image.set(image.l2At(), image.get(image.l2At()) | 0x10n)],
    [
      "reserved bits in an L1 entry",
      (image) => image.set(image.header.l1TableOffset, image.get(image.header.l1TableOffset) | (1n << 60n)),
    ],
    ["a data cluster far outside the file", (image) => image.set(image.l2At(), COPIED | 0x40000000000n)],
    ["a data cluster just past the file", (image) => image.set(image.l2At(), COPIED | BigInt(endOfFile()))],
    [
      "an L2 table outside the file",
      (image) => image.set(image.header.l1TableOffset + 8, COPIED | 0x7000000000n),
    ],
    [
      "a misaligned L2 table",
      (image) => image.set(image.header.l1TableOffset, image.get(image.header.l1TableOffset) | 0x200n),
    ],
    [
      "a refcount block outside the file",
      (image) => image.set(image.header.refcountTableOffset + 8, 0x7000000000n),
    ],
    ["a misaligned refcount block", (image) => image.set(image.header.refcountTableOffset + 8, 0x10200n)],
    [
      "a misaligned first refcount block",
      (image) => image.set(image.header.refcountTableOffset, BigInt(image.blockAt()) | 0x200n),
    ],
    [
      "a refcount block beyond 2^53",
      (image) => image.set(image.header.refcountTableOffset, BigInt(image.blockAt()) | (1n << 58n)),
    ],
    ["an L1 table outside the file", (image) => image.set(40, 0x7000000000n)],
    ["a refcount table outside the file", (image) => image.set(48, 0x7000000000n)],
    ["a snapshot table outside the file", (image) => setSnapshots(image, 2, 0x7000000000n)],
    ["reserved bits in the refcount table", (image) => image.set(image.header.refcountTableOffset + 8, 0x1n)],
    [
      "one refcount block used twice",
      (image) => image.set(image.header.refcountTableOffset + 8, BigInt(image.blockAt())),
    ],
    ["no first refcount block", (image) => image.set(image.header.refcountTableOffset, 0n)],
    [
      "COPIED on a compressed cluster",
      (image) => {
        const at = image.l2At() + (8 * (32 * 2 ** 20)) / 65536;
        image.set(at, image.get(at) | COPIED);
      },
    ],
  ];

  function setSnapshots(image: Poker, count: number, offset: bigint): void {
    image.set(56, (image.get(56) & ~0xffffffffn) | BigInt(count));
    image.set(64, offset);
  }

  function endOfFile(): number {
    return Math.ceil(fs.statSync(file).size / 65536) * 65536;
  }

  it.each(DAMAGES)("agrees with qemu-img check on %s", async (_name, damage) => {
    create("cluster_size=64k", "1G");
    qemuIo("write -P 1 0 64k", "write -P 2 128k 256k", "write -z 1M 64k", "write -c -P 3 32M 64k");
    damage(new Poker());
    const result = await expectAgreement();
    expect(result.corruptions + result.leaks).toBeGreaterThan(0);
  });

  it("agrees on an overflow of narrow refcounts", async () => {
    create("cluster_size=64k,refcount_bits=1", "64M");
    qemuIo("write -P 1 0 128k");
    const image = new Poker();
    image.set(image.l2At() + 8, image.get(image.l2At()));
    expect((await expectAgreement()).corruptions).toBeGreaterThan(0);
  });

  it("agrees on a file that was cut short", async () => {
    create("cluster_size=64k");
    qemuIo("write -P 1 0 4M");
    fs.truncateSync(file, 2 * 2 ** 20 + 1000);
    expect((await expectAgreement()).corruptions).toBeGreaterThan(0);
  });

  it("agrees on a file that one wild entry made huge", async () => {
    create("cluster_size=4k");
    qemuIo("write -P 1 0 8k");
    const image = new Poker();
    // Past all that the refcount table speaks of; and a leak in the last block that there is.
    const wild = 2 ** 38;
    image.set(image.l2At() + 8, BigInt(wild) | COPIED);
    image.setRefcount16(2000, 1);
    fs.truncateSync(file, wild + 4096);
    expect(await expectAgreement()).toMatchObject({ corruptions: 2, leaks: 2 });
  });

  it("agrees on a damaged snapshot's L1 table", async () => {
    create("cluster_size=64k");
    qemuIo("write -P 1 0 256k");
    execFileSync("qemu-img", ["snapshot", "-c", "one", file]);
    const image = new Poker();
    const l1 = Number(image.get(image.header.snapshotsOffset));
    image.set(l1, 0n);
    expect((await expectAgreement()).leaks).toBeGreaterThan(0);
  });
});

describe("checkImage where nothing can be checked", () => {
  it.each([
    ["a raw image", () => fs.writeFileSync(file, Buffer.alloc(65536)), "does not support checks"],
    ["a folder", () => fs.mkdirSync(file), "is a directory, not an image"],
    ["a cut header", () => fs.writeFileSync(file, "QFI\xfb\0\0\0\x03", "latin1"), "not a qcow2 image"],
    ["nothing at all", () => undefined, "no such file or directory"],
  ])("says so for %s", async (_name, prepare, problem) => {
    prepare();
    await expect(checkImage(file)).rejects.toThrow(problem);
  });
});
