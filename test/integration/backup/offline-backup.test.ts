// A backup of an image that no one writes, and restore, with qemu-img as judge.
import {
  existsSync,
  linkSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { cowcatcher, COWCATCHER_BIN, type RunResult } from "../../support/cli.js";
import { expectClean, expectSame, formatOf, makeDisk, noise } from "../../support/disks.js";
import { leftovers, mustRun, Process, scratchFolder, stopAll } from "../../support/server.js";

const MiB = 1024 * 1024;
let folder: string;

beforeAll(() => {
  folder = scratchFolder();
});
afterAll(stopAll);

function at(name: string): string {
  return join(folder, name);
}

function backup(...args: string[]): Promise<RunResult> {
  return cowcatcher(["backup", ...args], { cwd: folder });
}

/** The backup succeeds and equals its source. */
async function expectBackup(source: string, target: string, ...args: string[]): Promise<void> {
  const { code, stderr } = await backup(...args, source, target);
  expect(stderr).toBe("");
  expect(code).toBe(0);
  await expectSame(at(source), at(target));
  await expectClean(at(target));
  expect(leftovers(folder)).toEqual([]);
}

async function qemuIo(image: string, ...commands: string[]): Promise<void> {
  await mustRun("qemu-io", "-f", formatOf(image), ...commands.flatMap((c) => ["-c", c]), at(image));
}

function allocatedBytes(name: string): number {
  return statSync(at(name)).blocks * 512;
}

describe("the four combinations", () => {
  const SIZES = [4 * MiB, 4097, MiB + 512];

  it.each([
    ["raw", "raw"],
    ["raw", "qcow2"],
    ["qcow2", "raw"],
    ["qcow2", "qcow2"],
  ])("%s to %s, odd sizes too", async (from, to) => {
    for (const size of SIZES) {
      const source = `four-${size}.${from}`;
      await makeDisk(at(source), noise(size));
      await expectBackup(source, `four-${size}-from-${from}.${to}`);
    }
  });

  it("takes the target's format from -O, its extension, or the source", async () => {
    await makeDisk(at("format.qcow2"), noise(MiB));
    for (const [args, target, format] of [
      [[], "format-1.backup", "qcow2"],
      [["-O", "raw"], "format-2.qcow2", "raw"],
      [[], "format-3.raw", "raw"],
    ] as const) {
      expect((await backup(...args, "format.qcow2", target)).code).toBe(0);
      const info = await mustRun("qemu-img", "info", "--output=json", at(target));
      expect((JSON.parse(info) as { format: string }).format).toBe(format);
    }
  });
});

describe("qcow2 sources", () => {
  it("are read through their chain of backing files, shorter and longer ones", async () => {
    await mustRun("qemu-img", "create", "-q", "-f", "raw", at("base.raw"), "3145728");
    await qemuIo("base.raw", "write -P 1 0 3M");
    truncateSync(at("base.raw"), 3 * MiB - 1536);
    const overlay = (name: string, backing: string, size: string) =>
      mustRun(
        "qemu-img",
        ...["create", "-q", "-f", "qcow2", "-b", at(backing), "-F", formatOf(backing), at(name), size],
      );
    await overlay("longer.qcow2", "base.raw", "6M");
    await qemuIo("longer.qcow2", "write -P 2 1000k 130k", "write -z 2M 100k", "write -P 3 5M 4k");
    await overlay("shorter.qcow2", "longer.qcow2", "5M");
    await qemuIo("shorter.qcow2", "write -P 4 64k 64k", "discard 128k 128k");
    await overlay("top.qcow2", "shorter.qcow2", "8M");
    await qemuIo("top.qcow2", "write -P 5 7M 70000", "write -P 6 513 1");
    for (const source of ["longer", "shorter", "top"]) {
      await expectBackup(`${source}.qcow2`, `${source}-flat.qcow2`);
      await expectBackup(`${source}.qcow2`, `${source}-flat.raw`);
    }
    const info = await mustRun("qemu-img", "info", "--output=json", at("top-flat.qcow2"));
    expect(info).not.toContain("backing-filename");
  });

  it.each(["zlib", "zstd"])("are read where they are compressed (%s)", async (type) => {
    const source = `compressed-${type}.qcow2`;
    const content = noise(2 * MiB);
    for (let i = 0; i < content.length; i += 3) content[i] = 7;
    writeFileSync(at("compressible"), content);
    await mustRun(
      "qemu-img",
      ...["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", `compression_type=${type}`],
      ...[at("compressible"), at(source)],
    );
    await qemuIo(source, "write -P 9 100k 3k");
    await expectBackup(source, `decompressed-${type}.raw`);
    await expectBackup(source, `decompressed-${type}.qcow2`);
  });

  it.each(["512", "4096", "2M"])("may have clusters of %s, and so may targets", async (clusterSize) => {
    const source = `clusters-${clusterSize}.qcow2`;
    const options = ["-f", "qcow2", "-o", `cluster_size=${clusterSize}`];
    await mustRun("qemu-img", "create", "-q", ...options, at(source), "9M");
    await qemuIo(
      source,
      "write -P 1 1M 1000",
      "write -P 2 3M 2M",
      "write -z 4M 64k",
      "write -P 3 9436672 512",
    );
    await expectBackup(source, `from-clusters-${clusterSize}.qcow2`, "--cluster-size", clusterSize);
    await expectBackup(source, `from-clusters-${clusterSize}.raw`);
  });
});

describe("holes", () => {
  it("cost no room in a raw target, in the source or in zeroes that were written", async () => {
    writeFileSync(at("sparse.raw"), noise(MiB));
    truncateSync(at("sparse.raw"), 1024 * MiB);
    await qemuIo("sparse.raw", "write -P 0 512M 4M", "write -P 7 900M 8k");
    await expectBackup("sparse.raw", "sparse-copy.raw");
    expect(allocatedBytes("sparse-copy.raw")).toBeLessThan(1.2 * MiB);
    await expectBackup("sparse.raw", "sparse-copy.qcow2");
    expect(allocatedBytes("sparse-copy.qcow2")).toBeLessThan(1.8 * MiB);
    await expectBackup("sparse-copy.qcow2", "sparse-again.raw");
    expect(allocatedBytes("sparse-again.raw")).toBeLessThan(1.2 * MiB);
  });

  it("cost no time: 16 TiB", async () => {
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", at("huge.qcow2"), "16T");
    await qemuIo("huge.qcow2", "write -P 1 9T 64k");
    const startMs = performance.now();
    const { code, stderr } = await backup("huge.qcow2", "huge-copy.qcow2");
    expect([code, stderr]).toEqual([0, ""]);
    expect(performance.now() - startMs).toBeLessThan(60_000);
    await expectClean(at("huge-copy.qcow2"));
    await qemuIo("huge-copy.qcow2", "read -P 1 9T 64k", "read -P 0 10T 64k");
    expect(allocatedBytes("huge-copy.qcow2")).toBeLessThan(8 * MiB);
  });
});

describe("the threads of a copy", () => {
  const threadsOf = (pid: number): number => {
    try {
      return readdirSync(`/proc/${pid}/task`).length;
    } catch {
      return 0;
    }
  };
  /** The most threads of a copy of noise that its rate limit makes last for more than two seconds, and of one that is short. */
  const mostThreads = async (...args: string[]): Promise<number> => {
    const words = [COWCATCHER_BIN, "backup", "-q", "-w", "1", ...args, "--force"];
    const copy = new Process(process.execPath, [...words, at("threads.raw"), at("threads.qcow2")]);
    let most = 0;
    while (!copy.over) {
      most = Math.max(most, threadsOf(copy.pid));
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    expect(await copy.end()).toEqual({ code: 0, stdout: "", stderr: "" });
    await expectSame(at("threads.raw"), at("threads.qcow2"));
    await expectClean(at("threads.qcow2"));
    return most;
  };

  it("a worker takes over from the main thread where it is not soon done", async () => {
    writeFileSync(at("threads.raw"), noise(3 * MiB));
    const alone = await mostThreads();
    // A backup with compression begins in a worker.
    expect(await mostThreads("-c")).toBeGreaterThan(alone);
    expect(await mostThreads("--rate-limit", "1M")).toBeGreaterThan(alone);
  });
});

describe("targets", () => {
  beforeAll(async () => {
    await makeDisk(at("source.raw"), noise(MiB));
  });

  /** It fails with this one line, and neither source nor target is touched. */
  async function expectRefused(line: RegExp, expectedCode: number, ...args: string[]): Promise<void> {
    const before = readFileSync(at("source.raw"));
    const { code, stderr, stdout } = await backup(...args);
    expect(stderr).toMatch(line);
    expect([code, stdout, stderr.split("\n").length]).toEqual([expectedCode, "", 2]);
    expect(readFileSync(at("source.raw")).equals(before)).toBe(true);
    expect(leftovers(folder)).toEqual([]);
  }

  it("that exist are kept, unless forced", async () => {
    writeFileSync(at("exists.qcow2"), "an older backup");
    await expectRefused(
      /^cowcatcher: exists\.qcow2: .*exist.*\(.*--force.*\)\n$/,
      1,
      "source.raw",
      "exists.qcow2",
    );
    expect(readFileSync(at("exists.qcow2"), "utf8")).toBe("an older backup");
    await expectBackup("source.raw", "exists.qcow2", "--force");
  });

  it("are never the source, whatever it is called", async () => {
    linkSync(at("source.raw"), at("hard-link.raw"));
    symlinkSync(at("source.raw"), at("symbolic-link.raw"));
    const line =
      /^cowcatcher: \S+: is source and target at once(: it is 'source\.raw' by another name)? \(.*\)\n$/;
    await expectRefused(line, 2, "--force", "source.raw", "source.raw");
    await expectRefused(line, 2, "--force", "source.raw", "./source.raw");
    await expectRefused(line, 2, "--force", "source.raw", "hard-link.raw");
    await expectRefused(line, 2, "--force", "source.raw", "symbolic-link.raw");
  });

  it("are never a file that the source builds on", async () => {
    await mustRun(
      "qemu-img",
      ...["create", "-q", "-f", "qcow2", "-b", at("source.raw"), "-F", "raw", at("child.qcow2")],
    );
    const line =
      /^cowcatcher: source\.raw: is in the backing chain of the source: it is '\S+' by another name \(.*\)\n$/;
    await expectRefused(line, 2, "--force", "child.qcow2", "source.raw");
  });

  it("may be null:", async () => {
    const { code, stdout, stderr } = await backup("source.raw", "null:");
    expect([code, stderr]).toEqual([0, ""]);
    expect(stdout).toMatch(/^source\.raw -> null:: /);
    expect(existsSync(at("null:"))).toBe(false);
  });

  it("need their folder", async () => {
    await expectRefused(
      /^cowcatcher: nowhere\/target\.raw: the folder \S+ does not exist \(create it first\)\n$/,
      1,
      "source.raw",
      "nowhere/target.raw",
    );
  });

  it("need a source", async () => {
    await expectRefused(/^cowcatcher: nothing\.raw: .*no such file.*\n$/, 1, "nothing.raw", "target.raw");
  });

  it("are restored to an image again", async () => {
    await expectBackup("source.raw", "kept.qcow2");
    const { code, stderr } = await cowcatcher(["restore", "kept.qcow2", "restored.raw"], { cwd: folder });
    expect([code, stderr]).toEqual([0, ""]);
    expect(readFileSync(at("restored.raw")).equals(readFileSync(at("source.raw")))).toBe(true);
  });
});

it("without native calls copies the same, holes or not", async () => {
  await makeDisk(at("native.raw"), noise(2 * MiB));
  for (const target of ["native-copy.raw", "native-copy.qcow2"]) {
    const env = { COWCATCHER_NO_NATIVE: "1" };
    const { code, stderr } = await cowcatcher(["backup", "native.raw", target], { cwd: folder, env });
    expect([code, stderr]).toEqual([0, ""]);
    await expectSame(at("native.raw"), at(target));
  }
});
