import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { Image } from "../../../src/block/device.js";
import { MAX_BACKING_DEPTH, openImage, resolveBackingPath } from "../../../src/image/open.js";
import { createQcow2 } from "../../../src/image/qcow2/create/create.js";
import { libc } from "../../../src/native/libc.js";

let folder: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-open-"));
});

afterEach(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

const at = (name: string): string => path.join(folder, name);

/** An empty qcow2 image of 1 MiB; the backing file need not exist. */
function overlay(name: string, backingFile?: string, backingFormat?: "raw" | "qcow2"): string {
  const fd = fs.openSync(at(name), "wx");
  createQcow2(fd, name, { sizeBytes: 2 ** 20, clusterSizeBytes: 65536, backingFile, backingFormat });
  fs.closeSync(fd);
  return at(name);
}

async function withImage<T>(image: Image, use: (image: Image) => T | Promise<T>): Promise<T> {
  try {
    return await use(image);
  } finally {
    await image.close();
  }
}

async function readByte(image: Image, offset: number): Promise<number | undefined> {
  const buffer = new Uint8Array(1);
  await image.read(buffer, 0, 1, offset);
  return buffer[0];
}

const openDescriptorCount = (): number => fs.readdirSync("/proc/self/fd").length;

describe("openImage", () => {
  it("probes qcow2 and raw, and says that it did", async () => {
    overlay("a.img");
    fs.writeFileSync(at("b.img"), "plain");
    const qcow2 = await openImage(at("a.img"), { readOnly: true });
    await withImage(qcow2, (image) => expect(image).toMatchObject({ format: "qcow2", probed: true }));
    const raw = await openImage(at("b.img"), { readOnly: true });
    await withImage(raw, (image) =>
      expect(image).toMatchObject({ format: "raw", probed: true, sizeBytes: 5 }),
    );
  });

  it("takes any bytes as raw where -f raw is given", async () => {
    overlay("a.img");
    const raw = await openImage(at("a.img"), { readOnly: true, format: "raw" });
    await withImage(raw, (image) => expect(image).toMatchObject({ format: "raw", probed: false }));
  });

  it("refuses a foreign format by name", async () => {
    fs.writeFileSync(at("a.vmdk"), Buffer.from("KDMV".padEnd(1024, "\0")));
    await expect(openImage(at("a.vmdk"), { readOnly: true })).rejects.toMatchObject({
      code: "UNSUPPORTED",
      problem: expect.stringContaining("'vmdk'") as string,
    });
  });

  it.each([
    ["a folder", () => fs.mkdirSync(at("x")), "x: is a directory, not an image"],
    ["a FIFO", () => execFileSync("mkfifo", [at("x")]), "x: is a FIFO, not an image"],
    ["nothing", () => undefined, "x: cannot open: no such file or directory"],
    ["a qcow2 image named raw's opposite", () => fs.writeFileSync(at("x"), "no"), "not a qcow2 image"],
  ])("refuses %s in one line, leaving nothing open", async (_name, prepare, message) => {
    prepare();
    const before = openDescriptorCount();
    await expect(openImage(at("x"), { readOnly: true, format: "qcow2" })).rejects.toThrow(message);
    expect(openDescriptorCount()).toBe(before);
  });

  it("opens a chain by relative names, from the overlay's folder", async () => {
    fs.mkdirSync(at("bases"));
    fs.writeFileSync(at("bases/base.raw"), Buffer.alloc(2 ** 20, 7));
    overlay("bases/middle.qcow2", "base.raw", "raw");
    overlay("top.qcow2", "bases/middle.qcow2");
    const before = openDescriptorCount();
    const image = await openImage(at("top.qcow2"), { readOnly: false });
    expect(image.backing).toMatchObject({ format: "qcow2", probed: true, readOnly: true });
    expect(image.backing?.backing).toMatchObject({
      format: "raw",
      probed: false,
      path: at("bases/base.raw"),
    });
    await withImage(image, async () => expect(await readByte(image, 1000)).toBe(7));
    expect(openDescriptorCount()).toBe(before);
  });

  it("leaves the chain closed where it is not asked for", async () => {
    overlay("top.qcow2", "missing.raw", "raw");
    const image = await openImage(at("top.qcow2"), { readOnly: true, backing: false });
    await withImage(image, () => expect(image.backing).toBeNull());
  });

  it("names both files where the backing file is missing", async () => {
    overlay("top.qcow2", "missing.raw", "raw");
    const before = openDescriptorCount();
    await expect(openImage(at("top.qcow2"), { readOnly: true })).rejects.toMatchObject({
      code: "NOT_FOUND",
      object: at("top.qcow2"),
      problem: `its backing file '${at("missing.raw")}' does not exist`,
    });
    expect(openDescriptorCount()).toBe(before);
  });

  it("finds a loop, even through a link", async () => {
    overlay("a.qcow2", "b.qcow2", "qcow2");
    overlay("c.qcow2", "a.qcow2", "qcow2");
    fs.symlinkSync(at("c.qcow2"), at("b.qcow2"));
    const before = openDescriptorCount();
    await expect(openImage(at("a.qcow2"), { readOnly: true })).rejects.toThrow("comes back to this file");
    expect(openDescriptorCount()).toBe(before);
  });

  it("bounds the chain's depth", async () => {
    overlay("0.qcow2");
    for (let depth = 1; depth <= MAX_BACKING_DEPTH + 1; depth++) {
      overlay(`${depth}.qcow2`, `${depth - 1}.qcow2`, "qcow2");
    }
    const deepest = await openImage(at(`${MAX_BACKING_DEPTH}.qcow2`), { readOnly: true });
    await deepest.close();
    await expect(openImage(at(`${MAX_BACKING_DEPTH + 1}.qcow2`), { readOnly: true })).rejects.toMatchObject({
      code: "LIMIT",
    });
  });

  it.each(["nbds://host/disk", 'json:{"driver":"rbd"}', "rbd:pool/image"])(
    "refuses the backing file %s by name",
    async (name) => {
      overlay("top.qcow2", name, "raw");
      await expect(openImage(at("top.qcow2"), { readOnly: true })).rejects.toMatchObject({
        code: "UNSUPPORTED",
      });
    },
  );

  it("resolves backing names as QEMU does", () => {
    expect(resolveBackingPath("/a/b.qcow2", "c.raw")).toBe("/a/c.raw");
    expect(resolveBackingPath("b.qcow2", "../c.raw")).toBe("../c.raw");
    expect(resolveBackingPath("/a/b.qcow2", "/x/c:d.raw")).toBe("/x/c:d.raw");
    expect(resolveBackingPath("/a/b.qcow2", "./c:d.raw")).toBe("/a/c:d.raw");
    expect(resolveBackingPath("/a/b.qcow2", "file:/x/c.raw")).toBe("/x/c.raw");
    expect(() => resolveBackingPath("/a/b.qcow2", "c:d.raw")).toThrow("'c:…'");
  });

  it("opens with O_DIRECT, and reads a chain through it", async () => {
    fs.writeFileSync(at("base.raw"), Buffer.alloc(2 ** 20 + 1, 9));
    overlay("top.qcow2", "base.raw", "raw");
    const image = await openImage(at("top.qcow2"), { readOnly: false, direct: true });
    await withImage(image, async () => {
      expect(await readByte(image, 777)).toBe(9);
      await image.write(Uint8Array.of(3), 0, 1, 777);
      expect(await readByte(image, 777)).toBe(3);
      expect(await readByte(image, 778)).toBe(9);
    });
  });

  it.runIf(libc !== null)("locks the image against writers, and its backing files too", async () => {
    fs.writeFileSync(at("base.raw"), Buffer.alloc(2 ** 20, 9));
    overlay("top.qcow2", "base.raw", "raw");
    const image = await openImage(at("top.qcow2"), { readOnly: false });
    await withImage(image, async () => {
      await expect(openImage(at("top.qcow2"), { readOnly: true })).rejects.toMatchObject({ code: "LOCKED" });
      await expect(openImage(at("base.raw"), { readOnly: false })).rejects.toMatchObject({ code: "LOCKED" });
      await (await openImage(at("base.raw"), { readOnly: true })).close();
      await (await openImage(at("top.qcow2"), { readOnly: true, lock: false })).close();
    });
    await (await openImage(at("base.raw"), { readOnly: false })).close();
  });
});
