import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { pageAlignedMemory } from "../../../src/block/file/fileio.js";
import { acquireImageLock } from "../../../src/block/file/locks.js";
import { libc } from "../../../src/native/libc.js";
import { createTarget } from "../../../src/target/create.js";
import { enterGate, leaveGate } from "../../../src/target/file/gate.js";
import { NullWriter } from "../../../src/target/null.js";
import type { RawTargetDescription, Target, TargetOptions } from "../../../src/target/target.js";
import { openTarget } from "../../../src/target/writer.js";
import { KiB, MiB, TiB } from "../../../src/units.js";

let folder: string;
let path: string;
beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-raw-"));
  path = join(folder, "disk.img");
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

function options(changes: Partial<TargetOptions> = {}): TargetOptions {
  return {
    path,
    format: "raw",
    sizeBytes: 1 * MiB,
    clusterSizeBytes: 64 * KiB,
    force: false,
    direct: false,
    ...changes,
  };
}

async function refusal(promise: Promise<unknown>): Promise<CowcatcherError> {
  const error = await promise.then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(CowcatcherError);
  return error as CowcatcherError;
}

function isOpen(fd: number): boolean {
  try {
    return fs.fstatSync(fd).ino >= 0;
  } catch {
    return false;
  }
}

const rawDescription = (target: Target): RawTargetDescription => target.description as RawTargetDescription;

describe("a raw target", () => {
  it.each([0, 1, 4097, 1 * MiB + 512, 3 * MiB - 1])(
    "of %d bytes has that size and what was written",
    async (size) => {
      const target = await createTarget(options({ sizeBytes: size }));
      const writer = openTarget(target.description);
      const content = randomBytes(size);
      // Two halves out of order, from inside a larger buffer.
      const half = Math.floor(size / 2);
      const buffer = Buffer.concat([Buffer.alloc(7), content]);
      expect(writer.write(buffer, 7 + half, size - half, half)).toBeUndefined();
      expect(writer.write(buffer, 7, half, 0)).toBeUndefined();
      writer.close();
      expect(fs.existsSync(path)).toBe(false);
      await target.finish();
      expect(fs.readFileSync(path).equals(content)).toBe(true);
      expect(fs.readdirSync(folder)).toEqual(["disk.img"]);
    },
  );

  it("takes no room for zeroes", async () => {
    const target = await createTarget(options({ sizeBytes: 1 * TiB }));
    void openTarget(target.description).writeZeroes(0, 1 * TiB);
    await target.finish();
    expect(fs.statSync(path)).toMatchObject({ size: 1 * TiB, blocks: 0 });
  });

  it("writes zeroes where the file did not start with them", () => {
    fs.writeFileSync(path, Buffer.alloc(3 * MiB, 1));
    const fd = fs.openSync(path, "r+");
    const shared = new SharedArrayBuffer(8);
    const writer = openTarget({
      ...{
        format: "raw",
        name: path,
        fd,
        bufferedFd: fd,
        sizeBytes: 3 * MiB,
        direct: false,
        startsZeroed: false,
      },
      shared,
    });
    void writer.writeZeroes(1000, 2 * MiB + 3);
    fs.closeSync(fd);
    const content = fs.readFileSync(path);
    expect(content.subarray(1000, 1000 + 2 * MiB + 3).every((byte) => byte === 0)).toBe(true);
    expect([content[999], content[1000 + 2 * MiB + 3]]).toEqual([1, 1]);
  });

  it("writes an odd disk with O_DIRECT, from aligned and unaligned memory", async () => {
    const size = 2 * MiB + 4096 + 13;
    const target = await createTarget(options({ sizeBytes: size, direct: true }));
    const { fd, bufferedFd } = rawDescription(target);
    expect(fd).not.toBe(bufferedFd);
    const content = randomBytes(size);
    const aligned = pageAlignedMemory(1 * MiB);
    aligned.set(content.subarray(0, 1 * MiB));
    const writer = openTarget(target.description);
    void writer.write(aligned, 0, 1 * MiB, 0);
    void writer.write(Buffer.concat([Buffer.alloc(1), content]), 1 + 1 * MiB, size - 1 * MiB, 1 * MiB);
    await target.finish();
    expect(fs.readFileSync(path).equals(content)).toBe(true);
  });

  it("refuses a write outside the disk", async () => {
    const target = await createTarget(options());
    const writer = openTarget(target.description);
    expect(() => void writer.write(Buffer.alloc(2), 0, 2, 1 * MiB - 1)).toThrow(/leaves the disk/);
    expect(() => void writer.writeZeroes(0, 1 * MiB + 1)).toThrow(/leaves the disk/);
    await target.abort();
  });

  it("says NO_SPACE with the guest's offset when the device is full", () => {
    const fd = fs.openSync("/dev/full", "r+");
    const shared = new SharedArrayBuffer(8);
    const writer = openTarget({
      ...{ format: "raw", name: "full.img", fd, bufferedFd: fd, sizeBytes: 1 * MiB, direct: false },
      ...{ startsZeroed: true, shared },
    });
    const write = (): unknown => writer.write(Buffer.alloc(4096), 0, 4096, 8192);
    expect(write).toThrow(
      expect.objectContaining({ code: "NO_SPACE", object: "full.img", offsetBytes: 8192 }),
    );
    fs.closeSync(fd);
  });

  it("has the mode that the umask gives, and that of the file it replaces", async () => {
    fs.writeFileSync(join(folder, "reference"), "");
    const target = await createTarget(options());
    expect(fs.fstatSync(rawDescription(target).fd).mode & 0o777).toBe(0o600);
    await target.finish();
    expect(fs.statSync(path).mode).toBe(fs.statSync(join(folder, "reference")).mode);
    fs.chmodSync(path, 0o640);
    await (await createTarget(options({ force: true }))).finish();
    expect(fs.statSync(path).mode & 0o777).toBe(0o640);
  });
});

