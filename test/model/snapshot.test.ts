// Hundreds of schedules of a snapshot under a guest's writes, each from its seed. To look into one that failed:
// SNAPSHOT_MODEL_SEED=123 npx vitest run test/model/snapshot.test.ts
import { expect, test } from "vitest";
import { type Outcome, SnapshotSimulation } from "./snapshot-simulator.js";

const SCHEDULES = Number(process.env["SNAPSHOT_MODEL_SCHEDULES"] ?? 250);
const only = process.env["SNAPSHOT_MODEL_SEED"];
const first = only === undefined ? 1 : Number(only);
const last = only === undefined ? SCHEDULES : first;

test("readers get T0 or an error, the guest what it wrote", { timeout: 300_000 }, async () => {
  const outcomes: Outcome[] = [];
  for (let seed = first; seed <= last; seed++) outcomes.push(await new SnapshotSimulation(seed).run());
  if (only !== undefined) return;
  // Schedules in which nothing happens would prove nothing.
  const count = (condition: (outcome: Outcome) => boolean) => outcomes.filter(condition).length;
  expect(count(({ ended }) => ended === "kept")).toBeGreaterThan(SCHEDULES / 4);
  expect(count(({ ended }) => ended === "cancelled")).toBeGreaterThan(SCHEDULES / 20);
  expect(count(({ ended }) => ended === "broken")).toBeGreaterThan(SCHEDULES / 10);
  expect(count(({ captures }) => captures > 3)).toBeGreaterThan(SCHEDULES / 2);
  expect(count(({ spilledBytes }) => spilledBytes > 0)).toBeGreaterThan(SCHEDULES / 5);
  expect(count(({ slowReads, readsRight }) => slowReads > 3 && readsRight > 5)).toBeGreaterThan(
    SCHEDULES / 4,
  );
  expect(count(({ readsRefused }) => readsRefused > 0)).toBeGreaterThan(SCHEDULES / 10);
  expect(count(({ zeroStatus }) => zeroStatus > 0)).toBeGreaterThan(SCHEDULES / 10);
});
