import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { spawnSync } from "node:child_process";
import { pino } from "pino";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { ControlServer } from "../../../src/control/server.js";
import { FakeJobHost } from "../../support/fake-job-host.js";
import { RawQmp } from "../../support/raw-qmp.js";

const logger = pino({ level: "silent" });

let folder: string;
let path: string;
let host: FakeJobHost;
let server: ControlServer;

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), "control-"));
  path = join(folder, "sock");
  host = new FakeJobHost();
  server = new ControlServer({
    host,
    logger,
    version: "1.2.3",
    jobDefaults: { cowBufferSizeBytes: 123_456 },
  });
  await server.listen(path);
});

afterEach(async () => {
  await server.close();
  rmSync(folder, { recursive: true });
});

const BACKUP = { device: "disk", target: "/b/disk.raw", sync: "full" };
const backup = (args: object = {}) => ({ execute: "drive-backup", arguments: { ...BACKUP, ...args } });
const ioError = new CowcatcherError({
  code: "IO",
  object: "/b/.disk.raw.tmp",
  problem: "cannot write: input/output error",
  offsetBytes: 4096,
  errno: "EIO",
  hint: "look at the disk",
});

describe("connections", () => {
  it("greets, and asks for negotiation before all else", async () => {
    const client = await RawQmp.connect(path);
    const greeting = await client.next();
    expect(greeting.QMP?.capabilities).toEqual([]);
    expect(greeting.QMP?.version.package).toBe("cowcatcher 1.2.3");
    const refused = {
      class: "CommandNotFound",
      desc: "Expecting capabilities negotiation with 'qmp_capabilities'",
    };
    expect(await client.ask({ execute: "query-version", id: 7 })).toEqual({ error: refused, id: 7 });
    expect(await client.ask({ execute: "qmp_capabilities", arguments: { enable: ["oob"] } })).toMatchObject({
      error: { class: "GenericError" },
    });
    expect(await client.ask({ execute: "qmp_capabilities", id: { a: [1] } })).toEqual({
      return: {},
      id: { a: [1] },
    });
    expect(await client.ask({ execute: "qmp_capabilities" })).toMatchObject({
      error: { class: "CommandNotFound" },
    });
    expect(await client.ask({ execute: "query-status", id: null })).toMatchObject({
      return: { running: true },
      id: null,
    });
    client.close();
  });

  it("answers in order what comes in one packet or byte by byte", async () => {
    const client = await RawQmp.negotiated(path);
    const text = [backup({ "job-id": "a" }), { execute: "query-jobs" }, { execute: "query-version" }]
      .map((request, id) => JSON.stringify({ ...request, id }))
      .join("");
    client.send(text);
    for (const id of [0, 1, 2])
      expect(await client.nextAnswer()).toMatchObject({ id, return: expect.anything() as unknown });
    for (const byte of Buffer.from('{"execute":"query-jobs","id":"bytes"}')) client.send(Uint8Array.of(byte));
    const answer = await client.nextAnswer();
    expect(answer.id).toBe("bytes");
    expect(answer.return).toHaveLength(1);
    client.close();
  });

  it("sends events to every negotiated client, and to no other", async () => {
    const [one, two, silent] = await Promise.all([
      RawQmp.negotiated(path),
      RawQmp.negotiated(path),
      RawQmp.connect(path),
    ]);
    await silent.next();
    await one.ask(backup());
    host.job("disk").succeed();
    await one.ask({ execute: "query-status" });
    await two.ask({ execute: "query-status" });
    await silent.ask({ execute: "qmp_capabilities" });
    expect(one.events()).toEqual([
      "created",
      "running",
      "waiting",
      "pending",
      "BLOCK_JOB_COMPLETED",
      "concluded",
      "null",
    ]);
    expect(two.events()).toEqual(one.events());
    expect(silent.events()).toEqual([]);
    const stamp = one.messages.find(({ event }) => event !== undefined)?.timestamp;
    expect(Math.abs((stamp?.seconds ?? 0) - Date.now() / 1000)).toBeLessThan(60);
    for (const client of [one, two, silent]) client.close();
  });

  it("drops a client that does not read, and no other", async () => {
    const deaf = await RawQmp.negotiated(path);
    const reader = await RawQmp.negotiated(path);
    deaf.socket.pause();
    await reader.ask(backup());
    const job = host.job("disk");
    let dropped = false;
    deaf.socket.once("close", () => (dropped = true));
    // Some 6 MiB of events, more than the limit and the system's buffers together.
    for (let round = 0; round < 40; round++) {
      for (let count = 0; count < 1000; count++) job.to("running");
      await reader.ask({ execute: "query-status" });
    }
    deaf.socket.resume();
    if (!dropped) await once(deaf.socket, "close");
    expect(deaf.messages.length).toBeLessThan(reader.messages.length);
    expect(await reader.ask({ execute: "query-status" })).toHaveProperty("return");
    reader.close();
  });

  it("stops reading from a client that leaves its answers unread, and goes on when it reads", async () => {
    const client = await RawQmp.negotiated(path);
    client.socket.pause();
    const requestCount = 20_000;
    for (let id = 0; id < requestCount; id++) client.send(`{"execute":"query-commands","id":${id}}`);
    const other = await RawQmp.negotiated(path);
    expect(await other.ask({ execute: "query-status" })).toHaveProperty("return");
    expect(client.socket.writableLength).toBeGreaterThan(0);
    client.socket.resume();
    for (let id = 0; id < requestCount; id++) expect((await client.next()).id).toBe(id);
    client.close();
    other.close();
  });

  it("refuses the 33rd client with a reason", async () => {
    const clients = await Promise.all(Array.from({ length: 32 }, () => RawQmp.negotiated(path)));
    const refused = await RawQmp.connect(path);
    expect((await refused.next()).error?.desc).toMatch(/Too many clients: 32/);
    for (const client of [...clients, refused]) client.close();
  });

  it("lets clients that say nothing keep nobody out", async () => {
    const working = await RawQmp.negotiated(path);
    const silent = await Promise.all(Array.from({ length: 60 }, () => RawQmp.connect(path)));
    const newcomer = await RawQmp.negotiated(path);
    for (const client of [working, newcomer]) {
      expect(await client.ask({ execute: "query-status" })).toHaveProperty("return");
    }
    for (const client of [working, newcomer, ...silent]) client.close();
  });

  it("answers quit before it quits", async () => {
    const client = await RawQmp.negotiated(path);
    expect(await client.ask({ execute: "quit" })).toEqual({ return: {} });
    await client.ask({ execute: "query-status" });
    expect(host.quitCount).toBe(1);
    client.close();
  });
});

