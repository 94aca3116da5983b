// When threads help a main thread that copies, and which of them are waited for. Time is the test's own.
import { beforeEach, describe, expect, it } from "vitest";
import { allTakersAreDone, relieve } from "../../../src/backup/copy/relief.js";
import { CTL_SWEEP, CTL_TAKERS } from "../../../src/cow/shared.js";

const WORKERS = 3;
const CHUNKS = 8;

describe("threads for a copy that the main thread has begun", () => {
  let started: number[];
  let ready: () => void;
  let end: () => void;
  let nextPoll: () => void;
  let pace: { elapsedMs: number; leftMs: number; hasWritten: boolean };
  let hasFailed: boolean;
  let relieved: Promise<boolean>;

  beforeEach(() => {
    started = [];
    hasFailed = false;
    pace = { elapsedMs: 0, leftMs: NaN, hasWritten: false };
    relieved = relieve({
      here: new Promise<void>((resolve) => (end = resolve)),
      workerCount: WORKERS,
      startWorker: (index) => {
        started.push(index);
        return new Promise((resolve) => (ready = resolve));
      },
      pace: () => pace,
      hasFailed: () => hasFailed,
      poll: () => new Promise<void>((resolve) => (nextPoll = resolve)),
    });
  });

  async function polls(count: number): Promise<void> {
    for (let poll = 0; poll < count; poll++) {
      nextPoll();
      await new Promise(setImmediate);
    }
  }

  it("are not started where it ends before, or is about to", async () => {
    pace = { elapsedMs: 900, leftMs: 400, hasWritten: true };
    await polls(3);
    end();
    expect([await relieved, started]).toEqual([false, []]);
  });

  it("come beside it first, and then in its place", async () => {
    pace = { elapsedMs: 400, leftMs: 9_000, hasWritten: true };
    await polls(2);
    expect(started).toEqual([]);
    pace = { elapsedMs: 600, leftMs: 9_000, hasWritten: true };
    await polls(1);
    expect(started).toEqual([1, 2]);
    pace = { elapsedMs: 1_100, leftMs: 8_000, hasWritten: true };
    await polls(1);
    expect(started).toEqual([1, 2, 0]);
    ready();
    expect(await relieved).toBe(true);
  });

  it("wait longer for a copy of holes", async () => {
    pace = { elapsedMs: 900, leftMs: 9_000, hasWritten: false };
    await polls(2);
    expect(started).toEqual([]);
    pace = { elapsedMs: 1_000, leftMs: 9_000, hasWritten: false };
    await polls(2);
    expect(started).toEqual([1, 2, 0]);
    end();
    await relieved;
  });

  it("are not started for a copy that has failed", async () => {
    hasFailed = true;
    await polls(1);
    expect([await relieved, started]).toEqual([false, []]);
  });
});

describe("the end of a copy", () => {
  let control: Int32Array;
  let leave: () => void;
  let other: Promise<void>;

  beforeEach(() => {
    control = new Int32Array(16);
    other = new Promise((resolve) => (leave = resolve));
  });

  async function isDone(hasFailed = false): Promise<boolean> {
    let done = false;
    const sweep = { control, chunkCount: CHUNKS };
    const copy = allTakersAreDone(Promise.resolve(), [Promise.resolve(), other], sweep, () => hasFailed);
    void copy.then(() => (done = true));
    await new Promise(setImmediate);
    return done;
  }

  it("does not wait for a thread that has taken nothing", async () => {
    control[CTL_SWEEP] = CHUNKS;
    control[CTL_TAKERS] = 1;
    expect(await isDone()).toBe(true);
  });

  it("waits for one that has begun to take, for chunks that are left, and for all after a failure", async () => {
    control[CTL_SWEEP] = CHUNKS;
    control[CTL_TAKERS] = 2;
    expect(await isDone()).toBe(false);
    control[CTL_TAKERS] = 1;
    expect(await isDone(true)).toBe(false);
    control[CTL_SWEEP] = CHUNKS - 1;
    expect(await isDone()).toBe(false);
    leave();
    expect(await isDone(true)).toBe(true);
  });
});
