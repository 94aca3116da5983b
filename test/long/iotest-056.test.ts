// QEMU's iotest 056, beside QEMU: sync modes `top` and `none`, writes into what is not copied yet, and jobs that are
// dismissed, in time or not. What became of each of its cases: docs/qmp.md.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { noise } from "../support/disks.js";
import { Judged, type JudgedSetup, type Peer } from "../support/qmp-judge.js";
import { mustRun, scratchFolder, stopAll } from "../support/server.js";

const SIZE = 64 * 2 ** 20;
const id = "job0";
let judged: Judged;

async function start(setup: JudgedSetup = {}): Promise<void> {
  judged = await Judged.start(scratchFolder(), SIZE, setup);
}

afterEach(async () => {
  await judged.close();
  await stopAll();
});

const target = ({ folder }: Peer, name = "target"): string => join(folder, name);

/** As the original's drive-backup, into a new qcow2 file. */
async function drive(more: object = {}, name = "target"): Promise<void> {
  await judged.same("drive-backup", (peer) => ({
    ...{ "job-id": id, device: "disk", target: target(peer, name), format: "qcow2", sync: "full" },
    ...more,
  }));
}

async function statuses(): Promise<unknown[]> {
  const { return: jobs } = await judged.same("query-block-jobs");
  return (jobs as { status: string }[]).map(({ status }) => status);
}

/** Both targets, each against `expected`, and against each other. */
async function expectTargets(expected: (peer: Peer) => string, format = "qcow2"): Promise<void> {
  for (const peer of judged.peers) {
    await mustRun("qemu-img", "compare", "-U", "-F", format, expected(peer), target(peer));
  }
}

/** Which clusters of an image are in its own file. */
async function ownData(image: string): Promise<[number, number][]> {
  const map = JSON.parse(await mustRun("qemu-img", "map", "-U", "--output=json", image)) as {
    start: number;
    length: number;
    depth: number;
    data: boolean;
  }[];
  const own: [number, number][] = [];
  for (const { start, length, depth, data } of map) {
    if (depth !== 0 || !data) continue;
    const last = own.at(-1);
    if (last !== undefined && last[0] + last[1] === start) last[1] += length;
    else own.push([start, length]);
  }
  return own;
}

describe("sync modes", () => {
  const startWithBacking = async (): Promise<void> => {
    const base = join(scratchFolder(), "backing.img");
    writeFileSync(base, noise(SIZE));
    await start({ backing: base });
    await judged.write(
      ...["write -P 0x41 0 512", "write -P 0xd5 1M 32k", "write -P 0xdc 32M 124k"],
      "write -P 0xdc 67043328 64k",
    );
  };

  it("top copies what the top image has, onto the same backing file", async () => {
    await startWithBacking();
    await drive({ sync: "top" });
    await judged.untilJob(id, "gone");
    await expectTargets(({ uri }) => uri);
    const [our, their] = await Promise.all(
      judged.peers.map(async (peer) => {
        const info = JSON.parse(await mustRun("qemu-img", "info", "-U", "--output=json", target(peer))) as {
          "full-backing-filename": string;
          "backing-filename-format": string;
        };
        return [info["full-backing-filename"], info["backing-filename-format"], await ownData(target(peer))];
      }),
    );
    expect(our).toEqual(their);
  });

  it("none has what a guest's write was about to overwrite, of the backing file's, too", async () => {
    await startWithBacking();
    await drive({ sync: "none" });
    await judged.write("write -P 0x5e 0 512", "write -P 0x5e 2M 4k", "write -P 0x5e 67043328 100");
    await judged.same("block-job-cancel", { device: id });
    await judged.untilJob(id, "gone");
    for (const peer of judged.peers) {
      await mustRun(
        "qemu-io",
        "-U",
        "-r",
        "-c",
        "read -P 0x41 0 512",
        "-c",
        "read -P 0xdc 67043328 60k",
        target(peer),
      );
    }
    const [our, their] = judged.peers.map((peer) => target(peer));
    expect(await ownData(our ?? "")).toEqual(await ownData(their ?? ""));
    await mustRun("qemu-img", "compare", "-U", our ?? "", their ?? "");
  });
});

