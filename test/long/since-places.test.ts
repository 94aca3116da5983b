// Incremental backups over what holds the checkpoint's state: a raw file, a block device, an NBD export. What one that
// fails leaves, what one that is cancelled leaves, and several disks of one server. Needs root for the device.
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../support/cli.js";
import { makeDisk, noise } from "../support/disks.js";
import { qemuNbd } from "../support/nbd-servers.js";
import { prefixOf } from "../support/sequence.js";
import { Guest, mustRun, scratchFolder, Server, stopAll, type Summary } from "../support/server.js";

const MiB = 2 ** 20;
const SIZE = 16 * MiB;
const GRANULE = 65_536;
const isRoot = process.getuid?.() === 0;
const devices: string[] = [];
let folder: string;
let server: Server;

const at = (name: string): string => join(folder, name);

beforeEach(() => {
  // tmpfs is no place for a loop device: it has no O_DIRECT.
  folder = scratchFolder(tmpdir());
});
afterEach(async () => {
  await stopAll();
  for (const device of devices.splice(0)) execFileSync("losetup", ["--detach", device]);
});

async function serve(disks: readonly string[], faults?: string): Promise<void> {
  const env: Record<string, string> = faults === undefined ? {} : { COWCATCHER_FAULTS: faults };
  server = await Server.start(folder, disks, { env });
}

async function write(disk: string, ...commands: string[]): Promise<void> {
  const args = commands.flatMap((command) => ["-c", command]);
  await mustRun("qemu-io", "-f", "raw", ...args, server.uri(disk));
}

interface Shown {
  disk: string;
  name: string;
  uuid: string;
  t0: string;
  changed_bytes: number;
}

async function checkpoints(): Promise<Shown[]> {
  const { code, stdout } = await cowcatcher(["checkpoints", "--json", "--control", server.control]);
  expect(code).toBe(0);
  return JSON.parse(stdout) as Shown[];
}

const same = (a: string, b: string): Promise<string> =>
  mustRun("qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", a, b);

/** Full of what no backup has, so that nothing that was not written passes for a zero. */
function stale(name: string): string {
  writeFileSync(at(name), Buffer.alloc(SIZE, 0xee));
  return at(name);
}

const PLACES: Record<string, () => Promise<string> | string> = {
  "a raw file": () => stale("copy.raw"),
  "a loop device": () => {
    const file = stale("copy.img");
    const device = execFileSync("losetup", ["--find", "--show", file], { encoding: "utf8" }).trim();
    devices.push(device);
    return device;
  },
  "an NBD export": async () => (await qemuNbd(stale("copy.img"))).uri,
};

describe.each(Object.keys(PLACES).filter((place) => isRoot || !place.includes("device")))("%s", (place) => {
  const FAULT = "target-write:error=EIO,from=6M,to=7M";
  let target: string;
  let disk: string;
  const backup = (...more: string[]) =>
    server.backup(...more, "--checkpoint", "copy", "--force", "--target-retries", "0", "-O", "raw", target);

  async function again(faults?: string): Promise<void> {
    expect((await server.stop()).code).toBe(0);
    await serve([disk], faults);
  }

  async function incremental(): Promise<Summary> {
    const result = await backup("--since", "copy").succeed();
    expect(result).toMatchObject({ level: "incremental", bitmap_action: "used" });
    await same(server.uri(), target);
    expect(await checkpoints()).toMatchObject([{ name: "copy", changed_bytes: 0 }]);
    return result;
  }

  beforeEach(async () => {
    disk = await makeDisk(at("disk.raw"), noise(SIZE));
    target = (await PLACES[place]?.()) ?? "";
    await serve([disk]);
    await backup().succeed();
    await same(server.uri(), target);
  });

  it("is brought up to date in place: data, zeroes, trims, and nothing else is written", async () => {
    await write("disk", "write -P 1 1M 4k", "write -z 3M 128k", "discard 5M 64k", "flush");
    const { bytes_written: written } = await incremental();
    expect(written).toBeGreaterThan(0);
    expect(written).toBeLessThanOrEqual(4 * GRANULE);
  });

  it("and a backup that fails, or is cancelled, leaves the checkpoint as it was: the next one makes it good", async () => {
    await again(FAULT);
    await write("disk", "write -P 1 1M 1M", "write -P 2 6M 64k", "write -P 3 9M 1M");
    const before = await checkpoints();
    expect(before).toMatchObject([{ changed_bytes: 2 * MiB + GRANULE }]);
    const failed = await backup("--since", "copy").end();
    expect(failed.code).toBe(1);
    expect(failed.stderr).toContain("input/output error");
    expect(await checkpoints()).toEqual(before);
    await again();
    await write("disk", "write -P 4 12M 64k");
    const doomed = backup("--since", "copy", "--rate-limit", "4K");
    await server.jobs("cancel", await doomed.jobId());
    expect((await doomed.end()).code).toBe(1);
    await write("disk", "write -P 5 13M 64k");
    const [now] = await checkpoints();
    expect(now).toEqual({ ...before[0], changed_bytes: 2 * MiB + 3 * GRANULE });
    const { bytes_written: written } = await incremental();
    expect(written).toBe(2 * MiB + 3 * GRANULE);
  });
});

