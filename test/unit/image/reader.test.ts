import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { SourceReader } from "../../../src/block/device.js";
import { pageAlignedMemory } from "../../../src/block/file/fileio.js";
import { openSource } from "../../../src/image/reader.js";
import { libc } from "../../../src/native/libc.js";
import { KiB, MiB } from "../../../src/units.js";

let folder: string;
let fd: number;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-reader-"));
});

afterEach(() => {
  fs.closeSync(fd);
  fs.rmSync(folder, { recursive: true, force: true });
});

function sourceOf(content: Uint8Array, direct: boolean, sizeBytes = content.length): SourceReader {
  const file = path.join(folder, "disk.raw");
  fs.writeFileSync(file, content);
  fd = fs.openSync(file, fs.constants.O_RDONLY | (direct ? fs.constants.O_DIRECT : 0));
  return openSource({ format: "raw", name: file, fd, sizeBytes, direct });
}

describe("a raw source of the main thread, whose large reads libuv's pool does", () => {
  function pooled(content: Uint8Array, sizeBytes: number): SourceReader {
    const file = path.join(folder, "disk.raw");
    fs.writeFileSync(file, content);
    fd = fs.openSync(file, "r");
    return openSource({ format: "raw", name: file, fd, sizeBytes, direct: false }, () => false, true, true);
  }

  it("has several in flight, and reads small pieces at once", async () => {
    const content = pattern(1 * MiB + 17);
    const source = pooled(content, content.length);
    const memory = pageAlignedMemory(2 * MiB).fill(0xee);
    const reads = [
      source.read(memory, 0, 512 * KiB, 0),
      source.read(memory, 512 * KiB, 512 * KiB + 17, 512 * KiB),
    ];
    expect(reads.map((read) => read instanceof Promise)).toEqual([true, true]);
    await Promise.all(reads.map((read) => Promise.resolve(read)));
    expect(Buffer.compare(memory.subarray(0, content.length), content)).toBe(0);
    expect(memory[content.length]).toBe(0xee);
    expect(source.read(memory, 0, 64 * KiB, 3)).toBeUndefined();
    expect(Buffer.compare(memory.subarray(0, 64 * KiB), content.subarray(3, 64 * KiB + 3))).toBe(0);
  });

  it("fails where the file has become shorter than the disk", async () => {
    const source = pooled(pattern(200 * KiB), 1 * MiB);
    const read = source.read(new Uint8Array(1 * MiB), 0, 1 * MiB, 0);
    await expect(read).rejects.toMatchObject({ code: "IO", offsetBytes: 200 * KiB });
  });
});

function pattern(lengthBytes: number): Buffer {
  return Buffer.from(
    Uint8Array.from({ length: lengthBytes }, (_, index) => (index * 7 + (index >> 9)) & 0xff),
  );
}

