// When Ceph misbehaves: daemons that stop, die and come back, and our own process killed. A guest that is served goes on, a
// cancel ends the backup while Ceph hangs still, and nothing of one job is met by the next. No test here waits for a time limit of
// its own: what must end while Ceph hangs is awaited before Ceph goes on.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { cephDaemon, restartOsd } from "../../bench/lib/ceph.js";
import { cowcatcher } from "../support/cli.js";
import { testPool, type TestPool } from "../support/ceph.js";
import { expectSame, noise } from "../support/disks.js";
import { Backup, type Guest, mustRun, scratchFolder, Server, stopAll, until } from "../support/server.js";

const MiB = 1024 * 1024;
const SIZE = 12 * MiB;
/** So that a backup is under way for as long as a test needs. */
const SLOW = ["--rate-limit", "256K"];

let ceph: TestPool;
let folder: string;
const stopped = new Set<number>();

beforeAll(async () => {
  ceph = await testPool("rbd-failures");
});
beforeEach(() => {
  folder = scratchFolder();
  writeFileSync(at("disk.raw"), noise(SIZE));
});
afterEach(async () => {
  for (const pid of stopped) goOn(pid);
  await stopAll();
});
/** What these jobs could not remove, as Ceph hung until their process had ended, or it was killed. */
const LEFT_BEHIND = /^\.(again|hopeless)\./;

afterAll(() =>
  until("nothing else unfinished is left", async () =>
    (await unfinished()).every((name) => LEFT_BEHIND.test(name)),
  ),
);

const at = (name: string): string => join(folder, name);

function stop(daemon: "mon" | "osd"): number {
  const pid = cephDaemon(ceph.folder, daemon);
  process.kill(pid, "SIGSTOP");
  stopped.add(pid);
  return pid;
}

function goOn(pid: number): void {
  stopped.delete(pid);
  process.kill(pid, "SIGCONT");
}

async function imageNames(): Promise<string[]> {
  return JSON.parse(await ceph.rbd("ls", "--format", "json", ceph.pool)) as string[];
}

async function unfinished(): Promise<string[]> {
  return (await imageNames()).filter((name) => name.includes(".cowcatcher-"));
}

async function expectImage(image: string, expected: string): Promise<void> {
  await mustRun("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", expected, ceph.address(image));
}

/** A server with a guest that writes, and a backup that is under way. */
async function underWay(image: string): Promise<{ server: Server; guest: Guest; backup: Backup }> {
  const server = await Server.start(folder, [at("disk.raw")]);
  const guest = await server.guest(3);
  const backup = server.backup(ceph.address(image), ...SLOW);
  await backup.started();
  guest.run();
  await guest.progress(20);
  return { server, guest, backup };
}

async function expectGuestIsWell(server: Server, guest: Guest): Promise<void> {
  await guest.pause();
  expect(await guest.verify()).toBe("same");
  await guest.dump(at("end"));
  await guest.quit();
  expect((await server.stop()).code).toBe(0);
  await expectSame(at("end"), at("disk.raw"));
}

describe("the OSD stops", () => {
  it("the guest goes on, a cancel ends the backup, and the next job is not met by it", async () => {
    const { server, guest, backup } = await underWay("stopped");
    const osd = stop("osd");
    await guest.progress(60);
    expect((await server.jobs("cancel", await backup.jobId())).code).toBe(0);
    const { code, stderr } = await backup.end();
    expect(stderr).toContain("the backup was cancelled");
    expect(code).toBe(1);
    await guest.progress(20);
    // One more, while the first one's image is open still: it ends as the first one did.
    const second = server.backup(ceph.address("stopped"));
    await until("the job is there", async () => (await server.jobs("--json")).stdout.includes('"created"'));
    second.process.kill("SIGINT");
    expect((await second.end()).code).toBe(130);
    goOn(osd);
    await until("what was unfinished is gone", async () => (await unfinished()).length === 0);
    expect(await imageNames()).not.toContain("stopped");
    await guest.pause();
    await guest.dump(at("t0"));
    await server.backup(ceph.address("stopped"), "--verify").succeed();
    await expectImage("stopped", at("t0"));
    await expectGuestIsWell(server, guest);
  });

  it("for longer than a request may take, and goes on: the backup has what it should", async () => {
    const source = at("disk.raw");
    const address = ceph.address("slow", ":rados_osd_op_timeout=1");
    const backup = new Backup([source, address, "--rate-limit", "4M"]);
    await backup.started();
    const osd = stop("osd");
    await until("a request has timed out", async () => {
      await new Promise((settle) => setTimeout(settle, 3000));
      return true;
    });
    goOn(osd);
    await backup.succeed();
    await expectImage("slow", source);
  });

  it("for good: the first cause is what is said", async () => {
    const address = ceph.address("hopeless", ":rados_osd_op_timeout=1");
    const backup = new Backup([at("disk.raw"), address, "--target-retries", "0", ...SLOW]);
    await backup.started();
    const osd = stop("osd");
    const { code, stderr } = await backup.end();
    goOn(osd);
    expect(stderr).toMatch(
      /cannot write: Ceph did not answer in time at offset \d+ \(see `ceph -s`; rados_osd_op_timeout=SECONDS/,
    );
    expect(code).toBe(1);
  });
});

it("the OSD is killed and comes back: the backup has what it should", async () => {
  const { server, guest, backup } = await underWay("killed");
  await guest.pause();
  await backup.process.line((line) => line.includes('"status"'));
  process.kill(cephDaemon(ceph.folder, "osd"), "SIGKILL");
  guest.run();
  await guest.progress(60);
  restartOsd(ceph.folder);
  await backup.release(server);
  await mustRun("rbd", "-c", ceph.conf, "export", "--no-progress", `${ceph.pool}/killed`, at("export"));
  await mustRun("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", at("export"), ceph.address("killed"));
  await expectGuestIsWell(server, guest);
});

it("the monitor is silent: a new job says so, one that runs goes on", async () => {
  const { server, guest, backup } = await underWay("monitor");
  const monitor = stop("mon");
  const error = await cowcatcher(["info", ceph.address("monitor", ":client_mount_timeout=2")]);
  expect(error.stderr).toContain("cannot connect to Ceph: no monitor of Ceph's answered in time");
  await guest.progress(60);
  goOn(monitor);
  await backup.release(server);
  expect(await imageNames()).toContain("monitor");
  await expectGuestIsWell(server, guest);
});

it("our process is killed: nothing has the target's name, and the next one gives it", async () => {
  const backup = new Backup([at("disk.raw"), ceph.address("again"), ...SLOW]);
  await backup.started();
  backup.process.kill("SIGKILL");
  await backup.end();
  expect(await imageNames()).not.toContain("again");
  expect((await unfinished()).filter((name) => name.startsWith(".again."))).toHaveLength(1);
  await new Backup([at("disk.raw"), ceph.address("again")]).succeed();
  await expectImage("again", at("disk.raw"));
});

it("a start that waits for Ceph is cancelled, and the guest never notices", async () => {
  const server = await Server.start(folder, [at("disk.raw")]);
  const guest = await server.guest(4);
  guest.run();
  const osd = stop("osd");
  const backup = server.backup(ceph.address("start"));
  await until("the job is there", async () => (await server.jobs("--json")).stdout.includes('"created"'));
  await guest.progress(60);
  backup.process.kill("SIGTERM");
  expect((await backup.end()).code).toBe(143);
  await guest.progress(20);
  goOn(osd);
  await until(
    "nothing is left of it",
    async () => !(await unfinished()).some((name) => name.startsWith(".start.")),
  );
  await expectGuestIsWell(server, guest);
});
