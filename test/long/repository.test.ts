// A repository through the command line: what goes in comes out, encrypted or not; damage is found, named, never read,
// and healed.
import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
// A process of its own for each command: the key is in this one's environment.
import { cowcatcherProcess as cowcatcher, run, type RunResult } from "../support/cli.js";

const MiB = 1024 * 1024;
let folder: string;
let repo: string;
beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-repository-"));
  repo = join(folder, "repo");
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

const path = (name: string): string => join(folder, name);

async function good(...args: string[]): Promise<RunResult> {
  const result = await cowcatcher(args);
  expect(result, result.stderr).toMatchObject({ code: 0 });
  return result;
}

/** Data, holes, zeroes that are written, and an odd end. */
function makeDisk(name: string, sizeBytes = 23 * MiB + 777): Buffer {
  const content = Buffer.alloc(sizeBytes);
  randomBytes(5 * MiB).copy(content, 1 * MiB);
  Buffer.alloc(3 * MiB, "compressible ").copy(content, 13 * MiB);
  randomBytes(700).copy(content, sizeBytes - 700);
  const fd = fs.openSync(path(name), "w");
  fs.ftruncateSync(fd, sizeBytes);
  fs.writeSync(fd, content, 0, 8 * MiB, 0);
  fs.writeSync(fd, content, 13 * MiB, sizeBytes - 13 * MiB, 13 * MiB);
  fs.closeSync(fd);
  return content;
}

function change(content: Buffer, name: string, offset: number): void {
  const fd = fs.openSync(path(name), "r+");
  const bytes = randomBytes(512);
  bytes.copy(content, offset);
  fs.writeSync(fd, bytes, 0, 512, offset);
  fs.closeSync(fd);
}

async function backup(...args: string[]): Promise<Record<string, unknown>> {
  const { stdout } = await good("backup", ...args, "--repo", repo, "--json");
  const lines = stdout.trim().split("\n");
  return JSON.parse(lines.at(-1) ?? "") as Record<string, unknown>;
}

async function list(): Promise<
  { group: string; t0: string; damaged?: string; disks: { new_bytes: number }[] }[]
> {
  return JSON.parse((await good("repo", "list", repo, "--json")).stdout) as never;
}

async function restored(address: string): Promise<Buffer> {
  await good("restore", address, path("out"), "--force", "-O", "raw");
  return fs.readFileSync(path("out"));
}

function chunks(): string[] {
  return fs
    .readdirSync(join(repo, "chunks"), { recursive: true, encoding: "utf8" })
    .filter((name) => name.length > 60)
    .map((name) => join(repo, "chunks", name));
}

/** What becomes of a chunk's file. */
const DAMAGES: [string, (file: string) => void][] = [
  ["a bit flipped", (file: string) => flip(file, fs.statSync(file).size >> 1)],
  ["its first byte changed", (file: string) => flip(file, 0)],
  ["a byte cut", (file: string) => fs.truncateSync(file, fs.statSync(file).size - 1)],
  ["emptied", (file: string) => fs.truncateSync(file, 0)],
  ["removed", (file: string) => fs.rmSync(file)],
  [
    "exchanged with another",
    (file: string) => {
      const other = chunks().find((name) => name !== file) ?? "";
      fs.renameSync(file, `${file}x`);
      fs.renameSync(other, file);
      fs.renameSync(`${file}x`, other);
    },
  ],
];

