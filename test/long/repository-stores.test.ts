// A repository in a bucket, read by a page of Python, and with runs that are killed at any moment.
import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { COWCATCHER_BIN, cowcatcher, run, type RunResult } from "../support/cli.js";
import { Random } from "../support/random.js";
import { FakeS3 } from "../support/repository/fake-s3.js";

const MiB = 1024 * 1024;
const ROUNDS = Number(process.env["COWCATCHER_KILL_ROUNDS"] ?? 6);
let folder: string;
beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-stores-"));
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

const path = (name: string): string => join(folder, name);

function makeDisk(name: string, sizeBytes = 17 * MiB + 5): Buffer {
  const content = Buffer.concat([randomBytes(6 * MiB), Buffer.alloc(sizeBytes - 6 * MiB)]);
  content.write("text ".repeat(100_000), 9 * MiB);
  fs.writeFileSync(path(name), content);
  return content;
}

describe("a repository in a bucket", () => {
  it(
    "does what one in a folder does, through a server that fails now and then",
    { timeout: 120_000 },
    async () => {
      const fake = await FakeS3.listen({ pageSize: 5 });
      try {
        const env = fake.environment;
        const cli = async (...args: string[]): Promise<string> => {
          const result = await cowcatcher(args, { env });
          expect(result, result.stderr).toMatchObject({ code: 0 });
          return result.stdout;
        };
        const content = makeDisk("disk.img");
        await cli("repo", "init", fake.address, "--chunk-size", "1M");
        fake.faultFor = (_line, index) => (index % 11 === 3 ? { kind: "status", status: 503 } : undefined);
        await cli("backup", path("disk.img"), "--repo", fake.address, "--group", "vm1");
        fake.faultFor = (line, index) =>
          index % 13 === 5 ? { kind: "break", when: line.startsWith("GET") ? "before" : "after" } : undefined;
        const again = await cli(
          "backup",
          path("disk.img"),
          "--repo",
          fake.address,
          "--group",
          "vm1",
          "--json",
        );
        expect(JSON.parse(again.trim().split("\n").at(-1) ?? "")).toMatchObject({ new_bytes: 0 });
        fake.faultFor = (line, index) =>
          line.startsWith("GET") && index % 7 === 2 ? { kind: "cut" } : undefined;
        await cli("restore", `${fake.address}::vm1`, path("out.img"));
        expect(fs.readFileSync(path("out.img")).equals(content)).toBe(true);
        fake.faultFor = () => undefined;
        await cli("repo", "forget", `${fake.address}::vm1`, "--keep-last", "1");
        await cli("repo", "prune", fake.address);
        expect(await cli("repo", "verify", fake.address)).toContain("no damage");
        expect([...fake.objects.keys()].filter((name) => /locks|claims/.test(name))).toEqual([]);
      } finally {
        await fake.close();
      }
    },
  );

  it("says in one line what is wrong with the server", { timeout: 60_000 }, async () => {
    const fake = await FakeS3.listen();
    const { environment: env } = fake;
    const wrong = await cowcatcher(["repo", "init", fake.address.replace("backups", "other-one")], { env });
    expect(wrong).toMatchObject({ code: 1 });
    expect(wrong.stderr).toContain("there is no bucket other-one (make it first");
    await fake.close();
  });
});

