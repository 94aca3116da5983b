import { describe, expect, it } from "vitest";
import { markClean, runsOfMap } from "../../../../src/backup/copy/incremental.js";
import { geometryOf } from "../../../../src/cow/geometry.js";
import {
  CNT_DONE_BYTES,
  createSharedState,
  DONE,
  REGION_CHUNKED,
  REGION_HOLE,
} from "../../../../src/cow/shared.js";
import type { NbdClient } from "../../../../src/nbd/client/client.js";
import { type ExtentMap, ExtentReader } from "../../../../src/block/extent-map.js";
import { gatherZeroes } from "../../../../src/nbd/client/extent-map.js";
import { WriteGate } from "../../../../src/nbd/client/write-gate.js";

const KiB = 1024;
const MiB = 1024 * KiB;

function mapOf(...runs: [end: number, flag: boolean][]): ExtentMap {
  const memory = new SharedArrayBuffer(8 * Math.max(1, runs.length));
  new Float64Array(memory).set(runs.map(([end, flag]) => end * 2 + (flag ? 1 : 0)));
  return { runs: memory, runCount: runs.length };
}

describe("an extent map", () => {
  it("answers forwards, backwards and at random, and what it does not know as told", () => {
    const map = mapOf([10, true], [25, false], [2 ** 45, true]);
    const reader = new ExtentReader(map, false);
    const at = (offset: number, length = 2 ** 50): [number, boolean] => {
      const { lengthBytes, flag } = reader.extentAt(offset, length);
      return [lengthBytes, flag];
    };
    expect(at(0)).toEqual([10, true]);
    expect(at(10)).toEqual([15, false]);
    expect(at(24)).toEqual([1, false]);
    expect(at(25, 7)).toEqual([7, true]);
    expect(at(2 ** 45 - 1)).toEqual([1, true]);
    expect(at(2 ** 45, 9)).toEqual([9, false]);
    expect(at(3)).toEqual([7, true]);
    expect(new ExtentReader(map, true).extentAt(2 ** 46, 9)).toEqual({ lengthBytes: 9, flag: true });
    expect(new ExtentReader(mapOf(), false).extentAt(0, 9)).toEqual({ lengthBytes: 9, flag: false });
  });

  it("is gathered from answers that stop early or reach over the end, neighbours made one", async () => {
    const asked: number[] = [];
    const answers = [
      { lengths: [4096, 4096], flags: [3, 2] },
      { lengths: [100, 2 ** 31], flags: [1, 0] },
    ];
    const client = {
      sizeBytes: 100_000,
      contexts: new Set(["base:allocation"]),
      blockStatus: (_context: string, offset: number) => {
        asked.push(offset);
        return Promise.resolve(answers[asked.length - 1]);
      },
    } as unknown as NbdClient;
    const map = await gatherZeroes(client);
    expect(asked).toEqual([0, 8192]);
    expect(map?.runCount).toBe(2);
    const reader = new ExtentReader(map ?? mapOf(), false);
    expect(reader.extentAt(0, 100_000)).toEqual({ lengthBytes: 8192, flag: true });
    expect(reader.extentAt(8192, 100_000)).toEqual({ lengthBytes: 91_808, flag: false });
  });
});

describe("an incremental copy", () => {
  it("leaves out clusters without a dirty byte, whole regions at a step, and counts them as done", () => {
    const size = 600 * MiB + 100;
    const geometry = geometryOf(size);
    const shared = createSharedState(geometry, new SharedArrayBuffer(0), 0, false);
    // Dirty: the last byte of cluster 0 and the first of cluster 1; one byte of the disk's last, short cluster.
    markClean(shared, runsOfMap(mapOf([65_535, false], [65_537, true], [size - 1, false], [size, true])));
    const left = [...shared.clusterStates].flatMap((state, cluster) => (state === DONE ? [] : [cluster]));
    expect(left).toEqual([0, 1, geometry.clusterCount - 1]);
    expect([...shared.regionStates]).toEqual([REGION_CHUNKED, REGION_HOLE, REGION_CHUNKED]);
    expect(shared.counters[CNT_DONE_BYTES]).toBe(BigInt(size - 2 * 65_536 - 100));
  });

  it("copies what the map does not know, and nothing where nothing is dirty", () => {
    const states = (map: ExtentMap): number[] => {
      const shared = createSharedState(geometryOf(200_000), new SharedArrayBuffer(0), 0, false);
      markClean(shared, runsOfMap(map));
      return [...shared.clusterStates].map((state) => (state === DONE ? 1 : 0));
    };
    expect(states(mapOf([65_536, false]))).toEqual([1, 0, 0, 0]);
    expect(states(mapOf([200_000, false]))).toEqual([1, 1, 1, 1]);
  });
});

describe("a write gate", () => {
  it("lets writes run together, and who must be alone alone, in the order they came", async () => {
    const gate = new WriteGate();
    const log: string[] = [];
    const finish: Record<string, () => void> = {};
    const write = (name: string, alone: boolean): Promise<void> =>
      gate.run(alone, async () => {
        log.push(`+${name}`);
        await new Promise<void>((done) => (finish[name] = done));
        log.push(`-${name}`);
      });
    const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));
    const all = [
      write("a", false),
      write("b", false),
      write("X", true),
      write("c", false),
      write("d", false),
    ];
    await turn();
    expect(log).toEqual(["+a", "+b"]);
    finish["a"]?.();
    await turn();
    expect(log).toEqual(["+a", "+b", "-a"]);
    finish["b"]?.();
    await turn();
    expect(log.slice(3)).toEqual(["-b", "+X"]);
    finish["X"]?.();
    await turn();
    expect(log.slice(5)).toEqual(["-X", "+c", "+d"]);
    finish["c"]?.();
    finish["d"]?.();
    await Promise.all(all);
  });

  it("goes on after a failure", async () => {
    const gate = new WriteGate();
    await expect(gate.run(true, () => Promise.reject(new Error("no")))).rejects.toThrow("no");
    expect(await gate.run(true, () => Promise.resolve(1))).toBe(1);
  });
});
