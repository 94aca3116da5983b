// --bitmap of an image file: an incremental chain, each link an overlay of the last, as an administrator makes it with
// QEMU's own tools between two backups.
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { cowcatcher } from "../../support/cli.js";
import { expectClean, expectSame, makeDisk, noise } from "../../support/disks.js";
import { leftovers, mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

const SIZE = 6 * 2 ** 20 + 512;
let folder: string;
let disk: string;

const at = (name: string): string => join(folder, name);
const backup = (...args: string[]): ReturnType<typeof cowcatcher> =>
  cowcatcher(["backup", ...args], { cwd: folder });

async function write(...commands: string[]): Promise<void> {
  await mustRun("qemu-io", "-f", "qcow2", ...commands.flatMap((command) => ["-c", command]), disk);
}

/** The backup of what the bitmap calls dirty, on top of `below`; the bytes of data that it wrote. */
async function increment(below: string, target: string, ...args: string[]): Promise<number> {
  const flags = ["--json", "--bitmap", "b0", "--bitmap-mode", "never", "-b", below, "-B", "qcow2", ...args];
  const { code, stdout, stderr } = await backup(...flags, disk, target);
  expect([stderr, code]).toEqual(["", 0]);
  await expectSame(disk, at(target));
  await expectClean(at(target));
  const summary = stdout
    .trimEnd()
    .split("\n")
    .find((line) => line.includes('"summary"'));
  return (JSON.parse(summary ?? "{}") as { bytes_written: number }).bytes_written;
}

beforeEach(async () => {
  folder = scratchFolder();
  disk = at("disk.qcow2");
  const raw = await makeDisk(at("disk.raw"), noise(SIZE));
  await mustRun("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk);
  expect(await backup("-q", disk, "full.qcow2")).toMatchObject({ code: 0, stderr: "" });
  await mustRun("qemu-img", "bitmap", "--add", disk, "b0");
});
afterEach(stopAll);

it("makes a chain: full, and two increments of what was written between", async () => {
  await write("write -P 1 70k 4k", "write -z 1M 128k", "discard 2M 64k");
  expect(await increment("full.qcow2", "one.qcow2")).toBeLessThanOrEqual(2 * 65_536);
  await mustRun("qemu-img", "bitmap", "--clear", disk, "b0");
  // In what is dirty now, in what was, and in the short last sector.
  await write("write -P 2 3M 64k", "write -P 3 1M 64k", `write -P 4 ${SIZE - 512} 512`);
  expect(await increment("one.qcow2", "two.qcow2", "-c", "zlib")).toBeLessThanOrEqual(3 * 65_536);
  await mustRun("qemu-img", "bitmap", "--clear", disk, "b0");
  expect(await increment("two.qcow2", "three.qcow2")).toBe(0);
  const info = await mustRun("qemu-img", "info", "--backing-chain", "--output=json", at("three.qcow2"));
  expect((JSON.parse(info) as unknown[]).length).toBe(4);
});

it("leaves the bitmap as it was", async () => {
  await write("write -P 1 70k 4k");
  const described = (): Promise<string> => mustRun("qemu-img", "info", "--output=json", disk);
  const before = await described();
  await increment("full.qcow2", "one.qcow2");
  expect(await described()).toBe(before);
  await mustRun("qemu-img", "check", disk);
});

it.each(["512", "64k", "2M"])("goes by a bitmap with a granularity of %s", async (granularity) => {
  await mustRun("qemu-img", "bitmap", "--remove", disk, "b0");
  await mustRun("qemu-img", "bitmap", "--add", "-g", granularity, disk, "b0");
  await write("write -P 5 500k 1k", "write -P 6 4M 200k");
  await increment("full.qcow2", "one.qcow2", "--cluster-size", "4K");
});

it("looks for the bitmap in the backing files, too", async () => {
  const below = disk;
  await write("write -P 1 70k 4k");
  disk = at("overlay.qcow2");
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", disk);
  expect(await increment("full.qcow2", "one.qcow2")).toBe(65_536);
});

it.each([
  ["the granularity of a cluster", "64k"],
  ["a coarser granularity", "512k"],
])("copies what the layers above the bitmap's image changed, with %s", async (_name, granularity) => {
  await mustRun("qemu-img", "bitmap", "--remove", disk, "b0");
  await mustRun("qemu-img", "bitmap", "--add", "-g", granularity, disk, "b0");
  await write("write -P 1 70k 4k");
  const layers = ["mid.qcow2", "top.qcow2"];
  for (const layer of layers) {
    const below = disk;
    disk = at(layer);
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", disk);
    // In one word of the bitmap's and across two, and zeroes.
    if (layer === "mid.qcow2") await write("write -P 2 1000k 4k", "write -P 3 2000k 200k");
    else await write("write -z 3M 64k", `write -P 4 ${SIZE - 512} 512`);
  }
  expect(await increment("full.qcow2", "one.qcow2")).toBeLessThan(SIZE);
});

it("copies the zeroes that a shorter layer above the bitmap's image shows", async () => {
  const below = disk;
  const mid = at("mid.qcow2");
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", mid, "1M");
  disk = at("top.qcow2");
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", mid, "-F", "qcow2", disk, String(SIZE));
  await increment("full.qcow2", "one.qcow2");
});

it.each([
  ["that is not there", "none", /disk\.qcow2: has no bitmap 'none'/],
  ["that was not saved", "b0", /b0/],
])("refuses a bitmap %s", async (_name, bitmap, message) => {
  if (bitmap === "b0") {
    // Opened for writing by a program that keeps no bitmaps: cowcatcher's own server marks them.
    const server = await Server.start(folder, [disk]);
    await mustRun("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri());
    expect((await server.stop()).code).toBe(0);
  }
  const flags = ["--bitmap", bitmap, "--bitmap-mode", "never", "-b", "full.qcow2", "-B", "qcow2"];
  const { code, stderr } = await backup(...flags, "disk.qcow2", "one.qcow2");
  expect(code).toBe(1);
  expect(stderr).toMatch(message);
  expect(stderr.trimEnd().split("\n")).toHaveLength(1);
  expect(leftovers(folder)).toEqual([]);
});