describe.each([
  ["not encrypted", false],
  ["encrypted", true],
])("a repository, %s", (_kind, isEncrypted) => {
  beforeEach(async () => {
    if (isEncrypted) {
      process.env["COWCATCHER_KEY_FILE"] = path("key");
      await good("repo", "init", repo, "--key-file", path("key"), "--new-key-file", "--chunk-size", "1M");
    } else {
      await good("repo", "init", repo, "--chunk-size", "1M");
    }
  });
  afterEach(() => void delete process.env["COWCATCHER_KEY_FILE"]);

  it("gives back each of several backups byte for byte, holes as holes", async () => {
    const content = makeDisk("disk.img");
    const first = await backup(path("disk.img"), "--group", "vm1");
    expect(first).toMatchObject({ level: "full", group: "vm1" });
    const before = Buffer.from(content);
    change(content, "disk.img", 2 * MiB + 100);
    const second = await backup(path("disk.img"), "--group", "vm1");
    expect(second["disks"]).toMatchObject([{ new_chunks: 1 }]);
    const third = await backup(path("disk.img"), "--group", "vm1");
    expect(third["new_bytes"]).toBe(0);
    expect((await restored(`${repo}::vm1@${String(first["t0"])}`)).equals(before)).toBe(true);
    expect((await restored(`${repo}::vm1`)).equals(content)).toBe(true);
    const { blocks } = fs.statSync(path("out"));
    expect(blocks * 512).toBeLessThan(10 * MiB);
    expect((await cowcatcher(["compare", path("disk.img"), `${repo}::vm1@latest`])).code).toBe(0);
    expect((await list()).map(({ t0 }) => t0)).toEqual([first["t0"], second["t0"], third["t0"]]);
  });

  it("holds qcow2 images as the disks they are, several in one backup, and maps them", async () => {
    const content = makeDisk("data.img");
    expect(
      (await run("qemu-img", ["convert", "-O", "qcow2", "-c", path("data.img"), path("root.qcow2")])).code,
    ).toBe(0);
    const result = await backup(path("root.qcow2"), path("data.img"), "--group", "vm2");
    expect(result["disks"]).toMatchObject([{ disk: "root" }, { disk: "data" }]);
    const root = await restored(`${repo}::vm2/root`);
    expect(root.subarray(0, content.length).equals(content)).toBe(true);
    expect((await restored(`${repo}::vm2/data`)).equals(content)).toBe(true);
    await good("restore", `${repo}::vm2/data`, path("out.qcow2"));
    const compared = await run("qemu-img", ["compare", path("data.img"), path("out.qcow2")]);
    expect(compared.code, compared.stdout).toBe(0);
    const unnamed = await cowcatcher(["info", `${repo}::vm2`]);
    expect(unnamed).toMatchObject({ code: 2 });
    expect(unnamed.stderr).toContain("vm2/root, vm2/data");
    expect(JSON.parse((await good("info", "--json", `${repo}::vm2/data`)).stdout)).toMatchObject({
      format: "raw",
      backup: { group: "vm2", disk: "data", level: "full" },
    });
    const map = JSON.parse((await good("map", "--json", `${repo}::vm2/data`)).stdout) as { zero: boolean }[];
    expect(map.some(({ zero }) => zero)).toBe(true);
  });

  it("a backup of a backup, into a file and into another group", async () => {
    const content = makeDisk("disk.img");
    await backup(path("disk.img"), "--group", "vm1");
    await good("backup", `${repo}::vm1`, path("copy.qcow2"));
    expect((await cowcatcher(["compare", path("disk.img"), path("copy.qcow2")])).code).toBe(0);
    const copied = await backup(`${repo}::vm1`, "--disk", "disk", "--group", "copy");
    expect(copied["new_bytes"]).toBe(0);
    expect((await restored(`${repo}::copy`)).equals(content)).toBe(true);
  });

  it.each(DAMAGES)(
    "a chunk with %s: never a wrong byte, named by verify, healed by the next backup",
    async (_what, harm) => {
      const content = makeDisk("disk.img");
      const { t0: time } = await backup(path("disk.img"), "--group", "vm1");
      harm(chunks()[0] ?? "");
      const failed = await cowcatcher(["restore", `${repo}::vm1`, path("out.img")]);
      expect(failed.code).toBe(1);
      expect(failed.stderr).toMatch(/damaged|missing/);
      expect(fs.existsSync(path("out.img"))).toBe(false);
      expect((await cowcatcher(["compare", path("disk.img"), `${repo}::vm1`])).code).toBe(2);
      const verified = await cowcatcher(["repo", "verify", repo]);
      expect(verified.code, verified.stderr).toBe(4);
      expect(verified.stderr).toContain(`vm1@${String(time)}`);
      expect((await backup(path("disk.img"), "--group", "vm1"))["new_bytes"]).not.toBe(0);
      await good("repo", "verify", repo);
      expect((await restored(`${repo}::vm1@${String(time)}`)).equals(content)).toBe(true);
    },
  );

  it.each(["manifest", "disk.index"])("%s of another backup in its place is refused", async (object) => {
    makeDisk("disk.img");
    const old = await backup(path("disk.img"), "--group", "vm1");
    change(Buffer.alloc(23 * MiB), "disk.img", MiB);
    const now = await backup(path("disk.img"), "--group", "vm1");
    const place = (time: unknown): string => join(repo, "groups", "vm1", String(time), object);
    fs.copyFileSync(place(old["t0"]), place(now["t0"]));
    const failed = await cowcatcher(["restore", `${repo}::vm1`, path("out.img")]);
    expect(failed).toMatchObject({ code: 1 });
    expect(failed.stderr).toContain("was not written under this name");
    const verified = await cowcatcher(["repo", "verify", repo]);
    expect(verified.code).toBe(4);
    expect(verified.stderr).toContain(String(now["t0"]));
    // What cannot be read may refer to anything: nothing is freed.
    expect((await cowcatcher(["repo", "prune", repo])).code).toBe(1);
    await good("repo", "forget", `${repo}::vm1@${String(now["t0"])}`);
    await good("repo", "prune", repo);
    await good("repo", "verify", repo);
  });

  it("forget, protect and prune: what goes, what stays, and why", async () => {
    const content = makeDisk("disk.img");
    for (let i = 0; i < 4; i++) {
      change(content, "disk.img", MiB + i * 512);
      await backup(path("disk.img"), "--group", "vm1");
    }
    const times = (await list()).map(({ t0 }) => t0);
    await good("repo", "protect", `${repo}::vm1@${times[0]}`);
    expect(await cowcatcher(["repo", "forget", `${repo}::vm1`])).toMatchObject({ code: 2 });
    const dry = await good("repo", "forget", `${repo}::vm1`, "--keep-last", "1", "--dry-run");
    expect(dry.stdout).toContain("would forget");
    expect(await list()).toHaveLength(4);
    const said = await good("repo", "forget", `${repo}::vm1`, "--keep-last", "1");
    expect(said.stdout).toMatch(/kept: protected[\s\S]*forgotten: no rule[\s\S]*kept: keep-last/);
    expect((await list()).map(({ t0 }) => t0)).toEqual([times[0], times[3]]);
    expect(await cowcatcher(["repo", "forget", `${repo}::vm1@${times[0]}`])).toMatchObject({ code: 1 });
    const count = chunks().length;
    const pruned = JSON.parse((await good("repo", "prune", repo, "--json")).stdout) as { deleted: number };
    expect(pruned.deleted).toBeGreaterThan(0);
    expect(chunks()).toHaveLength(count - pruned.deleted);
    await good("repo", "verify", repo);
    expect((await restored(`${repo}::vm1`)).equals(content)).toBe(true);
    await good("repo", "unprotect", `${repo}::vm1@${times[0]}`);
    await good("repo", "forget", `${repo}::vm1`, "--keep-last", "1");
    expect(await list()).toHaveLength(1);
  });

  it("a backup that is interrupted leaves no backup, and the next one is whole", async () => {
    const content = makeDisk("disk.img");
    const faults = { COWCATCHER_FAULTS: "target-write:error=ENOSPC,after=3" };
    const failed = await cowcatcher(["backup", path("disk.img"), "--repo", repo, "--group", "vm1"], {
      env: faults,
    });
    expect(failed.code).toBe(1);
    expect(failed.stderr).toContain("no space");
    expect(await list()).toEqual([]);
    expect(fs.readdirSync(join(repo, "locks"))).toEqual([]);
    await backup(path("disk.img"), "--group", "vm1");
    expect((await restored(`${repo}::vm1`)).equals(content)).toBe(true);
  });
});