describe("the socket file", () => {
  it("is its owner's alone, and goes with the server", async () => {
    expect(statSync(path).mode & 0o777).toBe(0o600);
    await server.close();
    expect(existsSync(path)).toBe(false);
    expect(host.listeners.size).toBe(0);
  });

  it("is refused where a live server answers, or another kind of file is", async () => {
    const second = new ControlServer({ host, logger });
    await expect(second.listen(path)).rejects.toMatchObject({ code: "BUSY", object: path });
    expect(existsSync(path)).toBe(true);
    const file = join(folder, "file");
    writeFileSync(file, "precious");
    await expect(second.listen(file)).rejects.toMatchObject({ code: "EXISTS" });
    await expect(second.listen(join(folder, "x".repeat(120)))).rejects.toMatchObject({ code: "LIMIT" });
    await expect(second.listen(join(folder, "none", "sock"))).rejects.toMatchObject({
      object: join(folder, "none", "sock"),
    });
    expect(statSync(file).size).toBe(8);
    await second.close();
  });

  it("is replaced where a dead server left it", async () => {
    const stale = join(folder, "stale");
    const script = `require("net").createServer().listen(process.argv[1], () => process.kill(process.pid, "SIGKILL"))`;
    spawnSync(process.execPath, ["-e", script, stale]);
    expect(statSync(stale).isSocket()).toBe(true);
    const next = new ControlServer({ host, logger });
    await next.listen(stale);
    const client = await RawQmp.negotiated(stale);
    expect(statSync(stale).mode & 0o777).toBe(0o600);
    client.close();
    await next.close();
  });

  it("leaves the process's umask as it was", async () => {
    const before = process.umask();
    process.umask(before);
    const other = createServer();
    other.listen(join(folder, "other"));
    await once(other, "listening");
    expect(statSync(join(folder, "other")).mode & 0o777).toBe(0o777 & ~before);
    other.close();
  });
});

