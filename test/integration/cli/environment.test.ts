// What the process is given, or not: memory, packages.
import { cpSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { afterEach, expect, it } from "vitest";
import { COWCATCHER_BIN, cowcatcher, run } from "../../support/cli.js";
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

it.each([
  // Not enough for the program's own modules, for the first threads, for eight, for sixteen.
  [20, "1"],
  [24, "1"],
  [28, "4"],
  [40, "8"],
  [40, "16"],
])("ulimit -n %i with %s workers: one line that names the limit", async (limit, workers) => {
  const folder = scratchFolder();
  writeFileSync(join(folder, "a.raw"), DISK);
  const command = `ulimit -n ${limit}; exec node "${COWCATCHER_BIN}" backup -w ${workers} a.raw b.qcow2`;
  const { code, stderr } = await run("sh", ["-c", command], { cwd: folder });
  expect(stderr).toMatch(
    new RegExp(
      `^cowcatcher: .*too many open files \\(this process may have ${limit}; raise RLIMIT_NOFILE, by .*\\)\n$`,
    ),
  );
  expect(code).toBe(1);
  expect(readdirSync(folder)).toEqual(["a.raw"]);
});

it.each([
  ["/a.raw", "/b.raw"],
  ["/a.raw", "b.raw"],
])("a working folder that was removed is named (%s to %s)", async (source, target) => {
  const folder = scratchFolder();
  writeFileSync(join(folder, "a.raw"), DISK);
  const names = [source, target].map((name) => (name.startsWith("/") ? folder + name : name)).join(" ");
  const command = `mkdir g; cd g; rmdir ../g; exec node "${COWCATCHER_BIN}" backup ${names}`;
  const { code, stderr } = await run("sh", ["-c", command], { cwd: folder });
  expect({ code, stderr }).toEqual({
    code: 1,
    stderr: "cowcatcher: the working folder: was removed (start from a folder that is there)\n",
  });
  expect(readdirSync(folder)).toEqual(["a.raw"]);
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
