// backup --control --repo against a real server: several disks are one backup of one T0, and what is tracked is not read
// again.
import { copyFileSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { expectSchema } from "../../support/json-schema.js";
import { good, type RepositoryResult, ServedRepository } from "../../support/repository/served-repository.js";
import { stopAll } from "../../support/server.js";

const MiB = 2 ** 20;
let served: ServedRepository;

beforeEach(async () => {
  served = await ServedRepository.start();
});
afterEach(stopAll);

describe("backup --control --repo", () => {
  it("makes one backup of all disks, then reads what has changed since, and heals what the store has lost", async () => {
    copyFileSync(served.at("root.raw"), served.at("root0.raw"));
    copyFileSync(served.at("data.qcow2"), served.at("data0.qcow2"));
    const running = served.backup("--rate-limit", "64K");
    await running.started();
    await served.write("root", "write -P 1 0 8M");
    await served.write("data", "write -P 2 64k 11M", "write -z 0 64k");
    for (const disk of ["root", "data"]) {
      const release = await served.server.jobs("set-speed", `${disk}-1`, "0");
      expect([release.stderr, release.code]).toEqual(["", 0]);
    }
    const first = (await running.succeed()) as unknown as RepositoryResult;
    expect(first).toMatchObject({
      level: "full",
      level_reason: "the group has no backup yet that can be read",
      disks: [{ disk: "root" }, { disk: "data" }],
    });
    expect(first.disks.every(({ captures }) => captures > 0)).toBe(true);
    for (const line of running.process.lines) expectSchema("backup", JSON.parse(line));
    await served.expectHolds(`root`, "root0.raw");
    await served.expectHolds(`data`, "data0.qcow2");
    // What was written since T0 has changed since the backup, and nothing else is read, not even of the same chunk.
    const second = await served.done();
    expect(second).toMatchObject({
      level: "incremental",
      level_reason: `what has changed since ${first.t0}`,
    });
    expect(second.disks.map(({ read_bytes }) => read_bytes)).toEqual([8 * MiB, 11 * MiB + 65536]);
    await served.write("root", "write -P 7 3M 512", "discard 5M 1M", "flush");
    // A chunk that is no hole, and not dirty.
    const [lost] = readdirSync(join(served.repo, "chunks"), { recursive: true, encoding: "utf8" }).filter(
      (name) => name.length > 60,
    );
    rmSync(join(served.repo, "chunks", lost ?? ""));
    const third = await served.done();
    expect(third).toMatchObject({ level: "incremental" });
    const read = third.disks.reduce((sum, disk) => sum + disk.read_bytes, 0);
    expect(read).toBeLessThanOrEqual(8 * MiB);
    await served.expectHolds(`root`, "root.raw");
    await served.expectHolds(`data@${third.t0}`, "data.qcow2");
    expect(served.locks).toEqual([]);
    // Without the backup that the checkpoint is of, all is read.
    await good("repo", "forget", `${served.repo}::vm@${third.t0}`, ...served.key);
    const refused = await served.backup("--level", "incremental").end();
    expect(refused.code).toBe(12);
    expect(refused.stderr + refused.stdout).toContain("knows nothing of the group's last backup");
    const full = await served.done("--disk", "root");
    expect(full).toMatchObject({
      level: "full",
      level_reason: expect.stringContaining("knows nothing") as string,
    });
    // The forgotten one's chunks are there; a patch by comparison may have fewer blocks than one by what was dirty.
    expect(full.new_bytes).toBeLessThan(2 * 65536);
  });
});