describe("jobs over the wire", () => {
  it("turns drive-backup's arguments into job options over the server's defaults", async () => {
    const client = await RawQmp.negotiated(path);
    await client.ask(backup({ "job-id": "a" }));
    await client.ask(
      backup({
        "job-id": "b",
        format: "qcow2",
        mode: "absolute-paths",
        speed: 1000,
        "on-source-error": "ignore",
        "on-target-error": "stop",
        "on-cbw-error": "break-guest-write",
        "x-perf": { "max-workers": 7, "min-cluster-size": 4096 },
        "buffer-size": 0,
        "on-buffer-full": "wait",
        "spill-dir": "/spill",
        "spill-limit": 5,
        "cbw-timeout-ms": 1500,
        "x-force": true,
        "x-direct": true,
        "x-cluster-size": 131072,
        "x-verify": true,
        "x-target-retries": 2,
        "x-backing-file": "base.qcow2",
        "x-backing-format": "qcow2",
        compress: true,
        "x-compression-type": "zlib",
        "x-compression-level": 9,
      }),
    );
    expect(host.job("a").options).toMatchObject({
      target: "/b/disk.raw",
      targetFormat: "raw",
      cowBufferSizeBytes: 123_456,
      workerCount: 4,
      onCbwError: "break-snapshot",
      force: false,
    });
    expect(host.job("b").options).toEqual({
      target: "/b/disk.raw",
      targetFormat: "qcow2",
      rateLimitBytes: 1000,
      onSourceError: "ignore",
      onTargetError: "stop",
      onCbwError: "break-guest-write",
      workerCount: 7,
      cowBufferSizeBytes: 0,
      onBufferFull: "wait",
      spillDir: "/spill",
      spillLimitBytes: 5,
      guestTimeoutMs: 1500,
      force: true,
      direct: true,
      clusterSizeBytes: 131072,
      verify: true,
      targetRetries: 2,
      backingFile: "base.qcow2",
      backingFormat: "qcow2",
      compression: { type: "zlib", level: 9 },
      sync: "full",
      snapshotExport: false,
    });
    client.close();
  });

  it.each([
    [{ sync: "bitmap", bitmap: "b" }, /^Bitmap 'b' could not be found$/],
    [{ sync: "incremental" }, /^must provide a valid bitmap name for 'incremental' sync mode$/],
    [{ sync: "bitmap", bitmap: "b0" }, /^Bitmap sync mode must be given when providing a bitmap$/],
    [
      { sync: "full", bitmap: "b0", "bitmap-mode": "never" },
      /^Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'$/,
    ],
    [
      { sync: "none", bitmap: "b0", "bitmap-mode": "always" },
      /^sync mode 'none' does not produce meaningful bitmap outputs$/,
    ],
    [{ "bitmap-mode": "never" }, /^Cannot specify bitmap sync mode without a bitmap$/],
    [{ sync: "fulll" }, /^Parameter 'sync' does not accept value 'fulll'$/],
    [{ speed: -1 }, /^Parameter 'speed' expects a non-negative value$/],
    [{ "buffer-size": -1 }, /^Parameter 'buffer-size' expects a non-negative value$/],
    [{ "cbw-timeout-ms": 0 }, /^Parameter 'cbw-timeout-ms' expects a positive value$/],
    [{ "cbw-timeout-ms": 2 ** 31 }, /^Parameter 'cbw-timeout-ms' expects a value of 2147483647 at most$/],
    [{ "auto-dismiss": "a" }, /^Invalid parameter type for 'auto-dismiss', expected: boolean$/],
    [
      { "x-perf": { "max-workers": "a" } },
      /^Invalid parameter type for 'x-perf.max-workers', expected: integer$/,
    ],
    [{ "x-perf": { foo: 1 } }, /^Parameter 'x-perf.foo' is unexpected$/],
    [{ "x-perf": { "max-workers": 0 } }, /^max-workers must be between 1 and 64$/],
    [{ "x-perf": { "min-cluster-size": 5000 } }, /power of 2/],
    [{ "x-perf": { "min-cluster-size": 1 << 20 } }, /not supported/],
    [{ format: "vmdk" }, /^Unknown file format 'vmdk'$/],
    [{ "job-id": "1 j" }, /^Invalid job ID '1 j'$/],
    [{ device: "nope" }, /^Cannot find device='nope' nor node-name='nope'$/],
    [{ mode: "existing", target: "/none/x.raw" }, /no such file/i],
    [{ "x-compression-type": "zlib" }, /need 'compress' true$/],
    [{ compress: false, "x-compression-level": 1 }, /need 'compress' true$/],
    [{ compress: true, "x-compression-type": "lzma" }, /does not accept value 'lzma'$/],
    [{ compress: true, "x-compression-type": "zlib", "x-compression-level": 10 }, /zlib has no level 10/],
    [{ "on-target-error": "enosp" }, /^Parameter 'on-target-error' does not accept value 'enosp'$/],
    [{ target: "" }, /file name/],
    [{ target: "a\0b" }, /'target' must not contain a NUL/],
    [{ target: "/x/a\ud800b" }, /'target' is not Unicode: it has a lone surrogate/],
    [{ "spill-dir": "a\0b" }, /'spill-dir' must not contain a NUL/],
    [{ "spill-dir": "/x/\udc00" }, /'spill-dir' is not Unicode/],
    [{ "x-backing-file": "a\0b" }, /'x-backing-file' must not contain a NUL/],
    [{ "x-backing-file": "\udfff" }, /'x-backing-file' is not Unicode/],
    [{ __proto__: null, constructor: 1 }, /^Parameter 'constructor' is unexpected$/],
  ])("refuses %j", async (args, desc) => {
    const client = await RawQmp.negotiated(path);
    const { error } = await client.ask(backup(args));
    expect(error).toMatchObject({ class: "GenericError", desc: expect.stringMatching(desc) as unknown });
    expect(host.starts).toEqual([]);
    client.close();
  });

  it("tells the first cause of a failure in events and in query-jobs, until it is dismissed", async () => {
    const client = await RawQmp.negotiated(path);
    await client.ask(backup({ "auto-dismiss": false }));
    host.job("disk").counters.bytesDone = 1000;
    host.job("disk").fail(ioError);
    const details = {
      code: "IO",
      object: "/b/.disk.raw.tmp",
      problem: "cannot write: input/output error",
      hint: "look at the disk",
      offset: 4096,
      errno: "EIO",
    };
    const [info] = (await client.ask({ execute: "query-jobs" })).return as Record<string, unknown>[];
    expect(info).toMatchObject({
      id: "disk",
      type: "backup",
      status: "concluded",
      "current-progress": 1000,
      "total-progress": 4096,
      error: ioError.message,
      "x-cowcatcher": { disk: "disk", target: "/b/disk.raw", "bytes-done": 1000, error: details },
    });
    expect(client.events()).toEqual([
      "created",
      "running",
      "BLOCK_JOB_ERROR",
      "aborting",
      "BLOCK_JOB_COMPLETED",
      "concluded",
    ]);
    const find = (name: string) => client.messages.find(({ event }) => event === name)?.data;
    expect(find("BLOCK_JOB_ERROR")).toEqual({ device: "disk", operation: "write", action: "report" });
    expect(find("BLOCK_JOB_COMPLETED")).toMatchObject({
      type: "backup",
      device: "disk",
      len: 4096,
      offset: 1000,
      speed: 0,
      error: ioError.message,
      "x-cowcatcher": { error: details },
    });
    expect((await client.ask(backup())).error?.desc).toBe("Job ID 'disk' already in use");
    await client.ask({ execute: "job-dismiss", arguments: { id: "disk" } });
    expect(client.events().at(-1)).toBe("null");
    expect(host.jobs()).toEqual([]);
    client.close();
  });

  it.each([true, false])("reports null once (the engine reports it itself: %s)", async (reportsNull) => {
    host.reportsNull = reportsNull;
    host.afterStart = ([job]) => job?.succeed();
    const client = await RawQmp.negotiated(path);
    await client.ask(backup());
    await client.ask({ execute: "query-status" });
    expect(client.events().filter((status) => status === "null")).toHaveLength(1);
    client.close();
  });

  it("shows a job that stopped on an error, and lets it go on", async () => {
    const client = await RawQmp.negotiated(path);
    await client.ask(backup());
    const job = host.job("disk");
    job.error = new CowcatcherError({ code: "NO_SPACE", object: "/b/disk.raw", problem: "full" });
    job.to("paused");
    const [info] = (await client.ask({ execute: "query-block-jobs" })).return as Record<string, unknown>[];
    expect(info).toMatchObject({ device: "disk", paused: true, "io-status": "nospace", status: "paused" });
    expect(client.messages.find(({ event }) => event === "BLOCK_JOB_ERROR")?.data).toMatchObject({
      action: "stop",
    });
    job.error = undefined;
    expect(await client.ask({ execute: "job-resume", arguments: { id: "disk" } })).toEqual({ return: {} });
    expect(job.status).toBe("running");
    client.close();
  });

  it("pauses, resumes, paces and cancels, with QEMU's refusals", async () => {
    const client = await RawQmp.negotiated(path);
    const job = (name: string, args: object) => client.ask({ execute: name, arguments: args });
    const desc = async (name: string, args: object) => (await job(name, args)).error?.desc;
    expect(await job("job-pause", { id: "x" })).toEqual({
      error: { class: "GenericError", desc: "Job not found" },
    });
    expect(await job("block-job-cancel", { device: "x" })).toEqual({
      error: { class: "DeviceNotActive", desc: "Block job 'x' not found" },
    });
    await client.ask(backup({ "auto-dismiss": false }));
    const refusal = (verb: string, state = "running") =>
      `Job 'disk' in state '${state}' cannot accept command verb '${verb}'`;
    for (const verb of ["complete", "finalize", "dismiss"]) {
      expect(await desc(`job-${verb}`, { id: "disk" })).toBe(refusal(verb));
    }
    expect(await desc("job-resume", { id: "disk" })).toBe("Can't resume a job that was not paused");
    expect(await job("block-job-pause", { device: "disk" })).toEqual({ return: {} });
    expect(await desc("job-pause", { id: "disk" })).toBe("Job is already paused");
    expect(await job("block-job-resume", { device: "disk" })).toEqual({ return: {} });
    expect(await desc("block-job-set-speed", { device: "disk", speed: -1 })).toMatch(/non-negative/);
    expect(await job("block-job-set-speed", { device: "disk", speed: 77 })).toEqual({ return: {} });
    expect(host.job("disk").speed).toBe(77);
    expect(await job("block-job-cancel", { device: "disk", force: true })).toEqual({ return: {} });
    expect(client.events().slice(-3)).toEqual(["aborting", "BLOCK_JOB_CANCELLED", "concluded"]);
    for (const verb of ["pause", "cancel"]) {
      expect(await desc(`job-${verb}`, { id: "disk" })).toBe(refusal(verb, "concluded"));
    }
    client.close();
  });

  it("says what the engine said when nothing could be started, and leaves the id free", async () => {
    const client = await RawQmp.negotiated(path);
    host.startError = new CowcatcherError({
      code: "EXISTS",
      object: "/b/disk.raw",
      problem: "exists already",
    });
    expect((await client.ask(backup())).error).toEqual({
      class: "GenericError",
      desc: "/b/disk.raw: exists already",
      "x-cowcatcher": { code: "EXISTS", object: "/b/disk.raw", problem: "exists already" },
    });
    host.startError = undefined;
    expect(await client.ask(backup())).toEqual({ return: {} });
    client.close();
  });
});

