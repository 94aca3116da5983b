// `backup --libvirt` against the real libvirtd and its QEMU: what the backup holds is the disk at one instant, each of a chain
// is its T0, and the domain is afterwards what it was before, whatever happened.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher, type RunResult } from "../support/cli.js";
import { expectSchema } from "../support/json-schema.js";
import { Libvirt } from "../support/libvirt.js";
import type { Qemu } from "../support/qemu.js";
import { expectChain, flatOf, GroupOfDisks } from "../support/qemu-chain.js";
import { Backup, scratchFolder, stopAll, type Summary } from "../support/server.js";

const has = (program: string): boolean => spawnSync(program, ["--version"]).status === 0;
const hasLibvirt = has("virsh") && has("/usr/sbin/libvirtd") && has("qemu-system-x86_64");
const SIZE = 8 * 1024 * 1024 + 512;
const QCOW2 = { format: "qcow2" } as const;
const RAW = { format: "raw" } as const;

describe.skipIf(!hasLibvirt)("backup --libvirt", () => {
  let libvirt: Libvirt;
  let folder = "";
  /** In memory and the test's user's alone: libvirt's user gets the run's folder in it. */
  let fleece = "";

  beforeAll(async () => {
    libvirt = await Libvirt.start();
  });
  afterAll(async () => {
    await libvirt.stop();
    await stopAll();
  });
  beforeEach(() => {
    folder = scratchFolder();
    spawnSync("chmod", ["755", folder]);
    fleece = join(folder, "fleece");
    mkdirSync(fleece);
  });
  afterEach(async () => {
    await libvirt.endDomain();
  });

  const words = (...args: string[]): string[] => {
    return ["--libvirt", libvirt.name, "--connect", libvirt.uri, "--fleece-dir", fleece, ...args];
  };
  const backup = (...args: string[]): Backup => new Backup(words(...args));
  const cleanup = (): Promise<RunResult> => cowcatcher(["backup", ...words("--cleanup")]);

  async function startGuest(
    ...disks: Parameters<Libvirt["startDomain"]>[0]["disks"][number][]
  ): Promise<Qemu> {
    const qemu = await libvirt.startDomain({ sizeBytes: SIZE, disks });
    await qemu.fill();
    return qemu;
  }

  async function expectCleanHouse(qemu: Qemu, before: unknown): Promise<void> {
    expect(await qemu.state()).toEqual(before);
    expect(await libvirt.job()).toBe("None");
    expect(readdirSync(fleece)).toEqual([]);
    qemu.expectNoGuestError();
  }

  it("goes on from night to night by a job of `run`", async () => {
    const qemu = await startGuest(QCOW2);
    const before = await qemu.state();
    const target = join(folder, "b");
    mkdirSync(target);
    const jobs = join(folder, "jobs.yaml");
    const source = `libvirt: ${libvirt.name}, connect: "${libvirt.uri}", options: {fleece-dir: ${fleece}}`;
    const job = `{${source}, target: "${target}/{date}.qcow2", verify: true}`;
    writeFileSync(jobs, `jobs:\n  vm: ${job}\n`, { mode: 0o600 });
    let earliest = 1;
    for (const level of ["full", "incremental", "incremental"]) {
      qemu.startWriting();
      const { code, stdout } = await cowcatcher(["run", "--all", "--config", jobs, "--json"]);
      await qemu.stopWriting();
      const result = JSON.parse(stdout) as { jobs: unknown[] };
      expect([code, result.jobs]).toEqual([0, [expect.objectContaining({ level, error: null })]]);
      const last =
        readdirSync(target)
          .filter((name) => name.endsWith(".qcow2"))
          .sort()
          .at(-1) ?? "";
      const instant = qemu.instantOf([await flatOf(join(target, last))], earliest);
      expect(instant).toBeGreaterThanOrEqual(earliest);
      earliest = instant;
      // The base's was there until the new one had been checked.
      expect(await libvirt.checkpoints()).toHaveLength(1);
    }
    await expectCleanHouse(qemu, before);
  });

  it("freezes through libvirt around the beginning of its job, and says what the domain lacks for it", async () => {
    const qemu = await startGuest(QCOW2);
    const before = await qemu.state();
    const target = join(folder, "a.qcow2");
    const refused = await backup("--freeze", "libvirt", target).end();
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain("guest: the guest cannot be frozen: ");
    expect(refused.stderr).toContain("QEMU guest agent is not configured");
    await expectCleanHouse(qemu, before);
    // No operating system runs in this guest, so its agent is played; all the rest is libvirt's.
    const [bin, log] = [join(folder, "bin"), join(folder, "calls")];
    mkdirSync(bin);
    const played = `domfsinfo) exit 0;; domfsfreeze) echo "Froze 2 filesystem(s)"; exit 0;; domfsthaw) echo "Thawed 2 filesystem(s)"; exit 0;;`;
    const real = spawnSync("which", ["virsh"]).stdout.toString().trim();
    const script = `#!/bin/sh\necho "$3" >> ${log}\ncase $3 in ${played} esac\nexec ${real} "$@"\n`;
    writeFileSync(join(bin, "virsh"), script, { mode: 0o755 });
    const env = { PATH: `${bin}:${process.env["PATH"] ?? ""}` };
    const summary = await new Backup(words("--freeze", "libvirt", target), env).succeed();
    expect(summary).toMatchObject({ guest_frozen_file_systems: 2, guest_freeze_held: true });
    const calls = readFileSync(log, "utf8").split("\n");
    const around = calls.slice(calls.indexOf("domfsfreeze"), calls.indexOf("domfsthaw") + 1);
    expect(around[0]).toBe("domfsfreeze");
    expect(around).toContain("backup-begin");
    await expectCleanHouse(qemu, before);
  });

  it("makes a full one and three incrementals under a guest that never stops, each its T0", async () => {
    const qemu = await startGuest(QCOW2);
    const before = await qemu.state();
    qemu.startWriting();
    await expectChain(qemu, folder, 4, (args) => backup("--bitmap", "auto", ...args));
    await qemu.stopWriting();
    await expectCleanHouse(qemu, before);
    expect(await libvirt.checkpoints()).toEqual([
      expect.stringMatching(/^cowcatcher-checkpoint-[0-9a-f]{16}$/) as string,
    ]);
  });

  it("reads only what is dirty for a repository, each backup its T0, whatever became of the one before", async () => {
    const qemu = await startGuest(QCOW2, QCOW2);
    const before = await qemu.state();
    const group = await GroupOfDisks.init(qemu, folder, ["vda", "vdb"]);
    const next = (...args: string[]) => backup("--repo", group.repository, "--group", "vm", ...args);
    qemu.startWriting();
    expect(await group.expectNext(next())).toMatchObject({ level: "full" });
    expect(await group.expectNext(next())).toMatchObject({ level: "incremental" });
    await qemu.stopWriting();
    expect(await group.expectNext(next())).toMatchObject({ level: "incremental" });
    await qemu.write(group.chunkBytes * 3, 512, 77, 1);
    expect(await group.expectNext(next())).toMatchObject({
      level: "incremental",
      disks: [{ read_bytes: 0 }, { read_bytes: 65_536 }],
    });
    for (const signal of ["SIGINT", "SIGKILL"] as const) {
      const checkpoints = await libvirt.checkpoints();
      await qemu.writeSomewhere();
      const running = next("--level", "full", "--rate-limit", "64K");
      await running.started();
      await qemu.writeSomewhere();
      running.process.kill(signal);
      await running.end();
      // After a kill it is the next one that does it.
      if (signal === "SIGINT") expect(await libvirt.checkpoints()).toEqual(checkpoints);
      expect(await group.expectNext(next())).toMatchObject({ level: "incremental" });
      expect(group.instant).toBe(qemu.writes.length);
    }
    expect((await cleanup()).code).toBe(0);
    const [checkpoint, ...others] = await libvirt.checkpoints();
    expect(others).toEqual([]);
    await libvirt.virsh("checkpoint-delete", libvirt.name, checkpoint ?? "");
    const refused = await next("--level", "incremental").end();
    expect(refused.code).toBe(12);
    expect(refused.stderr).toContain(
      "libvirt has no checkpoint of what has changed since the group's last backup",
    );
    expect(await group.expectNext(next())).toMatchObject({
      level: "full",
      level_reason: expect.stringContaining("libvirt has no checkpoint") as string,
    });
    await group.expectNext(next("--bitmap", "none"));
    expect(await group.expectNext(next())).toMatchObject({
      level: "full",
      level_reason: expect.stringContaining("no bitmap was kept from") as string,
    });
    // None of an earlier one has stayed.
    expect(await libvirt.checkpoints()).toHaveLength(1);
    await expectCleanHouse(qemu, before);
  });

  it("has several disks at one instant, in files and in a repository", async () => {
    const qemu = await startGuest(QCOW2, RAW);
    const before = await qemu.state();
    qemu.startWriting();
    const earliest = qemu.writes.length;
    const targets = [join(folder, "a.img"), join(folder, "b.img")];
    const running = backup("--disk", "vda", "--disk", "vdb", "-O", "raw", "--rate-limit", "16M", ...targets);
    await running.started();
    const afterT0 = qemu.writes.length;
    const summary = await running.succeed();
    for (const line of running.process.lines) expectSchema("backup", JSON.parse(line));
    expect(summary).toMatchObject({ method: "libvirt", bytes: SIZE, guest_waits: 0 });
    expect(qemu.writes.length).toBeGreaterThan(afterT0);
    const repo = join(folder, "repo");
    await cowcatcher(["repo", "init", repo]);
    const between = qemu.writes.length;
    const stored: Summary = await backup("--repo", repo, "--group", "vm").succeed();
    expectSchema("backup", stored);
    expect(stored).toMatchObject({
      level: "full",
      level_reason: expect.stringContaining("vdb: is a raw disk") as string,
    });
    expect(await libvirt.checkpoints()).toEqual([]);
    await qemu.stopWriting();
    const instant = qemu.instantOf(targets, earliest);
    expect(instant).toBeGreaterThanOrEqual(earliest);
    expect(instant).toBeLessThanOrEqual(afterT0 + 1);
    const restored = ["vda", "vdb"].map((name) => join(folder, `restored-${name}`));
    for (const [index, name] of ["vda", "vdb"].entries()) {
      const { code } = await cowcatcher([
        "restore",
        "-O",
        "raw",
        `${repo}::vm/${name}`,
        restored[index] ?? "",
      ]);
      expect(code).toBe(0);
    }
    expect(qemu.instantOf(restored, between)).toBeGreaterThanOrEqual(between);
    await expectCleanHouse(qemu, before);
  });

  it("loses no write when a backup of the chain fails, is interrupted, or is killed", async () => {
    const qemu = await startGuest(QCOW2);
    const before = await qemu.state();
    const full = join(folder, "full.qcow2");
    const onto = ["--bitmap", "auto", "-b", full, "-B", "qcow2"];
    expect(await backup("--bitmap", "auto", full).succeed()).toMatchObject({
      level: "full",
      bitmap_action: "new",
    });
    const checkpoints = await libvirt.checkpoints();
    await qemu.writeSomewhere();
    const lost = join(folder, "lost.qcow2");
    for (const signal of ["SIGINT", "SIGKILL"] as const) {
      const running = backup(...onto, "--rate-limit", "1K", lost);
      await running.started();
      for (let i = 0; i < 5; i++) await qemu.writeSomewhere();
      running.process.kill(signal);
      expect((await running.end()).code).toBe(signal === "SIGINT" ? 130 : 137);
      for (let i = 0; i < 5; i++) await qemu.writeSomewhere();
      if (signal === "SIGINT") {
        expect(existsSync(lost)).toBe(false);
        expect(await libvirt.checkpoints()).toEqual(checkpoints);
        await expectCleanHouse(qemu, before);
      }
    }
    // The job of the dead run goes on, and its checkpoint is there.
    expect(await libvirt.job()).not.toBe("None");
    expect(await libvirt.checkpoints()).toHaveLength(2);
    const cleaned = await cleanup();
    expect(cleaned).toMatchObject({ code: 0, stderr: "" });
    expect(cleaned.stdout).toMatch(/removed job cowcatcher-\d+\.[0-9a-f]+\n.*removed cowcatcher-checkpoint-/);
    expect(await libvirt.checkpoints()).toEqual(checkpoints);
    await expectCleanHouse(qemu, before);
    expect((await cleanup()).stdout).toContain("nothing was left");
    const next = join(folder, "next.qcow2");
    expect(await backup(...onto, next).succeed()).toMatchObject({
      level: "incremental",
      bitmap_action: "used",
    });
    expect(qemu.instantOf([await flatOf(next)], 1)).toBe(qemu.writes.length);

    // The chain has gone on: what has changed since the full one is not known any more.
    const refused = await backup(...onto, join(folder, "late.qcow2")).end();
    expect(refused.code).toBe(12);
    expect(refused.stderr).toContain(`libvirt has no checkpoint of what has changed since ${full}`);
    const late = join(folder, "late.qcow2");
    const whole = await backup(...onto, "--since-or-full", late).succeed();
    expect(whole).toMatchObject({ level: "full", bitmap_action: "missing" });
    expect(qemu.instantOf([await flatOf(late)], 1)).toBe(qemu.writes.length);

    // A bitmap that was taken away behind libvirt's back.
    for (const name of await libvirt.checkpoints()) {
      const nodes = (await qemu.execute("query-named-block-nodes", { flat: true })) as Record<
        string,
        unknown
      >[];
      const node = nodes.find((found) => JSON.stringify(found["dirty-bitmaps"] ?? "").includes(name));
      await qemu.execute("block-dirty-bitmap-remove", { node: String(node?.["node-name"]), name });
    }
    const broken = await backup("--bitmap", "auto", "-b", late, "-B", "qcow2", join(folder, "x.qcow2")).end();
    expect(broken.code).toBe(12);
    expect(broken.stderr).toContain("recorded of vda is gone, or broken");
    await expectCleanHouse(qemu, before);
  });

  it("a full backup that begins another chain ends the one it replaces", async () => {
    const qemu = await startGuest(QCOW2);
    const first = join(folder, "first.qcow2");
    await backup("--bitmap", "auto", first).succeed();
    const [old] = await libvirt.checkpoints();
    await backup("--bitmap", "auto", "--bitmap-replaces", first, join(folder, "second.qcow2")).succeed();
    const now = await libvirt.checkpoints();
    expect(now).toHaveLength(1);
    expect(now).not.toContain(old);
    qemu.expectNoGuestError();
  });

  it("leaves another one's job alone, and says that there is one", async () => {
    await startGuest(QCOW2);
    const document = join(libvirt.folder, "foreign.xml");
    const place = join(libvirt.folder, "vm");
    writeFileSync(
      document,
      `<domainbackup mode='pull'><server transport='unix' socket='${place}/foreign.sock'/><disks>
        <disk name='vda' backup='yes' type='file'><scratch file='${place}/foreign.scratch'/></disk></disks></domainbackup>`,
    );
    await libvirt.virsh("backup-begin", libvirt.name, document);
    const refused = await backup(join(folder, "a.qcow2")).end();
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain("it has a job already (Backup), and libvirt does one at a time");
    expect((await cleanup()).stdout).toContain("nothing was left");
    expect(await libvirt.job()).not.toBe("None");
    await libvirt.virsh("domjobabort", libvirt.name);
  });

  it("does not clean up after a backup that goes on, and says what ended one from outside", async () => {
    const qemu = await startGuest(QCOW2);
    const before = await qemu.state();
    const target = join(folder, "a.qcow2");
    const running = backup("--rate-limit", "256K", target);
    await running.started();
    expect((await cleanup()).stdout).toContain("nothing was left");
    const second = await backup(join(folder, "b.qcow2")).end();
    expect(second.stderr).toContain("another backup of this domain is running");
    await libvirt.virsh("domjobabort", libvirt.name);
    const { code, stderr } = await running.end();
    expect(code).toBe(13);
    expect(stderr).toContain("libvirt's backup job ended before the disks were read");
    expect(existsSync(target)).toBe(false);
    await expectCleanHouse(qemu, before);
  });

  it("fails by name when the guest is shut down meanwhile, and when it does not run", async () => {
    await startGuest(QCOW2, QCOW2);
    const targets = [join(folder, "a.qcow2"), join(folder, "b.qcow2")];
    const disks = ["--disk", "vda", "--disk", "vdb", ...targets];
    const running = backup("--rate-limit", "256K", "--bitmap", "auto", ...disks);
    await running.started();
    await libvirt.virsh("destroy", libvirt.name);
    const { code, stderr } = await running.end();
    expect(code).toBe(13);
    expect(stderr).toContain("cowcatcher: guest: the guest was shut down while its disks were read");
    expect([readdirSync(fleece), ...targets.map((path) => existsSync(path))]).toEqual([[], false, false]);
    const refused = await backup(...disks).end();
    expect(refused.stderr).toContain("is shut off, and --libvirt is for guests that run");
    // Its checkpoint can be deleted when the guest runs again.
    expect(await libvirt.checkpoints()).toHaveLength(1);
    await libvirt.virsh("start", libvirt.name);
    expect((await cleanup()).stdout).toContain("removed cowcatcher-checkpoint-");
    expect(await libvirt.checkpoints()).toEqual([]);
    const missing = await cowcatcher(["backup", "--libvirt", "nobody", "--connect", libvirt.uri, "null:"]);
    expect(missing.code).toBe(1);
    expect(missing.stderr).toContain("has no such domain");
  });

  it("ends before the scratch file passes its limit, and the guest goes on", async () => {
    const qemu = await startGuest(QCOW2);
    const before = await qemu.state();
    const limits = ["--cow-buffer-size", "1M", "--spill-limit", "1M", "--rate-limit", "256K"];
    const running = backup(...limits, "--bitmap", "auto", join(folder, "a.qcow2"));
    await running.started();
    qemu.startWriting();
    const { code, stderr } = await running.end();
    await qemu.stopWriting();
    expect(code).toBe(13);
    expect(stderr).toContain("more than the scratch file may hold (2.00 MiB)");
    expect(await libvirt.checkpoints()).toEqual([]);
    await expectCleanHouse(qemu, before);
  });

  it("asks before it takes a disk in an iothread", async () => {
    const qemu = await startGuest({ ...QCOW2, isInIothread: true });
    const before = await qemu.state();
    const target = join(folder, "a.img");
    const refused = await backup(target).end();
    expect(refused.code).toBe(2);
    expect(refused.stderr).toContain("give --accept-guest-risk");
    await backup("--accept-guest-risk", "-O", "raw", target).succeed();
    expect(qemu.instantOf([target], qemu.writes.length)).toBe(qemu.writes.length);
    await expectCleanHouse(qemu, before);
  });
});
