// `backup --qmp` by the method `ring`: QEMU sends old data here. Against the real qemu-system-x86_64 and the real
// qemu-storage-daemon.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { IS_CAMPAIGN } from "../../support/campaign.js";
import { Qemu, type QemuOptions } from "../../support/qemu.js";
import { Backup, Process, scratchFolder, stopAll, until } from "../../support/server.js";

const MiB = 1024 * 1024;
const has = (program: string): boolean => spawnSync(program, ["--version"]).status === 0;
const hasQemu = has("qemu-system-x86_64") && has("qemu-storage-daemon");
const SMALL = 8 * MiB + 512;

describe.skipIf(!hasQemu)("backup --qmp, method ring", () => {
  let folder = "";
  let fleece = "";

  beforeEach(() => {
    folder = scratchFolder();
    fleece = join(folder, "fleece");
    mkdirSync(fleece);
  });
  afterEach(stopAll);

  function backup(qemu: Qemu, args: readonly string[], env: Record<string, string> = {}): Backup {
    const method = ["--qemu-method", "ring", "--accept-guest-risk"];
    return new Backup(["--qmp", qemu.monitor, "--fleece-dir", fleece, ...method, ...args], env);
  }

  async function start(options: QemuOptions = {}): Promise<{ qemu: Qemu; before: unknown }> {
    const qemu = await Qemu.start(folder, { sizeBytes: SMALL, ...options });
    await qemu.fill();
    return { qemu, before: await qemu.state() };
  }

  async function expectCleanHouse(qemu: Qemu, before: unknown): Promise<void> {
    expect(await qemu.state()).toEqual(before);
    expect(readdirSync(fleece)).toEqual([]);
  }

  it("has several disks of QEMU at one instant without stopping the guest, captures spilled", async () => {
    const { qemu, before } = await start({ diskCount: 2, running: true, format: "qcow2" });
    qemu.startWriting();
    await qemu.progress(10);
    const earliest = qemu.writes.length;
    const targets = [join(folder, "a.img"), join(folder, "b.img")];
    const disks = ["--disk", "vd0", "--disk", "drive1", "-O", "raw", "--rate-limit", "4M"];
    const running = backup(qemu, [...disks, "--cow-buffer-size", "2M", ...targets]);
    await running.started();
    const afterT0 = qemu.writes.length;
    const summary = await running.succeed();
    await qemu.stopWriting();
    const instant = qemu.instantOf(targets, earliest);
    expect(instant).toBeGreaterThanOrEqual(earliest);
    expect(instant).toBeLessThanOrEqual(afterT0 + 1);
    expect(summary).toMatchObject({ method: "ring", method_reason: "as asked", guest_stopped_ms: 0 });
    expect(summary.captures).toBeGreaterThan(0);
    expect(await qemu.execute("query-status")).toMatchObject({ status: "running" });
    await expectCleanHouse(qemu, before);
  });

  it("is what a storage daemon's disks are backed up by", async () => {
    const { qemu, before } = await start({ isDaemon: true, diskCount: 2, format: "qcow2" });
    qemu.startWriting();
    await qemu.progress(10);
    const earliest = qemu.writes.length;
    const targets = [join(folder, "a.img"), join(folder, "b.img")];
    const args = ["--qmp", qemu.monitor, "--nbd", qemu.nbdSocket, "--fleece-dir", fleece, "-O", "raw"];
    const disks = ["--disk", "drive0", "--disk", "drive1", "--rate-limit", "8M", ...targets];
    const refused = await new Backup([...args, ...disks]).end();
    expect(refused.code).toBe(2);
    expect(refused.stderr).toMatch(/method ring: .*give --accept-guest-risk/);
    const summary = await new Backup([...args, "--accept-guest-risk", ...disks]).succeed();
    await qemu.stopWriting();
    expect(qemu.instantOf(targets, earliest)).toBeGreaterThanOrEqual(earliest);
    expect(summary).toMatchObject({ method: "ring" });
    await expectCleanHouse(qemu, before);
  });

  it.runIf(IS_CAMPAIGN)(
    "lets the guest go before it leaves QEMU, whatever fails, and no guest write fails",
    async () => {
      const { qemu, before } = await start({ sizeBytes: 32 * MiB });
      const socket = join(folder, "target.sock");
      const server = new Process("nbdkit", ["-f", "-U", socket, "memory", "32M"]);
      await until("nbdkit listens", () => existsSync(socket));
      qemu.startWriting();
      const target = join(folder, "backup.img");
      const cases: [readonly string[], Record<string, string>, number][] = [
        [[target], { COWCATCHER_FAULTS: "worker:exit,after=1" }, 1],
        [[target], { COWCATCHER_FAULTS: "target-write:error=ENOSPC,after=1" }, 1],
        [["--cow-buffer-size", "2M", "--on-buffer-full", "cancel", "--rate-limit", "64K", target], {}, 13],
      ];
      for (const [args, env, code] of cases) {
        expect((await backup(qemu, args, env).end()).code).toBe(code);
        expect(existsSync(target)).toBe(false);
      }
      // More than the workers hold at a time: the guest waits for room that does not come, as the target hangs; then the backup is given up.
      const wait = ["--cow-buffer-size", "2M", "--on-buffer-full", "wait"];
      const running = backup(qemu, [...wait, "--rate-limit", "64K", `nbd+unix:///?socket=${socket}`]);
      await running.started();
      server.kill("SIGSTOP");
      await until("a guest write waits", async () => {
        const count = qemu.writes.length;
        await new Promise((resolve) => setTimeout(resolve, 200));
        return qemu.writes.length === count;
      });
      running.process.kill("SIGINT");
      expect((await running.end()).code).toBe(130);
      await qemu.stopWriting();
      await expectCleanHouse(qemu, before);
    },
  );
});
