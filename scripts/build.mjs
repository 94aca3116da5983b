// Compiles src, workers and bench to dist, afresh, and makes the command executable; then manual pages and completions.
//
// What a user starts is bundled then, in place: the command, and each worker's entry. Loading some forty small modules
// took the command 0.1 s, and each worker thread again. The modules themselves stay in dist for the benchmarks and the
// tests that load them one by one. Packages are loaded as they were installed, but for commander: to find and read its
// eight files takes 10 ms of each command, and nothing in it depends on where it stands.
import { execFileSync } from "node:child_process";
import { chmodSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, resolve } from "node:path";
import { rolldown } from "rolldown";

const BUNDLED_PACKAGES = ["commander"];
/** Relative to dist. Chunks are put beside their entry, so that what a module finds relative to itself is found from there. */
const ENTRIES = [
  { entry: "src/cli/main.js", chunks: "src/cli/chunk-[name]-[hash].js" },
  { entry: "workers/copy.js", chunks: undefined },
  { entry: "workers/verify.js", chunks: undefined },
  { entry: "workers/pages.js", chunks: undefined },
  { entry: "workers/rbd.js", chunks: undefined },
  { entry: "workers/storage.js", chunks: undefined },
];

rmSync("dist", { recursive: true, force: true });
const tsc = createRequire(import.meta.url).resolve("typescript/bin/tsc");
execFileSync(process.execPath, [tsc, "-p", "tsconfig.build.json"], { stdio: "inherit" });
for (const entry of ENTRIES) await bundle("dist", entry);
chmodSync("dist/src/cli/main.js", 0o755);
execFileSync(process.execPath, ["packaging/generate.mjs"], { stdio: "inherit" });

/** What each command loads before it is known what it needs is one chunk; the bundler would make some thirty of it. */
function alwaysLoaded(folder) {
  const files = new Set();
  const add = (file) => {
    if (files.has(file)) return;
    files.add(file);
    const imports = readFileSync(file, "utf8").matchAll(/^(?:import|export)\b[^;]*?["'](\.[^"']+)["'];/gm);
    for (const [, name] of imports) add(resolve(dirname(file), name));
  };
  const start = resolve(folder, "src/cli/start.js");
  for (const entry of [start, resolve(folder, "src/cli/program.js")]) add(entry);
  // It waits for the program, which would wait for the chunk that it is in.
  files.delete(start);
  return files;
}

async function bundle(folder, { entry, chunks }) {
  const base = chunks === undefined ? undefined : alwaysLoaded(folder);
  const build = await rolldown({
    input: { [entry.replace(/\.js$/, "")]: `${folder}/${entry}` },
    platform: "node",
    external: (id) => /^[^./]/.test(id) && !BUNDLED_PACKAGES.includes(id),
    treeshake: true,
    logLevel: "warn",
  });
  await build.write({
    dir: folder,
    format: "esm",
    entryFileNames: "[name].js",
    ...(base === undefined
      ? { codeSplitting: false }
      : {
          chunkFileNames: chunks,
          codeSplitting: { groups: [{ name: "base", test: (id) => base.has(id) }] },
        }),
  });
  await build.close();
}
