// Compressed qcow2 targets below the file: codecs, packing, failures. QEMU's view is test/integration/target/compress.test.ts.

import { execFileSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { COMPRESSION_LEVELS, parseCompression } from "../../../src/image/qcow2/format/compression.js";
import { createTarget } from "../../../src/target/create.js";
import { HostClusters } from "../../../src/target/qcow2/hosts.js";
import {
  CLUSTER_LIMIT,
  createRefcounts,
  createShared,
  NEXT_FREE,
  planGeometry,
} from "../../../src/target/qcow2/layout.js";
import type { Qcow2TargetDescription, Target } from "../../../src/target/target.js";
import { openTarget } from "../../../src/target/writer.js";
import { GiB, KiB, MiB, TiB } from "../../../src/units.js";

const CLUSTER = 64 * KiB;

/** Text-like, noise, and nearly constant clusters. */
function content(kind: "text" | "noise" | "constant", bytes: number): Buffer {
  if (kind === "noise") return randomBytes(bytes);
  if (kind === "constant") return Buffer.alloc(bytes, 0x5a);
  const words = Array.from({ length: 200 }, () => randomBytes(4).toString("hex"));
  let text = "";
  while (text.length < bytes) text += `${words[Math.floor(Math.random() * words.length)]} `;
  return Buffer.from(text.slice(0, bytes));
}

describe.each(["0", "1"])("the codecs (COWCATCHER_NO_NATIVE=%s)", (noNative) => {
  beforeEach(() => {
    vi.stubEnv("COWCATCHER_NO_NATIVE", noNative);
    vi.resetModules();
  });
  afterEach(() => vi.unstubAllEnvs());

  const nodeHasZstd = "zstdCompressSync" in process.getBuiltinModule("zlib");

  it.each(["zlib:1", "zlib", "zlib:9", "zstd:1", "zstd", "zstd:19"])(
    "%s goes there and back",
    async (name) => {
      const { Compressor } = await import("../../../src/image/qcow2/format/compress.js");
      const { Decompressor } = await import("../../../src/image/qcow2/format/decompress.js");
      const compression = parseCompression(name, "c");
      if (compression.type === "zstd" && noNative === "1" && !nodeHasZstd) {
        const refusal = /zstd.*Node 22.15 or later, or install libzstd/;
        expect(() => new Compressor(compression, "x.qcow2")).toThrow(refusal);
        expect(() => new Decompressor("zstd", "x.qcow2")).toThrow(refusal);
        return;
      }
      const compressor = new Compressor(compression, "t");
      const decompressor = new Decompressor(compression.type, "t");
      const packed = new Uint8Array(2 * CLUSTER);
      const output = new Uint8Array(CLUSTER);
      for (const kind of ["text", "constant", "text"] as const) {
        const shared = new Uint8Array(new SharedArrayBuffer(3 * CLUSTER));
        shared.set(content(kind, CLUSTER), 1000);
        const bytes = compressor.run(shared, 1000, CLUSTER, packed, 77, CLUSTER - 1);
        expect(bytes).toBeGreaterThan(0);
        expect(bytes).toBeLessThan(CLUSTER * 0.7);
        packed.fill(0xee, 77 + bytes, 77 + bytes + 512);
        decompressor.run(packed.subarray(77, 77 + bytes + 400), output, 0);
        expect(Buffer.compare(output, shared.subarray(1000, 1000 + CLUSTER))).toBe(0);
        // Cut short, too long, damaged.
        expect(() => decompressor.run(packed.subarray(77, 77 + bytes - 20), output, 5)).toThrow(
          expect.objectContaining({ code: "FORMAT", offsetBytes: 5 }),
        );
        expect(() => decompressor.run(packed.subarray(77), output.subarray(0, CLUSTER - 512), 0)).toThrow(
          /cannot be decompressed/,
        );
        expect(() => decompressor.run(randomBytes(5000).fill(0xff, 0, 6), output, 0)).toThrow(
          /cannot be decompressed/,
        );
      }
      expect(compressor.run(content("noise", CLUSTER), 0, CLUSTER, packed, 0, CLUSTER - 1)).toBe(0);
      compressor.close();
      decompressor.close();
    },
  );
});

describe("the name of a compression", () => {
  it.each([
    ["zlib", { type: "zlib", level: 6 }],
    ["zstd", { type: "zstd", level: 3 }],
    ["zlib:1", { type: "zlib", level: 1 }],
    ["zstd:19", { type: "zstd", level: 19 }],
  ])("%s", (text, expected) => expect(parseCompression(text, "--compress")).toEqual(expected));

  it.each(["", "gzip", "zlib:", "zlib:0", "zlib:10", "zstd:20", "zstd:-1", "zstd:3:4", "zstd:1e1"])(
    "is not '%s'",
    (text) => expect(() => parseCompression(text, "--compress")).toThrow(/^--compress: /),
  );

  it("has QEMU's levels where none is given", () => {
    expect([COMPRESSION_LEVELS.zlib.default, COMPRESSION_LEVELS.zstd.default]).toEqual([6, 3]);
  });
});

describe("packing", () => {
  it("never overlaps, stays in its clusters, wastes only where somebody came between, and counts exactly", () => {
    const steps = fc.array(
      fc.oneof(
        fc.record({ sizes: fc.array(fc.integer({ min: 0, max: 511 }), { minLength: 1, maxLength: 8 }) }),
        fc.record({ clusters: fc.integer({ min: 1, max: 3 }) }),
      ),
      { maxLength: 60 },
    );
    fc.assert(
      fc.property(steps, fc.integer({ min: 1, max: 3 }), (sequence, workerCount) => {
        const geometry = planGeometry("t", 1 * MiB, 512, true);
        const refcounts = createRefcounts("t", geometry);
        const shared = createShared(geometry);
        const description = { shared, refcounts, clusterBits: 9, name: "t" } as Qcow2TargetDescription;
        const workers = Array.from({ length: workerCount }, () => new HostClusters(description));
        const expected = new Uint16Array(refcounts.byteLength / 2);
        expected.set(new Uint16Array(refcounts));
        const taken = new Uint8Array(512 * 1024);
        let end = 0;
        let disturbed = false;
        let first = true;
        sequence.forEach((step, index) => {
          const worker = workers[index % workerCount];
          if (worker === undefined) return;
          if ("clusters" in step) {
            const start = worker.allocate(step.clusters, 0);
            for (let i = 0; i < step.clusters; i++) {
              expected[start + i]++;
              taken.fill(1, (start + i) * 512, (start + i + 1) * 512);
            }
            disturbed = true;
            return;
          }
          const sizes = Int32Array.from(step.sizes);
          const offsets = new Float64Array(sizes.length);
          worker.pack(sizes, sizes.length, offsets, 0);
          sizes.forEach((size, i) => {
            if (size === 0) return;
            const offset = offsets[i] ?? 0;
            if (!disturbed && !first) expect(offset).toBe(end);
            [first, disturbed] = [false, disturbed && (offset % 512) + size <= 512];
            end = offset + size;
            expect(taken.subarray(offset, end).every((byte) => byte === 0)).toBe(true);
            taken.fill(1, offset, end);
            worker.countUse(offset, size);
            for (let c = Math.floor(offset / 512); c <= Math.floor((end - 1) / 512); c++) expected[c]++;
          });
        });
        expect(new Uint16Array(refcounts)).toEqual(expected);
        const free = new Int32Array(shared)[NEXT_FREE] ?? 0;
        for (let c = free; c < expected.length; c++) expect(expected[c]).toBe(0);
      }),
      { numRuns: 60 },
    );
  });

  it("has refcounts for 64 TiB, and refuses what would take more than 4 GiB of them", () => {
    const geometry = planGeometry("t", 64 * TiB, 64 * KiB, true);
    expect(createRefcounts("t", geometry).byteLength).toBeLessThan(2.1 * GiB);
    const tooMany = { ...planGeometry("t", 8 * TiB, 4 * KiB, true), clusterLimit: 2 ** 32 };
    expect(() => createRefcounts("t", tooMany)).toThrow(
      expect.objectContaining({ code: "LIMIT", hint: "choose larger clusters" }),
    );
  });

  it("keeps within the offsets that an entry can hold", () => {
    for (let bits = 9; bits <= 21; bits++) {
      const { clusterLimit } = planGeometry("t", 1 * GiB, 2 ** bits, true);
      expect(clusterLimit * 2 ** bits).toBeLessThanOrEqual(2 ** Math.min(56, 70 - bits));
    }
  });
});

describe("a batch that fails", () => {
  let folder: string;
  let path: string;
  let target: Target;
  let description: Qcow2TargetDescription;
  let words: Int32Array;
  const sizeBytes = 4 * MiB;
  const disk = Buffer.concat([
    ...Array.from({ length: 8 }, (_, i) => content(i % 3 === 2 ? "noise" : "text", 3 * CLUSTER)),
    content("text", sizeBytes - 24 * CLUSTER),
  ]);

  beforeEach(async () => {
    folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-compress-"));
    path = join(folder, "t.qcow2");
    target = await createTarget({
      ...{ path, format: "qcow2", sizeBytes, clusterSizeBytes: CLUSTER, force: false, direct: false },
      compression: { type: "zlib", level: 1 },
    });
    description = target.description as Qcow2TargetDescription;
    words = new Int32Array(description.shared);
  });
  afterEach(async () => {
    await target.abort();
    fs.rmSync(folder, { recursive: true });
  });

  async function finishAndCompare(expected: Buffer): Promise<void> {
    await target.finish();
    execFileSync("qemu-img", ["check", "-q", path]);
    fs.writeFileSync(join(folder, "disk.raw"), expected);
    execFileSync("qemu-img", ["compare", "-q", "-f", "raw", "-F", "qcow2", join(folder, "disk.raw"), path]);
  }

  /** The descriptor refuses writes as long as `action` takes. */
  function withBrokenFile(action: () => void): void {
    const { metadataFd } = description;
    const readOnly = fs.openSync(target.unfinishedPath ?? "", "r");
    description.metadataFd = readOnly;
    try {
      action();
    } finally {
      description.metadataFd = metadataFd;
      fs.closeSync(readOnly);
    }
  }

  it("at its data goes on in the same places when it is tried again", async () => {
    const writer = openTarget(description);
    withBrokenFile(() => {
      const write = (): unknown => writer.write(disk, 0, 1 * MiB, 0);
      expect(write).toThrow(expect.objectContaining({ code: "IO", offsetBytes: 0 }));
      const used = words[NEXT_FREE];
      expect(write).toThrow(expect.objectContaining({ code: "IO" }));
      expect(words[NEXT_FREE]).toBe(used);
    });
    void writer.write(disk, 0, sizeBytes, 0);
    void writer.settle?.();
    writer.close();
    await finishAndCompare(disk);
  });

  it("and is given up leaves no leak", async () => {
    const writer = openTarget(description);
    void writer.write(disk, 0, 1 * MiB, 0);
    withBrokenFile(() => expect(() => void writer.write(disk, 1 * MiB, 1 * MiB, 1 * MiB)).toThrow());
    void writer.write(disk, 2 * MiB, 2 * MiB, 2 * MiB);
    void writer.settle?.();
    writer.close();
    await finishAndCompare(Buffer.from(disk).fill(0, 1 * MiB, 2 * MiB));
  });

  it("at its entries writes them when it is tried again, and counts each cluster once", async () => {
    const writer = openTarget(description);
    const { metadataFd } = description;
    const readOnly = fs.openSync(target.unfinishedPath ?? "", "r");
    let uses = 0;
    // The data's write comes first, in one stretch.
    Object.defineProperty(description, "metadataFd", {
      configurable: true,
      get: () => (uses++ === 0 ? metadataFd : readOnly),
    });
    const write = (): unknown => writer.write(disk, 0, 1 * MiB, 0);
    expect(write).toThrow(expect.objectContaining({ code: "IO" }));
    expect(uses).toBeGreaterThan(1);
    expect(write).toThrow(expect.objectContaining({ code: "IO" }));
    Object.defineProperty(description, "metadataFd", { value: metadataFd });
    fs.closeSync(readOnly);
    void writer.write(disk, 0, sizeBytes, 0);
    void writer.settle?.();
    writer.close();
    await finishAndCompare(disk);
  });

  it("for want of host clusters names the bound", () => {
    const writer = openTarget(description);
    words[CLUSTER_LIMIT] = (words[NEXT_FREE] ?? 0) + 2;
    expect(() => void writer.write(disk, 0, 1 * MiB, 0)).toThrow(
      expect.objectContaining({ code: "LIMIT", hint: "choose larger clusters" }),
    );
  });
});
