// Compressed qcow2 targets with QEMU as the judge: `qemu-img check` finds nothing, `compare` no difference, and
// `convert -c` writes nothing that is much smaller.

import { closeSync, copyFileSync, mkdirSync, openSync, statSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { CompressionType } from "../../src/image/qcow2/format/header.js";
import { createTarget } from "../../src/target/create.js";
import type { TargetWriter } from "../../src/cow/target-writer.js";
import { openTarget } from "../../src/target/writer.js";
import { KiB, MiB, TiB } from "../../src/units.js";
import { cowcatcher, type RunResult } from "../support/cli.js";
import { compressedCount, compressionTypeOf, mixed, qcow2InfoOf } from "../support/compression.js";
import { expectClean, expectSame } from "../support/disks.js";
import { leftovers, mustRun, scratchFolder, Server, stopAll } from "../support/server.js";

let folder: string;
beforeAll(() => {
  folder = scratchFolder();
});
afterAll(stopAll);

const at = (name: string): string => join(folder, name);
const backup = (...args: string[]): Promise<RunResult> => cowcatcher(["backup", ...args], { cwd: folder });

async function expectGood(source: string, target: string): Promise<void> {
  await expectSame(at(source), at(target));
  await expectClean(at(target));
  expect(leftovers(folder)).toEqual([]);
}

describe("cluster sizes", () => {
  const matrix = [512, 4 * KiB, 64 * KiB, 2 * MiB].flatMap((clusterBytes) =>
    (["zlib", "zstd"] as const).map((type) => [clusterBytes, type] as const),
  );

  it.each(matrix)("%d with %s, written by three at once", async (clusterSizeBytes, type) => {
    const sizeBytes = (clusterSizeBytes === 512 ? 1 : 5) * MiB + 777;
    const content = mixed(sizeBytes, clusterSizeBytes);
    writeFileSync(at("mixed.raw"), content);
    const path = at("target.qcow2");
    const target = await createTarget({
      ...{ path, format: "qcow2", sizeBytes, clusterSizeBytes, force: true, direct: false },
      compression: { type, level: 1 },
    });
    const writers = [0, 1, 2].map(() => openTarget(target.description));
    writeInTurn(writers, content, Math.max(clusterSizeBytes, 192 * KiB));
    await target.finish();
    await expectGood("mixed.raw", "target.qcow2");
    expect(await qcow2InfoOf(at("target.qcow2"))).toMatchObject({
      "compression-type": type,
      "refcount-bits": 16,
    });
    expect(await compressedCount(at("target.qcow2"))).toBeGreaterThan(0);
    await expectAsSmall(content, clusterSizeBytes, type);
  });

  function writeInTurn(writers: readonly TargetWriter[], content: Buffer, runBytes: number): void {
    for (let offset = 0, turn = 0; offset < content.length; offset += runBytes, turn++) {
      const bytes = Math.min(runBytes, content.length - offset);
      void writers[turn % writers.length]?.write(content, offset, bytes, offset);
    }
    for (const writer of writers) {
      void writer.settle?.();
      writer.close();
    }
  }

  /** Than what QEMU makes of it (at a higher level, and without the zeroes), with room for both and for waste. */
  async function expectAsSmall(content: Buffer, clusterBytes: number, type: CompressionType): Promise<void> {
    const creation = `cluster_size=${clusterBytes},compression_type=${type}`;
    const peer = at("peer.qcow2");
    await mustRun(
      "qemu-img",
      "convert",
      "-c",
      "-O",
      "qcow2",
      "-o",
      creation,
      "-f",
      "raw",
      at("mixed.raw"),
      peer,
    );
    const zeroClusters = content.length / clusterBytes / 4;
    const room = 12 * zeroClusters + 4 * clusterBytes;
    expect(statSync(at("target.qcow2")).size).toBeLessThan(statSync(peer).size * 1.1 + room);
  }
});

describe("the command line", () => {
  const COMPRESSIBLE = "text.raw";
  beforeAll(() => writeFileSync(at(COMPRESSIBLE), mixed(3 * MiB + 512, 7)));

  it.each([
    [["-c", COMPRESSIBLE, "t.qcow2"], "zstd"],
    [[COMPRESSIBLE, "-c", "t.qcow2"], "zstd"],
    [[COMPRESSIBLE, "t.qcow2", "-c"], "zstd"],
    [["-qc", COMPRESSIBLE, "t.qcow2"], "zstd"],
    [["--compress", COMPRESSIBLE, "--", "t.qcow2"], "zstd"],
    [["-c", "zlib", COMPRESSIBLE, "t.qcow2"], "zlib"],
    [["-c", "zlib:9", COMPRESSIBLE, "t.qcow2"], "zlib"],
    [["--compress=zstd:1", COMPRESSIBLE, "t.qcow2"], "zstd"],
  ])("backup %s", async (args, type) => {
    const { code, stderr } = await backup("--force", "--verify", ...args);
    expect([stderr, code]).toEqual(["", 0]);
    await expectGood(COMPRESSIBLE, "t.qcow2");
    expect(await compressionTypeOf(at("t.qcow2"))).toBe(type);
  });

  it("takes a SOURCE that is called as a method, with its folder", async () => {
    copyFileSync(at(COMPRESSIBLE), at("zstd"));
    expect((await backup("-q", "--force", "-f", "raw", "-c", "./zstd", "t.qcow2")).code).toBe(0);
    await expectGood(COMPRESSIBLE, "t.qcow2");
  });

  it("compresses an image that is compressed, and restores it", async () => {
    expect((await backup("-q", "--force", "-c", "zlib:1", COMPRESSIBLE, "one.qcow2")).code).toBe(0);
    expect(
      (await backup("-q", "-c", "zstd:9", "--cluster-size", "128K", "one.qcow2", "two.qcow2")).code,
    ).toBe(0);
    await expectGood(COMPRESSIBLE, "two.qcow2");
    expect((await cowcatcher(["restore", "-q", "two.qcow2", "back.raw"], { cwd: folder })).code).toBe(0);
    await expectGood(COMPRESSIBLE, "back.raw");
  });

  it("says what to install where there is no zstd, and writes nothing", async () => {
    if ("zstdCompressSync" in process.getBuiltinModule("zlib")) return;
    const { code, stderr } = await cowcatcher(["backup", "-c", COMPRESSIBLE, "none.qcow2"], {
      cwd: folder,
      env: { COWCATCHER_NO_NATIVE: "1" },
    });
    expect(code).toBe(1);
    expect(stderr).toBe(
      "cowcatcher: none.qcow2: it is to be compressed with zstd, and neither this Node nor the system has zstd " +
        "(use Node 22.15 or later, or install libzstd (libzstd.so.1))\n",
    );
    expect(leftovers(folder)).toEqual([]);
  });

  it("of a TiB with a little data at both ends makes a small image", async () => {
    const fd = openSync(at("huge.raw"), "w");
    const text = mixed(300_000, 3);
    for (const position of [0, TiB - text.length]) writeSync(fd, text, 0, text.length, position);
    closeSync(fd);
    expect((await backup("-q", "-c", "huge.raw", "huge.qcow2")).code).toBe(0);
    await expectClean(at("huge.qcow2"));
    expect(statSync(at("huge.qcow2")).size).toBeLessThan(1 * MiB);
  });
});

describe("a backing file", () => {
  beforeAll(() => {
    mkdirSync(at("sub"), { recursive: true });
    writeFileSync(at("sub/base.raw"), Buffer.alloc(6 * MiB, 0x77));
    writeFileSync(at("over.raw"), mixed(6 * MiB, 11));
  });

  it.each([
    ["plain", []],
    ["compressed", ["-c", "zlib:1"]],
    ["of small clusters", ["--cluster-size", "4K"]],
    ["of large clusters, compressed", ["--cluster-size", "2M", "-c"]],
  ])("under a target, %s: no byte of it shows, zeroes neither", async (name, args) => {
    const { code, stderr } = await backup(
      ...["-q", "--force", "-b", "base.raw", "-B", "raw", ...args, "over.raw", "sub/t.qcow2"],
    );
    expect([stderr, code]).toEqual(["", 0]);
    await expectGood("over.raw", "sub/t.qcow2");
    const stdout = await mustRun("qemu-img", "info", "--output=json", at("sub/t.qcow2"));
    expect(JSON.parse(stdout)).toMatchObject({
      "backing-filename": "base.raw",
      "backing-filename-format": "raw",
    });
    expect(name).not.toBe("");
  });

  it("under the target of a live backup", async () => {
    const server = await Server.start(folder, [at("over.raw")]);
    await server.backup(at("sub/live.qcow2"), "-b", "base.raw", "-B", "raw").succeed();
    await server.stop();
    await expectGood("over.raw", "sub/live.qcow2");
  });

  it.each([
    [["-b", "none.raw", "-B", "raw"], /none\.raw/],
    [["-b", "base.raw", "-B", "qcow2"], /base\.raw/],
    [["-b", "base.raw"], /--backing-format: is missing \(name the backing file's format/],
  ])("that is not what it should be is refused, and nothing written: %s", async (args, message) => {
    const { code, stderr } = await backup(...args, "over.raw", "sub/refused.qcow2");
    expect(code).not.toBe(0);
    expect(stderr).toMatch(message);
    expect(stderr.split("\n")).toHaveLength(2);
    expect(leftovers(at("sub"))).toEqual([]);
  });
});
