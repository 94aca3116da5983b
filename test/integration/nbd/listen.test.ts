// How `serve` comes by its sockets: socket activation as nbdcopy does it, modes, stale files, keep-alive.
import { randomBytes } from "node:crypto";
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { COWCATCHER_BIN } from "../../support/cli.js";
import { mustRun, Process, scratchFolder, Server, stopAll, until } from "../../support/server.js";

const CONTENT = randomBytes(1024 * 1024);
let folder: string;
let disk: string;
/** For servers beside one that has `disk`. */
let spare: string;

beforeAll(() => {
  folder = scratchFolder();
  disk = join(folder, "disk.raw");
  writeFileSync(disk, CONTENT);
  spare = join(folder, "spare.raw");
  writeFileSync(spare, CONTENT);
});
afterAll(stopAll);

describe("socket activation", () => {
  const serve = (): string[] => ["[", process.execPath, COWCATCHER_BIN, "serve", "-f", "raw", disk, "]"];

  test("nbdcopy -- [ cowcatcher serve IMG ] FILE reads the image", async () => {
    const copy = join(folder, "copy.raw");
    await mustRun("nbdcopy", "--", ...serve(), copy);
    expect(readFileSync(copy).equals(CONTENT)).toBe(true);
  });

  test("nbdcopy -- FILE [ cowcatcher serve IMG ] writes it, and the server has stored it at its end", async () => {
    const source = join(folder, "source.raw");
    const content = randomBytes(CONTENT.length);
    writeFileSync(source, content);
    await mustRun("nbdcopy", "--flush", "--", source, ...serve());
    await until("the server has ended", () => readFileSync(disk).equals(content));
    writeFileSync(disk, CONTENT);
  });

  test("nbdcopy -- [ cowcatcher serve IMG ] null:", async () => {
    await mustRun("nbdcopy", "--", ...serve(), "null:");
  });
});

describe("the Unix socket", () => {
  test("has the mode asked for; a stale one is replaced, a live one is not", async () => {
    const own = scratchFolder();
    // Root may give it to any group, as libvirt's; others to their own.
    const group =
      process.getuid?.() === 0
        ? Number(/^daemon:[^:]*:(\d+)/m.exec(readFileSync("/etc/group", "utf8"))?.[1])
        : process.getgid?.();
    const access = ["--socket-mode", "660", "--socket-group", String(group)];
    const first = await Server.start(own, [disk], { args: ["-f", "raw", ...access] });
    const { mode, gid } = statSync(first.socket);
    expect([mode & 0o777, gid]).toEqual([0o660, group]);
    const second = new Process(process.execPath, [
      COWCATCHER_BIN,
      "serve",
      "-f",
      "raw",
      "--read-only",
      "--socket",
      first.socket,
      spare,
    ]);
    expect(await second.end()).toMatchObject({
      code: 1,
      stderr: expect.stringContaining("another process listens there") as string,
    });
    first.process.kill("SIGKILL");
    await first.process.end();
    expect(statSync(first.socket).isSocket()).toBe(true);
    const third = await Server.start(own, [disk], { args: ["-f", "raw"] });
    expect(await mustRun("nbdinfo", "--size", third.uri())).toBe(`${CONTENT.length}\n`);
    expect((await third.stop()).code).toBe(0);
  });
});

test("a silent TCP client is asked for a sign of life", async () => {
  const served = new Process(process.execPath, [COWCATCHER_BIN, "serve", "--port", "0", "-f", "raw", spare]);
  const line = await served.line((text) => text.includes("listening"));
  const port = Number(/:(\d+) /.exec(line)?.[1]);
  const client = connect(port, "127.0.0.1");
  client.on("error", () => undefined);
  client.resume();
  const local = `:${port.toString(16).toUpperCase().padStart(4, "0")} `;
  // State 01: established; timer 02: keep-alive (Documentation/networking/proc_net_tcp.rst of Linux).
  const isKeptAlive = (): boolean =>
    readFileSync("/proc/net/tcp", "latin1")
      .split("\n")
      .some((row) => new RegExp(`^\\s*\\d+: 0100007F${local}[0-9A-F:]+ 01 [0-9A-F:]+ 02:`).test(row));
  await until("the kernel's keep-alive timer runs", isKeptAlive);
  client.destroy();
  served.kill("SIGTERM");
  expect((await served.end()).code).toBe(0);
});
