// backup --checkpoint and --since against a real server, through its clean end, kill -9, and writes behind its back.
import {
  appendFileSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  utimesSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { sampled } from "../../support/campaign.js";
import { cowcatcher } from "../../support/cli.js";
import { expectClean, expectSame, makeDisk, noise } from "../../support/disks.js";
import {
  mustRun,
  Process,
  scratchFolder,
  Server,
  stopAll,
  type Summary,
  until,
} from "../../support/server.js";

const MiB = 2 ** 20;
const SIZE = 16 * MiB;
let folder: string;
let server: Server;

const at = (name: string): string => join(folder, name);

interface Result extends Summary {
  level: string;
  bitmap_action: string;
  bitmap_reason?: string;
}

async function start(image: string, ...args: string[]): Promise<void> {
  server = await Server.start(folder, [image], { args });
}

async function backup(...args: string[]): Promise<Result> {
  return (await server.backup(...args).succeed()) as Result;
}

/** As the guest. */
async function write(...commands: string[]): Promise<void> {
  await mustRun("qemu-io", "-f", "raw", ...commands.flatMap((command) => ["-c", command]), server.uri());
}

async function checkpoints(): Promise<{ name: string; changed_bytes: number }[]> {
  const { code, stdout, stderr } = await cowcatcher(["checkpoints", "--json", "--control", server.control]);
  expect([stderr, code]).toEqual(["", 0]);
  return JSON.parse(stdout) as { name: string; changed_bytes: number }[];
}

/** What the record in the tracking folder says (docs/tracking.md, pulse). */
function isWriting(): boolean {
  return readFileSync(at("disk.raw.cowcatcher/pulse")).readUInt32LE(8) !== 0;
}

async function kill(): Promise<void> {
  server.process.kill("SIGKILL");
  await server.process.end();
}

beforeEach(() => {
  folder = scratchFolder();
});
afterEach(stopAll);

it.each(sampled(["disk.qcow2", "disk.raw"], 2))(
  "makes a chain of overlays of %s across runs of the server",
  async (name) => {
    const disk = await makeDisk(at(name), noise(SIZE));
    await start(disk);
    expect(await backup("--checkpoint", "daily", at("full.qcow2"))).toMatchObject({
      level: "full",
      bitmap_action: "new",
    });
    await write("write -P 7 1M 4k", "write -z 3M 128k", "discard 5M 64k", "flush");
    const overlay = ["-b", at("full.qcow2"), "-B", "qcow2", at("one.qcow2")];
    const one = await backup("--since", "daily", "--checkpoint", "daily", ...overlay);
    expect(one).toMatchObject({ level: "incremental", bitmap_action: "used" });
    expect(one.bytes_written).toBeLessThanOrEqual(4 * 65_536);
    await expectSame(disk, at("one.qcow2"));
    await write("write -P 9 7M 64k");
    expect((await server.stop()).code).toBe(0);
    await start(disk);
    expect(await checkpoints()).toMatchObject([{ name: "daily", changed_bytes: 65_536 }]);
    await write("write -P 3 9M 1k", "flush");
    const two = await backup("--since", "daily", "-b", at("one.qcow2"), "-B", "qcow2", at("two.qcow2"));
    expect(two).toMatchObject({ level: "incremental", bitmap_action: "used" });
    expect(two.bytes_written).toBe(2 * 65_536);
    await expectSame(disk, at("two.qcow2"));
    await expectClean(at("two.qcow2"));
  },
);

it("brings a raw copy up to date in place, and knows exactly what changed after kill -9", async () => {
  const disk = await makeDisk(at("disk.raw"), noise(SIZE));
  await start(disk);
  await backup("--checkpoint", "copy", at("copy.raw"));
  for (let round = 1; round <= 3; round++) {
    await write(`write -P ${round} ${round}M 4k`, `write -z ${round + 4}M 64k`);
    await kill();
    await start(disk);
    expect(await checkpoints()).toMatchObject([{ changed_bytes: 2 * 65_536 }]);
    const before = statSync(at("copy.raw")).ino;
    const result = await backup(
      "--since",
      "copy",
      "--checkpoint",
      "copy",
      "--force",
      "-O",
      "raw",
      at("copy.raw"),
    );
    expect(result).toMatchObject({ level: "incremental" });
    expect(statSync(at("copy.raw")).ino).toBe(before);
    await expectSame(disk, at("copy.raw"));
  }
});

it("a cancelled backup changes nothing: its predecessor still covers everything", async () => {
  const disk = await makeDisk(at("disk.raw"), noise(SIZE));
  await start(disk);
  await backup("--checkpoint", "daily", at("full.qcow2"));
  await write("write -P 1 4M 4M");
  const overlay = (name: string): string[] => ["-b", at("full.qcow2"), "-B", "qcow2", at(name)];
  const doomed = server.backup(
    "--rate-limit",
    "4K",
    "--since",
    "daily",
    "--checkpoint",
    "daily",
    ...overlay("no.qcow2"),
  );
  await server.jobs("cancel", await doomed.jobId());
  expect((await doomed.end()).code).toBe(1);
  await write("write -P 2 3M 64k");
  expect(await checkpoints()).toMatchObject([{ name: "daily", changed_bytes: 4 * MiB + 65_536 }]);
  expect(await backup("--since", "daily", ...overlay("one.qcow2"))).toMatchObject({ level: "incremental" });
  await expectSame(disk, at("one.qcow2"));
  expect(readdirSync(folder)).not.toContain("no.qcow2");
});

const BEHIND_OUR_BACK: Record<string, (disk: string) => void | Promise<unknown>> = {
  "a write": (disk) => void writeSync(openSync(disk, "r+"), "x", 12 * MiB),
  "a write whose time was set back": (disk) => {
    const { atime, mtime } = statSync(disk);
    writeSync(openSync(disk, "r+"), "x", 12 * MiB);
    utimesSync(disk, atime, mtime);
  },
  "a write through mmap": (disk) =>
    mustRun(
      "/usr/bin/python3",
      "-c",
      `import mmap; f=open("${disk}","r+b"); m=mmap.mmap(f.fileno(),0); m[12582912:12582913]=b"x"; m.flush()`,
    ),
  "a copy put back with cp -p": async (disk) => {
    await mustRun("cp", "-p", disk, `${disk}.old`);
    await mustRun("cp", "-p", `${disk}.old`, disk);
  },
  growth: (disk) => appendFileSync(disk, Buffer.alloc(65_536)),
};

it(`notices between two runs, says so, and copies all: ${Object.keys(BEHIND_OUR_BACK).join(", ")}`, async () => {
  const changes = Object.entries(BEHIND_OUR_BACK);
  const disks = await Promise.all(changes.map((_, n) => makeDisk(at(`disk${n}.raw`), noise(SIZE, n))));
  const served = disks.map((disk, n) => `${disk}=disk${n}`);
  const full = (n: number): string => at(`full${n}.qcow2`);
  server = await Server.start(folder, served);
  await backup("--checkpoint", "daily", ...disks.flatMap((_, n) => ["--disk", `disk${n}`, full(n)]));
  await server.stop();
  for (const [n, [, change]] of changes.entries()) await change(disks[n] ?? "");
  server = await Server.start(folder, served);
  for (const [n, [what]] of changes.entries()) {
    const args = ["--disk", `disk${n}`, "--since", "daily", "-b", full(n), "-B", "qcow2"];
    const refused = await cowcatcher(["backup", "--control", server.control, ...args, at("no.qcow2")]);
    expect(refused.code, what).toBe(12);
    expect(refused.stderr, what).toContain("changed while no server kept track of it");
    const result = await backup(...args, "--since-or-full", at(`all${n}.qcow2`));
    expect(result, what).toMatchObject({ level: "full", bitmap_action: "invalid" });
    await expectSame(disks[n] ?? "", at(`all${n}.qcow2`));
  }
});

it("notices a write that follows kill -9 at once, where the guest had been quiet", async () => {
  const disk = await makeDisk(at("disk.raw"), noise(SIZE));
  await start(disk);
  await backup("--checkpoint", "daily", at("full.qcow2"));
  await write("write -P 1 1M 64k");
  await until("the server says that the guest is quiet", () => !isWriting());
  await kill();
  await start(disk);
  expect(await checkpoints()).toMatchObject([{ name: "daily", changed_bytes: 65_536 }]);
  await write("write -P 2 2M 64k", "flush");
  await until("the server says that the guest is quiet", () => !isWriting());
  await kill();
  writeSync(openSync(disk, "r+"), "x", 12 * MiB);
  await start(disk);
  expect(await checkpoints()).toEqual([]);
  const refused = await server.backup("--since", "daily", "--force", "-O", "raw", at("copy.raw")).end();
  expect(refused.code).toBe(12);
  expect(refused.stderr).toContain("changed after the server that had it was gone");
});

it("goes on after kill -9 in the midst of writes", async () => {
  const disk = await makeDisk(at("disk.raw"), noise(SIZE));
  await start(disk);
  await backup("--checkpoint", "copy", at("copy.raw"));
  for (let round = 1; round <= 3; round++) {
    const guest = new Process("qemu-io", [
      ...[
        "-f",
        "raw",
        ...Array.from({ length: 500 }, (_, i) => ["-c", `write -P ${round} ${(i * 37) % 256}k 4k`]).flat(),
      ],
      server.uri(),
    ]);
    await until("the guest writes", isWriting);
    await kill();
    await guest.end();
    await start(disk);
    const result = await backup("--since", "copy", "--force", "-O", "raw", at("copy.raw"));
    expect(result).toMatchObject({ level: "incremental" });
    await expectSame(disk, at("copy.raw"));
  }
});

it("says which checkpoints there never were, and where nothing is tracked", async () => {
  const disk = await makeDisk(at("disk.raw"), noise(MiB));
  await start(disk);
  const missing = await server.backup("--since", "x", "--force", "-O", "raw", at("copy.raw")).end();
  expect([missing.code, missing.stderr.includes("there is no checkpoint 'x'")]).toEqual([12, true]);
  const none = await cowcatcher(["checkpoints", "delete", "x", "--control", server.control]);
  expect(none.code).toBe(12);
  await server.stop();
  await start(disk, "--tracking", "off");
  const off = await server.backup("--checkpoint", "x", at("full.qcow2")).end();
  expect([off.code, off.stderr.includes("does not track")]).toEqual([12, true]);
});
