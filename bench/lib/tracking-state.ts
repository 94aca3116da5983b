// What tracking takes besides the guest's time: a start after each kind of end, space, and an incremental backup.

import { readdirSync, rmSync, statSync } from "node:fs";
import { join } from "node:path";
import { GiB, KiB, TiB } from "../../src/units.js";
import { type Child, removeFolder, runProgram, scratchFolder } from "./children.js";
import { startCowcatcher, startServe } from "./cowcatcher.js";
import { makeRawDisk } from "./disks.js";
import { runFio } from "./fio.js";

const GRANULE_BYTES = 64 * KiB;

export interface StateResult {
  /** Seconds from the command to its first answer. */
  startSeconds: { withoutTracking: number; clean: number; killed: number; powerCut: number };
  activeBytes: number;
  /** Of epochs that are over, the largest file. */
  epochBytes: number;
  /** Of the epoch that is over. */
  dirtyGranules: number;
}

/** A disk of 1 TiB to which a guest has written all over. */
export async function measureState(parent: string, guestSeconds: number): Promise<StateResult> {
  const folder = scratchFolder(parent);
  const disk = join(folder, "disk.raw");
  const tracking = `${disk}.cowcatcher`;
  makeRawDisk(disk, TiB, 0);
  const serve = (args: string[] = [], boot?: string): Promise<Child> =>
    startServe({
      image: disk,
      format: "raw",
      socket: join(folder, "nbd.sock"),
      control: join(folder, "control.sock"),
      args,
      env: boot === undefined ? {} : { COWCATCHER_BOOT_ID: boot },
    });
  const timed = async (args?: string[], boot?: string): Promise<[Child, number]> => {
    const startMs = performance.now();
    const child = await serve(args, boot);
    return [child, (performance.now() - startMs) / 1000];
  };
  const kill = async (child: Child): Promise<void> => {
    child.process.kill("SIGKILL");
    await child.ended;
    for (const name of ["nbd.sock", "control.sock"]) rmSync(join(folder, name), { force: true });
  };
  const write = (): Promise<unknown> =>
    runFio(
      { name: "scattered", rw: "randwrite", blockSize: "4k", ioDepth: 32 },
      join(folder, "nbd.sock"),
      guestSeconds,
    );
  try {
    const [off, withoutTracking] = await timed(["--tracking", "off"]);
    await off.stop();
    const server = await serve([], "first");
    await checkpoint(folder, "one");
    await write();
    await checkpoint(folder, "two");
    await write();
    await server.stop();
    const [afterClean, clean] = await timed([], "first");
    await write();
    await kill(afterClean);
    const [afterKill, killed] = await timed([], "first");
    await write();
    await kill(afterKill);
    const sizes = readdirSync(tracking).map((name) => ({ name, bytes: statSync(join(tracking, name)).size }));
    const [afterCut, powerCut] = await timed([], "second");
    const changed = await checkpoints(folder);
    await afterCut.stop();
    const largest = (prefix: string): number =>
      Math.max(0, ...sizes.filter(({ name }) => name.startsWith(prefix)).map(({ bytes }) => bytes));
    return {
      startSeconds: { withoutTracking, clean, killed, powerCut },
      activeBytes: largest("active-"),
      epochBytes: largest("epoch-"),
      dirtyGranules: Math.round((changed.get("one") ?? NaN) / GRANULE_BYTES),
    };
  } finally {
    removeFolder(folder);
  }
}

/** By name, the bytes that have changed since. */
async function checkpoints(folder: string): Promise<Map<string, number>> {
  const args = ["checkpoints", "--json", "--control", join(folder, "control.sock")];
  const { stdout } = await startCowcatcher(args).ended;
  const list = JSON.parse(stdout) as { name: string; changed_bytes: number }[];
  return new Map(list.map(({ name, changed_bytes: bytes }) => [name, bytes]));
}

/** A backup of nothing but holes, for the sake of its T0. */
async function checkpoint(folder: string, name: string): Promise<void> {
  const args = ["backup", "--control", join(folder, "control.sock"), "null:", "--checkpoint", name, "-q"];
  const child = startCowcatcher(args);
  const { code, stderr } = await child.ended;
  if (code !== 0) throw new Error(`checkpoint ${name}: ${stderr}`);
}

export interface IncrementalResult {
  /** Seconds from the command to its end. */
  full: number;
  empty: number;
  incremental: number;
}

/** One in a hundred 64 KiB clusters of a disk of 4 GiB, scattered; and a backup of no changes, which is mere start. */
export async function measureIncremental(parent: string): Promise<IncrementalResult> {
  const folder = scratchFolder(parent);
  const disk = join(folder, "disk.raw");
  const control = join(folder, "control.sock");
  try {
    makeRawDisk(disk, 4 * GiB);
    await runProgram("sync", ["-d", disk]);
    const socket = join(folder, "nbd.sock");
    const server = await startServe({ image: disk, format: "raw", socket, control });
    const backup = async (target: string, ...args: string[]): Promise<number> => {
      const startMs = performance.now();
      const child = startCowcatcher(["backup", "--control", control, join(folder, target), "-q", ...args]);
      const { code, stderr } = await child.ended;
      if (code !== 0) throw new Error(`backup to ${target}: ${stderr}`);
      return (performance.now() - startMs) / 1000;
    };
    // The first one makes the buffer and starts threads.
    await backup("warm.qcow2", "-O", "qcow2");
    rmSync(join(folder, "warm.qcow2"));
    const full = await backup("full.qcow2", "-O", "qcow2", "--checkpoint", "base");
    const base = ["-O", "qcow2", "-b", join(folder, "full.qcow2"), "-B", "qcow2", "--since", "base"];
    const empty = await backup("empty.qcow2", ...base);
    await dirty(socket, 4 * GiB);
    const incremental = await backup("incremental.qcow2", ...base);
    await server.stop();
    return { full, empty, incremental };
  } finally {
    removeFolder(folder);
  }
}

async function dirty(socket: string, sizeBytes: number): Promise<void> {
  const commands: string[] = [];
  const step = 100;
  for (let granule = 0; granule < sizeBytes / GRANULE_BYTES; granule += step) {
    const offset = (granule + ((granule * 7) % step)) * GRANULE_BYTES;
    if (offset < sizeBytes) commands.push("-c", `write -P ${granule % 251} ${offset} ${GRANULE_BYTES}`);
  }
  await runProgram("qemu-io", ["-f", "raw", ...commands, `nbd+unix:///disk?socket=${socket}`]);
}
