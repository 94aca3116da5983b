// Each feature of qcow2 against each operation, with QEMU as judge: images as qemu-img 7.2 makes them
// (support/qcow2-shapes.ts), read through the device and by a worker, described, mapped, checked, compared, backed
// up offline and live, and written to by a guest. Cowcatcher runs in this process, but for `serve`.

import { execFileSync, spawnSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { runProgram as RunProgram } from "../../src/cli/program.js";
import type { Image, SourceReader } from "../../src/block/device.js";
import { openImage } from "../../src/image/open.js";
import { openSource } from "../../src/image/reader.js";
import { KiB } from "../../src/units.js";
import { IMAGE_NAME, QCOW2_SHAPES, type Qcow2Shape, makeShape } from "../support/qcow2-shapes.js";
import { Random } from "../support/random.js";
import { Server, mustRun, scratchFolder, stopAll } from "../support/server.js";

const GUEST_OPERATIONS = 80;
const dist = new URL(process.env["COWCATCHER_DIST"] ?? "../../dist/", import.meta.url);
const startFolder = process.cwd();
let folder: string;
let runProgram: typeof RunProgram;

interface Ended {
  code: number | null;
  stdout: string;
}

/** The built program in this process, in the current folder. */
async function ours(...args: string[]): Promise<Ended & { stderr: string }> {
  let stdout = "";
  let stderr = "";
  const code = await runProgram(args, {
    stdout: { write: (text) => (stdout += text) },
    stderr: { write: (text) => (stderr += text) },
    environment: {},
  });
  return { code, stdout, stderr };
}

function qemuImg(...args: string[]): Ended {
  const { status, stdout } = spawnSync("qemu-img", args, { encoding: "utf8" });
  return { code: status, stdout };
}

function qemuImgMust(...args: string[]): void {
  execFileSync("qemu-img", args, { stdio: ["ignore", "ignore", "pipe"] });
}

function enter(shape: Qcow2Shape): void {
  // QEMU looks for an external data file from where it runs.
  process.chdir(join(folder, shape.name));
}

beforeAll(async () => {
  ({ runProgram } = (await import(new URL("src/cli/program.js", dist).href)) as {
    runProgram: typeof RunProgram;
  });
  folder = scratchFolder();
  for (const shape of QCOW2_SHAPES) {
    mkdirSync(join(folder, shape.name));
    makeShape(join(folder, shape.name), shape);
    enter(shape);
    qemuImgMust("convert", "-f", "qcow2", "-O", "raw", IMAGE_NAME, "expected.raw");
  }
});

afterAll(async () => {
  process.chdir(startFolder);
  await stopAll();
});

async function contentOf(image: Image): Promise<Buffer> {
  const content = Buffer.alloc(image.sizeBytes, 0xee);
  await image.read(content, 0, content.length, 0);
  return content;
}

/** As a worker reads: only what is not zero by metadata, in steps that cross clusters. */
async function contentByReader(reader: SourceReader): Promise<Buffer> {
  const content = Buffer.alloc(reader.sizeBytes, 0xee);
  for (let at = 0; at < content.length;) {
    const { lengthBytes, zero } = reader.extent(at, content.length - at);
    const length = Math.min(lengthBytes, 100 * KiB + 1);
    if (zero) content.fill(0, at, at + length);
    else await reader.read(content, at, length, at);
    at += length;
  }
  return content;
}

/** Backed up live; the others offline. Each has a worker, so one of a kind is enough. */
const SERVED = new Set(
  "v3-64k v2-4k v3-512 v3-2m zlib-v2-4k zstd deep-chain snapshots lazy refcount-64 bitmaps metadata extended-l2-16k data-file".split(
    " ",
  ),
);
const LIVE_SHAPES = QCOW2_SHAPES.filter(({ name }) => SERVED.has(name));

describe.each(QCOW2_SHAPES)("$name", (shape) => {
  it("is read as QEMU reads it, by the device and by a worker", async () => {
    enter(shape);
    const expected = readFileSync("expected.raw");
    const image = await openImage(IMAGE_NAME, { readOnly: true });
    try {
      expect((await contentOf(image)).equals(expected)).toBe(true);
      const frozen = image.freeze();
      const reader = openSource(frozen.description);
      expect((await contentByReader(reader)).equals(expected)).toBe(true);
      reader.close();
      frozen.release();
    } finally {
      await image.close();
    }
  });

  if (shape.snapshots !== undefined)
    it("shows each of its internal snapshots", async () => {
      enter(shape);
      for (const snapshot of shape.snapshots ?? []) {
        qemuImgMust("convert", "-l", snapshot, "-O", "raw", IMAGE_NAME, "snapshot.raw");
        const image = await openImage(IMAGE_NAME, { readOnly: true, snapshot });
        try {
          expect((await contentOf(image)).equals(readFileSync("snapshot.raw"))).toBe(true);
        } finally {
          await image.close();
        }
      }
    });

  it.each(["info", "check", "map"])("%s --json is qemu-img's", async (command) => {
    enter(shape);
    const theirs = qemuImg(command, "--output=json", IMAGE_NAME);
    const mine = await ours(command, "--json", IMAGE_NAME);
    expect(mine.stderr).toBe("");
    expect(JSON.parse(mine.stdout)).toEqual(JSON.parse(theirs.stdout));
    expect(mine.code).toBe(theirs.code);
  });

  it("map is qemu-img's, of a part of the disk and as text", async () => {
    enter(shape);
    const part = ["-s", "70000", "-l", "600123", IMAGE_NAME];
    const mine = await ours("map", "--json", ...part);
    expect(JSON.parse(mine.stdout)).toEqual(JSON.parse(qemuImg("map", "--output=json", ...part).stdout));
    expect(await ours("map", IMAGE_NAME)).toMatchObject(qemuImg("map", IMAGE_NAME));
  });

  it("compare finds it equal to its content, and not to another", async () => {
    enter(shape);
    expect(await ours("compare", IMAGE_NAME, "expected.raw")).toMatchObject({ code: 0, stderr: "" });
    if (shape.sizeBytes === 0) return;
    const other = readFileSync("expected.raw");
    const at = other.length - 700;
    other.writeUInt8(other.readUInt8(at) ^ 1, at);
    writeFileSync("other.raw", other);
    const theirs = qemuImg("compare", "-f", "qcow2", "-F", "raw", IMAGE_NAME, "other.raw");
    const mine = await ours("compare", "-f", "qcow2", "-F", "raw", IMAGE_NAME, "other.raw");
    expect([mine.code, mine.code]).toEqual([theirs.code, 1]);
    // QEMU compares in sectors and names the first of those that differ.
    const offset = Number(/offset (\d+)/.exec(mine.stdout)?.[1]);
    expect([offset, theirs.stdout]).toEqual([at, expect.stringContaining(`${at - (at % 512)}`)]);
  });

  if (!SERVED.has(shape.name))
    it("is backed up offline", async () => {
      enter(shape);
      const args = ["-q", "--no-progress", "-w", "1", "-O", "qcow2", IMAGE_NAME, "offline.qcow2"];
      const { code, stderr } = await ours("backup", ...args);
      expect([code, stderr]).toEqual([0, ""]);
      expect(qemuImg("check", "offline.qcow2").code).toBe(0);
      expect(qemuImg("compare", "-f", "qcow2", "-F", "raw", "offline.qcow2", "expected.raw").code).toBe(0);
    });

  it("takes a guest's writes", async () => {
    const guest = join(folder, "guest", shape.name);
    cpSync(join(folder, shape.name), guest, { recursive: true });
    process.chdir(guest);
    const model = await playGuest(readFileSync("expected.raw"));
    writeFileSync("model.raw", model);
    // Bitmaps that the driver does not keep up to date are let go, as the specification asks; their clusters leak.
    const leaks = 3;
    expect(shape.bitmaps === undefined ? [0] : [0, leaks]).toContain(qemuImg("check", IMAGE_NAME).code);
    expect(qemuImg("compare", "-f", "qcow2", "-F", "raw", IMAGE_NAME, "model.raw").code).toBe(0);
    for (const name of shape.snapshots ?? []) {
      const before = join(folder, shape.name, IMAGE_NAME);
      qemuImgMust("convert", "-l", name, "-O", "raw", before, "before.raw");
      qemuImgMust("convert", "-l", name, "-O", "raw", IMAGE_NAME, "after.raw");
      expect(readFileSync("after.raw").equals(readFileSync("before.raw"))).toBe(true);
    }
  });
});

/** Writes, zeroes, discards and reads at random through the driver; returns what the disk must read as. */
async function playGuest(model: Buffer): Promise<Buffer> {
  const random = new Random(model.length);
  let image = await openImage(IMAGE_NAME, { format: "qcow2", readOnly: false });
  try {
    for (let count = 0; count < GUEST_OPERATIONS && model.length > 0; count++) {
      if (random.chance(0.05)) {
        await image.close();
        image = await openImage(IMAGE_NAME, { format: "qcow2", readOnly: false });
      } else await playOnce(image, model, random);
    }
    expect((await contentOf(image)).equals(model)).toBe(true);
  } finally {
    await image.close();
  }
  return model;
}

async function playOnce(image: Image, model: Buffer, random: Random): Promise<void> {
  const unit = random.pick([1, 512, 4 * KiB, 64 * KiB]);
  const at = Math.floor(random.below(model.length) / unit) * unit;
  const length = Math.min(model.length - at, unit * (1 + random.below(unit === 1 ? 5000 : 6)));
  const roll = random.below(20);
  if (roll < 11) {
    const data = Buffer.alloc(length, `${at} `);
    await image.write(data, 0, length, at);
    data.copy(model, at);
  } else if (roll < 14) {
    await image.writeZeroes(at, length, { mayUnmap: random.chance(0.5) });
    model.fill(0, at, at + length);
  } else if (roll < 16) {
    await image.discard(at, length);
    const after = Buffer.alloc(length, 0xee);
    await image.read(after, 0, length, at);
    for (let index = 0; index < length; index++) {
      if (after[index] !== 0 && after[index] !== model[at + index])
        expect.fail(`discard invents ${at + index}`);
    }
    after.copy(model, at);
  } else if (roll < 19) {
    const data = Buffer.alloc(length, 0xee);
    await image.read(data, 0, length, at);
    expect(data.equals(model.subarray(at, at + length))).toBe(true);
  } else await image.flush();
}

/** Writes that change every disk in many places, in one process; each argument is a URI. */
const OVERWRITE = `
import nbd, sys
for uri in sys.argv[1:]:
    h = nbd.NBD()
    h.connect_uri(uri)
    size = h.get_size()
    for at in range(0, size, 40000):
        h.pwrite(bytes([at // 40000 % 255 + 1]) * min(3000, size - at), at)
    if size > 100000:
        h.zero(70000, 20000)
        h.trim(min(200000, size - 70000), 65536)
    h.flush()
    h.shutdown()
`;

describe("images of each kind, served at once", () => {
  it("are backed up live as they were at T0, while a guest overwrites them", async () => {
    const live = join(folder, "live");
    for (const { name } of LIVE_SHAPES) cpSync(join(folder, name), join(live, name), { recursive: true });
    process.chdir(live);
    const pathOf = (name: string): string => join(live, name, IMAGE_NAME);
    const images = LIVE_SHAPES.map(({ name }) => `${pathOf(name)}=${name}`);
    // The target is slow, so that the guest comes first to most clusters.
    const server = await Server.start(live, images, { env: { COWCATCHER_FAULTS: "target-write:delay=3ms" } });
    const disks = LIVE_SHAPES.flatMap(({ name }) => ["--disk", name]);
    const targets = LIVE_SHAPES.map(({ name }) => join(live, name, "backup.qcow2"));
    const backup = server.backup("-w", "1", "--cow-buffer-size", "4M", ...disks, ...targets);
    await backup.started();
    await mustRun("/usr/bin/python3", "-c", OVERWRITE, ...LIVE_SHAPES.map(({ name }) => server.uri(name)));
    expect((await backup.end()).code).toBe(0);
    expect((await server.stop()).code).toBe(0);
    for (const { name } of LIVE_SHAPES) {
      process.chdir(join(live, name));
      const compared = qemuImg("compare", "-f", "qcow2", "-F", "raw", "backup.qcow2", "expected.raw");
      expect({ name, ...compared }).toMatchObject({ code: 0 });
      expect({ name, ...qemuImg("check", "backup.qcow2") }).toMatchObject({ code: 0 });
      expect({ name, ...qemuImg("check", IMAGE_NAME) }).toMatchObject({ code: name === "bitmaps" ? 3 : 0 });
      const written = await openImage(IMAGE_NAME, { format: "qcow2", readOnly: true });
      expect((await contentOf(written)).equals(readFileSync("expected.raw"))).toBe(false);
      await written.close();
    }
    expect(existsSync(server.socket)).toBe(false);
  });
});
