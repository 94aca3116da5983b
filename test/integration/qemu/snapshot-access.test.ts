// `backup --bitmap` from a snapshot-access export that allows no more than what the bitmap calls dirty: the layout
// that Proxmox hands to backup programs, here made by hand.
import { spawnSync } from "node:child_process";
import { copyFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { Qemu } from "../../support/qemu.js";
import { Backup, mustRun, scratchFolder, stopAll } from "../../support/server.js";

const hasQemu = spawnSync("qemu-system-x86_64", ["--version"]).status === 0;
const QDEV = "/machine/peripheral/vd0/virtio-backend";

describe.skipIf(!hasQemu)("backup --bitmap from QEMU's snapshot-access", () => {
  afterEach(stopAll);

  it.each(["with changes", "with an empty bitmap"])(
    "copies what is dirty and asks for nothing else, %s",
    async (state) => {
      const folder = scratchFolder();
      const qemu = await Qemu.start(folder);
      await qemu.fill();
      const base = join(folder, "base.img");
      copyFileSync(qemu.image(), base);
      await qemu.execute("block-dirty-bitmap-add", { node: "drive0", name: "b0" });
      if (state === "with changes") for (let i = 0; i < 20; i++) await qemu.writeSomewhere();
      const instant = qemu.writes.length;
      const uri = await exportSnapshot(qemu, folder);
      const target = join(folder, "incremental.qcow2");
      const running = new Backup(["--bitmap", "b0", "-b", base, "-B", "raw", uri, target]);
      for (let i = 0; i < 20; i++) await qemu.writeSomewhere();
      await running.succeed();
      const flat = join(folder, "flat.img");
      await mustRun("qemu-img", "convert", "-O", "raw", target, flat);
      expect(qemu.instantOf([flat], instant)).toBe(instant);
    },
  );
});

/** T0: nobody may read what the bitmap b0 calls clean. Returns the export's address. */
async function exportSnapshot(qemu: Qemu, folder: string): Promise<string> {
  const fleece = join(folder, "fleece.img");
  await mustRun("truncate", "-s", String(qemu.sizeBytes), fleece);
  const unmap = { discard: "unmap" };
  await qemu.execute("block-dirty-bitmap-disable", { node: "drive0", name: "b0" });
  await qemu.execute("blockdev-add", { driver: "file", "node-name": "fleece", filename: fleece, ...unmap });
  const bitmap = { node: "drive0", name: "b0" };
  const cbw = { driver: "copy-before-write", "node-name": "cbw", file: "drive0", target: "fleece", bitmap };
  await qemu.execute("blockdev-add", { ...cbw, "on-cbw-error": "break-snapshot", ...unmap });
  await qemu.execute("qom-set", { path: QDEV, property: "drive", value: "cbw" });
  await qemu.execute("blockdev-add", {
    driver: "snapshot-access",
    "node-name": "snap",
    file: "cbw",
    ...unmap,
  });
  const socket = join(folder, "nbd.sock");
  await qemu.execute("nbd-server-start", { addr: { type: "unix", data: { path: socket } } });
  const snapshot = { type: "nbd", id: "exp", "node-name": "snap", name: "disk", bitmaps: [bitmap] };
  await qemu.execute("block-export-add", snapshot);
  return `nbd+unix:///disk?socket=${socket}`;
}
