// backup --qmp --repo against the real qemu-system-x86_64: all disks are one backup of one instant, of which no more is read
// than has changed since the last one, as far as QEMU knows that.
import { spawnSync } from "node:child_process";
import { mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../support/cli.js";
import { expectSchema } from "../support/json-schema.js";
import { Qemu, type QemuOptions } from "../support/qemu.js";
import { GroupOfDisks } from "../support/qemu-chain.js";
import { Backup, scratchFolder, stopAll } from "../support/server.js";

const hasQemu = spawnSync("qemu-system-x86_64", ["--version"]).status === 0;

async function good(...args: string[]): Promise<void> {
  const { code, stderr } = await cowcatcher(args);
  expect([stderr, code]).toEqual(["", 0]);
}

afterEach(stopAll);

it.skipIf(!hasQemu)(
  "backs up all disks of a guest that writes on, and leaves nothing when cancelled",
  async () => {
    const folder = scratchFolder();
    const repo = join(folder, "repo");
    const fleece = join(folder, "fleece");
    mkdirSync(fleece);
    await good("repo", "init", repo, "--chunk-size", "1M");
    const qemu = await Qemu.start(folder, { diskCount: 2, running: true });
    await qemu.fill();
    const before = await qemu.state();
    qemu.startWriting();
    const earliest = qemu.writes.length;
    const args = ["--qmp", qemu.monitor, "--fleece-dir", fleece, "--repo", repo, "--group", "vm"];
    const running = new Backup([...args, "--rate-limit", "16M"]);
    await running.started();
    const afterT0 = qemu.writes.length;
    const summary = await running.succeed();
    await qemu.stopWriting();
    for (const line of running.process.lines) expectSchema("backup", JSON.parse(line));
    expect(summary).toMatchObject({
      level: "full",
      method: "filter",
      disks: [{ bytes: qemu.sizeBytes }, { bytes: qemu.sizeBytes }],
    });
    const names = (summary as unknown as { disks: { disk: string }[] }).disks.map(({ disk }) => disk);
    const restored = names.map((_, index) => join(folder, `restored${index}.img`));
    for (const [index, name] of names.entries())
      await good("restore", `${repo}::vm/${name}`, restored[index] ?? "");
    const instant = qemu.instantOf(restored, earliest);
    expect(instant).toBeGreaterThanOrEqual(earliest);
    expect(instant).toBeLessThanOrEqual(afterT0 + 1);
    const cancelled = new Backup([...args, "--rate-limit", "256K"]);
    await cancelled.started();
    cancelled.process.kill("SIGINT");
    expect(await cancelled.end()).toMatchObject({ code: 130 });
    expect(await qemu.state()).toEqual(before);
    expect(readdirSync(join(repo, "groups", "vm"))).toHaveLength(1);
    expect([readdirSync(join(repo, "locks")), readdirSync(fleece)]).toEqual([[], []]);
  },
);

describe.skipIf(!hasQemu)("backup --qmp --repo --level", () => {
  let folder = "";
  let fleece = "";
  const QCOW2: QemuOptions = { format: "qcow2", sizeBytes: 4 * 1024 * 1024 + 512 };

  beforeEach(() => {
    folder = scratchFolder();
    fleece = join(folder, "fleece");
    mkdirSync(fleece);
  });

  async function start(options: QemuOptions, disks?: readonly string[]): Promise<[Qemu, GroupOfDisks]> {
    const qemu = await Qemu.start(folder, options);
    await qemu.fill();
    return [qemu, await GroupOfDisks.init(qemu, folder, disks)];
  }

  function backup({ qemu, repository }: GroupOfDisks, ...args: string[]): Backup {
    const guest = ["--qmp", qemu.monitor, "--fleece-dir", fleece];
    return new Backup([...guest, "--repo", repository, "--group", "vm", ...args]);
  }

  async function expectRefused(running: Backup, reason: string): Promise<void> {
    const { code, stderr } = await running.end();
    expect(code).toBe(12);
    expect(stderr).toContain(reason);
    expect(stderr.trim().split("\n")).toHaveLength(1);
  }

  it.each<[string, QemuOptions, string[], string[]?]>([
    ["filter", { running: true }, []],
    ["filter, of two disks", { running: true, diskCount: 2 }, [], ["vd0", "vd1"]],
    [
      "filter, in an iothread",
      { running: true, iothread: true },
      ["--qemu-method", "filter", "--accept-guest-risk"],
    ],
    ["ring", { running: true }, ["--qemu-method", "ring", "--accept-guest-risk"]],
    [
      "ring, of two disks",
      { running: true, diskCount: 2 },
      ["--qemu-method", "ring", "--accept-guest-risk"],
      ["vd0", "vd1"],
    ],
    ["filter, of a raw disk", { running: true, format: "raw" }, []],
  ])(
    "is full and then incremental under a guest that never stops, each its T0: %s",
    async (_, options, args, disks) => {
      const [qemu, group] = await start({ ...QCOW2, ...options }, disks);
      const before = await qemu.state();
      qemu.startWriting();
      for (const level of ["full", "incremental", "incremental", "incremental"]) {
        const running = backup(group, "--rate-limit", "8M", ...args);
        expect(await group.expectNext(running)).toMatchObject({ level });
      }
      await qemu.stopWriting();
      await group.expectNext(backup(group, ...args));
      expect(group.instant).toBe(qemu.writes.length);
      const idle = await group.expectNext(backup(group, "--level", "incremental", ...args));
      expect(idle).toMatchObject({
        level: "incremental",
        disks: (disks ?? ["vd0"]).map((disk) => ({ disk, read_bytes: 0, new_chunks: 0 })),
      });
      expect(await qemu.state()).toEqual(before);
      for (const index of (disks ?? ["vd0"]).keys()) expect(await qemu.bitmaps(index)).toHaveLength(1);
    },
  );

  it("goes on after QEMU ended in good order, and is full after it did not, with the reason", async () => {
    const [first, group] = await start(QCOW2);
    await group.expectNext(backup(group));
    await first.quit();
    const go = async (): Promise<Qemu> => {
      const qemu = await Qemu.start(folder, { ...QCOW2, keepsImages: true });
      qemu.writes.push(...group.qemu.writes);
      group.qemu = qemu;
      return qemu;
    };
    const second = await go();
    await second.writeSomewhere();
    expect(await group.expectNext(backup(group))).toMatchObject({ level: "incremental" });
    await second.quit();
    const third = await go();
    third.process.kill("SIGKILL");
    await third.process.end();
    const fourth = await go();
    await fourth.writeSomewhere();
    await expectRefused(
      backup(group, "--level", "incremental"),
      "is inconsistent: QEMU did not end in good order",
    );
    expect(await group.expectNext(backup(group))).toMatchObject({
      level: "full",
      level_reason: expect.stringContaining("is inconsistent") as string,
    });
    // The broken one went with it.
    expect(await fourth.bitmaps()).toHaveLength(1);
    expect(await group.expectNext(backup(group))).toMatchObject({ level: "incremental" });
  });

  it("is full where the bitmap is gone, and where the last backup was forgotten or made by somebody else", async () => {
    const [qemu, group] = await start(QCOW2);
    await expectRefused(backup(group, "--level", "incremental"), "the group has no backup yet");
    await group.expectNext(backup(group));
    const [bitmap] = await qemu.bitmaps();
    await qemu.execute("block-dirty-bitmap-remove", { node: "drive0", name: bitmap?.name ?? "" });
    await qemu.writeSomewhere();
    await expectRefused(
      backup(group, "--level", "incremental"),
      "QEMU has no bitmap of what has changed since",
    );
    expect(await group.expectNext(backup(group))).toMatchObject({
      level: "full",
      level_reason: expect.stringContaining(
        "QEMU has no bitmap of what has changed since the group's last",
      ) as string,
    });
    expect(await group.expectNext(backup(group))).toMatchObject({ level: "incremental" });
    await good("repo", "forget", `${group.repository}::vm`, "--keep-last", "1");
    const [last] = readdirSync(join(group.repository, "groups", "vm"));
    await good("repo", "forget", `${group.repository}::vm@${last}`);
    expect(await group.expectNext(backup(group))).toMatchObject({
      level: "full",
      level_reason: "the group has no backup yet that can be read",
    });
    await qemu.writeSomewhere();
    await group.expectNext(backup(group));
    // With two there, the older one is the last when the newer is forgotten; its bitmap is no more.
    const newest = readdirSync(join(group.repository, "groups", "vm"))
      .sort()
      .at(-1);
    await good("repo", "forget", `${group.repository}::vm@${newest}`);
    expect(await group.expectNext(backup(group))).toMatchObject({ level: "full" });
    await qemu.writeSomewhere();
    // By somebody else: an image of this size, offline.
    const flat = join(folder, "vd0.flat");
    await good("backup", flat, "--disk", "vd0", "--repo", group.repository, "--group", "vm");
    expect(await group.expectNext(backup(group))).toMatchObject({
      level: "full",
      level_reason: expect.stringContaining("no bitmap was kept from") as string,
    });
    await group.expectNext(backup(group, "--bitmap", "none"));
    expect(await group.expectNext(backup(group))).toMatchObject({
      level: "full",
      level_reason: expect.stringContaining("no bitmap was kept from") as string,
    });
    expect(await qemu.bitmaps()).toHaveLength(1);
    expect(await group.expectNext(backup(group, "--level", "full"))).toMatchObject({
      level_reason: "as asked",
    });
    expect(await group.expectNext(backup(group))).toMatchObject({ level: "incremental" });
  });

  it("goes on from the last good backup after one that failed, by whatever", async () => {
    const [qemu, group] = await start(QCOW2);
    const before = await qemu.state();
    await group.expectNext(backup(group));
    const bitmaps = await qemu.bitmaps();
    for (const signal of ["SIGINT", "SIGKILL"] as const) {
      await qemu.writeSomewhere();
      const running = backup(group, "--rate-limit", "1K");
      await running.started();
      for (let i = 0; i < 5; i++) await qemu.writeSomewhere();
      running.process.kill(signal);
      await running.end();
      for (let i = 0; i < 5; i++) await qemu.writeSomewhere();
      // After a kill it is the next one that does it.
      if (signal === "SIGINT") expect([await qemu.bitmaps(), await qemu.state()]).toEqual([bitmaps, before]);
    }
    expect(await group.expectNext(backup(group))).toMatchObject({ level: "incremental" });
    expect(group.instant).toBe(qemu.writes.length);
    expect(await qemu.state()).toEqual(before);
    const failed = new Backup(
      ["--qmp", qemu.monitor, "--fleece-dir", fleece, "--repo", group.repository, "--group", "vm"],
      { COWCATCHER_FAULTS: "target-write:error=ENOSPC,after=0" },
    );
    await qemu.writeSomewhere();
    expect((await failed.end()).code).toBe(1);
    expect(await group.expectNext(backup(group))).toMatchObject({ level: "incremental" });
  });

  it("stores again what the store has lost of what it takes over", async () => {
    const [qemu, group] = await start(QCOW2);
    await group.expectNext(backup(group));
    rmSync(join(group.repository, "chunks"), { recursive: true });
    mkdirSync(join(group.repository, "chunks"));
    await qemu.write(0, 512, 99);
    const healed = await group.expectNext(backup(group));
    expect(healed).toMatchObject({ level: "incremental", disks: [{ read_bytes: qemu.sizeBytes }] });
  });

  it("is full where QEMU cannot keep a bitmap, and as good", async () => {
    const [qemu, group] = await start({ ...QCOW2, imageOptions: "compat=0.10" });
    for (let i = 0; i < 2; i++) {
      await qemu.writeSomewhere();
      expect(await group.expectNext(backup(group))).toMatchObject({
        level: "full",
        level_reason: expect.stringContaining(
          "no bitmap is kept for the next one: drive0: QEMU cannot keep a bitmap",
        ) as string,
      });
    }
    await expectRefused(backup(group, "--level", "incremental"), "QEMU has no bitmap");
    expect(await qemu.bitmaps()).toEqual([]);
  });

  it("goes on from night to night by a job of `run`, whose level says how", async () => {
    const [qemu, group] = await start(QCOW2);
    const jobs = join(folder, "jobs.yaml");
    const job = (level: string): void => {
      const source = `qmp: ${qemu.monitor}, options: {fleece-dir: ${fleece}}`;
      const text = `jobs:\n  vm: {${source}, repository: ${group.repository}, group: vm, level: ${level}}\n`;
      writeFileSync(jobs, text, { mode: 0o600 });
    };
    for (const [asked, level] of [
      ["auto", "full"],
      ["auto", "incremental"],
      ["full", "full"],
      ["incremental", "incremental"],
    ] as const) {
      job(asked);
      await qemu.writeSomewhere();
      const { code, stdout, stderr } = await cowcatcher(["run", "--all", "--config", jobs, "--json"]);
      expect([code, stderr]).toEqual([0, ""]);
      const result = JSON.parse(stdout) as { jobs: unknown[] };
      expect(result.jobs).toEqual([expect.objectContaining({ level, error: null })]);
    }
    await good("repo", "verify", group.repository);
  });
});