describe("writes into what is not copied yet", () => {
  it("of a part of a cluster, while the job is paused, go on when it is resumed", async () => {
    await start({ format: "raw" });
    await drive({ format: "raw", speed: 1 });
    await judged.same("block-job-pause", { device: id });
    // Of a cluster that a job of that speed never comes to.
    await judged.write("write -P 1 33554944 512");
    await judged.same("block-job-resume", { device: id });
    await judged.write("write -P 2 33620480 512", "read -P 1 33554944 512");
    await judged.same("block-job-cancel", { device: id });
    await judged.untilJob(id, "gone");
    expect(await statuses()).toEqual([]);
  });

  it("that overlap leave the target as the disk was", async () => {
    await start();
    await judged.write("write -P 42 0 2M");
    await drive({ "auto-dismiss": false }, "reference");
    await judged.untilJob(id, "concluded");
    await judged.same("block-job-dismiss", { id });
    await drive({ speed: 1, "auto-dismiss": false });
    await judged.write("write -P 23 1088k 64k", "write -P 66 1M 1M");
    await judged.same("block-job-set-speed", { device: id, speed: 0 });
    await judged.untilJob(id, "concluded");
    await judged.same("block-job-dismiss", { id });
    await expectTargets((peer) => target(peer, "reference"));
  });
});

describe("a job", () => {
  it("that dismisses itself is gone", async () => {
    await start();
    await drive({ "auto-dismiss": true });
    await judged.untilJob(id, "gone");
    expect(await statuses()).toEqual([]);
  });

  it("that does not has its name until it is dismissed, once", async () => {
    await start();
    await drive({ "auto-dismiss": false });
    await judged.untilJob(id, "concluded");
    expect(await statuses()).toEqual(["concluded"]);
    await judged.same("drive-backup", (peer) => ({
      ...{ "job-id": id, device: "disk", target: target(peer, "another"), sync: "full" },
    }));
    await judged.same("block-job-dismiss", { id: "foobar" });
    await judged.same("block-job-dismiss", { id });
    await judged.same("block-job-dismiss", { id });
    expect(await statuses()).toEqual([]);
    await drive({ "auto-dismiss": false }, "another");
    await judged.untilJob(id, "concluded");
    await judged.same("block-job-dismiss", { id });
  });

  it.each([true, false])("that an error stopped is resumed, auto-dismiss: %s", async (autoDismiss) => {
    await start({ ourFaults: "target-write:error=EIO,count=1" });
    await judged.write("write -P 0x9a 0 512", "write -P 0x55 8M 352k", "write -P 0x78 15872k 1M");
    const once = { event: "write_aio", errno: 5, immediately: false, once: true };
    await judged.addTarget("target", { theirFaults: [once] });
    await judged.same("blockdev-backup", ({ name }) => ({
      ...{ "job-id": id, device: "disk", target: "target", sync: "full", "on-target-error": "stop" },
      ...{ "auto-dismiss": autoDismiss, "x-perf": { "max-workers": 1 } },
      // Ours would try again by itself.
      ...(name === "ours" && { "x-target-retries": 0 }),
    }));
    await judged.untilJob(id, "paused");
    await judged.same("block-job-dismiss", { id });
    for (const { client } of judged.peers) {
      const { return: jobs } = await client.ask({ execute: "query-block-jobs" });
      expect(jobs).toMatchObject([{ status: "paused", "io-status": "failed" }]);
    }
    await judged.same("block-job-resume", { device: id });
    if (!autoDismiss) {
      await judged.untilJob(id, "concluded");
      await judged.same("block-job-dismiss", { id });
    }
    await judged.untilJob(id, "gone");
    for (const { client } of judged.peers) {
      const errors = client.messages.filter(({ event }) => event === "BLOCK_JOB_ERROR");
      expect(errors.map(({ data }) => data)).toEqual([{ device: id, operation: "write", action: "stop" }]);
    }
    expect(judged.sameEvents(id)).toEqual([
      ...["created", "running", "BLOCK_JOB_ERROR", "waiting", "pending"],
      ...["BLOCK_JOB_COMPLETED", "concluded", "null"],
    ]);
    await judged.same("blockdev-del", { "node-name": "target" });
    await expectTargets(({ uri }) => uri);
  });
});
