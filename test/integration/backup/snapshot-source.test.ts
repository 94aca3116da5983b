// Internal snapshots as sources: `--snapshot NAME` reads the disk as of it. The oracle is what the disk held when the
// snapshot was made (qemu-img convert -l reads a snapshot with the active disk's size, so it serves for equal sizes).
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { openImage } from "../../../src/image/open.js";
import { cowcatcher, type RunResult } from "../../support/cli.js";
import { Poker, createImage, guestDigest, qemuIo, snapshot } from "../../support/qcow2-damage.js";

let folder: string;
let file: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-snapshots-"));
  file = path.join(folder, "disk.qcow2");
});

afterEach(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

function resize(size: string): void {
  execFileSync("qemu-img", ["resize", "-q", "-f", "qcow2", "--shrink", file, size]);
}

/** Through the driver on the main thread. */
async function readDigest(name: string): Promise<string> {
  const image = await openImage(file, { readOnly: true, snapshot: name });
  const content = Buffer.alloc(image.sizeBytes);
  await image.read(content, 0, content.length, 0);
  await image.close();
  return createHash("sha256").update(content).digest("hex");
}

async function backup(...args: string[]): Promise<RunResult> {
  return cowcatcher(["backup", ...args], { cwd: folder });
}

/** The backup of a snapshot has the digest and the size that the disk had. */
async function expectBackup(name: string, digest: string | null, sizeBytes: number): Promise<void> {
  const target = path.join(folder, "target.qcow2");
  const { code, stderr } = await backup("--force", "--verify", "--snapshot", name, file, target);
  expect(stderr).toBe("");
  expect(code).toBe(0);
  expect(guestDigest(target)).toBe(digest);
  expect(new Poker(target).header.sizeBytes).toBe(sizeBytes);
}

const MiB = 2 ** 20;

describe("backup --snapshot", () => {
  it.each([
    "cluster_size=64k",
    "cluster_size=4k,refcount_bits=64",
    "compat=0.10",
    "extended_l2=on",
    "compression_type=zstd",
  ])("reads the disk as of each snapshot, by name and by id (-o %s)", async (options) => {
    createImage(file, options);
    qemuIo(file, "write -P 1 0 1M", "write -P 2 4M 100k", "write -c -P 7 6M 64k");
    const first = guestDigest(file);
    snapshot(file, "first");
    qemuIo(file, "write -P 3 512k 1M", "write -z 4M 64k", "write -P 8 6M 64k");
    const second = guestDigest(file);
    snapshot(file, "second");
    qemuIo(file, "write -P 4 0 8M");
    expect(await readDigest("first")).toBe(first);
    expect(await readDigest("1")).toBe(first);
    expect(await readDigest("second")).toBe(second);
    if (/64k|extended/.test(options)) await expectBackup("2", second, 8 * MiB);
    expect(guestDigest(file, "first")).toBe(first);
  });

  it("has the snapshot's own size, smaller or larger than the disk's", async () => {
    createImage(file, "cluster_size=4k", "3M");
    qemuIo(file, "write -P 1 1M 2M");
    const small = guestDigest(file);
    snapshot(file, "small");
    resize("64M");
    qemuIo(file, "write -P 2 60M 4M", "write -P 3 1M 64k");
    const large = guestDigest(file);
    snapshot(file, "large");
    resizeWithSnapshots("8M");
    await expectBackup("small", small, 3 * MiB);
    await expectBackup("large", large, 64 * MiB);
  });

  /** QEMU does not shrink an image with snapshots; the header's size is all that would change. */
  function resizeWithSnapshots(size: "8M"): void {
    expect(size).toBe("8M");
    const image = new Poker(file);
    image.set(24, BigInt(8 * MiB));
  }

  it("takes a snapshot of an empty disk, and of a disk of size 0", async () => {
    createImage(file, "cluster_size=64k", "0");
    snapshot(file, "nothing");
    resize("4M");
    snapshot(file, "empty");
    qemuIo(file, "write -P 1 0 4M");
    const target = path.join(folder, "target.raw");
    const { code, stderr } = await backup("--snapshot", "nothing", file, target);
    expect(stderr).toMatch(/^cowcatcher: warning: \S+: has 0 bytes, so there is nothing to copy .*\n$/);
    expect(code).toBe(0);
    expect(fs.statSync(target).size).toBe(0);
    expect(await backup("--force", "--snapshot", "empty", file, target)).toMatchObject({ code: 0 });
    expect(fs.readFileSync(target).equals(Buffer.alloc(4 * MiB))).toBe(true);
  });

  it("does not look at a machine's state behind the disk", async () => {
    createImage(file, "cluster_size=64k", "4M");
    qemuIo(file, "write -P 1 0 1M", `write -b -P 9 ${4 * MiB} 128k`);
    const digest = guestDigest(file);
    snapshot(file, "with state");
    qemuIo(file, "write -P 2 0 1M");
    expect(await readDigest("with state")).toBe(digest);
  });

  it("reads through to the backing file", async () => {
    const base = path.join(folder, "base.qcow2");
    createImage(base, "cluster_size=64k", "4M");
    qemuIo(base, "write -P 5 0 4M");
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", file]);
    qemuIo(file, "write -P 1 1M 64k");
    const digest = guestDigest(file);
    snapshot(file, "over");
    qemuIo(file, "write -P 2 0 4M");
    expect(await readDigest("over")).toBe(digest);
  });

  it("names the snapshots there are if there is none of that name", async () => {
    createImage(file, "cluster_size=64k");
    snapshot(file, "monday");
    snapshot(file, "tuesday");
    const { code, stderr } = await backup("--snapshot", "sunday", file, path.join(folder, "t.raw"));
    expect(code).toBe(1);
    expect(stderr).toMatch(/no internal snapshot 'sunday' \(there are: monday \(id 1\), tuesday \(id 2\)\)/);
    expect(fs.existsSync(path.join(folder, "t.raw"))).toBe(false);
  });

  it.each([
    [
      "a live backup",
      ["--control", "sock", "--snapshot", "x", "t.raw"],
      2,
      /--snapshot: does not go with --control/,
    ],
    [
      "a raw source",
      ["-f", "raw", "--snapshot", "x", "disk.qcow2", "t.raw"],
      1,
      /raw image has no internal snapshots/,
    ],
  ] as const)("is refused for %s", async (_name, args, code, message) => {
    createImage(file, "cluster_size=64k");
    const result = await backup(...args);
    expect(result.code).toBe(code);
    expect(result.stderr).toMatch(message);
  });

  it("refuses a snapshot whose L1 table is damaged", async () => {
    createImage(file, "cluster_size=64k");
    snapshot(file, "broken");
    const image = new Poker(file);
    image.set32(image.header.snapshotsOffset + 8, 0);
    const { code, stderr } = await backup("--snapshot", "broken", file, "null:");
    expect(code).toBe(1);
    expect(stderr).toMatch(/snapshot 'broken' is damaged: its L1 table is too small for its disk/);
  });
});

describe("openImage with a snapshot", () => {
  it("is read-only, and cannot be asked to write", async () => {
    createImage(file, "cluster_size=64k");
    snapshot(file, "one");
    const image = await openImage(file, { readOnly: true, snapshot: "one" });
    await expect(image.write(Buffer.alloc(1), 0, 1, 0)).rejects.toThrow(/read-only/);
    await image.close();
    await expect(openImage(file, { readOnly: false, snapshot: "one" })).rejects.toThrow(/cannot be written/);
  });
});

describe("map and compare --snapshot", () => {
  it("show the disk as of the snapshot", async () => {
    createImage(file, "cluster_size=64k", "1M");
    qemuIo(file, "write -P 1 0 64k");
    const before = path.join(folder, "before.qcow2");
    fs.copyFileSync(file, before);
    snapshot(file, "one");
    qemuIo(file, "write -P 2 0 512k");
    const now = await cowcatcher(["map", "--json", file]);
    const then = await cowcatcher(["map", "--json", "--snapshot", "one", file]);
    const lengths = ({ stdout }: RunResult): number[] =>
      (JSON.parse(stdout) as { length: number }[]).map(({ length }) => length);
    expect(lengths(now)).toEqual([524288, 524288]);
    expect(lengths(then)).toEqual([65536, 983040]);
    expect((await cowcatcher(["compare", file, before])).code).toBe(1);
    expect((await cowcatcher(["compare", "--snapshot", "one", file, before])).code).toBe(0);
  });
});
