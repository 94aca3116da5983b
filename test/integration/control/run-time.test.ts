// What joins and leaves a running server: disks, their exports, and the T0 view of a job with its bitmaps, read by the tools
// that pull backups.
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { RawQmp } from "../../support/raw-qmp.js";
import { expectSame, makeDisk, noise } from "../../support/disks.js";
import { mustRun, Process, scratchFolder, Server, stopAll, until } from "../../support/server.js";

const MiB = 2 ** 20;
const SIZE = 8 * MiB;
let folder: string;
let server: Server;
let client: RawQmp;
const at = (name: string): string => join(folder, name);

beforeEach(async () => {
  folder = scratchFolder();
  server = await Server.start(folder, [await makeDisk(at("disk.raw"), noise(SIZE))]);
  client = await RawQmp.negotiated(server.control);
});
afterEach(async () => {
  client.close();
  await stopAll();
});

async function ask(execute: string, args?: object): Promise<unknown> {
  const answer = await client.ask({ execute, arguments: args });
  expect(answer.error, execute).toBeUndefined();
  return answer.return;
}

async function refusal(execute: string, args: object): Promise<string | undefined> {
  return (await client.ask({ execute, arguments: args })).error?.desc;
}

const write = (name: string, ...commands: string[]): Promise<string> =>
  mustRun("qemu-io", "-f", "raw", ...commands.flatMap((command) => ["-c", command]), server.uri(name));

const exportIds = async (): Promise<string[]> =>
  ((await ask("query-block-exports")) as { id: string }[]).map(({ id }) => id).sort();

/** Offsets and lengths of what the bitmap of the export calls dirty, in 64 KiB. */
async function dirty(name: string, bitmap: string): Promise<[number, number][]> {
  const map = `--map=qemu:dirty-bitmap:${bitmap}`;
  const runs = JSON.parse(await mustRun("nbdinfo", "--json", map, server.uri(name))) as {
    offset: number;
    length: number;
    type: number;
  }[];
  return runs
    .filter(({ type }) => type === 1)
    .map(({ offset, length }) => [offset / 65_536, length / 65_536]);
}

it("a job's T0 view has the disk's bitmaps as of T0, and can be exported again with some of them", async () => {
  await ask("block-dirty-bitmap-add", { node: "disk", name: "weekly" });
  await write("disk", "write 0 64k", "write 1M 128k");
  await ask("block-dirty-bitmap-add", { node: "disk", name: "daily" });
  await write("disk", "write 4M 4k");
  await ask("drive-backup", { device: "disk", "job-id": "view", target: "null:", sync: "none" });
  await write("disk", "write 2M 1M");
  expect(await dirty("disk-snapshot", "daily")).toEqual([[64, 1]]);
  expect(await dirty("disk-snapshot", "weekly")).toEqual([
    [0, 1],
    [16, 2],
    [64, 1],
  ]);
  const pull = { type: "nbd", id: "pull", "node-name": "disk-snapshot", name: "pull", bitmaps: ["daily"] };
  expect(await refusal("block-export-add", { ...pull, bitmaps: ["none"] })).toBe(
    "Bitmap 'none' is not found",
  );
  expect(await refusal("block-export-add", { ...pull, writable: true })).toBe(
    "Cannot export read-only node as writable",
  );
  await ask("block-export-add", pull);
  expect(await refusal("block-export-add", pull)).toBe("Block export id 'pull' is already in use");
  expect(await refusal("block-export-add", { ...pull, id: "p2" })).toBe(
    "NBD server already has export named 'pull'",
  );
  const map = await mustRun(
    "qemu-img",
    ...["map", "--output=json", "--image-opts"],
    `driver=nbd,export=pull,server.type=unix,server.path=${server.socket},x-dirty-bitmap=qemu:dirty-bitmap:daily`,
  );
  // QEMU shows what is dirty as what is not there.
  const runs = JSON.parse(map) as { start: number; length: number; data: boolean }[];
  expect(runs.filter(({ data }) => !data).map(({ start, length }) => [start, length])).toEqual([
    [4 * MiB, 65_536],
  ]);
  const { exports } = JSON.parse(await mustRun("nbdinfo", "--json", server.uri("pull"))) as {
    exports: { contexts: string[] }[];
  };
  expect(exports[0]?.contexts).toEqual(["base:allocation", "qemu:dirty-bitmap:daily"]);
  expect(await exportIds()).toEqual(["disk", "disk-snapshot", "pull"]);
  await ask("job-cancel", { id: "view" });
  await until("its exports are gone", async () => (await exportIds()).length === 1);
  const deleted = client.messages.flatMap(({ event, data }) =>
    event === "BLOCK_EXPORT_DELETED" ? [data?.["id"]] : [],
  );
  expect(deleted.sort()).toEqual(["disk-snapshot", "pull"]);
});

it("a disk joins, is backed up by bitmap, leaves with its clients, and comes back with its bitmap", async () => {
  await makeDisk(at("late.qcow2"), noise(SIZE, 7));
  const node = { driver: "qcow2", "node-name": "late", file: { driver: "file", filename: at("late.qcow2") } };
  const exported = { type: "nbd", id: "late-export", "node-name": "late", name: "late", writable: true };
  expect(await refusal("block-export-add", exported)).toBe("Cannot find device='' nor node-name='late'");
  await ask("blockdev-add", { ...node, "read-only": true });
  expect(await refusal("block-export-add", exported)).toBe("Cannot export read-only node as writable");
  await ask("blockdev-del", { "node-name": "late" });
  await ask("blockdev-add", node);
  await ask("block-export-add", exported);
  expect(await refusal("blockdev-del", { "node-name": "late" })).toBe("Node late is in use");
  await ask("block-dirty-bitmap-add", { node: "late", name: "b" });
  await write("late", "write -P 5 1M 64k", "write -P 6 3M 192k");
  const job = { device: "late", "job-id": "j", target: at("full.qcow2"), sync: "full", speed: 65_536 };
  await ask("drive-backup", job);
  expect(await refusal("block-export-del", { id: "late-export", mode: "hard" })).toMatch(/busy/);
  await ask("block-job-set-speed", { device: "j", speed: 0 });
  await until("the backup is over", async () => ((await ask("query-jobs")) as unknown[]).length === 0);
  await expectSame(at("full.qcow2"), server.uri("late"));
  const guest = new Process("qemu-io", ["-f", "raw", server.uri("late")]);
  guest.send("read 0 4k");
  await guest.line((line) => line.includes("bytes at offset 0"));
  expect(await refusal("block-export-del", { id: "late-export" })).toBe("export 'late-export' still in use");
  await ask("block-export-del", { id: "late-export", mode: "hard" });
  await until("the export is gone", async () => !(await exportIds()).includes("late-export"));
  guest.kill("SIGKILL");
  expect(await refusal("block-export-del", { id: "late-export" })).toBe("Export 'late-export' is not found");
  const nodes = (await ask("query-named-block-nodes")) as { "node-name": string }[];
  expect(nodes.map((shown) => shown["node-name"])).toEqual(["disk"]);
  await ask("block-export-add", exported);
  const again = (await ask("query-named-block-nodes")) as {
    "dirty-bitmaps"?: { name: string; count: number }[];
  }[];
  expect(again[1]?.["dirty-bitmaps"]).toMatchObject([{ name: "b", count: 4 * 65_536 }]);
  await ask("block-export-del", { id: "late-export" });
  await until("it is gone again", async () => !(await exportIds()).includes("late-export"));
  await ask("blockdev-del", { "node-name": "late" });
  expect((await server.stop()).code).toBe(0);
});
