// info, map, check and create against qemu-img, over a table of images: the JSON is the same wherever qemu-img has
// a field of that name, and so is the text.
import * as fs from "node:fs";
import builtinFs from "node:fs";
import { syncBuiltinESMExports } from "node:module";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { runProgram } from "../../../src/cli/program.js";
import { acquireImageLock } from "../../../src/block/file/locks.js";
import { COWCATCHER_BIN, cowcatcher, run, type RunResult } from "../../support/cli.js";

const startFolder = process.cwd();
let folder: string;

async function qemuImg(...args: string[]): Promise<RunResult> {
  return run("qemu-img", args, { cwd: folder });
}

async function qemuIo(image: string, ...commands: string[]): Promise<void> {
  const { code, stderr, stdout } = await run(
    "qemu-io",
    [...commands.flatMap((command) => ["-c", command]), image],
    { cwd: folder },
  );
  if (code !== 0) throw new Error(`qemu-io ${image}: ${stdout}${stderr}`);
}

async function make(...args: string[]): Promise<void> {
  const { code, stderr } = await qemuImg("create", "-q", ...args);
  if (code !== 0) throw new Error(`qemu-img create ${args.join(" ")}: ${stderr}`);
}

/** The built program, in a process of its own. */
function ours(...args: string[]): Promise<RunResult> {
  return cowcatcher(args, { cwd: folder });
}

/** The same program in this process, for what needs many runs. */
async function inProcess(...args: string[]): Promise<RunResult> {
  let stdout = "";
  let stderr = "";
  const code = await runProgram(args, {
    stdout: { write: (text) => (stdout += text) },
    stderr: { write: (text) => (stderr += text) },
    environment: {},
  });
  return { code, stdout, stderr };
}

/** [file, -f or "" for probing] */
const IMAGES: [string, string][] = [
  ["empty.raw", "raw"],
  ["sparse.raw", "raw"],
  ["unaligned.raw", "raw"],
  ["v3.qcow2", ""],
  ["v2.qcow2", ""],
  ["empty.qcow2", "qcow2"],
  ["cluster512.qcow2", ""],
  ["cluster4k.qcow2", ""],
  ["cluster2m.qcow2", ""],
  ["zeroes.qcow2", ""],
  ["overlay.qcow2", ""],
  ["sub/overlay.qcow2", ""],
  ["longer.qcow2", ""],
  ["onraw.qcow2", ""],
  ["three.qcow2", ""],
  ["compressed.qcow2", ""],
  ["zstd.qcow2", ""],
  ["snapshots.qcow2", ""],
  ["bitmaps.qcow2", ""],
  ["refcount1.qcow2", ""],
  ["refcount64.qcow2", ""],
  ["dirty.qcow2", ""],
];

