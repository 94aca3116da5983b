// The control socket's answers beside those of qemu-storage-daemon, for requests that both understand.
import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, watch, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { ControlServer } from "../../../src/control/server.js";
import { FakeJobHost } from "../../support/fake-job-host.js";
import { RawQmp } from "../../support/raw-qmp.js";

let folder: string;
let daemon: ChildProcess;
let server: ControlServer;
let theirs: RawQmp;
let ours: RawQmp;

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), "control-oracle-"));
  const image = join(folder, "disk.raw");
  writeFileSync(image, Buffer.alloc(4096));
  const theirPath = join(folder, "theirs");
  daemon = await startDaemon(theirPath, image);
  server = new ControlServer({ host: new FakeJobHost(), logger: pino({ level: "silent" }) });
  await server.listen(join(folder, "ours"));
  theirs = await RawQmp.connect(theirPath);
  ours = await RawQmp.connect(join(folder, "ours"));
});

afterAll(async () => {
  theirs.close();
  ours.close();
  daemon.kill();
  await server.close();
  rmSync(folder, { recursive: true });
});

function startDaemon(socketPath: string, image: string): Promise<ChildProcess> {
  const child = spawn("qemu-storage-daemon", [
    "--blockdev",
    `file,filename=${image},node-name=file`,
    "--blockdev",
    "raw,file=file,node-name=disk",
    "--chardev",
    `socket,path=${socketPath},server=on,wait=off,id=monitor`,
    "--monitor",
    "chardev=monitor",
  ]);
  return new Promise((resolve, reject) => {
    const watcher = watch(folder, () => {
      if (!existsSync(socketPath)) return;
      watcher.close();
      resolve(child);
    });
    child.once("error", reject);
    child.once("exit", (code) => reject(new Error(`qemu-storage-daemon ended with ${code}`)));
  });
}

async function both(text: string): Promise<[unknown, unknown]> {
  // latin1, so that a test can send any byte; all else here is ASCII.
  const bytes = Buffer.from(text, "latin1");
  theirs.send(bytes);
  ours.send(bytes);
  return Promise.all([theirs.nextAnswer(), ours.nextAnswer()]);
}

const run = (execute: string, args?: object) => JSON.stringify({ execute, arguments: args });
const place = (name: string, filename = `${import.meta.dirname}/oracle.test.ts`) => ({
  driver: "raw",
  "node-name": name,
  "read-only": false,
  file: { driver: "file", filename },
});
const backup = (args: object) =>
  run("blockdev-backup", { device: "disk", target: "t", sync: "full", ...args });

