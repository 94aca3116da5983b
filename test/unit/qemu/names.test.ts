// What a run calls its things in QEMU, and which run something belongs to.
import { spawnSync } from "node:child_process";
import { describe, expect, it } from "vitest";
import { isAlive, partName, runName, runOf } from "../../../src/qemu/names.js";

/** include/block/block.h: a node name's array holds 32 with the final zero. */
const NODE_NAME_LENGTH_MAX = 31;

describe("names of a run", () => {
  it("tell the run, which is alive as long as its process is", () => {
    const name = partName(runName(), 3, "cbw");
    expect(runOf(name)).toBe(runName());
    expect(isAlive(runName())).toBe(true);
  });

  it("belong to a dead run once the process is gone, also if another has its id", () => {
    const { pid } = spawnSync("true");
    const start = runName().slice(-9);
    expect(isAlive(`cowcatcher-${pid}.${start}`)).toBe(false);
    expect(isAlive(`cowcatcher-${process.pid}.000000001`)).toBe(false);
  });

  it("fit into a node's name with the largest process id, years of uptime and a hundred disks", () => {
    const name = partName(`cowcatcher-${2 ** 22}.${"f".repeat(9)}`, 99, "fleece");
    expect(name.length).toBeLessThanOrEqual(NODE_NAME_LENGTH_MAX);
    expect(runOf(name)).toBe(`cowcatcher-${2 ** 22}.${"f".repeat(9)}`);
  });

  it.each([
    "disk",
    "cowcatcher-",
    "cowcatcher-daily",
    "cowcatcher-backup.img",
    "cowcatcher-1.0",
    "x-cowcatcher-12.000000001f0",
  ])("%s is none", (name) => {
    expect(runOf(name)).toBeUndefined();
  });
});
