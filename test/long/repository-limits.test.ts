// A store that is full, or may only be read; and a machine that runs on an overlay of a backup: no backup is ever harmed.
import { spawnSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher, COWCATCHER_BIN } from "../support/cli.js";
import { mustRun, Process, scratchFolder, stopAll } from "../support/server.js";

const MiB = 2 ** 20;
let folder: string;
const at = (name: string): string => join(folder, name);

async function good(...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await cowcatcher(args);
  expect([stderr, code]).toEqual(["", 0]);
  return stdout;
}

const isRoot = process.getuid?.() === 0;
const canMount = isRoot && spawnSync("unshare", ["--mount", "true"]).status === 0;

beforeEach(() => {
  folder = scratchFolder();
});
afterEach(async () => {
  spawnSync("umount", ["-l", at("small")]);
  await stopAll();
});

describe.skipIf(!canMount)("a store in a small file system", () => {
  beforeEach(async () => {
    mkdirSync(at("small"));
    await mustRun("mount", "-t", "tmpfs", "-o", "size=24m", "none", at("small"));
    await good("repo", "init", at("small/repo"), "--chunk-size", "1M");
    writeFileSync(at("kept.img"), randomBytes(6 * MiB));
    writeFileSync(at("large.img"), randomBytes(40 * MiB));
    await good("backup", at("kept.img"), "--repo", at("small/repo"), "--group", "kept");
  });

  it("that is full: the backup fails, those that are there stay, and forget and prune make room", async () => {
    const repo = at("small/repo");
    const failed = await cowcatcher(["backup", at("large.img"), "--repo", repo, "--group", "large"]);
    expect([failed.code, failed.stderr.trim().split("\n")]).toEqual([
      1,
      [expect.stringMatching(/no space|ENOSPC|full/i)],
    ]);
    expect(await good("repo", "verify", repo)).toContain("no damage");
    expect((await cowcatcher(["compare", at("kept.img"), `${repo}::kept`])).code).toBe(0);
    expect(readdirSync(join(repo, "locks"))).toEqual([]);
    await good("repo", "prune", repo);
    writeFileSync(at("next.img"), randomBytes(5 * MiB));
    await good("backup", at("next.img"), "--repo", repo, "--group", "next");
    expect((await cowcatcher(["compare", at("next.img"), `${repo}::next`])).code).toBe(0);
  });

  it("that may only be read: it is listed, verified and read, and a backup says why it cannot be", async () => {
    const repo = at("small/repo");
    await mustRun("mount", "-o", "remount,ro", at("small"));
    expect(JSON.parse(await good("repo", "list", repo, "--json"))).toHaveLength(1);
    expect((await cowcatcher(["compare", at("kept.img"), `${repo}::kept`])).code).toBe(0);
    const failed = await cowcatcher(["backup", at("large.img"), "--repo", repo, "--group", "large"]);
    expect([failed.code, failed.stderr.trim().split("\n")]).toEqual([
      1,
      [expect.stringMatching(/read-only|EROFS/i)],
    ]);
  });
});

/** Of every file's name, content and time of change. */
function stateOf(repo: string): string {
  const hash = createHash("sha256");
  const names = readdirSync(repo, { recursive: true, encoding: "utf8" }).sort();
  for (const name of names) {
    const stats = statSync(join(repo, name));
    if (stats.isFile()) hash.update(`${name}\0${stats.mtimeMs}\0`).update(readFileSync(join(repo, name)));
  }
  return hash.digest("hex");
}

it("a machine that writes to an overlay of a backup leaves the backup as it is", async () => {
  const repo = at("repo");
  await good("repo", "init", repo, "--chunk-size", "1M");
  writeFileSync(at("disk.img"), randomBytes(8 * MiB));
  await good("backup", at("disk.img"), "--repo", repo, "--group", "vm");
  const before = stateOf(repo);
  const socket = at("nbd.sock");
  const args = ["serve", "--read-only", "--socket", socket, `${repo}::vm@latest`];
  const server = new Process(process.execPath, [COWCATCHER_BIN, ...args]);
  await server.line((line) => line.includes("listening"));
  const uri = `nbd+unix:///disk?socket=${socket}`;
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, at("overlay.qcow2"));
  const writes = ["write -P 7 0 64k", "write -P 9 3M 2M", "discard 6M 1M", "flush"];
  await mustRun("qemu-io", "-f", "qcow2", ...writes.flatMap((line) => ["-c", line]), at("overlay.qcow2"));
  const reads = ["read -P 7 0 64k", "read -P 9 3M 2M"];
  await mustRun("qemu-io", "-f", "qcow2", ...reads.flatMap((line) => ["-c", line]), at("overlay.qcow2"));
  // What it may not write to at all says so.
  const direct = spawnSync("qemu-io", ["-f", "raw", "-c", "write 0 4k", uri]);
  expect(direct.status).not.toBe(0);
  server.kill("SIGTERM");
  expect((await server.end()).code).toBe(0);
  expect(stateOf(repo)).toBe(before);
  expect((await cowcatcher(["compare", at("disk.img"), `${repo}::vm`])).code).toBe(0);
});
