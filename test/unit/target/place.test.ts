// What a target's place demands and keeps: who may read it, what is known before the copy, whose hands its names pass
// through. Files that only root can make so are made where the tests run as root.

import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { pageAlignedMemory } from "../../../src/block/file/fileio.js";
import { CowcatcherError } from "../../../src/errors.js";
import { F_WRLCK, libc } from "../../../src/native/libc.js";
import { createTarget } from "../../../src/target/create.js";
import { pwriteAll } from "../../../src/target/file/pwrite.js";
import type { RawTargetDescription, Target, TargetOptions } from "../../../src/target/target.js";
import { MiB } from "../../../src/units.js";

const isRoot = process.geteuid?.() === 0;
let folder: string;
let path: string;

beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-place-"));
  path = join(folder, "day1.img");
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

function make(options: Partial<TargetOptions> = {}): Promise<Target> {
  return createTarget({
    ...{ path, format: "raw", sizeBytes: 1 * MiB, clusterSizeBytes: 65536, force: false, direct: false },
    ...options,
  });
}

async function refusal(promise: Promise<unknown>): Promise<CowcatcherError> {
  const error = await promise.then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(CowcatcherError);
  return error as CowcatcherError;
}

function modeOf(name = path): number {
  return fs.statSync(name).mode & 0o7777;
}

function has(program: string): boolean {
  return spawnSync("sh", ["-c", `command -v ${program}`]).status === 0;
}

describe("a new target", () => {
  it.each([
    [0o600, 0o600],
    [0o640, 0o640],
    [0o604, 0o604],
    [0o777, 0o644],
  ])("of a source with mode %o has %o", async (sourceMode, mode) => {
    const umask = process.umask(0o022);
    try {
      const { gid } = fs.statSync(folder);
      const target = await make({ sourceAccess: [{ mode: sourceMode, gid }] });
      await target.finish();
      expect(modeOf().toString(8)).toBe(mode.toString(8));
    } finally {
      process.umask(umask);
    }
  });

  it("is not readable by its own group for what the source's other group may do", async () => {
    const target = await make({ sourceAccess: [{ mode: 0o644, gid: fs.statSync(folder).gid + 1 }] });
    await target.finish();
    expect(modeOf() & 0o070).toBe(0);
  });

  it("is readable for those alone who may read all of the source's files", async () => {
    const { gid } = fs.statSync(folder);
    const target = await make({
      sourceAccess: [
        { mode: 0o644, gid },
        { mode: 0o600, gid },
      ],
    });
    await target.finish();
    expect(modeOf()).toBe(0o600);
  });

  it("is its owner's alone until it is complete", async () => {
    const target = await make();
    const { fd } = target.description as RawTargetDescription;
    for (const name of fs.readdirSync(folder)) expect(modeOf(join(folder, name))).toBe(0o600);
    expect(fs.fstatSync(fd).mode & 0o777).toBe(0o600);
    await target.abort();
    expect(fs.readdirSync(folder)).toEqual([]);
  });

  it.runIf(libc !== null)("has no name for its data where the file system allows that", async () => {
    const target = await make();
    expect(fs.fstatSync((target.description as RawTargetDescription).fd).nlink).toBe(0);
    await target.finish();
    expect(fs.readdirSync(folder)).toEqual(["day1.img"]);
    expect(fs.statSync(path).nlink).toBe(1);
  });

  it.runIf(has("setfacl"))("is as readable as the folder's default ACL says", async () => {
    spawnSync("setfacl", ["-d", "-m", "u::rw,g::r,o::-", folder]);
    await (await make()).finish();
    expect(modeOf()).toBe(0o640);
  });
});

describe("a second copy to the same target", () => {
  it.runIf(libc !== null)("is refused at its start, and leaves the first alone", async () => {
    const first = await make();
    const error = await refusal(make());
    expect(error).toMatchObject({ code: "LOCKED", object: path });
    expect(error.message).toContain(String(process.pid));
    await first.finish();
    expect(fs.readdirSync(folder)).toEqual(["day1.img"]);
  });

  it("of another name goes on beside it", async () => {
    const first = await make();
    const second = await make({ path: join(folder, "day2.img") });
    await first.finish();
    await second.finish();
    expect(fs.readdirSync(folder).sort()).toEqual(["day1.img", "day2.img"]);
  });
});