describe("a complete target", () => {
  it("can be read where it stands, and has its name only after commit()", async () => {
    const target = await createTarget(options());
    void openTarget(target.description).write(Buffer.alloc(4096, 7), 0, 4096, 4096);
    await target.complete();
    expect(fs.existsSync(path)).toBe(false);
    expect(fs.readFileSync(target.unfinishedPath ?? "").subarray(4096, 8192)).toEqual(Buffer.alloc(4096, 7));
    await target.commit();
    expect(fs.readdirSync(folder)).toEqual(["disk.img"]);
  });

  it("leaves nothing when it is aborted instead", async () => {
    const target = await createTarget(options());
    const { fd } = rawDescription(target);
    await target.complete();
    await target.abort();
    expect(fs.readdirSync(folder)).toEqual([]);
    expect(isOpen(fd)).toBe(false);
    expect((await refusal(target.commit())).problem).toContain("aborted");
  });

  it("is what commit() needs", async () => {
    const target = await createTarget(options());
    expect((await refusal(target.commit())).problem).toBe("commit() on a target that is open");
    await target.abort();
  });
});

describe("an aborted target", () => {
  it("leaves nothing, however often and whenever it is aborted", async () => {
    const target = await createTarget(options());
    void openTarget(target.description).write(Buffer.alloc(4096, 1), 0, 4096, 0);
    const { fd } = rawDescription(target);
    await target.abort();
    await target.abort();
    target.abortSync();
    expect(fs.readdirSync(folder)).toEqual([]);
    expect(isOpen(fd)).toBe(false);
    expect((await refusal(target.finish())).problem).toContain("aborted");
  });

  it("leaves the file that was to be replaced", async () => {
    fs.writeFileSync(path, "old");
    const target = await createTarget(options({ force: true }));
    target.abortSync();
    expect(fs.readFileSync(path, "utf8")).toBe("old");
    expect(fs.readdirSync(folder)).toEqual(["disk.img"]);
  });

  it("takes no more writes, and keeps its descriptors open under one that is in flight", async () => {
    const target = await createTarget(options());
    const { fd, shared } = rawDescription(target);
    const gate = new Int32Array(shared);
    enterGate(gate, "a worker");
    await target.abort();
    expect(fs.readdirSync(folder)).toEqual([]);
    expect(isOpen(fd)).toBe(true);
    expect(() => openTarget(target.description).write(Buffer.alloc(1), 0, 1, 0)).toThrow(/is closed/);
    leaveGate(gate);
    await expect.poll(() => isOpen(fd), { timeout: 60_000 }).toBe(false);
  });

  it("that was finished before stays", async () => {
    const target = await createTarget(options());
    await target.finish();
    await target.abort();
    target.abortSync();
    expect(fs.statSync(path).size).toBe(1 * MiB);
    expect((await refusal(target.finish())).code).toBe("INTERNAL");
  });

  it("while it finishes is either gone or complete", async () => {
    const target = await createTarget(options());
    const finished = refusal(target.finish());
    await target.abort();
    expect((await finished).code).toBe("CANCELLED");
    expect(fs.readdirSync(folder)).toEqual([]);
  });

  it("is not finished under a write in flight", async () => {
    const target = await createTarget(options());
    enterGate(new Int32Array(rawDescription(target).shared), "a worker");
    expect((await refusal(target.finish())).problem).toContain("1 writes are in flight");
    target.abortSync();
  });
});

