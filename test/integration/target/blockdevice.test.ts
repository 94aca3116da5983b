// Needs a loop device, hence root; elsewhere nothing of it runs.
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openImage } from "../../../src/image/open.js";
import { MiB } from "../../../src/units.js";

/** Not a multiple of 4096, as block devices may be: only of their own block of 512. */
const DEVICE_BYTES = 8 * MiB + 512;

const folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-device-"));
const device = attachLoopDevice();

function attachLoopDevice(): string | null {
  const file = path.join(folder, "backing.raw");
  fs.writeFileSync(file, "");
  fs.truncateSync(file, DEVICE_BYTES);
  try {
    return execFileSync("losetup", ["--find", "--show", file], { encoding: "utf8", stdio: "pipe" }).trim();
  } catch {
    return null;
  }
}

afterAll(() => {
  if (device !== null) execFileSync("losetup", ["--detach", device]);
  fs.rmSync(folder, { recursive: true, force: true });
});

function contentOf(file: string): Buffer {
  return fs.readFileSync(file);
}

describe.runIf(device !== null).each([false, true])("a block device (direct %s)", (direct) => {
  const file = device ?? "";
  const expected = Buffer.alloc(DEVICE_BYTES);

  beforeAll(() => {
    for (let index = 0; index < expected.length; index++)
      expected[index] = (index * 13 + (index >> 10)) & 0xff;
    fs.writeFileSync(file, expected);
  });

  it("has its exact size, and reads and writes at any alignment", async () => {
    const image = await openImage(file, { readOnly: false, format: "raw", direct });
    try {
      expect(image.sizeBytes).toBe(DEVICE_BYTES);
      for (const [offset, length] of [
        [0, 1],
        [4095, 5000],
        [1 * MiB + 3, 300_000],
        [DEVICE_BYTES - 700, 700],
      ] as const) {
        const data = Buffer.alloc(length, offset % 251);
        await image.write(data, 0, length, offset);
        data.copy(expected, offset);
      }
      const all = new Uint8Array(DEVICE_BYTES);
      await image.read(all, 0, all.length, 0);
      expect(Buffer.compare(all, expected)).toBe(0);
    } finally {
      await image.close();
    }
    expect(Buffer.compare(contentOf(file), expected)).toBe(0);
  });

  it.each([true, false])("writes zeroes at any alignment (mayUnmap %s)", async (mayUnmap) => {
    const image = await openImage(file, { readOnly: false, format: "raw", direct });
    try {
      for (const [offset, length] of [
        [5, 10],
        [10_001, 200_000],
        [2 * MiB, 1 * MiB],
        [DEVICE_BYTES - 100_001, 100_001],
      ] as const) {
        await image.writeZeroes(offset, length, { mayUnmap });
        expected.fill(0, offset, offset + length);
      }
      await image.flush();
    } finally {
      await image.close();
    }
    expect(Buffer.compare(contentOf(file), expected)).toBe(0);
  });

  it("takes discards, and reports all as data where holes cannot be seen", async () => {
    const image = await openImage(file, { readOnly: false, format: "raw", direct });
    try {
      await image.discard(4 * MiB, 1 * MiB);
      await image.discard(7, 3);
      const status = await image.blockStatus(0, DEVICE_BYTES);
      expect(status).toMatchObject({ lengthBytes: DEVICE_BYTES, data: true, zero: false });
    } finally {
      await image.close();
    }
  });
});
