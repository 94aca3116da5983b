import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { BLOCK_BYTES, geometryOf } from "../../../src/cow/geometry.js";
import { spillBitmapBytes, SpillFile } from "../../../src/cow/spill.js";
import { CowcatcherError } from "../../../src/errors.js";

const MiB = 1024 * 1024;
let folder: string;
let fd: number;

beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-spill-"));
  fd = fs.openSync(join(folder, "spill"), "w+");
});

afterEach(() => {
  fs.closeSync(fd);
  fs.rmSync(folder, { recursive: true, force: true });
});

function spillOf(sizeBytes: number): SpillFile {
  return spillOn(fd, sizeBytes);
}

function spillOn(file: number, sizeBytes: number): SpillFile {
  const geometry = geometryOf(sizeBytes);
  const bitmaps = new SharedArrayBuffer(spillBitmapBytes(geometry));
  return new SpillFile({ path: "spill", fd: file, bitmaps }, geometry);
}

function errorOf(call: () => void): CowcatcherError {
  try {
    call();
  } catch (error) {
    if (error instanceof CowcatcherError) return error;
    throw error;
  }
  throw new Error("nothing was thrown");
}

describe.each([1, 4097, MiB + 512, 3 * MiB])("the spill of a disk of %i bytes", (sizeBytes) => {
  it("keeps blocks and bitmaps of every chunk apart", () => {
    const spill = spillOf(sizeBytes);
    const { chunkCount, blocksPerChunk } = spill.geometry;
    const lastBlock = Math.ceil(sizeBytes / BLOCK_BYTES) - 1;
    const bitmapOf = (chunk: number) => new Uint8Array(blocksPerChunk / 8).fill(chunk + 1);
    for (let chunk = 0; chunk < chunkCount; chunk++) {
      spill.writeBitmap(chunk, bitmapOf(chunk));
      const block = Math.min(blocksPerChunk - 1, lastBlock - chunk * blocksPerChunk);
      void spill.writeBlocks(new Uint8Array(BLOCK_BYTES).fill(0x40 + chunk), 0, chunk, block, 1);
    }
    const data = new Uint8Array(BLOCK_BYTES);
    const bitmap = new Uint8Array(blocksPerChunk / 8);
    for (let chunk = 0; chunk < chunkCount; chunk++) {
      const block = Math.min(blocksPerChunk - 1, lastBlock - chunk * blocksPerChunk);
      spill.readBlocks(data, 0, chunk, block, 1);
      expect(data.every((byte) => byte === 0x40 + chunk)).toBe(true);
      spill.readBitmap(chunk, bitmap);
      expect(bitmap).toEqual(bitmapOf(chunk));
    }
  });

  it("says of a chunk that never spilled that nothing is in it, whatever the bitmap held before", () => {
    const spill = spillOf(sizeBytes);
    const bitmap = new Uint8Array(spill.geometry.blocksPerChunk / 8).fill(0xff);
    spill.readBitmap(spill.geometry.chunkCount - 1, bitmap);
    expect(bitmap.every((byte) => byte === 0)).toBe(true);
  });
});

it("gives the room of drained blocks back", () => {
  const spill = spillOf(4 * MiB);
  void spill.writeBlocks(new Uint8Array(16 * BLOCK_BYTES).fill(1), 0, 1, 0, 16);
  const before = fs.fstatSync(fd).blocks;
  spill.punch(1, 0, 16);
  expect(fs.fstatSync(fd).blocks).toBeLessThan(before);
});

it("says so when blocks are gone that were spilled, and never hands on what the buffer held", () => {
  const spill = spillOf(MiB);
  void spill.writeBlocks(new Uint8Array(2 * BLOCK_BYTES).fill(1), 0, 0, 0, 2);
  fs.ftruncateSync(fd, BLOCK_BYTES);
  const error = errorOf(() => spill.readBlocks(new Uint8Array(2 * BLOCK_BYTES), 0, 0, 0, 2));
  expect(error).toMatchObject({ code: "IO", object: "spill", offsetBytes: 0 });
});

it("names the file and the place of a failed write", () => {
  const readOnly = fs.openSync(join(folder, "spill"), "r");
  const spill = spillOn(readOnly, MiB);
  const error = errorOf(() => void spill.writeBlocks(new Uint8Array(BLOCK_BYTES), 0, 0, 3, 1));
  expect(error).toMatchObject({ code: "IO", object: "spill", errno: "EBADF", offsetBytes: 3 * BLOCK_BYTES });
  fs.closeSync(readOnly);
});
