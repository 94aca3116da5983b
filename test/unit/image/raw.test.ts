import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { pageAlignedMemory } from "../../../src/block/file/fileio.js";
import { type RawImage, openRaw } from "../../../src/image/raw.js";
import { libc } from "../../../src/native/libc.js";
import { KiB, MiB } from "../../../src/units.js";

// tmpdir is on a disk's file system, /dev/shm on tmpfs: the two have different fast paths.
const SCRATCH_ROOTS = [tmpdir(), "/dev/shm"];

let folder: string;
let images: RawImage[];

beforeEach(() => {
  images = [];
});

afterEach(async () => {
  for (const image of images) await image.close();
  fs.rmSync(folder, { recursive: true, force: true });
});

interface Wanted {
  root?: string;
  content: Uint8Array;
  readOnly?: boolean;
  direct?: boolean;
  probed?: boolean;
}

async function openWith({ root = tmpdir(), content, ...wanted }: Wanted): Promise<RawImage> {
  folder = fs.mkdtempSync(path.join(root, "cowcatcher-raw-"));
  const file = path.join(folder, "disk.raw");
  fs.writeFileSync(file, content);
  const { readOnly = false, direct = false, probed = false } = wanted;
  const access = readOnly ? fs.constants.O_RDONLY : fs.constants.O_RDWR;
  const fd = fs.openSync(file, access | (direct ? fs.constants.O_DIRECT : 0));
  const image = await openRaw({ path: file, name: file, fd, readOnly, direct, probed });
  images.push(image);
  return image;
}

function pattern(lengthBytes: number, seed = 1): Uint8Array {
  return Uint8Array.from({ length: lengthBytes }, (_, index) => (index * 31 + (index >> 8) + seed) & 0xff);
}

async function readAll(image: RawImage): Promise<Uint8Array> {
  const buffer = new Uint8Array(image.sizeBytes);
  await image.read(buffer, 0, buffer.length, 0);
  return buffer;
}

/** The file's bytes as another program sees them. */
function onDisk(image: RawImage): Uint8Array {
  return new Uint8Array(fs.readFileSync(image.path));
}

