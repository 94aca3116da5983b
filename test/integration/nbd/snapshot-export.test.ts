// The T0 view of a disk as an NBD export, with everything real: a server, guests that write, nbdcopy, nbdinfo,
// qemu-img and libnbd as readers.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { IS_CAMPAIGN, sampled } from "../../support/campaign.js";
import { contentOf, expectSame, makeDisk, noise } from "../../support/disks.js";
import { RawQmp } from "../../support/raw-qmp.js";
import {
  type Backup,
  mustRun,
  Process,
  scratchFolder,
  Server,
  type ServerOptions,
  stopAll,
  until,
} from "../../support/server.js";

const MiB = 1024 * 1024;
let folder: string;

beforeEach(() => {
  folder = scratchFolder();
});
afterEach(stopAll);

function at(name: string): string {
  return join(folder, name);
}

async function serve(format: string, sizeBytes: number, options?: ServerOptions): Promise<Server> {
  return Server.start(folder, [await makeDisk(at(`disk.${format}`), noise(sizeBytes))], options);
}

async function exportNames(server: Server): Promise<string[]> {
  const list = JSON.parse(await mustRun("nbdinfo", "--list", "--json", server.uri(""))) as {
    exports: { "export-name": string }[];
  };
  return list.exports.map((found) => found["export-name"]);
}

async function startedMessage(backup: Backup): Promise<{ snapshot_export?: string; job: string }> {
  const line = await backup.process.line((text) => text.includes('"started"'));
  return JSON.parse(line) as { snapshot_export?: string; job: string };
}

function spillFiles(server: Server): string[] {
  return server.openFiles().filter((name) => name.includes("(deleted)"));
}

function expectT0(path: string, t0: string): void {
  expect(Buffer.compare(readFileSync(path), readFileSync(t0))).toBe(0);
}

/** What each leaves behind, all leave: a leak shows in three. */
const ROUNDS = IS_CAMPAIGN ? 7 : 3;

