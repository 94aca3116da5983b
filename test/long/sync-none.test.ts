// Sync mode `none` with a target, as QEMU's own users of it do: block/replication.c's hidden disk and image fleecing lay the
// target on the disk, and read both as one. Beside QEMU; byte by byte, between a guest's writes and after.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { noise } from "../support/disks.js";
import { startServer } from "../support/nbd-servers.js";
import { Judged, type Peer } from "../support/qmp-judge.js";
import { Random } from "../support/random.js";
import { mustRun, scratchFolder, stopAll } from "../support/server.js";

const MiB = 2 ** 20;
const SIZE = 32 * MiB;
const ROUNDS = 6;
let judged: Judged;
let random: Random;

beforeEach(async () => {
  random = new Random(7);
  const base = join(scratchFolder(), "base.raw");
  writeFileSync(base, noise(SIZE));
  judged = await Judged.start(scratchFolder(), SIZE, { backing: base });
  await judged.write(...guestWrites(20));
  for (const { folder, uri } of judged.peers) {
    await mustRun("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, join(folder, "then"));
  }
});
afterEach(async () => {
  await judged.close();
  await stopAll();
});

/** Data, zeroes and trims, of parts of clusters and of several. */
function guestWrites(count: number): string[] {
  return Array.from({ length: count }, () => {
    const offset = 512 * random.below(SIZE / 512 - 600);
    const length = 512 * (1 + random.below(random.chance(0.5) ? 16 : 500));
    if (random.chance(0.15)) return `write -z ${offset} ${length}`;
    if (random.chance(0.1)) return `discard ${offset} ${length}`;
    return `write -P ${1 + random.below(255)} ${offset} ${length}`;
  });
}

const compare = ({ folder }: Peer, image: string, format: string): Promise<string> =>
  mustRun("qemu-img", "compare", "-U", "-f", "raw", "-F", format, join(folder, "then"), image);

async function ownClusters(image: string): Promise<number[]> {
  const map = JSON.parse(await mustRun("qemu-img", "map", "-U", "--output=json", image)) as {
    start: number;
    length: number;
    depth: number;
    present: boolean;
  }[];
  return map
    .filter(({ depth, present }) => depth === 0 && present)
    .flatMap(({ start, length }) =>
      Array.from({ length: length / 65_536 }, (_, index) => start / 65_536 + index),
    );
}

async function end(id: string): Promise<void> {
  await judged.same("job-cancel", { id });
  await judged.untilJob(id, "gone");
  expect(judged.sameEvents(id)).toEqual([
    ...["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"],
  ]);
}

describe("an export that lies on the disk shows T0", () => {
  it.each([
    ["without a buffer", {}],
    ["at the end, with one", { "buffer-size": 4 * MiB }],
  ])("%s", async (_how, buffer) => {
    const { ours, theirs } = judged;
    const isWaiting = Object.keys(buffer).length === 0;
    // Ours goes to a server of its own, which reads what it has not from our export of the disk.
    const hidden = join(ours.folder, "hidden");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", ours.uri, "-F", "raw", hidden);
    const { uri, socket } = await startServer("qemu-nbd", (path) => [
      ...["-t", "--shared=8", "-f", "qcow2", "-k", path, hidden],
    ]);
    const server = { type: "unix", path: socket };
    const node = { driver: "nbd", "node-name": "hidden", server, export: "" };
    expect((await ours.client.ask({ execute: "blockdev-add", arguments: node })).error).toBeUndefined();
    const theirHidden = join(theirs.folder, "hidden");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", theirHidden, String(SIZE));
    const file = { driver: "file", filename: theirHidden };
    for (const [execute, args] of [
      ["blockdev-add", { driver: "qcow2", "node-name": "hidden", file, backing: "disk" }],
      ["block-export-add", { type: "nbd", id: "hidden", "node-name": "hidden", name: "hidden" }],
    ] as const) {
      expect((await theirs.client.ask({ execute, arguments: args })).error).toBeUndefined();
    }
    const views = [uri, theirs.uriOf("hidden")];
    await judged.same("blockdev-backup", (peer) => ({
      ...{ "job-id": "none", device: "disk", target: "hidden", sync: "none" },
      ...(peer === ours && buffer),
    }));
    for (let round = 0; round < ROUNDS; round++) {
      await judged.write(...guestWrites(60));
      // Between two writes: a read of the disk below that is under way while one comes may see that, in QEMU itself, too.
      for (const [at, peer] of judged.peers.entries()) {
        if (isWaiting || peer === theirs) await compare(peer, views[at] ?? "", "raw");
      }
    }
    await end("none");
    for (const [at, peer] of judged.peers.entries()) await compare(peer, views[at] ?? "", "raw");
    for (const { uri: disk } of judged.peers) {
      // The guest has written all the while.
      const then = join(ours.folder, "then");
      const { code } = await mustRun("qemu-img", "compare", "-f", "raw", "-F", "raw", then, disk).then(
        () => ({ code: 0 }),
        () => ({ code: 1 }),
      );
      expect(code).toBe(1);
    }
  });
});

describe("a qcow2 file has what was overwritten, and nothing else", () => {
  // Not trims: of the clusters that one touches in part QEMU takes none, ours takes them.
  const overwrites = (): string[] => guestWrites(20).filter((command) => !command.startsWith("discard"));

  it("alone", async () => {
    await judged.addTarget("alone");
    await judged.same("blockdev-backup", { "job-id": "a", device: "disk", target: "alone", sync: "none" });
    for (let round = 0; round < ROUNDS; round++) await judged.write(...overwrites());
    await end("a");
    await judged.same("blockdev-del", { "node-name": "alone" });
    const [our = "", their = ""] = judged.peers.map(({ folder }) => join(folder, "alone"));
    await mustRun("qemu-img", "compare", our, their);
    const clusters = await ownClusters(our);
    expect(clusters).toEqual(await ownClusters(their));
    expect(clusters.length).toBeGreaterThan(0);
    expect(clusters.length).toBeLessThan(SIZE / 65_536);
    for (const image of [our, their]) await mustRun("qemu-img", "check", "-q", image);
  });

  it.each(["blockdev-backup", "drive-backup"])("on the disk, by %s: the two are T0", async (command) => {
    const place = ({ folder }: Peer): string => join(folder, "hidden");
    if (command === "blockdev-backup") {
      for (const peer of judged.peers) {
        const below = ["-b", join(peer.folder, "disk"), "-F", "qcow2"];
        await mustRun("qemu-img", "create", "-q", "-u", "-f", "qcow2", ...below, place(peer), String(SIZE));
      }
      const target = (peer: Peer) => ({
        ...{ driver: "qcow2", "node-name": "hidden", file: { driver: "file", filename: place(peer) } },
        backing: "disk",
      });
      await judged.same("blockdev-add", (peer) => ({ ...target(peer), backing: "nope" }));
      await judged.same("blockdev-add", target);
    }
    await judged.same(command, (peer) => ({
      ...{ "job-id": "h", device: "disk", sync: "none" },
      ...(command === "blockdev-backup" ? { target: "hidden" } : { target: place(peer), format: "qcow2" }),
    }));
    for (let round = 0; round < ROUNDS; round++) await judged.write(...guestWrites(20));
    await end("h");
    if (command === "blockdev-backup") await judged.same("blockdev-del", { "node-name": "hidden" });
    for (const peer of judged.peers) {
      await compare(peer, place(peer), "qcow2");
      await mustRun("qemu-img", "check", "-q", "-U", place(peer));
    }
  });

  it("and an image that is laid on another disk that is served is refused", async () => {
    await judged.close();
    judged = await Judged.start(scratchFolder(), SIZE, { disks: ["disk", "other"] });
    const { ours } = judged;
    const target = join(ours.folder, "t");
    const below = ["-b", join(ours.folder, "other"), "-F", "qcow2"];
    await mustRun("qemu-img", "create", "-q", "-u", "-f", "qcow2", ...below, target, String(SIZE));
    for (const sync of ["none", "full"]) {
      const { error } = await ours.client.ask({
        execute: "drive-backup",
        arguments: { device: "disk", target, format: "qcow2", mode: "existing", sync },
      });
      expect(error?.desc).toMatch(/is served here and a guest may write it/);
    }
  });
});
