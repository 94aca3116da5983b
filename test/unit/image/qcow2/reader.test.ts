// A worker's reader against what QEMU reads, at T0 and while the main thread goes on writing.

import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { sampled } from "../../../support/campaign.js";
import type { Image } from "../../../../src/block/device.js";
import { openImage } from "../../../../src/image/open.js";
import { openSource } from "../../../../src/image/reader.js";
import { KiB, MiB, TiB } from "../../../../src/units.js";
import { randomFrom } from "../../../support/qcow2-memory.js";

const SIZE = 2 * MiB - 1536;
const BLOCK = 4 * KiB;
let folder: string;
const file = (name: string): string => path.join(folder, name);

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), "qcow2-reader-"));
  fs.writeFileSync(file("content.raw"), content());
});
afterEach(() => fs.rmSync(folder, { recursive: true, force: true }));

function qemuImg(...args: string[]): void {
  execFileSync("qemu-img", args, { cwd: folder, stdio: "pipe" });
}

function content(): Buffer {
  const bytes = Buffer.alloc(SIZE);
  const random = randomFrom(11);
  for (let at = 0; at < SIZE; at += 16 * KiB) {
    if (random(3) === 0) continue;
    const noise = Buffer.from(Array.from({ length: 4099 }, () => random(256)));
    bytes.fill(random(2) === 0 ? `${at} is text; ` : noise, at, Math.min(SIZE, at + 16 * KiB));
  }
  return bytes;
}

interface Source {
  name: string;
  make: () => void;
  isEmpty?: boolean;
  direct?: boolean;
}

const SOURCES: Source[] = [
  { name: "plain", make: () => qemuImg("convert", "-O", "qcow2", "content.raw", "image") },
  {
    name: "plain, O_DIRECT",
    direct: true,
    make: () => qemuImg("convert", "-O", "qcow2", "content.raw", "image"),
  },
  {
    name: "512-byte clusters",
    make: () => qemuImg("convert", "-O", "qcow2", "-o", "cluster_size=512", "content.raw", "image"),
  },
  {
    name: "version 2",
    make: () => qemuImg("convert", "-O", "qcow2", "-o", "compat=0.10", "content.raw", "image"),
  },
  { name: "zlib", make: () => qemuImg("convert", "-c", "-O", "qcow2", "content.raw", "image") },
  {
    name: "zstd",
    make: () =>
      qemuImg("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "content.raw", "image"),
  },
  {
    name: "zlib, 2M clusters, O_DIRECT",
    direct: true,
    make: () => qemuImg("convert", "-c", "-O", "qcow2", "-o", "cluster_size=2M", "content.raw", "image"),
  },
  {
    name: "snapshot",
    make: () => {
      qemuImg("convert", "-O", "qcow2", "-o", "cluster_size=4K", "content.raw", "image");
      qemuImg("snapshot", "-c", "s", "image");
    },
  },
  {
    name: "overlay on raw, shorter",
    make: () => {
      fs.truncateSync(file("content.raw"), 1 * MiB + 512);
      qemuImg("create", "-f", "qcow2", "-b", "content.raw", "-F", "raw", "image", `${SIZE}`);
    },
  },
  {
    name: "overlay on compressed qcow2",
    make: () => {
      qemuImg("convert", "-c", "-O", "qcow2", "content.raw", "base.qcow2");
      qemuImg(
        "create",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "-o",
        "cluster_size=4K",
        "image",
        `${SIZE}`,
      );
    },
  },
  { name: "empty", isEmpty: true, make: () => qemuImg("create", "-f", "qcow2", "image", `${SIZE}`) },
];

const openSourceImage = ({ direct }: Source): Promise<Image> =>
  openImage(file("image"), { format: "qcow2", readOnly: false, direct: direct ?? false });

function pageAligned(lengthBytes: number): Buffer {
  const pages = Math.ceil(lengthBytes / 65536);
  return Buffer.from(new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true }).buffer);
}

function expectEqual(actual: Buffer, expected: Buffer, what: string): void {
  if (actual.equals(expected)) return;
  const index = actual.findIndex((byte, at) => byte !== expected[at]);
  expect.fail(`${what}: byte ${index} is ${actual[index]}, not ${expected[index]}`);
}

async function readImage(image: Image): Promise<Buffer> {
  const bytes = Buffer.alloc(image.sizeBytes);
  await image.read(bytes, 0, bytes.length, 0);
  return bytes;
}