describe("backup --sync none", () => {
  it.each([
    ["raw", 8 * MiB + 512],
    ["qcow2", 8 * MiB],
  ])("a %s disk of %i bytes stays readable as of T0 while a guest writes", async (format, sizeBytes) => {
    const server = await serve(format, sizeBytes);
    const guest = await server.guest(sizeBytes);
    guest.run();
    await guest.progress(20);
    await guest.pause();
    await guest.dump(at("t0"));
    // The buffer is soon full, and the rest goes to the spill.
    const backup = server.backup("--sync", "none", "--cow-buffer-size", "2M", "null:");
    const { snapshot_export: name } = await startedMessage(backup);
    expect(name).toBe("disk-snapshot");
    expect(await exportNames(server)).toEqual(["disk", "disk-snapshot"]);
    guest.run();
    await guest.progress(30);
    const during = mustRun("nbdcopy", server.uri(name), at("during"));
    await guest.progress(200);
    await during;
    expectT0(at("during"), at("t0"));
    await mustRun("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(name), at("later.qcow2"));
    await guest.pause();
    await expectSame(at("t0"), at("later.qcow2"));
    // Also what the view says of holes must be T0's.
    await mustRun("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri(name), at("t0"));
    expect(await guest.verify()).toBe("same");
    await server.jobs("cancel", await backup.jobId());
    const summary = await backup.succeed();
    expect(summary.spilled_bytes).toBeGreaterThan(0);
    await server.stop();
  });

  it("ends in good order by SIGINT, and leaves no export, file or connection behind", async () => {
    const server = await serve("raw", 8 * MiB);
    const guest = await server.guest(1, 1);
    // Threads are kept from backup to backup: the descriptors of their event loops are no files.
    const fileCount = (): number =>
      server.openFiles().filter((path) => !/^(?:anon_inode|pipe):/.test(path)).length;
    const mostFiles = fileCount();
    for (let round = 0; round < ROUNDS; round++) {
      const backup = server.backup("--sync", "none", "--cow-buffer-size", "2M", "null:");
      await backup.started();
      const reader = await Reader.start(server.uri("disk-snapshot"));
      guest.run();
      await guest.progress(100);
      await guest.pause();
      expect(spillFiles(server)).toHaveLength(1);
      backup.process.kill("SIGINT");
      const summary = await backup.succeed();
      expect(summary.captures).toBeGreaterThan(0);
      expect(await reader.refusal()).toMatch(/^(ESHUTDOWN|EIO|ENOTCONN|ECONNRESET|EPIPE|EINVAL)/);
      expect(await exportNames(server)).toEqual(["disk"]);
      await until("files are closed", () => fileCount() <= mostFiles);
    }
    expect(await guest.verify()).toBe("same");
    await server.stop();
  });

  it("fails when the buffer is full and may not spill; the guest goes on", async () => {
    const server = await serve("raw", 8 * MiB);
    const guest = await server.guest(2);
    const backup = server.backup(
      ...["--sync", "none", "--cow-buffer-size", "2M", "--on-buffer-full", "cancel", "null:"],
    );
    await backup.started();
    const reader = await Reader.start(server.uri("disk-snapshot"));
    guest.run();
    const { code, stderr } = await backup.end();
    expect(code).toBe(13);
    expect(stderr).toContain("the copy-before-write buffer is full");
    await reader.refusal();
    await guest.progress(50);
    await guest.pause();
    expect(await guest.verify()).toBe("same");
    expect(await exportNames(server)).toEqual(["disk"]);
    await server.stop();
  });

  it("is one instant for several disks, and no reader can write", async () => {
    const disks = [await makeDisk(at("a.raw"), noise(MiB)), await makeDisk(at("b.qcow2"), noise(MiB))];
    const server = await Server.start(folder, [`${disks[0]}=a`, `${disks[1]}=b`]);
    const guest = new Process("/usr/bin/python3", ["-c", COUNTING_GUEST, server.uri("a"), server.uri("b")]);
    await guest.line((line) => line === "writing");
    const args = ["--disk", "a", "--disk", "b", "--sync", "none", "null:", "null:"];
    const backup = server.backup(...args);
    await backup.started();
    const count = guest.lines.length;
    await until("the guest goes on", () => guest.lines.length > count + 5);
    await mustRun("nbdcopy", server.uri("a-snapshot"), at("a"));
    await mustRun("nbdcopy", server.uri("b-snapshot"), at("b"));
    const [a = 0n, b = 0n] = ["a", "b"].map((name) => readFileSync(at(name)).readBigUInt64LE(0));
    // The guest writes n to a, then n to b: an instant in between shows n and n - 1, no other does.
    expect(a > 1n && (a === b || a === b + 1n)).toBe(true);
    expect(await mustRun("/usr/bin/python3", "-c", WRITER, server.uri("a-snapshot"))).toBe("EPERM\n");
    backup.process.kill("SIGTERM");
    await backup.succeed();
    guest.kill("SIGKILL");
    await server.stop();
  });
});

it("the only disk stays the default export while its snapshot is one, too", async () => {
  const server = await serve("raw", MiB);
  const backup = server.backup("--sync", "none", "null:");
  await backup.started();
  expect(await mustRun("nbdinfo", "--can", "write", server.uri(""))).toBe("");
  backup.process.kill("SIGINT");
  await backup.succeed();
  await server.stop();
});

it.each(sampled(["qcow2", "raw"], 2))(
  "serve --snapshot-export: a full backup of a %s disk and its view both show T0 while fio writes",
  async (format) => {
    const server = await serve(format, 16 * MiB, { args: ["--snapshot-export"] });
    const t0 = await contentOf(at(`disk.${format}`));
    const target = at("target.raw");
    const backup = server.backup(target, "--rate-limit", "1M", "--cow-buffer-size", "2M");
    const { snapshot_export: name = "", job: id } = await startedMessage(backup);
    const control = await RawQmp.negotiated(server.control);
    await until("some of it is in the target", async () => {
      const jobs = (await control.ask({ execute: "query-jobs" })).return as { "current-progress": number }[];
      return (jobs[0]?.["current-progress"] ?? 0) >= 2 * MiB;
    });
    // Paused, it cannot end before the view was read.
    await control.ask({ execute: "job-pause", arguments: { id } });
    // fio overwrites all of it: clusters that are in the target already, too.
    await mustRun(
      "fio",
      ...["--name=guest", "--ioengine=nbd", `--uri=${server.uri()}`, "--rw=randwrite", "--size=16M"],
      ...["--bsrange=4k-64k", "--iodepth=8", "--output=/dev/null"],
    );
    await mustRun("nbdcopy", server.uri(name), at("view"));
    expect(Buffer.compare(readFileSync(at("view")), t0)).toBe(0);
    const exported = (await control.ask({ execute: "query-block-exports" })).return;
    expect(exported).toContainEqual({ id: name, type: "nbd", "node-name": "disk", "shutting-down": false });
    await control.ask({ execute: "block-job-set-speed", arguments: { device: id, speed: 0 } });
    await control.ask({ execute: "job-resume", arguments: { id } });
    await backup.succeed();
    expect(Buffer.compare(readFileSync(target), t0)).toBe(0);
    expect(await exportNames(server)).toEqual(["disk"]);
    control.close();
    await server.stop();
  },
);

it("serve --snapshot-export: a view that runs out of room is lost, and the backup goes on", async () => {
  const server = await serve("raw", 16 * MiB, { args: ["--snapshot-export"] });
  const t0 = readFileSync(at("disk.raw"));
  const target = at("target.raw");
  const room = ["--cow-buffer-size", "2M", "--on-buffer-full", "wait"];
  const backup = server.backup(target, "--rate-limit", "512K", ...room);
  const { snapshot_export: name = "" } = await startedMessage(backup);
  const reader = await Reader.start(server.uri(name));
  const control = await RawQmp.negotiated(server.control);
  const fio = mustRun(
    "fio",
    ...["--name=guest", "--ioengine=nbd", `--uri=${server.uri()}`, "--rw=randwrite", "--size=16M"],
    ...["--bs=64k", "--iodepth=8", "--output=/dev/null"],
  );
  expect(await reader.refusal()).toBe("EIO");
  const jobs = (await control.ask({ execute: "query-jobs" })).return;
  const lost = { "snapshot-export": name, "snapshot-error": { code: "BUFFER_FULL" } };
  expect(jobs).toMatchObject([{ status: "running", "x-cowcatcher": lost }]);
  await control.ask({
    execute: "block-job-set-speed",
    arguments: { device: await backup.jobId(), speed: 0 },
  });
  await fio;
  await backup.succeed();
  expect(Buffer.compare(readFileSync(target), t0)).toBe(0);
  control.close();
  await server.stop();
});

/** A connection to a snapshot that reads until it may not any more. */
class Reader {
  private constructor(readonly process: Process) {}

  static async start(uri: string): Promise<Reader> {
    const process = new Process("/usr/bin/python3", ["-c", READER, uri]);
    await process.line((line) => line === "reading");
    return new Reader(process);
  }

  /** The error's name. */
  async refusal(): Promise<string> {
    const line = await this.process.line((text) => text.startsWith("refused "));
    return line.slice("refused ".length);
  }
}

const READER = `
import nbd, sys, time
h = nbd.NBD()
h.connect_uri(sys.argv[1])
h.pread(512, 0)
print("reading", flush=True)
try:
    while True:
        h.pread(65536, 4096)
        time.sleep(0.01)
except nbd.Error as error:
    print("refused", error.errno, flush=True)
    sys.stdin.read()
`;

/** Asks the server, not only libnbd, whether it may write. */
const WRITER = `
import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
try:
    h.pwrite(b"x", 0)
    print("written")
except nbd.Error as error:
    print(error.errno)
`;

/** Writes n to the first disk, then n to the second, for ever. */
const COUNTING_GUEST = `
import nbd, struct, sys
disks = []
for uri in sys.argv[1:]:
    h = nbd.NBD()
    h.connect_uri(uri)
    disks.append(h)
n = 0
while True:
    n += 1
    for h in disks:
        h.pwrite(struct.pack("<Q", n) * 64, 0)
    if n == 2:
        print("writing", flush=True)
    if n % 50 == 0:
        print(n, flush=True)
`;