async function makeImages(): Promise<void> {
  const file = (name: string): string => path.join(folder, name);
  fs.mkdirSync(file("sub"));
  await make("-f", "raw", "empty.raw", "1M");
  await make("-f", "raw", "sparse.raw", "8M");
  await qemuIo("sparse.raw", "write 1M 128k", "write -P 3 6M 64k");
  fs.writeFileSync(file("unaligned.raw"), Buffer.alloc(70_000, 7));
  const v3 = ["write -P 1 0 3M", "write -P 2 5M 64k", "write -z 8M 1M", "discard 1M 128k"];
  await make("-f", "qcow2", "v3.qcow2", "16M");
  await qemuIo("v3.qcow2", ...v3);
  await make("-f", "qcow2", "-o", "compat=0.10", "v2.qcow2", "16M");
  await qemuIo("v2.qcow2", ...v3);
  await make("-f", "qcow2", "empty.qcow2", "0");
  for (const [name, size] of [
    ["cluster512", "512"],
    ["cluster4k", "4k"],
    ["cluster2m", "2M"],
  ] as const) {
    await make("-f", "qcow2", "-o", `cluster_size=${size}`, `${name}.qcow2`, "5M");
    await qemuIo(`${name}.qcow2`, "write 1000k 30k", "write 3M 512", "write -z 4M 64k");
  }
  await make("-f", "qcow2", "zeroes.qcow2", "4M");
  // Allocated zero clusters keep their place, others have none.
  await qemuIo("zeroes.qcow2", "write 0 256k", "write -z 0 128k", "write -zu 128k 64k", "write -z 1M 256k");
  await make("-f", "qcow2", "-b", "v3.qcow2", "-F", "qcow2", "overlay.qcow2");
  await qemuIo("overlay.qcow2", "write -P 9 4M 64k", "write -z 0 64k");
  await make("-f", "qcow2", "-b", "../v3.qcow2", "-F", "qcow2", "sub/overlay.qcow2");
  await make("-f", "qcow2", "-b", "v3.qcow2", "-F", "qcow2", "longer.qcow2", "20M");
  await qemuIo("longer.qcow2", "write -P 9 15M 64k");
  await make("-f", "qcow2", "-b", "sparse.raw", "-F", "raw", "onraw.qcow2");
  await qemuIo("onraw.qcow2", "write -P 9 2M 64k");
  await make("-f", "qcow2", "-b", "overlay.qcow2", "-F", "qcow2", "three.qcow2");
  await qemuIo("three.qcow2", "write -P 9 12M 64k");
  await qemuImg("convert", "-c", "-O", "qcow2", "v3.qcow2", "compressed.qcow2");
  await qemuImg("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "v3.qcow2", "zstd.qcow2");
  await make("-f", "qcow2", "snapshots.qcow2", "8M");
  await qemuIo("snapshots.qcow2", "write 0 1M");
  await qemuImg("snapshot", "-c", "first", "snapshots.qcow2");
  await qemuIo("snapshots.qcow2", "write -P 8 512k 1M");
  await qemuImg("snapshot", "-c", "a-name-that-is-longer-than-its-column", "snapshots.qcow2");
  await make("-f", "qcow2", "bitmaps.qcow2", "8M");
  await qemuImg("bitmap", "--add", "bitmaps.qcow2", "b0");
  await qemuImg("bitmap", "--add", "--disable", "-g", "128k", "bitmaps.qcow2", "b1");
  await make("-f", "qcow2", "-o", "preallocation=metadata", "prealloc.qcow2", "4M");
  await make("-f", "qcow2", "-o", "refcount_bits=1", "refcount1.qcow2", "4M");
  await make("-f", "qcow2", "-o", "refcount_bits=64", "refcount64.qcow2", "4M");
  await qemuIo("refcount1.qcow2", "write 0 1M");
  await qemuIo("refcount64.qcow2", "write 0 1M");
  await make("-f", "qcow2", "-o", "lazy_refcounts=on", "dirty.qcow2", "4M");
  setDirty(file("dirty.qcow2"));
  await make("-f", "qcow2", "leaky.qcow2", "4M");
  fs.appendFileSync(file("leaky.qcow2"), Buffer.alloc(65_536));
  setRefcount(file("leaky.qcow2"), 4, 1);
  fs.copyFileSync(file("v3.qcow2"), file("corrupt.qcow2"));
  setRefcount(file("corrupt.qcow2"), 5, 0);
}

function patch(name: string, change: (bytes: Buffer) => void): void {
  const bytes = fs.readFileSync(name);
  change(bytes);
  fs.writeFileSync(name, bytes);
}

/** Incompatible feature bit 0: not closed cleanly. */
function setDirty(name: string): void {
  patch(name, (bytes) => bytes.writeUInt8(bytes.readUInt8(79) | 1, 79));
}

/** In the first refcount block, of 16-bit refcounts. */
function setRefcount(name: string, cluster: number, refcount: number): void {
  patch(name, (bytes) => {
    const table = Number(bytes.readBigUInt64BE(48));
    const block = Number(bytes.readBigUInt64BE(table));
    bytes.writeUInt16BE(refcount, block + 2 * cluster);
  });
}

beforeAll(async () => {
  if (!fs.existsSync(COWCATCHER_BIN)) throw new Error(`${COWCATCHER_BIN} is missing: build first`);
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-cli-"));
  process.chdir(folder);
  await makeImages();
}, 60_000);

afterAll(() => {
  process.chdir(startFolder);
  fs.rmSync(folder, { recursive: true, force: true });
});

describe.each(IMAGES)("%s", (image, format) => {
  const asFormat = format === "" ? [] : ["-f", format];

  it("info is qemu-img's", async () => {
    const theirs = await qemuImg("info", "--output=json", ...asFormat, image);
    const mine = await inProcess("info", "--json", ...asFormat, image);
    expect(JSON.parse(mine.stdout)).toEqual(JSON.parse(theirs.stdout));
    expect([mine.code, mine.stderr]).toEqual([0, ""]);
    const text = await inProcess("info", ...asFormat, image);
    expect(text.stdout).toBe((await qemuImg("info", ...asFormat, image)).stdout);
  });

  it.each([[[]], [["-s", "512", "-l", "5M"]]])("map %j is qemu-img's", async (part) => {
    const theirs = await qemuImg("map", "--output=json", ...part, ...asFormat, image);
    const mine = await inProcess("map", "--json", ...part, ...asFormat, image);
    expect(entriesOf(mine.stdout)).toEqual(entriesOf(theirs.stdout));
    expect([mine.code, mine.stderr]).toEqual([0, ""]);
    const theirText = await qemuImg("map", ...part, ...asFormat, image);
    const myText = await inProcess("map", ...part, ...asFormat, image);
    expect(myText.stdout).toBe(theirText.stdout);
    expect(myText.code).toBe(theirText.code);
  });
});

/** Of a disk without bytes, or past its end, qemu-img shows an entry of no bytes; cowcatcher shows none. */
function entriesOf(json: string): { length: number }[] {
  return (JSON.parse(json) as { length: number }[]).filter(({ length }) => length > 0);
}

const CHECKED = [
  ...IMAGES.map(([name]) => name).filter((name) => name.endsWith(".qcow2")),
  "leaky.qcow2",
  "corrupt.qcow2",
];

describe.each(CHECKED)("%s", (image) => {
  it("check is qemu-img's", async () => {
    const theirs = await qemuImg("check", "--output=json", image);
    const mine = await inProcess("check", "--json", image);
    expect(JSON.parse(mine.stdout)).toEqual(JSON.parse(theirs.stdout));
    expect([mine.code, mine.stderr]).toEqual([theirs.code, theirs.stderr]);
    const text = await inProcess("check", image);
    expect(text.stdout).toBe((await qemuImg("check", image)).stdout);
  });
});

describe("info", () => {
  it("describes a backing chain", async () => {
    const theirs = await qemuImg("info", "--output=json", "--backing-chain", "three.qcow2");
    const mine = await ours("info", "--json", "--backing-chain", "three.qcow2");
    expect(JSON.parse(mine.stdout)).toHaveLength(3);
    expect(JSON.parse(mine.stdout)).toEqual(JSON.parse(theirs.stdout));
    const text = await ours("info", "--backing-chain", "three.qcow2");
    expect(text.stdout).toBe((await qemuImg("info", "--backing-chain", "three.qcow2")).stdout);
  });

  it("describes an image that it cannot open", async () => {
    await make("-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on", "external.qcow2", "1M");
    const theirs = await qemuImg("info", "--output=json", "external.qcow2");
    const mine = await ours("info", "--json", "external.qcow2");
    expect(JSON.parse(mine.stdout)).toEqual(JSON.parse(theirs.stdout));
  });

  it("finds a chain that comes back to itself", async () => {
    await make("-f", "qcow2", "-u", "-b", "loop2.qcow2", "-F", "qcow2", "loop1.qcow2", "1M");
    await make("-f", "qcow2", "-u", "-b", "loop1.qcow2", "-F", "qcow2", "loop2.qcow2", "1M");
    expect(await ours("info", "--backing-chain", "loop1.qcow2")).toEqual({
      code: 1,
      stdout: "",
      stderr:
        "cowcatcher: loop1.qcow2: the backing chain comes back to this file (leave --backing-chain out)\n",
    });
  });

  it("names what is missing, and what is no image", async () => {
    expect(await ours("info", "nope.img")).toEqual({
      code: 1,
      stdout: "",
      stderr: "cowcatcher: nope.img: cannot open: no such file or directory\n",
    });
    const { code, stderr } = await ours("info", "-f", "qcow2", "sparse.raw");
    expect(code).toBe(1);
    expect(stderr).toMatch(/^cowcatcher: sparse\.raw: .*\n$/);
  });

  it("prints the error as a document with --json", async () => {
    const { stdout } = await ours("info", "--json", "nope.img");
    expect(JSON.parse(stdout)).toMatchObject({
      message_type: "error",
      error: { code: "NOT_FOUND", object: "nope.img", errno: "ENOENT" },
    });
  });
});

describe("check", () => {
  it("cannot check a raw image", async () => {
    const { code, stdout, stderr } = await ours("check", "sparse.raw");
    expect([code, stdout]).toEqual([63, ""]);
    expect(stderr).toBe(
      "cowcatcher: sparse.raw: this image format does not support checks (raw images have no metadata)\n",
    );
  });

  it("says nothing with --quiet but by its exit code", async () => {
    expect(await ours("check", "-q", "corrupt.qcow2")).toEqual({ code: 2, stdout: "", stderr: "" });
    expect(await ours("check", "-q", "leaky.qcow2")).toEqual({ code: 3, stdout: "", stderr: "" });
  });
});

describe("create", () => {
  it.each([
    ["-f raw c.raw 1M", "c.raw"],
    ["-f raw c.raw 1000", "c.raw"],
    ["-f qcow2 c.qcow2 1G", "c.qcow2"],
    ["-f qcow2 c.qcow2 1000", "c.qcow2"],
    ["-f qcow2 -o cluster_size=4K,lazy_refcounts=on,refcount_bits=1 c.qcow2 10M", "c.qcow2"],
    ["-f qcow2 -o compression_type=zstd -o cluster_size=2M c.qcow2 10M", "c.qcow2"],
    ["-f qcow2 -b v3.qcow2 -F qcow2 c.qcow2", "c.qcow2"],
    ["-f qcow2 -b v3.qcow2 -F qcow2 c.qcow2 1M", "c.qcow2"],
    ["-f qcow2 -o backing_file=sparse.raw,backing_fmt=raw,size=5M c.qcow2", "c.qcow2"],
    ["-f qcow2 -b ../v3.qcow2 -F qcow2 sub/c.qcow2", "sub/c.qcow2"],
    ["-f qcow2 -o compat=0.10 c.qcow2 10M", "c.qcow2"],
    ["-f qcow2 -o compat=v2,preallocation=metadata c.qcow2 10M", "c.qcow2"],
    ["-f qcow2 -o compat=v3,preallocation=metadata,cluster_size=512 c.qcow2 3000001", "c.qcow2"],
    ["-f qcow2 -o preallocation=falloc,cluster_size=512,refcount_bits=64 c.qcow2 9M", "c.qcow2"],
    ["-f qcow2 -o preallocation=full,cluster_size=4K c.qcow2 3M", "c.qcow2"],
    ["-f qcow2 -o preallocation=metadata,cluster_size=16K,extended_l2=on c.qcow2 20000001", "c.qcow2"],
    ["-f qcow2 -o preallocation=falloc,extended_l2=on -b v3.qcow2 -F qcow2 c.qcow2", "c.qcow2"],
    ["-f qcow2 -o preallocation=metadata,cluster_size=2M,refcount_bits=1 c.qcow2 5G", "c.qcow2"],
    ["-f qcow2 -o preallocation=metadata c.qcow2 0", "c.qcow2"],
    ["-f raw -o preallocation=off c.raw 1M", "c.raw"],
    ["-f raw -o preallocation=falloc c.raw 1M", "c.raw"],
    ["-f raw -o preallocation=full c.raw 1000", "c.raw"],
  ])("create %s makes what qemu-img makes", async (commandLine, name) => {
    const describe = async (): Promise<unknown> => {
      const info = JSON.parse((await qemuImg("info", "--output=json", name)).stdout) as Record<
        string,
        unknown
      >;
      // The file system may count a block of its own for a file with many extents.
      delete info["actual-size"];
      const map = (await qemuImg("map", "--output=json", "-f", String(info["format"]), name)).stdout;
      return { info, map, sizeBytes: fs.statSync(path.join(folder, name)).size };
    };
    const args = commandLine.split(" ");
    const mine = await inProcess("create", ...args);
    const made = await describe();
    if (name.endsWith(".qcow2")) expect((await qemuImg("check", name)).code).toBe(0);
    const theirs = await qemuImg("create", ...args);
    expect([mine.code, mine.stderr]).toEqual([0, ""]);
    expect(mine.stdout).toBe(theirs.stdout);
    expect(made).toEqual(await describe());
    fs.rmSync(path.join(folder, name));
  });

  it.each([
    ["x.qcow2", "SIZE: is missing (give a size, such as 20G)", 2],
    ["-o foo=1 x.qcow2 1M", "-o foo: is not an option of the format", 2],
    ["-o cluster_size x.qcow2 1M", "-o: 'cluster_size' has no value (give NAME=VALUE)", 2],
    ["-o refcount_bits=3 x.qcow2 1M", "-o refcount_bits: 3 is not a power of two", 2],
    [
      "-o cluster_size=1000 x.qcow2 1M",
      "-o cluster_size: 1000 is not a cluster size (give a power of two from 512 to 2M)",
      2,
    ],
    ["-o lazy_refcounts=yes x.qcow2 1M", "-o lazy_refcounts: 'yes' is not known (give on or off)", 2],
    ["-o compat=0.9 x.qcow2 1M", "-o compat: '0.9' is not known (give 0.10, v2, 1.1 or v3)", 2],
    [
      "-o compat=v2,refcount_bits=8 x.qcow2 1M",
      "x.qcow2: refcount_bits=8 needs version 3 of the format (give compat=1.1)",
      2,
    ],
    [
      "-o compat=0.10,extended_l2=on x.qcow2 1M",
      "x.qcow2: extended_l2=on needs version 3 of the format (give compat=1.1)",
      2,
    ],
    [
      "-o preallocation=some x.qcow2 1M",
      "-o preallocation: 'some' is not known (give off, metadata, falloc or full)",
      2,
    ],
    [
      "-o preallocation=full -b v3.qcow2 -F qcow2 x.qcow2",
      "x.qcow2: preallocation would hide the backing file, but for extended_l2=on",
      2,
    ],
    [
      "-f raw -o preallocation=metadata x.raw 1M",
      "-o preallocation: a raw image has no metadata (give off, falloc or full)",
      2,
    ],
    ["-o encrypt.format=luks x.qcow2 1M", "-o encrypt.format: is not supported in this version", 1],
    [
      "-f raw -o cluster_size=4K x.raw 1M",
      "-o cluster_size: a raw image does not have it (choose qcow2 with -f qcow2)",
      2,
    ],
    [
      "-f raw -b v3.qcow2 -F qcow2 x.raw",
      "--backing-file: a raw image has no backing file (choose qcow2 with -f qcow2)",
      2,
    ],
    ["-b v3.qcow2 x.qcow2", "--backing-format: is missing (name the backing file's format: raw or qcow2)", 2],
    ["-b nope -F raw x.qcow2", "nope: cannot open: no such file or directory", 1],
    ["nodir/x.raw 1M", "nodir/x.raw: cannot create: no such file or directory", 1],
    ["x.qcow2 100T", "x.qcow2: the disk size 109951162777600 exceeds 64.0 TiB", 1],
  ])("create %s is refused, and leaves nothing", async (commandLine, message, code) => {
    expect(await inProcess("create", ...commandLine.split(" "))).toEqual({
      code,
      stdout: "",
      stderr: `cowcatcher: ${message}\n`,
    });
    expect(fs.existsSync(path.join(folder, "x.qcow2"))).toBe(false);
    expect(fs.existsSync(path.join(folder, "x.raw"))).toBe(false);
  });

  it("leaves no data file where the image cannot be made", async () => {
    fs.mkdirSync(path.join(folder, "folder.qcow2"));
    expect(
      await ours("create", "-f", "qcow2", "-o", "data_file=lost.raw", "folder.qcow2", "1M"),
    ).toMatchObject({
      code: 1,
      stderr: "cowcatcher: folder.qcow2: cannot create: is a directory\n",
    });
    expect(fs.existsSync(path.join(folder, "lost.raw"))).toBe(false);
  });

  it("removes a new file and empties an old one where writing fails", async () => {
    fs.writeFileSync(path.join(folder, "old.qcow2"), "old");
    const { fsyncSync } = builtinFs;
    builtinFs.fsyncSync = () => {
      throw Object.assign(new Error("EIO: i/o error, fsync"), { code: "EIO", errno: -5 });
    };
    syncBuiltinESMExports();
    try {
      for (const name of ["old.qcow2", "young.qcow2"]) {
        const stderr = `cowcatcher: ${name}: cannot flush: input/output error\n`;
        expect(await inProcess("create", "-f", "qcow2", name, "1M")).toMatchObject({ code: 1, stderr });
      }
    } finally {
      builtinFs.fsyncSync = fsyncSync;
      syncBuiltinESMExports();
    }
    expect(fs.statSync(path.join(folder, "old.qcow2")).size).toBe(0);
    expect(fs.existsSync(path.join(folder, "young.qcow2"))).toBe(false);
  });

  it("counts a backing file of an odd length in sectors, as qemu-img says it", async () => {
    fs.writeFileSync(path.join(folder, "odd.raw"), Buffer.alloc(1000));
    const args = ["create", "-f", "qcow2", "-b", "odd.raw", "-F", "raw", "onodd.qcow2"];
    const mine = await ours(...args);
    expect(mine.stdout).toContain("size=1024 ");
    expect(mine.stdout).toBe((await qemuImg(...args)).stdout);
  });

  it("replaces a file, as qemu-img does, and prints a document with --json", async () => {
    fs.writeFileSync(path.join(folder, "old.raw"), Buffer.alloc(5_000_000, 1));
    const { code, stdout } = await ours("create", "--json", "old.raw", "1M");
    expect(code).toBe(0);
    expect(JSON.parse(stdout)).toEqual({ filename: "old.raw", format: "raw", "virtual-size": 1_048_576 });
    expect(fs.readFileSync(path.join(folder, "old.raw")).every((byte) => byte === 0)).toBe(true);
  });
});

describe("compare", () => {
  /** Byte offsets differ, as is meant: qemu-img rounds down to a sector. */
  function bySector(text: string): string {
    return text.replace(
      /offset (\d+)!/,
      (_, offset: string) => `offset ${Number(offset) - (Number(offset) % 512)}!`,
    );
  }

  it.each([
    ["v3.qcow2", "compressed.qcow2"],
    ["v3.qcow2", "v2.qcow2"],
    ["v3.qcow2", "overlay.qcow2"],
    ["-s", "v3.qcow2", "v3.qcow2"],
    ["-s", "v3.qcow2", "v2.qcow2"],
    ["overlay.qcow2", "sub/overlay.qcow2"],
    ["v3.qcow2", "longer.qcow2"],
    ["-s", "v3.qcow2", "longer.qcow2"],
    ["empty.raw", "empty.qcow2"],
    ["-f", "raw", "-F", "raw", "empty.raw", "v3.qcow2"],
    ["-q", "v3.qcow2", "overlay.qcow2"],
    ["v3.qcow2", "nope.qcow2"],
  ])("compare %s %s %s ends as qemu-img's does", async (...args) => {
    const theirs = await qemuImg("compare", ...args);
    const mine = await inProcess("compare", ...args);
    expect(bySector(mine.stdout)).toBe(theirs.stdout);
    expect(mine.code).toBe(theirs.code);
    expect(mine.stderr === "").toBe(mine.code < 2);
  });

  it("prints a document with --json", async () => {
    const { code, stdout } = await ours("compare", "--json", "v3.qcow2", "sub/overlay.qcow2");
    expect(code).toBe(0);
    expect(JSON.parse(stdout)).toEqual({ same: true, difference: null, offset: null, sizes_differ: false });
    const other = await ours("compare", "--json", "-s", "v3.qcow2", "longer.qcow2");
    expect(other.code).toBe(1);
    expect(JSON.parse(other.stdout)).toEqual({
      same: false,
      difference: "size",
      offset: null,
      sizes_differ: true,
    });
  });
});

describe("an image that another program writes", () => {
  it("is refused with its lock named, unless -U is given; create never touches it", async () => {
    const image = "locked.qcow2";
    await make("-f", "qcow2", "locked.qcow2", "1M");
    const held = fs.openSync(image, "r+");
    try {
      acquireImageLock(held, image, { write: true, resize: true });
      const before = fs.readFileSync(image);
      for (const args of [["info"], ["map"], ["check"], ["create", "-f", "raw"]]) {
        const size = args[0] === "create" ? ["1M"] : [];
        const { code, stderr } = await inProcess(...args, image, ...size);
        expect(code).toBe(1);
        expect(stderr).toMatch(/^cowcatcher: .*locked\.qcow2: cannot get the .*lock \(byte \d+\).*\n$/);
      }
      expect(fs.readFileSync(image).equals(before)).toBe(true);
      for (const command of ["info", "map", "check"]) {
        expect((await inProcess(command, "-U", image)).code).toBe(0);
      }
    } finally {
      fs.closeSync(held);
    }
  });
});

describe("the program", () => {
  it("starts in well under 300 ms of processor time", async () => {
    const command = ["-c", `TIMEFORMAT='%U %S'; time "$0" "$1" --help`, process.execPath, COWCATCHER_BIN];
    const seconds: number[] = [];
    // The least counts: what else the machine does only adds to it.
    for (let round = 0; round < 8; round++) {
      const { stdout, stderr } = await run("bash", command);
      expect(stdout).toContain("Usage: cowcatcher");
      const [user = NaN, system = NaN] = stderr.split(" ").map(Number);
      seconds.push(user + system);
    }
    expect(Math.min(...seconds)).toBeLessThan(0.3);
  });

  it("is not upset by a reader that has seen enough", async () => {
    const { code, stderr } = await run(
      "bash",
      ["-c", 'set -o pipefail; "$0" "$1" map --json v3.qcow2 | true', process.execPath, COWCATCHER_BIN],
      { cwd: folder },
    );
    expect([code, stderr]).toEqual([0, ""]);
  });

  it("logs to --log-file, the stack of an error at debug level", async () => {
    const { code, stderr } = await ours("info", "--log-level", "debug", "--log-file", "log", "nope.img");
    expect(code).toBe(1);
    expect(stderr).toBe("cowcatcher: nope.img: cannot open: no such file or directory\n");
    const [line = ""] = fs.readFileSync(path.join(folder, "log"), "utf8").split("\n");
    expect(JSON.parse(line)).toMatchObject({ name: "cowcatcher", level: 20, err: { code: "NOT_FOUND" } });
    expect(line).toContain("\\n    at ");
  });

  it("names a log that it cannot open", async () => {
    expect(await ours("info", "--log-file", "nodir/log", "v3.qcow2")).toEqual({
      code: 1,
      stdout: "",
      stderr: "cowcatcher: nodir/log: cannot open the log: no such file or directory\n",
    });
  });
});
