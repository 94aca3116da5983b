// A backup's disk as a file, with the real nbdfuse; nothing stays mounted, also when killed.
import { spawnSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { cowcatcher, COWCATCHER_BIN } from "../support/cli.js";
import { expectSchema } from "../support/json-schema.js";
import { mustRun, Process, scratchFolder, stopAll, until } from "../support/server.js";

const isInstalled = (name: string): boolean => spawnSync("sh", ["-c", `command -v ${name}`]).status === 0;
let folder: string;
let backup: string;
const at = (name: string): string => join(folder, name);

const isMounted = (): boolean => readFileSync("/proc/self/mountinfo", "utf8").includes(at("mnt"));

async function good(...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await cowcatcher(args);
  expect([stderr, code]).toEqual(["", 0]);
  return stdout;
}

beforeEach(async () => {
  folder = scratchFolder();
  mkdirSync(at("mnt"));
  mkdirSync(at("files/etc/deep"), { recursive: true });
  writeFileSync(at("files/etc/fstab"), "none / none\n");
  writeFileSync(at("files/etc/deep/blob"), Buffer.alloc(300_000, "blob "));
  await mustRun("truncate", "-s", "64M", at("disk.img"));
  await mustRun("mkfs.ext4", "-q", "-F", "-d", at("files"), at("disk.img"));
  await good("repo", "init", at("repo"), "--key-file", at("key"), "--new-key-file", "--chunk-size", "1M");
  await good("backup", at("disk.img"), "--repo", at("repo"), "--group", "vm", "--key-file", at("key"));
  backup = `${at("repo")}::vm@latest`;
});
afterEach(stopAll);

it.skipIf(!isInstalled("nbdfuse")).each<[NodeJS.Signals, number]>([
  ["SIGTERM", 0],
  ["SIGKILL", 137],
])("mount shows the disk until %s, and then nothing", async (signal, code) => {
  const args = ["mount", "--json", backup, at("mnt"), "--key-file", at("key")];
  const mount = new Process(process.execPath, [COWCATCHER_BIN, ...args]);
  const line = JSON.parse(await mount.line((text) => text.includes("mounted"))) as { path: string };
  expectSchema("mount", line);
  const { path } = line;
  await mustRun("cmp", path, at("disk.img"));
  mount.kill(signal);
  expect((await mount.end()).code).toBe(code);
  await until("it is unmounted", () => !isMounted());
});

it("mount says what is wrong before anything is mounted", async () => {
  const noKey = await cowcatcher(["mount", backup, at("mnt")]);
  expect([noKey.code, noKey.stderr]).toEqual([11, expect.stringContaining("the repository is encrypted")]);
  const noFolder = await cowcatcher(["mount", backup, at("nothing"), "--key-file", at("key")]);
  expect([noFolder.code, noFolder.stderr]).toEqual([2, expect.stringContaining("is no folder")]);
  const env = { PATH: "/nonexistent" };
  const none = await cowcatcher(["mount", backup, at("mnt"), "--key-file", at("key")], { env });
  expect([none.code, none.stderr]).toEqual([1, expect.stringContaining("nbdfuse is not installed")]);
});
