// Backups that are cancelled before their T0, with storage that does not answer for as long as the test says: nbdkit's
// pause filter stands between a server and its storage, or between a backup and its target.
import { existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { once } from "node:events";
import { connect, createServer } from "node:net";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../../support/cli.js";
import { expectSame, makeDisk, noise } from "../../support/disks.js";
import { nbdkit, type RunningServer } from "../../support/nbd-servers.js";
import { RawQmp } from "../../support/raw-qmp.js";
import { leftovers, Process, scratchFolder, Server, stopAll, until } from "../../support/server.js";

const MiB = 1024 * 1024;
const WAIT_MS = 60_000;
/** What the user is promised; a machine that has more to do may take longer, but nothing waits for a limit. */
const GUEST_TIMEOUT = "10m";

let folder: string;
let target: string;

beforeEach(() => {
  folder = scratchFolder();
  target = join(folder, "target.raw");
});
afterEach(stopAll);

interface Storage extends RunningServer {
  /** No request is answered from now on. */
  pause(): Promise<void>;
  resume(): Promise<void>;
  /** The requests that it has had. */
  log(): string;
}

async function pausableStorage(name: string, ...plugin: string[]): Promise<Storage> {
  const control = join(folder, `${name}-pause.sock`);
  const logFile = join(folder, `${name}.log`);
  const filters = ["--filter=log", "--filter=pause"];
  const server = await nbdkit(...filters, ...plugin, `pause-control=${control}`, `logfile=${logFile}`);
  const say = async (letter: string): Promise<void> => {
    const socket = connect(control);
    socket.write(letter);
    const [answer] = (await once(socket, "data")) as [Buffer];
    socket.destroy();
    expect(answer.toString()).toBe(letter.toUpperCase());
  };
  return {
    ...server,
    pause: () => say("p"),
    resume: () => say("r"),
    log: () => readFileSync(logFile, "utf8"),
  };
}

const write = (uri: string, offset: string): Process =>
  new Process("qemu-io", ["-f", "raw", "-c", `write -P 7 ${offset} 64k`, uri]);

async function untilStatus(server: Server, status: string, count = 1): Promise<string[]> {
  const ids: string[] = [];
  await until(
    `${count} jobs are ${status}`,
    async () => {
      const { stdout } = await server.jobs("--json");
      ids.splice(0);
      for (const job of JSON.parse(stdout) as { job: string; status: string }[]) {
        if (job.status === status) ids.push(job.job);
      }
      return ids.length === count;
    },
    WAIT_MS,
  );
  return ids;
}

/** How many threads the server has: none may be left. */
const threadCount = (server: Server): number => readdirSync(`/proc/${server.process.pid}/task`).length;

async function expectNothingLeft(server: Server): Promise<void> {
  expect((await server.jobs("--json")).stdout.trim()).toBe("[]");
  expect(existsSync(target)).toBe(false);
  expect(leftovers(folder)).toEqual([]);
  expect(server.openFiles().filter((path) => path.includes(".cowcatcher-"))).toEqual([]);
}

describe("while a guest's write hangs", () => {
  let storage: Storage;
  let server: Server;
  let hung: Process;

  beforeEach(async () => {
    storage = await pausableStorage("disk", "memory", "8M");
    const other = await makeDisk(join(folder, "other.raw"), noise(1 * MiB));
    server = await Server.start(folder, [`${storage.uri}=disk`, `${other}=other`]);
    await storage.pause();
    hung = write(server.uri(), "0");
    await until("the write is in flight", () => storage.log().includes("Write"), WAIT_MS);
  });

  /** The storage lives again: the guest has lost nothing, and the next backup is as good as any. */
  async function expectGoesOn(): Promise<void> {
    await expectNothingLeft(server);
    await storage.resume();
    expect(await hung.end(WAIT_MS)).toMatchObject({ code: 0, stderr: "" });
    const backup = server.backup("--disk", "disk", "-O", "raw", target);
    expect(await backup.end(WAIT_MS)).toMatchObject({ code: 0, stderr: "" });
    expect((await write(server.uri(), "1M").end(WAIT_MS)).code).toBe(0);
    const check = await cowcatcher(["compare", target, server.uri()], { env: {} });
    expect(check.code).toBe(1);
    expect(check.stdout + check.stderr).toContain("1048576");
    expect(await server.stop()).toMatchObject({ code: 0, stderr: "" });
  }

  it("SIGINT and SIGTERM of the client end the backup at once", { timeout: 2 * WAIT_MS }, async () => {
    for (const [signal, code] of [
      ["SIGINT", 130],
      ["SIGTERM", 143],
    ] as const) {
      const backup = server.backup("--disk", "disk", "-O", "raw", target, "--guest-timeout", GUEST_TIMEOUT);
      await untilStatus(server, "created");
      backup.process.kill(signal);
      const { code: found, stderr } = await backup.end(WAIT_MS);
      expect(stderr).toMatch(new RegExp(`^cowcatcher: backup: interrupted by ${signal} .*\n$`));
      expect(found).toBe(code);
      await expectNothingLeft(server);
    }
    await expectGoesOn();
  });

  it("`jobs cancel` of one disk ends the start of both, and the other guest goes on", async () => {
    const others = ["--disk", "other", join(folder, "other-target.raw")];
    const backup = server.backup(
      ...["--disk", "disk", target, ...others, "-O", "raw", "--guest-timeout", GUEST_TIMEOUT],
    );
    const ids = await untilStatus(server, "created", 2);
    // The gates are closed, or about to be; in either case the write goes through in the end.
    const guest = write(server.uri("other"), "64k");
    const id = ids.find((name) => name.startsWith("other")) ?? "";
    expect(await server.jobs("cancel", id)).toMatchObject({ code: 0, stderr: "" });
    const { code, stderr } = await backup.end(WAIT_MS);
    expect(stderr).toMatch(/other-target\.raw: the backup was cancelled before it began\n$/);
    expect(code).toBe(1);
    expect(await guest.end(WAIT_MS)).toMatchObject({ code: 0, stderr: "" });
    expect(existsSync(join(folder, "other-target.raw"))).toBe(false);
    await expectGoesOn();
  });

  it("job-cancel and block-job-cancel end it with QEMU's events", { timeout: 2 * WAIT_MS }, async () => {
    const other = await RawQmp.negotiated(server.control);
    for (const [command, key] of [
      ["job-cancel", "id"],
      ["block-job-cancel", "device"],
    ] as const) {
      const client = await RawQmp.negotiated(server.control);
      const job = {
        device: "disk",
        target,
        format: "raw",
        sync: "full",
        "job-id": "j",
        "auto-dismiss": false,
      };
      const starting = client.ask({
        execute: "drive-backup",
        arguments: { ...job, "cbw-timeout-ms": 600_000 },
      });
      await untilStatus(server, "created");
      expect(await other.ask({ execute: "query-jobs" })).toMatchObject({
        return: [
          { id: "j", type: "backup", status: "created", "current-progress": 0, "total-progress": 8 * MiB },
        ],
      });
      const cancel = { execute: command, arguments: { [key]: "j" } };
      expect(await other.ask(cancel)).toEqual({ return: {} });
      expect(await starting).toMatchObject({
        error: { class: "GenericError", "x-cowcatcher": { code: "CANCELLED" } },
      });
      expect(client.events()).toEqual(["created", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
      expect(await other.ask(cancel)).toMatchObject({ error: {} });
      client.close();
    }
    other.close();
    await expectGoesOn();
  });

  it("a server that ends takes the start with it", async () => {
    const backup = server.backup("--disk", "disk", "-O", "raw", target, "--guest-timeout", GUEST_TIMEOUT);
    await untilStatus(server, "created");
    server.process.kill("SIGTERM");
    expect((await backup.end(WAIT_MS)).code).toBe(1);
    await storage.resume();
    expect((await server.process.end(WAIT_MS)).code).toBe(0);
    expect(leftovers(folder)).toEqual([]);
    expect(existsSync(target)).toBe(false);
  });
});

describe("while the target is being made", () => {
  const cases: [string, () => Promise<string>][] = [
    [
      "on an export whose storage hangs",
      async () => {
        const storage = await pausableStorage("target", "memory", "8M");
        await storage.pause();
        return storage.uri;
      },
    ],
    [
      "at a server that says nothing",
      async () => {
        const silent = createServer(() => undefined);
        silent.unref();
        const socket = join(folder, "silent.sock");
        silent.listen(socket);
        await once(silent, "listening");
        return `nbd+unix:///?socket=${socket}`;
      },
    ],
  ];

  it.each(cases)("%s, the backup is cancelled at once", async (_, makeTarget) => {
    const disk = await makeDisk(join(folder, "disk.qcow2"), noise(1 * MiB));
    const server = await Server.start(folder, [disk]);
    const uri = await makeTarget();
    const backup = server.backup("-O", "raw", uri);
    const [id = ""] = await untilStatus(server, "created");
    expect(await server.jobs("cancel", id)).toMatchObject({ code: 0, stderr: "" });
    const { code, stderr } = await backup.end(WAIT_MS);
    expect(stderr).toContain("the backup was cancelled before it began");
    expect(code).toBe(1);
    expect((await server.backup("-O", "raw", target).end(WAIT_MS)).code).toBe(0);
    await expectSame(disk, target);
    expect(await server.stop()).toMatchObject({ code: 0, stderr: "" });
  });
});

describe("at any moment of a start", () => {
  /** Up to well after T0, on a quiet machine. */
  const DELAYS_MS = [0, 2, 6, 12, 25, 45, 70, 110];

  it(
    "a cancel ends the job, before T0 or after it, and the next backup is whole",
    { timeout: 120_000 },
    async () => {
      const disk = await makeDisk(join(folder, "disk.qcow2"), noise(8 * MiB));
      const server = await Server.start(folder, [disk], { args: ["--cow-buffer-size", "64M"] });
      const client = await RawQmp.negotiated(server.control);
      const other = await RawQmp.negotiated(server.control);
      // A cancel may come before a job has any. This one has all of them: it lasts longer than they take to boot.
      const slow = server.backup("-O", "raw", "--rate-limit", "4M", target);
      expect((await slow.end(WAIT_MS)).code).toBe(0);
      rmSync(target);
      let threads = threadCount(server);
      for (const [index, delayMs] of DELAYS_MS.entries()) {
        const id = `j${index}`;
        // Slow enough not to be over; another buffer size each time means threads and memory that are new.
        const args = { device: "disk", target, format: "raw", sync: "full", "job-id": id, speed: MiB };
        const size = { "buffer-size": (64 + index) * MiB };
        const starting = client.ask({ execute: "drive-backup", arguments: { ...args, ...size } });
        await new Promise((resolve) => setTimeout(resolve, delayMs));
        // The two connections are no queue: this one may be heard before the start.
        for (;;) {
          const { error } = await other.ask({ execute: "job-cancel", arguments: { id } });
          if (error?.desc !== "Job not found") break;
        }
        await starting;
        await until(
          "the job is gone",
          async () => {
            const { return: jobs } = await other.ask({ execute: "query-jobs" });
            return Array.isArray(jobs) && jobs.length === 0;
          },
          WAIT_MS,
        );
        // Of two connections one may be heard before the other; on its own one, events come before a later reply.
        await client.ask({ execute: "query-jobs" });
        const events = client.events();
        expect(events.slice(events.lastIndexOf("created")).filter((name) => name !== "running")).toEqual([
          "created",
          "aborting",
          "BLOCK_JOB_CANCELLED",
          "concluded",
          "null",
        ]);
        await expectNothingLeft(server);
        threads = Math.max(threads, threadCount(server));
      }
      expect((await server.backup("-O", "raw", target).end(WAIT_MS)).code).toBe(0);
      await expectSame(disk, target);
      await until("no threads are left but the last job's", () => threadCount(server) <= threads, WAIT_MS);
      client.close();
      other.close();
      expect(await server.stop()).toMatchObject({ code: 0, stderr: "" });
    },
  );
});
