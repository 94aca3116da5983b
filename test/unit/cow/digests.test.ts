// What --verify compares with: digests of T0, alone and as a worker records them.
import { describe, expect, it } from "vitest";
import { allocateDigests, ClusterDigests } from "../../../src/cow/digests.js";
import { Drainer } from "../../../src/cow/drain.js";
import { BLOCK_BYTES, geometryOf } from "../../../src/cow/geometry.js";
import { createSharedState, type SharedState } from "../../../src/cow/shared.js";
import { CowcatcherError } from "../../../src/errors.js";
import type { SourceReader } from "../../../src/block/device.js";
import type { TargetWriter } from "../../../src/cow/target-writer.js";
import { Random } from "../../support/random.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const CLUSTER = 64 * KiB;

function noise(bytes: number, seed = 1): Uint8Array {
  const random = new Random(seed);
  const content = new Uint8Array(new SharedArrayBuffer(bytes));
  for (let i = 0; i < bytes; i++) content[i] = 1 + random.below(255);
  return content;
}

describe("digests", () => {
  const geometry = geometryOf(2 * CLUSTER + 100);
  const make = (): ClusterDigests => new ClusterDigests(allocateDigests(geometry));

  it("know a cluster again, and any change of one bit", () => {
    const digests = make();
    const data = noise(CLUSTER);
    digests.record(1, data, 0, CLUSTER);
    expect(digests.matches(1, data, 0, CLUSTER)).toBe(true);
    for (const at of [0, 1, 4095, 4096, CLUSTER - 1]) {
      data[at] ^= 0x10;
      expect(digests.matches(1, data, 0, CLUSTER)).toBe(false);
      data[at] ^= 0x10;
    }
    expect(digests.matches(1, new Uint8Array(CLUSTER), 0, CLUSTER)).toBe(false);
  });

  it("expect zeroes of what was never recorded, and of nothing else", () => {
    const digests = make();
    const buffer = new Uint8Array(new SharedArrayBuffer(CLUSTER));
    expect(digests.matches(0, buffer, 0, CLUSTER)).toBe(true);
    buffer[CLUSTER - 1] = 1;
    expect(digests.matches(0, buffer, 0, CLUSTER)).toBe(false);
    digests.record(0, buffer, 0, CLUSTER);
    expect([0, 1, 2].map((cluster) => digests.expectsZero(cluster))).toEqual([false, true, true]);
  });

  it("take the last cluster at its true length", () => {
    const digests = make();
    const data = noise(200);
    digests.record(2, data, 50, 150);
    expect(digests.matches(2, data.slice(50, 150), 0, 100)).toBe(true);
    expect(digests.matches(2, data, 50, 151)).toBe(false);
  });

  it("say what cannot be allocated", () => {
    const huge = { ...geometry, clusterCount: 2 ** 52 };
    expect(() => allocateDigests(huge)).toThrow(CowcatcherError);
    expect(() => allocateDigests(huge)).toThrow(/^--verify: \d+ bytes of memory for the clusters' digests/);
  });
});

describe("a worker", () => {
  /** A disk of stretches of data, zeroes that must be looked for and holes, with an odd end. */
  function disk(seed: number): { content: Uint8Array; hole: (offset: number) => boolean } {
    const random = new Random(seed);
    const content = noise(3 * MiB + 5000, seed);
    const kinds: number[] = [];
    for (let block = 0; block * BLOCK_BYTES < content.length; block++) {
      const kind = random.chance(0.6) ? (kinds.at(-1) ?? 0) : random.below(3);
      kinds.push(kind);
      if (kind > 0) content.fill(0, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
    }
    // A whole cluster of each.
    content.fill(0, 4 * CLUSTER, 6 * CLUSTER);
    kinds.fill(1, (4 * CLUSTER) / BLOCK_BYTES, (5 * CLUSTER) / BLOCK_BYTES);
    kinds.fill(2, (5 * CLUSTER) / BLOCK_BYTES, (6 * CLUSTER) / BLOCK_BYTES);
    return { content, hole: (offset) => kinds[Math.floor(offset / BLOCK_BYTES)] === 2 };
  }

  function readerOf({ content, hole }: ReturnType<typeof disk>): SourceReader {
    return {
      sizeBytes: content.length,
      read(buffer, bufferOffset, length, offset) {
        buffer.set(content.subarray(offset, offset + length), bufferOffset);
        return undefined;
      },
      extent(offset, length) {
        const zero = hole(offset);
        let end = offset;
        while (end < offset + length && hole(end) === zero)
          end = (Math.floor(end / BLOCK_BYTES) + 1) * BLOCK_BYTES;
        return { lengthBytes: Math.min(end - offset, length), zero };
      },
      close: () => undefined,
    };
  }

  function writerTo(copy: Uint8Array): TargetWriter {
    return {
      write(buffer, bufferOffset, length, offset) {
        copy.set(buffer.subarray(bufferOffset, bufferOffset + length), offset);
        return undefined;
      },
      writeZeroes: (offset, length) => void copy.fill(0, offset, offset + length),
      close: () => undefined,
    };
  }

  function copyAll(
    source: ReturnType<typeof disk>,
    withDigests: boolean,
  ): { shared: SharedState; copy: Uint8Array } {
    const shared = createSharedState(
      geometryOf(source.content.length),
      new SharedArrayBuffer(0),
      0,
      withDigests,
    );
    const copy = new Uint8Array(source.content.length).fill(0xee);
    const drainer = new Drainer({
      shared,
      reader: readerOf(source),
      writer: writerTo(copy),
      topOnly: false,
      zeroUnitBytes: BLOCK_BYTES,
      spill: null,
      // What an earlier chunk left there must reach neither the target nor a digest.
      chunkBuffer: new Uint8Array(new SharedArrayBuffer(MiB)).fill(0xdd),
      onSourceError: "report",
      onTargetError: "report",
      targetRetries: 0,
      onStop: () => undefined,
      now: () => 0n,
    });
    for (const step of drainer.run()) expect(step.kind).toBe("step");
    return { shared, copy };
  }

  it.each([1, 2, 3, 4])("records each cluster as it was at T0 (seed %i)", (seed) => {
    const source = disk(seed);
    const { content } = source;
    const { shared, copy } = copyAll(source, true);
    expect(Buffer.compare(copy, content)).toBe(0);
    const { clusterCount } = shared.geometry;
    for (let cluster = 0; cluster < clusterCount; cluster++) {
      const from = cluster * CLUSTER;
      const to = Math.min(from + CLUSTER, content.length);
      expect(shared.digests?.matches(cluster, content, from, to)).toBe(true);
      const isZero = content.subarray(from, to).every((byte) => byte === 0);
      expect(shared.digests?.expectsZero(cluster)).toBe(isZero);
    }
    expect([4, 5].map((cluster) => shared.digests?.expectsZero(cluster))).toEqual([true, true]);
  });

  it("records nothing without --verify", () => {
    const { shared } = copyAll(disk(1), false);
    expect(shared.digests).toBe(null);
    expect(shared.buffers.digests).toBeUndefined();
  });
});
