// Names that are no UTF-8: of the working folder, an argument, a backing file. Nothing of another name is made.
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { COWCATCHER_BIN, run, type RunResult } from "../../support/cli.js";
import { scratchFolder, stopAll } from "../../support/server.js";

afterEach(stopAll);

const DISK = Buffer.alloc(3 * 1024 * 1024, "disk");
/** What a shell makes of them: a byte that begins a character of UTF-8, with no other after it. */
const [FOLDER, NAME] = ["caf\\xe9", "x\\xe9"];

let folder: Buffer;
const inside = (name: string): Buffer => Buffer.concat([folder, Buffer.from(`/${name}`, "latin1")]);
const names = (): string[] =>
  readdirSync(folder, { encoding: "buffer" }).map((name) => name.toString("latin1"));

beforeEach(() => {
  folder = Buffer.from(`${scratchFolder()}/caf\u00e9`, "latin1");
  mkdirSync(folder);
  writeFileSync(inside("a.raw"), DISK);
});

/** `command` for bash, in which cc is the command. */
function shell(command: string): Promise<RunResult> {
  const start = `cd "$1"/$'${FOLDER}'; x=$'${NAME}'; cc() { node "$0" "$@"; }; `;
  const parent = folder.subarray(0, folder.lastIndexOf("/")).toString();
  return run("bash", ["-c", start + command, COWCATCHER_BIN, parent]);
}

const DONE = { code: 0, stdout: "", stderr: "" };

it("a folder: relative names start from it", async () => {
  expect(await shell("cc backup -q a.raw b.raw && cc backup -q --verify a.raw c.qcow2")).toEqual(DONE);
  expect(names().sort()).toEqual(["a.raw", "b.raw", "c.qcow2"]);
  expect(readFileSync(inside("b.raw")).equals(DISK)).toBe(true);
  expect((await shell("qemu-img compare a.raw c.qcow2")).code).toBe(0);
});

it.each([
  ["a target", "cc backup -q --verify a.raw $x.raw"],
  ["a source", "cp a.raw s && mv s $x && cc backup -q -f raw $x $'x\\xe9.raw'; rm $x"],
  ["a target that is replaced", "echo old > $x.raw; cc backup -q --force a.raw $x.raw"],
  ["the target of restore", "cc restore -q a.raw $x.raw"],
  ["by a link", "ln -s $x.raw l.raw; touch $x.raw; cc backup -q --force a.raw l.raw; rm l.raw"],
  ["the folder above", "cc backup -q a.raw ../$'caf\\xe9'/$x.raw"],
])("an argument: %s", async (_, command) => {
  expect(await shell(command)).toEqual(DONE);
  expect(names().sort()).toEqual(["a.raw", "x\u00e9.raw"]);
  expect(readFileSync(inside("x\u00e9.raw")).equals(DISK)).toBe(true);
});

describe("a backing file", () => {
  const OVERLAY = "mv a.raw $x.raw; qemu-img create -q -f qcow2 -F raw -b $x.raw o.qcow2; ";

  it("is found, copied, and named in a copy of the top layer", async () => {
    const command = `${OVERLAY} cc backup -q o.qcow2 b.raw && cc backup -q --sync top o.qcow2 t.qcow2`;
    expect(await shell(command)).toEqual(DONE);
    expect(readFileSync(inside("b.raw")).equals(DISK)).toBe(true);
    expect((await shell("qemu-img compare t.qcow2 b.raw")).code).toBe(0);
    expect(readFileSync(inside("t.qcow2")).subarray(0, 65536).toString("latin1")).toContain("x\u00e9.raw");
  });

  it("is written by create and by backup -b as QEMU reads it", async () => {
    const command =
      `${OVERLAY} cc create -q -f qcow2 -F raw -b $x.raw $x.qcow2 && qemu-img compare -q $x.qcow2 o.qcow2 && ` +
      "cc backup -q --sync top -b $x.raw -B raw o.qcow2 t.qcow2 && qemu-img compare -q t.qcow2 o.qcow2";
    expect(await shell(command)).toEqual(DONE);
  });

  it("that is missing is named as it is", async () => {
    const { code, stderr } = await shell(`${OVERLAY} rm $x.raw; cc backup o.qcow2 b.raw`);
    expect(stderr).toMatch(/^cowcatcher: o\.qcow2: its backing file 'x\\xe9\.raw' does not exist \(.*\)\n$/);
    expect(code).toBe(1);
  });
});

it("info, map, check and compare take such names, and print them", async () => {
  const { code, stdout, stderr } = await shell(
    "cc backup -q a.raw $x.qcow2 && cc info $x.qcow2 && cc check $x.qcow2 && cc map $x.qcow2 && cc compare a.raw $x.qcow2",
  );
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  expect(stdout).toContain("image: x\\xe9.qcow2\n");
  expect(stdout).toMatch(/Images are identical\.\n$/);
});

it.each([
  ["an option", "cc backup --log-file $x.log a.raw b.raw"],
  ["a socket", "cc backup --control $x b.raw"],
  ["a server's image", "cc serve --socket s $x.raw"],
  ["a target that a server opens", "cc backup --control s $x.raw"],
  ["a URI", "cc info nbd+unix:///?socket=$x"],
])("where a name goes as text it is refused: %s", async (_, command) => {
  const { code, stderr } = await shell(command);
  expect(stderr).toMatch(/^cowcatcher: .*x\\xe9.*: is not UTF-8 \(.*\)\n$/);
  expect(code).toBe(2);
  expect(names()).toEqual(["a.raw"]);
});
