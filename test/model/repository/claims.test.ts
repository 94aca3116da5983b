import { describe, expect, it } from "vitest";
import { simulate } from "./claims-simulator.js";

const SEEDS = Number(process.env["COWCATCHER_CLAIM_SEEDS"] ?? 300);

describe("claims: backups, prunes and forgets in every order that a seed finds", () => {
  it(
    "no backup that counts ever lacks a chunk, and no reported one is ever void",
    { timeout: 600_000 },
    async () => {
      const sum = { completed: 0, failed: 0, killed: 0, deleted: 0, laterGenerations: 0, patches: 0 };
      for (let seed = 1; seed <= SEEDS; seed++) {
        const result = await simulate(seed);
        for (const key of Object.keys(sum) as (keyof typeof sum)[]) sum[key] += result[key];
      }
      // The seeds must have met what the protocol is for.
      for (const count of Object.values(sum)) expect(count).toBeGreaterThan(0);
    },
  );
});
