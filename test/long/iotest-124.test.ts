// QEMU's iotest 124, beside QEMU: chains of incremental backups, through failures, pauses, transactions and growth. What
// became of each of its cases: docs/qmp.md.
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { Judged, type JudgedSetup, type Peer } from "../support/qmp-judge.js";
import { mustRun, scratchFolder, stopAll } from "../support/server.js";

const MiB = 2 ** 20;
const SIZE = 64 * MiB;
const BATCHES = [
  ["write -P 0xab 0 512", "write -P 0xfe 16M 256k", "write -P 0x64 32736k 64k"],
  ["write -P 0x9a 0 512", "write -P 0x55 8M 352k", "write -P 0x78 15872k 1M"],
] as const;
let judged: Judged;
let links = 0;

async function start(setup: JudgedSetup = {}): Promise<void> {
  judged = await Judged.start(scratchFolder(), SIZE, setup);
  for (const disk of setup.disks ?? ["disk"]) {
    await judged.writeTo(disk, "write -P 0x41 0 512", "write -P 0xd5 1M 32k", "write -P 0xdc 32M 124k");
  }
}

afterEach(async () => {
  await judged.close();
  await stopAll();
});

async function full(name: string, disk = "disk"): Promise<void> {
  await judged.same("drive-backup", ({ folder }) => ({
    ...{ "job-id": name, device: disk, target: join(folder, name), format: "qcow2", sync: "full" },
  }));
  await judged.untilJob(name, "gone");
}

const bitmap = (name: string, node = "disk") => judged.same("block-dirty-bitmap-add", { node, name });

const increment =
  (name: string, more: object = {}) =>
  ({ folder }: Peer) => ({
    ...{ "job-id": name, device: "disk", target: join(folder, name), format: "qcow2", mode: "existing" },
    ...{ sync: "incremental", bitmap: "bitmap0", ...more },
  });

async function prepare(name: string, below: string, ...create: string[]): Promise<void> {
  for (const { folder } of judged.peers) {
    const backing = ["-b", join(folder, below), "-F", "qcow2"];
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", ...backing, ...create, join(folder, name));
  }
}

async function link(below: string, more: object = {}): Promise<string> {
  const name = `inc${++links}`;
  await prepare(name, below);
  await judged.same("drive-backup", increment(name, more));
  await judged.untilJob(name, "gone");
  await expectDisk(name);
  return name;
}

/** What the backup shows is what the disk has, of either peer; of both, the links have data in the same places. */
async function expectDisk(name: string, disk = "disk"): Promise<void> {
  const own: string[] = [];
  for (const peer of judged.peers) {
    const image = join(peer.folder, name);
    await mustRun("qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2", peer.uriOf(disk), image);
    const map = JSON.parse(await mustRun("qemu-img", "map", "-U", "--output=json", image)) as {
      start: number;
      length: number;
      depth: number;
    }[];
    const granules = new Set<number>();
    for (const { start, length, depth } of map) {
      for (let at = start; depth === 0 && at < start + length; at += 65_536) granules.add(at / 65_536);
    }
    own.push([...granules].join());
  }
  expect(own[0]).toBe(own[1]);
}

function ends(): (string | undefined)[][] {
  return judged.peers.map(({ client }) =>
    client.messages
      .filter(({ event = "" }) => /^BLOCK_JOB_(COMPLETED|CANCELLED)$/.test(event))
      .map(
        ({ event, data }) =>
          `${String(data?.["device"])} ${data?.["error"] === undefined ? event : "failed"}`,
      )
      .sort(),
  );
}

describe("a chain", () => {
  it("has a hollow link and two of what was written", async () => {
    await start();
    await full("anchor");
    await bitmap("bitmap0");
    let last = await link("anchor");
    for (const batch of BATCHES) {
      await judged.write(...batch);
      expect((await judged.sameBitmaps())[0]?.count).toBeGreaterThan(0);
      last = await link(last);
      expect((await judged.sameBitmaps())[0]?.count).toBe(0);
    }
  });

  it("goes into clusters of 128 KiB, without a backing file until later", async () => {
    await start();
    await judged.makeTarget("anchor", { create: ["-o", "cluster_size=128k"] });
    await judged.same("drive-backup", increment("anchor", { sync: "full", bitmap: undefined }));
    await judged.untilJob("anchor", "gone");
    await bitmap("bitmap0");
    await judged.write(...BATCHES[0]);
    expect((await judged.sameBitmaps())[0]).toMatchObject({ count: 458_752, granularity: 65_536 });
    await judged.makeTarget("large", { create: ["-o", "cluster_size=128k"] });
    await judged.same("drive-backup", increment("large"));
    await judged.untilJob("large", "gone");
    for (const { folder } of judged.peers) {
      const [image, anchor] = [join(folder, "large"), join(folder, "anchor")];
      await mustRun("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", anchor, "-F", "qcow2", image);
    }
    await expectDisk("large");
  });

  it("begins in a transaction that clears two bitmaps, and goes on by either", async () => {
    await start();
    await bitmap("bitmap0");
    await judged.write(...BATCHES[0]);
    await bitmap("bitmap1");
    await judged.same("transaction", ({ folder }) => ({
      actions: [
        ...["bitmap0", "bitmap1"].map((name) => ({
          type: "block-dirty-bitmap-clear",
          data: { node: "disk", name },
        })),
        {
          type: "drive-backup",
          data: {
            "job-id": "a",
            device: "disk",
            target: join(folder, "anchor"),
            format: "qcow2",
            sync: "full",
          },
        },
      ],
    }));
    await judged.untilJob("a", "gone");
    await judged.write(...BATCHES[1]);
    await link("anchor");
    await link("anchor", { bitmap: "bitmap1" });
  });

  it("goes on where the disk was made larger between two runs, and has its new end", async () => {
    await start();
    await full("anchor");
    await bitmap("bitmap0");
    await judged.write(...BATCHES[0]);
    await judged.stopOurs();
    await mustRun("qemu-img", "resize", "-q", join(judged.ours.folder, "disk"), String(SIZE + MiB));
    await judged.startOurs();
    const { ours } = judged;
    await mustRun("qemu-io", "-f", "raw", "-c", "write -P 5 64M 64k", ours.uri);
    const target = join(ours.folder, "grown");
    const below = ["-b", join(ours.folder, "anchor"), "-F", "qcow2"];
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", ...below, target, String(SIZE + MiB));
    const request = increment("grown")(ours);
    expect((await ours.client.ask({ execute: "drive-backup", arguments: request })).error).toBeUndefined();
    await judged.untilJob("grown", "gone");
    await mustRun("qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2", ours.uri, target);
  });
});

