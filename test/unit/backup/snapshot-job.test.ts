// Lives of jobs of sync mode `none`, on disks in memory.
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { BackupJob } from "../../../src/backup/host.js";
import { LiveHost } from "../../../src/backup/job/live-host.js";
import { JOB_DEFAULTS, type JobOptions } from "../../../src/backup/options.js";
import { backupFromArguments } from "../../../src/control/backup-arguments.js";
import { DiskNode } from "../../../src/cow/disk-node.js";
import { CowcatcherError } from "../../../src/errors.js";
import type { BlockDevice, Completion, Image } from "../../../src/block/device.js";
import { LocalHands } from "../../support/storage-hands.js";
import { ColdDisk, MiB, turns } from "../../support/cow-engine.js";

class Disk extends ColdDisk {
  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    this.content.set(buffer.subarray(bufferOffset, bufferOffset + lengthBytes), offsetBytes);
    return undefined;
  }
}

let disks: Map<string, Disk>;
let nodes: Map<string, DiskNode>;
let host: LiveHost;
let published: Map<string, BlockDevice>;
let statuses: string[];

beforeEach(() => {
  disks = new Map([
    ["a", new Disk(8 * MiB)],
    ["b", new Disk(8 * MiB)],
  ]);
  nodes = new Map([...disks].map(([name, disk]) => [name, nodeOf(name, disk)]));
  published = new Map();
  statuses = [];
  const publisher = {
    publish(name: string, device: BlockDevice) {
      if (published.has(name)) {
        throw new CowcatcherError({ code: "EXISTS", object: name, problem: "is there already" });
      }
      published.set(name, device);
      return () => published.delete(name);
    },
  };
  host = new LiveHost(nodes, () => undefined, publisher, new Map(), new LocalHands());
  host.onStatus((job, status) => statuses.push(`${job.disk} ${status}`));
});

afterEach(() => host.close());

function nodeOf(name: string, disk: Disk): DiskNode {
  const image = Object.assign(disk, {
    ...{ path: name, format: "raw", readOnly: false, clusterSizeBytes: 0 },
    ...{ files: [], backing: null },
  });
  return new DiskNode(name, image as unknown as Image);
}

function order(disk: string, options: Partial<JobOptions> = {}) {
  const job: JobOptions = {
    ...JOB_DEFAULTS,
    target: "null:",
    targetFormat: "raw",
    sync: "none",
    cowBufferSizeBytes: 2 * MiB,
    ...options,
  };
  return { id: `job-${disk}`, disk, options: job };
}

async function start(disk: string, options?: Partial<JobOptions>): Promise<BackupJob> {
  const [job] = await host.startBackups([order(disk, options)]);
  if (job === undefined) throw new Error("not started");
  return job;
}

function write(disk: string, offset: number, byte: number, length = 4096): Completion {
  return nodes.get(disk)?.write(new Uint8Array(length).fill(byte), 0, length, offset);
}

async function firstByte(device: BlockDevice | undefined, offset: number): Promise<number | undefined> {
  const buffer = new Uint8Array(1);
  await device?.read(buffer, 0, 1, offset);
  return buffer[0];
}

async function untilConcluded(job: BackupJob): Promise<void> {
  for (let i = 0; i < 100 && job.status !== "concluded"; i++) await turns();
  expect(job.status).toBe("concluded");
}

it("keeps T0 readable until it is cancelled, which is its end in order", async () => {
  const job = await start("a");
  const view = published.get("a-snapshot");
  expect(job.snapshot).toEqual({ exportName: "a-snapshot", error: undefined });
  expect(write("a", 100, 0x22)).toBeUndefined();
  expect(await firstByte(view, 100)).toBe(0x11);
  expect(disks.get("a")?.content[100]).toBe(0x22);
  expect(job.progress()).toMatchObject({ bytesDone: 8192, captureCount: 1, bufferBytesUsed: 8192 });
  job.cancel();
  // The guest is free, and readers are refused, before anything is awaited.
  expect(job.status).toBe("aborting");
  expect(write("a", 8192, 0x22)).toBeUndefined();
  expect(job.progress().captureCount).toBe(1);
  await expect(firstByte(view, 100)).rejects.toMatchObject({ errno: "EIO" });
  await untilConcluded(job);
  expect(job.error?.code).toBe("CANCELLED");
  expect(job.snapshot).toBeUndefined();
  expect(published.size).toBe(0);
  host.dismiss(job.id);
  expect(statuses).toEqual(["created", "running", "aborting", "concluded", "null"].map((s) => `a ${s}`));
});

