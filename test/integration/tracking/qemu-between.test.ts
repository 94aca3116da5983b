// Others write a tracked qcow2 image between two runs of the server: QEMU's writes are in the result, everybody else's
// cost the generation (src/image/qcow2/left-bitmap.ts).
import { spawn } from "node:child_process";
import { once } from "node:events";
import {
  closeSync,
  copyFileSync,
  cpSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { runInfo } from "../../../src/cli/actions/info.js";
import type { CommandContext } from "../../../src/cli/output/context.js";
import { expectSchema } from "../../support/json-schema.js";
import { mustRun, scratchFolder, stopAll, until } from "../../support/server.js";
import { GRANULE_BYTES, TrackedImage } from "../../support/tracked-image.js";

const MiB = 2 ** 20;
const SIZE = 8 * MiB;
const LAST = SIZE / GRANULE_BYTES - 1;
const folder = scratchFolder();
let count = 0;

afterAll(stopAll);

const qemuIo = (image: string, ...commands: string[]): Promise<string> =>
  mustRun("qemu-io", "-f", "qcow2", ...commands.flatMap((command) => ["-c", command]), image);

interface Shape {
  create?: string[];
  backing?: boolean;
}

/** An image with data, one checkpoint, and a write after it to granule 5; closed. */
async function trackedImage({ create = [], backing = false }: Shape = {}): Promise<string> {
  const image = join(folder, `disk-${++count}.qcow2`);
  const base = join(folder, `base-${count}.qcow2`);
  if (backing) {
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", base, String(SIZE));
    await qemuIo(base, `write -P 9 0 ${SIZE}`);
  }
  const below = backing ? ["-b", base, "-F", "qcow2"] : [];
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", ...create, ...below, image, String(SIZE));
  const tracked = await TrackedImage.open(image);
  await tracked.write(0, new Uint8Array(2 * MiB).fill(1));
  await tracked.checkpoint("daily");
  await tracked.write(5 * GRANULE_BYTES + 100, new Uint8Array(10).fill(2));
  await tracked.close();
  return image;
}

/** What the next server says; the image is closed again, and sound. */
async function changesAfter(image: string): Promise<number[] | undefined> {
  const tracked = await TrackedImage.open(image);
  const changes = await tracked.changes("daily");
  await tracked.close();
  await mustRun("qemu-img", "check", "-q", image);
  return changes;
}

async function bitmapOf(image: string): Promise<string> {
  const info = JSON.parse(await mustRun("qemu-img", "info", "-U", "--output=json", image)) as {
    "format-specific": { data: { bitmaps?: { name: string; flags: string[] }[] } };
  };
  const [bitmap] = info["format-specific"].data.bitmaps ?? [];
  expect(bitmap?.flags).toEqual(["auto"]);
  return bitmap?.name ?? "";
}

/** Where the image's file has the guest's byte. */
async function hostOffset(image: string, offsetBytes: number): Promise<number> {
  const map = JSON.parse(await mustRun("qemu-img", "map", "-U", "--output=json", image)) as {
    start: number;
    length: number;
    offset?: number;
  }[];
  const extent = map.find(({ start, length }) => start <= offsetBytes && offsetBytes < start + length);
  return (extent?.offset ?? NaN) + offsetBytes - (extent?.start ?? NaN);
}

function poke(image: string, offsetBytes: number, bytes: Uint8Array): void {
  const fd = openSync(image, "r+");
  writeSync(fd, bytes, 0, bytes.length, offsetBytes);
  closeSync(fd);
}

async function info(image: string): Promise<{ json: unknown; text: string }> {
  const show = async (json: boolean): Promise<string> => {
    let shown = "";
    const sink = { write: (more: string) => (shown += more) };
    const output = { json, quiet: false, progress: undefined, stdout: sink, stderr: sink };
    await runInfo(image, { forceShare: true }, { output } as unknown as CommandContext);
    return shown;
  };
  return { json: JSON.parse(await show(true)), text: await show(false) };
}

describe("info", () => {
  it("shows the tracking of an image: closed, served, and not closed", async () => {
    const image = await trackedImage();
    const closed = await info(image);
    expectSchema("info", closed.json);
    expect(closed.json).toMatchObject({
      tracking: { state: "clean", mode: "host", granularity: GRANULE_BYTES, epochs: 1 },
    });
    expect(closed.text).toMatch(/Changed-block tracking:\n {4}folder: .*\n {4}state: clean\n/);
    expect(closed.text).toMatch(/ {4}checkpoint: daily \(/);
    const tracked = await TrackedImage.open(image);
    expect(await info(image)).toMatchObject({ json: { tracking: { state: "in-use" } } });
    const left = `${image}.left`;
    cpSync(`${image}.cowcatcher`, `${left}.cowcatcher`, { recursive: true });
    copyFileSync(image, left);
    expect(await info(left)).toMatchObject({ json: { tracking: { state: "unclean" } } });
    await tracked.close();
    rmSync(`${left}.cowcatcher/head`);
    expect(await info(left)).toMatchObject({ json: { tracking: { state: "damaged", checkpoints: [] } } });
  });
});

describe("writes between two runs", () => {
  it.each<[string, Shape]>([
    ["clusters of 512 bytes and a table as coarse as they ask for", { create: ["-o", "cluster_size=512"] }],
    ["extended L2 entries, zstd", { create: ["-o", "extended_l2=on,compression_type=zstd"] }],
    ["a backing file, whose name makes room in the header", { backing: true }],
  ])("of QEMU are in the result: %s", async (_, shape) => {
    const image = await trackedImage(shape);
    // Nobody wrote: exactly what the last run knew.
    await mustRun("qemu-img", "info", image);
    expect(await changesAfter(image)).toEqual([5]);
    const before = await bitmapOf(image);
    await qemuIo(image, `write -P 3 ${17 * GRANULE_BYTES} 1k`, `write -z ${3 * MiB} 64k`);
    await qemuIo(image, `discard ${30 * GRANULE_BYTES} 64k`);
    expect(await changesAfter(image)).toEqual([5, 17, 30, 48, LAST]);
    // They are known from now on, and the bitmap is another one.
    expect(await bitmapOf(image)).not.toBe(before);
    expect(await changesAfter(image)).toEqual([5, 17, 30, 48, LAST]);
    if (shape.backing === true) {
      const info = await mustRun("qemu-img", "info", "--output=json", image);
      expect(JSON.parse(info)).toMatchObject({ "backing-filename-format": "qcow2" });
      expect(await mustRun("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 9 4M 64k", image)).toMatch(
        /65536\/65536/,
      );
    }
  });

  it("of QEMU that made the disk larger count with all of its new end", async () => {
    const image = await trackedImage();
    await mustRun("qemu-img", "resize", "-q", image, String(SIZE + 2 * GRANULE_BYTES));
    expect(await changesAfter(image)).toEqual([5, LAST, LAST + 1, LAST + 2]);
  });

  it("an internal snapshot that QEMU makes changes nothing", async () => {
    const image = await trackedImage();
    await mustRun("qemu-img", "snapshot", "-c", "one", image);
    expect(await changesAfter(image)).toEqual([5, LAST]);
  });

  it("an image of version 2 has no bitmap, and QEMU's write costs the generation", async () => {
    const image = await trackedImage({ create: ["-o", "compat=0.10"] });
    expect(await changesAfter(image)).toEqual([5]);
    await qemuIo(image, "write -P 3 1M 1k");
    expect(await changesAfter(image)).toBeUndefined();
  });

  it.each<[string, (image: string) => Promise<void>]>([
    [
      "a program that knows nothing of bitmaps and does not say that it wrote",
      async (image) => poke(image, await hostOffset(image, 1 * MiB), new Uint8Array([7])),
    ],
    [
      "a program that clears the autoclear bits",
      // Bytes 88 to 95 of the header.
      (image) => Promise.resolve(poke(image, 88, new Uint8Array(8))),
    ],
    [
      "a QEMU that died",
      async (image) => {
        const child = spawn("qemu-io", ["-f", "qcow2", image], { stdio: ["pipe", "pipe", "inherit"] });
        let output = "";
        child.stdout.setEncoding("utf8").on("data", (text: string) => (output += text));
        child.stdin.write("write -P 3 1M 64k\nflush\n");
        await until("the write is done", () => output.includes("65536/65536"));
        child.kill("SIGKILL");
        await once(child, "close");
      },
    ],
    [
      "somebody who cut the disk and made it larger again",
      async (image) => {
        await mustRun("qemu-img", "resize", "-q", "--shrink", image, String(SIZE / 2));
        await mustRun("qemu-img", "resize", "-q", image, String(SIZE));
      },
    ],
    [
      "somebody who cleared the bitmap",
      async (image) => {
        await qemuIo(image, "write -P 3 1M 64k");
        await mustRun("qemu-img", "bitmap", "--clear", image, await bitmapOf(image));
      },
    ],
    [
      "somebody who switched the bitmap off",
      async (image) => {
        await mustRun("qemu-img", "bitmap", "--disable", image, await bitmapOf(image));
        await qemuIo(image, "write -P 3 1M 64k");
      },
    ],
    [
      "somebody who removed the bitmap",
      async (image) => {
        await mustRun("qemu-img", "bitmap", "--remove", image, await bitmapOf(image));
        await qemuIo(image, "write -P 3 1M 64k");
      },
    ],
    [
      "an older copy that QEMU wrote, put in the image's place",
      async (image) => {
        copyFileSync(image, `${image}.old`);
        await changesAfter(image);
        await qemuIo(`${image}.old`, "write -P 3 1M 64k");
        renameSync(`${image}.old`, image);
      },
    ],
    [
      "an older copy whose bytes were put into the image's own file, and QEMU's write to it",
      async (image) => {
        const old = readFileSync(image);
        const tracked = await TrackedImage.open(image);
        await tracked.checkpoint("daily");
        await tracked.close();
        poke(image, 0, old);
        await qemuIo(image, "write -P 3 1M 64k");
      },
    ],
  ])("all of it counts as changed after %s", async (_, act) => {
    const image = await trackedImage();
    await act(image);
    const tracked = await TrackedImage.open(image);
    expect(tracked.tracker.state.checkpoints).toEqual([]);
    expect(tracked.tracker.state.loss?.reason).toMatch(/while no server kept track of it/);
    await tracked.close();
  });

  it("a checkpoint that is lost, made again and lost again is told of once", async () => {
    const image = await trackedImage();
    for (const byte of [7, 8]) {
      poke(image, await hostOffset(image, 1 * MiB), new Uint8Array([byte]));
      const tracked = await TrackedImage.open(image);
      expect(tracked.tracker.state.loss?.checkpoints).toEqual(["daily"]);
      await tracked.checkpoint("daily");
      await tracked.close();
    }
  });

  it("all of it counts as changed where a backing file was written", async () => {
    const image = await trackedImage({ backing: true });
    await qemuIo(image.replace("disk-", "base-"), "write -P 1 7M 64k");
    await qemuIo(image, "write -P 3 1M 64k");
    expect(await changesAfter(image)).toBeUndefined();
  });
});
