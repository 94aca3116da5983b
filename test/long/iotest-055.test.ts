// QEMU's iotest 055, beside QEMU: drive-backup and blockdev-backup alone and in transactions are cancelled, paused, given
// speeds, compressed, and refused. What became of each of its cases: docs/qmp.md.
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { Judged, type Peer } from "../support/qmp-judge.js";
import { mustRun, scratchFolder, stopAll } from "../support/server.js";

const SIZE = 64 * 2 ** 20;
const COMMANDS = ["drive-backup", "blockdev-backup"] as const;
type Command = (typeof COMMANDS)[number];
const WAYS = COMMANDS.flatMap((command) => [
  { command, inTransaction: false },
  { command, inTransaction: true },
]);
type Way = (typeof WAYS)[number];

let judged: Judged;
let id: string;
let count = 0;

beforeAll(async () => {
  judged = await Judged.start(scratchFolder(), SIZE);
  await judged.write(
    ...["write -P 0x11 0 64k", "write -P 0 64k 128k", "write -P 0x22 162k 32k", "write -P 0xd5 1M 32k"],
    ...["write -P 0xdc 32M 124k", "write -P 0x33 67043328 64k"],
  );
});
afterAll(async () => {
  await judged.close();
  await stopAll();
});
beforeEach(() => {
  id = `job${++count}`;
});
afterEach(async () => {
  expect((await judged.same("query-block-jobs")).return).toEqual([]);
});

/** The target is a file of the job's name: an image that is there already where the command asks for one. */
async function begin({ command, inTransaction }: Way, more: object = {}): Promise<void> {
  const isNode = command === "blockdev-backup";
  if (isNode) await judged.addTarget(id);
  const data = ({ folder }: Peer): object => ({
    ...{ "job-id": id, device: "disk", target: isNode ? id : join(folder, id), sync: "full" },
    ...more,
  });
  if (inTransaction) {
    await judged.same("transaction", (peer) => ({ actions: [{ type: command, data: data(peer) }] }));
  } else await judged.same(command, data);
}

async function end({ command }: { command: Command }): Promise<void> {
  await judged.untilJob(id, "gone");
  if (command === "blockdev-backup") await judged.same("blockdev-del", { "node-name": id });
}

async function cancel(way: { command: Command }): Promise<void> {
  await judged.same("block-job-cancel", { device: id });
  await end(way);
  expect(judged.sameEvents(id)).toEqual([
    ...["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"],
  ]);
}

async function offset({ client }: Peer): Promise<unknown> {
  const { return: jobs } = await client.ask({ execute: "query-block-jobs" });
  return (jobs as { offset: number }[])[0]?.offset;
}

/** Paused while it is held, and let go: what its workers had begun comes to its end, and nothing more is copied. */
async function pause(way: { command: Command }): Promise<void> {
  await judged.same("block-job-pause", { device: id });
  await judged.same("block-job-set-speed", { device: id, speed: 0 });
  await judged.untilJob(id, "paused");
  // Each of these takes longer than the whole job would.
  const rounds = async (): Promise<void> => {
    for (let round = 0; round < 5; round++) await judged.write("read 0 1M");
  };
  await rounds();
  const before = await Promise.all(judged.peers.map(offset));
  await rounds();
  expect(await Promise.all(judged.peers.map(offset))).toEqual(before);
  for (const done of before) expect(done).toBeLessThan(SIZE / 2);
  await judged.same("block-job-resume", { device: id });
  await end(way);
  for (const { folder, uri } of judged.peers) {
    await mustRun("qemu-img", "compare", "-f", "raw", uri, join(folder, id));
  }
}

describe.each(WAYS)("$command, in a transaction: $inTransaction", (way) => {
  it("is cancelled", async () => {
    await begin(way, { speed: 65_536 });
    await cancel(way);
  });

  it("is paused and resumed", async () => {
    await begin(way, { speed: 65_536, format: way.command === "drive-backup" ? "qcow2" : undefined });
    await pause(way);
  });
});

