// A live backup with everything real: a server process, NBD guests that write (fio, libnbd), qemu-img as judge.
import { copyFileSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { Random } from "../support/random.js";
import {
  expectSame,
  Guest,
  leftovers,
  mustRun,
  scratchFolder,
  Server,
  stopAll,
  type Summary,
  until,
} from "../support/server.js";

const MiB = 1024 * 1024;
let folder: string;

beforeEach(() => {
  folder = scratchFolder();
});
afterEach(stopAll);

function at(name: string): string {
  return join(folder, name);
}

/** A disk half full of data, with holes; qcow2 by qemu-img. */
async function makeDisk(
  format: string,
  sizeBytes: number,
  seed = 1,
  name = `disk.${format}`,
): Promise<string> {
  const random = new Random(seed);
  const content = Buffer.alloc(sizeBytes);
  for (let start = 0; start < sizeBytes; start += 256 * 1024) {
    if (random.chance(0.3)) continue;
    const end = Math.min(start + 256 * 1024, sizeBytes);
    for (let i = start; i < end - 4; i += 4) content.writeUInt32LE(random.below(2 ** 32), i);
    content[end - 1] = 1 + random.below(255);
  }
  writeFileSync(at("content"), content);
  await mustRun("qemu-img", "convert", "-f", "raw", "-O", format, at("content"), at(name));
  // convert pads a raw disk of an odd size to whole sectors.
  if (format === "raw") copyFileSync(at("content"), at(name));
  return at(name);
}

async function expectClean(image: string): Promise<void> {
  if (image.endsWith(".qcow2")) await mustRun("qemu-img", "check", "-q", image);
}

function formatOf(path: string): string {
  return path.endsWith(".qcow2") ? "qcow2" : "raw";
}

describe.each([
  ["raw", "raw"],
  ["raw", "qcow2"],
  ["qcow2", "raw"],
  ["qcow2", "qcow2"],
])("a %s disk to a %s target", (diskFormat, targetFormat) => {
  it("shows T0 while fio writes and verifies", async () => {
    const disk = await makeDisk(diskFormat, 32 * MiB);
    const server = await Server.start(folder, [disk]);
    copyFileSync(disk, at(`frozen.${diskFormat}`));
    const target = at(`target.${targetFormat}`);
    const backup = server.backup(target, "--rate-limit", "14M", "--cow-buffer-size", "64M");
    await backup.started();
    await mustRun(
      "fio",
      ...["--name=guest", "--ioengine=nbd", `--uri=${server.uri()}`, "--rw=randwrite", "--size=24M"],
      ...["--bsrange=4k-64k", "--iodepth=8", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1"],
      ...["--randrepeat=1", "--output=/dev/null"],
    );
    const summary = await backup.succeed();
    expect(summary.captures).toBeGreaterThan(100);
    await server.stop();
    await expectSame(at(`frozen.${diskFormat}`), diskFormat, target, targetFormat);
    await expectClean(disk);
    await expectClean(target);
    expect(leftovers(folder)).toEqual([]);
  });

  it("shows T0 and harms no write when guests write, trim and zero over several connections", async () => {
    const { summary } = await modelBackup(diskFormat, targetFormat, 12 * MiB + 512, "--rate-limit", "10M");
    expect(summary.captures).toBeGreaterThan(50);
  });

  it.each([4097, MiB + 512])("copies a disk of %i bytes", async (sizeBytes) => {
    await modelBackup(diskFormat, targetFormat, sizeBytes, "--rate-limit", `${Math.ceil(sizeBytes * 2)}`);
  });
});

/** A guest is idle at T0 and writes all through the backup; everything that must hold afterwards is checked. */
async function modelBackup(
  diskFormat: string,
  targetFormat: string,
  sizeBytes: number,
  ...args: string[]
): Promise<{ summary: Summary; operations: number; longestMs: number; stderr: string }> {
  const disk = await makeDisk(diskFormat, sizeBytes);
  const server = await Server.start(folder, [disk]);
  const guest = await server.guest(sizeBytes);
  guest.run();
  await guest.progress(20);
  const before = await guest.pause();
  await guest.dump(at("t0"));
  const target = at(`target.${targetFormat}`);
  const backup = server.backup(target, ...args);
  await backup.started();
  guest.run();
  const summary = await backup.succeed();
  const { operations, longestMs } = await guest.pause();
  expect(await guest.verify()).toBe("same");
  await expectSame(at("t0"), "raw", target, targetFormat);
  await guest.dump(at("end"));
  await guest.quit();
  expect(leftovers(folder)).toEqual([]);
  expect(server.openFiles().filter((path) => path.includes(".cowcatcher-"))).toEqual([]);
  expect((await server.stop()).code).toBe(0);
  await expectSame(at("end"), "raw", disk, diskFormat);
  await expectClean(disk);
  await expectClean(target);
  return { summary, operations: operations - before.operations, longestMs, stderr: backup.process.stderr };
}

describe("T0 is one instant", () => {
  const COUNT = 64;

  /** The last number of the prefix that the images show; fails unless they show exactly a prefix. */
  function prefixOf(images: readonly Buffer[], connectionCount: number): number {
    const sizeBytes = images[0]?.length ?? 0;
    const stride = Math.floor(sizeBytes / COUNT);
    const found = Array.from({ length: COUNT * connectionCount }, (_, place) => {
      const which = place % connectionCount;
      const block = (Math.floor(place / connectionCount) * 37) % COUNT;
      const offset = block * stride + which * Math.floor(stride / connectionCount);
      const image = images[images.length === 1 ? 0 : which];
      return Number(image?.readBigUInt64LE(offset));
    });
    const last = Math.max(...found);
    const expected = found.map((_, place) => {
      const number = last - ((last - place) % found.length);
      return number > 0 ? number : 0;
    });
    expect(found).toEqual(expected);
    return last;
  }

  async function asRaw(image: string): Promise<Buffer> {
    await mustRun("qemu-img", "convert", "-f", formatOf(image), "-O", "raw", image, at("as-raw"));
    return readFileSync(at("as-raw"));
  }

  it.each(["raw", "qcow2"])("for a %s disk under two connections that write in turn", async (format) => {
    await mustRun("qemu-img", "create", "-q", "-f", format, at(`disk.${format}`), "8M");
    const server = await Server.start(folder, [at(`disk.${format}`)]);
    const guest = await Guest.start("sequence", 1, [server.uri(), server.uri()]);
    guest.run();
    for (let round = 0; round < 4; round++) {
      await until("the guest writes", async () => (await guest.count()) > 300 * (round + 1));
      const acknowledged = await guest.count();
      const backup = server.backup(at("target.raw"), "--force", "--rate-limit", "16M");
      await backup.started();
      const later = await guest.count();
      await backup.succeed();
      const last = prefixOf([await asRaw(at("target.raw"))], 2);
      expect(last).toBeGreaterThanOrEqual(acknowledged);
      expect(last).toBeLessThanOrEqual(later + 1);
    }
    await guest.pause();
    await guest.quit();
    await server.stop();
    await expectClean(at(`disk.${format}`));
  });

  it("for two disks at once", async () => {
    for (const name of ["a.raw", "b.qcow2"]) {
      await mustRun("qemu-img", "create", "-q", "-f", formatOf(name), at(name), "8M");
    }
    const server = await Server.start(folder, [`${at("a.raw")}=a`, `${at("b.qcow2")}=b`]);
    const guest = await Guest.start("sequence", 1, [server.uri("a"), server.uri("b")]);
    guest.run();
    for (let round = 0; round < 4; round++) {
      await until("the guest writes", async () => (await guest.count()) > 300 * (round + 1));
      const acknowledged = await guest.count();
      const disks = ["--disk", "a", "--disk", "b"];
      const backup = server.backup(...disks, at("ta.qcow2"), at("tb.raw"), "--force", "--rate-limit", "8M");
      await backup.started();
      const later = await guest.count();
      await backup.succeed();
      const images = [await asRaw(at("ta.qcow2")), await asRaw(at("tb.raw"))];
      const last = prefixOf(images, 2);
      expect(last).toBeGreaterThanOrEqual(acknowledged);
      expect(last).toBeLessThanOrEqual(later + 1);
    }
    await guest.pause();
  });
});

describe("the buffer", () => {
  const SLOW = ["--rate-limit", "8M"];

  it("may be none: the guest waits for the target", async () => {
    const { summary } = await modelBackup("qcow2", "qcow2", 12 * MiB, "--cow-buffer-size", "0", ...SLOW);
    expect(summary.guest_waits).toBeGreaterThan(0);
  });

  it("spills when it is full, to a file that nobody sees", async () => {
    const { summary } = await modelBackup("raw", "qcow2", 24 * MiB, "--cow-buffer-size", "64K", ...SLOW);
    expect(summary.spilled_bytes).toBeGreaterThan(0);
  });

  it("makes the guest wait when it is full, if asked", async () => {
    const args = ["--cow-buffer-size", "64K", "--on-buffer-full", "wait", ...SLOW];
    const { summary } = await modelBackup("raw", "raw", 16 * MiB, ...args);
    expect(summary.spilled_bytes).toBe(0);
    expect(summary.guest_waits).toBeGreaterThan(0);
    expect(summary.captures).toBeGreaterThan(0);
  });

  it.each([1, 8])("with %i workers", async (workerCount) => {
    await modelBackup("qcow2", "raw", 12 * MiB, "--workers", String(workerCount), ...SLOW);
  });
});

describe("a limit", () => {
  /** A backup that the guest's writes must break. */
  async function brokenBackup(
    args: readonly string[],
    env: Record<string, string> = {},
  ): Promise<{ stderr: string; longestMs: number }> {
    const disk = await makeDisk("raw", 24 * MiB);
    const server = await Server.start(folder, [disk], { env });
    const guest = await server.guest(1);
    const backup = server.backup(at("target.raw"), ...args);
    await backup.started();
    guest.run();
    const { code, stderr } = await backup.end();
    expect(code).toBe(1);
    await guest.progress(20);
    const { longestMs } = await guest.pause();
    expect(await guest.verify()).toBe("same");
    expect(leftovers(folder)).toEqual([]);
    expect(() => readFileSync(at("target.raw"))).toThrow("ENOENT");
    expect((await server.stop()).code).toBe(0);
    return { stderr, longestMs };
  }

  it("cancels the backup when the buffer is full, if asked", async () => {
    const { stderr } = await brokenBackup([
      ...["--cow-buffer-size", "64K", "--on-buffer-full", "cancel", "--rate-limit", "1M"],
    ]);
    expect(stderr).toMatch(
      /^cowcatcher: \S+: the copy-before-write buffer is full \(.*--cow-buffer-size.*\)\n$/,
    );
  });

  it("of the spill ends the backup", async () => {
    const { stderr } = await brokenBackup([
      ...["--cow-buffer-size", "64K", "--spill-limit", "1M", "--rate-limit", "1M"],
    ]);
    expect(stderr).toMatch(/^cowcatcher: \S+: the spill file has reached its limit of 1048576 bytes.*\n$/);
  });

  it("of the guest's wait ends the backup", async () => {
    const { stderr, longestMs } = await brokenBackup(
      ["--cow-buffer-size", "64K", "--on-buffer-full", "wait", "--guest-timeout", "300ms"],
      { COWCATCHER_FAULTS: "target-write:delay=20s" },
    );
    expect(stderr).toMatch(/^cowcatcher: \S+: a guest write waited longer than 300 ms for the backup.*\n$/);
    expect(longestMs).toBeGreaterThan(290);
    expect(longestMs).toBeLessThan(2000);
  });

  it("of the guest's wait ends a backup without a buffer", async () => {
    const { stderr, longestMs } = await brokenBackup(["--cow-buffer-size", "0", "--guest-timeout", "300ms"], {
      COWCATCHER_FAULTS: "target-write:hang=20s",
    });
    expect(stderr).toMatch(/a guest write waited longer than 300 ms for the backup/);
    expect(longestMs).toBeLessThan(2000);
  });

  it("of the rate holds", async () => {
    const disk = await makeDisk("raw", 16 * MiB, 3);
    const server = await Server.start(folder, [disk]);
    const { bytes_written: written, seconds } = await server
      .backup(at("target.qcow2"), "--rate-limit", "8M")
      .succeed();
    // The first chunk of each worker is not waited for.
    expect(written / seconds).toBeLessThan(8 * MiB * 1.6);
    expect(written / seconds).toBeGreaterThan(8 * MiB * 0.6);
  });
});
