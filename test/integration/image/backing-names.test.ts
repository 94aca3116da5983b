// Backing file names as QEMU writes them, in images that qemu-img made, against what qemu-img reads through them.
import { closeSync, openSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { Image } from "../../../src/block/device.js";
import { openImage } from "../../../src/image/open.js";
import { createQcow2 } from "../../../src/image/qcow2/create/create.js";
import { openSource } from "../../../src/image/reader.js";
import { cowcatcher, run } from "../../support/cli.js";
import { disk, fails, nbdkit, qemuNbd, SIZE, startServer, succeeds } from "../../support/nbd-servers.js";
import { mustRun, scratchFolder, stopAll } from "../../support/server.js";

const KiB = 1024;
const MiB = 1024 * KiB;
/** The overlay is longer than what is below it. */
const OVERLAY_SIZE = SIZE + 70 * KiB;

let folder: string;
const at = (name: string): string => join(folder, name);

beforeEach(async () => {
  folder = scratchFolder();
  writeFileSync(at("base.raw"), disk);
  await mustRun("qemu-img", "convert", "-f", "raw", "-O", "qcow2", at("base.raw"), at("base.qcow2"));
});

afterEach(stopAll);

/** qemu-img makes it, opening the backing file, and a guest has written to it. */
async function overlay(backingName: string, format: string, name = "top.qcow2"): Promise<string> {
  const path = at(name);
  const backing = ["-b", backingName, "-F", format];
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", ...backing, path, String(OVERLAY_SIZE));
  await mustRun(
    "qemu-io",
    ...["-f", "qcow2", "-c", "write -P 7 300k 200k", "-c", "write -z 4M 64k"],
    ...["-c", `write -P 8 ${SIZE + 1000} 3000`, path],
  );
  return path;
}

/** The backing file is not looked at: for names that lead nowhere, and those that qemu-img no longer lets one make. */
function bareOverlay(backingFile: string, backingFormat?: "raw" | "qcow2", name = "top.qcow2"): string {
  const fd = openSync(at(name), "wx");
  createQcow2(fd, name, { sizeBytes: MiB, clusterSizeBytes: 64 * KiB, backingFile, backingFormat });
  closeSync(fd);
  return at(name);
}

async function asQemuReads(path: string): Promise<Buffer> {
  const copy = at("theirs.raw");
  await mustRun("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, copy);
  return readFileSync(copy);
}

/** In unaligned steps. */
async function readAll(
  read: (buffer: Buffer, bufferOffset: number, lengthBytes: number, offsetBytes: number) => unknown,
  sizeBytes: number,
): Promise<Buffer> {
  const bytes = Buffer.alloc(sizeBytes, 0xee);
  for (let from = 0; from < sizeBytes; from += 199_999) {
    await read(bytes, from, Math.min(199_999, sizeBytes - from), from);
  }
  return bytes;
}

async function withImage<T>(path: string, readOnly: boolean, use: (image: Image) => Promise<T>): Promise<T> {
  const image = await openImage(path, { format: "qcow2", readOnly });
  try {
    return await use(image);
  } finally {
    await image.close();
  }
}

/** The main thread's device and a worker's reader. */
async function expectBothRead(path: string, expected: Buffer): Promise<void> {
  await withImage(path, true, async (image) => {
    const bytes = await readAll((...args) => image.read(...args), image.sizeBytes);
    expect(bytes.equals(expected), "the device").toBe(true);
    const frozen = image.freeze();
    const reader = openSource(frozen.description);
    try {
      const again = await readAll((...args) => reader.read(...args), image.sizeBytes);
      expect(again.equals(expected), "the worker's reader").toBe(true);
    } finally {
      reader.close();
      frozen.release();
    }
  });
}

type Layer = Record<string, unknown>;

/** `info` and `map` say what qemu-img says, layer by layer. */
async function expectSameAnswers(path: string): Promise<void> {
  const theirs = async (...args: string[]): Promise<unknown> =>
    JSON.parse(await mustRun("qemu-img", ...args));
  const ours = async (...args: string[]): Promise<unknown> => JSON.parse(await succeeds(args));
  // QEMU shows a protocol that was given as format, where it is raw here, and a URI without its escapes.
  const alike = (layers: unknown): Layer[] =>
    (layers as Layer[]).map((layer) => ({
      ...layer,
      format: layer["format"] === "qcow2" ? "qcow2" : "raw",
      filename: decodeURIComponent(String(layer["filename"])),
    }));
  expect(alike(await ours("info", "--json", "--backing-chain", path))).toEqual(
    alike(await theirs("info", "--output=json", "--backing-chain", path)),
  );
  expect(await ours("map", "--json", path)).toEqual(await theirs("map", "--output=json", path));
}

const json = (options: object): string => `json:${JSON.stringify(options)}`;

describe("names of files", () => {
  it("are read as by QEMU", async () => {
    const raw = { driver: "file", filename: at("base.raw") };
    const names: [name: string, format: string][] = [
      [`file:${at("base.raw")}`, "raw"],
      [at("base.raw"), "file"],
      [json({ driver: "raw", file: raw }), "raw"],
      [json({ file: { driver: "file", filename: at("base.qcow2") } }), "qcow2"],
      [json({ driver: "qcow2", "file.driver": "file", "file.filename": at("base.qcow2") }), "qcow2"],
      [json({ ...raw, "node-name": "n", "read-only": true }), "file"],
    ];
    for (const [index, [name, format]] of names.entries()) {
      const path = await overlay(name, format, `${index}.qcow2`);
      await expectBothRead(path, await asQemuReads(path));
      await expectSameAnswers(path);
    }
  });

  it("may be relative after a protocol only where QEMU's folder is the image's", async () => {
    const names = ["file:base.raw", json({ driver: "raw", file: { driver: "file", filename: "base.raw" } })];
    for (const [index, name] of names.entries()) {
      const path = bareOverlay(name, "raw", `${index}.qcow2`);
      const image = `${index}.qcow2`;
      expect((await run("qemu-img", ["map", image], { cwd: folder })).code).toBe(0);
      expect((await cowcatcher(["compare", image, "base.raw"], { cwd: folder })).code).toBe(1);
      expect((await cowcatcher(["map", image], { cwd: folder })).code).toBe(0);
      expect((await run("qemu-img", ["map", path], { cwd: "/" })).stderr).toContain("No such file");
      const elsewhere = await cowcatcher(["map", path], { cwd: "/" });
      expect(elsewhere).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/^cowcatcher: .*'base\.raw'.*folder.*\n$/) as string,
      });
    }
  });

  it("may not contradict the backing format, nor take a part of a file", async () => {
    const file = { driver: "file", filename: at("base.qcow2") };
    // QEMU reads the qcow2 file's own bytes here.
    const contrary = await overlay(json({ driver: "qcow2", file }), "raw", "contrary.qcow2");
    expect(await fails(["map", contrary])).toContain(
      "'raw', and the json: name of its backing file says 'qcow2'",
    );
    expect(await fails(["info", "--backing-chain", contrary])).toContain("says 'qcow2'");
    expect(JSON.parse(await succeeds(["info", "--json", contrary]))).toMatchObject({
      "backing-filename-format": "raw",
    });
    const part = await overlay(json({ driver: "raw", offset: 512, file }), "raw", "part.qcow2");
    expect(await fails(["backup", part, at("copy.raw")])).toContain("('offset')");
  });

  it("are found out where they come back, or lead nowhere", async () => {
    const to = (name: string): string =>
      json({ driver: "qcow2", file: { driver: "file", filename: at(name) } });
    bareOverlay(to("b.qcow2"), "qcow2", "a.qcow2");
    const loop = bareOverlay(to("a.qcow2"), "qcow2", "b.qcow2");
    expect(await fails(["map", loop])).toContain("comes back");
    expect(await fails(["info", "--backing-chain", loop])).toContain("comes back");
    const lost = bareOverlay(to("missing"), "qcow2");
    expect(await fails(["map", lost])).toContain(
      `${lost}: its backing file '${at("missing")}' does not exist`,
    );
  });

  it("go into new images, where they are local", async () => {
    const name = json({ driver: "qcow2", file: { driver: "file", filename: at("base.qcow2") } });
    await succeeds(["create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", at("new.qcow2")]);
    await mustRun("qemu-img", "compare", "-f", "qcow2", "-F", "raw", at("new.qcow2"), at("base.raw"));
    const create = (...args: string[]): Promise<string> =>
      fails(["create", "-q", "-f", "qcow2", ...args, at("other.qcow2")]);
    expect(await create("-b", name, "-F", "raw")).toContain("says 'qcow2'");
    expect(await create("-b", "nbd:unix:/s", "-F", "raw")).toContain("is an NBD export");
  });
});