describe("qcow2 source reader", () => {
  it.each(SOURCES)("reads $name as QEMU does, with changes not flushed yet", async (source) => {
    source.make();
    qemuImg("convert", "-f", "qcow2", "-O", "raw", "image", "expected.raw");
    const expected = fs.readFileSync(file("expected.raw"));
    const image = await openSourceImage(source);
    for (const [at, length, fill] of [
      [70_000, 10, 1],
      [300_000, 200_000, 2],
      [SIZE - 700, 700, 3],
    ] as const) {
      await image.write(Buffer.alloc(length, fill), 0, length, at);
      expected.fill(fill, at, at + length);
    }
    await image.writeZeroes(1 * MiB, 128 * KiB, { mayUnmap: true });
    expected.fill(0, 1 * MiB, 1 * MiB + 128 * KiB);
    const frozen = image.freeze();
    const reader = openSource(frozen.description);
    for (const step of [SIZE, 1 * MiB, 65536 + 4096]) {
      const place = pageAligned(SIZE + BLOCK);
      for (let at = 0; at < SIZE; at += step) {
        await reader.read(place, at, Math.min(step, SIZE - at), at);
      }
      expectEqual(Buffer.from(place.subarray(0, SIZE)), expected, `in steps of ${step}`);
    }
    const pooled = openSource(frozen.description, () => false, true, true);
    const place = pageAligned(SIZE + BLOCK);
    const half = Math.floor(SIZE / 2);
    await Promise.all([pooled.read(place, 0, half, 0), pooled.read(place, half, SIZE - half, half)]);
    expectEqual(Buffer.from(place.subarray(0, SIZE)), expected, "two reads by libuv's pool");
    pooled.close();
    let covered = 0;
    while (covered < SIZE) {
      const { lengthBytes, zero } = reader.extent(covered, SIZE - covered);
      expect(lengthBytes).toBeGreaterThan(0);
      if (zero)
        expect(expected.subarray(covered, covered + lengthBytes).every((byte) => byte === 0)).toBe(true);
      covered += lengthBytes;
    }
    expect(covered).toBe(SIZE);
    reader.close();
    frozen.release();
    await image.close();
    qemuImg("check", "-f", "qcow2", "image");
  });

  it.each(sampled(SOURCES, 2))("keeps T0 of $name where the guest has not written since", async (source) => {
    source.make();
    const image = await openSourceImage(source);
    const random = randomFrom(source.name.length);
    await image.write(Buffer.alloc(5000, 9), 0, 5000, 200_000);
    const isChanged = new Uint8Array(Math.ceil(SIZE / BLOCK));
    const before = await readImage(image);
    const frozen = image.freeze();
    const place = pageAligned(BLOCK);
    for (let round = 0; round < 12; round++) {
      for (let step = 0; step < 12; step++) await changeBlocks(image, isChanged, random);
      await image.flush();
      // A new reader has no table in its cache, so that it meets the file as it is now.
      const reader = openSource(frozen.description);
      for (let block = 0; block < isChanged.length; block++) {
        if (isChanged[block]) continue;
        const length = Math.min(BLOCK, SIZE - block * BLOCK);
        await reader.read(place, 0, length, block * BLOCK);
        const expected = before.subarray(block * BLOCK, block * BLOCK + length);
        expectEqual(Buffer.from(place.subarray(0, length)), expected, `round ${round}, block ${block}`);
      }
      reader.close();
    }
    frozen.release();
    const after = await readImage(image);
    await image.close();
    qemuImg("check", "-f", "qcow2", "image");
    fs.writeFileSync(file("after.raw"), after);
    qemuImg("compare", "-f", "qcow2", "-F", "raw", "image", "after.raw");
  });

  it("walks an empty image of 16 TiB in no time, and finds what is in it", async () => {
    qemuImg("create", "-f", "qcow2", "image", `${16 * TiB}`);
    const image = await openImage(file("image"), { format: "qcow2", readOnly: false });
    await image.write(Buffer.alloc(1000, 7), 0, 1000, 9 * TiB + 5);
    const frozen = image.freeze();
    const reader = openSource(frozen.description);
    const started = performance.now();
    const data: [number, number][] = [];
    for (let at = 0; at < 16 * TiB;) {
      const { lengthBytes, zero } = reader.extent(at, 16 * TiB - at);
      if (!zero) data.push([at, lengthBytes]);
      at += lengthBytes;
    }
    expect(performance.now() - started).toBeLessThan(20_000);
    expect(data).toEqual([[9 * TiB, 64 * KiB]]);
    frozen.release();
    await image.close();
  });
});

/** Changes whole blocks, by every kind of operation, as the interceptor would have captured them before. */
async function changeBlocks(
  image: Image,
  isChanged: Uint8Array,
  random: (limit: number) => number,
): Promise<void> {
  const isWide = random(5) === 0;
  const first = random(isChanged.length);
  const count = Math.min(isChanged.length - first, isWide ? 16 + random(40) : 1 + random(3));
  const start = first * BLOCK;
  const length = Math.min(count * BLOCK, SIZE - start);
  isChanged.fill(1, first, first + count);
  const choice = random(8);
  if (choice < 5) await image.write(Buffer.alloc(length, 1 + random(255)), 0, length, start);
  else if (choice < 7) await image.writeZeroes(start, length, { mayUnmap: random(2) === 0 });
  else await image.discard(start, length);
  if (random(6) === 0) await image.flush();
}
