// What a backup does when things go wrong. After each: the guest's disk is what the guest wrote, the server serves
// on, nothing stands at TARGET or is left beside it, and the user has read one line.
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { sampled } from "../../support/campaign.js";
import { run } from "../../support/cli.js";
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

const MiB = 1024 * 1024;
const DISK_BYTES = 8 * MiB;
/** Far less than the time for which a target hangs here, or than a guest waits; far more than processors are away. */
const STALL_MS_MAX = 20_000;

let folder: string;
let disk: string;
let target: string;

beforeEach(async () => {
  folder = scratchFolder();
  target = join(folder, "target.qcow2");
  disk = await makeDisk(join(folder, "disk.qcow2"), noise(DISK_BYTES));
});
afterEach(stopAll);

/** A server with faults, and a guest that has written something and will go on during the backup. */
async function serve(faults: string): Promise<{ server: Server; guest: Guest }> {
  const server = await Server.start(folder, [disk], { env: { COWCATCHER_FAULTS: faults } });
  const guest = await server.guest(1);
  guest.run();
  await guest.progress(20);
  await guest.pause();
  await guest.dump(join(folder, "t0"));
  return { server, guest };
}

async function startBackup(server: Server, guest: Guest, ...args: string[]): Promise<Backup> {
  const backup = server.backup(target, ...args);
  await backup.started();
  guest.run();
  return backup;
}

function expectNoTarget(): void {
  expect(existsSync(target)).toBe(false);
  expect(leftovers(folder)).toEqual([]);
}

/** The guest goes on, its disk is what it wrote, through NBD and in the file. */
async function expectUnharmed(server: Server, guest: Guest, worstCheckCode = 0): Promise<void> {
  await guest.progress(20);
  const { longestMs } = await guest.pause();
  expect(longestMs).toBeLessThan(STALL_MS_MAX);
  expect(await guest.verify()).toBe("same");
  await guest.dump(join(folder, "end"));
  await guest.quit();
  expect(leftovers(folder)).toEqual([]);
  expect(server.openFiles().filter((path) => path.includes(".cowcatcher-"))).toEqual([]);
  const { code, stderr } = await server.stop();
  expect(code).toBe(0);
  expect(stderr).toBe("");
  await expectSame(join(folder, "end"), disk);
  expect([0, worstCheckCode]).toContain((await run("qemu-img", ["check", disk])).code);
}

async function expectT0(): Promise<void> {
  await expectSame(join(folder, "t0"), target);
  await expectClean(target);
}

/** The backup has failed with this one line, and `warnings` before it. */
async function expectFailure(
  backup: Backup,
  line: RegExp,
  expectedCode = 1,
  warnings: readonly RegExp[] = [],
): Promise<void> {
  const { code, stderr } = await backup.end();
  const lines = stderr.split(/(?<=\n)/);
  expect(lines).toHaveLength(warnings.length + 1);
  for (const [index, expected] of [...warnings, line].entries()) expect(lines[index]).toMatch(expected);
  expect(code).toBe(expectedCode);
}