describe("names of NBD exports", () => {
  it("are read as by QEMU", async () => {
    const { socket, uri } = await startServer(
      "qemu-nbd",
      (path) => ["-t", "-r", "--shared=8", "-f", "raw", "-k", path, "-x", "a b", at("base.raw")],
      { exportName: "a%20b" },
    );
    const server = { type: "unix", path: socket };
    const names: [name: string, format: string][] = [
      [uri, "raw"],
      [`nbd:unix:${socket}:exportname=a b`, "raw"],
      [json({ driver: "raw", file: { driver: "nbd", server, export: "a b" } }), "raw"],
      [
        json({
          "file.driver": "nbd",
          "file.server.type": "unix",
          "file.server.path": socket,
          "file.export": "a b",
        }),
        "raw",
      ],
      [json({ driver: "nbd", server, export: "a b" }), "nbd"],
    ];
    for (const [index, [name, format]] of names.entries()) {
      const path = await overlay(name, format, `${index}.qcow2`);
      await expectBothRead(path, await asQemuReads(path));
      await expectSameAnswers(path);
    }
  });

  it("are the end of a chain that workers copy, however many connections the server takes", async () => {
    const servers = [
      await qemuNbd(at("base.raw"), "-r"),
      await nbdkit("-r", "--filter=noparallel", "--filter=noextents", "file", at("base.raw")),
      await qemuNbd(at("base.raw"), "-r", "--shared=1"),
    ];
    for (const [index, { uri }] of servers.entries()) {
      const middle = await overlay(uri, "raw", `middle-${index}.qcow2`);
      const top = await overlay(middle, "qcow2", `top-${index}.qcow2`);
      const target = at(`copy-${index}.qcow2`);
      await succeeds(["backup", "-q", "--workers", "2", "-O", "qcow2", top, target]);
      const expected = await asQemuReads(top);
      writeFileSync(at("expected.raw"), expected);
      await mustRun("qemu-img", "compare", "-f", "qcow2", "-F", "raw", target, at("expected.raw"));
    }
  });

  it("show through where a guest writes parts of clusters", async () => {
    const { uri } = await qemuNbd(at("base.raw"), "-r");
    const path = await overlay(uri, "raw");
    const expected = await asQemuReads(path);
    const data = Buffer.alloc(5000, 0x5a);
    await withImage(path, false, async (image) => {
      const places = [100, 2 * MiB - 2500, SIZE - 2500, OVERLAY_SIZE - 5000];
      await Promise.all(places.map(async (place) => image.write(data, 0, data.length, place)));
      await image.writeZeroes(3 * MiB + 500, 70_000, { mayUnmap: true });
      for (const place of places) data.copy(expected, place);
    });
    expected.fill(0, 3 * MiB + 500, 3 * MiB + 70_500);
    expect((await asQemuReads(path)).equals(expected)).toBe(true);
    await mustRun("qemu-img", "check", "-q", path);
    expect(readFileSync(at("base.raw")).equals(disk)).toBe(true);
  });

  it("are raw only where that is said or seen, and never another format", async () => {
    const [plain, inner] = [await qemuNbd(at("base.raw"), "-r"), await qemuNbd(at("base.qcow2"), "-r")];
    await withImage(bareOverlay(plain.uri), true, async (image) => {
      const bytes = await readAll((...args) => image.read(...args), image.sizeBytes);
      expect(bytes.equals(disk.subarray(0, image.sizeBytes))).toBe(true);
    });
    expect(await fails(["map", bareOverlay(inner.uri, undefined, "probed.qcow2")])).toContain(
      "format 'qcow2'",
    );
    expect(await fails(["map", bareOverlay(inner.uri, "qcow2", "named.qcow2")])).toContain(
      "an NBD export cannot be read as qcow2",
    );
    await expectBothRead(bareOverlay(inner.uri, "raw", "raw.qcow2"), await asQemuReads(at("raw.qcow2")));
  });

  it("that lead nowhere are told with the image that has them", async () => {
    const path = bareOverlay(`nbd:unix:${at("socket")}:exportname=disk`, "raw");
    const before = await fails(["map", path]);
    expect(before).toContain(`${path}: its backing file 'nbd+unix:///disk?socket=${at("socket")}': `);
  });
});
