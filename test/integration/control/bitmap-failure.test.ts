// Incremental backups that fail on their way, as in QEMU's iotests 124 and 257: what is left in their bitmaps makes the next
// one whole.
import { join } from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { RawQmp } from "../../support/raw-qmp.js";
import { expectSame, makeDisk, noise } from "../../support/disks.js";
import { mustRun, scratchFolder, Server, stopAll, until } from "../../support/server.js";

const GRANULE = 65_536;
let folder: string;
let server: Server;
let client: RawQmp;
const at = (name: string): string => join(folder, name);

const DISKS = ["a", "b"] as const;
/** In each job, the first operation there. */
const FAULT = { COWCATCHER_FAULTS: "source-read:error=EIO,from=6M,to=7M,count=1" };

async function serve(env: Record<string, string>): Promise<void> {
  server = await Server.start(
    folder,
    DISKS.map((disk) => `${at(`${disk}.raw`)}=${disk}`),
    { env },
  );
  client = await RawQmp.negotiated(server.control);
}

/** Both disks have a full backup, and bitmaps since. */
beforeAll(async () => {
  folder = scratchFolder();
  for (const [seed, disk] of DISKS.entries()) {
    await makeDisk(at(`${disk}.raw`), noise(8 << 20, seed));
    await mustRun("qemu-img", "convert", "-O", "qcow2", at(`${disk}.raw`), at(`${disk}0.qcow2`));
  }
  await serve(FAULT);
  const bitmaps = DISKS.flatMap((node) => ["by", "always"].map((name) => ({ node, name })));
  await transaction(bitmaps.map((data) => ({ type: "block-dirty-bitmap-add", data })));
  await write("a", "write -P 1 1M 64k", "write -P 2 6M 64k");
  await write("b", "write -P 3 2M 128k");
});
afterAll(async () => {
  client.close();
  await stopAll();
});

async function ask(execute: string, args?: object): Promise<unknown> {
  const answer = await client.ask({ execute, arguments: args });
  expect(answer.error, execute).toBeUndefined();
  return answer.return;
}

/** In granules, of both disks. */
async function counts(name: string): Promise<(number | undefined)[]> {
  const blocks = (await ask("query-block")) as { "dirty-bitmaps": { name: string; count: number }[] }[];
  return blocks.map(({ "dirty-bitmaps": bitmaps }) => {
    const count = bitmaps.find((bitmap) => bitmap.name === name)?.count;
    return count === undefined ? undefined : count / GRANULE;
  });
}

async function place(name: string, backing?: string): Promise<void> {
  const below = backing === undefined ? [] : ["-b", backing, "-F", "qcow2"];
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", ...below, at(name), String(8 << 20));
  const file = { driver: "file", filename: at(name) };
  await ask("blockdev-add", { driver: "qcow2", "node-name": name.replace(".qcow2", ""), file });
}

const action = (device: string, target: string, more: object) => ({
  type: "blockdev-backup",
  data: { device, target, "job-id": target, "x-perf": { "max-workers": 1 }, ...more },
});

async function transaction(actions: object[], grouped = false): Promise<void> {
  const properties = { "completion-mode": grouped ? "grouped" : "individual" };
  await ask("transaction", { actions, properties });
  await until("the jobs are over", async () => ((await ask("query-jobs")) as unknown[]).length === 0);
}

/** Last events, by job. */
function ends(): Record<string, string | undefined> {
  return Object.fromEntries(
    client.messages.flatMap(({ event, data }) =>
      event === "BLOCK_JOB_COMPLETED" || event === "BLOCK_JOB_CANCELLED"
        ? [[String(data?.["device"]), data?.["error"] === undefined ? event : "failed"]]
        : [],
    ),
  );
}

const write = (disk: string, ...commands: string[]): Promise<string> =>
  mustRun("qemu-io", "-f", "raw", ...commands.flatMap((command) => ["-c", command]), server.uri(disk));

const incremental = { sync: "incremental", bitmap: "by" };
const always = { sync: "bitmap", bitmap: "always", "bitmap-mode": "always" };

it("a grouped transaction of which one fails keeps all its bitmaps", async () => {
  for (const disk of DISKS) await place(`${disk}1.qcow2`, at(`${disk}0.qcow2`));
  await transaction(
    [action("a", "a1", incremental), action("b", "b1", { ...incremental, speed: 4096 })],
    true,
  );
  expect(ends()).toMatchObject({ a1: "failed", b1: "BLOCK_JOB_CANCELLED" });
  expect(await counts("by")).toEqual([2, 2]);
});

it("by `always` the part that was copied is kept, and taken out of the bitmap", async () => {
  await place("part.qcow2", at("a0.qcow2"));
  await transaction([action("a", "part", always)]);
  expect(ends()).toMatchObject({ part: "failed" });
  expect(await counts("always")).toEqual([1, 2]);
  await mustRun("qemu-img", "check", "-q", at("part.qcow2"));
});

it("what is left in the bitmaps, through a restart, makes the next backups whole", async () => {
  client.close();
  await server.stop();
  await serve({});
  await write("a", "write -P 4 3M 4k");
  await place("rest.qcow2", at("part.qcow2"));
  await transaction([action("a", "rest", always)]);
  for (const disk of DISKS) await place(`${disk}2.qcow2`, at(`${disk}0.qcow2`));
  await transaction([action("a", "a2", incremental), action("b", "b2", incremental)], true);
  const completed = "BLOCK_JOB_COMPLETED";
  expect(ends()).toEqual({ rest: completed, a2: completed, b2: completed });
  expect(await counts("by")).toEqual([0, 0]);
  expect(await counts("always")).toEqual([0, 2]);
  await expectSame(at("a.raw"), at("rest.qcow2"));
  for (const disk of DISKS) await expectSame(at(`${disk}.raw`), at(`${disk}2.qcow2`));
});

it("grouped jobs wait for each other, and for job-finalize where one of them asks for it", async () => {
  for (const disk of DISKS) await place(`${disk}3.qcow2`);
  const statuses = async (): Promise<string[]> =>
    ((await ask("query-jobs")) as { status: string }[]).map(({ status }) => status);
  await ask("transaction", {
    actions: [
      action("a", "a3", { sync: "full", "auto-finalize": false }),
      action("b", "b3", { sync: "full", speed: 65_536 }),
    ],
    properties: { "completion-mode": "grouped" },
  });
  await until("the first waits", async () => (await statuses())[0] === "waiting");
  expect(await statuses()).toEqual(["waiting", "running"]);
  await ask("block-job-set-speed", { device: "b3", speed: 0 });
  await until("both are pending", async () => (await statuses()).every((status) => status === "pending"));
  await ask("job-finalize", { id: "b3" });
  await until("both are over", async () => (await statuses()).length === 0);
  expect(ends()).toMatchObject({ a3: "BLOCK_JOB_COMPLETED", b3: "BLOCK_JOB_COMPLETED" });
  for (const disk of DISKS) await expectSame(at(`${disk}.raw`), at(`${disk}3.qcow2`));
});
