/** Whole files that CI leaves to `npm run test:long`: rooms that have not changed for long, and a real guest's boot. */
export const CAMPAIGN_FILES = [
  "test/long/**/*.test.ts",
  "test/integration/image/{backing-names,check,check-bitmaps,check-repair,qcow2-subclusters,trim-and-zero}.test.ts",
  "test/integration/nbd/{blocking-reader,image}.test.ts",
  "test/integration/backup/real-guest.test.ts",
];

/** Of the matrices of these CI takes a part (test/support/campaign.ts). */
export const SAMPLED_FILES = [
  "test/integration/backup/{live-backup,missing-bytes}.test.ts",
  "test/integration/qemu/{bitmaps,ring}.test.ts",
  "test/model/{cow-threads,qcow2-crash}.test.ts",
];
