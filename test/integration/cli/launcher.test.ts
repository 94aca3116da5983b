// bin/cowcatcher, what a user starts: signals that the process was told to ignore, links to it, too few descriptors.
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { delimiter, dirname, join, resolve } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { run } from "../../support/cli.js";
import { Process, scratchFolder, stopAll, until } from "../../support/server.js";

afterEach(stopAll);

const LAUNCHER = resolve("bin/cowcatcher");
/** The Node under test is the one that the launcher finds. */
const ENVIRONMENT = { PATH: [dirname(process.execPath), process.env["PATH"] ?? ""].join(delimiter) };

describe("a signal that comes while a backup runs", () => {
  it.each([
    ["exec", "SIGHUP", 129],
    ["trap '' HUP; exec", "SIGHUP", 0],
    ["exec nohup", "SIGHUP", 0],
    ["trap '' HUP; exec", "SIGTERM", 143],
    ["exec", "SIGINT", 130],
    ["trap '' INT; exec", "SIGINT", 0],
    ["trap '' HUP INT TERM; exec", "SIGTERM", 0],
    ["exec bash", "SIGHUP", 129],
    ["trap '' HUP; exec bash", "SIGHUP", 0],
    // What is said of another process counts for nothing.
    ["export COWCATCHER_IGNORED_SIGNALS=HUP; exec", "SIGHUP", 129],
  ] as const)("%s: %s ends it with %i", async (start, signal, expected) => {
    const folder = scratchFolder();
    const [source, target] = [join(folder, "a.raw"), join(folder, "b.raw")];
    writeFileSync(source, Buffer.alloc(1 << 20, "disk"));
    const command = `${start} "$0" backup --json --rate-limit 512K "$1" "$2"`;
    const backup = new Process("sh", ["-c", command, LAUNCHER, source, target], ENVIRONMENT);
    await backup.line((line) => line.includes('"started"'));
    expect(existsSync(target)).toBe(false);
    backup.kill(signal);
    const { code } = await backup.end();
    expect(code).toBe(expected);
    expect(readdirSync(folder)).toEqual(expected === 0 ? ["a.raw", "b.raw"] : ["a.raw"]);
  });
});

it("a server under nohup opens its log anew at SIGHUP: there it does not ask for an end", async () => {
  const folder = scratchFolder();
  const [image, log] = [join(folder, "a.raw"), join(folder, "log")];
  writeFileSync(image, Buffer.alloc(1 << 20));
  const serve = ["serve", "-f", "raw", "--log-file", log, "--socket", join(folder, "s"), image];
  const server = new Process("nohup", [LAUNCHER, ...serve], ENVIRONMENT);
  await server.line((line) => line.includes("listening"));
  renameSync(log, `${log}.1`);
  server.kill("SIGHUP");
  await until("a new log", () => existsSync(log));
  server.kill("SIGTERM");
  expect((await server.end()).code).toBe(0);
});

it("the commands that the program starts are told nothing of its signals", async () => {
  const folder = scratchFolder();
  const image = join(folder, "a.raw");
  writeFileSync(image, Buffer.alloc(1 << 20));
  const serve = ["serve", "-f", "raw", "--socket", join(folder, "s"), image];
  const hook = join(folder, "environment.mjs");
  const out = join(folder, "out");
  // At the end, as the program itself has its say before.
  writeFileSync(
    hook,
    `import { writeFileSync } from "node:fs";
     process.on("exit", () => writeFileSync(${JSON.stringify(out)}, Object.keys(process.env).join("\\n")));`,
  );
  const server = new Process("nohup", [LAUNCHER, ...serve], {
    ...ENVIRONMENT,
    NODE_OPTIONS: `--import=${hook}`,
  });
  await server.line((line) => line.includes("listening"));
  server.kill("SIGTERM");
  expect((await server.end()).code).toBe(0);
  const names = readFileSync(out, "utf8").split("\n");
  expect(names).toContain("NODE_OPTIONS");
  expect(names).not.toContain("COWCATCHER_IGNORED_SIGNALS");
});

describe("a link to it", () => {
  it.each([
    ["absolute", "cowcatcher", { cowcatcher: LAUNCHER }],
    ["by a relative name", "./cowcatcher", { cowcatcher: LAUNCHER }],
    ["relative, by way of another", "bin dir/cowcatcher", { "bin dir/cowcatcher": "../b", b: LAUNCHER }],
    ["by its folder", "link/cowcatcher", { link: dirname(LAUNCHER) }],
    [
      "as npm makes it",
      "bin/cowcatcher",
      { "lib/p": resolve("."), "bin/cowcatcher": "../lib/p/bin/cowcatcher" },
    ],
  ] as const)("%s", async (_, name, links) => {
    const folder = scratchFolder();
    for (const [link, target] of Object.entries(links)) {
      mkdirSync(dirname(join(folder, link)), { recursive: true });
      symlinkSync(target, join(folder, link));
    }
    const version = (JSON.parse(readFileSync("package.json", "utf8")) as { version: string }).version;
    const expected = { code: 0, stdout: `${version}\n`, stderr: "" };
    const relative = await run("sh", ["-c", `exec "./$0" --version`, name], {
      cwd: folder,
      env: ENVIRONMENT,
    });
    expect(relative).toEqual(expected);
    expect(await run(join(folder, name), ["--version"], { env: ENVIRONMENT })).toEqual(expected);
    // Found in PATH, with a folder that the shell would search instead.
    const PATH = [dirname(join(folder, name)), ENVIRONMENT.PATH].join(delimiter);
    const found = await run("sh", ["-c", "cowcatcher --version"], { env: { PATH, CDPATH: "/:/usr" } });
    expect(found).toEqual(expected);
  });
});

it.each([14, 16, 18, 20])("ulimit -n %i, with which Node itself ends: one line", async (limit) => {
  const command = `ulimit -n ${limit}; exec "$0" --version`;
  const { code, stdout, stderr } = await run("sh", ["-c", command, LAUNCHER], { env: ENVIRONMENT });
  expect(stderr).toMatch(
    new RegExp(`^cowcatcher: too many open files \\(this process may have ${limit}; raise .*\\)\n$`),
  );
  expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
});