describe.each(SCRATCH_ROOTS)("raw image in %s", (root) => {
  it("has the exact size of an odd file, and reads and writes to its last byte", async () => {
    const image = await openWith({ root, content: pattern(4097) });
    expect(image.sizeBytes).toBe(4097);
    expect(await readAll(image)).toEqual(pattern(4097));
    await image.write(Uint8Array.of(7, 8), 1, 1, 4096);
    expect(onDisk(image).length).toBe(4097);
    expect(onDisk(image)[4096]).toBe(8);
  });

  it("completes small cached reads and writes synchronously", async () => {
    const image = await openWith({ root, content: pattern(64 * KiB) });
    const buffer = new Uint8Array(4096);
    await image.read(buffer, 0, 4096, 4096);
    if (libc !== null) expect(image.read(buffer, 0, 4096, 4096)).toBeUndefined();
    expect(image.write(buffer, 0, 4096, 0)).toBeUndefined();
    expect(onDisk(image).subarray(0, 4096)).toEqual(pattern(8192).subarray(4096));
  });

  it("reads and writes requests beyond the synchronous limit", async () => {
    const image = await openWith({ root, content: new Uint8Array(5 * MiB) });
    const data = pattern(4 * MiB);
    await image.write(data, 0, data.length, 12345);
    const back = new Uint8Array(data.length);
    await image.read(back, 0, back.length, 12345);
    expect(Buffer.compare(back, data)).toBe(0);
    expect(Buffer.compare(onDisk(image).subarray(12345, 12345 + data.length), data)).toBe(0);
  });

  it("fails to read, to flush and to be frozen when the file was cut short meanwhile", async () => {
    const image = await openWith({ root, content: pattern(8192) });
    fs.truncateSync(image.path, 4100);
    await expect(readAll(image)).rejects.toMatchObject({ code: "IO", errno: "EIO" });
    const start = new Uint8Array(4100);
    await image.read(start, 0, start.length, 0);
    expect(Buffer.compare(start, pattern(4100))).toBe(0);
    await expect(image.flush()).rejects.toThrow("shorter than the 8192 bytes");
    await expect(async () => image.blockStatus(4100, 8192 - 4100)).rejects.toThrow("shorter than");
    expect(() => image.freeze()).toThrow("shorter than the 8192 bytes");
    fs.truncateSync(image.path, 8192);
  });

  it("lets no write make the file long again while a copy reads it", async () => {
    const image = await openWith({ root, content: pattern(8192) });
    const frozen = image.freeze();
    fs.truncateSync(image.path, 4096);
    await expect(image.write(new Uint8Array(512), 0, 512, 7680)).rejects.toThrow("shorter than");
    expect(onDisk(image)).toHaveLength(4096);
    expect(() => frozen.assertNotCut?.()).toThrow("shorter than");
    frozen.release();
    fs.truncateSync(image.path, 8192);
  });

  it.each([true, false])("writes zeroes of any alignment (mayUnmap %s)", async (mayUnmap) => {
    const size = 40 * MiB + 1;
    const image = await openWith({ root, content: Buffer.alloc(size, 0xaa) });
    const ranges = [
      [1000, 10],
      [5000, 70_000],
      [1 * MiB + 7, 39 * MiB - 8],
    ] as const;
    const expected = Buffer.alloc(size, 0xaa);
    for (const [offset, length] of ranges) {
      await image.writeZeroes(offset, length, { mayUnmap });
      expected.fill(0, offset, offset + length);
    }
    expect(Buffer.compare(onDisk(image), expected)).toBe(0);
  });

  it.runIf(libc !== null)("releases storage by mayUnmap and discard", async () => {
    const image = await openWith({ root, content: Buffer.alloc(8 * MiB, 1) });
    await image.flush();
    const before = fs.statSync(image.path).blocks;
    await image.writeZeroes(0, 2 * MiB, { mayUnmap: true });
    await image.discard(4 * MiB, 2 * MiB);
    expect(fs.statSync(image.path).blocks).toBeLessThanOrEqual(before - (4 * MiB) / 512);
    expect(image.blockStatus(0, 8 * MiB)).toMatchObject({ lengthBytes: 2 * MiB, zero: true, data: false });
    expect(image.blockStatus(2 * MiB, 8 * MiB)).toMatchObject({
      lengthBytes: 2 * MiB,
      zero: false,
      data: true,
      hostOffsetBytes: 2 * MiB,
    });
  });

  it.runIf(libc !== null)("sees what became a hole, or data, since it last looked", async () => {
    const image = await openWith({ root, content: Buffer.alloc(8 * MiB, 1) });
    await image.flush();
    /** Where zero and data take turns, from 0 on. */
    const borders = async () => {
      const found: number[] = [];
      let wasZero = false;
      for (let at = 0; at < 8 * MiB;) {
        const { lengthBytes, zero } = await image.blockStatus(at, 8 * MiB - at);
        if (zero !== wasZero) found.push(at / MiB);
        wasZero = zero;
        at += lengthBytes;
      }
      return found;
    };
    expect(await borders()).toEqual([]);
    await image.discard(4 * MiB, MiB);
    expect(await borders()).toEqual([4, 5]);
    await image.writeZeroes(MiB, MiB, { mayUnmap: true });
    expect(await borders()).toEqual([1, 2, 4, 5]);
    await image.write(Buffer.alloc(MiB, 2), 0, MiB, MiB);
    await image.flush();
    expect(await borders()).toEqual([4, 5]);
    await image.write(Buffer.alloc(MiB, 2), 0, MiB, 4 * MiB);
    await image.flush();
    expect(await borders()).toEqual([]);
  });

  it.runIf(libc !== null)("tells an empty 16 TiB range in one step", async () => {
    const size = root === "/dev/shm" ? 2 ** 42 : 2 ** 43;
    const image = await openWith({ root, content: new Uint8Array(0) });
    fs.truncateSync(image.path, size);
    const fd = fs.openSync(image.path, "r+");
    fs.writeSync(fd, "x", size - 4096);
    const huge = await openRaw({
      path: image.path,
      name: "huge",
      fd,
      readOnly: false,
      direct: false,
      probed: false,
    });
    images.push(huge);
    expect(huge.blockStatus(0, size)).toMatchObject({ lengthBytes: size - 4096, zero: true });
  });

  it("refuses writes to a read-only image", async () => {
    const image = await openWith({ root, content: pattern(4096), readOnly: true });
    await expect(image.write(pattern(1), 0, 1, 0)).rejects.toMatchObject({ errno: "EROFS" });
    await expect(image.writeZeroes(0, 1, { mayUnmap: false })).rejects.toMatchObject({ errno: "EROFS" });
    await expect(image.discard(0, 1)).rejects.toMatchObject({ errno: "EROFS" });
  });
});