describe.each([false, true])("a raw source (direct %s)", (direct) => {
  it.each([0, 1, 512, 4095])("reads any alignment synchronously, size 200 KiB + %i", (extra) => {
    const content = pattern(200 * KiB + extra);
    const source = sourceOf(content, direct);
    const memory = pageAlignedMemory(256 * KiB);
    const requests = [
      [0, content.length],
      [0, 64 * KiB],
      [4096, 8192],
      [1, 1],
      [4095, 70_000],
      [content.length - 1, 1],
      [content.length - 5000, 5000],
    ] as const;
    for (const [offset, length] of requests) {
      for (const place of [0, 4096, 17]) {
        memory.fill(0xee);
        expect(source.read(memory, place, length, offset)).toBeUndefined();
        expect(
          Buffer.compare(memory.subarray(place, place + length), content.subarray(offset, offset + length)),
        ).toBe(0);
        expect(memory[place + length]).toBe(0xee);
      }
    }
  });

  it("fails where the file has become shorter than the disk, and reads what is left", async () => {
    const content = pattern(8192);
    const source = sourceOf(content, direct, 20_000);
    const memory = new Uint8Array(20_000).fill(0xee);
    await expect(source.read(memory, 0, 20_000, 0)).rejects.toMatchObject({ code: "IO", offsetBytes: 8192 });
    expect(source.read(memory, 0, 8192, 0)).toBeUndefined();
    expect(Buffer.compare(memory.subarray(0, 8192), content)).toBe(0);
  });

  it.runIf(libc !== null)("takes no hole for the file's end, nor the other way round", () => {
    const source = sourceOf(Buffer.alloc(64 * KiB, 1), direct, 1 * MiB);
    expect(() => source.extent(64 * KiB, 64 * KiB)).toThrow("shorter than the 1048576 bytes");
    fs.truncateSync(path.join(folder, "disk.raw"), 1 * MiB);
    expect(source.extent(64 * KiB, 64 * KiB)).toEqual({ lengthBytes: 64 * KiB, zero: true });
  });

  it.runIf(libc !== null)("tells holes from data, and a huge hole in one step", () => {
    const source = sourceOf(Buffer.alloc(64 * KiB, 1), direct, 2 ** 43);
    fs.truncateSync(path.join(folder, "disk.raw"), 2 ** 43);
    expect(source.extent(4096, 4096)).toEqual({ lengthBytes: 4096, zero: false });
    expect(source.extent(64 * KiB, 2 ** 43 - 64 * KiB)).toEqual({
      lengthBytes: 2 ** 43 - 64 * KiB,
      zero: true,
    });
  });

  it.runIf(libc !== null)(
    "never asks where data ends, as the guest's writes would wait for the answer",
    () => {
      const seekHole = vi.spyOn(libc!, "seekHole");
      const source = sourceOf(Buffer.alloc(1 * MiB, 1), direct, 4 * MiB);
      fs.truncateSync(path.join(folder, "disk.raw"), 4 * MiB);
      expect(source.extent(0, 4 * MiB)).toEqual({ lengthBytes: 4 * MiB, zero: false });
      expect(source.extent(1 * MiB - 4096, 1 * MiB)).toEqual({ lengthBytes: 1 * MiB, zero: false });
      expect(source.extent(1 * MiB, 1 * MiB)).toEqual({ lengthBytes: 1 * MiB, zero: true });
      expect(seekHole).not.toHaveBeenCalled();
      seekHole.mockRestore();
    },
  );

  it.runIf(libc !== null)("remembers a hole, but not where it has not asked", () => {
    const source = sourceOf(Buffer.alloc(4096, 1), direct, 8 * MiB);
    fs.truncateSync(path.join(folder, "disk.raw"), 8 * MiB);
    expect(source.extent(1 * MiB, 8192)).toEqual({ lengthBytes: 8192, zero: true });
    expect(source.extent(7 * MiB, 1 * MiB)).toEqual({ lengthBytes: 1 * MiB, zero: true });
    expect(source.extent(0, 8192)).toEqual({ lengthBytes: 8192, zero: false });
  });

  it("rejects, with name and offset, what the system refuses", async () => {
    const source = sourceOf(pattern(4096), direct);
    fs.closeSync(fd);
    fd = fs.openSync(folder, fs.constants.O_RDONLY);
    await expect(source.read(new Uint8Array(10), 0, 10, 20)).rejects.toMatchObject({ code: "IO" });
  });
});

it("a null source reads as zeroes, and says so", () => {
  fd = fs.openSync(folder, fs.constants.O_RDONLY);
  const source = openSource({ format: "null", name: "null:", sizeBytes: 1 * MiB });
  const memory = new Uint8Array(100).fill(1);
  expect(source.read(memory, 10, 80, 5)).toBeUndefined();
  expect(memory.filter((byte) => byte === 1)).toHaveLength(20);
  expect(source.extent(7, 1000)).toEqual({ lengthBytes: 1000, zero: true });
  source.close();
});