describe("beside qemu-storage-daemon", () => {
  it("greets in the same form", async () => {
    const [their, our] = [await theirs.next(), await ours.next()];
    expect(Object.keys(our)).toEqual(Object.keys(their));
    const members = (greeting: object = {}) => Object.keys(greeting).sort();
    expect(members(our.QMP)).toEqual(members(their.QMP));
    expect(members(our.QMP?.version)).toEqual(members(their.QMP?.version));
    expect(members(our.QMP?.version.qemu)).toEqual(members(their.QMP?.version.qemu));
  });

  it.each([
    ["a command before negotiation", '{"execute":"query-version","id":1}'],
    ["an unknown command before negotiation", '{"execute":"nonsense"}'],
    ["garbage", "garbage\n"],
    ["negotiation", '{"execute":"qmp_capabilities","id":{"a":[1,null]}}'],
    ["negotiation again", '{"execute":"qmp_capabilities"}'],
    ["an unknown command", '{"execute":"nonsense","id":7}'],
    ["no command", '{"arguments":{}}'],
    ["a command that is no string", '{"execute":5}'],
    ["arguments that are no object", '{"execute":"query-jobs","arguments":5}'],
    ["an unknown member", '{"execute":"query-jobs","extra":1}'],
    ["an array", "[1,2]"],
    ["a number", "5 "],
    ["a string", '"text"'],
    ["a closing brace", "} "],
    ["the byte that clears the parser", "\xff"],
    ["an empty list of jobs", '{"execute":"query-jobs","id":null}'],
    ["an empty list of block jobs", '{"execute":"query-block-jobs"}'],
    ["a missing parameter", run("job-pause")],
    ["a parameter of a wrong type", run("job-pause", { id: 5 })],
    ["an unknown parameter", run("job-pause", { id: "x", y: 1 })],
    ["an unknown job", run("job-cancel", { id: "x" })],
    ["an unknown job to dismiss", run("job-dismiss", { id: "x" })],
    ["an unknown block job", run("block-job-cancel", { device: "x" })],
    ["a speed that is no integer", run("block-job-set-speed", { device: "x", speed: 1.5 })],
    ["a speed for an unknown job", run("block-job-set-speed", { device: "x", speed: -1 })],
    ["an unknown sync mode", backup({ sync: "fulll" })],
    ["a boolean that is none", backup({ "auto-dismiss": "a" })],
    ["a nested parameter of a wrong type", backup({ "x-perf": { "max-workers": "a" } })],
    ["an unknown nested parameter", backup({ "x-perf": { foo: 1 } })],
    ["an unknown disk", run("drive-backup", { device: "nope", target: "/t", sync: "full" })],
    ["an empty transaction", run("transaction", { actions: [] })],
    ["a transaction that aborts", run("transaction", { actions: [{ type: "abort", data: {} }] })],
    ["an unknown action", run("transaction", { actions: [{ type: "foo", data: {} }] })],
    ["actions that are no list", run("transaction", { actions: 5 })],
    ["an action without a type", run("transaction", { actions: [{ data: {} }] })],
    ["an unknown member of an action", run("transaction", { actions: [{ type: "abort", data: { q: 1 } }] })],
    [
      "a missing member of an action",
      run("transaction", { actions: [{ type: "blockdev-backup", data: { device: "d" } }] }),
    ],
    [
      "an unknown completion mode",
      run("transaction", { actions: [], properties: { "completion-mode": "x" } }),
    ],
  ])("answers %s in the same words", async (_what, text) => {
    const [their, our] = await both(text);
    expect(our).toEqual(their);
  });

  it("has the bitmap that the fake host has", async () => {
    theirs.send(run("block-dirty-bitmap-add", { node: "disk", name: "b0", persistent: false }));
    expect(await theirs.nextAnswer()).toEqual({ return: {} });
  });

  it.each([
    ["a place to write to", run("blockdev-add", place("t"))],
    ["a node's name twice", run("blockdev-add", place("t"))],
    ["a disk's name for a node", run("blockdev-add", place("disk"))],
    ["a file that is not there", run("blockdev-add", place("u", "/none"))],
    ["a node that is to go and was never there", run("blockdev-del", { "node-name": "none" })],
    ["a bitmap of a name that is taken", run("block-dirty-bitmap-add", { node: "disk", name: "b0" })],
    ["a bitmap without a name", run("block-dirty-bitmap-add", { node: "disk", name: "" })],
    ["a granularity of 100", run("block-dirty-bitmap-add", { node: "disk", name: "b", granularity: 100 })],
    ["one of 768", run("block-dirty-bitmap-add", { node: "disk", name: "b", granularity: 768 })],
    ["a bitmap of an unknown node", run("block-dirty-bitmap-add", { node: "none", name: "b" })],
    ["an unknown bitmap to remove", run("block-dirty-bitmap-remove", { node: "disk", name: "b" })],
    ["an unknown bitmap to clear", run("block-dirty-bitmap-clear", { node: "disk", name: "b" })],
    ["a bitmap to clear of an unknown node", run("block-dirty-bitmap-clear", { node: "none", name: "b" })],
    ["an incremental backup without a bitmap", backup({ sync: "incremental" })],
    ["one by a bitmap without one", backup({ sync: "bitmap" })],
    [
      "an incremental one that keeps its bitmap",
      backup({ sync: "incremental", bitmap: "b0", "bitmap-mode": "never" }),
    ],
    ["one by an unknown bitmap", backup({ sync: "incremental", bitmap: "b" })],
    ["one by a bitmap without a mode", backup({ sync: "bitmap", bitmap: "b0" })],
    ["a bitmap's mode without a bitmap", backup({ "bitmap-mode": "never" })],
    ["an unknown target", run("blockdev-backup", { device: "disk", target: "none", sync: "full" })],
    [
      "a transaction that adds a bitmap and aborts",
      run("transaction", {
        actions: [
          { type: "block-dirty-bitmap-add", data: { node: "disk", name: "b" } },
          { type: "abort", data: {} },
        ],
      }),
    ],
    ["a place that is to go", run("blockdev-del", { "node-name": "t" })],
  ])("answers %s as QEMU does", async (_what, text) => {
    const [their, our] = await both(text);
    expect(our).toEqual(their);
  });

  it("shows a disk's node with members that QEMU's has", async () => {
    const [their, our] = (await both(run("query-named-block-nodes"))).map((answer) =>
      (answer as { return: Record<string, unknown>[] }).return.find((node) => node["node-name"] === "disk"),
    );
    const ourNames = Object.keys(our ?? {}).filter((name) => name !== "x-cowcatcher");
    expect(our?.["dirty-bitmaps"]).toEqual([
      { name: "b0", count: 0, granularity: 65_536, recording: true, busy: false, persistent: true },
    ]);
    const [theirBitmap] = (their?.["dirty-bitmaps"] ?? []) as object[];
    const [ourBitmap] = (our?.["dirty-bitmaps"] ?? []) as object[];
    expect(Object.keys(ourBitmap ?? {}).sort()).toEqual(Object.keys(theirBitmap ?? {}).sort());
    expect(ourNames.sort()).toEqual(Object.keys(their ?? {}).sort());
  });
});