it("a failed and a cancelled overlay leave nothing, and the checkpoint as it was", async () => {
  const disk = await makeDisk(at("disk.raw"), noise(SIZE));
  await serve([disk], "source-read:error=EIO,from=6M,to=7M");
  const full = server.backup("--checkpoint", "daily", at("no.qcow2"));
  expect((await full.end()).code).toBe(1);
  expect(await checkpoints()).toEqual([]);
  await server.stop();
  await serve([disk]);
  await server.backup("--checkpoint", "daily", at("full.qcow2")).succeed();
  await server.stop();
  await serve([disk], "source-read:error=EIO,from=6M,to=7M");
  await write("disk", "write -P 1 6M 64k", "write -P 2 1M 64k");
  const before = await checkpoints();
  const overlay = ["--since", "daily", "--checkpoint", "daily", "-b", at("full.qcow2"), "-B", "qcow2"];
  expect((await server.backup(...overlay, at("no.qcow2")).end()).code).toBe(1);
  expect(await checkpoints()).toEqual(before);
  await server.stop();
  await serve([disk]);
  expect(await checkpoints()).toEqual(before);
  await server.backup(...overlay, at("one.qcow2")).succeed();
  await mustRun("qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2", disk, at("one.qcow2"));
  await expect(mustRun("ls", at("no.qcow2"))).rejects.toThrow();
});

describe("several disks of one server", () => {
  const NAMES = ["a", "b"] as const;
  const both = (...targets: string[]): string[] =>
    NAMES.flatMap((disk, index) => ["--disk", disk, targets[index] ?? ""]);

  it("have one checkpoint of one instant, and an incremental backup by it is of one instant, too", async () => {
    for (const disk of NAMES) await mustRun("qemu-img", "create", "-q", "-f", "raw", at(disk), String(SIZE));
    await serve(NAMES.map((disk) => `${at(disk)}=${disk}`));
    const uris = NAMES.map((disk) => server.uri(disk));
    const guest = await Guest.start("sequence", 1, uris);
    guest.run();
    await guest.progress(200);
    const copies = NAMES.map((disk) => at(`${disk}.copy`));
    const last = (): number =>
      prefixOf(
        copies.map((copy) => readFileSync(copy)),
        2,
      );
    const expectOne = async (): Promise<Shown[]> => {
      const shown = await checkpoints();
      expect(shown.map(({ disk, name }) => [disk, name])).toEqual(NAMES.map((disk) => [disk, "both"]));
      expect(new Set(shown.map(({ uuid }) => uuid)).size).toBe(1);
      expect(new Set(shown.map(({ t0 }) => t0)).size).toBe(1);
      return shown;
    };
    const backup = async (...more: string[]): Promise<number> => {
      const acknowledged = await guest.count();
      const args = ["--checkpoint", "both", "--force", "-O", "raw", ...both(...copies)];
      await server.backup(...more, ...args).succeed();
      expect(last()).toBeGreaterThanOrEqual(acknowledged);
      return last();
    };
    const first = await backup();
    const [before] = await expectOne();
    await guest.progress(200);
    expect(await backup("--since", "both")).toBeGreaterThan(first);
    const [after] = await expectOne();
    expect(after?.uuid).not.toBe(before?.uuid);
    await guest.quit();
  });
});
