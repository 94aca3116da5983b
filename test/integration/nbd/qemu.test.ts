// What QEMU exports for backups, pulled; and a live backup pushed to an export.
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { COWCATCHER_BIN, run } from "../../support/cli.js";
import {
  disk,
  fails,
  file,
  hasBegun,
  lastLine,
  sameBytes,
  SIZE,
  startBackup,
  startServer,
  succeeds,
} from "../../support/nbd-servers.js";
import { scratchFolder, stopAll } from "../../support/server.js";

afterEach(stopAll);

describe("QEMU's exports", () => {
  it("are pulled incrementally by a dirty bitmap, into an overlay", async () => {
    const folder = scratchFolder();
    const [image, full, overlay] = ["disk.qcow2", "full.qcow2", "inc.qcow2"].map((name) =>
      join(folder, name),
    );
    await run("qemu-img", ["convert", "-O", "qcow2", file(disk), image ?? ""]);
    await succeeds(["backup", "-q", image ?? "", full ?? ""]);
    await run("qemu-img", ["bitmap", "--add", image ?? "", "b1"]);
    const writes = ["write -P 3 70k 4k", "write -z 5M 64k", "write -P 4 6291000 456"];
    await run("qemu-io", ["-f", "qcow2", ...writes.flatMap((write) => ["-c", write]), image ?? ""]);
    const server = await startServer("qemu-nbd", (socket) => [
      ...["-t", "-r", "--shared=8", "-f", "qcow2", "-B", "b1", "-k", socket, image ?? ""],
    ]);
    const pull = ["backup", "--json", "--bitmap", "b1", "-b", full ?? "", "-B", "qcow2"];
    const summary = JSON.parse(await lastLine([...pull, server.uri, overlay ?? ""])) as {
      bytes_written: number;
    };
    expect(summary.bytes_written).toBeLessThanOrEqual(3 * 65_536);
    expect(await run("qemu-img", ["compare", server.uri, overlay ?? ""])).toMatchObject({ code: 0 });
    expect(await run("qemu-img", ["check", overlay ?? ""])).toMatchObject({ code: 0 });
    const args = [
      "backup",
      "--bitmap",
      "b2",
      "-b",
      full ?? "",
      "-B",
      "qcow2",
      server.uri,
      join(folder, "x.qcow2"),
    ];
    expect(await fails(args)).toContain("exports no dirty bitmap 'b2'");
  });

  it("of a fleecing are a source like any other", async () => {
    const folder = scratchFolder();
    const path = file(disk);
    const scratch = join(folder, "scratch.qcow2");
    await run("qemu-img", ["create", "-q", "-f", "qcow2", scratch, "6M"]);
    const node = (name: string, driver: string, rest: string): string[] => [
      "--blockdev",
      `driver=${driver},node-name=${name},${rest}`,
    ];
    const socket = join(folder, "nbd.sock");
    const guest = `nbd+unix:///guest?socket=${socket}`;
    const snapshot = await startServer(
      "qemu-storage-daemon",
      () => [
        ...node("disk", "raw", `file.driver=file,file.filename=${path}`),
        ...node("temp", "qcow2", `file.driver=file,file.filename=${scratch}`),
        ...node("cbw", "copy-before-write", "file=disk,target=temp"),
        ...node("t0", "snapshot-access", "file=cbw"),
        ...["--nbd-server", `addr.type=unix,addr.path=${socket},max-connections=16`],
        ...["--export", "type=nbd,id=e0,node-name=cbw,name=guest,writable=on"],
        ...["--export", "type=nbd,id=e1,node-name=t0,name=t0"],
      ],
      { socket, exportName: "t0" },
    );
    expect(await run("qemu-io", ["-f", "raw", "-c", "write -P 5 0 2M", guest])).toMatchObject({ code: 0 });
    const target = join(folder, "t0.qcow2");
    const copy = join(folder, "t0.raw");
    await succeeds(["backup", "-q", snapshot.uri, target]);
    await run("qemu-img", ["convert", "-O", "raw", target, copy]);
    expect(sameBytes(copy, disk)).toBe(true);
    expect(sameBytes(path, disk)).toBe(false);
  });
});

it("moves a live backup to an export, through its own server at both ends", async () => {
  const control = join(scratchFolder(), "ctl");
  const path = file(disk);
  const guest = await startServer(
    process.execPath,
    (socket) => [COWCATCHER_BIN, "serve", "--socket", socket, "--control", control, "-f", "raw", path],
    { exportName: "disk" },
  );
  const store = file(Buffer.alloc(SIZE, 0xee));
  const target = await startServer(
    process.execPath,
    (socket) => [COWCATCHER_BIN, "serve", "--socket", socket, "-f", "raw", store],
    { exportName: "disk" },
  );
  const backup = startBackup([
    "backup",
    "--json",
    "-p",
    "--rate-limit",
    "3M",
    "--verify",
    "--control",
    control,
    target.uri,
  ]);
  await hasBegun(backup);
  expect(await run("qemu-io", ["-f", "raw", "-c", "write -P 5 0 6M", guest.uri])).toMatchObject({ code: 0 });
  expect(await backup.ended).toMatchObject({ code: 0 });
  expect(sameBytes(store, disk)).toBe(true);
  expect(sameBytes(path, Buffer.alloc(SIZE, 5))).toBe(true);
});
