// What is seen of a fleecing file from outside: its size, and which chunks QEMU has captured from.
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Geometry } from "../../../src/cow/geometry.js";
import { libc } from "../../../src/native/libc.js";
import { Fleece } from "../../../src/qemu/fleece.js";
import { KiB } from "../../../src/units.js";

const CHUNK = 256 * KiB;
const COUNT = 8;
const geometry = { chunkBytes: CHUNK, chunkCount: COUNT } as Geometry;

describe.skipIf(libc === null)("Fleece", () => {
  let folder = "";
  let fd = -1;
  let fleece: Fleece;

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "cowcatcher-fleece-"));
    const path = join(folder, "0.fleece");
    fd = openSync(path, "w+");
    ftruncateSync(fd, COUNT * CHUNK);
    fleece = new Fleece({ path, fd: openSync(path, "r+") });
  });
  afterEach(() => {
    vi.restoreAllMocks();
    fleece.close();
    closeSync(fd);
    rmSync(folder, { recursive: true });
  });

  const capture = (chunk: number): void =>
    void writeSync(fd, Buffer.alloc(64 * KiB, 1), 0, 64 * KiB, chunk * CHUNK);
  function look(): number[] {
    const told: number[] = [];
    fleece.look(geometry, (chunk) => told.push(chunk));
    return told;
  }

  it("tells of each chunk once, in whatever order they are captured from", () => {
    expect(look()).toEqual([]);
    capture(5);
    capture(2);
    expect(look()).toEqual([2, 5]);
    expect(fleece.usedBytes).toBeGreaterThanOrEqual(128 * KiB);
    capture(0);
    capture(2);
    capture(7);
    expect(look()).toEqual([0, 7]);
    expect(look()).toEqual([]);
  });

  it("tells of clusters by themselves on a plain file system, and is empty after it was tried out", () => {
    expect(fleece.tellsClusters(64 * KiB)).toBe(true);
    expect(look()).toEqual([]);
    const native = libc as NonNullable<typeof libc>;
    // A file system that has records of 128 KiB.
    vi.spyOn(native, "seekHole").mockImplementationOnce((_, at) => at + 128 * KiB);
    expect(fleece.tellsClusters(64 * KiB)).toBe(false);
    // One that allocates more than is written.
    vi.spyOn(native, "seekData").mockImplementationOnce(() => {
      native.allocate(fd, 0, 512 * KiB);
      return (COUNT * CHUNK) / 2;
    });
    expect(fleece.tellsClusters(64 * KiB)).toBe(false);
    // One that knows no holes.
    vi.spyOn(native, "seekData").mockImplementation((_, at) => at);
    expect(fleece.tellsClusters(64 * KiB)).toBe(false);
  });

  it("does not search where it has told of all there is", () => {
    for (let chunk = 0; chunk < COUNT; chunk++) capture(chunk);
    const seekData = vi.spyOn(libc as NonNullable<typeof libc>, "seekData");
    expect(look()).toHaveLength(COUNT);
    expect(seekData).toHaveBeenCalledTimes(COUNT);
    capture(3);
    look();
    look();
    expect(seekData).toHaveBeenCalledTimes(COUNT);
  });
});
