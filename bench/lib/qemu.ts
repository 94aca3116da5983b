// qemu-storage-daemon in the guest benchmark, driven over QMP.
//
//   plain      guest ─► disk; blockdev-backup disk ─► target: the guest waits for the target
//   fleecing   guest ─► top ─► copy-before-write ─► disk, old data to a temporary qcow2 image;
//              blockdev-backup snapshot-access ─► target
//   pulled     the same, and qemu-img convert reads the snapshot from an export, as backup programs do
//
// `top` is a raw node that passes everything through; at T0 it is reopened on top of copy-before-write, so that the
// guest stays connected. The target is held back by QEMU's throttle filter, or by nbdkit's delay filter in front of
// the target's file.

import { closeSync, ftruncateSync, openSync, statSync } from "node:fs";
import { join } from "node:path";
import { ControlClient } from "../../src/qmp/client.js";
import { CowcatcherError } from "../../src/errors.js";
import { MiB } from "../../src/units.js";
import { createRbdImage, removeRbdImage } from "./ceph.js";
import { Child, childError, removeFolder, runProgram, scratchFolder, waitForChild } from "./children.js";
import type { Contestant, RunningBackup, RunningServer, Setup } from "./contestant.js";

type Kind = "none" | "plain" | "fleecing" | "pulled";

const KIND_NAMES: Record<Kind, string> = {
  none: "no backup",
  plain: "blockdev-backup",
  fleecing: "fleecing",
  pulled: "fleecing, pulled by qemu-img",
};
/** What a user sets who wants the guest to feel less of the backup. */
export interface QemuTuning {
  /** For the table. */
  name: string;
  /** x-perf: requests of the job in flight. QEMU's default is 64. */
  workerCount: number;
  /** x-perf: of one request at most. QEMU chooses without. */
  maxChunkBytes?: number;
  /** `speed` of the job, which the guest's own copy-before-write is not subject to. */
  speed?: number;
  /** `speed` as a part of the target's rate, where the target has one. */
  speedShare?: number;
  /** Of fleecing: the temporary image is raw, without tables to keep, and in memory. */
  isImageInMemory?: boolean;
}

/** The job has one request in the target's queue, so that a guest's waits behind one. */
export const ONE_WORKER: QemuTuning = { name: "1 worker", workerCount: 1 };
/** The job leaves the guest a tenth of the target at all times. */
export const BELOW_TARGET: QemuTuning = {
  name: "8 workers, 0.9 of the rate",
  workerCount: 8,
  speedShare: 0.9,
};
/** For a target whose rate nobody knows. */
export const SMALL_STEPS: QemuTuning = {
  name: "16 workers, 16 MiB/s",
  workerCount: 16,
  speed: 16 * MiB,
  maxChunkBytes: 4 * MiB,
};
/**
 * A raw image in memory, and few requests a little below the target's rate. (`min-cluster-size` came with QEMU 9.2;
 * `cbw-timeout` and `on-cbw-error` bear on an image that fails, not on one that is slow, and stay as they are.)
 */
export const MEMORY_IMAGE: QemuTuning = {
  name: "raw image in memory, 8 workers, 0.9 of the rate",
  workerCount: 8,
  speedShare: 0.9,
  isImageInMemory: true,
};

function jobOptions(tuning: QemuTuning | undefined, { throttle }: Setup): Record<string, unknown> {
  if (tuning === undefined) return {};
  const { workerCount, maxChunkBytes, speedShare } = tuning;
  const rate = throttle.bytesPerSecond;
  const speed =
    tuning.speed ??
    (speedShare !== undefined && rate !== undefined ? Math.floor(rate * speedShare) : undefined);
  return {
    ...(speed !== undefined && { speed }),
    "x-perf": {
      "max-workers": workerCount,
      ...(maxChunkBytes !== undefined && { "max-chunk": maxChunkBytes }),
    },
  };
}

const JOB_ID = "backup";
const MEMORY_FOLDER = "/dev/shm";
const STAT_BLOCK_BYTES = 512;
/** io_uring is QEMU's way to many requests at a time that has no thread for each. */
const DIRECT_OPTIONS = ",cache.direct=on,aio=io_uring";
const DIRECT_MEMBERS = { cache: { direct: true }, aio: "io_uring" };

export function qemu(kind: Kind, tuning?: QemuTuning): Contestant {
  return {
    name: `QEMU, ${KIND_NAMES[kind]}${tuning === undefined ? "" : `, tuned: ${tuning.name}`}`,
    hasBackup: kind !== "none",
    start: (setup) => startContestant(setup, kind, tuning),
  };
}

export interface Daemon {
  child: Child;
  client: ControlClient;
  /** Its NBD server's. */
  socket: string;
  /** Of a monitor that nobody uses yet. */
  monitor: string;
  stop(): Promise<void>;
}

/**
 * The guest's export stands on the disk's node, or on a raw node `top` above it.
 * @throws CowcatcherError
 */
