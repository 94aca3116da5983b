// A live backup of disks with subclusters or an external data file: a server process, a guest over NBD that writes,
// trims and zeroes all through it, and QEMU as judge of both the disk and the copy.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { cowcatcher, run } from "../../support/cli.js";
import { expectClean, expectSame, makeDisk, noise } from "../../support/disks.js";
import { leftovers, mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

const SIZE = 8 * 1024 * 1024 + 512;
let folder: string;

beforeEach(() => {
  folder = scratchFolder();
});
afterEach(stopAll);

function at(name: string): string {
  return join(folder, name);
}

/** The options of the disk, which stands on a raw file of noise or holds it itself. */
async function makeFrom(options: string, isOverlay: boolean): Promise<string> {
  const base = await makeDisk(at("base.raw"), noise(SIZE));
  const disk = at("disk.qcow2");
  if (isOverlay) {
    const below = ["-b", base, "-F", "raw"];
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", ...below, "-o", options, disk, `${SIZE}`);
  } else {
    await mustRun("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options, base, disk);
  }
  return disk;
}

it.each([
  ["subclusters over a backing file", "cluster_size=64k,extended_l2=on", true],
  ["subclusters", "cluster_size=16k,extended_l2=on", false],
  ["a data file", "data_file=DATA", false],
  ["subclusters in a data file over a backing file", "extended_l2=on,data_file=DATA", true],
  ["a raw data file", "data_file=DATA,data_file_raw=on", false],
])("of a disk with %s shows T0", async (_name, options, isOverlay) => {
  const disk = await makeFrom(options.replace("DATA", at("data.img")), isOverlay);
  const server = await Server.start(folder, [disk]);
  const guest = await server.guest(SIZE);
  guest.run();
  await guest.progress(20);
  await guest.pause();
  await guest.dump(at("t0"));
  const backup = server.backup(at("target.qcow2"), "--rate-limit", "512K");
  await backup.started();
  guest.run();
  await guest.progress(60);
  const summary = await backup.release(server);
  expect(summary.captures).toBeGreaterThan(0);
  await guest.pause();
  expect(await guest.verify()).toBe("same");
  await guest.dump(at("end"));
  await guest.quit();
  expect((await server.stop()).code).toBe(0);
  await expectSame(at("t0"), at("target.qcow2"));
  await expectSame(at("end"), disk);
  await expectClean(disk);
  await expectClean(at("target.qcow2"));
  if (options.includes("data_file_raw")) {
    const data = readFileSync(at("data.img")).subarray(0, SIZE);
    expect(data.equals(readFileSync(at("end")).subarray(0, data.length))).toBe(true);
  }
  expect(leftovers(folder)).toEqual([]);
});

it.each([
  "extended_l2=on,cluster_size=32k",
  "data_file=DATA",
  "data_file=DATA,data_file_raw=on",
  "extended_l2=on,data_file=DATA,data_file_raw=on",
])("create -o %s makes what qemu-img makes, in its words", async (options) => {
  const made = async (isMine: boolean, name: string): Promise<string[]> => {
    const chosen = options.replace("DATA", `${name}.raw`);
    const args = ["create", "-f", "qcow2", "-o", chosen, `${name}.qcow2`, "5M"];
    const settings = { cwd: folder };
    const created = await (isMine ? cowcatcher(args, settings) : run("qemu-img", args, settings));
    const info = await run("qemu-img", ["info", `${name}.qcow2`], settings);
    const check = await run("qemu-img", ["check", `${name}.qcow2`], settings);
    expect(created.code).toBe(0);
    return [created.stdout, info.stdout, check.stdout].map((text) =>
      text
        .replaceAll(name, "NAME")
        .replace(/disk size: .*/, "")
        .trim(),
    );
  };
  expect(await made(true, "mine")).toEqual(await made(false, "theirs"));
});
