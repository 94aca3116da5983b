// `backup --qmp` in the kinds of guests and the mishaps that test/integration/qemu has not: each guest by each method.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { ControlClient } from "../../src/qmp/client.js";
import { cowcatcher } from "../support/cli.js";
import { Qemu, type QemuOptions } from "../support/qemu.js";
import { expectChain } from "../support/qemu-chain.js";
import { Backup, mustRun, scratchFolder, stopAll } from "../support/server.js";

const RING = ["--qemu-method", "ring", "--accept-guest-risk"];
const hasQemu = spawnSync("qemu-system-x86_64", ["--version"]).status === 0;

describe.skipIf(!hasQemu)("backup --qmp, the long way round", () => {
  let folder = "";
  let fleece = "";

  beforeEach(() => {
    folder = scratchFolder();
    fleece = join(folder, "fleece");
    mkdirSync(fleece);
  });
  afterEach(stopAll);

  function backup(qemu: Qemu, args: readonly string[], env: Record<string, string> = {}): Backup {
    return new Backup(["--qmp", qemu.monitor, "--fleece-dir", fleece, ...args], env);
  }

  async function expectCleanHouse(qemu: Qemu, before: unknown): Promise<void> {
    expect(await qemu.state()).toEqual(before);
    expect(readdirSync(fleece)).toEqual([]);
    // QEMU's NBD server is stopped: it can be started.
    const address = { type: "unix", data: { path: join(folder, "probe.sock") } };
    await qemu.execute("nbd-server-start", { addr: address });
    await qemu.execute("nbd-server-stop");
  }

  const GUESTS: [string, QemuOptions, string[]][] = [
    ["a raw disk of -blockdev", {}, []],
    ["a qcow2 disk of -blockdev", { format: "qcow2" }, []],
    ["a disk of -drive, by its name", { isLegacy: true }, ["--disk", "drive0"]],
    ["a disk by its device's id, of a running guest", { running: true }, ["--disk", "vd0"]],
    ["a disk in an iothread", { running: true, iothread: true }, ["--accept-guest-risk"]],
    [
      "a qcow2 disk in an iothread",
      { running: true, iothread: true, format: "qcow2" },
      ["--accept-guest-risk"],
    ],
    ["a disk by the method ring", { running: true }, RING],
    ["a qcow2 disk by the method ring", { format: "qcow2" }, RING],
    ["a disk in an iothread by the method ring", { running: true, iothread: true }, RING],
    ["a raw disk of a storage daemon", { isDaemon: true }, RING],
  ];

  it.each(GUESTS)(
    "copies %s as it was at one instant, under a guest that never stops",
    async (_, options, args) => {
      const qemu = await Qemu.start(folder, options);
      await qemu.fill();
      const before = await qemu.state();
      qemu.startWriting();
      await qemu.progress(20);
      const earliest = qemu.writes.length;
      const target = join(folder, "backup.img");
      const nbd = options.isDaemon === true ? ["--nbd", qemu.nbdSocket] : [];
      const running = backup(qemu, [...args, ...nbd, "-O", "raw", "--rate-limit", "16M", target]);
      await running.started();
      const afterT0 = qemu.writes.length;
      const summary = await running.succeed();
      const afterEnd = qemu.writes.length;
      await qemu.stopWriting();
      const instant = qemu.instantOf([target], earliest);
      expect(instant).toBeGreaterThanOrEqual(earliest);
      expect(instant).toBeLessThanOrEqual(afterT0 + 1);
      expect(afterEnd).toBeGreaterThan(afterT0);
      expect(summary).toMatchObject({ bytes: qemu.sizeBytes });
      expect(await qemu.state()).toEqual(before);
      expect(readdirSync(fleece)).toEqual([]);
    },
  );

  it.each(["worker:exit,after=3", "worker:throw,after=3", "target-write:error=ENOSPC,after=3"])(
    "leaves nothing after a failure of its own: %s",
    async (fault) => {
      const qemu = await Qemu.start(folder);
      await qemu.fill();
      const before = await qemu.state();
      qemu.startWriting();
      const running = backup(qemu, [join(folder, "backup.img")], { COWCATCHER_FAULTS: fault });
      expect((await running.end()).code).toBe(1);
      await qemu.stopWriting();
      await expectCleanHouse(qemu, before);
    },
  );

  it("says so when QEMU ends in the middle", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const slowly = ["--rate-limit", "1M", "--cow-buffer-size", "1M"];
    const running = backup(qemu, [...slowly, join(folder, "backup.img")]);
    await running.started();
    await qemu.execute("quit").catch(() => undefined);
    const { code, stderr } = await running.end();
    expect(code).toBe(1);
    expect(stderr.trim().split("\n")).toHaveLength(1);
    expect(readdirSync(fleece)).toEqual([]);
  });

  it("goes on through a guest's reset, stop and continuation", async () => {
    const qemu = await Qemu.start(folder, { running: true });
    await qemu.fill();
    const count = qemu.writes.length;
    const target = join(folder, "backup.img");
    const running = backup(qemu, ["--rate-limit", "16M", target]);
    await running.started();
    await qemu.execute("system_reset");
    await qemu.execute("stop");
    await qemu.writeSomewhere();
    await qemu.execute("cont");
    await running.succeed();
    expect(qemu.instantOf([target], count)).toBe(count);
  });

  it("leaves the monitor to others while it copies", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const running = backup(qemu, ["--rate-limit", "16M", join(folder, "backup.img")]);
    await running.started();
    while (!running.process.over) {
      const other = await ControlClient.connect(qemu.monitor, { timeoutMs: 1000 });
      await other.execute("query-status");
      other.close();
    }
    await running.succeed();
  });

  it("writes a compressed qcow2 target, checked by --verify", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const count = qemu.writes.length;
    const target = join(folder, "backup.qcow2");
    await backup(qemu, ["-c", "--verify", target]).succeed();
    const flat = join(folder, "flat.img");
    await mustRun("qemu-img", "convert", "-O", "raw", target, flat);
    expect(qemu.instantOf([flat], count)).toBe(count);
  });

  it("leaves nothing at SIGTERM", async () => {
    const qemu = await Qemu.start(folder, { format: "qcow2" });
    await qemu.fill();
    const before = await qemu.state();
    const target = join(folder, "backup.img");
    const running = backup(qemu, ["--rate-limit", "1M", target]);
    await running.started();
    running.process.kill("SIGTERM");
    expect((await running.end()).code).toBe(143);
    expect(existsSync(target)).toBe(false);
    await expectCleanHouse(qemu, before);
  });

  it("by the method ring is cleaned up after kill -9, job and all, from which moment no guest write fails any more", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const before = await qemu.state();
    const slowly = ["--rate-limit", "64K", "--cow-buffer-size", "1M"];
    const running = backup(qemu, [...RING, ...slowly, join(folder, "lost.img")]);
    await running.started();
    await qemu.writeSomewhere();
    qemu.expectNoGuestError();
    running.process.kill("SIGKILL");
    await running.end();
    expect(await qemu.state()).not.toEqual(before);
    const cleaned = await cowcatcher([
      ...["backup", "--qmp", qemu.monitor, "--fleece-dir", fleece, "--cleanup"],
    ]);
    expect(cleaned).toMatchObject({ code: 0, stderr: "" });
    for (let i = 0; i < 20; i++) await qemu.writeSomewhere();
    qemu.expectNoGuestError();
    await expectCleanHouse(qemu, before);
  });

  it.each([
    ["filter", []],
    ["ring", RING],
  ])("makes a full backup and three incremental ones by QEMU's bitmaps, method %s", async (_, method) => {
    const qemu = await Qemu.start(folder, { format: "qcow2", running: true });
    await qemu.fill();
    const before = await qemu.state();
    qemu.startWriting();
    await expectChain(qemu, folder, 4, (args) => backup(qemu, [...method, "--bitmap", "auto", ...args]));
    await qemu.stopWriting();
    await expectCleanHouse(qemu, before);
  });
});
