// Tracked block devices: a clean end, kill -9, and what is noticed. Needs root.
import { execFileSync } from "node:child_process";
import { mkdirSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../support/cli.js";
import { noise } from "../support/disks.js";
import { mustRun, scratchFolder, Server, type ServerOptions, stopAll } from "../support/server.js";

const MiB = 2 ** 20;
const SIZE = 16 * MiB;
const isRoot = process.getuid?.() === 0;
let folder: string;
let server: Server;
const devices: string[] = [];

/** A loop device over a file of that content. tmpfs is no place for one: it has no O_DIRECT. */
function attach(name: string, content: Buffer): string {
  const file = join(folder, name);
  writeFileSync(file, content);
  truncateSync(file, SIZE);
  const device = execFileSync("losetup", ["--find", "--show", file], { encoding: "utf8" }).trim();
  devices.push(device);
  return device;
}

beforeEach(() => {
  folder = scratchFolder(tmpdir());
});
afterEach(async () => {
  await stopAll();
  for (const device of devices.splice(0)) execFileSync("losetup", ["--detach", device]);
});

async function start(served: readonly string[], { env = {}, args = [] }: ServerOptions = {}): Promise<void> {
  for (const name of ["nbd.sock", "control.sock"]) rmSync(join(folder, name), { force: true });
  mkdirSync(join(folder, "tracking"), { recursive: true });
  const tracked = ["-f", "raw", "--tracking-dir", join(folder, "tracking"), ...args];
  server = await Server.start(folder, served, { env, args: tracked });
}

async function stop(): Promise<void> {
  expect((await server.stop()).code).toBe(0);
}

async function write(disk: string, ...commands: string[]): Promise<void> {
  const args = commands.flatMap((command) => ["-c", command]);
  await mustRun("qemu-io", "-f", "raw", ...args, server.uri(disk));
}

async function changedBytes(): Promise<(number | undefined)[]> {
  const { stdout, code } = await cowcatcher(["checkpoints", "--json", "--control", server.control]);
  expect(code).toBe(0);
  return (JSON.parse(stdout) as { changed_bytes: number }[]).map((shown) => shown.changed_bytes);
}

const same = (a: string, b: string): Promise<string> =>
  mustRun("qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", a, b);

describe.skipIf(!isRoot)("a device", () => {
  const copy = (): string => join(folder, "copy.raw");
  const incremental = (...more: string[]) =>
    server.backup("--since", "daily", "--checkpoint", "daily", "--force", "-O", "raw", ...more, copy());

  /** With a full backup, a write since, and a clean end. */
  async function tracked(): Promise<string> {
    const device = attach("disk.raw", noise(SIZE));
    await start([`${device}=disk`]);
    await server.backup("--checkpoint", "daily", "-O", "raw", copy()).succeed();
    await write("disk", "write -P 1 1M 64k", "flush");
    await stop();
    return device;
  }

  async function expectLost(device: string, env: Record<string, string> = {}): Promise<void> {
    await start([`${device}=disk`], { env });
    expect(await changedBytes()).toEqual([]);
    const refused = await incremental().end();
    expect(refused.code).toBe(12);
    expect(refused.stderr).toContain("changed while no server kept track of it");
    expect(await incremental("--since-or-full").succeed()).toMatchObject({
      level: "full",
      bitmap_action: "invalid",
    });
    await same(device, copy());
  }

  it("is known again after a clean end, and exactly after kill -9", async () => {
    const device = await tracked();
    await start([`${device}=disk`]);
    expect(await changedBytes()).toEqual([65_536]);
    await write("disk", "write -P 2 2M 64k", "write -z 5M 128k");
    server.process.kill("SIGKILL");
    await server.process.end();
    await start([`${device}=disk`]);
    expect(await changedBytes()).toEqual([4 * 65_536]);
    expect(await incremental().succeed()).toMatchObject({ level: "incremental", bitmap_action: "used" });
    await same(device, copy());
  });

  it("that dd wrote behind our back is noticed", async () => {
    const device = await tracked();
    await mustRun("dd", "if=/dev/urandom", `of=${device}`, "bs=4k", "count=1", "seek=700", "conv=fsync");
    await expectLost(device);
  });

  it("is not known after another start of the system", async () => {
    const device = await tracked();
    await expectLost(device, { COWCATCHER_BOOT_ID: crypto.randomUUID() });
  });

  it("that is another one of the same size, in the same place, is noticed", async () => {
    const device = await tracked();
    execFileSync("losetup", ["--detach", device]);
    devices.pop();
    writeFileSync(join(folder, "other.raw"), noise(SIZE, 9));
    truncateSync(join(folder, "other.raw"), SIZE);
    execFileSync("losetup", [device, join(folder, "other.raw")]);
    devices.push(device);
    await expectLost(device);
  });
});