it("a granularity that is not the tracking's is refused by name", async () => {
  await start();
  for (const granularity of [32_768, 131_072]) {
    const { error } = await judged.ours.client.ask({
      execute: "block-dirty-bitmap-add",
      arguments: { node: "disk", name: "bitmap0", granularity },
    });
    expect(error?.desc).toContain(`A granularity of ${granularity} (changes are tracked by 65536)`);
  }
});

describe("an error of the source", () => {
  // At 16M, in what was written since. Theirs is once; ours, once a job.
  const faults = {
    format: "raw",
    ourFaults: "source-read:error=EIO,from=16M,to=16448k,count=1",
    theirFaults: [{ event: "read_aio", errno: 5, sector: 32_768, once: true, immediately: false }],
  } as const;
  const one = { "x-perf": { "max-workers": 1 } };

  it("fails the backup, and the next one has what that would have had", async () => {
    await start(faults);
    await bitmap("bitmap0");
    await judged.write(...BATCHES[0]);
    await judged.makeTarget("lost");
    await judged.same("drive-backup", increment("lost", one));
    await judged.untilJob("lost", "gone");
    expect(ends()).toEqual([["lost failed"], ["lost failed"]]);
    await judged.sameBitmaps();
    await judged.write(...BATCHES[1]);
    const [before] = await judged.sameBitmaps();
    await judged.stopOurs();
    await judged.startOurs();
    expect((await judged.sameBitmaps())[0]).toEqual(before);
    // Both disks were empty where nothing was written since the bitmap was added, but for the first pattern.
    await full("anchor");
    await link("anchor");
  });

  it("pauses it where it is asked to, and it comes to its end when it is resumed", async () => {
    await start(faults);
    await bitmap("bitmap0");
    await judged.write(...BATCHES[0]);
    await judged.makeTarget("inc");
    await judged.same("drive-backup", increment("inc", { ...one, "on-source-error": "stop" }));
    await judged.untilJob("inc", "paused");
    for (const { client } of judged.peers) {
      const error = client.messages.find(({ event }) => event === "BLOCK_JOB_ERROR");
      expect(error?.data).toEqual({ device: "inc", action: "stop", operation: "read" });
    }
    const named = (await judged.sameBitmaps()).find(({ name }) => name === "bitmap0");
    expect(named).toMatchObject({ count: 458_752, busy: true });
    await judged.same("block-job-resume", { device: "inc" });
    await judged.untilJob("inc", "gone");
    expect(ends()).toEqual([["inc BLOCK_JOB_COMPLETED"], ["inc BLOCK_JOB_COMPLETED"]]);
    expect(await judged.sameBitmaps()).toMatchObject([{ count: 0, busy: false, recording: true }]);
    const [our, their] = judged.peers.map(({ folder }) => join(folder, "inc"));
    await mustRun("qemu-img", "compare", our ?? "", their ?? "");
  });

  it.each([false, true])(
    "fails a grouped transaction, the other of which has nothing to copy: %s",
    async (isEmpty) => {
      const disks = ["disk", "drive1"];
      const { format, ourFaults } = faults;
      await start({ format, ourFaults, disks });
      for (const disk of disks) await bitmap("bitmap0", disk);
      if (!isEmpty) await judged.writeTo("disk", "write -P 1 0 512", "write -P 2 24M 64k");
      await judged.writeTo("drive1", ...BATCHES[0]);
      for (const disk of disks) await judged.makeTarget(`${disk}-inc`);
      const { ours } = judged;
      const action = (device: string) => ({
        type: "drive-backup",
        data: { ...increment(`${device}-inc`, one)(ours), device },
      });
      const properties = { "completion-mode": "grouped" };
      const actions = disks.map(action);
      const answer = await ours.client.ask({ execute: "transaction", arguments: { actions, properties } });
      expect(answer.error).toBeUndefined();
      for (const disk of disks) await judged.untilJob(`${disk}-inc`, "gone");
      expect(ends()[0]).toEqual(["disk-inc BLOCK_JOB_CANCELLED", "drive1-inc failed"]);
      expect((await judged.sameBitmaps("drive1"))[0]?.count).toBe(458_752);
      expect((await judged.sameBitmaps())[0]?.count).toBe(isEmpty ? 0 : 131_072);
    },
  );
});