function flip(file: string, at: number): void {
  const content = fs.readFileSync(file);
  content[at] = (content[at] ?? 0) ^ 4;
  fs.writeFileSync(file, content);
}

describe("an encrypted repository", () => {
  const init = (...args: string[]): Promise<RunResult> => cowcatcher(["repo", "init", repo, ...args]);

  it("opens with its key file alone: else exit code 11, one line", async () => {
    fs.writeFileSync(path("wrong"), randomBytes(32));
    expect((await init("--key-file", path("key"), "--new-key-file")).code).toBe(0);
    expect(fs.statSync(path("key")).mode & 0o777).toBe(0o600);
    for (const key of [["--key-file", path("wrong")], []]) {
      const result = await cowcatcher(["repo", "list", repo, ...key]);
      expect(result).toMatchObject({ code: 11, stdout: "" });
      expect(result.stderr.trim().split("\n")).toHaveLength(1);
    }
    expect((await cowcatcher(["repo", "list", repo, "--key-file", path("key")])).code).toBe(0);
  });

  it(
    "has several keys, and a new passphrase needs no data to be written again",
    { timeout: 60_000 },
    async () => {
      fs.writeFileSync(path("one"), "first passphrase\n");
      fs.writeFileSync(path("two"), "second passphrase\n");
      expect((await init("--passphrase-file", path("one"))).code).toBe(0);
      makeDisk("disk.img");
      const asOne = ["--passphrase-file", path("one")];
      expect(
        (await cowcatcher(["backup", path("disk.img"), "--repo", repo, "--group", "a", ...asOne])).code,
      ).toBe(0);
      const before = chunks().map((file) => fs.statSync(file).mtimeMs);
      expect(
        (await cowcatcher(["repo", "key", "change", repo, ...asOne, "--to-passphrase-file", path("two")]))
          .code,
      ).toBe(0);
      expect((await cowcatcher(["repo", "verify", repo, ...asOne])).code).toBe(11);
      const asTwo = ["--passphrase-file", path("two")];
      expect((await cowcatcher(["repo", "verify", repo, ...asTwo])).code).toBe(0);
      expect(chunks().map((file) => fs.statSync(file).mtimeMs)).toEqual(before);
      fs.writeFileSync(path("key"), randomBytes(32));
      expect(
        (await cowcatcher(["repo", "key", "add", repo, ...asTwo, "--to-key-file", path("key")])).code,
      ).toBe(0);
      expect((await cowcatcher(["repo", "list", repo, "--key-file", path("key")])).code).toBe(0);
      expect((await cowcatcher(["repo", "list", repo, ...asTwo])).code).toBe(0);
    },
  );

  it("refuses a key for one that says that it is not encrypted", async () => {
    expect((await init()).code).toBe(0);
    fs.writeFileSync(path("key"), randomBytes(32));
    const result = await cowcatcher(["repo", "list", repo, "--key-file", path("key")]);
    expect(result).toMatchObject({ code: 11 });
    expect(result.stderr).toContain("not encrypted");
  });

  it("shows nothing of a disk, and not that two repositories hold the same", async () => {
    const text = "the quick brown fox jumps over ";
    fs.writeFileSync(path("disk.img"), Buffer.alloc(3 * MiB, text));
    fs.writeFileSync(path("key"), randomBytes(32));
    const names: string[][] = [];
    for (const name of ["repo", "repo2"]) {
      repo = path(name);
      expect((await init("--key-file", path("key"), "--compression", "none")).code).toBe(0);
      await good("backup", path("disk.img"), "--repo", repo, "--group", "a", "--key-file", path("key"));
      names.push(chunks().map((file) => file.slice(repo.length)));
      for (const file of fs.readdirSync(repo, { recursive: true, encoding: "utf8" })) {
        const whole = join(repo, file);
        if (fs.statSync(whole).isFile()) expect(fs.readFileSync(whole).includes("quick brown")).toBe(false);
      }
    }
    expect(names[0]?.filter((name) => names[1]?.includes(name))).toEqual([]);
  });
});

