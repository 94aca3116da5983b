// backup --qmp --repo against the real qemu-system-x86_64: all disks are one backup of one instant.
import { spawnSync } from "node:child_process";
import { mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { cowcatcher } from "../support/cli.js";
import { expectSchema } from "../support/json-schema.js";
import { Qemu } from "../support/qemu.js";
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
