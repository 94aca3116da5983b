// The start of jobs up to their T0, each step of which the test holds for as long as it likes.

import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { DiskNode } from "../../../src/cow/disk-node.js";
import type { BackupJob, JobStatus } from "../../../src/backup/host.js";
import type { HostedJob, ListedJob } from "../../../src/backup/job/hosted-job.js";
import { JobStart, type StandIn, UNDO_GRACE_MS } from "../../../src/backup/job/start.js";
import { JOB_DEFAULTS, type JobOptions } from "../../../src/backup/options.js";
import { CowcatcherError } from "../../../src/errors.js";
import type { Completion, Image } from "../../../src/block/device.js";
import { turns } from "../../support/cow-engine.js";
import { NO_PROGRESS } from "../../support/fake-job-host.js";

/** A step that waits for the test, and has begun when somebody waits. */
class Hold {
  readonly #promise: Promise<void>;
  hasBegun = false;
  release: () => void = () => undefined;

  constructor() {
    this.#promise = new Promise((resolve) => (this.release = resolve));
  }

  wait(): Promise<void> {
    this.hasBegun = true;
    return this.#promise;
  }

  async begun(): Promise<void> {
    await vi.waitFor(() => expect(this.hasBegun).toBe(true), { interval: 1, timeout: 10_000 });
  }
}

class FakeJob implements HostedJob {
  status: JobStatus = "created";
  error: CowcatcherError | undefined;
  speed = 0;
  readonly calls: string[] = [];
  startError: Error | undefined;
  readonly concluded: Promise<void>;
  #conclude: () => void = () => undefined;

