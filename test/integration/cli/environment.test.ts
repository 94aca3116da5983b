// What the process is given, or not: memory, packages.
import { cpSync, mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { afterEach, expect, it } from "vitest";
import { COWCATCHER_BIN, cowcatcherProcess as cowcatcher, run } from "../../support/cli.js";
import { Process, scratchFolder, stopAll } from "../../support/server.js";

afterEach(stopAll);

const DISK = Buffer.alloc(3 * 1024 * 1024, "disk");

it("a backup needs no more addresses than memory: it runs under ulimit -v", async () => {
  const folder = scratchFolder();
  writeFileSync(join(folder, "a.raw"), DISK);
  const command = `ulimit -v 8000000; exec node "${COWCATCHER_BIN}" backup --direct a.raw b.qcow2`;
  const { code, stderr } = await run("sh", ["-c", command], { cwd: folder });
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
});

/** That Node has for itself, and two: from version 22 on it has two more. */
const BARE_LIMIT = Number(process.versions.node.split(".")[0]) >= 22 ? 22 : 20;

it.each([
  // Not enough for one thread, for the first ones, for eight, for sixteen; those that compress are needed.
  [BARE_LIMIT, "1"],
  [24, "1"],
  [28, "4"],
  [40, "8"],
  [40, "16"],
])("ulimit -n %i with %s workers: one line that names the limit", async (limit, workers) => {
  const folder = scratchFolder();
  writeFileSync(join(folder, "a.raw"), DISK);
  const command = `ulimit -n ${limit}; exec node "${COWCATCHER_BIN}" backup -c -w ${workers} a.raw b.qcow2`;
  const { code, stderr } = await run("sh", ["-c", command], { cwd: folder });
  expect(stderr).toMatch(
    new RegExp(
      `^cowcatcher: .*too many open files \\(this process may have ${limit}; raise RLIMIT_NOFILE, by .*\\)\n$`,
    ),
  );
  expect(code).toBe(1);
  expect(readdirSync(folder)).toEqual(["a.raw"]);
});

async function inRemovedFolder(folder: string, ...args: string[]) {
  const command = `mkdir g; cd g; rmdir ../g; exec node "${COWCATCHER_BIN}" "$@"`;
  return run("sh", ["-c", command, "sh", ...args], { cwd: folder });
}

it("absolute names need no working folder", async () => {
  const folder = scratchFolder();
  const at = (name: string): string => join(folder, name);
  writeFileSync(at("a.raw"), DISK);
  for (const args of [
    ["backup", "--verify", at("a.raw"), at("b.qcow2")],
    ["restore", at("b.qcow2"), at("c.raw")],
    ["compare", "-q", at("a.raw"), at("c.raw")],
    ["create", at("d.qcow2"), "1M"],
    ["check", "-q", at("d.qcow2")],
  ]) {
    expect(await inRemovedFolder(folder, ...args)).toMatchObject({ code: 0, stderr: "" });
  }
  expect(readFileSync(at("c.raw")).equals(DISK)).toBe(true);
});

it.each([
  ["backup", "/a.raw", "b.raw"],
  ["backup", "a.raw", "/b.raw"],
  ["restore", "/a.raw", "nbd+unix:///?socket=s"],
  ["info", "a.raw"],
  ["check", "a.raw"],
  ["create", "b.raw", "1M"],
  ["serve", "/a.raw", "--socket", "s"],
  ["backup", "/a.raw", "--repo", "r", "--group", "g"],
])("a relative name is refused where the working folder was removed (%s %s %s)", async (...args) => {
  const folder = scratchFolder();
  writeFileSync(join(folder, "a.raw"), DISK);
  const given = args.map((arg) => (arg.startsWith("/") ? folder + arg : arg));
  const { code, stderr } = await inRemovedFolder(folder, ...given);
  expect({ code, stderr }).toEqual({
    code: 1,
    stderr:
      "cowcatcher: the working folder: was removed (start from a folder that is there, or give absolute paths)\n",
  });
  expect(readdirSync(folder)).toEqual(["a.raw"]);
});

it("a server outlives the folder that it was started in", async () => {
  const folder = scratchFolder();
  const at = (name: string): string => join(folder, name);
  mkdirSync(at("g"));
  writeFileSync(at("a.raw"), DISK);
  const serve = ["serve", "../a.raw", "--socket", "../s", "--control", "../c", "--tracking", "off"];
  const inFolder = `cd "${at("g")}"; exec "$@"`;
  const server = new Process("sh", ["-c", inFolder, "sh", process.execPath, COWCATCHER_BIN, ...serve]);
  await server.line((line) => line.includes("listening"));
  rmSync(at("g"), { recursive: true });
  // Said of the folder that the server was started in, as long as that means something.
  const backup = ["backup", "--control", at("c"), at("b.raw")];
  expect(await cowcatcher(backup)).toMatchObject({ code: 0 });
  expect(readFileSync(at("b.raw")).equals(DISK)).toBe(true);
  server.kill("SIGTERM");
  expect((await server.ended).code).toBe(0);
  expect(readdirSync(folder).sort()).toEqual(["a.raw", "b.raw"]);
});

it("without koffi all goes on, with a warning that says what is missing", async () => {
  const folder = scratchFolder();
  cpSync(dirname(dirname(dirname(COWCATCHER_BIN))), join(folder, "dist"), { recursive: true });
  cpSync("package.json", join(folder, "package.json"));
  mkdirSync(join(folder, "node_modules"));
  const { dependencies } = JSON.parse(readFileSync("package.json", "utf8")) as { dependencies: object };
  for (const name of Object.keys(dependencies).filter((other) => other !== "koffi")) {
    symlinkSync(resolve("node_modules", name), join(folder, "node_modules", name));
  }
  writeFileSync(join(folder, "a.raw"), DISK);
  const bin = join(folder, "dist/src/cli/main.js");
  const { code, stderr } = await run("node", [bin, "backup", "a.raw", "b.raw"], { cwd: folder });
  expect(stderr).toMatch(/^cowcatcher: warning: native calls are missing .*not locked.*\n$/);
  expect(code).toBe(0);
  expect(readFileSync(join(folder, "b.raw")).equals(DISK)).toBe(true);
});

it("a server that is handed its socket prints nothing: its output is another program's", async () => {
  const folder = scratchFolder();
  writeFileSync(join(folder, "a.raw"), DISK);
  const serve = ["node", COWCATCHER_BIN, "serve", "-f", "raw", "a.raw"];
  const { code, stdout, stderr } = await run("nbdinfo", ["--size", "--", "[", ...serve, "]"], {
    cwd: folder,
  });
  expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: `${DISK.length}\n`, stderr: "" });
});

it("an export is also named as QEMU named it before URIs", async () => {
  const folder = scratchFolder();
  writeFileSync(join(folder, "a.raw"), DISK);
  const server = new Process("node", [
    COWCATCHER_BIN,
    "serve",
    "--socket",
    join(folder, "s"),
    join(folder, "a.raw=x"),
  ]);
  await server.line((line) => line.includes("listening"));
  const { code } = await cowcatcher(["backup", "nbd:unix:s:exportname=x", "b.raw"], { cwd: folder });
  expect(code).toBe(0);
  expect(readFileSync(join(folder, "b.raw")).equals(DISK)).toBe(true);
});
