// Lives of jobs, with a pool of threads and a target that do what the test says.

import { EventEmitter } from "node:events";
import type { MessagePort } from "node:worker_threads";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { LiveHost } from "../../src/backup/live-host.js";
import { JOB_DEFAULTS, type JobOptions } from "../../src/backup/options.js";
import { DiskNode } from "../../src/cow/disk-node.js";
import { CTL_RUN, RUN_ABORTING, type SharedBuffers } from "../../src/cow/shared.js";
import { CowcatcherError } from "../../src/errors.js";
import type { Image } from "../../src/image/device.js";
import type { Target } from "../../src/target/target.js";
import { ColdDisk, MiB, turns } from "../support/cow-engine.js";

interface FakeTask {
  ready: () => void;
  port: MessagePort;
  end: (result: unknown) => void;
}

class FakePool extends EventEmitter {
  static made: FakePool[] = [];
  /** Workers that come up by themselves; the others when the test lets them. */
  static startsWorkers = Infinity;
  readonly tasks: FakeTask[] = [];
  #destroyed: () => void = () => {};
  readonly gone = new Promise<void>((resolve) => {
    this.#destroyed = resolve;
  });
  holdDestroy = false;

  constructor() {
    super();
    FakePool.made.push(this);
  }

  run(task: { port: MessagePort; shared: SharedBuffers }): Promise<unknown> {
    return new Promise((resolve) => {
      const end = (result: unknown) => {
        task.port.close();
        resolve(result);
      };
      task.port.on("message", (message: { kind: string }) => {
        if (message.kind === "leave") end({});
        else void untilAborted(new Int32Array(task.shared.control)).then(() => end({}));
      });
      const ready = () => task.port.postMessage({ kind: "ready" });
      this.tasks.push({ ready, port: task.port, end });
      if (FakePool.startsWorkers-- > 0) ready();
    });
  }

  destroy(): Promise<void> {
    if (!this.holdDestroy) this.#destroyed();
    for (const { end } of this.tasks) end({});
    return this.gone;
  }

  letGo(): void {
    this.#destroyed();
  }
}

async function untilAborted(control: Int32Array): Promise<void> {
  for (;;) {
    const state = Atomics.load(control, CTL_RUN);
    if (state === RUN_ABORTING) return;
    await Atomics.waitAsync(control, CTL_RUN, state, 100).value;
  }
}

class FakeTarget implements Target {
  static made: FakeTarget[] = [];
  readonly granularityBytes = 1;
  readonly description = { format: "null", name: "target" } as const;
  readonly unfinishedPath = null;
  readonly calls: string[] = [];
  completion: Promise<void> = Promise.resolve();

  constructor(readonly name: string) {
    FakeTarget.made.push(this);
  }

  complete(): Promise<void> {
    this.calls.push("complete");
    return this.completion;
  }

  commit(): Promise<void> {
    this.calls.push("commit");
    return Promise.resolve();
  }

  async finish(): Promise<void> {
    await this.complete();
    await this.commit();
  }

  abort(): Promise<void> {
    this.calls.push("abort");
    return Promise.resolve();
  }

  abortSync(): void {
    this.calls.push("abortSync");
  }
}

// The factory runs before the classes above exist, its functions after.
vi.mock("piscina", () => ({
  Piscina: function () {
    return new FakePool();
  },
}));
vi.mock("../../src/target/create.js", () => ({
  createTarget: ({ path }: { path: string }) => Promise.resolve(new FakeTarget(path)),
}));

const released: string[] = [];
let freezeError: Error | null = null;
let host: LiveHost;
let disks: ColdDisk[];

function nodeOf(name: string, disk: ColdDisk): DiskNode {
  const image = Object.assign(disk, {
    path: name,
    format: "raw",
    readOnly: false,
    clusterSizeBytes: 0,
    backing: null,
    freeze: () => {
      if (freezeError !== null && name === "b") throw freezeError;
      return {
        description: { format: "null", name, sizeBytes: disk.sizeBytes },
        release: () => released.push(name),
      };
    },
  });
  return new DiskNode(name, image as unknown as Image);
}

beforeEach(() => {
  FakePool.made = [];
  FakeTarget.made = [];
  FakePool.startsWorkers = Infinity;
  freezeError = null;
  released.length = 0;
  disks = [new ColdDisk(4 * MiB), new ColdDisk(4 * MiB)];
  const [a, b] = disks as [ColdDisk, ColdDisk];
  host = new LiveHost(
    new Map([
      ["a", nodeOf("a", a)],
      ["b", nodeOf("b", b)],
    ]),
    () => undefined,
  );
});

afterEach(() => host.close());

function order(disk: string, options: Partial<JobOptions> = {}) {
  const job: JobOptions = {
    ...JOB_DEFAULTS,
    target: `target-of-${disk}`,
    targetFormat: "raw",
    workerCount: 2,
    cowBufferSizeBytes: 2 * MiB,
    onBufferFull: "cancel",
    ...options,
  };
  return { id: `job-${disk}`, disk, options: job };
}

