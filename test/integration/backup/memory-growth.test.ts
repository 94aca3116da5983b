// What a backup leaves behind in the server: nothing that the next one does not use again. Not the resident set, which
// the collector lets swing, but what makes it grow: threads, descriptors, mappings.

import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { ControlClient } from "../../../src/qmp/client.js";
import { startBackup, watchJob } from "../../../src/control/jobs-from-qmp.js";
import { JOB_DEFAULTS, type JobOptions } from "../../../src/backup/options.js";
import { MiB } from "../../../src/units.js";
import { sampled } from "../../support/campaign.js";
import { openFilesOf, Process, scratchFolder, Server, stopAll, until } from "../../support/server.js";
import { COWCATCHER_BIN } from "../../support/cli.js";

afterEach(stopAll);

const WARM_UP = 5;
const COUNT = 25;
const CLIENT_COUNT = 200;
const WORKER_COUNT = 2;
/** Booted before any job asks for them: two for storage, one that copies, one for the buffer's pages. */
const WARM_COUNT = 4;

interface Holdings {
  threads: string[];
  /** Descriptors of files and sockets. */
  fileCount: number;
  /** Descriptors of event loops: a thread that boots opens some after it can be seen. */
  loopCount: number;
  mappingCount: number;
}

function isOfLoop(path: string): boolean {
  return /^(?:anon_inode|pipe):/.test(path);
}

function holdings(server: Server): Holdings {
  const { pid } = server.process;
  const descriptors = server.openFiles();
  return {
    threads: threadsOf(pid),
    fileCount: descriptors.filter((path) => !isOfLoop(path)).length,
    loopCount: descriptors.filter(isOfLoop).length,
    mappingCount: readFileSync(`/proc/${pid}/maps`, "utf8").split("\n").length,
  };
}

async function backUp(client: ControlClient, id: string, options: Partial<JobOptions>): Promise<void> {
  const job = {
    ...JOB_DEFAULTS,
    target: "",
    targetFormat: "raw" as const,
    force: true,
    workerCount: WORKER_COUNT,
    cowBufferSizeBytes: 2 * MiB,
    ...options,
  };
  await startBackup(client, [{ id, disk: "disk", options: job }]);
  const { error } = await watchJob(client, id, () => undefined);
  if (error !== undefined) throw error;
}

/** A server that has booted what it boots by itself. */
async function startServer(): Promise<Server> {
  const folder = scratchFolder();
  const disk = join(folder, "disk.raw");
  writeFileSync(disk, Buffer.alloc(4 * MiB, "data"));
  const socket = join(folder, "bare.sock");
  const bare = new Process(process.execPath, [COWCATCHER_BIN, "serve", disk, "--socket", socket]);
  await bare.line((line) => line.includes("listening"));
  const bareCount = eventLoopCount(bare.pid);
  bare.kill("SIGTERM");
  expect(await bare.end()).toMatchObject({ code: 0 });
  const server = await Server.start(folder, [disk]);
  await until(
    "its first threads are up",
    () => eventLoopCount(server.process.pid) === bareCount + WARM_COUNT,
  );
  return server;
}

/** Of the main thread and of the workers: Node's and V8's other threads come when they please. */
function eventLoopCount(pid: number): number {
  return openFilesOf(pid).filter((path) => path === "anon_inode:[eventpoll]").length;
}

function threadsOf(pid: number): string[] {
  return readdirSync(`/proc/${pid}/task`).sort();
}

for (const [name, options] of sampled<readonly [string, Partial<JobOptions>]>(
  [
    ["one after another", {}],
    ["with --verify", { verify: true }],
    ["without a buffer", { cowBufferSizeBytes: 0 }],
  ],
  2,
)) {
  it(`backups ${name} use the same threads, and leave neither descriptors nor mappings`, async () => {
    const server = await startServer();
    const target = join(server.folder, "backup.raw");
    const client = await ControlClient.connect(server.control);
    try {
      const start = holdings(server);
      for (let i = 0; i < WARM_UP; i++) await backUp(client, `warm-${i}`, { target, ...options });
      const before = holdings(server);
      // Those that were there, and the other workers.
      expect(before.threads).toEqual(expect.arrayContaining(start.threads));
      expect(before.threads.length - start.threads.length).toBe(WORKER_COUNT - 1);
      for (let i = 0; i < COUNT; i++) await backUp(client, `job-${i}`, { target, ...options });
      await until("descriptors are closed", () => holdings(server).fileCount <= before.fileCount);
      const after = holdings(server);
      expect(after.threads).toEqual(before.threads);
      // Fewer than one a backup: a worker may have been booting at the first look.
      expect(after.loopCount - before.loopCount).toBeLessThan(COUNT / 2);
      // A thread that ends after it has loaded koffi leaves three; V8's heaps come and go, by some ten.
      const left = after.mappingCount - before.mappingCount;
      expect(left).toBeLessThan((3 * WORKER_COUNT * COUNT) / 2);
    } finally {
      client.close();
    }
  });
}

it("a failed and a cancelled backup give their threads back as well", async () => {
  const server = await startServer();
  const target = join(server.folder, "backup.raw");
  const client = await ControlClient.connect(server.control);
  try {
    const start = holdings(server);
    await backUp(client, "warm", { target });
    const { threads } = holdings(server);
    expect(threads.length - start.threads.length).toBe(WORKER_COUNT - 1);
    const options = { ...JOB_DEFAULTS, target, targetFormat: "raw" as const, force: true };
    const slow = {
      ...options,
      workerCount: WORKER_COUNT,
      cowBufferSizeBytes: 2 * MiB,
      // It does not end before it is cancelled.
      rateLimitBytes: MiB / 64,
    };
    await startBackup(client, [{ id: "cancelled", disk: "disk", options: slow }]);
    const end = watchJob(client, "cancelled", () => undefined);
    await client.execute("job-cancel", { id: "cancelled" });
    expect((await end).error?.code).toBe("CANCELLED");
    await backUp(client, "next", { target });
    expect(holdings(server).threads).toEqual(threads);
  } finally {
    client.close();
  }
});

it("clients that come and go leave no descriptors", async () => {
  const server = await startServer();
  const connect = async (): Promise<void> => {
    const client = await ControlClient.connect(server.control);
    await client.execute("query-jobs");
    client.close();
  };
  await connect();
  const before = holdings(server);
  for (let i = 0; i < CLIENT_COUNT; i++) await connect();
  await until("descriptors are closed", () => holdings(server).fileCount <= before.fileCount);
  expect(holdings(server).loopCount - before.loopCount).toBeLessThan(CLIENT_COUNT / 2);
  expect(holdings(server).threads).toEqual(before.threads);
});

it("serve --preallocate has all of the buffer's memory before it listens", async () => {
  const residentKiB = ({ process: { pid } }: Server): number => {
    const line = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"));
    return Number(line?.[1]);
  };
  const folder = scratchFolder();
  const disk = join(folder, "disk.raw");
  writeFileSync(disk, Buffer.alloc(4 * MiB, "data"));
  const args = ["--cow-buffer-size", "256M"];
  const plain = await Server.start(folder, [disk], { args });
  expect(residentKiB(plain)).toBeLessThan(200 * 1024);
  await plain.stop();
  const ready = await Server.start(folder, [disk], { args: [...args, "--preallocate"] });
  expect(residentKiB(ready)).toBeGreaterThan(256 * 1024);
  await ready.backup("-O", "raw", join(folder, "backup.raw")).succeed();
});
