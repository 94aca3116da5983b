// Lives of jobs, with a pool of threads and a target that do what the test says.

import { EventEmitter } from "node:events";
import type { MessagePort } from "node:worker_threads";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { UNDO_GRACE_MS } from "../../../src/backup/job/start.js";
import { LiveHost } from "../../../src/backup/job/live-host.js";
import { JOB_DEFAULTS, type JobOptions } from "../../../src/backup/options.js";
import { DiskNode } from "../../../src/cow/disk-node.js";
import { CNT_DONE_BYTES, CTL_RUN, RUN_ABORTING, type SharedBuffers } from "../../../src/cow/shared.js";
import { CowcatcherError } from "../../../src/errors.js";
import type { Image } from "../../../src/block/device.js";
import type { Target } from "../../../src/target/target.js";
import { LocalHands } from "../../support/storage-hands.js";
import { ColdDisk, MiB, turns } from "../../support/cow-engine.js";

const WAIT_MS = 60_000;

interface FakeTask {
  ready: () => void;
  port: MessagePort;
  end: (result: unknown) => void;
  shared: SharedBuffers;
}

class FakePool extends EventEmitter {
  static made: FakePool[] = [];
  static onRun: () => void = () => undefined;
  /** The system has no more threads than these. */
  static threadsMax = Infinity;
  /** Workers that come up by themselves; the others when the test lets them. */
  static startsWorkers = Infinity;
  readonly tasks: FakeTask[] = [];
  /** None whose boot somebody would have to wait for. */
  readonly threads = [];
  isDestroyed = false;
  /** No task ends any more. */
  isStuck = false;

  constructor(readonly maxThreads: number) {
    super();
    FakePool.made.push(this);
  }

  run(task: { port: MessagePort; shared: SharedBuffers }): Promise<unknown> {
    FakePool.onRun();
    if (this.tasks.length >= FakePool.threadsMax) throw new Error("ERR_WORKER_INIT_FAILED: EAGAIN");
    return new Promise((resolve) => {
      const end = (result: unknown) => {
        if (this.isStuck) return;
        task.port.close();
        resolve(result);
      };
      task.port.on("message", (message: { kind: string }) => {
        if (message.kind === "leave") end({});
        else void untilAborted(new Int32Array(task.shared.control)).then(() => end({}));
      });
      const ready = () => task.port.postMessage({ kind: "ready" });
      this.tasks.push({ ready, port: task.port, end, shared: task.shared });
      if (FakePool.startsWorkers-- > 0) ready();
    });
  }

