// `backup --qmp --bitmap auto`: a chain of incremental backups under a guest that never stops writing, each of which is
// the disk at its T0; and what becomes of QEMU's bitmaps when one fails.
import { spawnSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { IS_CAMPAIGN } from "../../support/campaign.js";
import { cowcatcher } from "../../support/cli.js";
import { Qemu } from "../../support/qemu.js";
import { expectChain, flatOf, GroupOfDisks } from "../../support/qemu-chain.js";
import { Backup, scratchFolder, stopAll, type Summary } from "../../support/server.js";

const hasQemu = spawnSync("qemu-system-x86_64", ["--version"]).status === 0;
const SIZE = 4 * 1024 * 1024 + 512;

describe.skipIf(!hasQemu)("backup --qmp --bitmap auto", () => {
  let folder = "";
  let fleece = "";

  beforeEach(() => {
    folder = scratchFolder();
    fleece = join(folder, "fleece");
    mkdirSync(fleece);
  });
  afterEach(stopAll);

  function backup(qemu: Qemu, args: readonly string[]): Backup {
    return new Backup(["--qmp", qemu.monitor, "--fleece-dir", fleece, "--bitmap", "auto", ...args]);
  }

  it("makes a full one and incrementals, each its T0", async () => {
    const qemu = await Qemu.start(folder, { sizeBytes: SIZE, format: "qcow2", running: true });
    await qemu.fill();
    const before = await qemu.state();
    qemu.startWriting();
    await expectChain(qemu, folder, 3, (args) => backup(qemu, args));
    await qemu.stopWriting();
    expect(await qemu.state()).toEqual(before);
    expect(await qemu.bitmaps()).toEqual([
      {
        name: expect.stringMatching(/^cowcatcher-bitmap-[0-9a-f]{16}$/) as string,
        recording: true,
        persistent: true,
      },
    ]);
  });

  it.runIf(IS_CAMPAIGN)("builds on the same base again where the next one was no good", async () => {
    const qemu = await Qemu.start(folder, { sizeBytes: SIZE, format: "qcow2", running: true });
    await qemu.fill();
    const place = (name: string): string => join(folder, `${name}.qcow2`);
    const next = (name: string): Backup =>
      backup(qemu, ["--bitmap-keeps-base", "-b", place("full"), "-B", "qcow2", place(name)]);
    const end = async (name: string): Promise<number> => {
      const words = ["--qmp", qemu.monitor, "--fleece-dir", fleece, "--cleanup"];
      expect((await cowcatcher(["backup", ...words, "--bitmap-replaces", place(name)])).code).toBe(0);
      return (await qemu.bitmaps()).length;
    };
    await backup(qemu, [place("full")]).succeed();
    const [own] = await qemu.bitmaps();
    qemu.startWriting();
    await next("bad").succeed();
    // Both go on; then the base's alone.
    expect(await qemu.bitmaps()).toEqual(expect.arrayContaining([own]));
    expect(await end("bad")).toBe(1);
    const earliest = qemu.writes.length;
    await next("good").succeed();
    await qemu.stopWriting();
    qemu.instantOf([await flatOf(place("good"))], earliest);
    expect(await end("full")).toBe(1);
    expect(await qemu.bitmaps()).not.toContainEqual(own);
    await backup(qemu, ["-b", place("good"), "-B", "qcow2", place("last")]).succeed();
    expect(qemu.instantOf([await flatOf(place("last"))], 1)).toBe(qemu.writes.length);
  });

  it("reads only what is dirty for a repository, each backup its T0", async () => {
    const qemu = await Qemu.start(folder, { sizeBytes: SIZE, format: "qcow2", running: true });
    await qemu.fill();
    const before = await qemu.state();
    const group = await GroupOfDisks.init(qemu, folder);
    const next = () =>
      new Backup([
        "--qmp",
        qemu.monitor,
        "--fleece-dir",
        fleece,
        "--repo",
        group.repository,
        "--group",
        "vm",
      ]);
    expect(await group.expectNext(next())).toMatchObject({ level: "full" });
    await qemu.write(group.chunkBytes * 2 + 4096, 512, 77);
    // One sector is dirty: of its chunk no more is read than the bitmap's unit, and that is stored as a patch.
    expect(await group.expectNext(next())).toMatchObject({
      level: "incremental",
      disks: [{ read_bytes: 65_536, new_chunks: 1 }],
    });
    qemu.startWriting();
    expect(await group.expectNext(next())).toMatchObject({ level: "incremental" });
    await qemu.stopWriting();
    expect(await qemu.state()).toEqual(before);
    expect(await qemu.bitmaps()).toEqual([
      {
        name: expect.stringMatching(/^cowcatcher-bitmap-[0-9a-f]{16}-[0-9a-f]{16}$/) as string,
        recording: true,
        persistent: true,
      },
    ]);
  });

  it.runIf(IS_CAMPAIGN)(
    "gives the bitmap back with all that was written since, after a failure and after kill -9; else exit 12",
    async () => {
      const qemu = await Qemu.start(folder, { sizeBytes: SIZE, format: "qcow2" });
      await qemu.fill();
      const full = join(folder, "full.qcow2");
      const onto = ["-b", full, "-B", "qcow2"];
      expect(await backup(qemu, [full]).succeed()).toMatchObject({ level: "full", bitmap_action: "new" });
      const bitmaps = await qemu.bitmaps();
      await qemu.writeSomewhere();
      for (const signal of ["SIGINT", "SIGKILL"] as const) {
        const running = backup(qemu, [...onto, "--rate-limit", "1K", join(folder, "lost.qcow2")]);
        await running.started();
        for (let i = 0; i < 5; i++) await qemu.writeSomewhere();
        running.process.kill(signal);
        await running.end();
        for (let i = 0; i < 5; i++) await qemu.writeSomewhere();
        // After a kill it is the next one that does it.
        if (signal === "SIGINT") expect(await qemu.bitmaps()).toEqual(bitmaps);
      }
      const cleaned = await cowcatcher([
        "backup",
        "--qmp",
        qemu.monitor,
        "--fleece-dir",
        fleece,
        "--cleanup",
      ]);
      expect(cleaned.code).toBe(0);
      expect(await qemu.bitmaps()).toEqual(bitmaps);
      const next = join(folder, "next.qcow2");
      const summary: Summary = await backup(qemu, [...onto, next]).succeed();
      expect(summary).toMatchObject({ level: "incremental", bitmap_action: "used" });
      expect(qemu.instantOf([await flatOf(next)], 1)).toBe(qemu.writes.length);
      // The chain has gone on: nothing is known any more of what has changed since the full one.
      const refused = await backup(qemu, [...onto, join(folder, "late.qcow2")]).end();
      expect(refused.code).toBe(12);
      expect(refused.stderr).toMatch(/drive0|vd0/);
      expect(refused.stderr).toContain(`QEMU has no bitmap of what has changed since ${full}`);
      const earlier = (await qemu.bitmaps()).map(({ name }) => name);
      const late = join(folder, "late.qcow2");
      const whole = await backup(qemu, [...onto, "--since-or-full", late]).succeed();
      expect(whole).toMatchObject({ level: "full", bitmap_action: "missing" });
      expect(qemu.instantOf([await flatOf(late)], 1)).toBe(qemu.writes.length);
      // One that was switched off has missed something.
      const own = (await qemu.bitmaps()).find(({ name }) => !earlier.includes(name));
      await qemu.execute("block-dirty-bitmap-disable", { node: "drive0", name: own?.name ?? "" });
      const missed = await backup(qemu, ["-b", late, "-B", "qcow2", join(folder, "x.qcow2")]).end();
      expect(missed.code).toBe(12);
      expect(missed.stderr).toContain("has not recorded all that was written");
    },
  );
});
