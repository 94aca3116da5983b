// Another backup of the source: what a server says of its jobs, a wait for its end, and what a job makes of it.
import { createServer, type Server } from "node:net";
import { rmSync, mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { awaitFreeSource, refuseBusySource } from "../../../src/run/source-check.js";
import type { Job } from "../../../src/run/job.js";

let folder: string;
let server: Server;
let jobs: object[];
let own: string[];
const socket = (): string => join(folder, "qmp");

/** Answers as a server of ours, and as a QEMU. */
beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-source-"));
  [jobs, own] = [[], []];
  server = createServer((client) => {
    client.on("error", () => undefined);
    client.write(
      '{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0},"package":""},"capabilities":[]}}\n',
    );
    client.setEncoding("utf8").on("data", (text: string) => {
      for (const line of text.trim().split("\n")) {
        const { execute, id } = JSON.parse(line) as { execute: string; id: number };
        const answers: Record<string, unknown> = {
          "query-jobs": jobs,
          "query-version": { qemu: { major: 7, minor: 2, micro: 0 }, package: "" },
          "query-block": [],
          "query-named-block-nodes": own.map((name) => ({ "node-name": name, drv: "raw", image: {} })),
        };
        client.write(`${JSON.stringify({ return: answers[execute] ?? [], id })}\n`);
      }
    });
  });
  await new Promise<void>((settle) => server.listen(socket(), settle));
});
afterEach(() => {
  server.close();
  rmSync(folder, { recursive: true, force: true });
});

const serverJob = (disk: string, status: string): object => ({
  ...{ id: "j", type: "backup", status },
  "x-cowcatcher": { disk, target: "/b/manual.qcow2" },
});

describe("a server's disk is busy", () => {
  const check = () =>
    refuseBusySource({ kind: "control", socket: socket(), disks: undefined }, ["root", "data"]);

  it.each(["created", "running", "paused", "aborting", "pending"])(
    "while a job of it is %s",
    async (status) => {
      jobs = [serverJob("other", "running"), serverJob("data", status)];
      await expect(check()).rejects.toMatchObject({
        ...{ code: "BUSY", object: "data" },
        problem: "another backup of this disk is running, to /b/manual.qcow2",
      });
    },
  );

  it("no more when its job is over, and not by jobs of other disks", async () => {
    jobs = [serverJob("data", "concluded"), serverJob("other", "running")];
    await check();
  });
});

describe("a guest that QEMU runs is busy", () => {
  const check = () => refuseBusySource({ kind: "qmp", socket: socket(), disks: undefined }, []);

  it("while a backup that lives has something in it, not by what a dead one has left", async () => {
    const { runName, partName } = await import("../../../src/qemu/names.js");
    own = ["disk0", partName("cowcatcher-999999.000000001", 0, "fleece")];
    await check();
    own.push(partName(runName(), 0, "fleece"));
    await expect(check()).rejects.toMatchObject({ code: "BUSY", object: socket() });
  });
});

describe("the wait for a source", () => {
  const job = (lockWaitMs: number) =>
    ({ source: { kind: "control", socket: "/c", disks: undefined }, lockWaitMs }) as unknown as Job;
  const busy = new CowcatcherError({ code: "BUSY", object: "root", problem: "is busy" });

  it("lasts until it is free", async () => {
    let asked = 0;
    const check = () => (asked++ === 0 ? Promise.reject(busy) : Promise.resolve());
    await awaitFreeSource(job(600_000), ["root"], check, new AbortController().signal);
    expect(asked).toBe(2);
  });

  it("ends with lock-wait, with an interruption, and with any other error", async () => {
    const never = () => Promise.reject(busy);
    const stop = new AbortController();
    await expect(awaitFreeSource(job(0), [], never, stop.signal)).rejects.toBe(busy);
    const gone = new CowcatcherError({ code: "NOT_FOUND", object: "root", problem: "is gone" });
    await expect(awaitFreeSource(job(600_000), [], () => Promise.reject(gone), stop.signal)).rejects.toBe(
      gone,
    );
    const waiting = awaitFreeSource(job(600_000), [], never, stop.signal);
    stop.abort();
    await expect(waiting).rejects.toBe(busy);
  });
});
