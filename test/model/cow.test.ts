// Thousands of schedules of the copy-before-write engine, each from its seed. To look into one that failed:
// COW_MODEL_SEED=12345 npx vitest run test/model/cow.test.ts
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { IS_CAMPAIGN } from "../support/campaign.js";
import { type Outcome, Simulation } from "./cow-simulator.js";

const SCHEDULES = Number(process.env["COW_MODEL_SCHEDULES"] ?? (IS_CAMPAIGN ? 20_000 : 1000));
const only = process.env["COW_MODEL_SEED"];
const first = only === undefined ? 1 : Number(only);
const last = only === undefined ? SCHEDULES : first;

// The trackers' own timers belong to no schedule: sweeps are a step of it.
beforeEach(() => void vi.useFakeTimers({ toFake: ["setInterval", "clearInterval"] }));
afterEach(() => void vi.useRealTimers());

test("the five invariants hold in every schedule", { timeout: 3_600_000 }, async () => {
  const outcomes: Outcome[] = [];
  for (let seed = first; seed <= last; seed++) outcomes.push(await new Simulation(seed).run());
  if (only !== undefined) return;
  // Schedules in which nothing happens would prove nothing.
  const count = (condition: (outcome: Outcome) => boolean) => outcomes.filter(condition).length;
  expect(count(({ ended }) => ended === "complete")).toBeGreaterThan(SCHEDULES / 2);
  expect(count(({ ended }) => ended === "aborted")).toBeGreaterThan(SCHEDULES / 50);
  expect(count(({ ended }) => ended === "broken")).toBeGreaterThan(SCHEDULES / 100);
  expect(count(({ captures }) => captures > 3)).toBeGreaterThan(SCHEDULES / 6);
  expect(count(({ spilledBytes }) => spilledBytes > 0)).toBeGreaterThan(SCHEDULES / 50);
  expect(count(({ leftEarly }) => leftEarly)).toBeGreaterThan(SCHEDULES / 20);
  expect(count(({ waits }) => waits > 0)).toBeGreaterThan(SCHEDULES / 10);
  expect(count(({ epochs = 0 }) => epochs > 0)).toBeGreaterThan(SCHEDULES / 20);
});