describe("a target that fails", () => {
  it("is full", async () => {
    const full = join(folder, "full");
    mkdirSync(full);
    const mounted = (await run("mount", ["-t", "tmpfs", "-o", "size=2M", "tmpfs", full])).code === 0;
    // Without the right to mount, the fault stage stands in for the full file system.
    const { server, guest } = await serve(mounted ? "" : "target-write:error=ENOSPC,from=1M");
    try {
      target = join(full, "target.raw");
      const backup = await startBackup(server, guest);
      await expectFailure(
        backup,
        /^cowcatcher: \S+\/target\.raw: cannot write: no space left on the device at offset \d+ \(free space.*\)\n$/,
        1,
        mounted
          ? [/^cowcatcher: warning: \S+\/target\.raw: 2\.00 MiB are free there, .* may be needed\n$/]
          : [],
      );
      expectNoTarget();
      expect(leftovers(full)).toEqual([]);
      await expectUnharmed(server, guest);
    } finally {
      if (mounted) await run("umount", ["-l", full]);
    }
  });

  it("for a moment: the write is tried again", async () => {
    const { server, guest } = await serve("target-write:error=EIO,from=1M,to=2M,count=2");
    const backup = await startBackup(server, guest);
    await backup.succeed();
    await expectT0();
    await expectUnharmed(server, guest);
  });

  it("for good: the backup fails", async () => {
    const { server, guest } = await serve("target-write:error=EIO,from=1M,to=2M");
    const backup = await startBackup(server, guest, "--target-retries", "1");
    await expectFailure(
      backup,
      /^cowcatcher: \S+\/target\.qcow2: cannot write: input\/output error at offset \d+\n$/,
    );
    expectNoTarget();
    await expectUnharmed(server, guest);
  });

  it("for good, ignored as asked: exit code 3", async () => {
    const { server, guest } = await serve("target-write:error=EIO,from=1M,to=1025K");
    const ignore = ["--target-retries", "0", "--on-target-error", "ignore"];
    const backup = await startBackup(server, guest, ...ignore);
    expect((await backup.succeed(3)).ignored_errors).toBeGreaterThan(0);
    expect(existsSync(target)).toBe(true);
    await expectClean(target);
    await expectUnharmed(server, guest);
  });

  const STOP = ["--target-retries", "0", "--on-target-error", "stop"];

  async function statusOf(server: Server): Promise<string> {
    const { stdout } = await server.jobs("--json");
    return (JSON.parse(stdout) as { status: string }[])[0]?.status ?? "";
  }

  it("and the job stops until it is resumed", async () => {
    const { server, guest } = await serve("target-write:error=EIO,from=1M,to=2M,count=1");
    const backup = await startBackup(server, guest, ...STOP);
    await until("the job pauses", async () => (await statusOf(server)) === "paused");
    await guest.progress(20);
    expect((await server.jobs("resume", await backup.jobId())).code).toBe(0);
    await backup.succeed();
    await expectT0();
    await expectUnharmed(server, guest);
  });

  it("and the job stops and is given up", async () => {
    const { server, guest } = await serve("target-write:error=EIO,from=1M,to=2M,count=1");
    const backup = await startBackup(server, guest, ...STOP);
    await until("the job pauses", async () => (await statusOf(server)) === "paused");
    expect((await server.jobs("cancel", await backup.jobId())).code).toBe(0);
    await expectFailure(backup, /^cowcatcher: \S+: cannot write: input\/output error at offset \d+\n$/);
    expectNoTarget();
    await expectUnharmed(server, guest);
  });

  it.each(sampled(["hang", "delay"], 2))(
    "by not answering (%s): cancel does not wait for it",
    async (action) => {
      const { server, guest } = await serve(`target-write:${action}=600s`);
      const backup = await startBackup(server, guest);
      await guest.progress(20);
      const startMs = performance.now();
      expect((await server.jobs("cancel", await backup.jobId())).code).toBe(0);
      expect(performance.now() - startMs).toBeLessThan(STALL_MS_MAX);
      await expectFailure(backup, /^cowcatcher: \S+: the backup was cancelled\n$/);
      expectNoTarget();
      await expectUnharmed(server, guest);
    },
  );
});

describe("a source that cannot be read", () => {
  it("fails the backup", async () => {
    const { server, guest } = await serve("source-read:error=EIO,from=3M,to=4M");
    const backup = await startBackup(server, guest);
    await expectFailure(
      backup,
      /^cowcatcher: \S+\/disk\.qcow2: cannot read: input\/output error at offset \d+\n$/,
    );
    expectNoTarget();
    await expectUnharmed(server, guest);
  });

  it("is passed over, if asked", async () => {
    const { server, guest } = await serve("source-read:error=EIO,from=3M,to=4M");
    const backup = await startBackup(server, guest, "--on-source-error", "ignore");
    expect((await backup.succeed(3)).ignored_errors).toBeGreaterThan(0);
    await expectUnharmed(server, guest);
  });
});

describe("a worker", () => {
  it.each(
    sampled(
      [
        ["exits", "worker:exit,from=3M,to=4M", /^cowcatcher: \S+: a worker thread died: .*\n$/],
        ["throws", "worker:throw,from=3M,to=4M", /^cowcatcher: \S+: a fault asked for.*\n$/],
        [
          "throws while the target does not answer the others",
          "worker:delay=200ms,worker=0;worker:throw,worker=0;target-write:hang=600s",
          /^cowcatcher: \S+: a fault asked for.*\n$/,
        ],
        [
          "exits while the target does not answer the others",
          "worker:delay=200ms,worker=0;worker:exit,worker=0;target-write:hang=600s",
          /^cowcatcher: \S+: a worker thread died: .*\n$/,
        ],
      ] as const,
      3,
    ),
  )("%s", async (_what, faults, line) => {
    const { server, guest } = await serve(faults);
    // Without a buffer guest writes wait for workers all the time.
    const backup = await startBackup(server, guest, "--cow-buffer-size", "0");
    await expectFailure(backup, line);
    expectNoTarget();
    await expectUnharmed(server, guest);
  });

  it("is wrongly told to fail: one line names the variable", async () => {
    const { server, guest } = await serve("target-write:explode");
    const backup = await startBackup(server, guest);
    await expectFailure(backup, /^cowcatcher: COWCATCHER_FAULTS: 'explode' is no action \(give .*\)\n$/, 2);
    expectNoTarget();
    await expectUnharmed(server, guest);
  });
});