export async function startDaemon(setup: Setup, hasTop: boolean): Promise<Daemon> {
  const { disk, format, folder, direct } = setup;
  const socket = join(folder, "nbd.sock");
  const [qmp, monitor] = [join(folder, "qmp.sock"), join(folder, "qmp2.sock")];
  const top = hasTop ? "top" : "disk";
  const args = [
    ...[
      "--blockdev",
      `file,node-name=disk-file,filename=${disk},discard=unmap${direct ? DIRECT_OPTIONS : ""}`,
    ],
    ...["--blockdev", `${format},node-name=disk,file=disk-file,discard=unmap`],
    ...(hasTop ? ["--blockdev", "raw,node-name=top,file=disk,discard=unmap"] : []),
    ...["--nbd-server", `addr.type=unix,addr.path=${socket},max-connections=16`],
    ...["--export", `nbd,id=export,node-name=${top},name=disk,writable=on`],
    ...["--chardev", `socket,id=qmp,path=${qmp},server=on,wait=off`],
    ...["--monitor", "chardev=qmp"],
    ...["--chardev", `socket,id=qmp2,path=${monitor},server=on,wait=off`],
    ...["--monitor", "chardev=qmp2"],
  ];
  const child = new Child("qemu-storage-daemon", "qemu-storage-daemon", args);
  const client = await waitForChild(child, "QMP socket", () =>
    ControlClient.connect(qmp).catch(() => undefined),
  );
  const stop = async (): Promise<void> => {
    client.close();
    await child.stop();
  };
  return { child, client, socket, monitor, stop };
}

function isFleecing(kind: Kind): boolean {
  return kind === "fleecing" || kind === "pulled";
}

async function startContestant(
  setup: Setup,
  kind: Kind,
  tuning: QemuTuning | undefined,
): Promise<RunningServer> {
  const daemon = await startDaemon(setup, isFleecing(kind));
  const { child, socket } = daemon;
  const helpers: Child[] = [];
  // In memory, whatever the disks stand on.
  const imageFolder = tuning?.isImageInMemory === true ? scratchFolder(MEMORY_FOLDER) : undefined;
  return {
    child,
    place: socket,
    startBackup: () =>
      kind === "pulled"
        ? startPull(daemon, setup)
        : startBackup(daemon.client, setup, { kind, tuning, imageFolder, helpers }),
    stop: async () => {
      await daemon.stop();
      await Promise.all(helpers.map((helper) => helper.stop()));
      if (imageFolder !== undefined) removeFolder(imageFolder);
      if (setup.throttle.rbd !== undefined) await removeRbdImage(setup.throttle.rbd);
    },
    ...(isFleecing(kind) && { fleeceBytes: () => diskUsage(fleecingImage(setup, imageFolder)) }),
  };
}

/** What a file takes up on its file system; 0: it is not there. */
export function diskUsage(path: string): number {
  return (statSync(path, { throwIfNoEntry: false })?.blocks ?? 0) * STAT_BLOCK_BYTES;
}

function fleecingImage({ folder }: Setup, imageFolder?: string): string {
  return imageFolder === undefined ? join(folder, "fleecing.qcow2") : join(imageFolder, "fleecing.raw");
}

/** The target is held back by the reader's own limit. */
async function startPull({ client, socket }: Daemon, setup: Setup): Promise<RunningBackup> {
  const target = join(setup.folder, "target.raw");
  await startFleecing(client, setup, await virtualSize(setup));
  const node = { "node-name": "snapshot", name: "snapshot", writable: false };
  await client.execute("block-export-add", { type: "nbd", id: "snapshot", ...node });
  const { bytesPerSecond } = setup.throttle;
  const rate = bytesPerSecond === undefined ? [] : ["-r", String(bytesPerSecond)];
  const startMs = performance.now();
  const uri = `nbd+unix:///snapshot?socket=${socket}`;
  const convert = new Child("qemu-img", "qemu-img", [
    "convert",
    ...rate,
    "-f",
    "raw",
    "-O",
    "raw",
    uri,
    target,
  ]);
  let isCancelled = false;
  const ended = convert.ended.then(async ({ code }) => {
    if (isCancelled) return undefined;
    if (code !== 0) throw childError(convert, `exit code ${code}`);
    await runProgram("sync", ["-d", target]);
    return (performance.now() - startMs) / 1000;
  });
  ended.catch(() => undefined);
  return {
    copier: convert,
    ended,
    cancel: async () => {
      isCancelled = true;
      await convert.stop();
    },
  };
}

interface BackupPlan {
  kind: Kind;
  tuning: QemuTuning | undefined;
  /** For a raw temporary image; undefined: a qcow2 one beside the disk. */
  imageFolder: string | undefined;
  /** Processes that end with the daemon; filled in here. */
  helpers: Child[];
}

