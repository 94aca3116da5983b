// Runs tests with vitest and ends with one line of its real counts: "N passed, N failed".
//   npm test                          all, then the fuzzers; with TEST_NODES=1 a smoke of the other versions of Node.js
//   npm test -- test/unit/cow -t ring  those files and names (what vitest takes)
//   npm run test:long                 the campaigns of test/long, then the fuzzers for a quarter of an hour
import { spawn, spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

/** Of all three fuzzers together. */
const FUZZ_SECONDS = { usual: "40", long: "900" };

const isLong = process.argv.includes("--long");
const args = process.argv.slice(2).filter((argument) => argument !== "--long");
const isWhole = args.length === 0;
const directory = mkdtempSync(join(tmpdir(), "cowcatcher-test-"));
const report = join(directory, "report.json");
try {
  const vitest = join(dirname(createRequire(import.meta.url).resolve("vitest/package.json")), "vitest.mjs");
  const config = isLong ? ["--config", "vitest.long.config.ts"] : [];
  const reporters = ["--reporter=default", "--reporter=json", `--outputFile.json=${report}`];
  const run = spawnSync(process.execPath, [vitest, "run", ...config, ...reporters, ...args], {
    stdio: "inherit",
  });
  const counts = readCounts();
  // A file that could not even be loaded has no tests to count, and must not pass for a success.
  if (run.status !== 0 && counts.failed === 0) counts.failed++;
  // Side by side: a fuzzer keeps one processor busy, and the smokes mostly wait.
  const others = isWhole ? [runFuzz()] : [];
  if (isWhole && !isLong && process.env.TEST_NODES === "1") others.push(runOtherNodes());
  for (const { ok, output } of await Promise.all(others)) {
    process.stdout.write(output);
    count(counts, ok);
  }
  process.exitCode = counts.failed > 0 || counts.passed === 0 ? 1 : 0;
  console.log(`${counts.passed} passed, ${counts.failed} failed`);
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

/** Counts as one test. */
function count(counts, ok) {
  if (ok) counts.passed++;
  else counts.failed++;
}

/** All three fuzzers, with a new seed unless FUZZ_SEED gives one; it is printed. */
async function runFuzz() {
  const seconds = process.env.FUZZ_SECONDS ?? (isLong ? FUZZ_SECONDS.long : FUZZ_SECONDS.usual);
  if (seconds === "0") return { ok: true, output: "" };
  const seed = process.env.FUZZ_SEED === undefined ? [] : ["--seed", process.env.FUZZ_SEED];
  return runNode(["--enable-source-maps", "dist/test/fuzz/main.js", "--seconds", seconds, ...seed]);
}

function runOtherNodes() {
  return runNode(["scripts/test-nodes.mjs", "--skip-current"]);
}

/** Its output is kept until its end, as others run beside it. */
function runNode(nodeArgs) {
  return new Promise((settle, reject) => {
    const child = spawn(process.execPath, nodeArgs, { stdio: ["ignore", "pipe", "pipe"] });
    let output = "";
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding("utf8").on("data", (text) => (output += text));
    }
    child.on("error", reject);
    child.on("close", (code) => settle({ ok: code === 0, output }));
  });
}
