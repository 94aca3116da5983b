// --sync top: the backup has what the overlay itself allocates at T0, no more, and builds on what the overlay builds on.
// QEMU's own blockdev-backup says what that is.
import { copyFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../support/cli.js";
import { expectClean, expectSame, makeDisk, noise } from "../support/disks.js";
import { RawQmp } from "../support/raw-qmp.js";
import { leftovers, mustRun, Process, scratchFolder, Server, stopAll } from "../support/server.js";

const MiB = 2 ** 20;
const SIZE = 8 * MiB + 512;
let folder: string;

beforeEach(() => {
  folder = scratchFolder();
});
afterEach(stopAll);

const at = (name: string): string => join(folder, name);

interface Extent {
  start: number;
  length: number;
  depth: number;
  zero: boolean;
  data: boolean;
}

/** What each range of the image is, whatever place it has in a file; neighbours that are alike made one. */
async function layers(image: string): Promise<Extent[]> {
  const map = JSON.parse(await mustRun("qemu-img", "map", "--output=json", image)) as Extent[];
  const merged: Extent[] = [];
  for (const { start, length, depth, zero, data } of map) {
    const last = merged.at(-1);
    if (last?.depth === depth && last.zero === zero && last.data === data) last.length += length;
    else merged.push({ start, length, depth, zero, data });
  }
  return merged;
}

async function makeOverlay(options: string): Promise<string> {
  const base = await makeDisk(at("base.raw"), noise(SIZE));
  const overlay = at("overlay.qcow2");
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", "-o", options, overlay);
  const writes = [
    ...["write -P 1 100k 4k", "write -P 2 1M 300k", "write -z 2M 200k", "write -z -u 3M 64k"],
    ...["write -P 0 4M 128k", "write -P 3 8388608 512", "discard 5M 128k"],
  ];
  await mustRun("qemu-io", "-f", "qcow2", ...writes.flatMap((write) => ["-c", write]), overlay);
  return overlay;
}

/** Runs QEMU's job to its end. */
async function qemuBackup(source: string, target: string, options: string): Promise<void> {
  const below = ["-b", at("base.raw"), "-F", "raw"];
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", ...below, "-o", options, target);
  const node = (name: string, path: string): string[] => [
    "--blockdev",
    `driver=qcow2,node-name=${name},file.driver=file,file.filename=${path}`,
  ];
  const daemon = new Process("qemu-storage-daemon", [
    ...["--chardev", "stdio,id=q", "--monitor", "q"],
    ...node("source", source),
    ...node("target", target),
  ]);
  daemon.send('{"execute": "qmp_capabilities"}');
  const job = { "job-id": "job", device: "source", target: "target", sync: "top" };
  daemon.send(JSON.stringify({ execute: "blockdev-backup", arguments: job }));
  await daemon.line((line) => line.includes("BLOCK_JOB_COMPLETED"));
  daemon.send('{"execute": "quit"}');
  expect((await daemon.end()).code).toBe(0);
}

describe("offline", () => {
  it.each(["cluster_size=64k", "cluster_size=4k", "cluster_size=2M", "cluster_size=64k,extended_l2=on"])(
    "copies what QEMU's own job copies: %s",
    async (options) => {
      const overlay = await makeOverlay(options);
      // Both in clusters of 64K at least, as QEMU's and ours share that least unit.
      const clusterSize = options.includes("2M") ? "2M" : "64K";
      const args = [
        "backup",
        "-q",
        "--sync",
        "top",
        "--cluster-size",
        clusterSize,
        overlay,
        at("ours.qcow2"),
      ];
      expect(await cowcatcher(args)).toMatchObject({ code: 0, stderr: "" });
      await qemuBackup(overlay, at("qemu.qcow2"), `cluster_size=${clusterSize}`);
      await expectSame(overlay, at("ours.qcow2"));
      await expectClean(at("ours.qcow2"));
      const [ours, theirs] = [await layers(at("ours.qcow2")), await layers(at("qemu.qcow2"))];
      const ownBytes = (map: Extent[]): Extent[] => map.filter(({ depth }) => depth === 0);
      expect(ownBytes(ours).length).toBeGreaterThan(options.includes("2M") ? 1 : 3);
      // Zeroes among the data are left out here, and written there.
      const places = (map: Extent[]): [number, number][] => {
        const runs: [number, number][] = [];
        for (const { start, length } of ownBytes(map)) {
          const last = runs.at(-1);
          if (last !== undefined && last[0] + last[1] === start) last[1] += length;
          else runs.push([start, length]);
        }
        return runs;
      };
      expect(places(ours)).toEqual(places(theirs));
    },
  );

  it("builds on the source's backing file, by its absolute path, or on the one that is named", async () => {
    const overlay = await makeOverlay("cluster_size=64k");
    const backing = async (target: string, ...args: string[]): Promise<unknown> => {
      const run = await cowcatcher(["backup", "-q", "--sync", "top", ...args, "overlay.qcow2", target], {
        cwd: folder,
      });
      expect(run).toMatchObject({ code: 0, stderr: "" });
      await expectSame(overlay, at(target));
      const info = JSON.parse(await mustRun("qemu-img", "info", "--output=json", at(target))) as object;
      return "backing-filename" in info ? info["backing-filename"] : undefined;
    };
    expect(await backing("a.qcow2")).toBe(at("base.raw"));
    expect(await backing("b.qcow2", "-b", "base.raw", "-B", "raw")).toBe("base.raw");
    expect(await backing("c.qcow2", "-c", "zlib")).toBe(at("base.raw"));
  });

  it("of an image that stands alone is a copy of all that it allocates", async () => {
    const raw = await makeDisk(at("alone.raw"), noise(2 * MiB));
    await mustRun("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, at("alone.qcow2"));
    for (const [source, target] of [
      ["alone.raw", "copy.raw"],
      ["alone.qcow2", "copy.qcow2"],
    ] as const) {
      expect(await cowcatcher(["backup", "-q", "--sync", "top", at(source), at(target)])).toMatchObject({
        code: 0,
      });
      await expectSame(at("alone.raw"), at(target));
    }
  });

  it("is measured by what would be copied", async () => {
    const overlay = await makeOverlay("cluster_size=64k");
    const measured = async (...args: string[]): Promise<{ required: number; full: number }> => {
      const { stdout } = await cowcatcher(["backup", "--dry-run", "--json", ...args, overlay, at("t.qcow2")]);
      const answer = JSON.parse(stdout) as { required: number; "fully-allocated": number };
      return { required: answer.required, full: answer["fully-allocated"] };
    };
    const own = (await layers(overlay)).filter(({ depth, data }) => depth === 0 && data);
    const wholeClusters = (bytes: number): number => Math.ceil(bytes / 65_536) * 65_536;
    const ownBytes = own.reduce((sum, { length }) => sum + wholeClusters(length), 0);
    expect(ownBytes).toBeGreaterThan(0);
    const { required, full } = await measured("--sync", "top");
    expect(required).toBe(full - wholeClusters(SIZE) + ownBytes);
    expect(await measured("--sync", "top", "-b", at("base.raw"), "-B", "raw")).toEqual({ required, full });
    expect((await measured()).required).toBeGreaterThan(required);
  });

  it.each(["cluster_size=4k", "cluster_size=2M,extended_l2=on"])(
    "of an overlay with %s is never measured as less than it comes to",
    async (options) => {
      const overlay = await makeOverlay(options);
      const args = ["--sync", "top", "--cluster-size", "4K", overlay, at("t.qcow2")];
      const { stdout } = await cowcatcher(["backup", "--dry-run", "--json", ...args]);
      const { required } = JSON.parse(stdout) as { required: number };
      expect(await cowcatcher(["backup", "-q", ...args])).toMatchObject({ code: 0, stderr: "" });
      expect(required).toBeGreaterThanOrEqual(statSync(at("t.qcow2")).size);
      expect(required).toBeLessThan(SIZE);
    },
  );

  it.each([
    [["t.raw"], /t\.raw: a raw target cannot build on the source's backing file/],
    [["--verify", "t.qcow2"], /--verify: a copy of the top layer alone/],
    [["--bitmap", "b", "t.qcow2"], /--bitmap: does not go with --sync top/],
    [["-b", "overlay.qcow2", "-B", "raw", "overlay.qcow2"], /overlay\.qcow2/],
  ])("refuses %s", async (args, message) => {
    await makeOverlay("cluster_size=64k");
    const target = args.at(-1) ?? "";
    const run = await cowcatcher(["backup", "--sync", "top", ...args.slice(0, -1), "overlay.qcow2", target], {
      cwd: folder,
    });
    expect(run.code).not.toBe(0);
    expect(run.stderr).toMatch(message);
    expect(leftovers(folder)).toEqual([]);
  });
});

describe("live", () => {
  it.each([
    ["buffered", "cluster_size=64k", []],
    ["that spills", "cluster_size=64k", ["--cow-buffer-size", "64K"]],
    ["without a buffer", "cluster_size=64k", ["--cow-buffer-size", "0"]],
    ["of subclusters", "cluster_size=64k,extended_l2=on", []],
  ])("%s: has T0, in the clusters that T0 had", async (_name, options, args) => {
    const overlay = await makeOverlay(options);
    copyFileSync(overlay, at("t0.qcow2"));
    // However fast the machine, the guest writes before the sweep is through.
    const env = { COWCATCHER_FAULTS: "source-read:delay=20ms" };
    const server = await Server.start(folder, [overlay], { env });
    const guest = await server.guest(7);
    const backup = server.backup(at("target.qcow2"), "--sync", "top", "--rate-limit", "256K", ...args);
    await backup.started();
    guest.run();
    await guest.progress(args.includes("0") ? 5 : 60);
    const summary = await backup.release(server);
    if (!args.includes("0")) expect(summary.captures).toBeGreaterThan(0);
    await guest.pause();
    expect(await guest.verify()).toBe("same");
    await guest.dump(at("end"));
    await guest.quit();
    expect((await server.stop()).code).toBe(0);
    await expectSame(at("t0.qcow2"), at("target.qcow2"));
    await expectClean(at("target.qcow2"));
    await expectSame(at("end"), overlay);
    const own = (map: Extent[]): number[] => {
      const clusters = new Set<number>();
      for (const { start, length, depth } of map) {
        const last = Math.floor((start + length - 1) / 65_536);
        for (let cluster = Math.floor(start / 65_536); depth === 0 && cluster <= last; cluster++)
          clusters.add(cluster);
      }
      return [...clusters];
    };
    expect(own(await layers(at("target.qcow2")))).toEqual(own(await layers(at("t0.qcow2"))));
  });

  it("is asked for over the control socket as in QEMU", async () => {
    const overlay = await makeOverlay("cluster_size=64k");
    const server = await Server.start(folder, [overlay]);
    const client = await RawQmp.negotiated(server.control);
    const job = { device: "disk", target: at("q.qcow2"), format: "qcow2", sync: "top" };
    client.send(`${JSON.stringify({ execute: "drive-backup", arguments: job })}\n`);
    while ((await client.next()).event !== "BLOCK_JOB_COMPLETED");
    client.close();
    await server.stop();
    await expectSame(overlay, at("q.qcow2"));
    expect((await layers(at("q.qcow2"))).some(({ depth }) => depth === 1)).toBe(true);
  });
});
