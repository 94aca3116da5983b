// What QEMU's iotest 257 has besides its matrix (bitmap-matrix.test.ts), beside QEMU: a table of requests that are refused,
// and what is left in a bitmap when its backup fails on its way.
import { afterEach, expect, it } from "vitest";
import { Judged } from "../support/qmp-judge.js";
import { scratchFolder, stopAll } from "../support/server.js";

const SIZE = 64 * 2 ** 20;
let judged: Judged;

afterEach(async () => {
  await judged.close();
  await stopAll();
});

const MODES = ["on-success", "always", "never", undefined] as const;

it("backups by bitmaps that are refused", async () => {
  judged = await Judged.start(scratchFolder(), SIZE);
  await judged.addTarget("backup_target");
  await judged.same("block-dirty-bitmap-add", { node: "disk", name: "bitmap0", granularity: 65_536 });
  const isGood = (sync: string, bitmap: string | undefined, mode: string | undefined): boolean => {
    if (bitmap === undefined) return mode === undefined && sync !== "incremental" && sync !== "bitmap";
    if (bitmap !== "bitmap0" || sync === "none") return false;
    if (sync === "incremental") return mode === "on-success" || mode === undefined;
    return sync === "bitmap" ? mode !== undefined : mode === "on-success" || mode === "always";
  };
  let count = 0;
  for (const sync of ["incremental", "bitmap", "full", "top", "none"]) {
    for (const bitmap of [undefined, "bitmap404", "bitmap0"]) {
      for (const mode of MODES) {
        if (isGood(sync, bitmap, mode)) continue;
        const request = { "job-id": "api_job", device: "disk", target: "backup_target", sync, bitmap };
        const { error } = await judged.same("blockdev-backup", { ...request, "bitmap-mode": mode });
        expect(error, `${sync} ${bitmap} ${mode}`).toBeDefined();
        count++;
      }
    }
  }
  // As many as the original has.
  expect(count).toBe(48);
  expect((await judged.sameBitmaps())[0]).toMatchObject({ count: 0, busy: false });
});

it.each([
  { sync: "bitmap", mode: "never" },
  { sync: "bitmap", mode: "on-success" },
  { sync: "bitmap", mode: "always" },
  { sync: "full", mode: "on-success" },
  { sync: "full", mode: "always" },
  { sync: "top", mode: "on-success" },
  { sync: "top", mode: "always" },
])("a backup $sync $mode that fails on its way leaves what QEMU leaves", async ({ sync, mode }) => {
  judged = await Judged.start(scratchFolder(), SIZE, {
    format: "raw",
    ourFaults: "source-read:error=EIO,from=32M,to=32832k",
    theirFaults: [{ event: "read_aio", errno: 5, sector: 65_536, immediately: false }],
  });
  await judged.write("write -P 0x49 0 64k", "write -P 0x6c 1M 64k");
  await judged.same("block-dirty-bitmap-add", { node: "disk", name: "bitmap0" });
  await judged.write("write -P 0x65 0 64k", "write -P 0x77 992k 64k", "write -P 0x72 32M 64k");
  const [before] = await judged.sameBitmaps();
  await judged.addTarget("first");
  await judged.same("blockdev-backup", {
    ...{ "job-id": "first", device: "disk", target: "first", sync, bitmap: "bitmap0", "bitmap-mode": mode },
    "x-perf": { "max-workers": 1 },
  });
  await judged.untilJob("first", "gone");
  for (const { client } of judged.peers) {
    const ends = client.messages.filter(({ event }) => event === "BLOCK_JOB_COMPLETED");
    expect(ends.map(({ data }) => typeof data?.["error"])).toEqual(["string"]);
  }
  if (mode !== "always") {
    expect((await judged.sameBitmaps())[0]).toEqual(before);
    return;
  }
  // With one worker each, in the same order: what is left begins with what could not be read.
  const [bitmap] = await judged.sameBitmaps();
  expect(bitmap?.count).toBe(sync === "bitmap" ? 65_536 : SIZE / 2);
});