async function startBackup(
  client: ControlClient,
  setup: Setup,
  { kind, tuning, imageFolder, helpers }: BackupPlan,
): Promise<RunningBackup> {
  const size = await virtualSize(setup);
  const target = join(setup.folder, "target.raw");
  const { rbd } = setup.throttle;
  if (rbd === undefined) {
    const fd = openSync(target, "wx");
    ftruncateSync(fd, size);
    closeSync(fd);
    await addTarget(client, setup, target, helpers);
  } else {
    await createRbdImage(rbd, size);
    await client.execute("blockdev-add", { driver: "rbd", "node-name": "target", ...rbd });
  }
  if (kind === "fleecing") await startFleecing(client, setup, size, imageFolder);
  const end = jobEnd(client);
  const device = kind === "fleecing" ? "snapshot" : "disk";
  const startMs = performance.now();
  await client.execute("blockdev-backup", {
    "job-id": JOB_ID,
    device,
    target: "target",
    sync: "full",
    ...jobOptions(tuning, setup),
  });
  return {
    ended: end.then(async (isComplete) => {
      if (!isComplete) return undefined;
      // QEMU's job ends with its data in the page cache; cowcatcher's ends synced.
      if (rbd === undefined) await runProgram("sync", ["-d", target]);
      // Closing it flushes librbd's cache.
      else await client.execute("blockdev-del", { "node-name": "target" });
      return (performance.now() - startMs) / 1000;
    }),
    cancel: async () => {
      await client.execute("block-job-cancel", { device: JOB_ID, force: true }).catch(() => undefined);
      await end;
    },
  };
}

async function virtualSize({ disk, format }: Setup): Promise<number> {
  if (format === "raw") return statSync(disk).size;
  // The daemon has the image open for writing; its size does not change.
  const { stdout } = await runProgram("qemu-img", ["info", "-U", "--output=json", "-f", format, disk]);
  return (JSON.parse(stdout) as { "virtual-size": number })["virtual-size"];
}

async function addTarget(client: ControlClient, setup: Setup, path: string, helpers: Child[]): Promise<void> {
  const { throttle, folder, direct } = setup;
  let file: Record<string, unknown> = { driver: "file", filename: path, ...(direct && DIRECT_MEMBERS) };
  if (throttle.writeDelayMs !== undefined) {
    const socket = join(folder, "target.sock");
    const args = [
      "-f",
      "-U",
      socket,
      "--filter=delay",
      "file",
      path,
      `delay-write=${throttle.writeDelayMs}ms`,
    ];
    const nbdkit = new Child("nbdkit", "nbdkit", args);
    helpers.push(nbdkit);
    await waitForChild(nbdkit, "socket", () => statSync(socket, { throwIfNoEntry: false }));
    file = { driver: "nbd", server: { type: "unix", path: socket }, export: "" };
  }
  const limits = throttle.bytesPerSecond === undefined ? {} : { "bps-write": throttle.bytesPerSecond };
  await client.execute("object-add", { "qom-type": "throttle-group", id: "target-limit", limits });
  const node = { driver: "throttle", "node-name": "target", "throttle-group": "target-limit", file };
  await client.execute("blockdev-add", node);
}

async function startFleecing(
  client: ControlClient,
  setup: Setup,
  size: number,
  imageFolder?: string,
): Promise<void> {
  const format = imageFolder === undefined ? "qcow2" : "raw";
  const temporary = fleecingImage(setup, imageFolder);
  await runProgram("qemu-img", ["create", "-q", "-f", format, temporary, String(size)]);
  // tmpfs knows O_DIRECT only since Linux 6.6, and nothing is gained by it there.
  const members = setup.direct && imageFolder === undefined ? DIRECT_MEMBERS : {};
  const file = { driver: "file", filename: temporary, ...members };
  await client.execute("blockdev-add", { driver: format, "node-name": "fleecing", file });
  await client.execute("blockdev-add", {
    driver: "copy-before-write",
    "node-name": "cbw",
    file: "disk",
    target: "fleecing",
  });
  const top = { driver: "raw", "node-name": "top", file: "cbw", discard: "unmap" };
  await client.execute("blockdev-reopen", { options: [top] });
  await client.execute("blockdev-add", { driver: "snapshot-access", "node-name": "snapshot", file: "cbw" });
}

/** True if the job completes, false if it is cancelled. @throws CowcatcherError if it fails. */
function jobEnd(client: ControlClient): Promise<boolean> {
  const end = new Promise<boolean>((resolve, reject) => {
    client.onLoss(reject);
    client.onEvent(({ event, data }) => {
      if (data["device"] !== JOB_ID) return;
      if (event === "BLOCK_JOB_CANCELLED") resolve(false);
      if (event !== "BLOCK_JOB_COMPLETED") return;
      const problem = data["error"];
      if (typeof problem !== "string") resolve(true);
      else reject(new CowcatcherError({ code: "IO", object: "blockdev-backup", problem }));
    });
  });
  // Who starts the job may fail before it waits for the end.
  end.catch(() => undefined);
  return end;
}
