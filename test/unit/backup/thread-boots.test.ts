// Threads that still load their modules: nobody terminates them, and the process can end without them.
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { Worker } from "node:worker_threads";
import { afterEach, expect, it } from "vitest";
import { createCopyPool, endPool, poolHasBooted } from "../../../src/backup/copy/pool.js";
import {
  type Boots,
  bootsOver,
  expectBoots,
  isAnyBootUnderWay,
  noMoreBoots,
} from "../../../src/backup/copy/thread-boots.js";

const DIST = new URL(process.env["COWCATCHER_DIST"] ?? "../../../dist/", import.meta.url).href;
const KOFFI = resolve("node_modules/koffi");
const workers: Worker[] = [];
const expected: Boots[] = [];

function expecting(threadCount: number): Boots {
  const boots = expectBoots(threadCount);
  expected.push(boots);
  return boots;
}

afterEach(async () => {
  for (const boots of expected.splice(0)) noMoreBoots(boots);
  await Promise.all(workers.splice(0).map((worker) => worker.terminate()));
});

it("waits for every thread that is to come", async () => {
  const boots = expecting(2);
  const notes = new Int32Array(boots.notes);
  let over = false;
  // It stays: the id of a thread that has ended is no longer its own.
  const source =
    "require('node:worker_threads').parentPort.on('message', ([notes, id]) => Atomics.store(notes, 2, id))";
  const worker = new Worker(source, { eval: true });
  workers.push(worker);
  boots.threads = () => [{ threadId: 7 }, worker];
  const waiting = bootsOver(boots).then(() => {
    over = true;
  });
  Atomics.store(notes, 1, 7);
  await new Promise((resolve) => worker.once("online", resolve));
  expect(over).toBe(false);
  const id = worker.threadId;
  worker.postMessage([notes, id]);
  await waiting;
  expect(Atomics.load(notes, 2)).toBe(id);
});

it("knows of a thread that a pool starts later, whatever pool was made meanwhile", () => {
  const threads = [{ threadId: 7 }];
  const boots = expecting(2);
  boots.threads = () => threads;
  const notes = new Int32Array(boots.notes);
  expect(isAnyBootUnderWay()).toBe(true);
  Atomics.store(notes, 1, 7);
  expect(isAnyBootUnderWay()).toBe(false);
  expecting(1);
  threads.push({ threadId: 8 });
  expect(isAnyBootUnderWay()).toBe(true);
  noMoreBoots(boots);
  expect(isAnyBootUnderWay()).toBe(false);
});

it("does not wait for ever", async () => {
  const startMs = performance.now();
  const boots = expecting(1);
  boots.threads = () => [{ threadId: 7 }];
  await bootsOver(boots, 100);
  expect(performance.now() - startMs).toBeGreaterThan(99);
});

it("does not wait for a thread that died while it booted", async () => {
  const threads = [{ threadId: 7 }];
  const boots = expecting(1);
  boots.threads = () => threads;
  const over = bootsOver(boots);
  threads.pop();
  await over;
});

it("starts threads one by one where it is told to, and keeps them", async () => {
  const folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-test-"));
  const file = join(folder, "worker.mjs");
  fs.writeFileSync(
    file,
    `import { bootIsOver } from "${DIST}src/backup/copy/thread-boots.js";
    bootIsOver();
    export default ({ words }) => { Atomics.wait(words, 0, 0); };`,
  );
  const pool = createCopyPool(3, { file: pathToFileURL(file), startAtOnce: 1 });
  try {
    const words = new Int32Array(new SharedArrayBuffer(4));
    const tasks: Promise<unknown>[] = [];
    for (const count of [1, 2, 3]) {
      tasks.push(pool.run({ words }));
      expect(pool.threads).toHaveLength(count);
      await poolHasBooted(pool);
    }
    Atomics.store(words, 0, 1);
    Atomics.notify(words, 0);
    await Promise.all(tasks);
    await delay(20);
    expect(pool.threads).toHaveLength(3);
  } finally {
    await endPool(pool);
    fs.rmSync(folder, { recursive: true, force: true });
  }
});

it("waits for a thread in the place of one that has died", async () => {
  const folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-test-"));
  const [up, go] = [join(folder, "up"), join(folder, "go")];
  // The second thread boots for as long as the test likes.
  const file = join(folder, "worker.mjs");
  fs.writeFileSync(
    file,
    `import { existsSync, writeFileSync } from "node:fs";
    import { workerData } from "node:worker_threads";
    import { bootIsOver } from "${DIST}src/backup/copy/thread-boots.js";
    const word = new Int32Array(workerData);
    if (word[0] > 0) {
      writeFileSync(${JSON.stringify(up)}, "");
      while (!existsSync(${JSON.stringify(go)})) Atomics.wait(word, 0, word[0], 5);
    }
    bootIsOver();
    export default () => new Promise((resolve) => setImmediate(resolve));`,
  );
  const pool = createCopyPool(1, { file: pathToFileURL(file) });
  pool.on("error", () => undefined);
  try {
    await pool.run({});
    await pool.threads[0]?.terminate();
    let isEnded = false;
    const ending = endPool(pool).then(() => {
      isEnded = true;
    });
    while (!fs.existsSync(up)) await delay(5);
    expect(isEnded).toBe(false);
    fs.writeFileSync(go, "");
    await ending;
  } finally {
    fs.writeFileSync(go, "");
    fs.rmSync(folder, { recursive: true });
  }
});

/** A thread in a system call that lasts: process.exit would wait for it, as it does for one that loads a module. */
function endWithThread(isBooted: boolean): { status: number | null; stdout: string; stderr: string } {
  const thread = `
    const { parentPort, threadId, workerData } = require("node:worker_threads");
    if (${String(isBooted)}) Atomics.store(new Int32Array(workerData), 1, threadId);
    const up = () => parentPort.postMessage("up");
    ${isBooted ? "up();" : `const sleep = require(${JSON.stringify(KOFFI)}).load("libc.so.6").func("int sleep(int s)"); up(); sleep(600);`}`;
  const program = `
    import { Worker } from "node:worker_threads";
    import { endProcess, expectBoots, mayEndProcess } from "${DIST}src/backup/copy/thread-boots.js";
    const boots = expectBoots(1);
    const worker = new Worker(${JSON.stringify(thread)}, { eval: true, execArgv: [], workerData: boots.notes });
    boots.threads = () => [worker];
    process.on("exit", (code) => console.log("exit " + code));
    await new Promise((resolve) => worker.once("message", resolve));
    await import("${DIST}src/native/libc.js");
    await new Promise(setImmediate);
    await mayEndProcess();
    endProcess(7);`;
  return spawnSync(process.execPath, ["--input-type=module", "-e", program], {
    encoding: "utf8",
    // The thread sleeps for ten minutes.
    timeout: 120_000,
  });
}

it.each([
  ["has booted", true],
  ["still boots", false],
])("the process ends at once while a thread %s, its exit handlers first", (_, isBooted) => {
  const { status, stdout, stderr } = endWithThread(isBooted);
  expect({ status, stdout, stderr }).toEqual({ status: 7, stdout: "exit 7\n", stderr: "" });
});
