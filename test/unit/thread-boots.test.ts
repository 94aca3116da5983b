// Threads that still load their modules: nobody terminates them, and the process can end without them.
import { spawnSync } from "node:child_process";
import { resolve } from "node:path";
import { Worker } from "node:worker_threads";
import { afterEach, expect, it } from "vitest";
import { bootsOver, expectBoots } from "../../src/backup/thread-boots.js";

const DIST = new URL(process.env["COWCATCHER_DIST"] ?? "../../dist/", import.meta.url).href;
const KOFFI = resolve("node_modules/koffi");
const workers: Worker[] = [];

afterEach(async () => {
  await Promise.all(workers.splice(0).map((worker) => worker.terminate()));
});

it("waits for every thread that is to come", async () => {
  const boots = expectBoots(2);
  const counter = new Int32Array(boots.counter);
  let over = false;
  const waiting = bootsOver(boots).then(() => {
    over = true;
  });
  Atomics.add(counter, 0, 1);
  const source =
    "require('node:worker_threads').parentPort.once('message', (counter) => Atomics.add(counter, 0, 1))";
  const worker = new Worker(source, { eval: true });
  workers.push(worker);
  await new Promise((resolve) => worker.once("online", resolve));
  expect(over).toBe(false);
  worker.postMessage(counter);
  await waiting;
  expect(Atomics.load(counter, 0)).toBe(2);
});

it("does not wait for ever", async () => {
  const startMs = performance.now();
  await bootsOver(expectBoots(1), 100);
  expect(performance.now() - startMs).toBeGreaterThan(99);
});

/** A thread in a system call that lasts: process.exit would wait for it, as it does for one that loads a module. */
function endWithThread(isBooted: boolean): { status: number | null; stdout: string; stderr: string } {
  const thread = `
    const { parentPort, workerData } = require("node:worker_threads");
    if (${String(isBooted)}) Atomics.add(new Int32Array(workerData), 0, 1);
    const up = () => parentPort.postMessage("up");
    ${isBooted ? "up();" : `const sleep = require(${JSON.stringify(KOFFI)}).load("libc.so.6").func("int sleep(int s)"); up(); sleep(600);`}`;
  const program = `
    import { Worker } from "node:worker_threads";
    import { endProcess, expectBoots, mayEndProcess } from "${DIST}src/backup/thread-boots.js";
    const worker = new Worker(${JSON.stringify(thread)}, { eval: true, execArgv: [], workerData: expectBoots(1).counter });
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
