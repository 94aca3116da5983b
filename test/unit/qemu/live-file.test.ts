// Which file of QEMU's may be read past it: the one that the serving process has open, of a disk that is its bytes.
import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, fstatSync, mkdtempSync, openSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import type { QemuEdge, QemuGraph, QemuNode } from "../../../src/qemu/graph.js";
import { openLiveFile } from "../../../src/qemu/live-file.js";

const SIZE = 65_536;
let folder = "";
let path = "";
let served = -1;
/** Plays QEMU: a process that has the file open. */
let server: ChildProcess;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-live-"));
  path = join(folder, "disk.raw");
  writeFileSync(path, new Uint8Array(SIZE));
  served = openSync(path, "r+");
  server = spawn("sleep", ["60"], { stdio: [served, "ignore", "ignore"] });
});
afterEach(() => {
  server.kill("SIGKILL");
  closeSync(served);
  rmSync(folder, { recursive: true });
});

function node(name: string, driver: string, more: Partial<QemuNode> = {}): QemuNode {
  return {
    name,
    driver,
    filename: path,
    sizeBytes: SIZE,
    readOnly: false,
    isDirect: false,
    bitmaps: [],
    ...more,
  };
}

function graphOf(top: QemuNode, below?: QemuNode): QemuGraph {
  const nodes = new Map([top, ...(below === undefined ? [] : [below])].map((one) => [one.name, one]));
  const edges: QemuEdge[] =
    below === undefined ? [] : [{ parent: top.name, child: below.name, role: "file" }];
  return {
    version: { major: 7, minor: 2 },
    commands: new Set(),
    status: "running",
    devices: [],
    nodes,
    edges,
  };
}

async function isRead(
  top: QemuNode,
  below?: QemuNode,
  pid: number | undefined = server.pid,
): Promise<boolean> {
  const file = await openLiveFile(graphOf(top, below), top, pid);
  if (file !== undefined) expect(fstatSync(file.fd).ino).toBe(fstatSync(served).ino);
  await file?.close();
  return file !== undefined;
}

it("is that below a raw node, or below none", async () => {
  expect(await isRead(node("disk", "raw"), node("file", "file"))).toBe(true);
  expect(await isRead(node("disk", "file"))).toBe(true);
});

it.each<[string, QemuNode, QemuNode]>([
  ["of qcow2", node("disk", "qcow2"), node("file", "file")],
  ["a part of which is the disk", node("disk", "raw", { filename: "json:{}" }), node("file", "file")],
  ["that is longer", node("disk", "raw", { sizeBytes: SIZE / 2 }), node("file", "file")],
  ["that is served", node("disk", "raw"), node("file", "nbd")],
])("is none %s", async (_, top, below) => {
  expect(await isRead(top, below)).toBe(false);
});

it("is none that the server does not have open, whatever its name", async () => {
  const disk = [node("disk", "raw"), node("file", "file")] as const;
  expect(await isRead(...disk)).toBe(true);
  expect(await openLiveFile(graphOf(...disk), disk[0], undefined)).toBeUndefined();
  expect(await isRead(...disk, process.ppid)).toBe(false);
  renameSync(path, join(folder, "old.raw"));
  expect(await isRead(...disk)).toBe(false);
  writeFileSync(path, new Uint8Array(SIZE));
  expect(await isRead(...disk)).toBe(false);
});