describe("the guard of a probed raw image", () => {
  const HEADERS: [format: string, offset: number, text: string][] = [
    ["qcow2", 0, "QFI\xfb\0\0\0\x03"],
    ["qcow", 0, "QFI\xfb"],
    ["vmdk", 0, "KDMV"],
    ["vmdk", 0, "COWD"],
    ["vmdk", 0, "# Disk DescriptorFile\n"],
    ["vmdk", 0, "# comment\n\nversion=1\n"],
    ["qed", 0, "QED\0"],
    ["vhdx", 0, "vhdxfile"],
    ["vpc", 0, "conectix"],
    ["vdi", 64, "\x7f\x10\xda\xbe"],
    ["parallels", 0, "WithouFreSpacExt"],
    ["luks", 0, "LUKS\xba\xbe\0\x01"],
  ];

  it.each(HEADERS)(
    "refuses a write of %s's header at %i, before a byte is written",
    async (format, at, text) => {
      const image = await openWith({ content: Buffer.alloc(64 * KiB, 0x11), probed: true });
      const block = Buffer.alloc(4096, 0x11);
      block.write(text, at, "latin1");
      const refused = expect(image.write(block, 0, block.length, 0)).rejects;
      await refused.toMatchObject({
        errno: "EPERM",
        problem: expect.stringContaining(`'${format}'`) as string,
      });
      expect(onDisk(image)).toEqual(new Uint8Array(64 * KiB).fill(0x11));
    },
  );

  it.each([false, true])("refuses the few bytes that complete a magic (direct %s)", async (direct) => {
    const image = await openWith({ content: Buffer.alloc(8192, 0x11), probed: true, direct });
    await image.write(Buffer.from("QFI"), 0, 3, 0);
    await expect(image.write(Uint8Array.of(0xfb), 0, 1, 3)).rejects.toMatchObject({ errno: "EPERM" });
    await image.write(Uint8Array.of(0xfa), 0, 1, 3);
    expect(Buffer.from(onDisk(image).subarray(0, 5)).toString("latin1")).toBe("QFI\xfa\x11");
  });

  it("refuses zeroes, and ignores a discard, that would complete a magic", async () => {
    const image = await openWith({ content: Buffer.from("QED!".padEnd(8192, "x")), probed: true });
    await expect(image.writeZeroes(3, 1, { mayUnmap: false })).rejects.toMatchObject({ errno: "EPERM" });
    await expect(image.writeZeroes(3, 4000, { mayUnmap: true })).rejects.toMatchObject({ errno: "EPERM" });
    await image.discard(3, 4000);
    expect(Buffer.from(onDisk(image).subarray(0, 5)).toString()).toBe("QED!x");
  });

  it("lets other writes to the sector through, and headers elsewhere", async () => {
    const image = await openWith({ content: new Uint8Array(8192), probed: true });
    await image.write(Buffer.from("\xeb\x63\x90GRUB", "latin1"), 0, 7, 0);
    await image.write(Buffer.from("QFI\xfb\0\0\0\x03", "latin1"), 0, 8, 512);
    expect(onDisk(image)[512]).toBe(0x51);
  });

  it("allows everything where the user named the format", async () => {
    const image = await openWith({ content: new Uint8Array(8192), probed: false });
    await image.write(Buffer.from("QFI\xfb\0\0\0\x03", "latin1"), 0, 8, 0);
    expect(onDisk(image)[0]).toBe(0x51);
  });

  it("guards an image smaller than a sector", async () => {
    const image = await openWith({ content: new Uint8Array(5), probed: true });
    await image.write(Buffer.from("QFI"), 0, 3, 0);
    await expect(image.write(Uint8Array.of(0xfb, 0), 0, 2, 3)).rejects.toBeInstanceOf(CowcatcherError);
  });
});

describe("O_DIRECT", () => {
  it.each([0, 1, 511, 4095])("reads and writes any alignment, size 1 MiB + %i", async (extra) => {
    const size = 1 * MiB + extra;
    const image = await openWith({ content: pattern(size), direct: true });
    const expected = Buffer.from(pattern(size));
    const requests = [
      [0, 1],
      [4095, 2],
      [4096, 4096],
      [8191, 300_000],
      [size - 1, 1],
      [size - 5000, 5000],
      [700_000, 4096 * 3],
    ] as const;
    for (const [offset, length] of requests) {
      const data = pattern(length, offset);
      await image.write(data, 0, length, offset);
      expected.set(data, offset);
      const back = new Uint8Array(length + 3);
      await image.read(back, 3, length, offset);
      expect(Buffer.compare(back.subarray(3), data)).toBe(0);
    }
    expect(Buffer.compare(await readAll(image), expected)).toBe(0);
    expect(Buffer.compare(onDisk(image), expected)).toBe(0);
  });

  it("takes aligned shared memory", async () => {
    const image = await openWith({ content: pattern(64 * KiB), direct: true });
    const memory = pageAlignedMemory(64 * KiB);
    await image.read(memory, 0, 64 * KiB, 0);
    expect(Buffer.compare(memory, pattern(64 * KiB))).toBe(0);
    memory.fill(9, 4096, 8192);
    await image.write(memory, 4096, 4096, 0);
    expect(onDisk(image).subarray(0, 4096)).toEqual(new Uint8Array(4096).fill(9));
  });

  it("loses none of many small writes to the same block at the same time", async () => {
    const image = await openWith({ content: new Uint8Array(8192), direct: true });
    const data = pattern(8192);
    const writes: Promise<void>[] = [];
    for (let at = 0; at < 8192; at += 64) {
      const completion = image.write(data, at, 64, at);
      if (completion) writes.push(completion);
    }
    await Promise.all(writes);
    expect(Buffer.compare(onDisk(image), data)).toBe(0);
  });

  it("writes zeroes within blocks, and at the odd end, without growing the file", async () => {
    const image = await openWith({ content: Buffer.alloc(100_001, 5), direct: true });
    await image.writeZeroes(10, 20, { mayUnmap: false });
    await image.writeZeroes(30_000, 70_001, { mayUnmap: true });
    const expected = Buffer.alloc(100_001, 5).fill(0, 10, 30).fill(0, 30_000);
    expect(Buffer.compare(onDisk(image), expected)).toBe(0);
  });
});
