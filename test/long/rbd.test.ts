// Ceph at its worst, for longer than a suite may take: a cluster of its own that is filled, shuts clients out, and loses its OSD
// again and again under live backups.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { tmpdir } from "node:os";
import { afterAll, afterEach, beforeAll, beforeEach, expect, it } from "vitest";
import { cephDaemon, type CephCluster, restartOsd, startCeph } from "../../bench/lib/ceph.js";
import { expectSame, noise } from "../support/disks.js";
import { Backup, mustRun, scratchFolder, Server, stopAll, until } from "../support/server.js";
import { Random } from "../support/random.js";

const MiB = 1024 * 1024;
const SIZE = 24 * MiB;
const ROUNDS = 10;
const SEED = Number(process.env["RBD_SEED"] ?? 1);
const SLOW = ["--rate-limit", "1M"];
/** A left-over image is not touched in its first minute. */
const STALE_MS = 75_000;

let ceph: CephCluster;
let home: string;
let folder: string;

beforeAll(async () => {
  // For all tests: a scratch folder goes with the first of them.
  home = mkdtempSync(join(tmpdir(), "cowcatcher-ceph-"));
  ceph = await startCeph(join(home, "ceph"));
});
afterAll(async () => {
  await ceph.stop();
  rmSync(home, { recursive: true, force: true });
});
beforeEach(() => {
  folder = scratchFolder();
  writeFileSync(at("disk.raw"), noise(SIZE));
});
afterEach(stopAll);

const at = (name: string): string => join(folder, name);
const address = (image: string): string => `rbd:rbd/${image}:conf=${ceph.conf}`;
const run = (program: "ceph" | "rbd", ...args: string[]): Promise<string> =>
  mustRun(program, "-c", ceph.conf, ...args);

async function names(): Promise<string[]> {
  return JSON.parse(await run("rbd", "ls", "--format", "json", "rbd")) as string[];
}

async function setFullRatios(full: number): Promise<void> {
  await run("ceph", "osd", "set-nearfull-ratio", String(full * 0.8));
  await run("ceph", "osd", "set-backfillfull-ratio", String(full * 0.9));
  await run("ceph", "osd", "set-full-ratio", String(full));
}

it("the cluster becomes full: the backup fails with that, the guest goes on", async () => {
  const server = await Server.start(folder, [at("disk.raw")]);
  const guest = await server.guest(1);
  const backup = server.backup(address("full"), ...SLOW);
  await backup.started();
  guest.run();
  await setFullRatios(0.001);
  const { code, stderr } = await backup.end();
  expect(stderr).toMatch(/cannot write: the pool or the cluster is full at offset \d+ \(see `ceph df`\)/);
  expect(code).toBe(1);
  await guest.progress(60);
  await guest.pause();
  expect(await guest.verify()).toBe("same");
  await setFullRatios(0.95);
  await until("there is room", async () => !(await run("ceph", "health")).includes("full"));
  await guest.dump(at("t0"));
  await server.backup(address("full")).succeed();
  await mustRun("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", at("t0"), address("full"));
  await guest.quit();
  await server.stop();
});

it("the client is shut out: the backup says so, and the next one is another client", async () => {
  const backup = new Backup([at("disk.raw"), address("out"), ...SLOW]);
  await backup.started();
  const unfinished = (await names()).find((name) => name.startsWith(".out."));
  const status = await run("rbd", "status", "--format", "json", `rbd/${unfinished ?? ""}`);
  const { watchers } = JSON.parse(status) as { watchers: { address: string }[] };
  await run("ceph", "osd", "blocklist", "add", watchers[0]?.address ?? "");
  const { code, stderr } = await backup.end();
  expect(stderr).toMatch(/cannot write: Ceph has shut this client out \(blocklisted\)/);
  expect(code).toBe(1);
  await new Backup([at("disk.raw"), address("out")]).succeed();
  await mustRun("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", at("disk.raw"), address("out"));
});

it("what a killed process left the next one removes, when it is a minute old", async () => {
  const backup = new Backup([at("disk.raw"), address("left"), ...SLOW]);
  await backup.started();
  backup.process.kill("SIGKILL");
  await backup.end();
  const unfinished = async (): Promise<number> =>
    (await names()).filter((name) => name.startsWith(".left.")).length;
  expect(await unfinished()).toBe(1);
  await new Promise((settle) => setTimeout(settle, STALE_MS));
  await new Backup([at("disk.raw"), address("left")]).succeed();
  expect(await unfinished()).toBe(0);
});

it(`live backups while the OSD stops, dies and comes back (seed ${SEED})`, async () => {
  const random = new Random(SEED);
  const server = await Server.start(folder, [at("disk.raw")]);
  const guest = await server.guest(SEED);
  for (let round = 0; round < ROUNDS; round++) {
    await guest.pause();
    await guest.dump(at("t0"));
    const snapshot = `round-${round}`;
    const backup = server.backup(address("campaign"), "--force", "--target-snapshot", snapshot, ...SLOW);
    await backup.started();
    guest.run();
    for (let blow = 0; blow < 3; blow++) {
      await guest.progress(20);
      const osd = cephDaemon(ceph.folder, "osd");
      if (random.chance(0.5)) {
        process.kill(osd, "SIGSTOP");
        await guest.progress(20 + random.below(200));
        process.kill(osd, "SIGCONT");
      } else {
        process.kill(osd, "SIGKILL");
        await guest.progress(20 + random.below(50));
        restartOsd(ceph.folder);
      }
    }
    await backup.release(server);
    await guest.pause();
    expect(await guest.verify()).toBe("same");
    const image = address(`campaign@${snapshot}`);
    await mustRun("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", at("t0"), image);
  }
  await guest.dump(at("end"));
  await guest.quit();
  expect((await server.stop()).code).toBe(0);
  await expectSame(at("end"), at("disk.raw"));
  expect((await names()).filter((name) => name.startsWith(".campaign."))).toEqual([]);
});
