import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { type CompareResult, compareImages } from "../../../src/image/compare.js";
import { openImage } from "../../../src/image/open.js";

let folder: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-compare-"));
});

afterEach(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

function create(name: string, size: string, ...commands: string[]): string {
  const file = path.join(folder, name);
  const format = path.extname(name).slice(1);
  execFileSync("qemu-img", ["create", "-q", "-f", format, file, size]);
  const args = commands.flatMap((command) => ["-c", command]);
  if (args.length > 0) execFileSync("qemu-io", ["-f", format, ...args, file], { stdio: "ignore" });
  return file;
}

/** Compares with both programs, which must agree. */
async function compareBoth(a: string, b: string, strict = false): Promise<CompareResult> {
  const imageA = await openImage(a, { readOnly: true });
  const imageB = await openImage(b, { readOnly: true });
  try {
    const seen: number[] = [];
    const ours = await compareImages(imageA, imageB, { strict, onProgress: (done) => seen.push(done) });
    expect(seen).toEqual([...seen].sort((x, y) => x - y));
    const qemu = spawnSync("qemu-img", ["compare", ...(strict ? ["-s"] : []), a, b], { encoding: "utf8" });
    expect(ours.same ? 0 : 1).toBe(qemu.status);
    const reported = /offset (\d+)!/i.exec(qemu.stdout)?.[1];
    if (reported !== undefined) {
      expect(Math.floor((ours.offsetBytes ?? NaN) / 512) * 512).toBe(Number(reported));
    }
    return ours;
  } finally {
    await imageA.close();
    await imageB.close();
  }
}

describe("compareImages", () => {
  it("finds a raw image and its qcow2 copy the same, compressed or not", async () => {
    const raw = create("a.raw", "40M", "write -P 1 3M 2M", "write -P 2 30M 70k");
    for (const options of [[], ["-c"]]) {
      const copy = path.join(folder, "copy.qcow2");
      execFileSync("qemu-img", ["convert", ...options, "-O", "qcow2", raw, copy]);
      expect(await compareBoth(raw, copy)).toMatchObject({ same: true, sizesDiffer: false });
    }
  });

  it("names the first byte that differs", async () => {
    const a = create("a.raw", "8M", "write -P 1 3M 2M");
    const b = create("b.qcow2", "8M", "write -P 1 3M 2M");
    execFileSync("qemu-io", ["-f", "qcow2", "-c", "write -P 9 4999999 7", b], { stdio: "ignore" });
    expect(await compareBoth(a, b)).toEqual({
      same: false,
      difference: "content",
      offsetBytes: 4999999,
      sizesDiffer: false,
    });
    expect(await compareBoth(b, a)).toMatchObject({ offsetBytes: 4999999 });
  });

  it("finds data where the other has a hole, and takes written zeroes for a hole", async () => {
    const a = create("a.raw", "8M", "write -P 0 1M 1M", "write -P 3 6M 1");
    const b = create("b.raw", "8M");
    expect(await compareBoth(a, b)).toMatchObject({ same: false, offsetBytes: 6 * 2 ** 20 });
  });

  it("takes different sizes for the same where the rest is zero, unless strict", async () => {
    const short = create("a.raw", "1M", "write -P 1 0 1M");
    const long = create("b.raw", "3M", "write -P 1 0 1M", "write -P 0 2M 512k");
    expect(await compareBoth(short, long)).toMatchObject({ same: true, sizesDiffer: true });
    expect(await compareBoth(long, short, true)).toMatchObject({ same: false, difference: "size" });
    execFileSync("qemu-io", ["-f", "raw", "-c", "write -P 4 2500k 1k", long], { stdio: "ignore" });
    expect(await compareBoth(short, long)).toMatchObject({ same: false, offsetBytes: 2500 * 1024 });
  });

  it("compares allocation in strict mode", async () => {
    const a = create("a.qcow2", "8M", "write -P 1 0 1M", "write -P 0 2M 1M");
    const b = create("b.qcow2", "8M", "write -P 1 0 1M");
    expect(await compareBoth(a, b)).toMatchObject({ same: true });
    expect(await compareBoth(a, b, true)).toMatchObject({ difference: "status", offsetBytes: 2 * 2 ** 20 });
    expect(await compareBoth(a, a, true)).toMatchObject({ same: true });
  });

  it("skips the holes of a huge disk", async () => {
    const a = create("a.qcow2", "16T", "write -P 1 15T 64k");
    const b = create("b.qcow2", "16T", "write -P 1 15T 64k", "write -z 1T 1M");
    expect(await compareBoth(a, b)).toMatchObject({ same: true });
  });
});
