// Threads that still load their modules are waited for before anything ends them.
import { Worker } from "node:worker_threads";
import { afterEach, expect, it } from "vitest";
import { allBootsOver, expectBoots } from "../../src/backup/thread-boots.js";

const workers: Worker[] = [];

afterEach(async () => {
  await Promise.all(workers.splice(0).map((worker) => worker.terminate()));
});

it("waits for every thread that is to come", async () => {
  const counter = new Int32Array(expectBoots(2));
  let over = false;
  const waiting = allBootsOver().then(() => {
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

it("does not wait where no thread is on its way, nor for ever", async () => {
  await allBootsOver();
  expectBoots(1);
  const startMs = performance.now();
  await allBootsOver();
  expect(performance.now() - startMs).toBeGreaterThan(1_900);
}, 10_000);
