// A live backup with everything real: a server process, NBD guests that write (fio, libnbd), qemu-img as judge.
import { copyFileSync, readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { sampled } from "../../support/campaign.js";
import { run } from "../../support/cli.js";
import { contentOf, expectClean, expectSame, formatOf, makeDisk, noise } from "../../support/disks.js";
import { prefixOf } from "../../support/sequence.js";
import {
  Guest,
  leftovers,
  mustRun,
  scratchFolder,
  Server,
  stopAll,
  type Summary,
  until,
} from "../../support/server.js";

const MiB = 1024 * 1024;
/** Far less than a target hangs here, or than a guest waits by default. */
const STALL_MS_MAX = 20_000;
let folder: string;
/** Of the server that `modelBackup` starts. */
let faults: string;
/** Of its guest, until it lets the backup go on. */
let operationCount: number;

beforeEach(() => {
  folder = scratchFolder();
  faults = "";
  operationCount = 60;
});
afterEach(stopAll);

function at(name: string): string {
  return join(folder, name);
}

it.each(
  sampled(
    [
      ["raw", "qcow2"],
      ["qcow2", "raw"],
    ] as const,
    2,
  ),
)("a %s disk to a %s target shows T0 while fio writes and verifies", async (diskFormat, targetFormat) => {
  const disk = await makeDisk(at(`disk.${diskFormat}`), noise(32 * MiB));
  const server = await Server.start(folder, [disk]);
  const frozen = at(`frozen.${diskFormat}`);
  copyFileSync(disk, frozen);
  const target = at(`target.${targetFormat}`);
  const backup = server.backup(target, "--rate-limit", "1M", "--cow-buffer-size", "64M");
  await backup.started();
  await mustRun(
    "fio",
    ...["--name=guest", "--ioengine=nbd", `--uri=${server.uri()}`, "--rw=randwrite", "--size=24M"],
    ...["--bsrange=4k-64k", "--iodepth=8", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1"],
    ...["--randrepeat=1", "--output=/dev/null"],
  );
  const summary = await backup.release(server);
  expect(summary.captures).toBeGreaterThan(100);
  await server.stop();
  await expectSame(frozen, target);
  await expectClean(disk);
  await expectClean(target);
  expect(leftovers(folder)).toEqual([]);
});

describe("guests write, trim and zero over several connections", () => {
  it.each(
    sampled(
      [
        ["raw", "raw", 8 * MiB + 512],
        ["raw", "qcow2", 8 * MiB],
        ["qcow2", "raw", 8 * MiB],
        ["qcow2", "qcow2", 8 * MiB + 512],
      ] as const,
      3,
    ),
  )("from a %s disk to a %s target of %i bytes", async (diskFormat, targetFormat, sizeBytes) => {
    const { summary } = await modelBackup(diskFormat, targetFormat, sizeBytes, ...HELD);
    expect(summary.captures).toBeGreaterThan(50);
  });

  it.each(sampled(["qcow2", "raw"], 2))("on a %s disk that is not in the page cache", async (format) => {
    folder = scratchFolder(tmpdir());
    await modelBackup(format, "raw", 8 * MiB, ...HELD, "--cow-buffer-size", "2M");
  });

  it.each(
    sampled(
      [
        ["raw", "qcow2", 4097],
        ["qcow2", "raw", 4097],
        ["raw", "raw", MiB + 512],
        ["qcow2", "qcow2", MiB + 512],
      ] as const,
      3,
    ),
  )("from a %s disk to a %s target of the odd size of %i bytes", async (diskFormat, targetFormat, size) => {
    // A disk of a chunk or two is read in no time: only a slow worker lets the guest write meanwhile. Whether a write
    // is captured or waits for the worker that has the cluster in hand depends on who comes first.
    faults = "worker:delay=5s,count=1";
    const { summary } = await modelBackup(diskFormat, targetFormat, size);
    expect(summary.captures + summary.guest_waits).toBeGreaterThan(0);
  });
});

/** Until the guest has done something, whatever the machine does meanwhile. */
const HELD = ["--rate-limit", "512K"];

/**
 * A guest is idle at T0 and writes all through the backup; everything that must hold afterwards is checked. A backup
 * with a limit is held until the guest has done `operationCount` operations.
 */
async function modelBackup(
  diskFormat: string,
  targetFormat: string,
  sizeBytes: number,
  ...args: string[]
): Promise<{ summary: Summary; operations: number; longestMs: number; stderr: string }> {
  const disk = await makeDisk(at(`disk.${diskFormat}`), noise(sizeBytes));
  const server = await Server.start(folder, [disk], { env: { COWCATCHER_FAULTS: faults } });
  const guest = await server.guest(sizeBytes);
  guest.run();
  await guest.progress(20);
  const before = await guest.pause();
  await guest.dump(at("t0"));
  const target = at(`target.${targetFormat}`);
  // Out of the page cache: where the folder is on a real disk, captures then take the asynchronous way.
  await mustRun("dd", `of=${disk}`, "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none");
  const backup = server.backup(target, ...args);
  await backup.started();
  guest.run();
  await guest.progress(operationCount);
  const summary = await backup.release(server);
  const { operations, longestMs } = await guest.pause();
  expect(await guest.verify()).toBe("same");
  await expectSame(at("t0"), target);
  await guest.dump(at("end"));
  await guest.quit();
  expect(leftovers(folder)).toEqual([]);
  expect(server.openFiles().filter((path) => path.includes(".cowcatcher-"))).toEqual([]);
  expect((await server.stop()).code).toBe(0);
  await expectSame(at("end"), disk);
  await expectClean(disk);
  await expectClean(target);
  return { summary, operations: operations - before.operations, longestMs, stderr: backup.process.stderr };
}

describe("T0 is one instant", () => {
  it.each(sampled(["qcow2", "raw"], 2))(
    "for a %s disk under two connections that write in turn",
    async (format) => {
      await mustRun("qemu-img", "create", "-q", "-f", format, at(`disk.${format}`), "8M");
      const server = await Server.start(folder, [at(`disk.${format}`)]);
      const guest = await Guest.start("sequence", 1, [server.uri(), server.uri()]);
      guest.run();
      for (let round = 0; round < 3; round++) {
        await until("the guest writes", async () => (await guest.count()) > 300 * (round + 1));
        const acknowledged = await guest.count();
        const backup = server.backup(at("target.raw"), "--force", "--rate-limit", "24M");
        await backup.started();
        const later = await guest.count();
        await backup.succeed();
        const last = prefixOf([readFileSync(at("target.raw"))], 2);
        expect(last).toBeGreaterThanOrEqual(acknowledged);
        expect(last).toBeLessThanOrEqual(later + 1);
      }
      await guest.pause();
      await guest.quit();
      await server.stop();
      await expectClean(at(`disk.${format}`));
    },
  );

  it("for two disks at once", async () => {
    for (const name of ["a.raw", "b.qcow2"]) {
      await mustRun("qemu-img", "create", "-q", "-f", formatOf(name), at(name), "8M");
    }
    const server = await Server.start(folder, [`${at("a.raw")}=a`, `${at("b.qcow2")}=b`]);
    const guest = await Guest.start("sequence", 1, [server.uri("a"), server.uri("b")]);
    guest.run();
    for (let round = 0; round < 3; round++) {
      await until("the guest writes", async () => (await guest.count()) > 300 * (round + 1));
      const acknowledged = await guest.count();
      const disks = ["--disk", "a", "--disk", "b"];
      const backup = server.backup(...disks, at("ta.qcow2"), at("tb.raw"), "--force", "--rate-limit", "24M");
      await backup.started();
      const later = await guest.count();
      await backup.succeed();
      const images = [await contentOf(at("ta.qcow2")), await contentOf(at("tb.raw"))];
      const last = prefixOf(images, 2);
      expect(last).toBeGreaterThanOrEqual(acknowledged);
      expect(last).toBeLessThanOrEqual(later + 1);
    }
    await guest.pause();
  });
});

describe("the buffer", () => {
  it("may be none: the guest waits for the target", async () => {
    operationCount = 3;
    const { summary } = await modelBackup("qcow2", "qcow2", 6 * MiB, "--cow-buffer-size", "0", ...HELD);
    expect(summary.guest_waits).toBeGreaterThan(0);
  });

  it("spills when it is full, to a file that nobody sees", async () => {
    const { summary } = await modelBackup("raw", "qcow2", 12 * MiB, "--cow-buffer-size", "64K", ...HELD);
    expect(summary.spilled_bytes).toBeGreaterThan(0);
  });

  it("makes the guest wait when it is full, if asked", async () => {
    const args = ["--cow-buffer-size", "64K", "--on-buffer-full", "wait", ...HELD];
    const { summary } = await modelBackup("raw", "raw", 12 * MiB, ...args);
    expect(summary.spilled_bytes).toBe(0);
    expect(summary.guest_waits).toBeGreaterThan(0);
    expect(summary.captures).toBeGreaterThan(0);
  });

  it.each(sampled([8, 1], 2))("with %i workers", async (workerCount) => {
    await modelBackup("qcow2", "raw", 6 * MiB, "--workers", String(workerCount), ...HELD);
  });
});

describe("a limit", () => {
  /** A backup that the guest's writes must break. */
  async function brokenBackup(
    args: readonly string[],
    env: Record<string, string> = {},
  ): Promise<{ stderr: string; longestMs: number }> {
    const disk = await makeDisk(at("disk.raw"), noise(24 * MiB));
    const server = await Server.start(folder, [disk], { env });
    const guest = await server.guest(1);
    const backup = server.backup(at("target.raw"), ...args);
    await backup.started();
    guest.run();
    const { code, stderr } = await backup.end();
    expect(code).toBe(13);
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
      /^cowcatcher: \S+: the copy-before-write buffer is full \(.*--cow-buffer-size.*\)\n$/m,
    );
  });

  it("of the spill ends the backup", async () => {
    const { stderr } = await brokenBackup([
      ...["--cow-buffer-size", "64K", "--spill-limit", "1M", "--rate-limit", "1M"],
    ]);
    expect(stderr).toMatch(/^cowcatcher: \S+: the spill file has reached its limit of 1048576 bytes.*\n$/m);
  });

  it("of the guest's wait ends the backup", async () => {
    const { stderr, longestMs } = await brokenBackup(
      ["--cow-buffer-size", "64K", "--on-buffer-full", "wait", "--guest-timeout", "300ms"],
      { COWCATCHER_FAULTS: "target-write:delay=600s" },
    );
    expect(stderr).toMatch(/^cowcatcher: \S+: a guest write waited longer than 300 ms for the backup.*\n$/m);
    expect(longestMs).toBeGreaterThan(290);
    expect(longestMs).toBeLessThan(STALL_MS_MAX);
  });

  it("of the guest's wait ends a backup without a buffer", async () => {
    const { stderr, longestMs } = await brokenBackup(["--cow-buffer-size", "0", "--guest-timeout", "300ms"], {
      COWCATCHER_FAULTS: "target-write:hang=600s",
    });
    expect(stderr).toMatch(/a guest write waited longer than 300 ms for the backup/);
    expect(longestMs).toBeLessThan(STALL_MS_MAX);
  });

  it("of the guest's wait fails the write instead, if asked", async () => {
    const disk = await makeDisk(at("disk.raw"), noise(4 * MiB));
    copyFileSync(disk, at("t0"));
    const server = await Server.start(folder, [disk], {
      env: { COWCATCHER_FAULTS: "target-write:delay=5s,count=1" },
    });
    // The only worker is not at the chunk that the guest writes for so long.
    const limits = [
      "-w",
      "1",
      "--cow-buffer-size",
      "0",
      "--guest-timeout",
      "100ms",
      "--on-cbw-error",
      "break-guest-write",
    ];
    const backup = server.backup(at("target.raw"), ...limits);
    await backup.started();
    const write = () => run("qemu-io", ["-f", "raw", "-c", "write -P 1 3M 4k", server.uri()]);
    expect((await write()).stdout).toContain("write failed: Input/output error");
    await backup.succeed();
    await expectSame(at("t0"), at("target.raw"));
    await expectSame(at("t0"), disk);
    expect((await write()).stdout).toContain("wrote 4096/4096 bytes");
    expect((await server.stop()).code).toBe(0);
  });

  it("of the rate holds", async () => {
    const disk = await makeDisk(at("disk.raw"), noise(12 * MiB, 3));
    const server = await Server.start(folder, [disk]);
    const { bytes_written: written, seconds } = await server
      .backup(at("target.qcow2"), "--rate-limit", "8M")
      .succeed();
    // The first chunk of each worker is not waited for.
    expect(written / seconds).toBeLessThan(8 * MiB * 1.6);
    // A machine that takes its processors away makes it slower.
    expect(written / seconds).toBeGreaterThan(8 * MiB * 0.05);
  });
});
