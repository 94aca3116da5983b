// Dirty bitmaps and the backups that go by them, beside QEMU: the same commands to a qemu-storage-daemon, the same answers,
// counts and events. The essence of QEMU's iotests 124, 219 and 257; all of 257's matrix is test/long/bitmap-matrix.test.ts.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { MATRIX_SIZE, runMatrixCase } from "../../support/bitmap-matrix.js";
import { Judged } from "../../support/qmp-judge.js";
import { scratchFolder, stopAll } from "../../support/server.js";

let judged: Judged;

beforeAll(async () => {
  judged = await Judged.start(scratchFolder(), MATRIX_SIZE);
});
afterAll(async () => {
  await judged.close();
  await stopAll();
});

const named = (type: string, name: string) => ({
  type: `block-dirty-bitmap-${type}`,
  data: { node: "disk", name },
});
const merge = (target: string, ...bitmaps: unknown[]) => ({
  type: "block-dirty-bitmap-merge",
  data: { node: "disk", target, bitmaps },
});
const transaction = (...actions: object[]) => judged.same("transaction", { actions });

describe("bitmaps, as QEMU has them", () => {
  it("are added, disabled, enabled, merged, cleared and removed", async () => {
    await judged.same("block-dirty-bitmap-add", { node: "disk", name: "a" });
    await judged.same("block-dirty-bitmap-add", { node: "disk", name: "b", disabled: true });
    await judged.write("write 0 64k", "write 1M 128k");
    await judged.sameBitmaps();
    await transaction(named("disable", "a"), named("enable", "b"));
    await judged.write("write 2M 64k", "write 0 4k");
    await judged.sameBitmaps();
    await judged.same("block-dirty-bitmap-add", { node: "disk", name: "c" });
    await judged.same("block-dirty-bitmap-merge", {
      node: "disk",
      target: "c",
      bitmaps: ["a", { node: "disk", name: "b" }],
    });
    await judged.write("write 3M 64k");
    const counts = (await judged.sameBitmaps()).map(({ name, count }) => [name, count / 65_536]);
    expect(counts).toEqual([
      ["a", 3],
      ["b", 3],
      ["c", 5],
    ]);
    await transaction(named("clear", "c"), merge("c", "a"), named("enable", "a"));
    await judged.write("write 4M 64k");
    await judged.sameBitmaps();
  });

  // QEMU 7.2 dies where it undoes an action on a bitmap that is not there, or that it has just un-added (it undoes them
  // first to last): that is asked of ours alone, or without a transaction.
  it("see what the actions before them in a transaction did, or nothing is done", async () => {
    const before = await judged.sameBitmaps();
    for (const actions of [
      [named("clear", "a"), named("remove", "b"), named("clear", "b")],
      [named("disable", "c"), merge("c", "a", "b"), named("clear", "a"), named("add", "b")],
      [named("clear", "a"), merge("a", "nope")],
      [merge("nope", "a")],
      [merge("a", { node: "nope", name: "a" })],
      [named("disable", "a"), { type: "abort", data: {} }],
      [{ type: "block-dirty-bitmap-merge", data: { node: "disk", target: "a" } }],
      [{ type: "block-dirty-bitmap-merge", data: { node: "disk", target: "a", bitmaps: [5] } }],
      [{ type: "block-dirty-bitmap-add", data: { node: "disk", name: "x", disabled: 1 } }],
    ]) {
      expect((await transaction(...actions)).error).toBeDefined();
      expect(await judged.sameBitmaps()).toEqual(before);
    }
    const actions = [named("add", "d"), merge("d", "a", "b"), named("disable", "d"), named("add", "d")];
    await judged.same("block-dirty-bitmap-enable", { node: "disk", name: "nope" });
    await judged.same("block-dirty-bitmap-disable", { node: "nope", name: "a" });
    const { error } = await judged.ours.client.ask({ execute: "transaction", arguments: { actions } });
    expect(error?.desc).toBe("Bitmap already exists: d");
    expect(await judged.sameBitmaps()).toEqual(before);
    await transaction(
      named("add", "d"),
      merge("d", "a", "b"),
      named("disable", "d"),
      named("remove", "a"),
      named("clear", "b"),
    );
    expect((await judged.sameBitmaps()).map(({ name }) => name)).toEqual(["b", "c", "d"]);
    await transaction(named("remove", "b"), named("remove", "c"), named("remove", "d"));
    expect(await judged.sameBitmaps()).toEqual([]);
  });
});

