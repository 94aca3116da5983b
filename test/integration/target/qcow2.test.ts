// qcow2 targets with QEMU as the judge: `qemu-img check` finds nothing, `qemu-img compare` no difference.

import { execFileSync, spawn, spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import * as fs from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { Worker } from "node:worker_threads";
import ts from "typescript";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { sampled } from "../../support/campaign.js";
import { createTarget } from "../../../src/target/create.js";
import { CLUSTER_LIMIT, NEXT_FREE } from "../../../src/target/qcow2/layout.js";
import type { Qcow2TargetDescription, Target, TargetOptions } from "../../../src/target/target.js";
import type { TargetWriter } from "../../../src/cow/target-writer.js";
import { openTarget } from "../../../src/target/writer.js";
import { GiB, KiB, MiB, roundUp, TiB } from "../../../src/units.js";

let folder: string;
let path: string;
beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-qcow2-"));
  path = join(folder, "disk.qcow2");
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

function options(changes: Partial<TargetOptions> = {}): TargetOptions {
  const { format, force, direct } = { format: "qcow2" as const, force: false, direct: false };
  return { path, format, sizeBytes: 8 * MiB, clusterSizeBytes: 64 * KiB, force, direct, ...changes };
}

const qemuImg = (...args: string[]): string => execFileSync("qemu-img", args, { encoding: "utf8" });

interface ImageCheck {
  leaks?: number;
  corruptions?: number;
  "check-errors": number;
  "allocated-clusters"?: number;
  "image-end-offset": number;
}

function checkClean(image = path): ImageCheck {
  const check = JSON.parse(qemuImg("check", "--output=json", "-f", "qcow2", image)) as ImageCheck;
  expect([check["check-errors"], check.leaks ?? 0, check.corruptions ?? 0]).toEqual([0, 0, 0]);
  return check;
}

function expectSameAs(rawFile: string, image = path): void {
  expect(qemuImg("compare", "-f", "raw", "-F", "qcow2", rawFile, image)).toContain("identical");
}

const shared = (target: Target): Int32Array =>
  new Int32Array((target.description as Qcow2TargetDescription).shared);

interface Run {
  offsetBytes: number;
  lengthBytes: number;
}

/** Cuts the disk into chunks of at most 1 MiB of whole clusters, and leaves every third out; in random order. */
function randomRuns(sizeBytes: number, clusterBytes: number): Run[] {
  const runs: Run[] = [];
  for (let at = 0; at < sizeBytes;) {
    const clusterCount = 1 + Math.floor(Math.random() * Math.max(1, MiB / clusterBytes));
    const lengthBytes = Math.min(clusterCount * clusterBytes, sizeBytes - at);
    if (at === 0 || Math.random() < 0.67 || at + lengthBytes === sizeBytes) {
      runs.push({ offsetBytes: at, lengthBytes });
    }
    at += lengthBytes;
  }
  return runs.sort(() => Math.random() - 0.5);
}

function writeAll(writers: TargetWriter[], runs: Run[], content: Buffer): void {
  runs.forEach(({ offsetBytes, lengthBytes }, index) => {
    const writer = writers[index % writers.length];
    expect(writer?.write(content, offsetBytes, lengthBytes, offsetBytes)).toBeUndefined();
  });
  for (const writer of writers) {
    expect(writer.settle?.()).toBeUndefined();
    writer.close();
  }
}

/** What the disk holds: `content` in the runs, zeroes elsewhere; in whole sectors. */
function writeExpected(runs: Run[], content: Buffer): string {
  const file = join(folder, "expected.img");
  const fd = fs.openSync(file, "w");
  fs.ftruncateSync(fd, roundUp(content.length, 512));
  for (const { offsetBytes, lengthBytes } of runs) {
    fs.writeSync(fd, content, offsetBytes, lengthBytes, offsetBytes);
  }
  fs.closeSync(fd);
  return file;
}

describe("a qcow2 target", () => {
  const clusterSizes = [512, 4 * KiB, 64 * KiB, 2 * MiB];
  const diskSizes = [4097, 1 * MiB + 512, 9 * MiB + 65536, 40 * MiB + 1];
  const matrix = clusterSizes.flatMap((cluster) => diskSizes.map((size) => [cluster, size] as const));

  it.each(sampled(matrix, 2))(
    "with clusters of %d bytes holds a disk of %d",
    async (clusterSizeBytes, sizeBytes) => {
      const target = await createTarget(options({ sizeBytes, clusterSizeBytes }));
      const content = randomBytes(sizeBytes);
      const runs = randomRuns(sizeBytes, clusterSizeBytes);
      writeAll(
        [0, 1, 2].map(() => openTarget(target.description)),
        runs,
        content,
      );
      await target.finish();
      const check = checkClean();
      expect(fs.statSync(path).size).toBe(check["image-end-offset"]);
      expectSameAs(writeExpected(runs, content));
    },
  );

  it("without a byte written is what qemu-img creates, header and all", async () => {
    for (const [clusterSizeBytes, sizeBytes] of [
      [512, 1 * MiB],
      [64 * KiB, 0],
      [64 * KiB, 10 * GiB],
    ] as const) {
      const target = await createTarget(options({ sizeBytes, clusterSizeBytes, force: true }));
      await target.finish();
      checkClean();
      const peer = join(folder, "peer.qcow2");
      qemuImg(
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        `cluster_size=${clusterSizeBytes}`,
        peer,
        String(sizeBytes),
      );
      const [ours, theirs] = [path, peer].map((file) => fs.readFileSync(file).subarray(0, 512));
      // The tables' places, bytes 40 to 55, are each writer's own choice.
      for (const image of [ours, theirs]) image?.fill(0, 40, 56);
      expect(ours).toEqual(theirs);
    }
  });

  it("of 64 TiB is made in no time, and takes little more than its L1 table", async () => {
    const started = performance.now();
    const target = await createTarget(options({ sizeBytes: 64 * TiB }));
    void openTarget(target.description).writeZeroes(0, 64 * TiB);
    await target.finish();
    expect(performance.now() - started).toBeLessThan(20_000);
    checkClean();
    expect(fs.statSync(path).size).toBeLessThan(2 * MiB);
  });

  it("holds data at both ends of a sparse TiB", async () => {
    const sizeBytes = 1 * TiB + 512;
    const target = await createTarget(options({ sizeBytes }));
    const writer = openTarget(target.description);
    const content = randomBytes(128 * KiB + 512);
    void writer.write(content, 0, 64 * KiB, 0);
    void writer.write(content, 0, 128 * KiB, 512 * GiB - 64 * KiB);
    void writer.write(content, 64 * KiB, 64 * KiB + 512, 1 * TiB - 64 * KiB);
    void writer.settle?.();
    await target.finish();
    checkClean();
    const expected = join(folder, "expected.img");
    const fd = fs.openSync(expected, "w");
    fs.ftruncateSync(fd, sizeBytes);
    fs.writeSync(fd, content, 0, 64 * KiB, 0);
    fs.writeSync(fd, content, 0, 128 * KiB, 512 * GiB - 64 * KiB);
    fs.writeSync(fd, content, 64 * KiB, 64 * KiB + 512, 1 * TiB - 64 * KiB);
    fs.closeSync(fd);
    expectSameAs(expected);
  });

  it("is no larger than what qemu-img convert writes, but for the padding of a few clusters", async () => {
    const sizeBytes = 64 * MiB;
    for (const clusterSizeBytes of [4 * KiB, 64 * KiB]) {
      const target = await createTarget(options({ sizeBytes, clusterSizeBytes, force: true }));
      const content = randomBytes(sizeBytes);
      const runs = randomRuns(sizeBytes, clusterSizeBytes);
      writeAll([openTarget(target.description)], runs, content);
      await target.finish();
      const peer = join(folder, "peer.qcow2");
      const creation = ["-O", "qcow2", "-o", `cluster_size=${clusterSizeBytes}`];
      qemuImg("convert", "-f", "raw", ...creation, writeExpected(runs, content), peer);
      expect(fs.statSync(path).size).toBeLessThanOrEqual(fs.statSync(peer).size + 3 * clusterSizeBytes);
    }
  });

  it("takes O_DIRECT, with an odd end", async () => {
    const sizeBytes = 5 * MiB + 777;
    const target = await createTarget(options({ sizeBytes, direct: true }));
    const { dataFd, metadataFd } = target.description as Qcow2TargetDescription;
    expect(dataFd).not.toBe(metadataFd);
    const content = randomBytes(sizeBytes);
    const runs = randomRuns(sizeBytes, 64 * KiB);
    writeAll([openTarget(target.description), openTarget(target.description)], runs, content);
    await target.finish();
    checkClean();
    expectSameAs(writeExpected(runs, content));
  });

  it("refuses ranges that are not whole clusters", async () => {
    const target = await createTarget(options({ sizeBytes: 1 * MiB + 1 }));
    const writer = openTarget(target.description);
    const buffer = Buffer.alloc(128 * KiB);
    expect(() => void writer.write(buffer, 0, 64 * KiB, 512)).toThrow(/whole clusters/);
    expect(() => void writer.write(buffer, 0, 512, 0)).toThrow(/whole clusters/);
    expect(() => void writer.write(buffer, 0, 128 * KiB, 1 * MiB)).toThrow(/whole clusters/);
    await target.abort();
    expect(fs.readdirSync(folder)).toEqual([]);
  });
});

describe("a backing file", () => {
  it("shows through where nothing was written, and not where zeroes were", async () => {
    const sizeBytes = 70 * MiB + 512;
    for (const clusterSizeBytes of [4 * KiB, 64 * KiB]) {
      const base = join(folder, "base.img");
      const content = Buffer.alloc(sizeBytes, 0x55);
      fs.writeFileSync(base, content);
      const backing = { backingFile: "base.img", backingFormat: "raw" } as const;
      const target = await createTarget(options({ sizeBytes, clusterSizeBytes, force: true, ...backing }));
      const writer = openTarget(target.description);
      const data = randomBytes(1 * MiB);
      void writer.write(data, 0, 1 * MiB, 3 * MiB);
      void writer.writeZeroes(5 * MiB, 64 * KiB);
      // Over the ends of several L2 tables, and to the disk's own end.
      void writer.writeZeroes(21 * MiB, sizeBytes - 21 * MiB);
      void writer.settle?.();
      await target.finish();
      checkClean();
      data.copy(content, 3 * MiB);
      content.fill(0, 5 * MiB, 5 * MiB + 64 * KiB);
      content.fill(0, 21 * MiB);
      expectSameAs(writeExpected([{ offsetBytes: 0, lengthBytes: sizeBytes }], content));
      const info = JSON.parse(qemuImg("info", "--output=json", path)) as Record<string, unknown>;
      expect(info).toMatchObject({ "backing-filename": "base.img", "backing-filename-format": "raw" });
    }
  });
});

/** Lowers the size that this process may give a file, for the time of `action`. */
function withFileSizeLimit(bytes: number, action: () => void): void {
  const limit = (value: string): string =>
    execFileSync("prlimit", ["--pid", String(process.pid), `--fsize=${value}:`], { encoding: "utf8" });
  limit(String(bytes));
  try {
    action();
  } finally {
    limit("unlimited");
  }
}

describe("a write that fails", () => {
  const sizeBytes = 8 * MiB;
  const full = { code: "NO_SPACE", offsetBytes: 2 * MiB };

  it("may be tried again, and leaks nothing", async () => {
    const target = await createTarget(options({ sizeBytes }));
    const writer = openTarget(target.description);
    const content = randomBytes(sizeBytes);
    void writer.write(content, 0, 1 * MiB, 0);
    const used = Atomics.load(shared(target), NEXT_FREE);
    withFileSizeLimit(1.5 * MiB, () => {
      const write = (): unknown => writer.write(content, 2 * MiB, 1 * MiB, 2 * MiB);
      expect(write).toThrow(expect.objectContaining(full));
      expect(write).toThrow(expect.objectContaining(full));
    });
    void writer.write(content, 2 * MiB, 1 * MiB, 2 * MiB);
    expect(Atomics.load(shared(target), NEXT_FREE)).toBe(used + 16);
    void writer.settle?.();
    await target.finish();
    checkClean();
    const runs = [0, 2 * MiB].map((offsetBytes) => ({ offsetBytes, lengthBytes: 1 * MiB }));
    expectSameAs(writeExpected(runs, content));
  });

  it("may be passed over, and leaks nothing", async () => {
    const target = await createTarget(options({ sizeBytes }));
    const writers = [openTarget(target.description), openTarget(target.description)];
    const content = randomBytes(sizeBytes);
    void writers[0]?.write(content, 0, 1 * MiB, 0);
    withFileSizeLimit(1.5 * MiB, () => {
      for (const writer of writers) {
        const write = (): unknown => writer.write(content, 2 * MiB, 1 * MiB, 2 * MiB);
        expect(write).toThrow(expect.objectContaining(full));
      }
    });
    // One goes on, the other ends.
    void writers[0]?.write(content, 4 * MiB, 1 * MiB, 4 * MiB);
    void writers[0]?.settle?.();
    for (const writer of writers) writer.close();
    await target.finish();
    checkClean();
    const runs = [0, 4 * MiB].map((offsetBytes) => ({ offsetBytes, lengthBytes: 1 * MiB }));
    expectSameAs(writeExpected(runs, content));
  });

  it("at entries that were put off says where, may be tried again, and may be given up", async () => {
    const target = await createTarget(options({ sizeBytes }));
    const description = target.description as Qcow2TargetDescription;
    const { metadataFd } = description;
    const writer = openTarget(description);
    const content = randomBytes(sizeBytes);
    const breakEntries = (isBroken: boolean): void => {
      if (description.metadataFd !== metadataFd) fs.closeSync(description.metadataFd);
      description.metadataFd = isBroken ? fs.openSync(target.unfinishedPath ?? "", "r") : metadataFd;
    };
    const settle = (): unknown => writer.settle?.();
    for (const offset of [0, 1 * MiB, 2 * MiB]) {
      void writer.write(content, offset, 1 * MiB, offset);
      breakEntries(offset < 2 * MiB);
      if (offset < 2 * MiB) {
        for (let i = 0; i < 2; i++)
          expect(settle).toThrow(expect.objectContaining({ code: "IO", offsetBytes: offset }));
      }
      breakEntries(false);
      // The first is tried again; the second is given up.
      if (offset === 0) expect(settle()).toBeUndefined();
      if (offset === 1 * MiB) writer.giveUp?.();
    }
    expect(settle()).toBeUndefined();
    await target.finish();
    const runs = [0, 2 * MiB].map((offsetBytes) => ({ offsetBytes, lengthBytes: 1 * MiB }));
    const { stdout } = spawnSync("qemu-img", ["check", "--output=json", path], { encoding: "utf8" });
    const { leaks, corruptions } = JSON.parse(stdout) as ImageCheck;
    expect([leaks, corruptions ?? 0]).toEqual([16, 0]);
    expectSameAs(writeExpected(runs, content));
  });

  it("at entries that were put off loses nothing when somebody else goes on with the writer", async () => {
    const target = await createTarget(options({ sizeBytes }));
    const description = target.description as Qcow2TargetDescription;
    const { metadataFd } = description;
    const writer = openTarget(description);
    const content = randomBytes(sizeBytes);
    void writer.write(content, 0, 1 * MiB, 0);
    const readOnlyFd = fs.openSync(target.unfinishedPath ?? "", "r");
    description.metadataFd = readOnlyFd;
    expect(() => writer.settle?.()).toThrow(expect.objectContaining({ code: "IO", offsetBytes: 0 }));
    description.metadataFd = metadataFd;
    fs.closeSync(readOnlyFd);
    // Another drainer, whose write failed before, tries that again, while the first one backs off.
    void writer.write(content, 1 * MiB, 1 * MiB, 1 * MiB);
    void writer.settle?.();
    await target.finish();
    checkClean();
    expectSameAs(writeExpected([{ offsetBytes: 0, lengthBytes: 2 * MiB }], content));
  });

  it("for want of host clusters names the bound, and spoils no L2 table", async () => {
    const target = await createTarget(options({ sizeBytes }));
    const words = shared(target);
    const writer = openTarget(target.description);
    const content = randomBytes(sizeBytes);
    const limit = words[CLUSTER_LIMIT] ?? 0;
    // Room for the data, not for the L2 table after it.
    words[CLUSTER_LIMIT] = (words[NEXT_FREE] ?? 0) + 16;
    expect(() => void writer.write(content, 0, 1 * MiB, 0)).toThrow(
      expect.objectContaining({ code: "LIMIT" }),
    );
    words[CLUSTER_LIMIT] = limit;
    void writer.write(content, 0, 1 * MiB, 0);
    void writer.settle?.();
    await target.finish();
    checkClean();
    expectSameAs(writeExpected([{ offsetBytes: 0, lengthBytes: 1 * MiB }], content.subarray(0, sizeBytes)));
  });

  it("at the end leaves nothing after the abort", async () => {
    const target = await createTarget(options({ sizeBytes }));
    void openTarget(target.description).write(randomBytes(1 * MiB), 0, 1 * MiB, 0);
    execFileSync("prlimit", ["--pid", String(process.pid), "--fsize=65536:"]);
    const error = await target.finish().then(
      () => null,
      (reason: unknown) => reason,
    );
    execFileSync("prlimit", ["--pid", String(process.pid), "--fsize=unlimited:"]);
    expect(error).toMatchObject({ code: "NO_SPACE", object: path });
    await target.abort();
    expect(fs.readdirSync(folder)).toEqual([]);
  });
});

// Threads and processes of their own load the sources as JavaScript, translated here file by file.
let compiled: string;

/** Translates these modules and all that they import. */
function translateFrom(...modules: string[]): void {
  const compilerOptions = { module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2023 };
  const root = resolve(import.meta.dirname, "../../../src");
  const wanted = new Set(modules);
  for (const module of wanted) {
    const source = fs.readFileSync(join(root, module.replace(/\.js$/, ".ts")), "utf8");
    const { outputText } = ts.transpileModule(source, { compilerOptions });
    fs.mkdirSync(dirname(join(compiled, module)), { recursive: true });
    fs.writeFileSync(join(compiled, module), outputText);
    for (const [, path] of outputText.matchAll(/(?:from|import\()\s*"(\.[^"]+)"/g)) {
      wanted.add(join(dirname(module), path ?? ""));
    }
  }
}

beforeAll(() => {
  compiled = fs.mkdtempSync(join(tmpdir(), "cowcatcher-compiled-"));
  translateFrom("target/create.js", "target/writer.js");
  fs.writeFileSync(join(compiled, "package.json"), '{"type":"module"}');
  // The packages as this file finds them.
  const packages = dirname(dirname(createRequire(import.meta.url).resolve("typescript/package.json")));
  fs.symlinkSync(packages, join(compiled, "node_modules"));
});
afterAll(() => fs.rmSync(compiled, { recursive: true }));

const WORKER_SOURCE = `
  import { workerData } from "node:worker_threads";
  import { openTarget } from "./target/writer.js";
  const { description, content, next, runBytes } = workerData;
  const writer = openTarget(description);
  const bytes = new Uint8Array(content);
  const words = new Int32Array(next);
  // All begin at once, so that they meet at the first L2 table.
  Atomics.sub(words, 1, 1);
  Atomics.notify(words, 1);
  for (let left; (left = Atomics.load(words, 1)) > 0; ) Atomics.wait(words, 1, left, 10000);
  for (;;) {
    const offset = Atomics.add(words, 0, 1) * runBytes;
    if (offset >= bytes.length) break;
    const length = Math.min(runBytes, bytes.length - offset);
    // Every fifth run is left to be zero.
    if ((offset / runBytes) % 5 === 4) writer.writeZeroes(offset, length);
    else writer.write(bytes, offset, length, offset);
  }
  writer.settle();
  writer.close();
`;

function sharedContent(sizeBytes: number): { content: SharedArrayBuffer; bytes: Buffer } {
  const content = new SharedArrayBuffer(sizeBytes);
  const bytes = Buffer.from(content);
  bytes.set(randomBytes(sizeBytes));
  return { content, bytes };
}

describe("worker threads", () => {
  it.each(
    sampled(
      [
        [512, 1536, false],
        [4 * KiB, 4 * KiB, false],
        [64 * KiB, 64 * KiB, false],
        [4 * KiB, 4 * KiB, true],
      ] as const,
      3,
    ),
  )(
    "write one target at once: clusters of %d, runs of %d, backing %s",
    async (clusterBytes, runBytes, backed) => {
      const sizeBytes = 12 * MiB + 512;
      const workerCount = 4;
      const base = join(folder, "base.img");
      fs.writeFileSync(base, Buffer.alloc(sizeBytes, 0x77));
      const backing = backed ? ({ backingFile: base, backingFormat: "raw" } as const) : {};
      const target = await createTarget(options({ sizeBytes, clusterSizeBytes: clusterBytes, ...backing }));
      const { content, bytes } = sharedContent(sizeBytes);
      const next = new SharedArrayBuffer(8);
      new Int32Array(next)[1] = workerCount;
      const workerData = { description: target.description, content, next, runBytes };
      const script = join(compiled, "worker.js");
      fs.writeFileSync(script, WORKER_SOURCE);
      const workers = Array.from({ length: workerCount }, () => new Worker(script, { workerData }));
      for (const [code] of await Promise.all(workers.map((worker) => once(worker, "exit"))))
        expect(code).toBe(0);
      await target.finish();
      checkClean();
      for (let at = 4 * runBytes; at < sizeBytes; at += 5 * runBytes) bytes.fill(0, at, at + runBytes);
      expectSameAs(writeExpected([{ offsetBytes: 0, lengthBytes: sizeBytes }], bytes));
    },
  );
});

const PROCESS_SOURCE = `
  const { createTarget } = await import(process.argv[1] + "/target/create.js");
  const path = process.argv[2];
  await createTarget({ path, format: "qcow2", sizeBytes: 1048576, clusterSizeBytes: 65536, force: false, direct: false });
  process.stdout.write("ready");
  if (process.argv[3] === "wait") setInterval(() => {}, 1000);
`;

describe.each(["0", "1"])("a process (COWCATCHER_NO_NATIVE=%s)", (noNative) => {
  const args = (then: string): string[] => [
    "--input-type=module",
    "-e",
    PROCESS_SOURCE,
    compiled,
    path,
    then,
  ];
  const env = { ...process.env, COWCATCHER_NO_NATIVE: noNative };

  it("that exits leaves nothing", () => {
    expect(spawnSync(process.execPath, args("exit"), { env, encoding: "utf8" })).toMatchObject({
      stdout: "ready",
    });
    expect(fs.readdirSync(folder)).toEqual([]);
  });

  it("that is killed leaves a file, which the next one removes; that of a living one stays", async () => {
    const first = spawn(process.execPath, args("wait"), { env, stdio: ["ignore", "pipe", "inherit"] });
    await once(first.stdout, "data");
    const [living] = fs.readdirSync(folder);
    await expect(createTarget(options())).rejects.toMatchObject({ code: "LOCKED" });
    expect(fs.readdirSync(folder)).toEqual([living]);
    await (await createTarget({ ...options(), path: join(folder, "other.qcow2") })).abort();
    expect(fs.readdirSync(folder)).toEqual([living]);
    first.kill("SIGKILL");
    await once(first, "exit");
    expect(fs.readdirSync(folder)).toEqual([living]);
    await (await createTarget(options())).finish();
    expect(fs.readdirSync(folder)).toEqual(["disk.qcow2"]);
  });

  it("writes an image that is clean", () => {
    const source = `
      const { createTarget } = await import(process.argv[1] + "/target/create.js");
      const { openTarget } = await import(process.argv[1] + "/target/writer.js");
      const target = await createTarget({ path: process.argv[2], format: "qcow2", sizeBytes: 1048577,
        clusterSizeBytes: 65536, force: false, direct: false });
      const writer = openTarget(target.description);
      writer.write(new Uint8Array(131073).fill(7), 0, 131073, 1048576 - 131072);
      writer.settle();
      await target.finish();
    `;
    execFileSync(process.execPath, ["--input-type=module", "-e", source, compiled, path], { env });
    checkClean();
    const content = Buffer.alloc(1 * MiB + 1);
    content.fill(7, 1 * MiB - 128 * KiB);
    expectSameAs(writeExpected([{ offsetBytes: 0, lengthBytes: content.length }], content));
  });
});

// Needs root and a free loop device.
let loopDevice: string | null = null;
const loopFile = join(tmpdir(), `cowcatcher-loop-${process.pid}.img`);
fs.writeFileSync(loopFile, Buffer.alloc(24 * MiB, 0xaa));
const losetup = spawnSync("losetup", ["--find", "--show", loopFile], { encoding: "utf8" });
if (losetup.status === 0) loopDevice = losetup.stdout.trim();
afterAll(() => {
  if (loopDevice !== null) execFileSync("losetup", ["--detach", loopDevice]);
  fs.rmSync(loopFile);
});

describe.runIf(loopDevice !== null)("a block device full of old data", () => {
  const device = (): TargetOptions =>
    options({ path: loopDevice ?? "", force: true, sizeBytes: 16 * MiB + 513 });

  it.each([512, 64 * KiB])("holds a qcow2 image with clusters of %d", async (clusterSizeBytes) => {
    const target = await createTarget({ ...device(), clusterSizeBytes });
    const content = randomBytes(16 * MiB + 513);
    const runs = randomRuns(content.length, clusterSizeBytes);
    writeAll([openTarget(target.description), openTarget(target.description)], runs, content);
    await target.finish();
    checkClean(loopDevice ?? "");
    expectSameAs(writeExpected(runs, content), loopDevice ?? "");
  });

  it("holds a raw disk, with its zeroes", async () => {
    const target = await createTarget({ ...device(), format: "raw", sizeBytes: 16 * MiB });
    const content = randomBytes(16 * MiB).fill(0, 3 * MiB, 9 * MiB + 512);
    const writer = openTarget(target.description);
    void writer.write(content, 0, 3 * MiB, 0);
    void writer.writeZeroes(3 * MiB, 6 * MiB + 512);
    void writer.write(content, 9 * MiB + 512, 7 * MiB - 512, 9 * MiB + 512);
    await target.finish();
    expect(
      fs
        .readFileSync(loopDevice ?? "")
        .subarray(0, 16 * MiB)
        .equals(content),
    ).toBe(true);
  });

  it("needs --force, and room", async () => {
    await expect(createTarget({ ...device(), force: false })).rejects.toMatchObject({ code: "EXISTS" });
    const tooLarge = createTarget({ ...device(), format: "raw", sizeBytes: 24 * MiB + 1 });
    await expect(tooLarge).rejects.toMatchObject({ code: "NO_SPACE" });
  });

  it("that is in use is refused", async () => {
    const target = await createTarget(device());
    await expect(createTarget(device())).rejects.toMatchObject({ code: "LOCKED" });
    await target.abort();
  });

  it("is no image any more while a new one is unfinished", async () => {
    await (await createTarget(device())).finish();
    checkClean(loopDevice ?? "");
    await (await createTarget(device())).abort();
    expect(spawnSync("qemu-img", ["info", "-f", "qcow2", loopDevice ?? ""]).status).not.toBe(0);
  });

  it("is no image any more when a complete one is given up", async () => {
    const target = await createTarget(device());
    await target.complete();
    const ours = target.unfinishedPath?.replace("/proc/self/", `/proc/${process.pid}/`) ?? "";
    const info = ["info", "-U", "-f", "qcow2", ours];
    expect(spawnSync("qemu-img", info).status).toBe(0);
    await target.abort();
    expect(spawnSync("qemu-img", info).status).not.toBe(0);
  });

  it("is no image any more when one is given up while it is completed", async () => {
    const target = await createTarget(device());
    const completion = target.complete();
    const outcome = completion.catch((error: unknown) => error);
    await target.abort();
    expect(await outcome).toMatchObject({ code: "CANCELLED" });
    expect(spawnSync("qemu-img", ["info", "-U", "-f", "qcow2", loopDevice ?? ""]).status).not.toBe(0);
  });
});
