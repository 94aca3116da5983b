import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { F_WRLCK, libc } from "../../../src/native/libc.js";
import {
  createTemporary,
  keepTemporary,
  removeStale,
  removeStaleTemporaries,
  unlinkAllTemporaries,
  unlinkTemporary,
} from "../../../src/target/file/temporary.js";

let folder: string;
beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-temporary-"));
});
afterEach(() => {
  unlinkAllTemporaries();
  fs.rmSync(folder, { recursive: true });
});

function deadPid(): number {
  return spawnSync("true").pid;
}

function place(name: string): string {
  const path = join(folder, name);
  fs.writeFileSync(path, "left over");
  return path;
}

describe("temporary files", () => {
  it("are hidden, open for writing, and gone after unlinkTemporary", async () => {
    const temporary = await createTemporary(folder, "disk.qcow2");
    expect(fs.readdirSync(folder)[0]).toMatch(/^\.disk\.qcow2\.cowcatcher-\d+-u?[0-9a-f]{12}\.tmp$/);
    fs.writeSync(temporary.fd, "x");
    expect(fs.fstatSync(temporary.fd).mode & 0o777).toBe(0o600);
    await unlinkTemporary(temporary);
    await unlinkTemporary(temporary);
    fs.closeSync(temporary.fd);
    expect(fs.readdirSync(folder)).toEqual([]);
  });

  it("have names that the file system takes, however long the final one is", async () => {
    const temporary = await createTemporary(folder, "n".repeat(255));
    fs.closeSync(temporary.fd);
    await unlinkTemporary(temporary);
  });

  it("go with the process, but not the one that was kept", async () => {
    const kept = await createTemporary(folder, "kept");
    const other = await createTemporary(folder, "other");
    keepTemporary(kept);
    unlinkAllTemporaries();
    fs.closeSync(kept.fd);
    fs.closeSync(other.fd);
    expect(fs.existsSync(kept.path)).toBe(true);
    expect(fs.existsSync(other.path)).toBe(false);
  });

  it("name the folder where they cannot be made", async () => {
    await expect(createTemporary(join(folder, "none"), "x")).rejects.toThrow(
      /none: cannot create a file in this folder/,
    );
  });
});

describe("stale files", () => {
  it("of a dead process are removed, whatever the final name was, and nothing else", async () => {
    const stale = [
      place(`.disk.cowcatcher-${deadPid()}-0123456789ab.tmp`),
      place(`.disk2.cowcatcher-${deadPid()}-0123456789ab.tmp`),
    ];
    const others = [
      place(`.disk.cowcatcher-x-0123456789ab.tmp`),
      place(`.disk2.cowcatcher-${deadPid()}-u0123456789ab.tmp`),
      place("disk"),
    ];
    // Names of other targets count where locks are known to hold for everybody.
    const expected = libc === null ? stale.slice(0, 1) : stale;
    expect((await removeStaleTemporaries(join(folder, "disk"))).sort()).toEqual(expected);
    for (const path of others) expect(fs.existsSync(path)).toBe(true);
  });

  it("are not those of this process", async () => {
    const mine = await createTemporary(folder, "disk");
    expect(await removeStale(folder, "disk")).toEqual([]);
    fs.closeSync(mine.fd);
  });

  it.runIf(libc !== null)("are told by the lock, not by the process id", async () => {
    const name = `.disk.cowcatcher-${deadPid()}-0123456789ab.tmp`;
    const path = place(name);
    const fd = fs.openSync(path, "r+");
    expect(libc?.ofdLock(fd, F_WRLCK, 0, 1)).toBe(0);
    expect(await removeStale(folder, "disk")).toEqual([]);
    fs.closeSync(fd);
    expect(await removeStale(folder, "disk")).toEqual([path]);
  });

  it("without a lock are told by the process id", async () => {
    const dead = place(`.disk.cowcatcher-${deadPid()}-u0123456789ab.tmp`);
    const alive = place(`.disk.cowcatcher-${process.ppid}-u0123456789ab.tmp`);
    expect(await removeStale(folder, "disk")).toEqual([dead]);
    expect(fs.existsSync(alive)).toBe(true);
  });

  it("are regular files: what a link points to stays", async () => {
    const victim = place("victim");
    fs.symlinkSync(victim, join(folder, `.disk.cowcatcher-${deadPid()}-0123456789ab.tmp`));
    expect(await removeStale(folder, "disk")).toEqual([]);
    expect(fs.existsSync(victim)).toBe(true);
  });

  it("in a folder that is not there are none", async () => {
    expect(await removeStale(join(folder, "none"), "disk")).toEqual([]);
  });
});
