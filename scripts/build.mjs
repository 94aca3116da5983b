// Compiles src, workers and bench to dist, afresh, and makes the command executable; then manual pages and completions.
//
// What a user starts is bundled then: the command, and each worker's entry, as CommonJS files without comments and white
// space, in ASCII (V8 takes two bytes a character where a file has others). In the place of the entry is a file that
// loads its bundle by src/bundle-loader.ts, with what V8 has made of it before (scripts/code-cache.mjs). The modules
// themselves stay in dist for the benchmarks and the tests that load them one by one. Packages are loaded as they were
// installed, but for commander: to find and read its eight files takes 10 ms of each command, and nothing in it depends
// on where it stands.
import { execFileSync } from "node:child_process";
import { chmodSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, relative, resolve } from "node:path";
import { rolldown } from "rolldown";

const BUNDLED_PACKAGES = ["commander"];
const WORKERS = ["copy", "verify", "pages", "rbd", "storage"];
const LOADER = "src/bundle-loader";
const READABLE_NAMES = { compress: false, mangle: false, codegen: { removeWhitespace: true } };

rmSync("dist", { recursive: true, force: true });
const tsc = createRequire(import.meta.url).resolve("typescript/bin/tsc");
execFileSync(process.execPath, [tsc, "-p", "tsconfig.build.json"], { stdio: "inherit" });
await bundleAll("dist");
chmodSync("dist/src/cli/main.js", 0o755);
execFileSync(process.execPath, ["scripts/code-cache.mjs"], { stdio: "inherit" });
execFileSync(process.execPath, ["packaging/generate.mjs"], { stdio: "inherit" });

async function bundleAll(folder) {
  await bundle(folder, { [LOADER]: `${LOADER}.js` }, { entryFileNames: "[name].cjs", codeSplitting: false });
  // Bundles are put beside their entry, so that what a module finds relative to itself is found from there.
  const base = alwaysLoaded(folder);
  const command = await bundle(
    folder,
    { main: "src/cli/main.js", program: "src/cli/program.js" },
    {
      entryFileNames: "src/cli/[name]-[hash].cjs",
      chunkFileNames: "src/cli/chunk-[name]-[hash].cjs",
      codeSplitting: { groups: [{ name: "base", test: (id) => base.has(id) }] },
    },
  );
  writeEntry(folder, "src/cli/main.cjs", command.main);
  // For the recorder alone (scripts/code-cache.mjs).
  writeEntry(folder, "src/cli/program.cjs", command.program);
  // By this name it is known; an ES module, as all .js are here, which takes Node 3 ms more than bin/cowcatcher's way.
  const asModule =
    'import { createRequire } from "node:module";\ncreateRequire(import.meta.url)("./main.cjs");\n';
  writeFileSync(`${folder}/src/cli/main.js`, `#!/usr/bin/env node\n${asModule}`);
  for (const worker of WORKERS) {
    const output = { entryFileNames: "workers/[name]-[hash].cjs", codeSplitting: false };
    const { [worker]: file } = await bundle(folder, { [worker]: `workers/${worker}.js` }, output);
    writeEntry(folder, `workers/${worker}.js`, file);
  }
  writeFileSync(`${folder}/workers/package.json`, '{ "type": "commonjs" }\n');
}

/** What each command loads before it is known what it needs is one chunk; the bundler would make some thirty of it. */
function alwaysLoaded(folder) {
  const files = new Set();
  const add = (file) => {
    if (files.has(file)) return;
    files.add(file);
    const imports = readFileSync(file, "utf8").matchAll(/^(?:import|export)\b[^;]*?["'](\.[^"']+)["'];/gm);
    for (const [, name] of imports) add(resolve(dirname(file), name));
  };
  for (const entry of ["src/cli/start.js", "src/cli/program.js"]) add(resolve(folder, entry));
  return files;
}

/** @returns the file's name of each entry. */
async function bundle(folder, entries, output) {
  const build = await rolldown({
    input: Object.fromEntries(Object.entries(entries).map(([name, file]) => [name, `${folder}/${file}`])),
    platform: "node",
    external: (id) => /^[^./]/.test(id) && !BUNDLED_PACKAGES.includes(id),
    treeshake: true,
    logLevel: "warn",
    // Of modules that are loaded anyway: an import() of one there is no mistake.
    checks: { ineffectiveDynamicImport: false },
  });
  const shape = { format: "cjs", exports: "named", minify: READABLE_NAMES, comments: false };
  const { output: made } = await build.generate({ ...shape, minifyInternalExports: false, ...output });
  await build.close();
  const isLoader = LOADER in entries;
  for (const { fileName, code } of made) {
    writeFileSync(`${folder}/${fileName}`, isLoader ? code : inBody(inAscii(code)));
  }
  return Object.fromEntries(
    made.filter(({ isEntry }) => isEntry).map(({ name, fileName }) => [name, fileName]),
  );
}

/**
 * As src/bundle-loader.ts takes it. Without comments other characters stand in strings and patterns alone. The line for the
 * shell goes as well.
 */
function inAscii(code) {
  const other = /[^\x00-\x7f]/g;
  if (/\bimport\(/.test(code))
    throw new Error("import() of a package: the loader has no way for it (src/bundle-loader.ts)");
  return code
    .replace(/^#!.*\n/, "")
    .replace(other, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** As src/bundle-loader.ts takes it: without a copy of it made on the way. */
function inBody(code) {
  const { BODY } = createRequire(import.meta.url)(resolve("dist", `${LOADER}.cjs`));
  return BODY.join(code);
}

function writeEntry(folder, entry, bundle) {
  const loader = relative(dirname(entry), `${LOADER}.cjs`);
  const from = loader.startsWith(".") ? loader : `./${loader}`;
  const load = `bundleLoader("${dirname(entry)}", __dirname, require)`;
  const code = `module.exports = require("${from}").${load}("./${basename(bundle)}");\n`;
  writeFileSync(`${folder}/${entry}`, `"use strict";\n${code}`);
}
