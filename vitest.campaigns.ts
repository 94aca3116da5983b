/** Whole files that CI leaves to `npm run test:long`: rooms that have not changed for long, and a real guest's boot. */
export const CAMPAIGN_FILES = [
  "test/long/**/*.test.ts",
  "test/integration/image/{backing-names,check,check-bitmaps,check-repair,qcow2-subclusters,trim-and-zero}.test.ts",
  "test/integration/nbd/{blocking-reader,image}.test.ts",
  "test/integration/backup/{live-subclusters,real-guest,snapshot-source}.test.ts",
  "test/model/qcow2-repair.test.ts",
  "test/integration/cli/{byte-names,launcher}.test.ts",
];

/** Of the matrices of these CI takes a part (test/support/campaign.ts). */
export const SAMPLED_FILES = [
  "test/integration/backup/{failures,memory-growth,kill-points,live-backup,missing-bytes,since,verify}.test.ts",
  "test/integration/block/direct.test.ts",
  "test/integration/cli/{first-cause,targets}.test.ts",
  "test/integration/nbd/snapshot-export.test.ts",
  "test/integration/qemu/{bitmaps,ring}.test.ts",
  "test/integration/rbd/rbd.test.ts",
  "test/integration/target/qcow2.test.ts",
  "test/model/{cow,cow-threads,qcow2-crash,qcow2-image,tracking}.test.ts",
  "test/unit/image/qcow2/reader.test.ts",
];
