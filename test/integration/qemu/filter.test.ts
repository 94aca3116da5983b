// `backup --qmp` by the method `filter`, against the real qemu-system-x86_64: what the backup holds is the disk at one
// instant, and QEMU is afterwards what it was before.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { expectSchema } from "../../support/json-schema.js";
import { cowcatcher } from "../../support/cli.js";
import { Qemu, type QemuOptions } from "../../support/qemu.js";
import { Backup, Process, scratchFolder, stopAll, until } from "../../support/server.js";

const MiB = 1024 * 1024;
/** QEMU is in use for some seconds: neither the target nor what is read ahead takes all of the disk before. */
const SLOWLY = ["--rate-limit", "1M", "--cow-buffer-size", "1M"];
const hasQemu = spawnSync("qemu-system-x86_64", ["--version"]).status === 0;

describe.skipIf(!hasQemu)("backup --qmp, method filter", () => {
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
    ["a raw disk of -drive, by its name", { isLegacy: true }, ["--disk", "drive0"]],
    [
      "a qcow2 disk in an iothread",
      { running: true, iothread: true, format: "qcow2" },
      ["--accept-guest-risk"],
    ],
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
      const running = backup(qemu, [...args, "-O", "raw", "--rate-limit", "16M", target]);
      await running.started();
      const afterT0 = qemu.writes.length;
      const summary = await running.succeed();
      const afterEnd = qemu.writes.length;
      await qemu.stopWriting();
      const instant = qemu.instantOf([target], earliest);
      expect(instant).toBeGreaterThanOrEqual(earliest);
      expect(instant).toBeLessThanOrEqual(afterT0 + 1);
      expect(afterEnd).toBeGreaterThan(afterT0);
      expect(summary).toMatchObject({ method: "filter", bytes: qemu.sizeBytes, guest_waits: 0 });
      await expectCleanHouse(qemu, before);
    },
  );

  it("has several disks at one instant, for which the guest stands still", async () => {
    const qemu = await Qemu.start(folder, { diskCount: 2, running: true });
    await qemu.fill();
    const before = await qemu.state();
    qemu.startWriting();
    const earliest = qemu.writes.length;
    const targets = [join(folder, "a.img"), join(folder, "b.img")];
    const disks = ["--disk", "drive0", "--disk", "vd1", "-O", "raw", "--rate-limit", "16M"];
    const running = backup(qemu, [...disks, ...targets]);
    const summary = await running.succeed();
    await qemu.stopWriting();
    expect(qemu.instantOf(targets, earliest)).toBeGreaterThanOrEqual(earliest);
    expect((summary as unknown as { guest_stopped_ms: number }).guest_stopped_ms).toBeGreaterThan(0);
    expectSchema("backup", summary);
    expect(await qemu.execute("query-status")).toMatchObject({ status: "running" });
    await expectCleanHouse(qemu, before);
  });

  it("reads what the guest has overwritten first, and lets QEMU forget it", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const running = backup(qemu, [...SLOWLY, "-O", "raw", join(folder, "backup.img")]);
    await running.started();
    const [run] = readdirSync(fleece);
    const file = join(fleece, run ?? "", "0.fleece");
    const used = (): number => statSync(file).blocks;
    // The end of the disk, to which the sweep comes after several seconds.
    await qemu.write(7 * MiB, 65_536, 251);
    expect(used()).toBeGreaterThan(0);
    await until("QEMU has forgotten it", () => used() === 0);
    const status = await running.process.line((line) => line.includes('"status"'));
    expect((JSON.parse(status) as { percent_done: number }).percent_done).toBeLessThan(0.8);
    // Nothing is copied there any more.
    await qemu.write(7 * MiB, 65_536, 252);
    expect(used()).toBe(0);
    running.process.kill("SIGINT");
    expect((await running.end()).code).toBe(130);
  });

  it("ends before the fleecing file passes its limit, and the guest goes on", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const before = await qemu.state();
    const target = join(folder, "backup.img");
    const limits = ["--cow-buffer-size", "1M", "--spill-limit", "1M", "--rate-limit", "256K"];
    const running = backup(qemu, [...limits, "-O", "raw", target]);
    await running.started();
    qemu.startWriting();
    const { code, stderr } = await running.end();
    await qemu.stopWriting();
    expect(code).toBe(13);
    expect(stderr).toContain("the guest has overwritten more than the fleecing file may hold (2.00 MiB)");
    expect(existsSync(target)).toBe(false);
    await expectCleanHouse(qemu, before);
  });

  it("leaves nothing at SIGINT", async () => {
    const qemu = await Qemu.start(folder, { format: "qcow2" });
    await qemu.fill();
    const before = await qemu.state();
    const target = join(folder, "backup.img");
    const running = backup(qemu, ["--rate-limit", "1M", target]);
    await running.started();
    running.process.kill("SIGINT");
    expect((await running.end()).code).toBe(130);
    expect(existsSync(target)).toBe(false);
    await expectCleanHouse(qemu, before);
  });

  it("keeps the guest from a target that hangs", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const before = await qemu.state();
    const socket = join(folder, "target.sock");
    const server = new Process("nbdkit", ["-f", "-U", socket, "memory", "32M"]);
    await until("nbdkit listens", () => existsSync(socket));
    const running = backup(qemu, ["--rate-limit", "4M", `nbd+unix:///?socket=${socket}`]);
    await running.started();
    server.kill("SIGSTOP");
    for (let i = 0; i < 100; i++) await qemu.writeSomewhere();
    running.process.kill("SIGINT");
    expect((await running.end()).code).toBe(130);
    qemu.expectNoGuestError();
    await expectCleanHouse(qemu, before);
  });

  describe("after kill -9", () => {
    async function killed(qemu: Qemu): Promise<void> {
      const running = backup(qemu, [...SLOWLY, join(folder, "lost.img")]);
      await running.started();
      await qemu.writeSomewhere();
      running.process.kill("SIGKILL");
      await running.end();
      for (let i = 0; i < 20; i++) await qemu.writeSomewhere();
      qemu.expectNoGuestError();
    }

    it("--cleanup makes QEMU what it was, and touches nothing else", async () => {
      const qemu = await Qemu.start(folder, { diskCount: 2 });
      await qemu.fill();
      const own = { driver: "null-co", "node-name": "cowcatcher-is-not-this", size: 65_536 };
      await qemu.execute("blockdev-add", own);
      const before = await qemu.state();
      const running = backup(qemu, [
        ...["--disk", "vd0", "--disk", "vd1", ...SLOWLY],
        ...[join(folder, "a.img"), join(folder, "b.img")],
      ]);
      await running.started();
      running.process.kill("SIGKILL");
      await running.end();
      for (let i = 0; i < 20; i++) await qemu.writeSomewhere();
      expect(await qemu.state()).not.toEqual(before);
      const cleaned = await cowcatcher([
        "backup",
        "--qmp",
        qemu.monitor,
        "--fleece-dir",
        fleece,
        "--cleanup",
      ]);
      expect(cleaned).toMatchObject({ code: 0, stderr: "" });
      qemu.expectNoGuestError();
      await expectCleanHouse(qemu, before);
      const again = await cowcatcher([
        ...["backup", "--qmp", qemu.monitor, "--fleece-dir", fleece, "--cleanup", "--json"],
      ]);
      expect(JSON.parse(again.stdout)).toEqual({ removed: [] });
      expectSchema("cleanup", JSON.parse(again.stdout));
    });

    it("the next backup does it by itself", async () => {
      const qemu = await Qemu.start(folder);
      await qemu.fill();
      const before = await qemu.state();
      await killed(qemu);
      const count = qemu.writes.length;
      const target = join(folder, "backup.img");
      await backup(qemu, [target]).succeed();
      expect(qemu.instantOf([target], count)).toBe(count);
      await expectCleanHouse(qemu, before);
    });
  });

  it("does not clean up after a backup that goes on, nor starts a second one of its disk", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const running = backup(qemu, [...SLOWLY, join(folder, "backup.img")]);
    await running.started();
    const during = await qemu.state();
    const cleaned = await cowcatcher(["backup", "--qmp", qemu.monitor, "--fleece-dir", fleece, "--cleanup"]);
    expect(cleaned.stdout).toContain("nothing was left");
    expect(await qemu.state()).toEqual(during);
    const second = await backup(qemu, ["--disk", "vd0", join(folder, "second.img")]).end();
    expect(second.code).toBe(1);
    expect(second.stderr).toContain("another backup of this disk is running");
    expect(await qemu.state()).toEqual(during);
    running.process.kill("SIGINT");
    await running.end();
  });

  it("needs the address of a server that runs already, and uses it", async () => {
    const qemu = await Qemu.start(folder);
    await qemu.fill();
    const socket = join(folder, "own-nbd.sock");
    await qemu.execute("nbd-server-start", { addr: { type: "unix", data: { path: socket } } });
    const before = await qemu.state();
    const target = join(folder, "backup.img");
    const refused = await backup(qemu, [target]).end();
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain("give its address with --nbd");
    expect(await qemu.state()).toEqual(before);
    await backup(qemu, ["--nbd", socket, target]).succeed();
    expect(qemu.instantOf([target], qemu.writes.length)).toBe(qemu.writes.length);
    expect(await qemu.state()).toEqual(before);
    // It is not ours to stop.
    await qemu.execute("nbd-server-stop");
  });

  it("refuses what cannot be, by name", async () => {
    const qemu = await Qemu.start(folder, { diskCount: 2, iothread: true });
    const target = join(folder, "backup.img");
    const risk = await backup(qemu, ["--disk", "vd0", target]).end();
    expect(risk.code).toBe(2);
    expect(risk.stderr).toContain("give --accept-guest-risk");
    const accepted = ["--accept-guest-risk"];
    const own = await backup(qemu, [...accepted, "--disk", "vd0", "--force", qemu.image()]).end();
    expect(own.code).toBe(2);
    expect(own.stderr).toContain("is in use by the guest");
    const wrong = await backup(qemu, [...accepted, "--disk", "vd7", target]).end();
    expect(wrong.stderr).toContain("it has vd0, vd1");
    const missing = await backup(qemu, [...accepted, target]).end();
    expect(missing).toMatchObject({ code: 2 });
    expect(missing.stderr).toContain("QEMU has several: vd0, vd1");
  });
});
