import { existsSync, lstatSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { spawn, spawnSync } from "node:child_process";
import koffi from "koffi";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { libc } from "../../../../src/native/libc.js";
import { listenTcp, listenUnix, notifyReady, systemdListeners } from "../../../../src/nbd/server/listen.js";

let folder: string;
let path: string;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-listen-"));
  path = join(folder, "s.sock");
});

afterEach(() => {
  rmSync(folder, { recursive: true, force: true });
});

/** A socket file whose owner died without removing it. */
function leaveStaleSocket(): void {
  const script = `require("net").createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, "SIGKILL"))`;
  spawnSync(process.execPath, ["-e", script]);
  expect(lstatSync(path).isSocket()).toBe(true);
}

describe("a Unix socket", () => {
  test("is made with the mode asked for and removed at the end", async () => {
    const listener = await listenUnix(path, { mode: 0o600 });
    expect(listener.address).toBe(path);
    expect(statSync(path).mode & 0o777).toBe(0o600);
    await listener.close();
    expect(existsSync(path)).toBe(false);
  });

  test("replaces a stale one", async () => {
    leaveStaleSocket();
    const listener = await listenUnix(path);
    await listener.close();
  });

  test("does not replace a live one, which goes on", async () => {
    const live = await listenUnix(path);
    await expect(listenUnix(path)).rejects.toMatchObject({ code: "BUSY", object: path });
    expect(existsSync(path)).toBe(true);
    await live.close();
  });

  test("does not replace a file", async () => {
    writeFileSync(path, "precious");
    await expect(listenUnix(path)).rejects.toMatchObject({ code: "EXISTS", object: path });
    expect(statSync(path).size).toBe(8);
  });

  test("in a folder that is not there is an error of ours", async () => {
    const missing = join(folder, "no", "s.sock");
    await expect(listenUnix(missing)).rejects.toMatchObject({ name: "CowcatcherError", object: missing });
  });

  test("keeps sockets that come before anyone serves them", async () => {
    const listener = await listenUnix(path);
    const client = connect(path);
    await new Promise((resolve) => client.once("connect", resolve));
    client.write("early");
    const accepted = await new Promise<Socket>((resolve) => {
      setImmediate(() => {
        listener.serve({ accept: resolve });
      });
    });
    const received = new Promise<Buffer>((resolve) => accepted.once("data", resolve));
    accepted.resume();
    expect((await received).toString()).toBe("early");
    client.destroy();
    accepted.destroy();
    await listener.close();
  });
});

describe("TCP", () => {
  test("names the port that it took; a second listener is refused", async () => {
    const listener = await listenTcp("127.0.0.1", 0);
    const port = Number(/^127\.0\.0\.1:(\d+)$/.exec(listener.address)?.[1]);
    expect(port).toBeGreaterThan(0);
    await expect(listenTcp("127.0.0.1", port)).rejects.toMatchObject({
      object: `127.0.0.1:${port}`,
      problem: "cannot listen on: address in use",
    });
    await listener.close();
  });
});

describe("systemd", () => {
  test("no sockets for another process, or without variables", async () => {
    expect(await systemdListeners({})).toEqual([]);
    expect(await systemdListeners({ LISTEN_PID: "1", LISTEN_FDS: "1" })).toEqual([]);
  });

  test.each(["0", "x", "1000"])("LISTEN_FDS=%s is refused by name", async (count) => {
    const environment = { LISTEN_PID: String(process.pid), LISTEN_FDS: count };
    await expect(systemdListeners(environment)).rejects.toMatchObject({
      code: "USAGE",
      object: "LISTEN_FDS",
    });
  });

  test.runIf(libc !== null)("a socket passed as a descriptor is listened on", async () => {
    const opener = createServer();
    await new Promise<void>((resolve) => opener.listen(0, "127.0.0.1", resolve));
    const { fd } = (opener as unknown as { _handle: { fd: number } })._handle;
    const { port } = opener.address() as AddressInfo;
    const inherited = koffi.load("libc.so.6").func("int dup(int fd)")(fd) as number;
    opener.close();
    const environment: NodeJS.ProcessEnv = { LISTEN_PID: String(process.pid), LISTEN_FDS: "1", OTHER: "x" };
    const [listener] = await systemdListeners(environment, inherited);
    expect(environment).toEqual({ OTHER: "x" });
    expect(listener?.address).toBe(`127.0.0.1:${port}`);
    expect(listener?.place).toEqual({ host: "127.0.0.1", port });
    const accepted = new Promise<Socket>((resolve) => listener?.serve({ accept: resolve }));
    const client = connect(port, "127.0.0.1");
    (await accepted).destroy();
    client.destroy();
    await listener?.close();
  });

  test.runIf(libc !== null)("a Unix socket passed as a descriptor is known by its path", async () => {
    const opener = createServer();
    await new Promise<void>((resolve) => opener.listen(path, resolve));
    const { fd } = (opener as unknown as { _handle: { fd: number } })._handle;
    const inherited = koffi.load("libc.so.6").func("int dup(int fd)")(fd) as number;
    const environment = { LISTEN_PID: String(process.pid), LISTEN_FDS: "1" };
    const [listener] = await systemdListeners(environment, inherited);
    expect(listener?.place).toEqual({ path });
    opener.close();
    await listener?.close();
  });

  test("readiness: nothing to tell without NOTIFY_SOCKET, a bad address is refused by name", () => {
    expect(notifyReady("READY=1", {})).toBe(false);
    expect(() => notifyReady("READY=1", { NOTIFY_SOCKET: "relative" })).toThrow(/NOTIFY_SOCKET/);
    expect(() => notifyReady("READY=1", { NOTIFY_SOCKET: `/${"x".repeat(200)}` })).toThrow(/108/);
  });

  test.runIf(libc !== null)("readiness reaches a datagram socket, by path or abstract name", async () => {
    const script = `
import socket, sys
for address in (sys.argv[1], "\\0" + sys.argv[1]):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind(address); s.settimeout(120)
    print("bound", flush=True)
    print(s.recv(100).decode(), flush=True)`;
    const receiver = spawn("python3", ["-c", script, path], { stdio: ["ignore", "pipe", "inherit"] });
    let output = "";
    const lines = (count: number): Promise<void> =>
      new Promise((resolve) => {
        const check = (): void => {
          if (output.split("\n").length > count) resolve();
          else receiver.stdout.once("data", () => setImmediate(check));
        };
        check();
      });
    receiver.stdout.on("data", (chunk: Buffer) => (output += chunk.toString()));
    await lines(1);
    expect(notifyReady("READY=1", { NOTIFY_SOCKET: path })).toBe(true);
    await lines(3);
    expect(notifyReady("STOPPING=1", { NOTIFY_SOCKET: `@${path}` })).toBe(true);
    await lines(4);
    expect(output).toBe("bound\nREADY=1\nbound\nSTOPPING=1\n");
    expect(() => notifyReady("READY=1", { NOTIFY_SOCKET: join(folder, "gone") })).toThrow(
      /gone: cannot notify: no such file or directory/,
    );
  });
});
