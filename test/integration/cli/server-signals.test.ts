// Signals that a server gets: its guests' disk goes away by SIGTERM, SIGINT and `quit`, in good order however early they
// come, and by no other that the program can do something about.
import { existsSync, readFileSync, readdirSync, renameSync, truncateSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { once } from "node:events";
import { join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { COWCATCHER_BIN, run } from "../../support/cli.js";
import { Process, scratchFolder, Server, stopAll, until } from "../../support/server.js";

afterEach(stopAll);

function disk(): { folder: string; image: string } {
  const folder = scratchFolder();
  const image = join(folder, "disk.img");
  writeFileSync(image, "");
  truncateSync(image, 1 << 20);
  return { folder, image };
}

it.each(["SIGHUP", "SIGUSR1", "SIGUSR2"] as const)(
  "%s takes no disk away; SIGTERM does, in good order",
  async (signal) => {
    const { folder, image } = disk();
    const server = await Server.start(folder, [image], { args: ["-f", "raw", "--tracking", "off"] });
    server.process.kill(signal);
    server.process.kill(signal);
    const { stdout } = await run("nbdinfo", ["--size", server.uri()]);
    expect(stdout).toBe(`${1 << 20}\n`);
    const { code, stderr } = await server.stop();
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(readdirSync(folder)).toEqual(["disk.img"]);
  },
);

it("SIGHUP opens the log anew, for whoever rotates it", async () => {
  const { folder, image } = disk();
  const log = join(folder, "log");
  const args = ["-f", "raw", "--log-level", "debug", "--log-file", log];
  const server = await Server.start(folder, [image], { args });
  await run("nbdinfo", ["--size", server.uri()]);
  expect(readFileSync(log, "utf8")).toContain('"name":"cowcatcher"');

  renameSync(log, `${log}.1`);
  server.process.kill("SIGHUP");
  await until("a new log", () => existsSync(log));
  await until("the old log is closed", () => !server.openFiles().includes(`${log}.1`));
  const old = readFileSync(`${log}.1`, "utf8");
  await run("nbdinfo", ["--size", server.uri()]);
  await until("a line in the new log", () => readFileSync(log, "utf8").includes('"name":"cowcatcher"'));
  expect(readFileSync(`${log}.1`, "utf8")).toBe(old);
  expect((await server.stop()).code).toBe(0);
});

it("a log that cannot be opened anew stays where it was, and says so", async () => {
  const { folder, image } = disk();
  const place = join(folder, "logs");
  await run("mkdir", [place]);
  const args = ["-f", "raw", "--log-file", join(place, "log")];
  const server = await Server.start(folder, [image], { args });
  renameSync(place, join(folder, "moved"));
  server.process.kill("SIGHUP");
  const said = (): string => readFileSync(join(folder, "moved", "log"), "utf8");
  await until("a line about it", () => said().includes("the log cannot be opened anew"));
  expect((await server.stop()).code).toBe(0);
});

it.each(["SIGTERM", "SIGINT"] as const)("%s while an image is being opened is orderly", async (signal) => {
  const { folder, image } = disk();
  // An NBD server that says nothing.
  const silent = createServer().listen(join(folder, "silent"));
  try {
    const uri = `nbd+unix:///?socket=${join(folder, "silent")}`;
    const sockets = ["--socket", join(folder, "nbd"), "--control", join(folder, "control")];
    const serve = new Process("node", [COWCATCHER_BIN, "serve", ...sockets, `${image}=a`, `${uri}=b`]);
    await once(silent, "connection");
    serve.kill(signal);
    const { code, stdout, stderr } = await serve.end();
    expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: "", stderr: "" });
    expect(readdirSync(folder).sort()).toEqual(["disk.img", "silent"]);
  } finally {
    silent.close();
  }
});

const KILL = `process.kill(process.pid, "SIGTERM")`;

it.each([
  [
    "while the program is being loaded",
    // The first of the program's own listeners: its entry has begun, and imports the rest.
    `process.on("newListener", (name) => {
       if (name === "SIGUSR1") setImmediate(() => ${KILL});
     });`,
  ],
  [
    "as it begins to listen",
    `import { Server } from "node:net";
     const { listen } = Server.prototype;
     Server.prototype.listen = function (...args) {
       Server.prototype.listen = listen;
       ${KILL};
       return listen.apply(this, args);
     };`,
  ],
])("SIGTERM %s is orderly", async (_when, hook) => {
  const { folder, image } = disk();
  writeFileSync(join(folder, "hook.mjs"), hook);
  const sockets = ["--socket", join(folder, "nbd"), "--control", join(folder, "control")];
  const program = ["--import", join(folder, "hook.mjs"), COWCATCHER_BIN];
  const serve = new Process("node", [
    ...program,
    "serve",
    ...sockets,
    "-f",
    "raw",
    "--tracking",
    "off",
    image,
  ]);
  const { code, stderr } = await serve.end();
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  expect(readdirSync(folder).sort()).toEqual(["disk.img", "hook.mjs"]);
});
