import { defineConfig } from "vitest/config";
import { CAMPAIGN_FILES, SAMPLED_FILES } from "./vitest.campaigns.js";

/** Campaigns of minutes, not part of CI: `npm run test:long` (CONTRIBUTING.md). */
export default defineConfig({
  test: {
    include: [...CAMPAIGN_FILES, ...SAMPLED_FILES],
    env: { COWCATCHER_CAMPAIGN: "1" },
    globalSetup: ["test/support/ceph-setup.ts"],
    testTimeout: 3_600_000,
    hookTimeout: 600_000,
    teardownTimeout: 60_000,
    // One after another: they want the machine for themselves.
    maxWorkers: 1,
    passWithNoTests: true,
  },
});