it.runIf(libc !== null)("what a killed copy left goes with any later one into the folder", async () => {
  const left = join(folder, ".day0.img.cowcatcher-1-0123456789ab.tmp");
  const held = join(folder, ".day9.img.cowcatcher-1-0123456789ab.tmp");
  const holder = spawn(process.execPath, [
    "-e",
    `const fs = require("fs"); fs.writeFileSync(${JSON.stringify(held)}, ""); console.log("there"); process.stdin.resume();`,
  ]);
  await once(holder.stdout, "data");
  const fd = fs.openSync(held, "r+");
  expect(libc?.ofdLock(fd, F_WRLCK, 0, 1)).toBe(0);
  fs.writeFileSync(left, "a killed copy's");
  await (await make()).finish();
  expect(fs.readdirSync(folder).sort()).toEqual([".day9.img.cowcatcher-1-0123456789ab.tmp", "day1.img"]);
  fs.closeSync(fd);
  holder.kill();
});

describe("a file that is to be replaced", () => {
  beforeEach(() => fs.writeFileSync(path, "an older backup", { mode: 0o640 }));

  function expectUntouched(): void {
    expect(fs.readFileSync(path, "utf8")).toBe("an older backup");
    expect(fs.readdirSync(folder).filter((name) => name.includes("cowcatcher"))).toEqual([]);
  }

  it("keeps its mode", async () => {
    await (await make({ force: true })).finish();
    expect(modeOf()).toBe(0o640);
    expect(fs.statSync(path).size).toBe(1 * MiB);
  });

  it("is refused before the copy where it has other names", async () => {
    fs.linkSync(path, join(folder, "link"));
    const error = await refusal(make({ force: true }));
    expect(error).toMatchObject({ code: "UNSUPPORTED", object: path });
    expect(error.message).toContain("hard link");
    expectUntouched();
  });

  it.runIf(isRoot)("is refused before the copy where something is mounted on it", async () => {
    const other = join(folder, "other image");
    fs.writeFileSync(other, "an older backup");
    const mounted = spawnSync("mount", ["--bind", other, path]);
    if (mounted.status !== 0) return;
    try {
      const error = await refusal(make({ force: true }));
      expect(error).toMatchObject({ code: "UNSUPPORTED", object: path });
      expect(error.message).toContain("mounted");
    } finally {
      spawnSync("umount", [path]);
    }
    expectUntouched();
  });

  it.runIf(isRoot && has("chattr"))("is refused before the copy where it is immutable", async () => {
    if (spawnSync("chattr", ["+i", path]).status !== 0) return;
    try {
      expect((await refusal(make({ force: true }))).message).toContain("chattr");
    } finally {
      spawnSync("chattr", ["-i", path]);
    }
    expectUntouched();
  });

  it.runIf(has("setfattr"))("keeps its extended attributes", async () => {
    spawnSync("setfattr", ["-n", "user.origin", "-v", "vm 7", path]);
    await (await make({ force: true })).finish();
    const { stdout } = spawnSync("getfattr", ["--only-values", "-n", "user.origin", path]);
    expect(stdout.toString()).toBe("vm 7");
  });

  it.runIf(has("setfacl"))("keeps its ACL", async () => {
    spawnSync("setfacl", ["-m", "u:12345:r", path]);
    const acl = (): string => spawnSync("getfacl", ["-cn", path]).stdout.toString();
    const before = acl();
    expect(before).toContain("12345");
    await (await make({ force: true })).finish();
    expect(acl()).toBe(before);
  });
});

describe("in a folder of somebody else", () => {
  /** What that user does: puts a link to a file of ours under each name of ours. */
  function swap(victim: string): void {
    for (const name of fs.readdirSync(folder).filter((found) => found.includes(".cowcatcher-"))) {
      fs.renameSync(join(folder, name), join(folder, `moved${name}`));
      fs.symlinkSync(victim, join(folder, name));
    }
  }

  it.each([false, true])("names that are swapped lead to no other file (--force %s)", async (force) => {
    const victim = join(folder, "victim");
    fs.writeFileSync(victim, "precious");
    if (force) fs.writeFileSync(path, "an older backup");
    const target = await make({ force, direct: true });
    swap(victim);
    const { fd, bufferedFd } = target.description as RawTargetDescription;
    for (const each of [fd, bufferedFd]) {
      const aligned = pageAlignedMemory(4096).fill(7);
      expect(pwriteAll(each, aligned, 0, 4096, 0)).toBe(0);
    }
    const outcome = await target.finish().then(
      () => "finished",
      (error: unknown) => (error as CowcatcherError).message,
    );
    await target.abort();
    expect(fs.readFileSync(victim, "utf8")).toBe("precious");
    if (outcome === "finished") {
      expect(fs.lstatSync(path).isFile()).toBe(true);
      expect(fs.readFileSync(path).subarray(0, 4096)).toEqual(Buffer.alloc(4096, 7));
    } else {
      expect(outcome).toContain("another file was put");
    }
  });
});
