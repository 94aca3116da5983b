// Runs the tests with the Node.js versions that are promised, each from the registry's package of its binary:
//   npm run test:nodes                  a smoke of each: demo, live backup, offline copy with zstd, a kill
//   npm run test:nodes -- --whole       all tests with each (ten minutes and more a version)
//   npm run test:nodes -- --only 26     one version; --skip-current leaves out the one at hand
// Ends with "N passed, N failed", a version being one each.
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { parseArgs } from "node:util";

/** The oldest that package.json allows, and the newest of each line since. */
const VERSIONS = ["20.19.0", "22", "24", "26"];
const CACHE = resolve("node_modules/.cache/cowcatcher-nodes");
const VITEST = join(dirname(createRequire(import.meta.url).resolve("vitest/package.json")), "vitest.mjs");
const DEADLINE_MS = { smoke: 5 * 60_000, whole: 40 * 60_000 };

const { values } = parseArgs({
  options: {
    whole: { type: "boolean", default: false },
    "skip-current": { type: "boolean", default: false },
    only: { type: "string" },
  },
});
const chosen = VERSIONS.filter((version) => values.only === undefined || version === values.only).filter(
  (version) => !values["skip-current"] || !`${process.versions.node}.`.startsWith(`${version}.`),
);
if (chosen.length === 0) throw new Error(`--only ${values.only}: give one of ${VERSIONS.join(", ")}`);

const results = [];
// Two at a time, as the demo mostly waits for its rate limit; the whole suites would fight for the processors.
const queue = [...chosen];
await Promise.all(
  Array.from({ length: values.whole ? 1 : 2 }, async () => {
    for (let version; (version = queue.shift()) !== undefined;) {
      const node = install(version);
      results.push({ version, ok: values.whole ? await whole(node) : await smoke(version, node) });
    }
  }),
);
const failed = results.filter(({ ok }) => !ok);
for (const { version, ok } of results) console.log(`Node ${version}: ${ok ? "passed" : "FAILED"}`);
console.log(`${results.length - failed.length} passed, ${failed.length} failed`);
process.exitCode = failed.length > 0 ? 1 : 0;

/** The path of that version's binary. The packages hold nothing else, and run no scripts. */
function install(version) {
  const name = `node-linux-${process.arch}`;
  const folder = join(CACHE, version);
  const node = join(folder, "node_modules", name, "bin/node");
  if (!existsSync(node)) {
    mkdirSync(folder, { recursive: true });
    const args = [
      "install",
      "--no-save",
      "--no-audit",
      "--no-fund",
      "--prefix",
      folder,
      `${name}@${version}`,
    ];
    const { status, stderr } = spawnSync("npm", args, { encoding: "utf8" });
    if (status !== 0) throw new Error(`cannot install ${name}@${version}: ${stderr}`);
  }
  return node;
}

async function smoke(version, node) {
  const tests = ["run", "--maxWorkers=1"];
  const steps = [
    ["demo", ["dist/bench/demo.js"]],
    ["live and zstd", [VITEST, ...tests, "test/integration/target/compressed.test.ts"]],
    ["kill", [VITEST, ...tests, "test/integration/backup/kill-points.test.ts", "-t", "serve, killed"]],
  ];
  for (const [name, args] of steps) {
    const { code, output } = await run(node, args, DEADLINE_MS.smoke);
    if (code === 0) continue;
    console.log(`Node ${version}, ${name}: ended with ${code}\n${output}`);
    return false;
  }
  return true;
}

async function whole(node) {
  const env = { ...process.env, FUZZ_SECONDS: "0" };
  const { code } = await run(node, ["scripts/test.mjs"], DEADLINE_MS.whole, { env, stdio: "inherit" });
  return code === 0;
}

function run(program, args, deadlineMs, options = {}) {
  return new Promise((settle, reject) => {
    const child = spawn(program, args, {
      stdio: ["ignore", "pipe", "pipe"],
      timeout: deadlineMs,
      ...options,
    });
    let output = "";
    child.stdout?.setEncoding("utf8").on("data", (text) => (output += text));
    child.stderr?.setEncoding("utf8").on("data", (text) => (output += text));
    child.on("error", reject);
    child.on("close", (code, signal) => settle({ code: code ?? signal, output }));
  });
}
