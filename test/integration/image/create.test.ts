import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { type CreateOptions, createQcow2, createRaw } from "../../../src/image/qcow2/create/create.js";
import { GiB, KiB, MiB, TiB, roundUp } from "../../../src/units.js";

let folder: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-create-"));
});

afterEach(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

function create(options: CreateOptions): string {
  const file = path.join(folder, "new.qcow2");
  const fd = fs.openSync(file, "wx");
  try {
    createQcow2(fd, file, options);
  } finally {
    fs.closeSync(fd);
  }
  return file;
}

function qemuImg(...args: string[]): string {
  return execFileSync("qemu-img", args, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
}

interface Info {
  "virtual-size": number;
  "cluster-size": number;
  "backing-filename"?: string;
  "backing-filename-format"?: string;
  "format-specific": { data: Record<string, unknown> };
}

function info(file: string): Info {
  return JSON.parse(qemuImg("info", "--output=json", file)) as Info;
}

describe("createQcow2", () => {
  it.each([
    [0, 64 * KiB],
    [1, 64 * KiB],
    [10 * GiB, 64 * KiB],
    [64 * TiB, 64 * KiB],
    [64 * TiB, 2 * MiB],
    [16 * GiB, 512],
    [128 * GiB, 512],
    [1 * TiB, 4 * KiB],
  ])(
    "makes a disk of %i bytes with clusters of %i that qemu-img check accepts",
    (sizeBytes, clusterSizeBytes) => {
      const file = create({ sizeBytes, clusterSizeBytes });
      const check = JSON.parse(qemuImg("check", "--output=json", file)) as Record<string, unknown>;
      const end = roundUp(fs.statSync(file).size, clusterSizeBytes);
      expect(check).toMatchObject({ "check-errors": 0, "image-end-offset": end });
      expect(check).not.toHaveProperty("leaks");
      expect(info(file)).toMatchObject({
        "virtual-size": Math.ceil(sizeBytes / 512) * 512,
        "cluster-size": clusterSizeBytes,
        "format-specific": { data: { compat: "1.1", "refcount-bits": 16, "compression-type": "zlib" } },
      });
    },
  );

  it("writes the same bytes as qemu-img create", () => {
    const theirs = path.join(folder, "theirs.qcow2");
    const base = path.join(folder, "base.raw");
    fs.writeFileSync(base, "");
    fs.truncateSync(base, 3 * GiB);
    qemuImg("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", theirs);
    const ours = create({
      sizeBytes: 3 * GiB,
      clusterSizeBytes: 64 * KiB,
      backingFile: base,
      backingFormat: "raw",
    });
    expect(Buffer.compare(fs.readFileSync(ours), fs.readFileSync(theirs))).toBe(0);
  });

  it.each([1, 2, 4, 8, 16, 32, 64])("makes refcounts of %i bits", (refcountBits) => {
    const file = create({ sizeBytes: 1 * GiB, clusterSizeBytes: 4 * KiB, refcountBits });
    qemuImg("check", file);
    expect(info(file)["format-specific"].data).toMatchObject({ "refcount-bits": refcountBits });
  });

  it.each([
    [128 * KiB, 5 * GiB],
    [256 * KiB, 30 * GiB],
    [2 * MiB, 700 * GiB],
  ])("breaks preallocated clusters of %i where qemu-img's requests end", (clusterSizeBytes, sizeBytes) => {
    const file = create({ sizeBytes, clusterSizeBytes, refcountBits: 64, preallocation: "metadata" });
    const theirs = path.join(folder, "theirs.qcow2");
    const options = `preallocation=metadata,refcount_bits=64,cluster_size=${clusterSizeBytes}`;
    qemuImg("create", "-q", "-f", "qcow2", "-o", options, theirs, `${sizeBytes}`);
    expect(qemuImg("map", "--output=json", file)).toBe(qemuImg("map", "--output=json", theirs));
  });

  it("can be written by QEMU and stays clean", () => {
    const file = create({ sizeBytes: 1 * GiB, clusterSizeBytes: 512, compressionType: "zstd" });
    execFileSync("qemu-io", ["-f", "qcow2", "-c", "write -P 7 100M 3M", "-c", "write -c 0 64k", file]);
    qemuImg("check", file);
    expect(info(file)["format-specific"].data).toMatchObject({ "compression-type": "zstd" });
  });

  it("fits a long backing file name in a small cluster, without the feature names", () => {
    const backingFile = `/${"b".repeat(200)}.raw`;
    const file = create({ sizeBytes: 1 * MiB, clusterSizeBytes: 512, backingFile, backingFormat: "raw" });
    expect(info(file)).toMatchObject({ "backing-filename": backingFile, "backing-filename-format": "raw" });
  });

  it.each([
    [{ sizeBytes: 65 * TiB, clusterSizeBytes: 2 * MiB }, "LIMIT"],
    [{ sizeBytes: 129 * GiB, clusterSizeBytes: 512 }, "LIMIT"],
    [{ sizeBytes: 1, clusterSizeBytes: 65535 }, "USAGE"],
    [{ sizeBytes: 1, clusterSizeBytes: 4 * MiB }, "USAGE"],
    [{ sizeBytes: 1, clusterSizeBytes: 65536, refcountBits: 3 }, "USAGE"],
    [{ sizeBytes: 1, clusterSizeBytes: 512, backingFile: "x".repeat(500) }, "LIMIT"],
  ])("refuses %j", (options, code) => {
    expect(() => create(options)).toThrow(expect.objectContaining({ code }));
  });
});

describe("createRaw", () => {
  it("makes a hole of the exact size, with its first block written", () => {
    const file = path.join(folder, "new.raw");
    const fd = fs.openSync(file, "wx");
    createRaw(fd, file, 5 * GiB + 1);
    fs.closeSync(fd);
    expect(fs.statSync(file)).toMatchObject({ size: 5 * GiB + 1, blocks: 8 });
  });
});
