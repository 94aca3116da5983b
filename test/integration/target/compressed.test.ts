// Compressed targets, the small part: an offline copy, and a live backup while a guest writes. test:long has the matrix,
// and this file is part of the smoke of each version of Node.js (scripts/test-nodes.mjs).

import { copyFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { MiB } from "../../../src/units.js";
import { cowcatcher } from "../../support/cli.js";
import { compressedCount, compressionTypeOf, mixed } from "../../support/compression.js";
import { expectClean, expectSame, makeDisk } from "../../support/disks.js";
import { mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

let folder: string;
beforeAll(() => {
  folder = scratchFolder();
});
afterAll(stopAll);

const at = (name: string): string => join(folder, name);

it.each([
  ["zlib:9", "zlib"],
  ["zstd", "zstd"],
])("an offline copy with -c %s is what the disk is", async (method, type) => {
  writeFileSync(at("text.raw"), mixed(3 * MiB + 512, 7));
  const args = ["backup", "--force", "--verify", "-c", method, "text.raw", "t.qcow2"];
  const { code, stderr } = await cowcatcher(args, { cwd: folder });
  expect([stderr, code]).toEqual(["", 0]);
  await expectSame(at("text.raw"), at("t.qcow2"));
  await expectClean(at("t.qcow2"));
  expect(await compressionTypeOf(at("t.qcow2"))).toBe(type);
  expect(await compressedCount(at("t.qcow2"))).toBeGreaterThan(0);
});

describe("a live backup", () => {
  it.each(["zlib:1", "zstd"])("with -c %s shows T0 while a guest writes", async (method) => {
    const disk = await makeDisk(at(`disk-${method}.qcow2`), mixed(8 * MiB, 5));
    copyFileSync(disk, at("frozen.qcow2"));
    const server = await Server.start(folder, [disk]);
    const target = at(`live-${method}.qcow2`);
    const running = server.backup(target, "-c", method, "--rate-limit", "512K", "--verify");
    await running.started();
    await mustRun(
      "fio",
      ...["--name=guest", "--ioengine=nbd", `--uri=${server.uri()}`, "--rw=randwrite", "--size=6M"],
      ...["--bs=16k", "--iodepth=4", "--buffer_compress_percentage=70", "--output=/dev/null"],
    );
    await running.release(server);
    await server.stop();
    await expectSame(at("frozen.qcow2"), target);
    await expectClean(target);
    expect(await compressedCount(target)).toBeGreaterThan(40);
  });
});
