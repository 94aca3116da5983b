import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import type { Server, Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { ControlClient } from "../../../src/qmp/client.js";
import { listJobs, startBackup, watchJob } from "../../../src/control/jobs-from-qmp.js";
import { ControlServer } from "../../../src/control/server.js";
import { FakeJobHost, NO_PROGRESS } from "../../support/fake-job-host.js";

const logger = pino({ level: "silent" });

let folder: string;
let path: string;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "control-"));
  path = join(folder, "sock");
});

afterEach(() => rmSync(folder, { recursive: true }));

const order = (id: string, disk = "disk") => ({ id, disk, options: { target: `/b/${id}` } });
const failure = new CowcatcherError({
  code: "IO",
  object: "/b/a",
  problem: "cannot write: input/output error",
  hint: "look at the disk",
  offsetBytes: 4096,
  errno: "EIO",
});

it("knows an NBD socket at once, however its magic comes", async () => {
  for (const pieces of [["NBDMAGICIHAVEOPT\0\x03"], ["NBD", "MAG", "IC"]]) {
    const server = createServer((socket) => {
      socket.setNoDelay(true);
      for (const piece of pieces) socket.write(piece);
      socket.on("error", () => undefined);
    });
    await new Promise<void>((listening) => server.listen(path, listening));
    // It never greets: only the magic can end this before the hour.
    await expect(ControlClient.connect(path, { timeoutMs: 3_600_000 })).rejects.toMatchObject({
      code: "PROTOCOL",
      problem: "is an NBD socket, not a control socket",
    });
    await new Promise((closed) => server.close(closed));
  }
});

describe("against the server", () => {
  let host: FakeJobHost;
  let server: ControlServer;
  let client: ControlClient;

  beforeEach(async () => {
    host = new FakeJobHost();
    server = new ControlServer({ host, logger });
    await server.listen(path);
    client = await ControlClient.connect(path);
  });

  afterEach(async () => {
    client.close();
    await server.close();
  });

  it("returns answers and rejects with class and text", async () => {
    expect(await client.execute("query-status")).toMatchObject({ status: "running" });
    await expect(client.execute("nonsense")).rejects.toMatchObject({
      errorClass: "CommandNotFound",
      desc: "The command nonsense has not been found",
      object: path,
    });
    await expect(
      client.execute("drive-backup", {
        device: "disk",
        target: "/b/a",
        sync: "full",
        "discard-source": true,
      }),
    ).rejects.toMatchObject({
      code: "UNSUPPORTED",
      problem: "'discard-source' is not supported by this version",
    });
    const both = [client.execute("query-version"), client.execute("job-pause", { id: "x" })];
    const [version, pause] = await Promise.allSettled(both);
    expect(version.status).toBe("fulfilled");
    expect(pause).toMatchObject({ reason: { errorClass: "GenericError", desc: "Job not found" } });
  });

  it("rejects with the engine's own error when a backup cannot start", async () => {
    host.startError = new CowcatcherError({
      code: "EXISTS",
      object: "/b/a",
      problem: "exists already",
      hint: "--force",
    });
    await expect(startBackup(client, [order("a")])).rejects.toMatchObject({
      code: "EXISTS",
      object: "/b/a",
      problem: "exists already",
      hint: "--force",
      message: "/b/a: exists already (--force)",
    });
  });

  it("sends options that were given, leaves others to the server, and resolves paths here", async () => {
    await startBackup(client, [
      {
        id: "a",
        disk: "disk",
        options: { target: "x/y.qcow2", targetFormat: "qcow2", spillDir: "s", verify: true },
      },
    ]);
    await startBackup(client, [{ id: "n", disk: "data", options: { target: "null:", guestTimeoutMs: 9 } }]);
    expect(host.job("a").options).toMatchObject({
      target: join(process.cwd(), "x/y.qcow2"),
      targetFormat: "qcow2",
      spillDir: join(process.cwd(), "s"),
      verify: true,
      workerCount: 4,
    });
    expect(host.job("n").options).toMatchObject({ target: "null:", guestTimeoutMs: 9 });
  });

  it("starts several at one T0, grouped when asked", async () => {
    await startBackup(client, [order("a"), order("b", "data")], { grouped: true });
    expect(host.starts).toHaveLength(1);
    host.job("a").fail(failure);
    expect((await watchJob(client, "b", () => undefined)).error?.code).toBe("CANCELLED");
  });

  it("follows a job's counters to its end", async () => {
    await startBackup(client, [order("a")]);
    const job = host.job("a");
    const seen: number[] = [];
    const result = await watchJob(
      client,
      "a",
      ({ bytesDone }, status) => {
        expect(status).toBe("running");
        seen.push(bytesDone);
        job.counters.bytesDone += 1000;
        if (seen.length === 3) job.succeed();
      },
      { pollMs: 5 },
    );
    expect(seen).toEqual([0, 1000, 2000]);
    expect(result).toEqual({ progress: { ...NO_PROGRESS, bytesDone: 4096 }, error: undefined });
    expect(host.jobs()).toEqual([]);
  });

  it("knows the end of a job that was gone before anyone watched", async () => {
    host.afterStart = ([job]) => job?.fail(failure);
    await startBackup(client, [order("a")]);
    await client.execute("query-status");
    expect(host.jobs()).toEqual([]);
    const { error } = await watchJob(client, "a", () => expect.unreachable());
    expect(error?.toDetails()).toEqual(failure.toDetails());
    // It is told once; the next job of that name is another one.
    await expect(watchJob(client, "a", () => undefined)).rejects.toMatchObject({ code: "NOT_FOUND" });
  });

  it("ends on the event, not at the next poll", async () => {
    await startBackup(client, [order("a")]);
    const result = watchJob(client, "a", () => queueMicrotask(() => host.job("a").cancel()), { pollMs: 1e6 });
    expect((await result).error?.code).toBe("CANCELLED");
  });

  it("watches a job of someone else, also one that waits to be dismissed", async () => {
    const other = await ControlClient.connect(path);
    await startBackup(other, [order("a")]);
    await other.execute("drive-backup", {
      "job-id": "kept",
      device: "data",
      target: "/b/kept",
      sync: "full",
      "auto-dismiss": false,
    });
    host.job("kept").fail(failure);
    expect((await watchJob(client, "kept", () => undefined)).error?.toDetails()).toEqual(failure.toDetails());
    const jobs = await listJobs(client);
    expect(jobs.map(({ id, status, disk, target }) => ({ id, status, disk, target }))).toEqual([
      { id: "a", status: "running", disk: "disk", target: "/b/a" },
      { id: "kept", status: "concluded", disk: "data", target: "/b/kept" },
    ]);
    other.close();
  });

  it("rejects the watch when the server goes", async () => {
    await startBackup(client, [order("a")]);
    const watch = watchJob(client, "a", () => void server.close(), { pollMs: 1e6 });
    await expect(watch).rejects.toMatchObject({ code: "IO", problem: "the control connection was lost" });
    await expect(client.execute("query-jobs")).rejects.toMatchObject({ code: "IO" });
  });
});

