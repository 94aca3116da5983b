// --verify: the target is read back before it has its name, and what does not match never gets one.
import { existsSync, readdirSync, readFileSync, readlinkSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { sampled } from "../../support/campaign.js";
import { cowcatcher, type RunResult } from "../../support/cli.js";
import { expectClean, expectSame, makeDisk, noise } from "../../support/disks.js";
import {
  Backup,
  type Guest,
  leftovers,
  scratchFolder,
  Server,
  stopAll,
  until,
} from "../../support/server.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const CORRUPT = { COWCATCHER_FAULTS: "target-write:corrupt,from=1M,to=1025K,count=1" };
/** The noise of this seed has data there. */
const CORRUPT_OFFSET = MiB;

let folder: string;

beforeEach(() => {
  folder = scratchFolder();
});
afterEach(stopAll);

function at(name: string): string {
  return join(folder, name);
}

function content(sizeBytes = 5 * MiB): Buffer {
  const data = noise(sizeBytes, 3);
  data.fill(0x55, CORRUPT_OFFSET, CORRUPT_OFFSET + 64 * KiB);
  return data;
}

function expectNoTarget(target: string): void {
  expect(existsSync(target)).toBe(false);
  expect(leftovers(folder)).toEqual([]);
}

function expectDifference({ code, stderr }: RunResult, target: string): void {
  expect(stderr).toBe(
    `cowcatcher: ${target}: read back, 1 cluster of 64.0 KiB differs from what was read at T0, the one at offset ` +
      `${CORRUPT_OFFSET} (do not trust this storage: it, or the way to it, changed the data)\n`,
  );
  expect(code).toBe(4);
}

describe("offline", () => {
  it.each([
    ["disk.raw", "target.raw", []],
    ["disk.raw", "target.qcow2", []],
    ["disk.qcow2", "target.raw", ["--workers", "1"]],
    ["disk.qcow2", "target.qcow2", ["--cluster-size", "512"]],
    ["disk.raw", "target.qcow2", ["--cluster-size", "2M"]],
  ])("%s to %s passes", async (diskName, targetName, args) => {
    const disk = await makeDisk(at(diskName), content(5 * MiB + 512));
    const backup = new Backup(["--verify", ...args, disk, at(targetName)]);
    expect(await backup.succeed()).toMatchObject({ verified: true });
    await expectSame(disk, at(targetName));
    await expectClean(at(targetName));
    expect(leftovers(folder)).toEqual([]);
  });

  it("passes for a disk of an odd size, and restores it", async () => {
    writeFileSync(at("disk.raw"), content(3 * MiB + 4097));
    const made = await cowcatcher(["backup", "--verify", at("disk.raw"), at("backup.qcow2")]);
    expect(made).toMatchObject({ code: 0, stderr: "" });
    expect(made.stdout).toMatch(/ written, .* on disk, verified\n$/);
    const restored = await cowcatcher([
      "restore",
      "--verify",
      "-O",
      "raw",
      at("backup.qcow2"),
      at("back.raw"),
    ]);
    expect(restored).toMatchObject({ code: 0, stderr: "" });
    const back = readFileSync(at("back.raw"));
    expect(back.subarray(0, 3 * MiB + 4097).equals(readFileSync(at("disk.raw")))).toBe(true);
  });

  it("passes for an empty disk of 1 TiB at once", async () => {
    writeFileSync(at("disk.raw"), "");
    truncateSync(at("disk.raw"), 1024 * 1024 * MiB);
    const backup = new Backup(["--verify", at("disk.raw"), at("target.qcow2")]);
    expect(await backup.succeed()).toMatchObject({ bytes_written: 0, verified: true });
  });

  it("says that it did not verify without being asked", async () => {
    const disk = await makeDisk(at("disk.raw"), content());
    expect(await new Backup([disk, at("target.raw")], CORRUPT).succeed()).toMatchObject({ verified: false });
  });

  it.each(["target.raw", "target.qcow2"])("a corrupted %s gets no name", async (name) => {
    const disk = await makeDisk(at("disk.raw"), content());
    const result = await new Backup(["--verify", disk, at(name)], CORRUPT).end();
    expectDifference(result, at(name));
    expect(result.stdout).toContain('"code":"VERIFY"');
    expectNoTarget(at(name));
  });

  it("a corrupted restore leaves the image that it was to replace", async () => {
    const backup = await makeDisk(at("backup.qcow2"), content());
    writeFileSync(at("disk.raw"), "precious");
    const args = ["restore", "--verify", "--force", "-O", "raw", backup, at("disk.raw")];
    expectDifference(await cowcatcher(args, { env: CORRUPT }), at("disk.raw"));
    expect(readFileSync(at("disk.raw"), "utf8")).toBe("precious");
    expect(leftovers(folder)).toEqual([]);
  });

  it("counts the clusters that differ and names the first", async () => {
    const disk = await makeDisk(at("disk.raw"), Buffer.alloc(5 * MiB, 0x33));
    const offsets = [1088 * KiB, 2 * MiB, 4 * MiB + 99];
    const faults = offsets.map((offset) => `target-write:corrupt,from=${offset},to=${offset + 1}`);
    const env = { COWCATCHER_FAULTS: faults.join(";") };
    const { code, stderr } = await new Backup(["--verify", disk, at("target.raw")], env).end();
    expect(stderr).toContain(
      `3 clusters of 64.0 KiB differ from what was read at T0, the first at offset ${1088 * KiB} (`,
    );
    expect(code).toBe(4);
  });

  it("a target that cannot be read back is a failure like any other", async () => {
    const disk = await makeDisk(at("disk.raw"), content());
    const env = { COWCATCHER_FAULTS: "target-read:error=EIO,from=1M,to=1025K" };
    const { code, stderr } = await new Backup(["--verify", disk, at("target.raw")], env).end();
    expect(stderr).toMatch(
      /^cowcatcher: \S+\/target\.raw: cannot read: input\/output error at offset \d+\n$/,
    );
    expect(code).toBe(1);
    expectNoTarget(at("target.raw"));
  });

  it("is wrong usage for null:", async () => {
    const disk = await makeDisk(at("disk.raw"), content());
    const { code, stderr } = await cowcatcher(["backup", "--verify", disk, "null:"]);
    expect(stderr).toBe("cowcatcher: --verify: null: cannot be read back (leave it out)\n");
    expect(code).toBe(2);
  });

  it("is ended by SIGINT at once", async () => {
    const disk = await makeDisk(at("disk.raw"), content());
    const backup = new Backup(["--verify", disk, at("target.raw")], {
      COWCATCHER_FAULTS: "target-read:delay=1h",
    });
    await until("the check reads", () => isReadBack(backup.process.pid));
    backup.process.kill("SIGINT");
    expect(await backup.end()).toMatchObject({ code: 130 });
    expectNoTarget(at("target.raw"));
  });
});

/** The unfinished target is open once for those who write it; the check opens it again. */
function isReadBack(pid: number): boolean {
  const descriptors = `/proc/${pid}/fd`;
  const seen = new Set<string>();
  for (const fd of readdirSync(descriptors)) {
    const file = unfinishedFile(join(descriptors, fd));
    if (file === null) continue;
    if (seen.has(file)) return true;
    seen.add(file);
  }
  return false;
}

/** What the descriptor leads to, if that is a file without a name (which proc(5) shows by its inode) or a temporary. */
function unfinishedFile(descriptor: string): string | null {
  try {
    const file = readlinkSync(descriptor);
    return /\/#\d+ \(deleted\)$|\/\.target\./.test(file) ? file : null;
  } catch {
    return null;
  }
}

describe("live", () => {
  async function serve(faults = ""): Promise<{ server: Server; guest: Guest; disk: string }> {
    const disk = await makeDisk(at("disk.qcow2"), content(12 * MiB));
    const server = await Server.start(folder, [disk], { env: { COWCATCHER_FAULTS: faults } });
    const guest = await server.guest(1);
    guest.run();
    await guest.progress(20);
    await guest.pause();
    await guest.dump(at("t0.raw"));
    return { server, guest, disk };
  }

  it.each(sampled(["target.qcow2", "target.raw"], 2))("%s passes while a guest writes", async (name) => {
    const { server, guest, disk } = await serve();
    const backup = server.backup("--verify", "--rate-limit", "512K", at(name));
    await backup.started();
    guest.run();
    await guest.progress(60);
    const summary = await backup.release(server);
    expect(summary).toMatchObject({ verified: true });
    expect(summary.captures).toBeGreaterThan(5);
    await guest.pause();
    expect(await guest.verify()).toBe("same");
    await guest.quit();
    expect((await server.stop()).code).toBe(0);
    await expectSame(at("t0.raw"), at(name));
    await expectClean(at(name));
    await expectClean(disk);
  });

  it("passes without a buffer", async () => {
    const { server, guest } = await serve();
    const backup = server.backup(
      "--verify",
      "--cow-buffer-size",
      "0",
      "--rate-limit",
      "20M",
      at("target.raw"),
    );
    await backup.started();
    guest.run();
    expect(await backup.succeed()).toMatchObject({ verified: true });
    await guest.pause();
    await guest.quit();
    await expectSame(at("t0.raw"), at("target.raw"));
  });

  it("a corrupted target gets no name, and the guest goes on", async () => {
    // In several places, as the guest may have made some of them zeroes before T0, which pass unharmed.
    const faults = [0, 2, 4, 6, 8, 10].map(
      (at) => `target-write:corrupt,from=${at * MiB},to=${at * MiB + 1}`,
    );
    const { server, guest } = await serve(faults.join(";"));
    const backup = server.backup("--verify", at("target.qcow2"));
    await backup.started();
    guest.run();
    const { code, stderr } = await backup.end();
    expect(stderr).toMatch(
      /^cowcatcher: \S+\/target\.qcow2: read back, \d clusters? of 64\.0 KiB differs? .*\n$/,
    );
    expect(code).toBe(4);
    expectNoTarget(at("target.qcow2"));
    await guest.progress(20);
    await guest.pause();
    expect(await guest.verify()).toBe("same");
  });

  it("is pending during the check, with the guest detached, and can be cancelled", async () => {
    const { server, guest } = await serve("target-read:delay=1h");
    const backup = server.backup("--verify", at("target.raw"));
    const id = await backup.jobId();
    await until("the check reads", () => isReadBack(server.process.pid));
    const { stdout } = await server.jobs("--json");
    expect(JSON.parse(stdout)).toMatchObject([{ job: id, status: "pending" }]);
    guest.run();
    await guest.progress(20);
    expect((await server.jobs("cancel", id)).code).toBe(0);
    const { code, stderr } = await backup.end();
    expect(stderr).toMatch(/^cowcatcher: \S+\/target\.raw: the backup was cancelled\n$/);
    expect(code).toBe(1);
    expectNoTarget(at("target.raw"));
    await guest.pause();
    expect(await guest.verify()).toBe("same");
    // The disk is free for the next one.
    const second = server.backup(at("second.raw"));
    await second.succeed();
  });
});