it("can be paused for show, and started again on the same disk after its end", async () => {
  for (let round = 0; round < 3; round++) {
    const job = await start("a");
    job.pause();
    expect(job.status).toBe("paused");
    void write("a", 0, round);
    job.resume();
    expect(job.status).toBe("running");
    // What the last round wrote is this round's T0.
    expect(await firstByte(published.get("a-snapshot"), 0)).toBe(round === 0 ? 0x11 : round - 1);
    job.cancel();
    await untilConcluded(job);
    host.dismiss(job.id);
  }
});

it("fails when a capture finds no room, with the guest going on", async () => {
  const job = await start("a", { onBufferFull: "cancel" });
  const view = published.get("a-snapshot");
  void write("a", 0, 1, 2 * MiB);
  expect(await firstByte(view, 0)).toBe(0x11);
  expect(write("a", 4 * MiB, 1)).toBeUndefined();
  expect(disks.get("a")?.content[4 * MiB]).toBe(1);
  await expect(firstByte(view, 0)).rejects.toMatchObject({ errno: "EIO" });
  await untilConcluded(job);
  expect(job.error?.code).toBe("BUFFER_FULL");
  expect(published.size).toBe(0);
});

it("waits at its end for a read of the disk that a reader has begun", async () => {
  const disk = disks.get("a");
  if (disk === undefined) throw new Error("no disk");
  const job = await start("a");
  disk.cold = true;
  const reading = firstByte(published.get("a-snapshot"), 5);
  job.cancel();
  await turns(10);
  expect(job.status).toBe("aborting");
  disk.reads[0]?.finish();
  await expect(reading).rejects.toMatchObject({ errno: "EIO" });
  await untilConcluded(job);
});

it("of several disks begins at one T0, or none begins", async () => {
  const jobs = await host.startBackups([order("a"), order("b")]);
  expect([...published.keys()]).toEqual(["a-snapshot", "b-snapshot"]);
  for (const job of jobs) job.cancel();
  for (const job of jobs) await untilConcluded(job);
  for (const job of jobs) host.dismiss(job.id);
  published.set("b-snapshot", nodes.get("b") as BlockDevice);
  await expect(host.startBackups([order("a"), order("b")])).rejects.toMatchObject({ code: "EXISTS" });
  expect(host.jobs()).toEqual([]);
  expect([...published.keys()]).toEqual(["b-snapshot"]);
  expect(write("a", 0, 9)).toBeUndefined();
});

it("ends with the server", async () => {
  const job = await start("a");
  await host.close();
  expect(job.status).toBe("concluded");
  expect(published.size).toBe(0);
});

describe("is refused", () => {
  it.each([
    [{ target: "/backup/a.raw" }, "sync none writes no target"],
    [{ onBufferFull: "wait" }, "'wait' would wait for ever"],
    [{ cowBufferSizeBytes: 0 }, "keeps old data in the buffer"],
    [{ verify: true }, "writes no target"],
  ] as const)("with %j", async (options, problem) => {
    await expect(start("a", options)).rejects.toThrow(problem);
    expect(host.jobs()).toEqual([]);
  });

  it("where nothing exports it", async () => {
    const lonely = new LiveHost(nodes, () => undefined, undefined, new Map(), new LocalHands());
    await expect(lonely.startBackups([order("a")])).rejects.toMatchObject({ code: "UNSUPPORTED" });
    await lonely.close();
  });
});

it("is asked for by QMP's sync mode", () => {
  const args = { device: "a", target: "null:", sync: "none" } as Parameters<typeof backupFromArguments>[0];
  const { request } = backupFromArguments(args, host.disks(), { snapshotExport: true });
  expect(request.options).toMatchObject({ sync: "none", target: "null:", snapshotExport: true });
});