async function start(disk: string) {
  const [job] = await host.startBackups([order(disk)]);
  const pool = FakePool.made.at(-1);
  const target = FakeTarget.made.at(-1);
  if (job === undefined || pool === undefined || target === undefined) throw new Error("not started");
  return { job, pool, target };
}

async function untilStatus(job: { status: string }, status: string): Promise<void> {
  await vi.waitFor(() => expect(job.status).toBe(status), { interval: 1 });
}

describe("preparing", () => {
  it("fails with a typed error when the system gives no thread, and does not end the process", async () => {
    FakePool.startsWorkers = 0;
    const starting = host.startBackups([order("a")]).catch((error: unknown) => error);
    await vi.waitFor(() => expect(FakePool.made[0]?.tasks.length).toBe(2));
    FakePool.made[0]?.emit("error", new Error("ERR_WORKER_INIT_FAILED: EAGAIN"));
    const error = (await starting) as CowcatcherError;
    expect(error).toBeInstanceOf(CowcatcherError);
    expect(error.code).toBe("WORKER");
    expect(FakeTarget.made[0]?.calls).toContain("abort");
    expect(host.jobs()).toEqual([]);
  });

  it("a worker that dies before T0 fails the request: no job starts that has failed already", async () => {
    const death = { code: "WORKER", object: "backup", problem: "a worker thread died" } as const;
    FakePool.startsWorkers = 2;
    const starting = host.startBackups([order("a"), order("b")]).catch((error: unknown) => error);
    // The first of the two is ready, the second still comes up.
    await vi.waitFor(() => expect(FakePool.made.length).toBe(2), { interval: 0 });
    FakePool.made[0]?.tasks[0]?.end({ error: death });
    await turns();
    for (const { ready } of FakePool.made[1]?.tasks ?? []) ready();
    const error = (await starting) as CowcatcherError;
    expect(error.code).toBe("WORKER");
    expect(host.jobs()).toEqual([]);
    expect(FakeTarget.made.map(({ calls }) => calls)).toEqual([["abort"], ["abort"]]);
  });

  it("leaves nothing when the second of two disks cannot be frozen", async () => {
    freezeError = new Error("no memory");
    await expect(host.startBackups([order("a"), order("b")])).rejects.toThrow("no memory");
    expect(host.jobs()).toEqual([]);
    expect(FakeTarget.made.map(({ calls }) => calls)).toEqual([["abort"], ["abort"]]);
    expect(released).toEqual(["a"]);
    freezeError = null;
    const { job } = await start("a");
    expect(job.status).toBe("running");
  });
});

describe("cancel", () => {
  it("when the copy has just ended removes the target instead of finishing it", async () => {
    const { job, pool, target } = await start("a");
    pool.holdDestroy = true;
    for (const { end } of pool.tasks) end({});
    await turns();
    // All is copied, and the threads are on their way out.
    job.cancel();
    expect(job.status).toBe("aborting");
    pool.letGo();
    await untilStatus(job, "concluded");
    expect(job.error?.code).toBe("CANCELLED");
    expect(target.calls).toEqual(["abort"]);
  });

  it("ends a job whose target does not come to an end of its sync", async () => {
    const { job, pool, target } = await start("a");
    target.completion = new Promise(() => {});
    for (const { end } of pool.tasks) end({});
    await untilStatus(job, "pending");
    job.cancel();
    await untilStatus(job, "concluded");
    expect(job.error?.code).toBe("CANCELLED");
    expect(target.calls).toEqual(["complete", "abort"]);
  });

  it("twice is once", async () => {
    const { job, target } = await start("a");
    job.cancel();
    job.cancel();
    await untilStatus(job, "concluded");
    job.cancel();
    expect(job.status).toBe("concluded");
    expect(target.calls).toEqual(["abort"]);
    expect(released).toEqual(["a"]);
  });
});

describe("pause and resume", () => {
  it("a worker's word that it stopped, come late, neither pauses a resumed job nor leaves its error behind", async () => {
    const { job, pool } = await start("a");
    const error = { code: "IO", object: "target", problem: "cannot write" };
    job.pause();
    job.resume();
    pool.tasks[0]?.port.postMessage({ kind: "stopped", error });
    await turns(10);
    expect(job.status).toBe("running");
    expect(job.error).toBeUndefined();
    for (const { end } of pool.tasks) end({});
    await untilStatus(job, "concluded");
    expect(job.error).toBeUndefined();
  });

  it("neither has an effect on a job that has been cancelled", async () => {
    const { job } = await start("a");
    job.pause();
    expect(job.status).toBe("paused");
    job.cancel();
    job.resume();
    job.pause();
    expect(job.status).toBe("aborting");
    await untilStatus(job, "concluded");
    expect(job.error?.code).toBe("CANCELLED");
  });
});

describe("many jobs", () => {
  it("leave no listeners on the process", async () => {
    const count = () => process.eventNames().reduce((sum, name) => sum + process.listenerCount(name), 0);
    const before = count();
    for (let i = 0; i < 20; i++) {
      const { job, pool } = await start("a");
      for (const { end } of pool.tasks) end({});
      await untilStatus(job, "concluded");
      host.dismiss(job.id);
    }
    expect(count()).toBe(before);
    expect(host.jobs()).toEqual([]);
  });
});
