import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { IS_CAMPAIGN } from "../support/campaign.js";
import { Random } from "../support/random.js";
import { TrackingSimulator } from "./tracking-simulator.js";

const SCHEDULES = Number(process.env["TRACKING_MODEL_SCHEDULES"] ?? (IS_CAMPAIGN ? 3000 : 80));
const SEED = process.env["TRACKING_MODEL_SEED"];
const STEPS = 250;

describe("changed-block tracking under any schedule", () => {
  // The trackers' own timers belong to no schedule: sweeps are a step of it.
  beforeEach(() => void vi.useFakeTimers({ toFake: ["setInterval", "clearInterval"] }));
  afterEach(() => void vi.useRealTimers());

  it("reports all that differs from a checkpoint, through kills and power cuts at any moment", async () => {
    const seeds = SEED === undefined ? Array.from({ length: SCHEDULES }, (_, i) => i + 1) : [Number(SEED)];
    for (const seed of seeds) {
      const ended = new TrackingSimulator(new Random(seed)).run(STEPS);
      await ended.catch((error: unknown) => expect.fail(`TRACKING_MODEL_SEED=${seed}: ${String(error)}`));
    }
  });
});
