// Writes the manual pages to dist/man, and the completions to dist/completions; a part of the build.
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { completions } from "./completions.mjs";
import { manualPages } from "./man.mjs";

for (const [folder, files] of [
  ["dist/man", await manualPages()],
  ["dist/completions", await completions()],
]) {
  mkdirSync(folder, { recursive: true });
  for (const [name, text] of files) writeFileSync(join(folder, name), text);
}
