import { defineConfig } from "vitest/config";

/** Campaigns of minutes, not part of CI: `npm run test:long` (CONTRIBUTING.md). */
export default defineConfig({
  test: {
    include: ["test/long/**/*.test.ts"],
    globalSetup: ["test/support/ceph-setup.ts"],
    testTimeout: 3_600_000,
    hookTimeout: 600_000,
    teardownTimeout: 60_000,
    // One after another: they want the machine for themselves.
    maxWorkers: 1,
    passWithNoTests: true,
  },
});
