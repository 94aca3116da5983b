// Dirty and corrupt images: who may open them, and what an open for writing does first. And the command's repair.
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { openImage } from "../../../src/image/open.js";
import { cowcatcher, run } from "../../support/cli.js";
import {
  COPIED,
  Poker,
  createImage,
  guestDigest,
  qemuCheck,
  qemuIo,
  qemuIoKilled,
  snapshot,
} from "../../support/qcow2-damage.js";

let folder: string;
let file: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-dirty-"));
  file = path.join(folder, "disk.qcow2");
});

afterEach(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

const DIRTY = 1n;
const CORRUPT = 2n;

function features(): bigint {
  return new Poker(file).header.incompatibleFeatures;
}

/** What qemu-io leaves when it is killed on an image with lazy refcounts. */
function makeDirty(options = "cluster_size=64k"): void {
  createImage(file, `${options},lazy_refcounts=on`);
  qemuIo(file, "write -P 1 0 1M");
  qemuIoKilled(file, "write -P 2 2M 512k", "write -P 3 512k 64k", "flush");
  expect(features()).toBe(DIRTY);
  expect(qemuCheck(file).status).toBe(2);
}

describe("a dirty image", () => {
  it.each(["cluster_size=64k", "cluster_size=512", "cluster_size=64k,refcount_bits=1"])(
    "is repaired when it is opened for writing (-o %s)",
    async (options) => {
      makeDirty(options);
      const digest = guestDigest(file);
      const image = await openImage(file, { readOnly: false });
      expect(features()).toBe(0n);
      expect(qemuCheck(file, "-U").status).toBe(0);
      await image.write(Buffer.alloc(65536, 9), 0, 65536, 4 * 2 ** 20);
      await image.close();
      expect(qemuCheck(file).status).toBe(0);
      qemuIo(file, "write -z 4M 64k");
      expect(guestDigest(file)).toBe(digest);
    },
  );

  it("is repaired for direct I/O as well", async () => {
    makeDirty();
    const digest = guestDigest(file);
    const image = await openImage(file, { readOnly: false, direct: true });
    await image.close();
    expect(qemuCheck(file).status).toBe(0);
    expect(guestDigest(file)).toBe(digest);
  });

  it("is read as it is, and not changed, when it is opened read-only", async () => {
    makeDirty();
    const bytes = fs.readFileSync(file);
    const image = await openImage(file, { readOnly: true });
    const buffer = Buffer.alloc(65536);
    await image.read(buffer, 0, buffer.length, 512 * 1024);
    await image.close();
    expect(buffer.equals(Buffer.alloc(65536, 3))).toBe(true);
    expect(fs.readFileSync(file).equals(bytes)).toBe(true);
  });

  it("is not opened for writing if it has errors that no repair corrects", async () => {
    makeDirty();
    const image = new Poker(file);
    image.set(image.l2(), image.get(image.l2()) | 0x200n);
    await expect(openImage(file, { readOnly: false })).rejects.toThrow(
      /not closed cleanly, and 1 errors in it cannot be repaired/,
    );
  });
});

describe("an image with lazy refcounts", () => {
  it("has exact refcounts and no dirty bit while it is written", async () => {
    createImage(file, "cluster_size=64k,lazy_refcounts=on");
    const image = await openImage(file, { readOnly: false });
    await image.write(Buffer.alloc(2 ** 20, 5), 0, 2 ** 20, 0);
    await image.flush();
    expect(features()).toBe(0n);
    expect(qemuCheck(file, "-U")).toMatchObject({ status: 0 });
    await image.close();
    expect(qemuCheck(file)).toMatchObject({ status: 0 });
  });
});

describe("a corrupt image", () => {
  it.each([CORRUPT, CORRUPT | DIRTY])("is read, and refused for writing (features %s)", async (bits) => {
    createImage(file, "cluster_size=64k");
    qemuIo(file, "write -P 4 0 64k");
    new Poker(file).set(72, bits);
    await expect(openImage(file, { readOnly: false })).rejects.toThrow(
      /marked corrupt, so it can only be opened read-only .*check --repair/,
    );
    expect(features()).toBe(bits);
    const image = await openImage(file, { readOnly: true });
    await image.close();
    const { code } = await cowcatcher(["check", "--repair", file]);
    expect(code).toBe(0);
    expect(features()).toBe(0n);
  });
});

describe("check --repair", () => {
  function leak(): void {
    createImage(file, "cluster_size=64k");
    qemuIo(file, "write -P 1 0 1M");
    const image = new Poker(file);
    image.set(image.l2() + 8, 0n);
    image.set(image.l2() + 16, 0n);
  }

  it("prints what qemu-img prints", async () => {
    leak();
    const copy = path.join(folder, "copy.qcow2");
    fs.copyFileSync(file, copy);
    const { stdout } = await cowcatcher(["check", "--repair", file]);
    const theirs = await run("qemu-img", ["check", "-r", "all", copy]);
    expect(stdout).toBe(theirs.stdout.replace(/^(?:ERROR|Leaked|Repairing).*\n/gm, ""));
  });

  it("prints the same JSON", async () => {
    leak();
    const copy = path.join(folder, "copy.qcow2");
    fs.copyFileSync(file, copy);
    const { stdout, code } = await cowcatcher(["check", "--json", "-r", "leaks", file]);
    expect(code).toBe(0);
    const json = JSON.parse(stdout) as Record<string, unknown>;
    expect({ ...json, filename: "" }).toEqual({ ...qemuCheck(copy, "-r", "leaks").json, filename: "" });
    expect(json["leaks-fixed"]).toBe(2);
  });

  it("does not write without --repair", async () => {
    leak();
    const bytes = fs.readFileSync(file);
    expect((await cowcatcher(["check", file])).code).toBe(3);
    expect(fs.readFileSync(file).equals(bytes)).toBe(true);
  });

  it("leaves what cannot be repaired, and says so by its code", async () => {
    createImage(file, "cluster_size=64k");
    qemuIo(file, "write -P 1 0 1M");
    const image = new Poker(file);
    image.set(image.l2(), COPIED | 0x40000000000n);
    new Poker(file).set(72, CORRUPT);
    expect((await cowcatcher(["check", "--repair", file])).code).toBe(2);
    expect(features()).toBe(CORRUPT);
  });

  it("refuses an image that another program writes", async () => {
    leak();
    const image = await openImage(file, { readOnly: false });
    const { code, stderr } = await cowcatcher(["check", "--repair", file]);
    await image.close();
    expect(code).toBe(1);
    expect(stderr).toMatch(/lock/);
  });

  it.each([
    [["check", "--repair"], /IMAGE: is missing/],
    [["check", "--repair", "all"], /IMAGE: is missing/],
    [["check", "--repair", "some", "disk.qcow2"], /--repair: 'some' is not known/],
    [["check", "-U", "--repair", "disk.qcow2"], /does not go with --force-share/],
    [["check"], /IMAGE: is missing/],
  ])("refuses %j", async (args, message) => {
    const { code, stderr } = await cowcatcher(args, { cwd: folder });
    expect(code).toBe(1); // as qemu-img check: 2 means corrupt
    expect(stderr).toMatch(message);
  });

  it("refuses leaks alone where refcounts are missing, and names what helps", async () => {
    createImage(file, "cluster_size=64k");
    qemuIo(file, "write -P 1 0 1M");
    new Poker(file).setRefcount16(6, 0);
    const { code, stderr } = await cowcatcher(["check", "--repair", "leaks", file]);
    expect(code).toBe(1);
    expect(stderr).toMatch(/refcounts are missing .*--repair all/);
  });

  it("keeps snapshots and their data", async () => {
    createImage(file, "cluster_size=4k");
    qemuIo(file, "write -P 1 0 1M");
    snapshot(file, "one");
    qemuIo(file, "write -P 2 0 512k");
    const image = new Poker(file);
    image.poke(image.block(), new Uint8Array(4096));
    const digest = guestDigest(file, "one");
    expect((await cowcatcher(["check", "--repair", file])).code).toBe(0);
    expect(guestDigest(file, "one")).toBe(digest);
    expect(qemuCheck(file).status).toBe(0);
  });
});
