import { defineConfig } from "vitest/config";

/** Campaigns of minutes, not part of CI: `npm run test:long` (CONTRIBUTING.md). */
export default defineConfig({
  test: {
    include: [
      "test/long/**/*.test.ts",
      // Of these CI takes a part (test/support/campaign.ts).
      "test/integration/backup/{live-backup,missing-bytes}.test.ts",
      "test/integration/qemu/{bitmaps,ring}.test.ts",
      "test/model/{cow-threads,qcow2-crash}.test.ts",
    ],
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
