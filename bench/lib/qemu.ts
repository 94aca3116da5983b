// qemu-storage-daemon in the guest benchmark, driven over QMP.
//
//   plain      guest ─► disk; blockdev-backup disk ─► target: the guest waits for the target
//   fleecing   guest ─► top ─► copy-before-write ─► disk, old data to a temporary qcow2 image;
//              blockdev-backup snapshot-access ─► target
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
import { Child, runProgram, waitForChild } from "./children.js";
import type { Contestant, RunningBackup, RunningServer, Setup } from "./contestant.js";

type Kind = "none" | "plain" | "tuned" | "fleecing";

const KIND_NAMES: Record<Kind, string> = {
  none: "no backup",
  plain: "blockdev-backup",
  tuned: "blockdev-backup, 16 workers, 16 MiB/s",
  fleecing: "fleecing",
};
/** What its users do who want the guest to feel less of it: many small steps at a time, and a limit. */
const TUNED = { speed: 16 * MiB, "x-perf": { "max-workers": 16, "max-chunk": 4 * MiB } };

const JOB_ID = "backup";
/** io_uring is QEMU's way to many requests at a time that has no thread for each. */
const DIRECT_OPTIONS = ",cache.direct=on,aio=io_uring";
const DIRECT_MEMBERS = { cache: { direct: true }, aio: "io_uring" };

export function qemu(kind: Kind): Contestant {
  return {
    name: `QEMU, ${KIND_NAMES[kind]}`,
    hasBackup: kind !== "none",
    start: (setup) => startDaemon(setup, kind),
  };
}

async function startDaemon(setup: Setup, kind: Kind): Promise<RunningServer> {
  const { disk, format, folder, direct } = setup;
  const [socket, qmp] = [join(folder, "nbd.sock"), join(folder, "qmp.sock")];
  const top = kind === "fleecing" ? "top" : "disk";
  const args = [
    ...[
      "--blockdev",
      `file,node-name=disk-file,filename=${disk},discard=unmap${direct ? DIRECT_OPTIONS : ""}`,
    ],
    ...["--blockdev", `${format},node-name=disk,file=disk-file,discard=unmap`],
    ...(kind === "fleecing" ? ["--blockdev", "raw,node-name=top,file=disk,discard=unmap"] : []),
    ...["--nbd-server", `addr.type=unix,addr.path=${socket},max-connections=16`],
    ...["--export", `nbd,id=export,node-name=${top},name=disk,writable=on`],
    ...["--chardev", `socket,id=qmp,path=${qmp},server=on,wait=off`],
    ...["--monitor", "chardev=qmp"],
  ];
  const child = new Child("qemu-storage-daemon", "qemu-storage-daemon", args);
  const client = await waitForChild(child, "QMP socket", () =>
    ControlClient.connect(qmp).catch(() => undefined),
  );
  const helpers: Child[] = [];
  return {
    child,
    socket,
    startBackup: () => startBackup(client, setup, kind, helpers),
    stop: async () => {
      client.close();
      await child.stop();
      await Promise.all(helpers.map((helper) => helper.stop()));
      if (setup.throttle.rbd !== undefined) await removeRbdImage(setup.throttle.rbd);
    },
  };
}

async function startBackup(
  client: ControlClient,
  setup: Setup,
  kind: Kind,
  helpers: Child[],
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
  if (kind === "fleecing") await startFleecing(client, setup, size);
  const end = jobEnd(client);
  const device = kind === "fleecing" ? "snapshot" : "disk";
  const startMs = performance.now();
  await client.execute("blockdev-backup", {
    "job-id": JOB_ID,
    device,
    target: "target",
    sync: "full",
    ...(kind === "tuned" && TUNED),
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

async function startFleecing(client: ControlClient, { folder, direct }: Setup, size: number): Promise<void> {
  const temporary = join(folder, "fleecing.qcow2");
  await runProgram("qemu-img", ["create", "-q", "-f", "qcow2", temporary, String(size)]);
  const file = { driver: "file", filename: temporary, ...(direct && DIRECT_MEMBERS) };
  await client.execute("blockdev-add", { driver: "qcow2", "node-name": "fleecing", file });
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