describe("backups by them", () => {
  it.each([{ sync: "bitmap", mode: "on-success", isCancelled: true }] as const)(
    "$sync $mode, cancelled: $isCancelled",
    async (matrixCase) => {
      await runMatrixCase(judged, matrixCase);
    },
  );

  it("go through QEMU's states, and take its verbs in each", async () => {
    await judged.addTarget("life");
    const verbs = async (): Promise<void> => {
      await judged.same("job-complete", { id: "life" });
      await judged.same("job-dismiss", { id: "life" });
      await judged.same("block-job-complete", { device: "life" });
      await judged.same("block-job-dismiss", { id: "life" });
    };
    await judged.same("blockdev-backup", {
      ...{ device: "disk", target: "life", "job-id": "life", sync: "full", speed: 65_536 },
      "auto-finalize": false,
      "auto-dismiss": false,
    });
    await judged.untilJob("life", "running");
    await verbs();
    await judged.same("job-finalize", { id: "life" });
    await judged.same("block-job-finalize", { id: "life" });
    await judged.same("block-job-set-speed", { device: "life", speed: 0 });
    await judged.untilJob("life", "pending");
    await verbs();
    await judged.same("job-pause", { id: "life" });
    await judged.same("block-job-set-speed", { device: "life", speed: 1 });
    await judged.same("job-finalize", { id: "life" });
    await judged.untilJob("life", "concluded");
    await judged.addTarget("life2");
    for (const [target, id] of [
      ["life2", "life"],
      ["disk", "another"],
    ]) {
      await judged.same("blockdev-backup", { device: "disk", target, "job-id": id, sync: "full" });
    }
    await judged.same("job-finalize", { id: "life" });
    await judged.same("job-cancel", { id: "life" });
    await judged.same("job-dismiss", { id: "life" });
    await judged.untilJob("life", "gone");
    expect(judged.sameEvents("life")).toEqual([
      ...["created", "running", "waiting", "pending", "BLOCK_JOB_PENDING"],
      ...["BLOCK_JOB_COMPLETED", "concluded", "null"],
    ]);
  });
});

describe("sync none with a target", () => {
  it.each([
    ["without a buffer", undefined],
    ["with one", 4 << 20],
  ])("has the old data of what was overwritten, %s", async (_how, bufferSize) => {
    const target = `old-${bufferSize ?? 0}`;
    await judged.write("write -P 1 0 8M", "write -P 2 8M 8M");
    await judged.addTarget(target, { format: "raw" });
    const own = bufferSize === undefined ? {} : { "buffer-size": bufferSize };
    await judged.same("blockdev-backup", (peer) => ({
      ...{ device: "disk", target, "job-id": target, sync: "none" },
      ...(peer.name === "ours" && own),
    }));
    await judged.write("write -P 9 0 4k", "write -P 9 68k 4k", "write -z 7M 2M", "write -P 8 0 64k");
    await judged.same("job-cancel", { id: target });
    await judged.untilJob(target, "gone");
    expect(judged.sameEvents(target)).toEqual([
      ...["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"],
    ]);
    const [our, their] = judged.peers.map(({ folder }) => join(folder, target));
    expect(readFileSync(our ?? "").equals(readFileSync(their ?? ""))).toBe(true);
    // After its end nothing goes there any more.
    await judged.write("write -P 7 1M 64k");
    expect(readFileSync(our ?? "").equals(readFileSync(their ?? ""))).toBe(true);
    await judged.same("blockdev-del", { "node-name": target });
  });
});