  constructor(
    readonly id: string,
    readonly disk: string,
    readonly options: JobOptions,
  ) {
    this.concluded = new Promise((resolve) => (this.#conclude = resolve));
  }

  async beforeT0(): Promise<void> {
    await holds.get(`before T0 of ${this.disk}`)?.wait();
  }

  checkReady(): void {
    this.calls.push("checkReady");
  }

  start(): void {
    if (this.startError !== undefined) throw this.startError;
    this.#to("running");
  }

  abandon(): Promise<void> {
    this.calls.push("abandon");
    return Promise.resolve();
  }

  cancel(): void {
    if (this.status === "created") return;
    this.#to("aborting");
    this.#to("concluded");
    this.#conclude();
  }

  dismiss(): void {
    this.#to("null");
  }

  abortSync(): void {
    this.calls.push("abortSync");
  }

  pause(): void {
    this.#to("paused");
  }

  resume(): void {
    this.#to("running");
  }

  setSpeed(bytesPerSecond: number): void {
    this.speed = bytesPerSecond;
  }

  progress() {
    return NO_PROGRESS;
  }

  #to(status: JobStatus): void {
    this.status = status;
    changed(this, status);
  }
}

let list: Map<string, ListedJob>;
let statuses: string[];
let onChange: (job: BackupJob, status: JobStatus) => void;
/** Targets that are claimed. */
let claimed: Set<string>;
let made: FakeJob[];
/** Disks whose targets were removed as the process ends. */
let abortedSync: string[];
let aborted: string[];
/** By "claim DISK", "prepare DISK" and "before T0 of DISK". */
let holds: Map<string, Hold>;
let prepareError: CowcatcherError | undefined;
let startError: Error | undefined;
let nodes: Map<string, DiskNode>;
/** What writes to disk a wait for; undefined: they are done at once, as those to disk b always are. */
let pending: Hold | undefined;
let settledCount: number;

function changed(job: BackupJob, status: JobStatus): void {
  statuses.push(`${job.disk} ${status}`);
  onChange(job, status);
}

function makeNode(name: string): DiskNode {
  const write = (): Completion => (name === "a" ? pending?.wait() : undefined);
  const image = { name, sizeBytes: 4096, readOnly: false, clusterSizeBytes: 0, write };
  return new DiskNode(name, image as unknown as Image);
}

function nodeOf(disk: string): DiskNode {
  const node = nodes.get(disk);
  if (node === undefined) throw new Error(`the test has no disk ${disk}`);
  return node;
}

const writeTo = (disk: string): Completion => nodeOf(disk).write(new Uint8Array(1), 0, 1, 0);

beforeEach(() => {
  list = new Map();
  statuses = [];
  abortedSync = [];
  aborted = [];
  onChange = () => undefined;
  claimed = new Set();
  made = [];
  holds = new Map();
  prepareError = undefined;
  startError = undefined;
  nodes = new Map(["a", "b"].map((name) => [name, makeNode(name)]));
  pending = undefined;
  settledCount = 0;
});

afterEach(() => {
  vi.useRealTimers();
});

function hold(step: string): Hold {
  const made = new Hold();
  holds.set(step, made);
  return made;
}

interface Started {
  start: JobStart;
  jobs: readonly StandIn[];
  /** What run() came to: "started", or its error. */
  outcome: Promise<unknown>;
}

function start(...disks: string[]): Started {
  const made = new JobStart({
    requests: disks.map((disk) => {
      const options: JobOptions = { ...JOB_DEFAULTS, target: `target-of-${disk}`, targetFormat: "raw" };
      return { id: `job-${disk}`, disk, options };
    }),
    nodeOf,
    marks: [],
    async claim({ disk, options: { target } }) {
      await holds.get(`claim ${disk}`)?.wait();
      claimed.add(target);
      return {
        hand: null,
        giveUp: () => undefined,
        release() {
          claimed.delete(target);
          return Promise.resolve();
        },
      };
    },
    prepare: async ({ id, disk, options }, _signal, onTarget) => {
      onTarget({
        abort() {
          aborted.push(disk);
          return Promise.resolve();
        },
        abortSync: () => abortedSync.push(disk),
      });
      await holds.get(`prepare ${disk}`)?.wait();
      if (prepareError !== undefined) throw prepareError;
      return makeJob(id, disk, options);
    },
    list: (job) => list.set(job.id, job),
    forget: (job) => {
      list.delete(job.id);
      job.dismiss();
    },
    dismiss(id) {
      const job = list.get(id);
      list.delete(id);
      job?.dismiss();
    },
    onStatus: changed,
  });
  for (const job of made.jobs) list.set(job.id, job);
  const outcome = made
    .run(() => settledCount++)
    .then(
      () => "started",
      (error: unknown) => error,
    );
  return { start: made, jobs: made.jobs, outcome };
}

function makeJob(id: string, disk: string, options: JobOptions): FakeJob {
  const job = new FakeJob(id, disk, options);
  if (disk === "b") job.startError = startError;
  made.push(job);
  return job;
}

const CANCELLED = ["aborting", "concluded", "null"];

function expectNothingLeft(): void {
  expect([...list.keys()]).toEqual([]);
  expect([...claimed]).toEqual([]);
  expect(made.map(({ calls }) => calls.at(-1))).toEqual(made.map(() => "abandon"));
  expect(settledCount).toBe(1);
  pending = undefined;
  // No gate is closed.
  for (const disk of nodes.keys()) expect(writeTo(disk)).toBeUndefined();
}

describe("a start that is cancelled", () => {
  it.each(["claim a", "prepare a", "claim b", "prepare b", "before T0 of b"])(
    "while '%s' goes on",
    async (step) => {
      const held = hold(step);
      const { jobs, outcome } = start("a", "b");
      await held.begun();
      expect([...list.values()]).toEqual(jobs);
      jobs[0]?.cancel();
      // At once, whatever hangs; and of all.
      expect(statuses).toEqual(["a aborting", "b aborting"]);
      expect(jobs.map(({ error }) => error?.code)).toEqual(["CANCELLED", "CANCELLED"]);
      held.release();
      expect(await outcome).toMatchObject({ code: "CANCELLED", object: "target-of-a" });
      expect(statuses.filter((line) => line.startsWith("a"))).toEqual(
        CANCELLED.map((status) => `a ${status}`),
      );
      expect(statuses.filter((line) => line.startsWith("b"))).toEqual(
        CANCELLED.map((status) => `b ${status}`),
      );
      expectNothingLeft();
    },
  );

  it.each(["claim a", "prepare b"])(
    "concludes though '%s' hangs; what that yields is undone",
    async (step) => {
      const held = hold(step);
      const { start: started, jobs, outcome } = start("a", "b");
      await held.begun();
      vi.useFakeTimers();
      jobs[1]?.cancel();
      jobs[1]?.cancel();
      expect(started.leftBehindCount).toBe(0);
      await vi.advanceTimersByTimeAsync(UNDO_GRACE_MS - 1);
      expect(jobs.map(({ status }) => status)).toEqual(["aborting", "aborting"]);
      await vi.advanceTimersByTimeAsync(1);
      vi.useRealTimers();
      expect(await outcome).toMatchObject({ code: "CANCELLED", object: "target-of-b" });
      expect(jobs.map(({ status }) => status)).toEqual(["null", "null"]);
      expect([...list.keys()]).toEqual([]);
      expect(started.leftBehindCount).toBe(2);
      expect(settledCount).toBe(0);
      // What is still to be undone may not be written by another job.
      if (step === "prepare b") expect([...claimed]).toEqual(["target-of-a", "target-of-b"]);
      held.release();
      await vi.waitFor(() => expect(settledCount).toBe(1), { interval: 1, timeout: 10_000 });
      expectNothingLeft();
      expect(statuses).toHaveLength(6);
    },
  );

  it("while a guest's write holds up T0: the guests go on, and the disk is free", async () => {
    pending = new Hold();
    const hung = writeTo("a");
    const { jobs, outcome } = start("a", "b");
    const meanwhile = await heldWrite();
    jobs[1]?.cancel();
    expect(await outcome).toMatchObject({ code: "CANCELLED" });
    expect(statuses.at(-1)).toBe("b null");
    pending.release();
    await Promise.all([hung, ...meanwhile]);
    expectNothingLeft();
    expect(await start("a", "b").outcome).toBe("started");
  });

  it("before anything has begun", async () => {
    const { jobs, outcome } = start("a");
    jobs[0]?.cancel();
    expect(await outcome).toMatchObject({ code: "CANCELLED" });
    expectNothingLeft();
  });

  /** A guest's write to disk b, once the gates are closed. */
  async function heldWrite(): Promise<[Completion]> {
    let write: Completion;
    await vi.waitFor(() => expect((write = writeTo("b"))).toBeInstanceOf(Promise), {
      interval: 1,
      timeout: 10_000,
    });
    return [write];
  }

  /** So many steps of promises after the write that holds up T0 has ended. */
  async function cancelAfter(steps: number): Promise<"started" | "cancelled"> {
    pending = new Hold();
    const hung = writeTo("a");
    const held = pending;
    const { jobs, outcome } = start("a", "b");
    const meanwhile = await heldWrite();
    held.release();
    for (let i = 0; i < steps; i++) await Promise.resolve();
    const isStarted = jobs.some(({ isReplaced }) => isReplaced);
    list.get("job-b")?.cancel();
    const result = await outcome;
    await Promise.all([hung, ...meanwhile]);
    if (isStarted) {
      // One instant for both: the cancel came after it, and is the job's own.
      expect(result).toBe("started");
      expect(jobs.every(({ isReplaced }) => isReplaced)).toBe(true);
      expect(made.map(({ status }) => status)).toEqual(["running", "concluded"]);
      made[0]?.cancel();
      list.clear();
      made = [];
      await turns();
      expect([...claimed]).toEqual([]);
      return "started";
    }
    expect(result).toMatchObject({ code: "CANCELLED", object: "target-of-b" });
    expect(made.map(({ status }) => status)).toEqual(["created", "created"]);
    settledCount = 1;
    expectNothingLeft();
    made = [];
    return "cancelled";
  }

  it("in T0's own turn has started all jobs or none", async () => {
    const outcomes: string[] = [];
    for (let steps = 0; steps < 40; steps++) outcomes.push(await cancelAfter(steps));
    const firstStarted = outcomes.indexOf("started");
    expect(firstStarted).toBeGreaterThan(3);
    expect(outcomes.slice(firstStarted)).toEqual(outcomes.slice(firstStarted).map(() => "started"));
  });

  it("by the listener of the group, which hears of the first, is cancelled once", async () => {
    const held = hold("prepare b");
    const { jobs, outcome } = start("a", "b");
    onChange = (_job, status) => {
      if (status === "aborting") for (const job of jobs) job.cancel();
    };
    await held.begun();
    jobs[0]?.cancel();
    held.release();
    await outcome;
    expect(statuses).toHaveLength(6);
    expectNothingLeft();
  });
});

describe("a start that fails", () => {
  const failure = new CowcatcherError({ code: "NO_SPACE", object: "target", problem: "is full" });

  it("ends as QEMU's early failure does: nobody is told of an end", async () => {
    prepareError = failure;
    const { outcome } = start("a", "b");
    expect(await outcome).toBe(failure);
    expect(statuses).toEqual(["a null", "b null"]);
    expectNothingLeft();
  });

  it("at T0 for the second disk, ends the first one's job, and tells the first cause", async () => {
    startError = new Error("no memory");
    const { jobs, outcome } = start("a", "b");
    // As the monitor of a grouped transaction does.
    onChange = (_job, status) => {
      if (status === "aborting") for (const job of jobs) job.cancel();
    };
    expect(await outcome).toBe(startError);
    expect(statuses.filter((line) => line.startsWith("a"))).toEqual(
      ["running", ...CANCELLED].map((status) => `a ${status}`),
    );
    expect(statuses.filter((line) => line.startsWith("b"))).toEqual(CANCELLED.map((status) => `b ${status}`));
    expect([...list.keys()]).toEqual([]);
    expect([...claimed]).toEqual([]);
    expect(made[1]?.calls).toEqual(["checkReady", "abandon"]);
  });

  it("because of a cancel that came first, tells the cancel", async () => {
    const held = hold("prepare a");
    const { jobs, outcome } = start("a");
    await held.begun();
    prepareError = failure;
    jobs[0]?.cancel();
    held.release();
    expect(await outcome).toMatchObject({ code: "CANCELLED" });
    expectNothingLeft();
  });
});

it("a cancel removes the targets that are there, before what hangs has come to its end", async () => {
  const held = hold("prepare b");
  const { jobs, outcome } = start("a", "b");
  await held.begun();
  jobs[0]?.cancel();
  expect(aborted).toEqual(["a", "b"]);
  held.release();
  expect(await outcome).toMatchObject({ code: "CANCELLED" });
});

describe("a job before its T0", () => {
  it("takes a pause and a speed, which the job has from T0 on", async () => {
    const held = hold("prepare a");
    const { jobs, outcome } = start("a", "b");
    await held.begun();
    const [a, b] = jobs;
    a?.pause();
    a?.setSpeed(1234);
    b?.pause();
    b?.resume();
    expect(a?.speed).toBe(1234);
    expect(statuses).toEqual([]);
    held.release();
    expect(await outcome).toBe("started");
    expect(statuses).toEqual(["a running", "b running", "a paused"]);
    expect(made.map(({ speed }) => speed)).toEqual([1234, 0]);
    expect([...list.values()]).toEqual(made);
  });

  it("cannot be cancelled through its stand-in any more once it has started", async () => {
    const { jobs, outcome } = start("a");
    expect(await outcome).toBe("started");
    jobs[0]?.cancel();
    expect(statuses).toEqual(["a running"]);
  });

  it("has its targets removed when the process ends, that of a job in preparation, too", async () => {
    const held = hold("prepare b");
    const { start: started, outcome } = start("a", "b");
    await held.begun();
    started.abortSync();
    expect(abortedSync).toEqual(["a", "b"]);
    held.release();
    await outcome;
  });
});
