// Runs every test with vitest and ends with one line of its real counts: "N passed, N failed".
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

const directory = mkdtempSync(join(tmpdir(), "cowcatcher-test-"));
const report = join(directory, "report.json");
try {
  const vitest = join(dirname(createRequire(import.meta.url).resolve("vitest/package.json")), "vitest.mjs");
  const reporters = ["--reporter=default", "--reporter=json", `--outputFile.json=${report}`];
  const run = spawnSync(process.execPath, [vitest, "run", ...reporters, ...process.argv.slice(2)], {
    stdio: "inherit",
  });
  const counts = readCounts();
  const fuzz = process.argv.length === 2 ? runFuzz() : { passed: 0, failed: 0 };
  // A file that could not even be loaded has no tests to count, and must not pass for a success.
  const failed = counts.failed + (run.status !== 0 && counts.failed === 0 ? 1 : 0) + fuzz.failed;
  process.exitCode = failed > 0 || counts.passed === 0 ? 1 : 0;
  console.log(`${counts.passed + fuzz.passed} passed, ${failed} failed`);
} finally {
  rmSync(directory, { recursive: true, force: true });
}

function readCounts() {
  try {
    const { numPassedTests, numFailedTests } = JSON.parse(readFileSync(report, "utf8"));
    return { passed: numPassedTests, failed: numFailedTests };
  } catch {
    return { passed: 0, failed: 0 };
  }
}

/**
 * A minute of each of the three fuzzers, with a new seed unless FUZZ_SEED gives one; it is printed. Only in a whole run.
 * Counts as one test.
 */
function runFuzz() {
  const seconds = process.env.FUZZ_SECONDS ?? "180";
  if (seconds === "0") return { passed: 0, failed: 0 };
  const seed = process.env.FUZZ_SEED === undefined ? [] : ["--seed", process.env.FUZZ_SEED];
  const args = ["--enable-source-maps", "dist/test/fuzz/main.js", "--seconds", seconds, ...seed];
  const { status } = spawnSync(process.execPath, args, { stdio: "inherit" });
  return status === 0 ? { passed: 1, failed: 0 } : { passed: 0, failed: 1 };
}