  destroy(): Promise<void> {
    this.isDestroyed = true;
    for (const { end } of this.tasks) end({});
    return this.isStuck ? new Promise(() => {}) : Promise.resolve();
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
  /** Targets that were asked for, and what making one waits for. */
  static askedCount = 0;
  static making: Promise<void> = Promise.resolve();
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
vi.mock("../../../src/backup/copy/piscina.js", () => ({
  loadPiscina: () => ({
    Piscina: function ({ maxThreads }: { maxThreads: number }) {
      return new FakePool(maxThreads);
    },
  }),
}));
vi.mock("../../../src/target/create.js", () => ({
  async createTarget({ path }: { path: string }) {
    FakeTarget.askedCount++;
    await FakeTarget.making;
    return new FakeTarget(path);
  },
}));

const released: string[] = [];
let freezeError: Error | null = null;
/** Of a guest's write, while it lasts. */
let writing: Promise<void> | undefined;
let host: LiveHost;
let nodes: Map<string, DiskNode>;
let disks: ColdDisk[];

function nodeOf(name: string, disk: ColdDisk): DiskNode {
  const image = Object.assign(disk, {
    path: name,
    format: "raw",
    readOnly: false,
    clusterSizeBytes: 0,
    backing: null,
    files: [],
    write: () => writing,
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
  FakeTarget.askedCount = 0;
  FakeTarget.making = Promise.resolve();
  FakePool.startsWorkers = Infinity;
  FakePool.threadsMax = Infinity;
  FakePool.onRun = () => undefined;
  freezeError = null;
  writing = undefined;
  released.length = 0;
  disks = [new ColdDisk(4 * MiB), new ColdDisk(4 * MiB)];
  const [a, b] = disks as [ColdDisk, ColdDisk];
  nodes = new Map([
    ["a", nodeOf("a", a)],
    ["b", nodeOf("b", b)],
  ]);
  host = new LiveHost(nodes, () => undefined, undefined, new Map(), new LocalHands());
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
  await vi.waitFor(() => expect(job.status).toBe(status), { interval: 1, timeout: WAIT_MS });
}

describe("preparing", () => {
  it("fails with a typed error when the system gives no thread, and does not end the process", async () => {
    FakePool.startsWorkers = 0;
    const starting = host.startBackups([order("a")]).catch((error: unknown) => error);
    await vi.waitFor(() => expect(FakePool.made[0]?.tasks.length).toBe(1), { timeout: WAIT_MS });
    FakePool.made[0]?.emit("error", new Error("ERR_WORKER_INIT_FAILED: EAGAIN"));
    const error = (await starting) as CowcatcherError;
    expect(error).toBeInstanceOf(CowcatcherError);
    expect(error.code).toBe("WORKER");
    expect(FakeTarget.made[0]?.calls).toContain("abort");
    expect(host.jobs()).toEqual([]);
  });

  it("starts the first worker a turn of the event loop before T0, the others in turns after it", async () => {
    let turn = 0;
    let handle = setImmediate(function count() {
      turn++;
      handle = setImmediate(count);
    });
    const turnsOfStarts: number[] = [];
    FakePool.onRun = () => turnsOfStarts.push(turn);
    try {
      await host.startBackups([order("a", { workerCount: 3 })]);
      const turnOfT0 = turn;
      expect(turnsOfStarts).toHaveLength(1);
      expect(turnsOfStarts[0]).toBeLessThan(turnOfT0);
      await vi.waitFor(() => expect(turnsOfStarts).toHaveLength(3), { interval: 1, timeout: WAIT_MS });
      expect(new Set([...turnsOfStarts, turnOfT0]).size).toBe(4);
    } finally {
      clearImmediate(handle);
    }
  });

  it("starts no other worker where the first has found nothing left to do", async () => {
    const { job, pool } = await start("a");
    pool.tasks[0]?.end({});
    await untilStatus(job, "concluded");
    expect(pool.tasks).toHaveLength(1);
    expect(job.error).toBeUndefined();
  });

  it("fails after T0 when the system has a thread for the first worker only, and lets that one go", async () => {
    FakePool.threadsMax = 1;
    const { job } = await start("a");
    await untilStatus(job, "concluded");
    expect(job.error?.code).toBe("WORKER");
    expect(FakePool.made[0]?.isDestroyed).toBe(false);
    expect(FakeTarget.made[0]?.calls).toEqual(["abort"]);
    FakePool.threadsMax = Infinity;
    expect((await start("b")).job.status).toBe("running");
  });

  it("a worker that dies before T0 fails the request: no job starts that has failed already", async () => {
    const death = { code: "WORKER", object: "backup", problem: "a worker thread died" } as const;
    FakePool.startsWorkers = 1;
    const starting = host.startBackups([order("a"), order("b")]).catch((error: unknown) => error);
    // The first of the two is ready, the second still comes up.
    await vi.waitFor(() => expect(FakePool.made.length).toBe(2), { interval: 0, timeout: WAIT_MS });
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

describe("a start", () => {
  it("gives up where the storage of one of its disks does not answer within the shortest of its guests' limits", async () => {
    let answer: () => void = () => undefined;
    writing = new Promise((resolve) => (answer = resolve));
    const hung = nodes.get("b")?.write(new Uint8Array(1), 0, 1, 0);
    const orders = [order("a", { guestTimeoutMs: 30 }), order("b", { guestTimeoutMs: 1e9 })];
    await expect(host.startBackups(orders)).rejects.toMatchObject({ code: "GUEST_TIMEOUT" });
    expect(host.jobs()).toEqual([]);
    expect(FakeTarget.made.map(({ calls }) => calls)).toEqual([["abort"], ["abort"]]);
    writing = undefined;
    expect(nodes.get("a")?.write(new Uint8Array(1), 0, 1, 0)).toBeUndefined();
    answer();
    await hung;
    const { job } = await start("b");
    expect(job.status).toBe("running");
  });
});

describe("a start that is cancelled", () => {
  /** With workers that come up when the test lets them. */
  async function startSlowly(disk: string) {
    FakePool.startsWorkers = 0;
    const starting = host.startBackups([order(disk)]).catch((error: unknown) => error);
    await vi.waitFor(() => expect(FakePool.made[0]?.tasks.length).toBe(1), { interval: 1, timeout: WAIT_MS });
    FakePool.startsWorkers = Infinity;
    const [job] = host.jobs();
    const [pool] = FakePool.made;
    if (job === undefined || pool === undefined) throw new Error("not listed");
    expect(job).toMatchObject({ id: `job-${disk}`, status: "created" });
    return { job, pool, starting };
  }

  it("while its workers come up leaves threads, buffer and tables to the next job", async () => {
    const { job, pool, starting } = await startSlowly("a");
    job.cancel();
    expect(job.status).toBe("aborting");
    expect(await starting).toMatchObject({ code: "CANCELLED", object: "target-of-a" });
    expect(job.status).toBe("null");
    expect(host.jobs()).toEqual([]);
    expect(FakeTarget.made[0]?.calls).toEqual(["abort"]);
    const first = sharedOf(pool);
    const second = sharedOf((await start("a")).pool);
    expect(FakePool.made).toEqual([pool]);
    expect(second.buffer.memory).toBe(first.buffer.memory);
    expect(tablesOf(second).every((table) => tablesOf(first).includes(table))).toBe(true);
  });

  it("with a worker that does not leave, leaves nothing that this one could still write to", async () => {
    const { job, pool, starting } = await startSlowly("a");
    pool.isStuck = true;
    job.cancel();
    expect(await starting).toMatchObject({ code: "CANCELLED" });
    const first = sharedOf(pool);
    // Its target is free later, when the run has given the worker up.
    const next = await vi.waitFor(() => start("a"), { timeout: WAIT_MS });
    expect(FakeTarget.made[0]?.calls).toEqual(["abort"]);
    const second = sharedOf(next.pool);
    expect(next.pool).not.toBe(pool);
    expect(second.buffer.memory).not.toBe(first.buffer.memory);
    expect(tablesOf(second).some((table) => tablesOf(first).includes(table))).toBe(false);
  });

  it("by the server's end is undone before that", async () => {
    const { job, starting } = await startSlowly("a");
    await host.close();
    expect(job.status).toBe("null");
    expect(FakeTarget.made[0]?.calls).toEqual(["abort"]);
    expect(await starting).toMatchObject({ code: "SERVER_ENDED" });
    await expect(host.startBackups([order("b")])).rejects.toMatchObject({ code: "BUSY" });
  });

  it("by the server's end is undone before that, with a worker that does not leave, too", async () => {
    const { job, pool, starting } = await startSlowly("a");
    pool.isStuck = true;
    await host.close();
    expect(job.status).toBe("null");
    expect(await starting).toMatchObject({ code: "SERVER_ENDED" });
    expect(FakeTarget.made[0]?.calls).toEqual(["abort"]);
  });

  it("frees its disk and its id at once, and takes both until then", async () => {
    const { job, starting } = await startSlowly("a");
    const sameId = { ...order("b"), id: "job-a" };
    await expect(host.startBackups([sameId])).rejects.toMatchObject({ code: "BUSY", object: "job-a" });
    const sameDisk = { ...order("a"), id: "other" };
    await expect(host.startBackups([sameDisk])).rejects.toMatchObject({ code: "BUSY", object: "a" });
    expect(host.jobs()).toEqual([job]);
    job.cancel();
    await starting;
    expect((await start("a")).job.status).toBe("running");
  });

  it("counts against the limit of jobs while its target hangs, which stays claimed for so long", async () => {
    let answer: () => void = () => undefined;
    FakeTarget.making = new Promise((resolve) => (answer = resolve));
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    try {
      for (let i = 0; i < 64; i++) {
        // A target of no name is not claimed.
        const target = i === 0 ? "hung" : "null:";
        const starting = host.startBackups([order("a", { target })]).catch((error: unknown) => error);
        while (FakeTarget.askedCount <= i) await turns(1);
        host.jobs()[0]?.cancel();
        await vi.advanceTimersByTimeAsync(UNDO_GRACE_MS);
        expect(await starting).toMatchObject({ code: "CANCELLED" });
      }
    } finally {
      vi.useRealTimers();
    }
    expect(host.jobs()).toEqual([]);
    await expect(host.startBackups([order("a", { target: "another" })])).rejects.toMatchObject({
      code: "LIMIT",
      hint: expect.stringContaining("does not answer") as unknown,
    });
    answer();
    const isFree = async () => {
      const [job] = await host.startBackups([order("a", { target: "hung" })]);
      expect(job?.status).toBe("running");
    };
    await vi.waitFor(isFree, { interval: 1, timeout: WAIT_MS });
    expect(FakeTarget.made.filter(({ calls }) => calls.includes("abort"))).toHaveLength(64);
  });
});

describe("cancel", () => {
  it("when the copy has just ended removes the target instead of finishing it", async () => {
    const { job, pool, target } = await start("a");
    // All is copied, and the run is giving its threads back.
    const givingBack = vi.spyOn(pool, "off").mockImplementation(() => {
      job.cancel();
      expect(job.status).toBe("aborting");
      return pool;
    });
    for (const { end } of pool.tasks) end({});
    await untilStatus(job, "concluded");
    expect(givingBack).toHaveBeenCalledOnce();
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

  async function complete(): Promise<FakePool> {
    const { job, pool } = await start("a");
    for (const { end } of pool.tasks) end({});
    await untilStatus(job, "concluded");
    expect(job.error).toBeUndefined();
    host.dismiss(job.id);
    return pool;
  }

  it("have the same threads and tables, zero at the start, and counters of their own", async () => {
    const { job, pool } = await start("a");
    const first = sharedOf(pool);
    new Int32Array(first.chunkWords).fill(7);
    new Uint8Array(first.clusterStates).fill(3);
    new BigInt64Array(first.counters)[CNT_DONE_BYTES] = 1234n;
    for (const { end } of pool.tasks) end({});
    await untilStatus(job, "concluded");
    host.dismiss(job.id);

    const second = sharedOf((await start("a")).pool);
    expect(FakePool.made.length).toBe(1);
    expect(second.buffer.memory).toBe(first.buffer.memory);
    expect(tablesOf(second).every((table) => tablesOf(first).includes(table))).toBe(true);
    expect(new Set(tablesOf(second)).size).toBe(tablesOf(second).length);
    for (const table of tablesOf(second))
      expect(new Uint8Array(table).every((byte) => byte === 0)).toBe(true);
    expect(second.control).not.toBe(first.control);
    expect(job.progress().bytesDone).toBe(1234);
  });

  it("side by side have tables of their own", async () => {
    const first = sharedOf((await start("a")).pool);
    const second = sharedOf((await start("b")).pool);
    expect(FakePool.made.length).toBe(2);
    expect(tablesOf(second).some((table) => tablesOf(first).includes(table))).toBe(false);
  });

  it("get new threads after one has died, and the broken pool is destroyed", async () => {
    const pool = await complete();
    pool.emit("error", new Error("an idle thread died"));
    await turns();
    expect(pool.isDestroyed).toBe(true);
    expect(await complete()).not.toBe(pool);
  });

  it("get neither the threads nor the tables that a worker was left behind with", async () => {
    const { job, pool } = await start("a");
    const first = sharedOf(pool);
    // One of the two sits in a call that does not return: its end is not reported.
    pool.isStuck = true;
    job.cancel();
    await vi.waitFor(() => expect(job.status).toBe("concluded"), { timeout: WAIT_MS });
    host.dismiss(job.id);
    const { pool: next } = await start("a");
    expect(next).not.toBe(pool);
    expect(tablesOf(sharedOf(next)).some((table) => tablesOf(first).includes(table))).toBe(false);
  });

  it("that bring new memory keep the threads", async () => {
    const pool = await complete();
    const [larger] = await host.startBackups([order("a", { cowBufferSizeBytes: 4 * MiB })]);
    expect(larger?.status).toBe("running");
    expect(FakePool.made).toEqual([pool]);
    expect(pool.isDestroyed).toBe(false);
  });

  it("of fewer workers use a pool of more", async () => {
    const pool = await complete();
    await host.startBackups([order("a", { workerCount: 1 })]);
    expect(FakePool.made).toEqual([pool]);
  });
});

/** What the pool's last job shares. */
function sharedOf(pool: FakePool): SharedBuffers {
  const task = pool.tasks.at(-1);
  if (task === undefined) throw new Error("no task");
  return task.shared;
}

/** All that the threads of a job share but the control words, the counters and the buffer. */
function tablesOf(shared: SharedBuffers): SharedArrayBuffer[] {
  const { clusterStates, chunkWords, chunkHeads, urgentRing, regionStates, captureNext, captureInfo } =
    shared;
  return [clusterStates, chunkWords, chunkHeads, urgentRing, regionStates, captureNext, captureInfo];
}
