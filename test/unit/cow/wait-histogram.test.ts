import { expect, it } from "vitest";
import { countWait, noWaits, WAIT_BOUNDS_SECONDS } from "../../../src/cow/wait-histogram.js";

it("counts a wait in the first range whose end it does not pass", () => {
  const counts = noWaits();
  for (const ms of [0, 1, 1.001, 60_000, 60_001, 1e9]) countWait(counts, ms);
  expect(counts).toHaveLength(WAIT_BOUNDS_SECONDS.length + 1);
  expect([counts[0], counts[1], counts.at(-2), counts.at(-1)]).toEqual([2, 1, 1, 2]);
});
