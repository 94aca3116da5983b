// How a target gets its final name: over a file that somebody has opened meanwhile, and in a folder that cannot be synced.

import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import type * as calls from "../../../src/block/file/calls.js";
import { acquireImageLock } from "../../../src/block/file/locks.js";
import { libc } from "../../../src/native/libc.js";
import { createTarget } from "../../../src/target/create.js";
import type { Target } from "../../../src/target/target.js";
import { MiB } from "../../../src/units.js";

let folderSync: (() => Promise<void>) | null;

vi.mock("../../../src/block/file/calls.js", async (importOriginal) => {
  const original = await importOriginal<typeof calls>();
  return {
    ...original,
    syncFileData: (fd: number): Promise<void> =>
      folderSync !== null && fs.fstatSync(fd).isDirectory() ? folderSync() : original.syncFileData(fd),
  };
});

let folder: string;
let path: string;
beforeEach(() => {
  folderSync = null;
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-commit-"));
  path = join(folder, "disk.img");
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

function open(force: boolean): Promise<Target> {
  return createTarget({
    ...{ path, format: "raw", sizeBytes: 1 * MiB, clusterSizeBytes: 65536, force, direct: false },
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

describe.runIf(libc !== null)("a file that is to be replaced", () => {
  it("and that a program has opened since the start stays; the backup fails", async () => {
    fs.writeFileSync(path, "an older backup");
    const target = await open(true);
    await target.complete();
    const fd = fs.openSync(path, "r+");
    try {
      acquireImageLock(fd, path, { write: true });
      const error = await refusal(target.commit());
      expect(error).toMatchObject({ code: "LOCKED", object: path });
      expect(error.message).toMatch(/opened .* since/);
      expect(error.hint).toBeDefined();
    } finally {
      fs.closeSync(fd);
    }
    await target.abort();
    expect(fs.readFileSync(path, "utf8")).toBe("an older backup");
    expect(fs.readdirSync(folder)).toEqual(["disk.img"]);
  });

  it("is locked while its name is taken", async () => {
    fs.writeFileSync(path, "an older backup");
    const old = fs.openSync(path, "r+");
    try {
      const target = await open(true);
      await target.complete();
      const rename = vi.spyOn(fs.promises, "rename").mockImplementationOnce(async (from, to) => {
        expect(() => acquireImageLock(old, path, { write: true })).toThrow(/lock/);
        await fs.promises.rename(from, to);
      });
      await target.commit();
      expect(rename).toHaveBeenCalledTimes(2);
      acquireImageLock(old, path, { write: true });
    } finally {
      fs.closeSync(old);
    }
    expect(fs.statSync(path).size).toBe(1 * MiB);
  });

  it("may have been removed meanwhile", async () => {
    fs.writeFileSync(path, "an older backup");
    const target = await open(true);
    fs.rmSync(path);
    await target.finish();
    expect(fs.statSync(path).size).toBe(1 * MiB);
  });
});

describe.each([false, true])("a folder that cannot be synced (--force %s)", (force) => {
  it("leaves a complete target, and the error says so", async () => {
    if (force) fs.writeFileSync(path, "an older backup");
    const target = await open(force);
    await target.complete();
    folderSync = () => Promise.reject(Object.assign(new Error("EIO"), { code: "EIO" }));
    const error = await refusal(target.commit());
    expect(error).toMatchObject({ code: "IO", object: path, errno: "EIO" });
    expect(error.message).toMatch(/complete/);
    expect(error.message).toMatch(/crash/);
    await target.abort();
    expect(fs.statSync(path).size).toBe(1 * MiB);
    expect(fs.readdirSync(folder)).toEqual(["disk.img"]);
  });
});

it("a temporary name that cannot be taken away does not fail a target that has its final one", async () => {
  const target = await open(false);
  await target.complete();
  const unlink = vi
    .spyOn(fs.promises, "unlink")
    .mockRejectedValueOnce(Object.assign(new Error("EIO"), { code: "EIO" }));
  await target.commit();
  expect(unlink).toHaveBeenCalledTimes(2);
  expect(fs.statSync(path).size).toBe(1 * MiB);
  expect(fs.readdirSync(folder)).toEqual(["disk.img"]);
});