describe("without this program", () => {
  it("a page of Python reads it", { timeout: 60_000 }, async () => {
    const content = makeDisk("disk.img");
    const repo = path("repo");
    expect((await cowcatcher(["repo", "init", repo, "--chunk-size", "1M"])).code).toBe(0);
    const made = await cowcatcher(["backup", path("disk.img"), "--repo", repo, "--group", "vm1", "--json"]);
    const { t0: first } = JSON.parse(made.stdout.trim().split("\n").at(-1) ?? "") as { t0: string };
    const before = Buffer.from(content);
    // One chunk becomes a patch, one that was a hole a whole chunk.
    content[3 * MiB + 5] ^= 1;
    content[content.length - 1] ^= 1;
    fs.writeFileSync(path("disk.img"), content);
    const again = await cowcatcher(["backup", path("disk.img"), "--repo", repo, "--group", "vm1", "--json"]);
    const { t0: time } = JSON.parse(again.stdout.trim().split("\n").at(-1) ?? "") as { t0: string };
    const script = "docs/read-repository.py";
    const listed = await run("python3", [script, repo]);
    expect(listed.stdout.trim()).toBe(`vm1 ${first} disk\nvm1 ${time} disk`);
    await run("python3", [script, repo, "vm1", first, "disk", path("out.img")]);
    expect(fs.readFileSync(path("out.img")).equals(before)).toBe(true);
    const read = await run("python3", [script, repo, "vm1", time, "disk", path("out.img")]);
    expect(read, read.stderr).toMatchObject({ code: 0 });
    expect(fs.readFileSync(path("out.img")).equals(content)).toBe(true);
    const index = join(repo, "groups", "vm1", time, "disk.index");
    const bytes = fs.readFileSync(index);
    bytes[bytes.length - 40] ^= 1;
    fs.writeFileSync(index, bytes);
    expect((await run("python3", [script, repo, "vm1", time, "disk", path("out.img")])).stderr).toContain(
      "damaged",
    );
  });
});

describe.each(["a folder", "a bucket"])("runs in %s that are killed at any moment", (place) => {
  let fake: FakeS3 | undefined;
  let env: Record<string, string> = {};
  beforeEach(async () => {
    fake = place === "a bucket" ? await FakeS3.listen() : undefined;
    env = fake?.environment ?? {};
  });
  afterEach(async () => fake?.close());

  it("harm no backup that is complete, and the next run works", { timeout: 600_000 }, async () => {
    const random = new Random(16);
    const repo = fake?.address ?? path("repo");
    const cli = (...args: string[]): Promise<RunResult> => cowcatcher(args, { env });
    const seen = new Map<string, Buffer>();
    let disk = makeDisk("disk.img", 9 * MiB);
    expect((await cli("repo", "init", repo, "--chunk-size", "1M")).code).toBe(0);
    for (let round = 0; round < ROUNDS; round++) {
      disk = Buffer.from(disk);
      randomBytes(3 * MiB).copy(disk, random.below(6) * MiB);
      fs.writeFileSync(path("disk.img"), disk);
      const work = random.pick([
        ["backup", path("disk.img"), "--repo", repo, "--group", "vm1"],
        ["backup", path("disk.img"), "--repo", repo, "--group", "vm1"],
        ["repo", "prune", repo],
        ["repo", "forget", `${repo}::vm1`, "--keep-last", "2"],
      ]);
      await killedAfter(
        spawn(process.execPath, [COWCATCHER_BIN, ...work], {
          stdio: "ignore",
          env: { ...process.env, ...env },
        }),
        random.below(900),
      );
      // What a killed one has completed is a backup of the disk as it was.
      for (const time of await times(cli, repo)) if (!seen.has(time)) seen.set(time, disk);
      const next = await cli("backup", path("disk.img"), "--repo", repo, "--group", "vm1");
      expect(next, next.stderr).toMatchObject({ code: 0 });
      for (const time of await times(cli, repo)) if (!seen.has(time)) seen.set(time, disk);
      const pruned = await cli("repo", "prune", repo);
      expect(pruned, pruned.stderr).toMatchObject({ code: 0 });
      const verified = await cli("repo", "verify", repo);
      expect(verified, verified.stderr).toMatchObject({ code: 0 });
    }
    for (const time of await times(cli, repo)) {
      await cli("restore", `${repo}::vm1@${time}`, path("out.img"), "--force");
      expect(fs.readFileSync(path("out.img")).equals(seen.get(time) ?? Buffer.alloc(0))).toBe(true);
    }
  });
});

async function times(cli: (...args: string[]) => Promise<RunResult>, repo: string): Promise<string[]> {
  const { stdout } = await cli("repo", "list", repo, "--json");
  return (JSON.parse(stdout) as { t0: string }[]).map(({ t0 }) => t0);
}

async function killedAfter(child: ChildProcess, ms: number): Promise<void> {
  const ended = new Promise((resolve) => child.once("exit", resolve));
  await Promise.race([ended, delay(ms)]);
  child.kill("SIGKILL");
  await ended;
}
