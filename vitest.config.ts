import { defineConfig } from "vitest/config";
import { CAMPAIGN_FILES } from "./vitest.campaigns.js";

export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    exclude: CAMPAIGN_FILES,
    globalSetup: ["test/support/ceph-setup.ts"],
    // No test is about these limits: they end a run that hangs, and must not end one whose processors were away.
    testTimeout: 180_000,
    hookTimeout: 180_000,
    teardownTimeout: 60_000,
    // Two cores: more files at once would only make the ones with real peers slower.
    maxWorkers: 2,
    // Of one file's concurrent tests, each of which has a server, guests and clients of its own.
    maxConcurrency: 4,
  },
});