describe.each(COMMANDS)("%s has", (command) => {
  const way = { command, inTransaction: false };

  it("no speed unless it is given one", async () => {
    await begin(way, { "auto-finalize": false });
    await judged.untilJob(id, "pending");
    expect((await judged.same("query-block-jobs")).return).toMatchObject([{ device: id, speed: 0 }]);
    await judged.same("block-job-cancel", { device: id });
    await end(way);
  });

  it("the speed that it is given, first and last", async () => {
    await begin(way, { speed: 65_536 });
    for (const speed of [65_536, 8 << 10, 4 << 10]) {
      await judged.same("block-job-set-speed", { device: id, speed });
      for (const { client } of judged.peers) {
        const answer = await client.ask({ execute: "query-block-jobs" });
        expect(answer.return).toMatchObject([{ device: id, speed, type: "backup" }]);
      }
    }
    expect((await judged.same("block-job-set-speed", { device: id, speed: -1 })).error).toBeDefined();
    await cancel(way);
  });

  it("no negative speed", async () => {
    await judged.addTarget(`${id}-node`);
    const target = ({ folder }: Peer): string =>
      command === "drive-backup" ? join(folder, id) : `${id}-node`;
    const { error } = await judged.same(command, (peer) => ({
      ...{ "job-id": id, device: "disk", target: target(peer), sync: "full", speed: -1 },
    }));
    expect(error).toBeDefined();
  });
});

describe("compressed", () => {
  const existing = { format: "qcow2", mode: "existing" };
  const beginCompressed = async (command: Command, more: object = {}): Promise<void> => {
    if (command === "drive-backup") await judged.makeTarget(id);
    await begin(
      { command, inTransaction: false },
      { compress: true, ...(command === "drive-backup" && existing), ...more },
    );
  };

  it.each(COMMANDS)("%s comes to its end", async (command) => {
    await beginCompressed(command);
    await end({ command });
    const clusters: number[] = [];
    const forms: unknown[] = [];
    for (const { folder, uri } of judged.peers) {
      const image = join(folder, id);
      await mustRun("qemu-img", "compare", "-f", "raw", uri, image);
      const check = JSON.parse(await mustRun("qemu-img", "check", "--output=json", image)) as {
        "compressed-clusters"?: number;
      };
      const info = JSON.parse(await mustRun("qemu-img", "info", "--output=json", image)) as {
        "format-specific": { data: object };
      };
      clusters.push(check["compressed-clusters"] ?? 0);
      forms.push(info["format-specific"].data);
    }
    expect(forms[0]).toEqual(forms[1]);
    // All that has data. Of those that were written with zeroes QEMU compresses some, too.
    expect(clusters[0]).toBe(7);
    expect(clusters[1]).toBeGreaterThanOrEqual(7);
  });

  it.each(COMMANDS)("%s is cancelled", async (command) => {
    await beginCompressed(command, { speed: 65_536 });
    await cancel({ command });
  });

  it.each(COMMANDS)("%s is paused and resumed", async (command) => {
    await beginCompressed(command, { speed: 65_536 });
    await pause({ command });
  });
});

describe("refused", () => {
  const refused = async (data: (peer: Peer) => object, command: Command): Promise<void> => {
    const alone = (await judged.same(command, data)).error;
    expect(alone?.class).toBe("GenericError");
    for (const more of [[], [{ type: "abort", data: {} }]]) {
      const { error } = await judged.same("transaction", (peer) => ({
        actions: [{ type: command, data: data(peer) }, ...more],
      }));
      expect(error).toEqual(alone);
    }
  };
  const nodes = (device: string, target: string) => () => ({ "job-id": id, device, target, sync: "full" });

  it.each([SIZE / 2, SIZE * 2, SIZE + 512])("a target of %i bytes", async (sizeBytes) => {
    for (const format of ["raw", "qcow2"] as const) {
      const node = `${format}-${sizeBytes}`;
      await judged.addTarget(node, { format, sizeBytes });
      await refused(nodes("disk", node), "blockdev-backup");
      await judged.same("blockdev-del", { "node-name": node });
    }
  });

  it("an unknown node, and the source as the target", async () => {
    await judged.addTarget(`${id}-node`);
    for (const [device, target] of [
      ["nonexistent", "disk"],
      ["disk", "nonexistent"],
      ["nonexistent", "nonexistent"],
      ["nonexistent", `${id}-node`],
      ["disk", "disk"],
    ] as const) {
      await refused(nodes(device, target), "blockdev-backup");
    }
    const drive = ({ folder }: Peer) => ({ device: "nonexistent", target: join(folder, id), sync: "full" });
    await refused(drive, "drive-backup");
    await refused((peer) => ({ ...drive(peer), mode: "existing" }), "drive-backup");
  });

  it("an image that is not there, and a format that there is not", async () => {
    const drive = ({ folder }: Peer) => ({
      ...{ "job-id": id, device: "disk", target: join(folder, "none"), sync: "full" },
    });
    await refused((peer) => ({ ...drive(peer), mode: "existing" }), "drive-backup");
    await refused((peer) => ({ ...drive(peer), format: "spaghetti-noodles" }), "drive-backup");
  });
});