describe("a repository that is none, or cannot be written", () => {
  it("is said so in one line", async () => {
    const missing = await cowcatcher(["repo", "list", path("nowhere")]);
    expect(missing).toMatchObject({ code: 1 });
    expect(missing.stderr).toContain("there is no repository (make one with");
    await good("repo", "init", repo);
    expect((await cowcatcher(["repo", "init", repo])).stderr).toContain("there is a repository already");
    const noGroup = await cowcatcher(["restore", `${repo}::vm9`, path("out.img")]);
    expect(noGroup.stderr).toContain("the group has no backup");
    const asTarget = await cowcatcher(["backup", path("x"), `${repo}::vm9`]);
    expect(asTarget).toMatchObject({ code: 2 });
    expect(asTarget.stderr).toContain("never written by name");
    expect(await cowcatcher(["backup", path("x"), "--repo", repo, "--group", "../x"])).toMatchObject({
      code: 2,
    });
  });

  it("an incremental backup without a basis: exit code 12", async () => {
    makeDisk("disk.img");
    await good("repo", "init", repo);
    const args = ["backup", path("disk.img"), "--repo", repo, "--group", "a", "--level", "incremental"];
    expect(await cowcatcher(args)).toMatchObject({ code: 12 });
    expect(await list()).toEqual([]);
  });
});