describe("a target's place", () => {
  it("with a file needs --force", async () => {
    fs.writeFileSync(path, "precious");
    const error = await refusal(createTarget(options()));
    expect(error).toMatchObject({ code: "EXISTS", object: path });
    expect(error.hint).toContain("--force");
    expect(fs.readdirSync(folder)).toEqual(["disk.img"]);
  });

  it("is refused at the end where a file has appeared meanwhile", async () => {
    const target = await createTarget(options());
    fs.writeFileSync(path, "precious");
    expect((await refusal(target.finish())).code).toBe("EXISTS");
    await target.abort();
    expect(fs.readFileSync(path, "utf8")).toBe("precious");
    expect(fs.readdirSync(folder)).toEqual(["disk.img"]);
  });

  it("may be a link to a file, which stays a link", async () => {
    const real = join(folder, "real.img");
    fs.mkdirSync(join(folder, "links"));
    fs.writeFileSync(real, "old");
    fs.symlinkSync(real, join(folder, "links", "link.img"));
    const target = await createTarget(options({ path: join(folder, "links", "link.img"), force: true }));
    await target.finish();
    expect(fs.statSync(real).size).toBe(1 * MiB);
    expect(fs.readlinkSync(join(folder, "links", "link.img"))).toBe(real);
    expect(fs.readdirSync(folder).sort()).toEqual(["links", "real.img"]);
  });

  it.each([
    ["a dangling link", "dangling", "NOT_FOUND", /symbolic link to nowhere/],
    ["a folder", ".", "UNSUPPORTED", /is a directory/],
    ["in a folder that is not there", "none/disk.img", "NOT_FOUND", /folder .*none does not exist/],
    ["below a file", "file/disk.img", "IO", /not a directory/],
    ["a name that ends in a slash", "new/", "UNSUPPORTED", /does not exist/],
  ])("is refused: %s", async (_what, name, code, message) => {
    fs.symlinkSync("nowhere", join(folder, "dangling"));
    fs.writeFileSync(join(folder, "file"), "");
    const error = await refusal(createTarget(options({ path: `${folder}/${name}`, force: true })));
    expect(error.code).toBe(code);
    expect(error.message).toMatch(message);
  });

  it.each([
    ["/dev/null", "UNSUPPORTED", /null:/],
    ["", "USAGE", /empty path/],
  ])("is refused: '%s'", async (place, code, message) => {
    const error = await refusal(createTarget(options({ path: place, force: true })));
    expect(error.code).toBe(code);
    expect(error.message).toMatch(message);
  });

  it.runIf(libc !== null)(
    "is refused where another program uses the file that would be replaced",
    async () => {
      fs.writeFileSync(path, "in use");
      const fd = fs.openSync(path, "r+");
      acquireImageLock(fd, path, { write: true });
      expect((await refusal(createTarget(options({ force: true })))).code).toBe("LOCKED");
      fs.closeSync(fd);
    },
  );

  it("takes no backing file for raw", async () => {
    expect((await refusal(createTarget(options({ backingFile: "base.img" })))).code).toBe("USAGE");
  });
});

describe("the target null:", () => {
  it("counts and keeps nothing", async () => {
    const target = await createTarget(options({ path: "null:" }));
    const writer = openTarget(target.description) as NullWriter;
    void writer.write(Buffer.alloc(10), 0, 10);
    void writer.writeZeroes(10, 20);
    writer.close();
    await target.finish();
    expect([writer.writtenBytes, writer.zeroedBytes]).toEqual([10, 20]);
    expect(fs.existsSync("null:")).toBe(false);
  });
});