describe("against something else", () => {
  let peer: Server;
  const sockets: Socket[] = [];

  async function listen(onConnection: (socket: Socket) => void): Promise<void> {
    peer = createServer((socket) => {
      sockets.push(socket);
      onConnection(socket);
    });
    await new Promise<void>((resolve) => peer.listen(path, resolve));
  }

  afterEach(() => {
    for (const socket of sockets.splice(0)) socket.destroy();
    peer?.close();
  });

  it("says what to do when nobody listens", async () => {
    await expect(ControlClient.connect(path)).rejects.toMatchObject({
      code: "NOT_FOUND",
      object: path,
      hint: "is `cowcatcher serve --control` running there?",
    });
  });

  it("gives up on a server that says nothing, or leaves", async () => {
    await listen(() => undefined);
    await expect(ControlClient.connect(path, { timeoutMs: 50 })).rejects.toMatchObject({
      errno: "ETIMEDOUT",
    });
    peer.close();
    await listen((socket) => socket.end());
    await expect(ControlClient.connect(path)).rejects.toMatchObject({ code: "IO" });
  });

  it("refuses a peer that is no QMP server", async () => {
    await listen((socket) => socket.write("NBDMAGICIHAVEOPT\n"));
    await expect(ControlClient.connect(path)).rejects.toMatchObject({ code: "PROTOCOL" });
  });

  it("limits the wait for an answer, and drops it when it comes late", async () => {
    let late: () => void = () => undefined;
    await listen((socket) => {
      socket.write('{"QMP": {}}\r\n');
      let count = 0;
      socket.on("data", () => {
        count++;
        if (count === 2) late = () => socket.write('{"return": "late", "id": 2}\r\n');
        else socket.write(`{"return": ${count}, "id": ${count}}\r\n`);
      });
    });
    const client = await ControlClient.connect(path);
    await expect(client.execute("slow", {}, { timeoutMs: 30 })).rejects.toMatchObject({
      problem: "no answer to slow within 0.03 s",
    });
    late();
    expect(await client.execute("quick")).toBe(3);
    client.close();
  });
});