describe("a process that ends", () => {
  it("is a guest, killed in the middle of writes", async () => {
    const { server, guest } = await serve("target-write:delay=30ms");
    const backup = await startBackup(server, guest);
    await guest.progress(20);
    guest.process.kill("SIGKILL");
    const next = await server.guest(2);
    next.run();
    await backup.succeed();
    await expectT0();
    await expectUnharmed(server, next);
  });

  it.each(
    sampled(
      [
        ["SIGINT", 130],
        ["SIGTERM", 143],
      ] as const,
      2,
    ),
  )("is a live backup's, by %s", async (signal, expectedCode) => {
    const { server, guest } = await serve("target-write:delay=200ms");
    const backup = await startBackup(server, guest);
    await guest.progress(20);
    backup.process.kill(signal);
    await expectFailure(
      backup,
      new RegExp(`^cowcatcher: \\S+: interrupted by ${signal} .*\\n$`),
      expectedCode,
    );
    expectNoTarget();
    await expectUnharmed(server, guest);
  });

  it("is the server, by SIGTERM", async () => {
    const { server, guest } = await serve("target-write:delay=600s");
    const backup = await startBackup(server, guest);
    await guest.progress(20);
    await guest.pause();
    await guest.dump(join(folder, "end"));
    const { code, stderr } = await server.stop();
    expect(code).toBe(0);
    expect(stderr).toBe("");
    await expectFailure(backup, /^cowcatcher: .*\n$/);
    expectNoTarget();
    await expectSame(join(folder, "end"), disk);
    await expectClean(disk);
  });

  it("is the server, in the middle of writes, by SIGTERM", async () => {
    const { server, guest } = await serve("target-write:delay=20ms");
    const backup = await startBackup(server, guest, "--cow-buffer-size", "0");
    await guest.progress(5);
    expect((await server.stop()).code).toBe(0);
    await expectFailure(backup, /^cowcatcher: .*\n$/);
    expectNoTarget();
    await expectClean(disk);
  });

  it("is the server, killed: the next one removes what it left", async () => {
    const { server, guest } = await serve("target-write:delay=600s");
    const backup = await startBackup(server, guest);
    await guest.progress(20);
    await guest.pause();
    expect(leftovers(folder)).not.toEqual([]);
    server.process.kill("SIGKILL");
    await expectFailure(backup, /^cowcatcher: .*\n$/);
    expect(existsSync(target)).toBe(false);
    const next = await serve("");
    expect(await next.guest.verify()).toBe("same");
    await (await startBackup(next.server, next.guest)).succeed();
    expect(leftovers(folder)).toEqual([]);
    await expectT0();
    // A server that is killed may leak clusters, as QEMU's does; that is no harm.
    await expectUnharmed(next.server, next.guest, 3);
  });

  it("is an offline backup, killed: the next one removes what it left", async () => {
    const killed = new Backup([disk, target], { COWCATCHER_FAULTS: "target-write:delay=600s" });
    await killed.started();
    killed.process.kill("SIGKILL");
    expect((await killed.end()).code).toBe(137);
    expect(leftovers(folder)).not.toEqual([]);
    expect(existsSync(target)).toBe(false);
    await new Backup([disk, target]).succeed();
    expect(leftovers(folder)).toEqual([]);
    await expectSame(disk, target);
  });

  it.each(
    sampled(
      [
        ["SIGINT", 130],
        ["SIGTERM", 143],
      ] as const,
      2,
    ),
  )("is an offline backup, by %s", async (signal, expectedCode) => {
    const backup = new Backup([disk, target], { COWCATCHER_FAULTS: "target-write:hang=600s" });
    await backup.started();
    backup.process.kill(signal);
    await expectFailure(
      backup,
      new RegExp(`^cowcatcher: backup: interrupted by ${signal} \\(the unfinished file was removed\\)\\n$`),
      expectedCode,
    );
    expectNoTarget();
  });
});

describe("an offline backup", () => {
  it.each(
    sampled(
      [
        [
          "target-write:error=EIO",
          /^cowcatcher: \S+\/target\.qcow2: cannot write: input\/output error at offset \d+\n$/,
        ],
        [
          "target-write:error=ENOSPC",
          /^cowcatcher: \S+: cannot write: no space left on the device at offset.*\n$/,
        ],
        [
          "source-read:error=EIO",
          /^cowcatcher: \S+\/disk\.qcow2: cannot read: input\/output error at offset \d+\n$/,
        ],
        ["worker:exit,after=1", /^cowcatcher: \S+: a worker thread died: .*\n$/],
        ["worker:throw,after=1", /^cowcatcher: \S+: a fault asked for.*\n$/],
      ] as const,
      2,
    ),
  )("fails with %s and leaves what was there", async (faults, line) => {
    writeFileSync(target, "an older backup");
    const backup = new Backup([disk, target, "--force", "--target-retries", "0"], {
      COWCATCHER_FAULTS: faults,
    });
    await expectFailure(backup, line);
    expect(leftovers(folder)).toEqual([]);
    await expect(run("cat", [target])).resolves.toMatchObject({ stdout: "an older backup" });
  });
});
