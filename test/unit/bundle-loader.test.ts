import { mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Script } from "node:vm";
import { expect, it } from "vitest";
import { BODY, bundleLoader } from "../../src/bundle-loader.js";
import { scratchFolder } from "../support/server.js";

const require = createRequire(import.meta.url);

function loaderOf(files: Record<string, string>): { folder: string; load: NodeJS.Require } {
  const folder = scratchFolder();
  for (const [name, text] of Object.entries(files)) writeFileSync(join(folder, name), BODY.join(text));
  return { folder, load: bundleLoader("bundle", folder, require) };
}

/** As scripts/code-cache-recorder.cjs does. */
function keep(folder: string, name: string, source: string): void {
  const place = join(folder, `code-cache/${process.versions.v8}-${process.arch}`);
  mkdirSync(place, { recursive: true });
  writeFileSync(
    join(place, name),
    new Script(BODY.join(source), { filename: `bundle/${name}` }).createCachedData(),
  );
}

it("loads each file once, those that need each other too, and gives it its own place", () => {
  const { folder, load } = loaderOf({
    "a.cjs":
      'exports.made = Symbol("a"); exports.b = require("./b.cjs"); exports.place = [__dirname, __filename];',
    "b.cjs": 'exports.a = require("./a.cjs");',
  });
  const a = load("./a.cjs") as { made: symbol; b: { a: unknown }; place: string[] };
  expect(load("./a.cjs")).toBe(a);
  expect(a.b.a).toBe(a);
  expect(a.place).toEqual([folder, `${folder}/a.cjs`]);
});

it("a file that throws is loaded again when it is asked for again", () => {
  const { load } = loaderOf({
    "a.cjs":
      "globalThis.attempts = (globalThis.attempts ?? 0) + 1; if (globalThis.attempts === 1) throw new Error('once');",
  });
  expect(() => load("./a.cjs") as unknown).toThrow("once");
  expect(load("./a.cjs")).toEqual({});
});

it("takes what V8 kept of the file, and compiles it where that is none or damaged", () => {
  const source = "exports.value = 40 + 2; exports.where = new Error('here').stack;";
  const { folder, load } = loaderOf({ "kept.cjs": source, "damaged.cjs": source, "none.cjs": source });
  keep(folder, "kept.cjs", source);
  keep(folder, "damaged.cjs", source);
  const [version = ""] = readdirSync(join(folder, "code-cache"));
  writeFileSync(join(folder, "code-cache", version, "damaged.cjs"), "no code");
  for (const name of ["kept.cjs", "damaged.cjs", "none.cjs"]) {
    const { value, where } = load(`./${name}`) as { value: number; where: string };
    expect(value).toBe(42);
    expect(where).toContain(`bundle/${name}:1:`);
  }
});

it("modules of Node's that are loaded late are there when they are used, as others are", () => {
  const { load } = loaderOf({
    "a.cjs": `
      const os = require("node:os"), path = require("node:path");
      exports.hostname = os.hostname();
      exports.names = Object.keys(os);
      exports.has = ["hostname" in os, "nothing" in os];
      exports.join = path.join;`,
  });
  const os = require("node:os") as typeof import("node:os");
  const a = load("./a.cjs") as { hostname: string; names: string[]; has: boolean[]; join: unknown };
  expect(a.hostname).toBe(os.hostname());
  expect(a.names).toEqual(Object.keys(os));
  expect(a.has).toEqual([true, false]);
  expect(a.join).toBe(join);
});
