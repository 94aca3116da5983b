// kill -9 in the middle of guest writes, on real files: a process drives the image as `serve` does and tells each
// step, until it is killed at a random one of them; some are `serve` itself, with a guest on NBD. Afterwards QEMU's
// check may find leaks but no corruption, the driver opens the image and goes on, and what a completed flush covered
// reads back. (model/qcow2-crash.test.ts stages power cuts, and hundreds of moments, in memory.)

import { execFileSync, spawn, spawnSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { sampled } from "../../support/campaign.js";
import { openImage } from "../../../src/image/open.js";
import { KiB } from "../../../src/units.js";
import { IMAGE_NAME, QCOW2_SHAPES, makeShape } from "../../support/qcow2-shapes.js";
import { Random } from "../../support/random.js";
import { Process, Server, scratchFolder, stopAll } from "../../support/server.js";

const dist = new URL(process.env["COWCATCHER_DIST"] ?? "../../../dist/", import.meta.url);
const OPERATIONS = 400;
const KILLED =
  "v3-4k v2-512 zlib-v2-4k zstd-4k snapshots-v2-512 snapshots-zlib refcount-1 refcount-64 lazy deep-chain bitmaps-512 extended-l2-16k data-file data-file-extended-l2".split(
    " ",
  );
const KILLS_PER_SHAPE = 2;
const SERVE_KILLS = 3;

let folder: string;
beforeAll(() => {
  folder = scratchFolder();
});
afterAll(stopAll);

interface Operation {
  kind: "write" | "zero" | "discard" | "flush";
  at: number;
  length: number;
  /** What the bytes become; a discard may leave them as they are. */
  fill: number;
}

/** Told before and after each operation: "b" or "e" and its index. Written at once, so that none is lost. */
const CHILD = `
import { readFileSync, writeSync } from "node:fs";
const [dist, image, operationsFile] = process.argv.slice(1);
const { openImage } = await import(new URL("src/image/open.js", dist).href);
const operations = JSON.parse(readFileSync(operationsFile, "utf8"));
const device = await openImage(image, { format: "qcow2", readOnly: false });
for (const [index, { kind, at, length, fill }] of operations.entries()) {
  writeSync(1, "b " + index + "\\n");
  if (kind === "write") await device.write(Buffer.alloc(length, fill), 0, length, at);
  else if (kind === "zero") await device.writeZeroes(at, length, { mayUnmap: index % 2 === 0 });
  else if (kind === "discard") await device.discard(at, length);
  else await device.flush();
  writeSync(1, "e " + index + "\\n");
}
`;

function makeOperations(sizeBytes: number, random: Random): Operation[] {
  return Array.from({ length: OPERATIONS }, () => {
    const unit = random.pick([1, 512, 4 * KiB]);
    const at = Math.floor(random.below(sizeBytes) / unit) * unit;
    const length = Math.min(sizeBytes - at, unit * (1 + random.below(unit === 1 ? 3000 : 12)));
    const roll = random.below(20);
    const kind = roll < 12 ? "write" : roll < 15 ? "zero" : roll < 17 ? "discard" : "flush";
    return { kind, at, length, fill: kind === "write" ? 1 + random.below(255) : 0 };
  });
}

/** Runs the child until it says the line, then kills it; returns the last begun and the last ended operation. */
async function killAt(folderOfImage: string, lineCount: number): Promise<{ begun: number; ended: number }> {
  const args = ["--input-type=module", "-e", CHILD, dist.href, IMAGE_NAME, "operations.json"];
  const child = spawn(process.execPath, args, {
    cwd: folderOfImage,
    stdio: ["ignore", "pipe", "inherit"],
  });
  const last = { begun: -1, ended: -1 };
  let lines = 0;
  createInterface({ input: child.stdout }).on("line", (line) => {
    const index = Number(line.slice(2));
    if (line.startsWith("b")) last.begun = index;
    else last.ended = index;
    if (++lines === lineCount) child.kill("SIGKILL");
  });
  const code = await new Promise<number | null>((resolve, reject) => {
    child.on("error", reject);
    child.on("close", resolve);
  });
  if (code !== null && code !== 0) throw new Error(`the child ended with ${code}`);
  return last;
}

function expectSound(folderOfImage: string): void {
  const { status, stdout, stderr } = spawnSync("qemu-img", ["check", IMAGE_NAME], {
    cwd: folderOfImage,
    encoding: "utf8",
  });
  // 3: leaked clusters.
  if (status !== 0 && status !== 3) expect.fail(`${stdout}${stderr}`);
}

async function contentOf(imagePath: string): Promise<Buffer> {
  const image = await openImage(imagePath, { format: "qcow2", readOnly: true });
  try {
    const content = Buffer.alloc(image.sizeBytes);
    await image.read(content, 0, content.length, 0);
    return content;
  } finally {
    await image.close();
  }
}

/** Each byte is as the last flush left it, or as an operation made it that began later. */
function expectKept(
  content: Buffer,
  start: Buffer,
  operations: Operation[],
  begun: number,
  ended: number,
): void {
  const flushed = operations.findLastIndex(({ kind }, index) => index <= ended && kind === "flush");
  const model = Buffer.from(start);
  const isOpen = new Uint8Array(start.length);
  for (const { kind, at, length, fill } of operations.slice(0, flushed + 1)) {
    if (kind === "flush") continue;
    model.fill(fill, at, at + length);
    isOpen.fill(kind === "discard" ? 1 : 0, at, at + length);
  }
  for (const { kind, at, length, fill } of operations.slice(flushed + 1, begun + 1)) {
    if (kind === "flush") continue;
    for (let index = at; index < at + length; index++) if (content[index] === fill) isOpen[index] = 1;
  }
  for (let index = 0; index < content.length; index++) {
    if (!isOpen[index] && content[index] !== model[index]) {
      expect.fail(`byte ${index} is ${content[index]}, was flushed as ${model[index]}, killed at ${begun}`);
    }
  }
}

describe("a process that drives an image, killed", () => {
  const shapes = QCOW2_SHAPES.filter(({ name }) => KILLED.includes(name));

  it.each(sampled(shapes, 3))("leaves $name sound, with what was flushed", async (shape) => {
    const own = join(folder, shape.name);
    mkdirSync(own);
    makeShape(own, shape);
    const random = new Random(shape.name.length * 1000 + shape.clusterBytes);
    for (let kill = 0; kill < KILLS_PER_SHAPE; kill++) {
      // The next process goes on with what the last one left.
      const before = await contentOf(join(own, IMAGE_NAME));
      const operations = makeOperations(before.length, random);
      writeFileSync(join(own, "operations.json"), JSON.stringify(operations));
      const { begun, ended } = await killAt(own, 1 + random.below(OPERATIONS * 2));
      expect(begun).toBeGreaterThanOrEqual(0);
      expectSound(own);
      expectKept(await contentOf(join(own, IMAGE_NAME)), before, operations, begun, ended);
    }
  });
});

/** Writes blocks of its count, flushes every few, and tells. (libnbd's module is the system's Python's.) */
const GUEST = `
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
size = h.get_size()
count = 0
while True:
    count += 1
    h.pwrite(count.to_bytes(4, "big") * 250, count * 7919 * 512 % (size - 1000) // 1000 * 1000)
    if count % 5 == 0:
        h.flush()
        print("flushed", count, flush=True)
`;

describe("serve, killed while a guest writes", () => {
  it("leaves the image sound, with what was flushed, and serves it again", async () => {
    const own = join(folder, "served");
    mkdirSync(own);
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", IMAGE_NAME, "64M"], {
      cwd: own,
    });
    const imagePath = join(own, IMAGE_NAME);
    const random = new Random(5);
    for (let kill = 0; kill < SERVE_KILLS; kill++) {
      const server = await Server.start(own, [imagePath]);
      const guest = new Process("/usr/bin/python3", ["-c", GUEST, server.uri()]);
      await guest.line((line) => line === `flushed ${5 * (1 + random.below(60))}`);
      server.process.kill("SIGKILL");
      await server.process.end();
      await guest.end();
      expectSound(own);
      const flushed = Number(guest.lines.at(-1)?.split(" ")[1]);
      expectGuestBlocks(await contentOf(imagePath), flushed);
    }
  });

  /** The newest block at each place that a flush covered, or a newer one. */
  function expectGuestBlocks(content: Buffer, flushed: number): void {
    const newest = new Map<number, number>();
    for (let count = 1; count <= flushed; count++) {
      newest.set(Math.floor(((count * 7919 * 512) % (content.length - 1000)) / 1000) * 1000, count);
    }
    for (const [at, count] of newest) {
      const found = new Set(Array.from({ length: 250 }, (_, index) => content.readUInt32BE(at + index * 4)));
      for (const value of found) expect(value).toBeGreaterThanOrEqual(count);
    }
    expect(newest.size).toBeGreaterThan(0);
  }
});

describe("the oracle of this test", () => {
  it("notices a flushed byte that is lost", () => {
    const start = Buffer.alloc(100);
    const operations: Operation[] = [
      { kind: "write", at: 10, length: 5, fill: 7 },
      { kind: "flush", at: 0, length: 0, fill: 0 },
    ];
    const kept = Buffer.alloc(100).fill(7, 10, 15);
    expectKept(kept, start, operations, 1, 1);
    expect(() => expectKept(start, start, operations, 1, 1)).toThrow("byte 10");
  });
});
