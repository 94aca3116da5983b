import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  BLOCK_BYTES,
  chunkedGeometryOf,
  FINE_CUT,
  FINE_CUT_MAX_DISK_BYTES,
  geometryOf,
} from "../../../src/cow/geometry.js";

const MiB = 1024 * 1024;

describe("geometryOf", () => {
  it("cuts every disk into whole parts, with the last of each kind holding the end", () => {
    const size = fc.oneof(fc.nat(2 ** 31), fc.integer({ min: 2 ** 31, max: 2 ** 50 }));
    const clusterBits = fc.integer({ min: 9, max: 21 });
    fc.assert(
      fc.property(size, clusterBits, clusterBits, (sizeBytes, a, b) => {
        const geometry = geometryOf(sizeBytes, 2 ** a, 2 ** b);
        const { clusterBytes, chunkBytes, clustersPerChunk, blocksPerChunk, chunksPerRegion } = geometry;
        expect(clusterBytes).toBe(Math.max(64 * 1024, 2 ** a, 2 ** b));
        expect(clustersPerChunk * clusterBytes).toBe(chunkBytes);
        expect(blocksPerChunk * BLOCK_BYTES).toBe(chunkBytes);
        // A spilled chunk has a bitmap of whole bytes.
        expect(blocksPerChunk % 8).toBe(0);
        for (const [count, unit] of [
          [geometry.clusterCount, clusterBytes],
          [geometry.chunkCount, chunkBytes],
          [geometry.regionCount, chunkBytes * chunksPerRegion],
        ] as const) {
          expect(count * unit).toBeGreaterThanOrEqual(sizeBytes);
          expect((count - 1) * unit).toBeLessThan(Math.max(1, sizeBytes));
        }
        expect(geometry.chunkCount).toBeLessThan(2 ** 31);
      }),
    );
  });

  it("cuts finely where it is asked to, and not more finely than source and target are", () => {
    const finest = chunkedGeometryOf(16 * MiB, FINE_CUT, 0, 512, 1);
    expect([finest.clusterBytes, finest.chunkBytes, finest.clustersPerChunk]).toEqual([16_384, 262_144, 16]);
    expect(chunkedGeometryOf(MiB, FINE_CUT, 4 * MiB, 65_536)).toMatchObject({
      clusterBytes: 65_536,
      chunkBytes: 4 * MiB,
      chunkCount: 1,
    });
    expect(chunkedGeometryOf(FINE_CUT_MAX_DISK_BYTES, FINE_CUT, 0).chunkCount).toBeLessThan(2 ** 31);
  });

  it.each([0, 1, 511, 4097, 65536])("takes a disk of %i bytes", (sizeBytes) => {
    const { clusterCount, chunkCount, regionCount } = geometryOf(sizeBytes, 0, 1);
    const parts = sizeBytes === 0 ? 0 : 1;
    expect([clusterCount, chunkCount, regionCount]).toEqual([parts, parts, parts]);
  });

  it.each([-1, NaN, 2 ** 50 + 1])("refuses %d bytes", (sizeBytes) => {
    expect(() => geometryOf(sizeBytes)).toThrow(RangeError);
  });
});
