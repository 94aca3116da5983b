// `ls`, `cat`, `cp`, with a guestfish that stands in for the real one, whose virtual machine takes a minute to start without
// KVM: the words that cross, names of all kinds, what is mounted, what goes wrong. The real one: test/long/repository-files.
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join, resolve } from "node:path";
import { beforeAll, beforeEach, expect, it } from "vitest";
import { cowcatcherProcess, type RunResult } from "../../support/cli.js";
import { expectSchema } from "../../support/json-schema.js";
import { scratchFolder } from "../../support/server.js";

const ODD_NAME = 'q"uo\\te $x\n~';
let folder: string;
let tree: string;
const at = (name: string): string => join(folder, name);
const seen = (): string => readFileSync(at("seen"), "utf8");

function command(args: readonly string[], env: Record<string, string> = {}): Promise<RunResult> {
  const path = `${resolve("test/support/programs")}:${process.env["PATH"] ?? ""}`;
  return cowcatcherProcess(args, {
    env: { PATH: path, GUEST_TREE: tree, GUEST_SEEN: at("seen"), TMPDIR: at("tmp"), ...env },
  });
}

beforeAll(() => {
  tree = join(scratchFolder(), "tree");
  mkdirSync(join(tree, "etc/deep"), { recursive: true });
  writeFileSync(join(tree, "etc/hosts"), "localhost\n");
  chmodSync(join(tree, "etc/hosts"), 0o640);
  writeFileSync(join(tree, "etc/deep/blob"), Buffer.alloc(300_000, "blob "));
  symlinkSync("etc/hosts", join(tree, "link"));
  writeFileSync(join(tree, ODD_NAME), "odd");
});

beforeEach(() => {
  folder = scratchFolder();
  mkdirSync(at("tmp"));
  writeFileSync(at("disk.raw"), Buffer.alloc(1 << 20, "data of the disk"));
});

it("ls lists a folder, whatever its names are, of the disk that it serves", async () => {
  const litter = at("tmp/cowcatcher-files-999999999-killed");
  mkdirSync(litter);
  const { code, stdout, stderr } = await command(["ls", at("disk.raw")]);
  expect([stderr, code]).toEqual(["", 0]);
  expect(stdout).toBe(`etc\nlink\n${ODD_NAME}\n`);
  expect(seen()).toContain("data.of.the.disk");
  expect(existsSync(litter)).toBe(false);
});

it("ls -l and --json say what each is", async () => {
  const long = await command(["ls", "-l", at("disk.raw"), "/etc"]);
  expect(long.stdout).toMatch(
    /^drwx.*deep\n-rw-r----- +\d+ +\d+ +10 \d{4}-\d\d-\d\d \d\d:\d\d:\d\d hosts\n$/,
  );
  const { stdout } = await command(["ls", "--json", at("disk.raw"), "/etc/hosts"]);
  const listed = JSON.parse(stdout) as object;
  expectSchema("ls", listed);
  expect(listed).toMatchObject({
    path: "/etc/hosts",
    entries: [{ name: "/etc/hosts", type: "file", mode: "0640", size_bytes: 10 }],
  });
});

it("cat prints files one after another, and stops at the first that is not there", async () => {
  const { code, stdout, stderr } = await command([
    "cat",
    at("disk.raw"),
    "/etc/hosts",
    ODD_NAME,
    "/none",
    "/etc/hosts",
  ]);
  expect(stdout).toBe("localhost\nodd");
  expect([code, stderr]).toEqual([
    1,
    expect.stringMatching(/^cowcatcher: .*\/none: No such file or directory.*\n$/),
  ]);
});

it("cp copies folders and files, and one file to a name", async () => {
  mkdirSync(at("out"));
  const { stdout } = await command(["cp", "--json", at("disk.raw"), "etc", `/${ODD_NAME}`, at("out")]);
  expectSchema("cp", JSON.parse(stdout));
  expect(readFileSync(at("out/etc/deep/blob")).equals(Buffer.alloc(300_000, "blob "))).toBe(true);
  expect(readFileSync(join(at("out"), ODD_NAME), "utf8")).toBe("odd");
  expect((await command(["cp", at("disk.raw"), "/etc/hosts", at("hosts.old")])).code).toBe(0);
  expect(readFileSync(at("hosts.old"), "utf8")).toBe("localhost\n");
  const two = await command(["cp", at("disk.raw"), "/etc", "/link", at("none")]);
  expect([two.code, two.stderr]).toEqual([2, expect.stringContaining("is no folder")]);
});

it("mounts what the guest mounts, though a part of it may fail; else the only file system, or the one that is named", async () => {
  expect((await command(["ls", at("disk.raw")], { GUEST_HAS_SYSTEM: "1" })).code).toBe(0);
  expect(seen()).toContain("mount /dev/sda1 /\nmount /dev/sda2 /boot\n");
  const several = { GUEST_FILE_SYSTEMS: "/dev/sda1: ext4,/dev/sda2: swap,/dev/sda3: xfs" };
  const which = await command(["ls", at("disk.raw")], several);
  expect(which.code).toBe(2);
  expect(which.stderr).toContain("has /dev/sda1 (ext4), /dev/sda3 (xfs) (say which one: --filesystem)");
  expect((await command(["ls", "--filesystem", "/dev/sda3", at("disk.raw")], several)).code).toBe(0);
  expect(seen()).toContain("mount /dev/sda3 /\n");
  const none = await command(["ls", at("disk.raw")], { GUEST_FILE_SYSTEMS: "/dev/sda: unknown" });
  expect([none.code, none.stderr]).toEqual([1, expect.stringContaining("no file system")]);
});

it("says that guestfish is missing, and leaves nothing in the temporary folder", async () => {
  const { code, stderr } = await command(["ls", at("disk.raw")], { PATH: "/nonexistent" });
  expect([code, stderr]).toEqual([1, expect.stringContaining("guestfish: is not installed")]);
  expect(readdirSync(at("tmp"))).toEqual([]);
});
