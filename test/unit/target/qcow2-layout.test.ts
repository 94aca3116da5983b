import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  allocateClusters,
  CLUSTER_LIMIT,
  createShared,
  NEXT_FREE,
  planGeometry,
  planRefcounts,
} from "../../../src/target/qcow2/layout.js";
import { encodeHeaderCluster } from "../../../src/target/qcow2/header.js";
import { GiB, KiB, MiB, TiB } from "../../../src/units.js";

describe("the refcount plan", () => {
  it("covers the whole image, itself included, and no block or table cluster too many", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 2, max: 2 ** 31 - 2 ** 21 }),
        fc.integer({ min: 9, max: 21 }),
        (used, bits) => {
          const clusterBytes = 2 ** bits;
          const perBlock = clusterBytes / 2;
          const plan = planRefcounts(used, clusterBytes);
          expect(plan.tableFirstCluster).toBe(used);
          expect(plan.totalClusterCount).toBe(used + plan.tableClusterCount + plan.blockCount);
          expect(plan.blockCount).toBe(Math.ceil(plan.totalClusterCount / perBlock));
          expect(plan.tableClusterCount).toBe(Math.ceil((plan.blockCount * 8) / clusterBytes));
        },
      ),
    );
  });

  it("stays within QEMU's 8 MiB of table and 32-bit cluster numbers at the cluster limit", () => {
    for (let bits = 9; bits <= 21; bits++) {
      const { clusterLimit } = planGeometry("t", 1 * GiB, 2 ** bits);
      const plan = planRefcounts(clusterLimit, 2 ** bits);
      expect(plan.blockCount * 8).toBeLessThanOrEqual(8 * MiB);
      expect(plan.totalClusterCount).toBeLessThan(2 ** 31);
    }
  });
});

describe("the geometry", () => {
  it.each([0, 256, 1000, 4 * MiB, NaN])("refuses clusters of %d bytes", (clusterBytes) => {
    expect(() => planGeometry("t", 1 * MiB, clusterBytes)).toThrow(/is not a qcow2 cluster size/);
  });

  it("names the bound of a cluster size", () => {
    expect(() => planGeometry("t", 128 * GiB + 1, 512)).toThrow(/512 B holds at most 128 GiB/);
    expect(planGeometry("t", 128 * GiB, 512).l1EntryCount).toBe(4 * MiB);
  });

  it("rounds the disk up to sectors and takes 4 bytes of memory an L1 entry", () => {
    expect(planGeometry("t", 4097, 64 * KiB).sizeBytes).toBe(4608);
    const geometry = planGeometry("t", 64 * TiB, 64 * KiB);
    expect(geometry.l1EntryCount).toBe(128 * KiB);
    expect(createShared(geometry).byteLength).toBeLessThan(512 * KiB + 16 * KiB);
  });
});

describe("the allocation of host clusters", () => {
  it("ends at the limit and leaves the counter there", () => {
    const words = new Int32Array(createShared(planGeometry("t", 1 * GiB, 64 * KiB)));
    words[CLUSTER_LIMIT] = 10;
    expect(words[NEXT_FREE]).toBe(2);
    expect(allocateClusters(words, 7)).toBe(2);
    expect(allocateClusters(words, 2)).toBe(-1);
    expect(allocateClusters(words, 1)).toBe(9);
    expect(allocateClusters(words, 1)).toBe(-1);
    expect(words[NEXT_FREE]).toBe(10);
  });
});

describe("the header", () => {
  it("refuses a backing file's name that does not fit, and says how long it may be", () => {
    const encode = (clusterBytes: number, file: string): Buffer =>
      encodeHeaderCluster("t", planGeometry("t", 1 * MiB, clusterBytes), planRefcounts(2, clusterBytes), {
        file,
        format: "qcow2",
      });
    expect(() => encode(512, "x".repeat(377))).toThrow(/has 377 bytes; at most 376 fit/);
    expect(encode(512, "x".repeat(376)).length).toBe(512);
    expect(() => encode(64 * KiB, "x".repeat(1024))).toThrow(/at most 1023/);
  });
});
