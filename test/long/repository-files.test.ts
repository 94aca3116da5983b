// A backup's disk as a file, with the real nbdfuse, and the files in it, with the real guestfish; nothing stays mounted, also
// when killed.
import { spawnSync } from "node:child_process";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher, COWCATCHER_BIN, cowcatcherProcess } from "../support/cli.js";
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

/** Its virtual machine starts anew for each command; without KVM that takes a minute. */
describe.skipIf(!isInstalled("guestfish"))("files of the guest's", { timeout: 1_200_000 }, () => {
  const key = (): string[] => ["--key-file", at("key")];

  it("are listed, printed and copied", async () => {
    const listed = JSON.parse(await good("ls", "--json", backup, "/etc", ...key())) as object;
    expectSchema("ls", listed);
    expect(listed).toMatchObject({
      entries: [
        { name: "deep", type: "directory" },
        { name: "fstab", type: "file", size_bytes: 12 },
      ],
    });
    // Of a process of its own: it writes to the descriptor.
    const { stdout } = await cowcatcherProcess(["cat", backup, "/etc/fstab", "/etc/fstab", ...key()]);
    expect(stdout).toBe("none / none\n".repeat(2));
    await good("cp", backup, "/etc", at("mnt"), ...key());
    expect(readFileSync(at("mnt/etc/deep/blob")).equals(Buffer.alloc(300_000, "blob "))).toBe(true);
  });

  it("that are not there are named, and a command that is killed leaves no virtual machine", async () => {
    const none = await cowcatcher(["cat", backup, "/etc/none", ...key()]);
    expect([none.code, none.stderr]).toEqual([1, expect.stringContaining("No such file or directory")]);
    const args = [COWCATCHER_BIN, "ls", backup, ...key()];
    const killed = new Process(process.execPath, args);
    const machines = (): string[] =>
      readdirSync("/proc").filter((pid) => {
        try {
          return (
            /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, "utf8").includes("cowcatcher-files-")
          );
        } catch {
          return false;
        }
      });
    await until("its virtual machine runs", () => machines().length > 0, 300_000);
    killed.kill("SIGKILL");
    await killed.end();
    await until("all is gone", () => machines().length === 0, 60_000);
  });
});
