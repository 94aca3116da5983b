// Bytes of a source that are not there are an error, never zeroes: files that were copied in part, files that are cut
// while they are read, with and without --verify, offline and live. And what is legal stays so.
import { copyFileSync, existsSync, readFileSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { runProgram as RunProgram } from "../../../src/cli/program.js";
import { sampled } from "../../support/campaign.js";
import { noise } from "../../support/disks.js";
import { Random } from "../../support/random.js";
import { leftovers, mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const dist = new URL(process.env["COWCATCHER_DIST"] ?? "../../../dist/", import.meta.url);
let folder: string;
let runProgram: typeof RunProgram;
let content: Buffer;

beforeAll(async () => {
  ({ runProgram } = (await import(new URL("src/cli/program.js", dist).href)) as {
    runProgram: typeof RunProgram;
  });
  folder = scratchFolder("/tmp");
  content = noise(8 * MiB);
  // All of it data, so that nothing can be missed.
  for (let at = 0; at < content.length; at += 512) content[at] = 1;
  writeFileSync(file("disk.raw"), content);
  await mustRun("qemu-img", "convert", "-f", "raw", "-O", "qcow2", file("disk.raw"), file("plain.qcow2"));
  await mustRun("qemu-img", "convert", "-c", "-O", "qcow2", file("disk.raw"), file("zlib.qcow2"));
  const zstd = ["-c", "-o", "compression_type=zstd"];
  await mustRun("qemu-img", "convert", ...zstd, "-O", "qcow2", file("disk.raw"), file("zstd.qcow2"));
});
afterAll(stopAll);

function file(name: string): string {
  return join(folder, name);
}

/** The built program in this process. */
async function ours(...args: string[]): Promise<{ code: number | null; stderr: string }> {
  let stderr = "";
  const code = await runProgram(args, {
    stdout: { write: () => undefined },
    stderr: { write: (text) => (stderr += text) },
    environment: {},
  });
  return { code, stderr };
}

/** A copy of `name` that ends after `bytes`. */
function cutCopy(name: string, bytes: number): string {
  const path = file(`cut-${name}`);
  copyFileSync(file(name), path);
  truncateSync(path, bytes);
  return path;
}

async function expectRefused(source: string, ...options: string[]): Promise<string> {
  const { code, stderr } = await ours("restore", "-q", ...options, source, file("out.raw"));
  expect(code).toBe(1);
  expect(existsSync(file("out.raw"))).toBe(false);
  expect(leftovers(folder)).toEqual([]);
  return stderr;
}

async function expectRestored(source: string, expected: Buffer, ...options: string[]): Promise<void> {
  const { code, stderr } = await ours("restore", "-q", "--force", ...options, source, file("out.raw"));
  expect(`${code} ${stderr}`).toBe("0 ");
  expect(Buffer.compare(readFileSync(file("out.raw")), expected)).toBe(0);
  await mustRun("rm", file("out.raw"));
}

describe("a file that ends before what its tables refer to", () => {
  it.each(sampled(["zlib", "zstd", "plain"], 2))("is refused, wherever it was cut: %s", async (kind) => {
    const { size } = statSync(file(`${kind}.qcow2`));
    const random = new Random(7);
    const cuts = [64 * KiB, 64 * KiB + 100, 200 * KiB, size - 64 * KiB];
    while (cuts.length < 10) cuts.push(64 * KiB + random.below(size - 128 * KiB));
    for (const bytes of cuts) {
      const stderr = await expectRefused(cutCopy(`${kind}.qcow2`, bytes), "--verify");
      expect(stderr).toMatch(/cut short|shorter|cannot be decompressed/);
    }
  });

  it.each([[], ["--verify"], ["--direct"]])("is refused with %j", async (...options) => {
    const path = cutCopy("plain.qcow2", 5 * MiB);
    expect(await expectRefused(path, ...options)).toMatch(/behind the end of the file/);
  });

  it("is an error that can be passed over, and is counted then", async () => {
    const path = cutCopy("plain.qcow2", 5 * MiB);
    const { code } = await ours("restore", "-q", "--on-source-error", "ignore", path, file("out.raw"));
    expect(code).toBe(3);
    await mustRun("rm", file("out.raw"));
  });

  it("is refused as a backing file, too", async () => {
    cutCopy("plain.qcow2", 5 * MiB);
    const overlay = file("overlay.qcow2");
    const args = ["-f", "qcow2", "-F", "qcow2", "-b", "cut-plain.qcow2", overlay];
    await mustRun("qemu-img", "create", "-q", ...args);
    expect(await expectRefused(overlay, "--verify")).toMatch(/behind the end of the file/);
  });

  it("is refused as a data file, too", async () => {
    const image = file("with-data.qcow2");
    const options = `data_file=${file("data.raw")},data_file_raw=on`;
    await mustRun("qemu-img", "convert", "-O", "qcow2", "-o", options, file("disk.raw"), image);
    truncateSync(file("data.raw"), 5 * MiB);
    expect(await expectRefused(image, "--verify")).toMatch(/behind the end of the file/);
  });

  it("is not taken for unallocated where an L2 table or a snapshot's tables are missing", async () => {
    const image = file("snapshot.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", image, "8M");
    await mustRun("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", image);
    await mustRun("qemu-img", "snapshot", "-c", "one", image);
    await mustRun("qemu-io", "-f", "qcow2", "-c", "write -P 8 0 64k", image);
    const { size } = statSync(image);
    for (let bytes = size - 64 * KiB; bytes > 0; bytes -= 64 * KiB) {
      const path = cutCopy("snapshot.qcow2", bytes);
      const then = await ours("restore", "-q", "--snapshot", "one", path, file("out.raw"));
      if (then.code === 0) expect(readFileSync(file("out.raw"))[0]).toBe(7);
      const now = await ours("restore", "-q", "--force", path, file("out.raw"));
      if (now.code === 0) expect(readFileSync(file("out.raw"))[0]).toBe(8);
      await mustRun("rm", "-f", file("out.raw"));
    }
  });

  it("is no clean bitmap where the bitmap's clusters are missing", async () => {
    const image = file("bitmap.qcow2");
    await mustRun("qemu-img", "convert", "-O", "qcow2", file("disk.raw"), image);
    await mustRun("qemu-img", "bitmap", "--add", "-g", "64K", image, "b0");
    await mustRun("qemu-io", "-f", "qcow2", "-c", "write -P 8 0 4M", image);
    const incremental = (source: string) =>
      ours("backup", "-q", "--bitmap", "b0", "-b", file("disk.raw"), "-B", "raw", source, file("out.qcow2"));
    expect(await incremental(image)).toMatchObject({ code: 0, stderr: "" });
    await mustRun("rm", file("out.qcow2"));
    // What was written last is the bitmap: its data, its table, the directory.
    for (const clusters of [1, 2, 3]) {
      const path = cutCopy("bitmap.qcow2", statSync(image).size - clusters * 64 * KiB);
      const { code, stderr } = await incremental(path);
      expect(code).toBe(1);
      expect(stderr).toContain("the bitmap directory lies behind the end of the file");
      expect(existsSync(file("out.qcow2"))).toBe(false);
    }
  });
});

describe("what is legal", () => {
  it("a last cluster that is stored in part", async () => {
    const image = file("part.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", image, "1M");
    await mustRun("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 4k", image);
    const { size } = statSync(image);
    truncateSync(image, size - 60 * KiB);
    await expectRestored(
      image,
      Buffer.concat([Buffer.alloc(4 * KiB, 9), Buffer.alloc(MiB - 4 * KiB)]),
      "--verify",
    );
  });

  it("a raw file of odd length, and a backing file that is shorter than its overlay", async () => {
    const odd = content.subarray(0, 3 * MiB + 100);
    writeFileSync(file("odd.raw"), odd);
    await expectRestored(file("odd.raw"), odd, "-f", "raw", "--verify");
    await expectRestored(file("odd.raw"), odd, "-f", "raw", "--direct");
    const overlay = file("short.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "odd.raw", overlay, "6M");
    await expectRestored(overlay, Buffer.concat([odd, Buffer.alloc(6 * MiB - odd.length)]), "--verify");
  });

  it.each(sampled(["metadata", "falloc", "full"], 3))("preallocation=%s", async (preallocation) => {
    const image = file(`${preallocation}.qcow2`);
    await mustRun(
      "qemu-img",
      "create",
      "-q",
      "-f",
      "qcow2",
      "-o",
      `preallocation=${preallocation}`,
      image,
      "4M",
    );
    await expectRestored(image, Buffer.alloc(4 * MiB), "--verify");
    await mustRun("qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 64k", image);
    const expected = Buffer.alloc(4 * MiB);
    expected.fill(3, MiB, MiB + 64 * KiB);
    await expectRestored(image, expected, "--verify");
  });

  it.each(["on", "off"])("a data file of odd length, data_file_raw=%s", async (isRaw) => {
    const image = file(`data-${isRaw}.qcow2`);
    const data = file(`data-${isRaw}.raw`);
    const options = `data_file=${data},data_file_raw=${isRaw}`;
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "3146240");
    await mustRun("qemu-io", "-f", "qcow2", "-c", "write -P 4 3M 512", image);
    const expected = Buffer.alloc(3_146_240);
    expected.fill(4, 3 * MiB, 3 * MiB + 512);
    await expectRestored(image, expected, "--verify");
  });
});

interface CutSource {
  source: string;
  /** What is cut, if not the source. */
  cut?: string;
  options?: string[];
}

/** Sources of 8 MiB of data, each made anew, as the fault cuts them. */
const SOURCES: Record<string, () => CutSource | Promise<CutSource>> = {
  raw: () => {
    copyFileSync(file("disk.raw"), file("s.raw"));
    return { source: file("s.raw"), options: ["-f", "raw"] };
  },
  "raw with a hole at its end": () => {
    copyFileSync(file("disk.raw"), file("s.raw"));
    truncateSync(file("s.raw"), 64 * MiB);
    return { source: file("s.raw"), options: ["-f", "raw"] };
  },
  "raw, direct": () => {
    copyFileSync(file("disk.raw"), file("s.raw"));
    return { source: file("s.raw"), options: ["-f", "raw", "--direct"] };
  },
  qcow2: () => {
    copyFileSync(file("plain.qcow2"), file("s.qcow2"));
    return { source: file("s.qcow2") };
  },
  "qcow2, direct": () => {
    copyFileSync(file("plain.qcow2"), file("s.qcow2"));
    return { source: file("s.qcow2"), options: ["--direct"] };
  },
  compressed: () => {
    copyFileSync(file("zlib.qcow2"), file("s.qcow2"));
    return { source: file("s.qcow2") };
  },
  "backing file": async () => {
    copyFileSync(file("disk.raw"), file("base.raw"));
    const args = ["-f", "qcow2", "-F", "raw", "-b", "base.raw", file("s.qcow2")];
    await mustRun("qemu-img", "create", "-q", ...args);
    return { source: file("s.qcow2"), cut: file("base.raw") };
  },
  "data file": async () => {
    const options = `data_file=${file("d.raw")},data_file_raw=on`;
    await mustRun("rm", "-f", file("d.raw"), file("s.qcow2"));
    await mustRun("qemu-img", "convert", "-O", "qcow2", "-o", options, file("disk.raw"), file("s.qcow2"));
    return { source: file("s.qcow2"), cut: file("d.raw") };
  },
};

describe("a file that is cut while it is read", () => {
  const cases = Object.keys(SOURCES).flatMap((name) =>
    sampled([3, 0, 12], 3).map((after) => [name, after] as const),
  );

  it.each(cases)("fails the copy: %s, after %i reads", async (name, after) => {
    const make = SOURCES[name];
    if (make === undefined) throw new Error(name);
    for (const verify of [[], ["--verify"]]) {
      const { source, cut = source, options = [] } = await make();
      const fault = `source-read:cut=1M,file=${cut},count=1,worker=0,after=${after}`;
      process.env["COWCATCHER_FAULTS"] = fault;
      try {
        const args = ["backup", "-q", "-w", "1", "-O", "raw", ...options, ...verify, source, file("out.raw")];
        const { code, stderr } = await ours(...args);
        expect(code).toBe(1);
        expect(stderr).toMatch(/shorter than|behind the end of the file/);
      } finally {
        delete process.env["COWCATCHER_FAULTS"];
      }
      expect(existsSync(file("out.raw"))).toBe(false);
      expect(leftovers(folder)).toEqual([]);
    }
  });

  it.each(sampled(["plain.qcow2", "disk.raw"], 2))(
    "fails the live backup, and no zeroes take its place when the guest writes further out: %s",
    async (name) => {
      const disk = file(`served-${name}`);
      copyFileSync(file(name), disk);
      const home = scratchFolder("/tmp");
      const server = await Server.start(home, [disk], {
        args: ["-f", name.endsWith("raw") ? "raw" : "qcow2"],
      });
      const target = join(home, "out.raw");
      const backup = server.backup(target, "--rate-limit", "1M", "-O", "raw");
      const job = await backup.jobId();
      await server.jobs("pause", job);
      truncateSync(disk, 1 * MiB);
      // What the guest writes past the new end would make the file long again.
      const io = ["-f", "raw", "-c", "write -P 5 7M 64k", server.uri()];
      await mustRun("qemu-io", ...io).catch(() => undefined);
      await server.jobs("resume", job);
      const { code, stdout, stderr } = await backup.end();
      expect(code).toBe(1);
      expect(stdout + stderr).toMatch(/shorter than|behind the end of the file/);
      expect(existsSync(target)).toBe(false);
      await server.stop();
    },
  );

  it("fails a guest's read and flush, rather than answer with zeroes", async () => {
    const disk = file("served.raw");
    copyFileSync(file("disk.raw"), disk);
    const home = scratchFolder("/tmp");
    const server = await Server.start(home, [disk], { args: ["-f", "raw"] });
    truncateSync(disk, 1 * MiB);
    const reads = mustRun("qemu-io", "-f", "raw", "-c", "read 4M 64k", server.uri());
    await expect(reads).rejects.toThrow(/Input\/output error/);
    const flushes = mustRun("qemu-io", "-f", "raw", "-c", "write 0 4k", "-c", "flush", server.uri());
    await expect(flushes).rejects.toThrow(/Input\/output error/);
    await server.stop();
  });
});
