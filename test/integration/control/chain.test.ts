// A chain of backups over the control socket, as qmpbackup 0.45 makes one: full, incremental, incremental, restore. Its
// targets are empty images that it makes, adds as nodes, and lays on each other itself.
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { RawQmp } from "../../support/raw-qmp.js";
import { expectSame, makeDisk, noise } from "../../support/disks.js";
import { mustRun, scratchFolder, Server, stopAll, until } from "../../support/server.js";

const SIZE = 16 * 2 ** 20;
let folder: string;
let disk: string;
let server: Server;
let client: RawQmp;
const at = (name: string): string => join(folder, name);

beforeEach(async () => {
  folder = scratchFolder();
  disk = await makeDisk(at("disk.raw"), noise(SIZE));
  server = await Server.start(folder, [disk]);
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

async function bitmapCount(): Promise<number | undefined> {
  const [block] = (await ask("query-block")) as { "dirty-bitmaps"?: { count: number }[] }[];
  return block?.["dirty-bitmaps"]?.[0]?.count;
}

async function backup(name: string, begin: () => Promise<unknown>): Promise<void> {
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", at(name), String(SIZE));
  await ask("blockdev-add", {
    driver: "qcow2",
    "node-name": "target",
    file: { driver: "file", filename: at(name) },
  });
  await begin();
  await until("the job is over", async () => ((await ask("query-block-jobs")) as unknown[]).length === 0);
  await ask("blockdev-del", { "node-name": "target" });
}

const write = (...commands: string[]): Promise<string> =>
  mustRun("qemu-io", "-f", "raw", ...commands.flatMap((command) => ["-c", command]), server.uri());

it("full, incremental, incremental, restore", async () => {
  expect(await ask("query-status")).toEqual({ status: "running", running: true });
  expect(await ask("query-name")).toEqual({});
  const [block] = (await ask("query-block")) as Record<string, { file: string; "node-name": string }>[];
  expect(block?.["inserted"]).toMatchObject({ file: disk, "node-name": "disk" });
  const job = { device: "disk", target: "target", "job-id": "qmpbackup.disk", sync: "full" };
  await backup("full.qcow2", () =>
    ask("transaction", {
      actions: [
        { type: "block-dirty-bitmap-add", data: { node: "disk", name: "qmp-b", persistent: true } },
        { type: "blockdev-backup", data: { ...job, "buffer-size": 8 << 20 } },
      ],
    }),
  );
  await expectSame(disk, at("full.qcow2"));
  expect(await bitmapCount()).toBe(0);
  const part = { ...job, sync: "incremental", bitmap: "qmp-b" };
  const names = ["full.qcow2"];
  for (let round = 1; round <= 2; round++) {
    await write(`write -P ${round} ${round}M 4k`, `write -z ${round + 4}M 64k`, `discard ${round + 8}M 64k`);
    expect(await bitmapCount()).toBe(3 * 65_536);
    const name = `inc${round}.qcow2`;
    await backup(name, () => ask("blockdev-backup", part));
    expect(await bitmapCount()).toBe(0);
    await mustRun(
      "qemu-img",
      "rebase",
      "-u",
      "-f",
      "qcow2",
      "-b",
      names.at(-1) ?? "",
      "-F",
      "qcow2",
      at(name),
    );
    names.push(name);
    await expectSame(disk, at(name));
  }
  // The new full one of the next chain.
  await write("write -P 9 12M 64k");
  await backup("full2.qcow2", () =>
    ask("transaction", {
      actions: [
        { type: "block-dirty-bitmap-clear", data: { node: "disk", name: "qmp-b" } },
        { type: "blockdev-backup", data: job },
      ],
    }),
  );
  await expectSame(disk, at("full2.qcow2"));
  expect(await bitmapCount()).toBe(0);
  await ask("block-dirty-bitmap-remove", { node: "disk", name: "qmp-b" });
  expect(await bitmapCount()).toBeUndefined();
});

it("takes no part of a disk into an image that has data, and none of another size", async () => {
  await ask("block-dirty-bitmap-add", { node: "disk", name: "b" });
  const job = { device: "disk", target: "target", sync: "incremental", bitmap: "b" };
  for (const [size, commands, problem] of [
    [SIZE, ["-c", "write 0 64k"], /has data already/],
    [SIZE / 2, [], /^Source and target image have different sizes$/],
  ] as const) {
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", at("t.qcow2"), String(size));
    if (commands.length > 0) await mustRun("qemu-io", "-f", "qcow2", ...commands, at("t.qcow2"));
    const file = { driver: "file", filename: at("t.qcow2") };
    await ask("blockdev-add", { driver: "qcow2", "node-name": "target", file });
    const answer = await client.ask({ execute: "blockdev-backup", arguments: job });
    expect(answer.error?.desc).toMatch(problem);
    await ask("blockdev-del", { "node-name": "target" });
  }
  expect(await bitmapCount()).toBe(0);
});

it("is driven from full to incremental to restore by a plain Python client", async () => {
  const script = join(import.meta.dirname, "../../support/qmp-chain.py");
  const said = await mustRun("python3", script, server.control, "disk", folder, server.uri());
  expect(said.trim()).toBe("restored");
  await expectSame(disk, at("restored.raw"));
});