describe("transaction", () => {
  const action = (device: string, args: object = {}) => ({
    type: "drive-backup",
    data: { device, target: `/b/${device}`, sync: "full", ...args },
  });
  const transaction = (actions: unknown, mode?: string) => ({
    execute: "transaction",
    arguments: { actions, ...(mode === undefined ? {} : { properties: { "completion-mode": mode } }) },
  });

  it("starts all at once", async () => {
    const client = await RawQmp.negotiated(path);
    expect(await client.ask(transaction([action("disk"), action("data")]))).toEqual({ return: {} });
    expect(host.starts.map((requests) => requests.map(({ id }) => id))).toEqual([["disk", "data"]]);
    client.close();
  });

  it.each([
    [[action("disk"), { type: "abort", data: {} }], "Transaction aborted using Abort action"],
    [[action("disk"), action("nope")], "Cannot find device='nope' nor node-name='nope'"],
    [[action("disk"), action("disk")], "Job ID 'disk' already in use"],
    [[action("disk"), action("data", { zz: 1 })], "Parameter 'actions[1].data.zz' is unexpected"],
    [[{ type: "drive-backup", data: { device: "disk" } }], "Parameter 'actions[0].data.sync' is missing"],
    [[{ data: {} }], "Parameter 'actions[0].type' is missing"],
    [[{ type: "foo", data: {} }], "Parameter 'type' does not accept value 'foo'"],
    [5, "Invalid parameter type for 'actions', expected: array"],
    [Array.from({ length: 300 }, () => action("disk")), "A transaction has at most 256 actions"],
  ])("starts none when one is wrong: %#", async (actions, desc) => {
    const client = await RawQmp.negotiated(path);
    expect((await client.ask(transaction(actions))).error).toEqual({ class: "GenericError", desc });
    expect(host.starts).toEqual([]);
    client.close();
  });

  it("cancels the others of a group when one fails, and nobody else", async () => {
    const client = await RawQmp.negotiated(path);
    await client.ask(backup({ "job-id": "alone" }));
    await client.ask(transaction([action("disk"), action("data")], "grouped"));
    const [alone, disk, data] = host.jobs();
    disk?.fail(ioError);
    expect([alone?.status, disk?.error?.code, data?.error?.code]).toEqual(["running", "IO", "CANCELLED"]);
    client.close();
  });

  it("leaves the others alone when each is for itself", async () => {
    const client = await RawQmp.negotiated(path);
    await client.ask(transaction([action("disk"), action("data")], "individual"));
    host.job("disk").fail(ioError);
    expect(host.job("data").status).toBe("running");
    client.close();
  });
});
